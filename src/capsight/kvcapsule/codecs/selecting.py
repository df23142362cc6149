"""What `adaptive` and `evict` share: a set of tokens per block, chosen one after another (our design)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from capsight.kvcapsule.codecs.base import index_dtype
from capsight.kvcapsule.codecs.block import BlockCodec, Payload
from capsight.kvcapsule.codecs.kriging import Selection, greedy_selection
from capsight.kvcapsule.codecs.learnt import LearntCodec
from capsight.kvcapsule.plan import Run


class SelectingCodec(LearntCodec):
    """Keeps, per block, the r tokens that the other kept ones predict worst.

    One set of kept tokens serves the keys and values of all KV heads of a block. How badly a token is
    predicted is measured over whitened channels.

    Capsules:
        keys, values: `[M, r, H, D]`, kept tokens in order of position.
        kept: `[M, r]`, their positions in the block (uint8 up to N = 256).
    """

    layers_together = 8  # little work in many steps: nearly the same for one layer as for eight

    def encode(self, keys: Tensor, values: Tensor) -> Payload:
        """Choose the kept tokens of blocks `[M, H, N, D]` and copy them."""
        return self.encode_layers([self], [keys], [values], [Run(0, 0, self.block_size)] * len(keys))[0]

    @classmethod
    def encode_layers(
        cls,
        codecs: Sequence[BlockCodec],
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        runs: Sequence[Run],
    ) -> list[Payload]:
        """Make capsules in several layers, whose tokens are chosen together.

        A greedy choice of few tokens is the beginning of one of more, so layers may keep different counts.
        """
        alike: dict[tuple[Any, ...], list[int]] = {}
        for index, codec in enumerate(codecs):
            assert isinstance(codec, SelectingCodec)
            kind = (codec.kept == codec.block_size, len(codec.packed), keys[index].device)
            alike.setdefault(kind, []).append(index)
        payloads: dict[int, Payload] = {}
        for group in alike.values():
            group_codecs: list[Any] = [codecs[index] for index in group]
            selection = cls._selection(group_codecs, [keys[i] for i in group], [values[i] for i in group])
            for place, index in enumerate(group):
                chosen = selection.layer(place).first(group_codecs[place].kept)
                payloads[index] = group_codecs[place]._pack(keys[index], values[index], chosen)
        return [payloads[index] for index in range(len(codecs))]

    @staticmethod
    def _selection(
        codecs: Sequence[SelectingCodec], keys: Sequence[Tensor], values: Sequence[Tensor]
    ) -> Selection:
        """The tokens to keep of blocks `[M, H, N, D]` of L layers, as many as the largest count asks for."""
        blocks, _, size, _ = keys[0].shape
        groups, kept = len(codecs[0].packed), max(codec.kept for codec in codecs)
        if kept == size:
            order = torch.arange(size, device=keys[0].device).expand(len(codecs), blocks, -1)
            return Selection(order, keys[0].new_empty(len(codecs), blocks, groups, size, 0))
        gram = torch.stack([c._gram(k, v) for c, k, v in zip(codecs, keys, values, strict=True)])
        covariance = torch.stack([codec.covariance() for codec in codecs])
        return greedy_selection(covariance, gram, kept)

    def _gram(self, keys: Tensor, values: Tensor) -> Tensor:
        """Gram matrices of the tokens of blocks `[M, H, N, D]`, over all heads: `[M, G, N, N]`."""
        features = list(self.whitened(keys, values).transpose(2, 3).flatten(3))  # [M, N, H D] each
        if len(self.packed) == 1:
            features = [torch.cat(features, 2)]  # [M, N, 2 H D]
        return torch.stack([x @ x.mT for x in features], 1)

    def _pack(self, keys: Tensor, values: Tensor, selection: Selection) -> Payload:
        """Capsules of the blocks `[M, H, N, D]` of one layer."""
        positions = selection.order[0].sort(1).values  # [M, r]
        first = torch.arange(len(positions), device=positions.device)[:, None] * self.block_size
        slots = (first + positions).flatten()  # [M * r]
        parts = [x.transpose(1, 2).flatten(0, 1).index_select(0, slots) for x in (keys, values)]
        tensors = {
            name: x.unflatten(0, positions.shape) for name, x in zip(("keys", "values"), parts, strict=True)
        }
        return Payload(tensors | {"kept": positions.to(index_dtype(self.block_size))})

    def payload_nbytes(self, heads: int, head_dim: int, itemsize: int) -> int:
        """Bytes of one block's capsule: the kept tokens and their positions."""
        return self.kept * (2 * heads * head_dim * itemsize + index_dtype(self.block_size).itemsize)
