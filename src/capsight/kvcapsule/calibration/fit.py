"""Fitting: one pass over calibration prompts into second moments, then a closed-form solve per layer."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from capsight.attention_swap import unserved
from capsight.cache_argument import CACHE
from capsight.errors import CalibrationError, OptionError
from capsight.execution import inputs_device
from capsight.kvcapsule.budget import LayerNeeds, check_share, measured_counts
from capsight.kvcapsule.calibration.block_sample import relative_error
from capsight.kvcapsule.calibration.fit_journal import FitJournal
from capsight.kvcapsule.calibration.processes import Processes
from capsight.kvcapsule.calibration.samples import calibration_inputs
from capsight.kvcapsule.calibration.statistics import Calibration, Moments
from capsight.kvcapsule.codecs import CODECS, AdaptiveCodec, LayerCodec
from capsight.kvcapsule.codecs.moments import LayerMoments
from capsight.kvcapsule.plan import CapsulePlan
from capsight.layout import build_layout

MEASURED = ("heads", "adaptive", "evict")
"""Codecs whose retained count can differ by layer; the others are fitted for one."""


def calibrate(
    model: Any,
    processor: Any,
    samples: Iterable[Any],
    block_size: int,
    progress: bool,
    resume: str | os.PathLike[str] | None = None,
    processes: Processes | None = None,
) -> Calibration:
    """Prefill every sample once and take what a fit needs of its image blocks, layer by layer.

    Args:
        model: a transformers vision-language model; put into eval mode while it runs.
        processor: renders samples that are chat messages; None where all samples are processor outputs.
        samples: processor outputs (mappings of tensors, any batch size) or lists of chat messages.
        block_size: tokens in a block (N).
        progress: show a progress bar.
        resume: folder for what was added up so far; if it holds an interrupted pass, that goes on.
        processes: those that share the samples; None if this one reads all of them.

    Returns:
        What all processes found, in the first of them; in the others what they found themselves.

    Raises:
        CalibrationError: no image is as long as a block, keys or values are not finite, or `resume` holds
            the pass of another model, block size or samples.
        CapsuleFileError: `resume` cannot be read or written.
    """
    processes = processes or Processes.alone()
    journal = None if resume is None else FitJournal(resume, model, block_size, processes)
    calibration = Calibration() if journal is None else journal.calibration
    for index, inputs in calibration_inputs(model, processor, samples, progress, processes):
        if journal is not None and journal.has(inputs):
            continue
        add_sample(calibration, model, inputs, block_size, index)
        if journal is not None:
            journal.record()
    if journal is not None:
        journal.finish()
    processes.joined(calibration, Calibration.join)
    if processes.rank == 0 and not calibration.moments:
        raise CalibrationError(
            f"no calibration sample has an image of at least {block_size} tokens; use larger images or a "
            "smaller block_size"
        )
    return calibration


def add_sample(
    calibration: Calibration, model: Any, inputs: Mapping[str, Any], block_size: int, index: int = 0
) -> None:
    """Prefill `inputs`, the sample with this number, and add its image blocks to `calibration`.

    Raises:
        CalibrationError: keys or values are not finite.
    """
    with calibration.attention.watching(model, build_layout(inputs, model.config)):
        blocks = prefilled_blocks(model, inputs, block_size)
    for layer, (keys, values) in blocks.items():
        if layer not in calibration.moments:
            calibration.moments[layer] = LayerMoments(*keys.shape[1:])
        try:
            calibration.moments[layer].update(keys, values)
        except CalibrationError as error:
            raise CalibrationError(f"layer {layer}: {error}") from error
    calibration.sample.add(blocks, index)


def prefilled_blocks(
    model: Any, inputs: Mapping[str, Any], block_size: int
) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values `[M, H, N, D]` of all image blocks of a prompt, by full-attention layer."""
    plan = CapsulePlan.from_layout(build_layout(inputs, model.config), block_size)
    if not plan.runs:
        return {}
    return {
        index: (_blocks(keys, plan), _blocks(values, plan))
        for index, (keys, values) in prefilled(model, inputs).items()
    }


@torch.no_grad()
def prefilled(model: Any, inputs: Mapping[str, Any]) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys after RoPE and values `[B, H, S, D]` of a prompt, by full-attention layer."""
    cache, device = DynamicCache(config=model.config), inputs_device(model)
    on_device = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    # generate, not forward: it derives the positions of padded rows as later calls will.
    with unserved():
        model.generate(**on_device, **{CACHE: cache}, max_new_tokens=1, do_sample=False, num_beams=1)
    return {
        index: (layer.keys, layer.values)
        for index, layer in enumerate(cache.layers)
        if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None
    }


def solve(
    moments: Moments, codec: str, kept: Sequence[int], options: Mapping[str, Any]
) -> dict[int, LayerCodec]:
    """Fit a codec to every layer's moments.

    Args:
        moments: of L layers.
        codec: its name.
        kept: tokens that each layer keeps of a block, `[L]`, ascending by layer.
        options: the codec's own.

    Raises:
        OptionError: an option is unknown or out of range.
    """
    known = [
        p.name for p in inspect.signature(CODECS[codec].fit).parameters.values() if p.kind is p.KEYWORD_ONLY
    ]
    if unknown := sorted(set(options) - set(known)):
        raise OptionError(f"the {codec} codec has no option {unknown}; it has {known}")
    return {
        index: CODECS[codec].fit(layer, count, **options)
        for (index, layer), count in zip(sorted(moments.items()), kept, strict=True)
    }


def measure_needs(calibration: Calibration, codec: str, options: Mapping[str, Any]) -> LayerNeeds | None:
    """Errors of every layer at several retained fractions, and what it attends to.

    `heads` and `evict` are measured as `adaptive`; codecs fitted for one fraction are not measured (None).

    Args:
        calibration: of the calibration pass.
        codec: name of the codec.
        options: the codec's own.
    """
    if codec not in MEASURED:
        return None
    fit_options = {name: value for name, value in options.items() if name != "weights"}
    errors = []
    for index, layer in sorted(calibration.moments.items()):
        counts, blocks = measured_counts(layer.block_size), calibration.sample.blocks(index)
        fitted = AdaptiveCodec.fit(layer, layer.block_size, **fit_options)
        errors.append(tuple(round(relative_error(fitted.resized(count), *blocks), 6) for count in counts))
    shares = tuple(round(calibration.attention.share(index), 6) for index in sorted(calibration.moments))
    return LayerNeeds(counts, tuple(errors), shares)


def kept_tokens(retained: float, block_size: int) -> int:
    """Tokens kept of a block: the nearest whole number, at least one.

    Raises:
        OptionError: `retained` is not in (0, 1].
    """
    check_share(retained)
    return max(round(retained * block_size), 1)


def _blocks(x: Tensor, plan: CapsulePlan) -> Tensor:
    """The runs of `plan` in keys or values `[B, H, S, D]`: `[M, H, N, D]`."""
    return torch.stack([x[run.row, :, run.start : run.end] for run in plan.runs])
