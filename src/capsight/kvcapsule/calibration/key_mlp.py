"""Training of the MLP that corrects linearly rebuilt keys: on cached calibration keys, layer by layer.

The loss is that of secondary reports on KVCapsule as far as there are any (an attention-preserving MLP);
its three terms, the early stopping and all sizes are this project's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from tqdm.auto import tqdm

from capsight.kvcapsule.calibration.key_samples import KeySamples, collect_keys
from capsight.kvcapsule.calibration.processes import Processes
from capsight.kvcapsule.codecs import LayerCodec, StaticMlpCodec
from capsight.kvcapsule.codecs.token_mlp import TokenMlp

BATCH, MOST_STEPS, EVERY, PATIENCE = 48, 500, 20, 4
"""Blocks of a step; most steps; steps from one look at held-out blocks to the next; looks without gain."""

LEARNING_RATE = 3e-3
SHORTEST = 0.1
"""Length, in units of a channel's root mean square, under which a key's direction loses its say."""

HELD_OUT = 5
"""One calibration sample in this many is held out."""


def train_key_mlps(
    codecs: Mapping[int, LayerCodec],
    model: Any,
    processor: Any,
    samples: Iterable[Any],
    progress: bool,
    processes: Processes | None = None,
) -> dict[int, LayerCodec]:
    """The `static-mlp` codecs of all layers with trained MLPs; the linear parts stay what they are.

    Args:
        codecs: by layer index, as `StaticMlpCodec.fit` gave them.
        model: the model they were fitted to.
        processor: its processor; may be None where all samples are processor outputs.
        samples: the calibration samples.
        progress: show a progress bar.
        processes: those that share the samples, and all train the same; None if this one reads all of them.

    Raises:
        CalibrationError: fewer than two samples have an image as long as a block.
    """
    trained = dict(codecs)
    open_layers = {index: codec for index, codec in codecs.items() if codec.kept < codec.block_size}
    if open_layers:
        size = next(iter(open_layers.values())).block_size
        cached = collect_keys(model, processor, samples, size, progress, processes)
    for index, codec in tqdm(open_layers.items(), "training MLPs", disable=not progress):
        assert isinstance(codec, StaticMlpCodec)
        mlp = train_mlp(codec.kept_index, codec.key_map, cached[index], len(codec.mlp_bias))
        trained[index] = codec.with_mlp(mlp)
    return trained


def train_mlp(kept_index: Tensor, linear: Tensor, samples: KeySamples, width: int) -> TokenMlp:
    """Train an MLP on what a linear map leaves; the best on held-out samples, zero included, is returned.

    Where the linear map was fitted to all samples, it has seen the held-out ones and the MLP has not, so
    the choice leans towards zero.

    Args:
        kept_index: int64 `[r]`, positions of kept keys, ascending.
        linear: float32 `[N, r]`, the map from kept keys to all keys.
        samples: cached keys.
        width: hidden units (W).

    Returns:
        A network from kept keys to corrections of the others, in order of position.
    """
    keys = samples.keys.float().transpose(1, 2)  # [M, N, H, D]
    scale = float(keys.square().mean().sqrt().clamp_min(1e-12))
    rest = torch.ones(len(linear), dtype=torch.bool)
    rest[kept_index] = False
    data = _Data(keys[:, kept_index] / scale, keys[:, rest] / scale, linear[rest], _root(samples.queries))
    is_held_out = samples.sample % HELD_OUT == HELD_OUT - 1
    if not is_held_out.any() or is_held_out.all():
        is_held_out = samples.sample == samples.sample.max()
    train, test = (~is_held_out).nonzero()[:, 0], is_held_out.nonzero()[:, 0]
    best = TokenMlp.zero(len(kept_index), int(rest.sum()), width)
    weights = [tensor.clone().requires_grad_() for tensor in best]
    optimiser = torch.optim.Adam(weights, LEARNING_RATE)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        lowest, since = float(data.loss(best, test)), 0
    for step in range(1, MOST_STEPS + 1):
        batch = train[torch.randint(len(train), (BATCH,), generator=generator)]
        optimiser.zero_grad()
        with torch.enable_grad():
            data.loss(TokenMlp(*weights), batch).backward()
        optimiser.step()
        if step % EVERY:
            continue
        now = TokenMlp(*(tensor.detach().clone() for tensor in weights))
        with torch.no_grad():
            loss = float(data.loss(now, test))
        lowest, best, since = (loss, now, 0) if loss < lowest else (lowest, best, since + 1)
        if since == PATIENCE:
            break
    return best.scaled(scale)


class _Data:
    """Keys of one layer in the shapes that the loss needs."""

    def __init__(self, kept_keys: Tensor, wanted: Tensor, linear: Tensor, root: Tensor) -> None:
        """Take kept keys `[M, r, H, D]`, others `[M, T, H, D]`, their map `[T, r]`, queries `[H, D, D]`."""
        self.kept_keys, self.wanted, self.root = kept_keys.flatten(2), wanted, root
        self.base = linear @ self.kept_keys  # [M, T, H * D]

    def loss(self, mlp: TokenMlp, blocks: Tensor) -> Tensor:
        """Relative squared error + mean cosine distance + relative squared error of attention logits.

        The last is ||Q (K - K^)^T||^2 / ||Q K^T||^2 over all queries, from their second moment alone.

        Args:
            mlp: the network.
            blocks: int64 `[m]`, which blocks count.
        """
        wanted = self.wanted[blocks]
        predicted = (self.base[blocks] + mlp(self.kept_keys[blocks])).view_as(wanted)
        error = predicted - wanted
        relative = error.square().sum() / wanted.square().sum().clamp_min(1e-12)
        cosine = 1 - cosine_similarity(predicted, wanted, dim=-1, eps=SHORTEST).mean()
        logits = self._logits(error) / self._logits(wanted).clamp_min(1e-12)
        return relative + cosine + logits

    def _logits(self, x: Tensor) -> Tensor:
        """Sum of squared scores of queries over tokens `[M, T, H, D]`."""
        return (x.transpose(1, 2) @ self.root).square().sum()


def _root(moment: Tensor) -> Tensor:
    """R with R R^T = `moment` `[H, D, D]`; a trace of noise keeps it positive definite."""
    size = moment.shape[-1]
    noise = 1e-6 * moment.diagonal(dim1=1, dim2=2).mean(-1).clamp_min(1e-12)
    return torch.linalg.cholesky(moment + noise[:, None, None] * torch.eye(size))
