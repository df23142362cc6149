"""Fitting the joint codec: sampled tokens of all layers, their principal axes, and what bits cost."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from capsight.errors import CalibrationError, OptionError
from capsight.kvcapsule.calibration.fit import prefilled
from capsight.kvcapsule.calibration.fit_journal import FitJournal
from capsight.kvcapsule.calibration.processes import Processes
from capsight.kvcapsule.calibration.samples import calibration_inputs
from capsight.kvcapsule.calibration.token_sample import TokenSample
from capsight.kvcapsule.codecs.joint import JointCodec
from capsight.kvcapsule.codecs.joint_axes import in_steps
from capsight.kvcapsule.codecs.levels import GROUP, distortions
from capsight.kvcapsule.codecs.rotary import Rotary, check_reach, find_rotary
from capsight.layout import build_layout
from capsight.layout.positions import rope_positions

USUAL_RANK, MOST_RANK = 512, 2048
"""Coordinates that a fit keeps (K) by default; the most, where the usual lose more than `LOST`."""
LOST = 0.005
"""Share of the variance that the usual coordinates may lose."""
VALUE_WEIGHT = 1.5
"""Weight of values against keys, both brought to unit size: 1 to 2 is alike on the development judges."""
_ALIKE = 1e-3  # deviation, in sizes of a token, up to which tokens are alike: float16 rounds to half of that
_EXACT = 4096  # numbers a token up to which the covariance is made; beyond, axes come from a randomised SVD
_MANY = 4  # tokens for each axis, from which on what axes lose of them is what they lose of others, too
_EXTRA = 64  # vectors more than asked for in the randomised SVD


def fit_joint(
    model: Any,
    processor: Any,
    samples: Iterable[Any],
    rank: int | None,
    progress: bool,
    resume: str | os.PathLike[str] | None,
    processes: Processes,
) -> tuple[dict[int, JointCodec], int]:
    """Fit the joint codec in one pass over calibration samples; arguments are those of `KVCapsule.fit`.

    Args:
        model: see there, as the others.
        processor: see there.
        samples: see there.
        rank: coordinates to keep at most.
        progress: show a progress bar.
        resume: folder of an interrupted pass.
        processes: those that share the samples.

    Returns:
        The codec of each layer, at `retained` 1, and the number of vision tokens seen.

    Raises:
        CalibrationError: no sample has an image, layers differ in shape, or numbers are not finite.
    """
    journal = None if resume is None else FitJournal(resume, model, 1, processes)
    sample = TokenSample() if journal is None else journal.calibration.tokens
    rotary: Rotary | None = None
    layers: list[int] = []
    shape = 0, 0
    for index, inputs in calibration_inputs(model, processor, samples, progress, processes):
        by_layer = (
            vision_tokens(model, inputs) if rotary is None or not (journal and journal.has(inputs)) else {}
        )
        if not by_layer:
            continue
        if rotary is None:
            layers, shape = sorted(by_layer), _one_shape(by_layer)
            rotary = find_rotary(model, layers)
            if journal and journal.has(inputs):
                continue
        layout = build_layout(inputs, model.config)
        places = rope_positions(layout, model.config)
        check_reach(model.config, places)
        spans = [(row, block) for row, r in enumerate(layout.rows) for block in r.blocks]
        positions = torch.cat([places[:, row, block.start : block.end] for row, block in spans], 1)
        sample.add(token_vectors(by_layer, rotary, positions), index)
        if journal is not None:
            journal.record()
    if journal is not None:
        journal.finish()
    processes.joined(sample, TokenSample.join)
    kinds = [kind for kind in processes.gathered((rotary, layers, shape)) if kind[0] is not None]
    if not kinds:
        raise CalibrationError("no calibration sample has an image; give samples with images")
    turned, layers, shape = kinds[0]
    assert turned is not None
    return processes.from_first(
        lambda: (solve_joint(sample.mean, sample.tokens, layers, shape, turned, rank), sample.seen)
    )


def vision_tokens(model: Any, inputs: Mapping[str, Any]) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys after RoPE and values `[T, H, D]` of all vision tokens of a prompt, by full-attention layer."""
    layout = build_layout(inputs, model.config)
    spans = [(row, block) for row, r in enumerate(layout.rows) for block in r.blocks]
    if not spans:
        return {}
    return {
        index: tuple(  # type: ignore[misc]
            torch.cat([x[row, :, block.start : block.end].transpose(0, 1) for row, block in spans])
            for x in pair
        )
        for index, pair in prefilled(model, inputs).items()
    }


def _one_shape(by_layer: Mapping[int, tuple[Tensor, Tensor]]) -> tuple[int, int]:
    shapes = {tuple(x.shape[1:]) for pair in by_layer.values() for x in pair}
    if len(shapes) != 1:
        raise CalibrationError(
            f"keys and values of this model's layers differ in shape ({sorted(shapes)}); use codec='heads'"
        )
    heads, head_dim = shapes.pop()
    return heads, head_dim


