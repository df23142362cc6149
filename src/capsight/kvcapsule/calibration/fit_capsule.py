"""From calibration prompts to the codecs of a capsule and what is known of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from capsight.errors import CalibrationError, OptionError
from capsight.kvcapsule.budget import Budget, check_share, share_out
from capsight.kvcapsule.calibration.fit import calibrate, check_options, kept_tokens, measure_needs, solve
from capsight.kvcapsule.calibration.joint_fit import check_rank, fit_joint
from capsight.kvcapsule.calibration.key_mlp import train_key_mlps
from capsight.kvcapsule.calibration.processes import Processes
from capsight.kvcapsule.calibration.statistics import Calibration
from capsight.kvcapsule.codecs import JointCodec, LayerCodec, StaticMlpCodec
from capsight.kvcapsule.info import CapsuleInfo, LayerInfo
from capsight.model_fingerprint import model_fingerprint


def fit_capsule(
    model: Any,
    processor: Any,
    samples: Iterable[Any],
    retained: float,
    codec: str,
    block_size: int,
    progress: bool,
    budget: Budget | None,
    resume: str | os.PathLike[str] | None,
    options: Mapping[str, Any],
    processes: Processes,
) -> tuple[dict[int, LayerCodec], CapsuleInfo]:
    """Fit a codec to every full-attention layer of a model; arguments and errors are `KVCapsule.fit`'s."""
    if (getattr(model, "tp_size", None) or 1) > 1:
        raise CalibrationError(
            "each process holds only some heads of this model (tensor parallelism); fit a copy that is "
            "whole, on one device or spread by device_map"
        )
    if codec == JointCodec.name:
        return _joint(model, processor, samples, retained, progress, budget, resume, processes, options)
    budget = check_options(codec, retained, block_size, budget, options)  # before the long part
    if codec == StaticMlpCodec.name and not isinstance(samples, Sequence):
        samples = list(samples)  # they are read twice
    found = calibrate(model, processor, samples, block_size, progress, resume, processes)
    codecs, info = processes.from_first(
        lambda: _solved(model, found, retained, codec, block_size, budget, options)
    )
    if codec == StaticMlpCodec.name:
        codecs = train_key_mlps(codecs, model, processor, samples, progress, processes)
    return codecs, info


def _solved(
    model: Any,
    found: Calibration,
    retained: float,
    codec: str,
    block_size: int,
    budget: Budget,
    options: Mapping[str, Any],
) -> tuple[dict[int, LayerCodec], CapsuleInfo]:
    needs = measure_needs(found, codec, options)
    kept = share_out(budget, needs, len(found.moments), kept_tokens(retained, block_size), block_size)
    codecs = solve(found.moments, codec, kept, options)
    info = CapsuleInfo(
        codec=codec,
        block_size=block_size,
        layers=tuple(
            LayerInfo(index, codecs[index].kept, layer.shape[0], layer.shape[2])
            for index, layer in sorted(found.moments.items())
        ),
        options=dict(options),
        **_about(model),
        blocks=next(iter(found.moments.values())).blocks,
        budget=budget,
        needs=needs,
    )
    return codecs, info


def _joint(
    model: Any,
    processor: Any,
    samples: Iterable[Any],
    retained: float,
    progress: bool,
    budget: Budget | None,
    resume: str | os.PathLike[str] | None,
    processes: Processes,
    options: Mapping[str, Any],
) -> tuple[dict[int, LayerCodec], CapsuleInfo]:
    """The joint codec: all layers share a latent, so there is no budget to share out."""
    check_share(retained)
    if budget not in (None, "uniform"):
        raise OptionError("the joint codec stores all layers together; use budget='uniform'")
    if unknown := sorted(set(options) - {"rank"}):
        raise OptionError(f"the joint codec has no option {unknown}; it has ['rank']")
    rank = check_rank(options.get("rank"))
    fitted, seen = fit_joint(model, processor, samples, rank, progress, resume, processes)
    codecs: dict[int, LayerCodec] = {index: codec.at(retained) for index, codec in fitted.items()}
    heads, head_dim = next(iter(fitted.values())).mean.shape[1:]
    info = CapsuleInfo(
        codec=JointCodec.name,
        block_size=1,
        layers=tuple(LayerInfo(index, 1, heads, head_dim) for index in codecs),
        options=dict(options),
        **_about(model),
        blocks=seen,
        share=retained,
    )
    return codecs, info


def _about(model: Any) -> dict[str, Any]:
    """What is noted of the model."""
    return {
        "itemsize": model.dtype.itemsize,
        "fingerprint": model_fingerprint(model),
        "model_config": _without_paths(json.loads(model.config.to_json_string(use_diff=False))),
    }


def _without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """A config without the folders it was loaded from: they say nothing elsewhere."""
    return {
        name: _without_paths(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name != "_name_or_path"
    }
