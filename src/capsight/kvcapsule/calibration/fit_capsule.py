"""From calibration prompts to the codecs of a capsule and what is known of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

from capsight.kvcapsule.budget import share_out
from capsight.kvcapsule.calibration.config import CapsuleConfig
from capsight.kvcapsule.calibration.fit import calibrate, kept_tokens, measure_needs, solve
from capsight.kvcapsule.calibration.joint_fit import fit_joint
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
    config: CapsuleConfig,
    progress: bool,
    resume: str | os.PathLike[str] | None,
    processes: Processes,
) -> tuple[dict[int, LayerCodec], CapsuleInfo]:
    """Fit a codec to every full-attention layer of a model; arguments and errors are `KVCapsule.fit`'s."""
    if config.codec == JointCodec.name:
        return _joint(model, processor, samples, config, progress, resume, processes)
    if config.codec == StaticMlpCodec.name and not isinstance(samples, Sequence):
        samples = list(samples)  # they are read twice
    calibration = calibrate(model, processor, samples, config.block_size, progress, resume, processes)
    codecs, info = processes.from_first(lambda: _solved(model, calibration, config))
    if config.codec == StaticMlpCodec.name:
        codecs = train_key_mlps(codecs, model, processor, samples, progress, processes)
    return codecs, info


def _solved(
    model: Any, calibration: Calibration, config: CapsuleConfig
) -> tuple[dict[int, LayerCodec], CapsuleInfo]:
    size = config.block_size
    needs = measure_needs(calibration, config.codec, config.options)
    kept = share_out(config.sharing, needs, len(calibration.moments), kept_tokens(config.share, size), size)
    codecs = solve(calibration.moments, config.codec, kept, config.options)
    info = CapsuleInfo(
        codec=config.codec,
        block_size=size,
        layers=tuple(
            LayerInfo(index, codecs[index].kept, layer.shape[0], layer.shape[2])
            for index, layer in sorted(calibration.moments.items())
        ),
        options=dict(config.options),
        **_about(model),
        blocks=next(iter(calibration.moments.values())).blocks,
        bits=config.bits,
        budget=config.sharing,
        needs=needs,
    )
    return codecs, info


def _joint(
    model: Any,
    processor: Any,
    samples: Iterable[Any],
    config: CapsuleConfig,
    progress: bool,
    resume: str | os.PathLike[str] | None,
    processes: Processes,
) -> tuple[dict[int, LayerCodec], CapsuleInfo]:
    """The joint codec: all layers share a latent, so there is no budget to share out."""
    rank = config.options.get("rank")
    fitted, seen = fit_joint(model, processor, samples, rank, progress, resume, processes)
    codecs: dict[int, LayerCodec] = {index: codec.at(config.share) for index, codec in fitted.items()}
    heads, head_dim = next(iter(fitted.values())).mean.shape[1:]
    info = CapsuleInfo(
        codec=JointCodec.name,
        block_size=1,
        layers=tuple(LayerInfo(index, 1, heads, head_dim) for index in codecs),
        options=dict(config.options),
        **_about(model),
        blocks=seen,
        share=config.share,
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
