"""What `adaptive` and `evict` share: a set of tokens per block, chosen one after another (our design)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, Self

import torch
from torch import Tensor

from capsight.kvcapsule.codecs.base import index_dtype
from capsight.kvcapsule.codecs.block import BlockCodec, Payload
from capsight.kvcapsule.codecs.learnt import LearntCodec
from capsight.kvcapsule.codecs.ragged import RaggedPayload
from capsight.kvcapsule.codecs.sharing import Share, check_share, shared_counts
from capsight.kvcapsule.kriging import Selection, greedy_selection
from capsight.kvcapsule.moments import LayerMoments
from capsight.kvcapsule.plan import Run


class SelectingCodec(LearntCodec):
    """Keeps, per block, the r tokens that the other kept ones predict worst.

    With `share="prompt"` r is an average: the blocks of a row that are encoded together share their tokens
    out (`shared_counts`), in every layer for itself.

    One set of kept tokens serves the keys and values of all KV heads of a block. How badly a token is
    predicted is measured over whitened channels.

    Capsules:
        keys, values: `[M, r, H, D]`, kept tokens in order of position.
        kept: `[M, r]`, their positions in the block (uint8 up to N = 256).
        Shared, with r < N, a `RaggedPayload`: `[T, H, D]` and `[T]` with T = M r, and counts `[M, 1]` (uint8
        below N = 256), which cost a block the one byte more.
    """

    def __init__(
        self,
        packed: Tensor,
        mean: Tensor,
        whitening: Tensor,
        block_size: int,
        kept: int,
        share: Share = "block",
    ) -> None:
        """Take what `fit` learnt or a file held, and what shares the kept tokens.

        Raises:
            OptionError: `share` is neither "block" nor "prompt".
        """
        super().__init__(packed, mean, whitening, block_size, kept)
        self.share = check_share(share)

    @classmethod
    def fit(
        cls,
        moments: LayerMoments,
        kept: int,
        *,
        ridge: float = 1e-2,
        joint: bool = True,
        share: Share = "block",
        **_: Any,
    ) -> Self:
        """Solve for the codec as `LearntCodec` does.

        Args:
            moments: sums over calibration blocks.
            kept: tokens kept of each block (r).
            ridge: noise variance added to C, as a fraction of its mean variance.
            joint: one C for keys and values together, or one each (twice the bytes of C).
            share: "block" (all blocks keep r) or "prompt" (those of a prompt keep r on average).
        """
        return super().fit(moments, kept, ridge=ridge, joint=joint).with_share(share)

    def with_share(self, share: Share) -> Self:
        """This codec with kept tokens shared by the "block" or the "prompt"; shares the buffers."""
        return self._with(share=share)

    def _with(self, **options: Any) -> Self:
        return super()._with(**{"share": self.share} | options)

    @property
    def shares(self) -> bool:
        """Whether the blocks of a row keep different numbers of tokens."""
        return self.share == "prompt" and self.kept < self.block_size

    def encode(self, keys: Tensor, values: Tensor) -> Payload:
        """Choose the kept tokens of blocks `[M, H, N, D]`, all of one row, and copy them."""
        return self.encode_runs(keys, values, [Run(0, 0)] * len(keys))

    def encode_runs(self, keys: Tensor, values: Tensor, runs: Sequence[Run]) -> Payload:
        """Choose the kept tokens of blocks `[M, H, N, D]` and copy them; rows matter to those that share."""
        return self.encode_layers([self], [keys], [values], runs)[0]

    @classmethod
    def encode_layers(
        cls,
        codecs: Sequence[BlockCodec],
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        runs: Sequence[Run],
    ) -> list[Payload]:
        """Make capsules in several layers, whose tokens are chosen in one go.

        A greedy choice of few tokens is the beginning of one of more, so layers may keep different counts.
        """
        alike: dict[tuple[Any, ...], list[int]] = {}
        for index, codec in enumerate(codecs):
            assert isinstance(codec, SelectingCodec)
            kind = (codec.kept == codec.block_size, codec.share, len(codec.packed), keys[index].device)
            alike.setdefault(kind, []).append(index)
        rows = [len(list(own)) for _, own in groupby(runs, lambda run: run.row)]
        payloads: dict[int, Payload] = {}
        for group in alike.values():
            own: list[Any] = [codecs[index] for index in group]
            selection = cls._selection(own, [keys[i] for i in group], [values[i] for i in group])
            for place, index in enumerate(group):
                chosen, blocks = selection.layer(place), (keys[index], values[index])
                if own[place].shares:
                    payloads[index] = own[place]._pack_shared(*blocks, chosen, rows)
                else:
                    payloads[index] = own[place]._pack(*blocks, chosen.first(own[place].kept))
        return [payloads[index] for index in range(len(codecs))]

    @staticmethod
    def _selection(
        codecs: Sequence[SelectingCodec], keys: Sequence[Tensor], values: Sequence[Tensor]
    ) -> Selection:
        """The tokens to keep of blocks `[M, H, N, D]` of L layers, as many as the largest count asks for.

        Where blocks share, any of them may keep nearly all of its tokens, so all N are chosen.
        """
        blocks, _, size, _ = keys[0].shape
        groups, kept = len(codecs[0].packed), max(codec.kept for codec in codecs)
        if kept == size:
            order = torch.arange(size, device=keys[0].device).expand(len(codecs), blocks, -1)
            none = keys[0].new_empty(len(codecs), blocks, groups, size, 0)
            return Selection(order, none, torch.zeros(order.shape, device=order.device))
        gram = torch.stack([c._gram(k, v) for c, k, v in zip(codecs, keys, values, strict=True)])
        covariance = torch.stack([codec.covariance() for codec in codecs])
        return greedy_selection(covariance, gram, size if codecs[0].shares else kept)

    def _gram(self, keys: Tensor, values: Tensor) -> Tensor:
        """Gram matrices of the tokens of blocks `[M, H, N, D]`, over all heads: `[M, G, N, N]`."""
        features = [self.whitened(i, x).transpose(1, 2).flatten(2) for i, x in enumerate((keys, values))]
        if len(self.packed) == 1:
            features = [torch.cat(features, 2)]  # [M, N, 2 H D]
        return torch.stack([x @ x.mT for x in features], 1)

    def _pack(self, keys: Tensor, values: Tensor, selection: Selection) -> Payload:
        """Capsules of the blocks `[M, H, N, D]` of one layer."""
        kept = selection.order[0].sort(1).values  # [M, r]
        first = torch.arange(len(kept), device=kept.device)[:, None] * self.block_size
        slots = (first + kept).flatten()  # [M * r]
        parts = [x.transpose(1, 2).flatten(0, 1).index_select(0, slots) for x in (keys, values)]
        tensors = {
            name: x.unflatten(0, kept.shape) for name, x in zip(("keys", "values"), parts, strict=True)
        }
        return Payload(tensors | {"kept": kept.to(index_dtype(self.block_size))})

    def _pack_shared(
        self, keys: Tensor, values: Tensor, selection: Selection, rows: Sequence[int]
    ) -> RaggedPayload:
        """Capsules of the blocks `[M, H, N, D]` of one layer, so many in each row, that share its tokens."""
        counts = shared_counts(selection.energy[0], rows, self.kept)
        chosen = torch.arange(self.block_size, device=counts.device) < counts[:, None]  # [M, N]
        keep = torch.zeros_like(chosen).scatter(1, selection.order[0], chosen)
        k, v = (x.transpose(1, 2)[:, None] for x in (keys, values))  # [M, 1, N, H, D]
        return RaggedPayload.pack(k, v, keep[:, None], index_dtype(self.block_size + 1))

    def payload_nbytes(self, heads: int, head_dim: int, itemsize: int) -> int:
        """Bytes of one block's capsule: the kept tokens, their positions, and their number if blocks share.

        What blocks that share keep differs; this is the average, which it is exactly.
        """
        counts = index_dtype(self.block_size + 1).itemsize if self.shares else 0
        return counts + self.kept * (2 * heads * head_dim * itemsize + index_dtype(self.block_size).itemsize)