@torch.no_grad()
def token_vectors(layers: Mapping[int, tuple[Tensor, Tensor]], rotary: Rotary, positions: Tensor) -> Tensor:
    """What all layers hold of T tokens: `[T, L * 2 * H * D]`, keys before RoPE, then values, by layer.

    Args:
        layers: keys after RoPE and values `[T, H, D]` by layer index.
        rotary: how keys were turned.
        positions: int64 `[3, T]`.
    """
    cos, sin = rotary.tables(positions)
    parts = []
    for _, (keys, values) in sorted(layers.items()):
        plain = rotary.unturn(keys.float().cpu().transpose(0, 1), cos, sin).transpose(0, 1)
        parts += [plain.flatten(1), values.float().cpu().flatten(1)]
    return torch.cat(parts, 1)


@torch.no_grad()
def solve_joint(
    mean: Tensor,
    tokens: Tensor,
    layers: Sequence[int],
    shape: tuple[int, int],
    rotary: Rotary,
    rank: int | None,
) -> dict[int, JointCodec]:
    """The codec of each layer.

    Args:
        mean: float32 `[F]`, F = L * 2 * H * D.
        tokens: `[n, F]`, sampled.
        layers: their L indices, ascending.
        shape: KV heads and head size (H, D).
        rotary: how keys are turned.
        rank: coordinates to keep at most (K), rounded up to a multiple of `GROUP`; None is `USUAL_RANK`,
            and where those lose more than `LOST`, as many as do not, up to `MOST_RANK`.

    Raises:
        CalibrationError: the tokens do not differ.
    """
    parts = (len(layers), 2, *shape)
    x = tokens.float() - mean
    spread = _size(x, parts)  # [L, 2]
    if not (spread > _ALIKE * _size(mean[None], parts)).all():
        raise CalibrationError("all calibration tokens are alike; give pictures that differ")
    weight = torch.tensor([1.0, VALUE_WEIGHT]) / spread
    scale = weight[:, :, None].expand(-1, -1, shape[0] * shape[1]).flatten()  # [F], the diagonal of W
    x *= scale
    axes = principal_axes(x, _whole_groups(min(rank or USUAL_RANK, x.shape[1])))  # [F, K]
    latents = x @ axes
    if rank is None and axes.shape[1] < x.shape[1] and _lost(latents, x)[-1] > LOST:
        axes = principal_axes(x, _whole_groups(min(MOST_RANK, x.shape[1])))
        axes = axes[:, : _whole_groups(int((_lost(x @ axes, x) > LOST).sum()) + 1)]
        latents = x @ axes
    rows = (axes / scale[:, None]).T.unflatten(1, parts)  # [K, L, 2, H, D]
    shared = {
        "lost": distortions(latents),
        "typical": _typical(latents, x),
        "frequencies": rotary.frequencies,
        "pairs": rotary.axes,
        "turning": torch.tensor([float(rotary.interleaved), rotary.scaling, len(layers)]),
    }
    means = mean.view(parts)
    return {
        layer: JointCodec(
            {
                "mean": means[i],
                **dict(zip(("axes", "steps"), in_steps(rows[:, i]), strict=True)),
                "weight": weight[i],
                **{name: x.clone() for name, x in shared.items()},
            }
        )
        for i, layer in enumerate(layers)
    }


def _size(x: Tensor, parts: Sequence[int]) -> Tensor:
    """Root mean square of keys and values of each layer: `[L, 2]`."""
    return x.view(-1, *parts).square().mean((0, 3, 4)).sqrt()


def _whole_groups(count: int) -> int:
    return -(-count // GROUP) * GROUP


def _lost(latents: Tensor, x: Tensor) -> Tensor:
    """Share of the variance of x that is lost with the first 1, 2, ... coordinates."""
    return 1 - latents.square().sum(0).cumsum(0) / x.square().sum()


def _typical(latents: Tensor, x: Tensor) -> Tensor:
    """Share of their variance that images like those of calibration lose with all K coordinates: `[1]`.

    Of few tokens axes hold nearly all, and of others far less: it is then measured on tokens left out.
    """
    rank = latents.shape[1]
    if len(x) < _MANY * rank:
        out = torch.arange(len(x)) % 4 == 0
        x, latents = x[out], x[out] @ principal_axes(x[~out], rank)
    return _lost(latents, x)[-1:].clamp_min(0)


def principal_axes(x: Tensor, rank: int) -> Tensor:
    """Leading principal axes of rows `[n, F]` of mean zero: `[F, rank]`, zeros where there are no more."""
    most = min(*x.shape, rank)
    if x.shape[1] <= _EXACT:
        axes = torch.linalg.eigh((x.T @ x).double()).eigenvectors.flip(1)[:, :most].float()
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            axes = torch.svd_lowrank(x, q=min(most + _EXTRA, *x.shape), niter=3)[2][:, :most]
    return torch.nn.functional.pad(axes, (0, rank - most))


def check_rank(rank: Any) -> int | None:
    """Refuse a rank that is neither None nor a positive whole number.

    Raises:
        OptionError: it is none.
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise OptionError(f"rank is a positive whole number, not {rank!r}")
    return rank
