"""What `adaptive` and `evict` share: which tokens to keep is chosen per image (our design)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, Self

import torch
from torch import Tensor

from capsight.errors import OptionError
from capsight.kvcapsule.codecs.base import LayerCodec, check_ridge, index_dtype, take_tensors
from capsight.kvcapsule.codecs.block import BlockCodec, Payload
from capsight.kvcapsule.codecs.ragged import RaggedPayload
from capsight.kvcapsule.codecs.sharing import Share, check_share, shared_counts
from capsight.kvcapsule.kriging import Selection, greedy_selection, with_nugget
from capsight.kvcapsule.moments import LayerMoments, rms
from capsight.kvcapsule.plan import Run
from capsight.kvcapsule.whitening import is_whitening, whitened, whitening

KEY_WEIGHT = 0.5
"""Of a key's error beside a value's, when tokens are chosen (benchmarks/ablations.py compares others)."""


class SelectingCodec(LayerCodec):
    """Keeps, per block, the r tokens that the other kept ones predict worst.

    With `share="prompt"` r is an average: the blocks of a row that are encoded together share their tokens
    out (`shared_counts`), in every layer for itself.

    One set of kept tokens serves the keys and values of all KV heads of a block. How badly a token is
    predicted is measured over whitened channels. What is learnt is second moments only, so the same module
    serves every r.

    Buffers:
        packed: float32 `[G, N (N + 1) / 2]`, lower triangle of the regularised second moment; G = 1
            for keys and values together, G = 2 for one each.
        mean: float32 `[2, H, D]`, mean of every channel of keys and of values.
        whitening: bfloat16 `[2, H, D (D + 1) / 2]`, what whitens the channels of each KV head's keys and
            values (`capsight.kvcapsule.whitening`); that of keys times `KEY_WEIGHT`.

    Capsules:
        keys, values: `[M, r, H, D]`, kept tokens in order of position.
        kept: `[M, r]`, their positions in the block (uint8 up to N = 256).
        Shared, with r < N, a `RaggedPayload`: `[T, H, D]` and `[T]` with T = M r, and counts `[M, 1]` (uint8
        below N = 256), which cost a block the one byte more.
    """

    packed: Tensor
    mean: Tensor
    whitening: Tensor

    def __init__(
        self,
        packed: Tensor,
        mean: Tensor,
        whitening: Tensor,
        block_size: int,
        kept: int,
        share: Share = "block",
    ) -> None:
        """Take what `fit` learnt or a file held (see the buffers above), and what shares the kept tokens.

        Raises:
            OptionError: `share` is neither "block" nor "prompt".
        """
        super().__init__(block_size, kept)
        self.share = check_share(share)
        self.register_buffer("packed", packed)
        self.register_buffer("mean", mean)
        self.register_buffer("whitening", whitening)

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
        """Solve for the codec from one layer's calibration moments.

        Args:
            moments: sums over calibration blocks.
            kept: tokens kept of each block (r).
            ridge: noise variance added to C, as a fraction of its mean variance.
            joint: one C for keys and values together, or one each (twice the bytes of C).
            share: "block" (all blocks keep r) or "prompt" (those of a prompt keep r on average).
        """
        check_ridge(ridge)
        kinds = (moments.keys, moments.values)
        mean = torch.stack([kind.channel_mean() for kind in kinds])  # [2, H, D]
        second = [kind.about(centre[:, None]) for kind, centre in zip(kinds, mean, strict=True)]
        c = torch.stack([(heads / rms(heads)[:, None, None] ** 2).mean(0) for heads in second])
        c = with_nugget(c.mean(0, keepdim=True) if joint else c, ridge)  # [G, N, N]
        rows, cols = torch.tril_indices(moments.block_size, moments.block_size)
        keys, values = (whitening(kind.channel_covariance()) for kind in kinds)
        white = torch.stack([KEY_WEIGHT * keys, values]).bfloat16()  # [2, H, D (D + 1) / 2]
        return cls(c[:, rows, cols].float(), mean.float(), white, moments.block_size, kept, share=share)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int, int], kept: int) -> Self:
        """The codec for blocks of `shape` (H, N, D) whose `state_dict()` gave `tensors`."""
        heads, block_size, head_dim = shape
        shapes = {
            "packed": (None, block_size * (block_size + 1) // 2),
            "mean": (2, heads, head_dim),
            "whitening": (2, heads, head_dim * (head_dim + 1) // 2),
        }
        packed, mean, white = take_tensors(tensors, shapes, {"whitening": torch.bfloat16})
        if len(packed) not in (1, 2):
            raise OptionError(f"tensor packed holds {len(packed)} second moments, expected 1 or 2")
        codec = cls(packed, mean, white, block_size, kept)
        if not is_whitening(white, head_dim) or torch.linalg.cholesky_ex(codec.covariance()).info.any():
            raise OptionError(
                "tensors packed and whitening are not those of positive definite second moments"
            )
        return codec

    def resized(self, kept: int) -> Self:
        """This codec with another number of kept tokens; shares the buffers."""
        return self._with(kept=kept)

    def with_share(self, share: Share) -> Self:
        """This codec with kept tokens shared by the "block" or the "prompt"; shares the buffers."""
        return self._with(share=share)

    def _with(self, **options: Any) -> Self:
        """This codec with some of its options changed."""
        options = {"kept": self.kept, "share": self.share} | options
        return type(self)(self.packed, self.mean, self.whitening, self.block_size, **options)

    @property
    def shares(self) -> bool:
        """Whether the blocks of a row keep different numbers of tokens."""
        return self.share == "prompt" and self.kept < self.block_size

    def covariance(self) -> Tensor:
        """The regularised second moment: float32 `[G, N, N]`."""
        index = _square_from_packed(self.block_size, self.packed.device)
        return self.packed[:, index].view(-1, self.block_size, self.block_size)

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
        if codecs[0].shares:
            kept = size
        gram = torch.empty(len(codecs), blocks, groups, size, size, device=keys[0].device)
        for codec, k, v, own in zip(codecs, keys, values, gram, strict=True):
            features = (codec._features(0, k), codec._features(1, v))  # [M, N, H * D] each
            for group, x in enumerate(features if groups == 2 else [torch.cat(features, 2)]):
                own[:, group] = x @ x.mT
        return greedy_selection(torch.stack([codec.covariance() for codec in codecs]), gram, kept)

    def _features(self, kind: int, x: Tensor) -> Tensor:
        """Whitened tokens `[M, N, H * D]` of blocks `[M, H, N, D]`, in float32."""
        return whitened(x - self.mean[kind][:, None], self.whitening[kind]).transpose(1, 2).flatten(2)

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


@lru_cache(maxsize=8)
def _square_from_packed(size: int, device: torch.device) -> Tensor:
    """Where in a packed lower triangle the entries of a symmetric matrix lie: int64 `[N * N]`."""
    rows, cols = torch.tril_indices(size, size)
    index = torch.empty(size, size, dtype=torch.int64)
    index[rows, cols] = index[cols, rows] = torch.arange(len(rows))
    return index.flatten().to(device)
