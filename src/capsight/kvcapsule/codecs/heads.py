"""The `heads` codec (ours): every KV head keeps tokens of its own, the others are evicted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from copy import copy
from typing import Self

import torch
from torch import Tensor
from torch.linalg import vector_norm

from capsight.kvcapsule.attention import BlockRows, KeptTokens
from capsight.kvcapsule.attention.native import Source, Steps
from capsight.kvcapsule.codecs.base import index_dtype
from capsight.kvcapsule.codecs.block import Payload
from capsight.kvcapsule.codecs.learnt import KEY_WEIGHT, LearntCodec
from capsight.kvcapsule.codecs.ragged import RaggedPayload
from capsight.kvcapsule.codecs.whitening import deviation
from capsight.kvcapsule.plan import Run


class HeadsCodec(LearntCodec):
    """Keeps the tokens that stand out most, of every block and KV head of a prompt together.

    How far a token stands out is the geometric mean of four squared distances, in the head's whitened
    channels: of its key and of its value from the mean, and from what all other tokens of the block predict
    (leave-one-out kriging). The prompt shares its tokens out, in every layer for itself: a head that sees
    the same everywhere keeps few, one that tells characters apart many, and none less than one of a block;
    r is the average.

    What was not kept is gone: decoding leaves zeros, which attention must not see, so it needs an attention
    function that adds `CapsuleCache.key_bias` or reads the capsules as they are (`latent`).

    Capsules are a `RaggedPayload`:
        keys, values: `[E, D]`, kept tokens, E = M H r if blocks are encoded together.
        kept: `[E]`, their positions in the block (uint8 up to N = 256).
        counts: `[M, H]` (uint8 below N = 256).
    """

    name = "heads"
    keys_by_token = True
    _precision: Tensor | None = None  # [G, N, N], inverse of the second moment, of codecs that are ready

    def __init__(self, packed: Tensor, mean: Tensor, whitening: Tensor, block_size: int, kept: int) -> None:
        """Take what `fit` learnt or a file held (see `LearntCodec`)."""
        super().__init__(packed, mean, whitening, block_size, kept)
        self._sizes: dict[torch.device, Tensor] = {}  # [H, D], deviations of keys: `whitening` has them, too

    @classmethod
    def ready(cls, codecs: Sequence[Self]) -> Sequence[Self]:
        """Copies that know the inverses of their second moments: all take hardly longer than one."""
        first = codecs[0]
        if len({codec.packed.shape for codec in codecs}) > 1 or first.kept == first.block_size:
            return codecs
        packed = torch.stack([codec.packed.to(first.packed.device) for codec in codecs])
        knowing = [copy(codec) for codec in codecs]
        for codec, precision in zip(knowing, torch.linalg.inv(first.unpacked(packed)), strict=True):
            codec._precision = precision
        return knowing

    def encode(self, keys: Tensor, values: Tensor) -> RaggedPayload:
        """Choose the kept tokens of blocks `[M, H, N, D]`, all of one row, and copy them."""
        return self.encode_runs(keys, values, [Run(0, 0, self.block_size)] * len(keys))

    def encode_runs(self, keys: Tensor, values: Tensor, runs: Sequence[Run]) -> RaggedPayload:
        """Choose the kept tokens of blocks `[M, H, N, D]` and copy them."""
        keep = torch.ones(keys.shape[:3], dtype=torch.bool, device=keys.device)
        if self.kept < self.block_size:
            blocks = Counter(run.row for run in runs)  # rows ascend
            keep = self.best(self.scores(keys, values), list(blocks.values()))
        return RaggedPayload.pack(keys, values, keep, index_dtype(self.block_size + 1))

    def scores(self, keys: Tensor, values: Tensor) -> Tensor:
        """How far each token of blocks `[M, H, N, D]` stands out: float32 `[M, H, N]`, at least 0."""
        precision = torch.linalg.inv(self.covariance()) if self._precision is None else self._precision
        precision = precision.to(keys.device)[:, None, None]  # [G, 1, 1, N, N]
        # Row n of it, over its diagonal, takes from token n what the others predict.
        alone = precision.diagonal(dim1=-2, dim2=-1)
        white = self.whitened(keys, values).transpose(1, 2)  # [2, H, M, N, D], as it lies in memory
        from_others = vector_norm(precision @ white, dim=-1) / alone  # [2, H, M, N]
        key, value = (vector_norm(white, dim=-1) * from_others).sqrt()
        return (key * value).transpose(0, 1)

    def best(self, scores: Tensor, blocks: Sequence[int]) -> Tensor:
        """The tokens of each row with the highest scores, and the best one of every block and head.

        Args:
            scores: float `[M, H, N]`.
            blocks: number of blocks of each row, M in all, rows one after another.

        Returns:
            bool `[M, H, N]`; of a row with m blocks m * H * r are True.
        """
        scores = scores.scatter(2, scores.argmax(2, keepdim=True), torch.inf)
        keep = []
        for row in scores.split(list(blocks)):
            chosen = row.flatten().topk(self.kept * row.shape[0] * row.shape[1], sorted=False).indices
            none = torch.zeros(row.numel(), dtype=torch.bool, device=row.device)
            keep.append(none.scatter(0, chosen, True))
        return torch.cat(keep).view(scores.shape)

    def typical_channels(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel of keys: float32 `[H, D]` each."""
        if self.mean.device not in self._sizes:
            self._sizes[self.mean.device] = deviation(self.whitening[0], self.head_dim) * KEY_WEIGHT
        return self.mean[0], self._sizes[self.mean.device]

    def typical_keys(self, payload: Payload) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel of the kept keys: float32 `[E, D]` each."""
        mean, size = self.typical_channels()
        each = payload.tensors["counts"].sum(0, dtype=torch.int64)  # [H]
        return mean.repeat_interleave(each, 0), size.repeat_interleave(each, 0)

    def decode(self, payload: Payload) -> tuple[Tensor, Tensor]:
        """Kept tokens in their places, zeros elsewhere."""
        assert isinstance(payload, RaggedPayload)
        return payload.spread("keys", self.block_size), payload.spread("values", self.block_size)

    def latent(self, payload: Payload) -> KeptTokens:
        """The kept tokens as they lie in memory."""
        return KeptTokens(*(payload.tensors[name] for name in ("keys", "values", "counts")))

    def source(self, payload: Payload, rows: BlockRows, batch: int, steps: Steps | None = None) -> Source:
        """The kept tokens as they lie in memory, every piece of one head."""
        assert isinstance(payload, RaggedPayload)
        return payload.source(rows, batch, steps)

    def bias(self, payload: Payload) -> Tensor | None:
        """Minus infinity for tokens that were not kept, 0 for others: float32 `[M, H, N]`, or None."""
        if self.kept == self.block_size:
            return None
        assert isinstance(payload, RaggedPayload)
        keep = payload.mask(self.block_size)
        return torch.zeros(keep.shape, device=keep.device).masked_fill(~keep, -torch.inf)

    def hides(self, payload: Payload) -> bool:
        """Whether tokens are missing; said without making the bias."""
        return self.kept < self.block_size

    def payload_nbytes(self, heads: int, head_dim: int, itemsize: int) -> int:
        """Bytes of one block's capsule, on average: kept tokens, their positions, and their numbers."""
        position, count = index_dtype(self.block_size).itemsize, index_dtype(self.block_size + 1).itemsize
        return heads * (count + self.kept * (2 * head_dim * itemsize + position))
