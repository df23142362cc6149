"""`EncodeQueue`: image blocks that wait to be encoded, so that several layers are encoded together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from capsight.execution import own_precision
from capsight.kvcapsule.codecs import BlockCodec, Payload, TokenPositions
from capsight.kvcapsule.plan import Run


@dataclass(slots=True, eq=False)
class Waiting:
    """The new blocks of one layer.

    Attributes:
        codec: the layer's.
        payload: their capsules, once they are encoded.
    """

    codec: BlockCodec
    payload: Payload | None = None


class EncodeQueue:
    """Layers whose blocks lie at the same places and were not encoded yet.

    A codec says of how many layers blocks may wait (`layers_together`); they stay whole meanwhile.
    """

    def __init__(self, codecs: Sequence[BlockCodec]) -> None:
        """Start empty; `codecs` are those of all layers."""
        self._codecs = tuple(codecs)
        self._ready: dict[BlockCodec, BlockCodec] = {}  # what makes codecs ready goes with a layer's blocks
        self._waiting: list[Waiting] = []
        self._held: Any = None  # what their codecs have gathered
        self._runs: tuple[Run, ...] = ()
        self._device = torch.device("cpu")

    def add(
        self,
        codec: BlockCodec,
        keys: Tensor,
        values: Tensor,
        runs: Sequence[Run],
        positions: TokenPositions | None = None,
    ) -> Waiting:
        """Take blocks `[M, H, N, D]` of tokens at `positions`; may encode them and all that wait."""
        if tuple(runs) != self._runs or (self._waiting and type(self._waiting[0].codec) is not type(codec)):
            self.flush()
        self._runs = tuple(runs)
        waiting = Waiting(codec)
        self._device = keys.device
        with own_precision(self._device):
            self._held = codec.gather(self._held, keys, values, positions)
        self._waiting.append(waiting)
        if len(self._waiting) >= codec.layers_together:
            self.flush()
        return waiting

    def payload(self, waiting: Waiting) -> Payload:
        """The capsules of blocks that were added; encodes all that wait."""
        if waiting.payload is None:
            self.flush()
        assert waiting.payload is not None
        return waiting.payload

    @torch.no_grad()
    def flush(self) -> None:
        """Encode all that waits."""
        waiting, self._waiting = self._waiting, []
        held, self._held = self._held, None
        if not waiting:
            return
        with own_precision(self._device):
            codecs = [self._take_ready(each.codec) for each in waiting]
            payloads = type(codecs[0]).encode_gathered(codecs, held, self._runs)
        for each, payload in zip(waiting, payloads, strict=True):
            each.payload = payload

    def clear(self) -> None:
        """Forget all that waits."""
        self._waiting, self._ready, self._held = [], {}, None

    def _take_ready(self, codec: BlockCodec) -> BlockCodec:
        if codec not in self._ready:
            alike = [other for other in self._codecs if type(other) is type(codec)]
            self._ready = dict(zip(alike, type(codec).ready(alike), strict=True))
        return self._ready.pop(codec)
