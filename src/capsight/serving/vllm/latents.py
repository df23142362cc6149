"""Latents in vLLM's paged memory: the codec `joint` in the worker.

A block has memory in every layer. In the blocks that stay of a request's region (`LatentPlan`), each layer's
memory, as one run of bytes, takes the keys and values of the region's text in this layer, token by token, and
behind them this layer's share of the latents, which are of all layers: codes, then scales.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import is_
from typing import Any

import torch
from torch import Tensor

from capsight.errors import OptionError
from capsight.kvcapsule import KVCapsule
from capsight.kvcapsule.attention.latents import LatentTokens
from capsight.kvcapsule.cache.waiting import EncodeQueue
from capsight.kvcapsule.codecs import JointCodec, TokenPositions
from capsight.kvcapsule.codecs.joint_payload import JointPayload
from capsight.kvcapsule.plan import Run
from capsight.serving.plan import LatentPlan, Latents
from capsight.serving.vllm.paged import read_tokens


def joint_codecs(capsule: KVCapsule) -> tuple[JointCodec, ...]:
    """The codecs of a capsule that can lie in paged memory, in the order of the layers.

    Raises:
        OptionError: it has another codec.
    """
    codecs = [capsule.stored[layer] for layer in sorted(capsule.codecs)]
    joint = tuple(codec for codec in codecs if isinstance(codec, JointCodec))
    if len(joint) < len(codecs):
        raise OptionError(
            f"the engine holds capsules of the codec joint, not of {capsule.name}; fit one with it, or leave "
            "out --capsule and say --retained to keep whole tokens"
        )
    return joint


@lru_cache(maxsize=1)
def load_codecs(folder: str, subfolder: str, retained: float | None) -> tuple[JointCodec, ...]:
    """The codecs of an exported checkpoint, read once for all layers.

    Args:
        folder: the checkpoint.
        subfolder: of the capsule in it.
        retained: part of the bytes to keep; None: as the capsule has it.
    """
    capsule = KVCapsule.from_pretrained(folder, subfolder=subfolder)
    return joint_codecs(capsule if retained is None else capsule.with_retained(retained))


@dataclass(frozen=True, eq=False)
class LatentRequest:
    """A request of a step whose images become latents, or have.

    Attributes:
        plan: of its blocks.
        rows: `[start, end)` of its tokens among those of the step that attend to latents.
        length: tokens of the request after the step, as if nothing had been freed.
        table: its blocks.
        places: int64 `[3, n]` of each image, rotary positions of its tokens.
    """

    plan: LatentPlan
    rows: tuple[int, int]
    length: int
    table: Sequence[int]
    places: tuple[Tensor, ...]

    @property
    def written(self) -> Sequence[int]:
        """The blocks that text and latents lie in."""
        written = self.plan.written
        return self.table[written.start : written.stop]


class LatentMemory:
    """What a worker knows of latents: the codecs of all layers, and each layer's paged memory."""

    def __init__(self, kind: Latents, codecs: Sequence[JointCodec]) -> None:
        """Take the codecs, in the order of the layers."""
        self.kind, self.codecs = kind, tuple(codecs)
        self._memory: list[Tensor] = [torch.empty(0)] * len(self.codecs)  # uint8 [blocks, bytes] each
        self._tokens: tuple[list[Tensor], LatentTokens] | None = None

    def see(self, layer: int, kv_cache: Tensor) -> Tensor:
        """Know a layer's memory, which is then returned as bytes, uint8 `[blocks, bytes of a block]`."""
        held = self._memory[layer]
        if not len(held) or held.data_ptr() != kv_cache.data_ptr():
            held = self._memory[layer] = kv_cache.view(len(kv_cache), -1).view(torch.uint8)
        return held

    def clear(self, blocks: Sequence[int]) -> None:
        """Make zeros of what lies in blocks, as a kernel reads them that multiplies what it hides by 0.

        Latents left by another request may be no finite numbers.
        """
        for memory in self._memory if blocks else ():
            if len(memory):
                memory[list(blocks)] = 0

    def write(self, request: LatentRequest, payload: JointPayload) -> None:
        """Store the latents of a request, all layers of which have been seen."""
        codes, scales = payload.tensors["codes"], payload.tensors["scales"]
        packed = torch.cat((codes, scales.view(torch.uint8)), 1)  # [T, C + 2 R / 32]
        share = self.kind.share(len(packed))
        start = request.plan.text_tokens * self.kind.token_nbytes
        for memory, own in zip(self._memory, packed.split(share), strict=False):
            write_bytes(memory, request.written, start, own.flatten())

    def read(self, requests: Sequence[LatentRequest]) -> JointPayload:
        """The latents of some requests, one after the other."""
        found, nbytes = [], self.kind.latent_nbytes
        for request in requests:
            left, start = request.plan.image_tokens, request.plan.text_tokens * self.kind.token_nbytes
            share = self.kind.share(left)
            for memory in self._memory:
                end = start + min(share, left) * nbytes
                found += [
                    memory[block, a:b] for block, a, b in pieces(request.written, memory.shape[1], start, end)
                ]
                left = max(left - share, 0)
        packed = torch.cat(found).view(-1, nbytes)
        width = sum(n * bits // 8 for bits, n in self.codecs[0].levels.parts)
        codes, scales = packed[:, :width].contiguous(), packed[:, width:].contiguous()
        return JointPayload({"codes": codes, "scales": scales.view(torch.float16)})

    def tokens(self, requests: Sequence[LatentRequest]) -> LatentTokens:
        """Where the latents of some requests belong; remembered, since most steps have the same requests."""
        places = [places for request in requests for places in request.places]
        if self._tokens is not None:
            known, tokens = self._tokens
            if len(known) == len(places) and all(map(is_, known, places)):
                return tokens
        counts = torch.tensor([request.plan.image_tokens for request in requests])
        rotary: Any = self.codecs[0].rotary
        self._tokens = places, LatentTokens(counts.cumsum(0) - counts, counts, torch.cat(places, 1), rotary)
        return self._tokens[1]


class Storing:
    """A request whose prompt is read to its end in this step: layer by layer its images become latents."""

    def __init__(self, memory: LatentMemory, request: LatentRequest) -> None:
        """Start with nothing."""
        self._memory, self._request = memory, request
        plan = request.plan
        shown = torch.cat([torch.arange(*span) for span in plan.images])
        is_text = torch.ones(plan.reach, dtype=torch.bool).index_fill_(0, shown, False)
        self._shown, self._text = shown, is_text.nonzero().flatten()
        self._queue = EncodeQueue(memory.codecs)
        self._positions = TokenPositions(torch.cat(request.places, 1), len(memory.codecs))
        self._run = (Run(0, 0, len(shown)),)

    def add(self, layer: int, kv_cache: Tensor) -> None:
        """Read one layer's keys and values, write its text, and after the last layer all latents."""
        memory, plan = self._memory, self._request.plan
        table = torch.tensor(self._request.table[plan.first :])
        keys, values = read_tokens(kv_cache, table, plan.reach)  # [H, n, D]
        text = torch.stack([x[:, self._text].transpose(0, 1) for x in (keys, values)], 1)  # [n, 2, H, D]
        held = memory.see(layer, kv_cache)
        write_bytes(held, self._request.written, 0, text.view(torch.uint8).flatten())
        keys, values = (x[:, self._shown].transpose(0, 1)[:, :, None] for x in (keys, values))
        waiting = self._queue.add(memory.codecs[layer], keys, values, self._run, self._positions)
        if isinstance(waiting.payload, JointPayload):
            memory.write(self._request, waiting.payload)


def pieces(blocks: Sequence[int], size: int, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Where bytes `[start, end)` of a run of blocks of `size` bytes lie: block, its bytes `[start, end)`."""
    while start < end:
        index, at = divmod(start, size)
        until = min(size, at + end - start)
        yield blocks[index], at, until
        start += until - at


def write_bytes(memory: Tensor, blocks: Sequence[int], start: int, data: Tensor) -> None:
    """Write uint8 `[n]` to bytes from `start` on of a run of blocks of memory, uint8 `[blocks, bytes]`."""
    done = 0
    for block, a, b in pieces(blocks, memory.shape[1], start, start + len(data)):
        memory[block, a:b] = data[done : done + b - a]
        done += b - a
