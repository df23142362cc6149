"""What a step does with requests whose images are latents: attention over them, and making new ones."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from capsight.kvcapsule.attention.joint import JointTokens
from capsight.kvcapsule.attention.native import Source, Sources, supports
from capsight.kvcapsule.codecs import JointCodec, TokenPositions
from capsight.kvcapsule.codecs.joint_payload import JointPayload
from capsight.serving.vllm.latents import LatentMemory, LatentRequest, Storing
from capsight.serving.vllm.paged import read_blocks


class LatentStep:
    """The requests of one step that have latents or get them; used by its layers in turn.

    Attributes:
        rows: by request of the step, `[start, end)` of the tokens that attend to latents: those of requests
            whose prompts were read in earlier steps.
        tails: requests that are read to their prompts' ends in this step and have more tokens behind them, of
            output that is read again after a preemption. These attend to latents, too, so they have to wait
            for the last layer: they are for a second pass.
    """

    def __init__(
        self,
        memory: LatentMemory,
        opened: Sequence[tuple[int, LatentRequest]],
        storing: Sequence[LatentRequest] = (),
    ) -> None:
        """Take the requests that have latents, with their indices in the step, and those that get them."""
        self._memory = memory
        self.rows = {index: request.rows for index, request in opened}
        self.tails = [request for request in storing if request.rows[0] < request.rows[1]]
        self._storing = [Storing(memory, request) for request in storing]
        several = [request for _, request in opened if request.rows[1] - request.rows[0] > 1]
        alone = [request for _, request in opened if request.rows[1] - request.rows[0] == 1]
        self._groups = [_Group(memory, requests) for requests in (alone, several) if requests]

    def second_pass(self) -> tuple[LatentStep, Tensor]:
        """The tails as a step of their own, and their rows in this one, int64 `[n]`."""
        begins, opened = 0, []
        for index, request in enumerate(self.tails):
            count = request.rows[1] - request.rows[0]
            moved = LatentRequest(
                request.plan, (begins, begins + count), request.length, request.table, request.places
            )
            opened.append((index, moved))
            begins += count
        rows = torch.cat([torch.arange(*request.rows) for request in self.tails])
        return LatentStep(self._memory, opened), rows

    def run(self, layer: int, query: Tensor, kv_cache: Tensor, scaling: float, output: Tensor) -> None:
        """Do one layer's part; layers come in order.

        Args:
            layer: index of the layer.
            query: `[tokens, Hq, D]`, after RoPE, of all requests of the step.
            kv_cache: of this layer, which holds the step's keys and values already; see `read_tokens`.
            scaling: factor on the scores.
            output: `[tokens, Hq, D]` or `[tokens, Hq * D]`; what attends to latents is written.
        """
        self._memory.see(layer, kv_cache)
        out = output.view(query.shape)
        for group in self._groups:
            out[group.rows] = group.attend(layer, query[group.rows], kv_cache, scaling)
        for request in self._storing:
            request.add(layer, kv_cache)


class Placed(tuple[int, int]):
    """First and last position of an image's tokens in a prompt, with their rotary positions.

    Attributes:
        places: int64 `[3, n]`, as the model numbers them.
    """

    places: Tensor

    @classmethod
    def of(cls, first: int, last: int, places: Tensor) -> Self:
        """Both together."""
        made = cls((first, last))
        made.places = places
        return made


def latent_step(step: Any, prompts: Sequence[int], block_size: int, memory: LatentMemory) -> LatentStep:
    """Which requests of a step have latents, and which get them.

    Args:
        step: vLLM's `CommonAttentionMetadata`: of it `query_start_loc_cpu`, `seq_lens`, `block_table_tensor`
            and `mm_req_doc_ranges` (request -> first and last position of each image, `Placed`).
        prompts: tokens of each request's prompt.
        block_size: tokens in a block.
        memory: where latents lie.
    """
    opened, storing = [], []
    lengths, starts = step.seq_lens.tolist(), step.query_start_loc_cpu.tolist()
    memory.clear(_begun(step.block_table_tensor, lengths, starts, block_size))
    for index, ranges in sorted((step.mm_req_doc_ranges or {}).items()):
        if index >= len(lengths) or lengths[index] < prompts[index]:
            continue
        plan = memory.kind.plan(ranges, prompts[index], block_size)
        if plan is None:
            continue
        length, end = lengths[index], starts[index + 1]
        begin = max(starts[index], end - (length - prompts[index]))  # of what lies behind the prompt
        table = step.block_table_tensor[index, : -(-length // block_size)].tolist()
        request = LatentRequest(plan, (begin, end), length, table, tuple(x.places for x in sorted(ranges)))
        if end - starts[index] > length - prompts[index]:
            storing.append(request)
        else:
            opened.append((index, request))
    return LatentStep(memory, opened, storing)


def _begun(tables: Tensor, lengths: Sequence[int], starts: Sequence[int], size: int) -> list[int]:
    """Blocks that a step is the first to write to, and does not fill."""
    lasts = [
        (row, (length - 1) // size)
        for row, (length, start, end) in enumerate(zip(lengths, starts, starts[1:], strict=False))
        if 0 < length % size <= end - start
    ]
    return [int(tables[row, index]) for row, index in lasts]


class _Group:
    """Requests with a new token each, which are attended to in one call, or with several.

    Exact tokens are those in front of the region and behind it, and its text; they are copied, since paged
    memory has the channels of a key far apart.
    """

    def __init__(self, memory: LatentMemory, requests: Sequence[LatentRequest]) -> None:
        """Look up where everything lies."""
        self._memory, self._requests = memory, requests
        self.rows = torch.cat([torch.arange(*request.rows) for request in requests])
        blocks: list[int] = []
        texts: list[int] = []
        spans = []  # of each request: start and tokens of what is in front, behind, and text
        for request in requests:
            plan = request.plan
            size, front = plan.block_size, len(blocks) * plan.block_size
            begin, at = plan.after // size, plan.after % size
            blocks += [*request.table[: plan.first], *request.table[begin:]]
            kept = request.written[: -(-plan.text_tokens // size)]
            text = len(texts) * size
            texts += kept
            before = plan.first * size
            spans.append(
                (
                    (front, before),
                    (front + before + at, request.length - plan.after),
                    (text, plan.text_tokens),
                )
            )
        self._blocks, self._texts = torch.tensor(blocks), torch.tensor(texts, dtype=torch.int64)
        self._spans = torch.tensor(spans).permute(1, 2, 0).contiguous()  # [3, 2, B]

    def attend(self, layer: int, query: Tensor, kv_cache: Tensor, scaling: float) -> Tensor:
        """Attention of queries `[n, Hq, D]`, those of all requests in order: like them."""
        near, codec = read_blocks(kv_cache, self._blocks), self._memory.codecs[layer]
        text = kv_cache.view(len(kv_cache), -1)[self._texts].view(-1, 2, *near.shape[2:]).transpose(0, 1)
        exact = list(zip((near, near, text), self._spans, strict=True))
        if len(query) > len(self._requests) or not supports(query):
            return self._rebuilt(codec, query, exact, scaling)
        heads = kv_cache.shape[1]
        sources = [
            Source(held[0], held[1], *(x[:, None].expand(-1, heads).contiguous() for x in span))
            for held, span in exact
            if span[1].any()
        ]
        latents, tokens = codec.stored_latents(self._payload), self._memory.tokens(self._requests)
        joint = JointTokens(latents, tokens, codec.basis)
        return joint.attend(query[:, :, None], Sources(tuple(sources)), scaling)[0][:, :, 0]

    def _rebuilt(
        self, codec: JointCodec, query: Tensor, exact: Sequence[tuple[Tensor, Tensor]], scaling: float
    ) -> Tensor:
        """The same over keys and values that are rebuilt: without native code, or for several new tokens."""
        rebuilt = codec.decode_at(self._payload, self._positions, query.dtype)  # [T, H, 1, D] each
        latents = torch.stack(rebuilt)[:, :, :, 0]
        found, done, first = [], 0, 0
        for index, request in enumerate(self._requests):
            new, count = request.rows[1] - request.rows[0], request.plan.image_tokens
            front, behind, text = (
                held[:, start : start + tokens]
                for held, (start, tokens) in ((held, span[:, index].tolist()) for held, span in exact)
            )
            keys, values = torch.cat((front, text, latents[:, done : done + count], behind), 1).transpose(
                1, 2
            )
            seen = torch.ones(new, keys.shape[1], dtype=torch.bool).tril(keys.shape[1] - new)
            asked = query[first : first + new].transpose(0, 1)
            attended = scaled_dot_product_attention(
                asked[None], keys[None], values[None], attn_mask=seen, scale=scaling, enable_gqa=True
            )
            found.append(attended[0].transpose(0, 1))
            done, first = done + count, first + new
        return torch.cat(found)

    @cached_property
    def _payload(self) -> JointPayload:
        return self._memory.read(self._requests)

    @cached_property
    def _positions(self) -> TokenPositions:
        places = [place for request in self._requests for place in request.places]
        return TokenPositions(torch.cat(places, 1), len(self._memory.codecs))
