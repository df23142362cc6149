"""Fitting: one pass over calibration prompts into second moments, then a closed-form solve per layer."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from capsight.errors import CalibrationError, OptionError
from capsight.kvcapsule.codecs import CODECS, LayerCodec
from capsight.kvcapsule.moments import LayerMoments
from capsight.kvcapsule.plan import CapsulePlan
from capsight.layout import build_layout

Moments = dict[int, LayerMoments]
"""Second moments by layer index."""


def collect_moments(
    model: Any, processor: Any, samples: Iterable[Any], block_size: int, progress: bool
) -> Moments:
    """Prefill every sample once and add up the second moments of its image blocks, layer by layer.

    Args:
        model: a transformers vision-language model; put into eval mode while it runs.
        processor: renders samples that are chat messages; None where all samples are processor outputs.
        samples: processor outputs (mappings of tensors, any batch size) or lists of chat messages.
        block_size: tokens in a block (N).
        progress: show a progress bar.

    Returns:
        Moments of every full-attention layer.

    Raises:
        CalibrationError: no image is as long as a block, or keys or values are not finite.
    """
    moments: Moments = {}
    for inputs in calibration_inputs(model, processor, samples, progress):
        add_sample(moments, model, inputs, block_size)
    if not moments:
        raise CalibrationError(
            f"no calibration sample has an image of at least {block_size} tokens; use larger images or a "
            "smaller block_size"
        )
    return moments


def calibration_inputs(
    model: Any, processor: Any, samples: Iterable[Any], progress: bool
) -> Iterator[Mapping[str, Any]]:
    """Processor outputs of every sample, with a progress bar, the model in eval mode meanwhile."""
    training = model.training
    model.eval()
    try:
        for sample in _track(samples, progress):
            yield _as_inputs(sample, processor)
    finally:
        model.train(training)


def add_sample(moments: Moments, model: Any, inputs: Mapping[str, Any], block_size: int) -> None:
    """Prefill `inputs` and add its image blocks to `moments`, which starts as an empty dict.

    Raises:
        CalibrationError: keys or values are not finite.
    """
    for index, (keys, values) in prefilled_blocks(model, inputs, block_size).items():
        if index not in moments:
            moments[index] = LayerMoments(*keys.shape[1:])
        try:
            moments[index].update(keys, values)
        except CalibrationError as error:
            raise CalibrationError(f"layer {index}: {error}") from error


@torch.no_grad()
def prefilled_blocks(
    model: Any, inputs: Mapping[str, Any], block_size: int
) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values `[M, H, N, D]` of all image blocks of a prompt, by full-attention layer."""
    plan = CapsulePlan.from_layout(build_layout(inputs, model.config), block_size)
    if not plan.runs:
        return {}
    cache = DynamicCache(config=model.config)
    on_device = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    # generate, not forward: it derives the positions of padded rows as later calls will.
    model.generate(**on_device, past_key_values=cache, max_new_tokens=1, do_sample=False)
    return {
        index: (_blocks(layer.keys, plan), _blocks(layer.values, plan))
        for index, layer in enumerate(cache.layers)
        if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None
    }


def solve(moments: Moments, codec: str, retained: float, options: Mapping[str, Any]) -> dict[int, LayerCodec]:
    """Fit a codec to every layer's moments.

    Raises:
        OptionError: an option is unknown or out of range.
    """
    if codec not in CODECS:
        raise OptionError(f"codec must be one of {sorted(CODECS)}, not {codec!r}")
    known = [
        p.name for p in inspect.signature(CODECS[codec].fit).parameters.values() if p.kind is p.KEYWORD_ONLY
    ]
    if unknown := sorted(set(options) - set(known)):
        raise OptionError(f"the {codec} codec has no option {unknown}; it has {known}")
    return {
        index: CODECS[codec].fit(layer, kept_tokens(retained, layer.block_size), **options)
        for index, layer in sorted(moments.items())
    }


def check_options(codec: str, retained: float, block_size: int, options: Mapping[str, Any]) -> None:
    """Refuse what `solve` would refuse, by fitting a codec to one block of zeros.

    Raises:
        OptionError: an option is unknown or out of range.
    """
    plan = CapsulePlan(block_size, (), ())
    dry = LayerMoments(1, plan.block_size, 1)
    dry.update(torch.zeros(1, 1, block_size, 1), torch.zeros(1, 1, block_size, 1))
    solve({0: dry}, codec, retained, options)


def kept_tokens(retained: float, block_size: int) -> int:
    """Tokens kept of a block: the nearest whole number, at least one.

    Raises:
        OptionError: `retained` is not in (0, 1].
    """
    if not 0 < retained <= 1:
        raise OptionError(f"retained is a fraction in (0, 1], not {retained}")
    return max(round(retained * block_size), 1)


def _blocks(x: Tensor, plan: CapsulePlan) -> Tensor:
    """The runs of `plan` in keys or values `[B, H, S, D]`: `[M, H, N, D]`."""
    return torch.stack([x[row, :, start : start + plan.block_size] for row, start in plan.runs])


def _as_inputs(sample: Any, processor: Any) -> Mapping[str, Any]:
    if isinstance(sample, Mapping):
        return sample
    if processor is None:
        raise CalibrationError(
            "samples that are chat messages need a processor; pass one, or processor outputs"
        )
    return processor.apply_chat_template(
        sample, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )


def _track(samples: Iterable[Any], show: bool) -> Iterable[Any]:
    total = len(samples) if isinstance(samples, Sized) else None
    columns = (TextColumn("calibrating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not show, transient=True) as bar:
        yield from bar.track(samples, total=total)
