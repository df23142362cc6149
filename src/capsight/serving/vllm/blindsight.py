"""BlindSight inside vLLM: the image tokens of a step's prefill attend as their heads' categories say.

The masks are those of `capsight.blindsight`, which follow from where images lie. A mask shows a token nothing
that comes after it, so it does not matter whether a prompt is read in chunks, beside other requests, or in
part from the prefix cache. Text, and all that is generated, sees everything: vLLM's own kernel computes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Self

import torch
from torch import Tensor

from capsight.blindsight import Category, HeadMap, sparse_attention
from capsight.layout import PromptLayout, RowLayout, VisionBlock
from capsight.serving.vllm.paged import read_tokens


@dataclass(frozen=True, slots=True)
class SparseRequest:
    """One request of a step that reads image tokens.

    Attributes:
        index: of the request in the step.
        rows: `[start, end)` of its tokens among those of the step, from its first image token to its last.
        keys: tokens of the prompt up to that last one (T).
        blocks: int `[n]`, the blocks of paged memory that hold them.
        layout: of the prompt.
    """

    index: int
    rows: tuple[int, int]
    keys: int
    blocks: Tensor
    layout: PromptLayout


def request_layout(ranges: Sequence[tuple[int, int]], length: int) -> PromptLayout:
    """Where the images of a prompt lie, each between two delimiters.

    Args:
        ranges: first and last position of each image's tokens, as vLLM has them.
        length: tokens of the prompt so far; one that ends inside an image is taken to its end.
    """
    ordered = sorted((int(first), int(last) + 1) for first, last in ranges)
    inside = {position for span in ordered for position in range(*span)}
    blocks, taken = [], set(inside)
    for index, (start, end) in enumerate(ordered):
        around = [position for position in (start - 1, end) if position >= 0 and position not in taken]
        taken.update(around)
        blocks.append(VisionBlock(start, end, "image", (1, 1, end - start), index, tuple(around)))
    reach = max((block.reach for block in blocks), default=0)
    return PromptLayout((RowLayout(max(length, reach), 0, tuple(blocks)),))


def sparse_requests(step: Any) -> tuple[SparseRequest, ...]:
    """The requests of a step that read image tokens.

    Args:
        step: vLLM's `CommonAttentionMetadata`: of it `query_start_loc_cpu`, `seq_lens`, `block_table_tensor`
            and `mm_req_doc_ranges` (request -> first and last position of each image).
    """
    requests = []
    starts = step.query_start_loc_cpu.tolist()
    lengths = step.seq_lens.tolist()
    for index, ranges in sorted((step.mm_req_doc_ranges or {}).items()):
        if not ranges or index >= len(lengths):
            continue
        first = lengths[index] - (starts[index + 1] - starts[index])  # position of the first new token
        spans = [(max(a, first), min(b + 1, lengths[index])) for a, b in ranges]
        spans = [span for span in spans if span[0] < span[1]]
        if not spans:
            continue
        begin, end = min(a for a, _ in spans), max(b for _, b in spans)
        row = starts[index] - first
        layout = request_layout(ranges, lengths[index])
        rows = (row + begin, row + end)
        requests.append(SparseRequest(index, rows, end, step.block_table_tensor[index], layout))
    return tuple(requests)


def dense_rest(step: Any, others: Mapping[int, tuple[int, int]]) -> tuple[Any, Tensor]:
    """What is left of a step for the dense kernel: what comes before and after some rows of each request.

    Args:
        step: see `sparse_requests`; a dataclass.
        others: by request, `[start, end)` of the rows that are left out.

    Returns:
        The step as if each piece were a request of its own (it sees its request's earlier tokens), and the
        rows of its tokens in the whole step, int64 `[n]`.
    """
    starts, lengths = step.query_start_loc_cpu.tolist(), step.seq_lens.tolist()
    pieces = []  # request, its first row, the row after its last, tokens up to there
    for index, length in enumerate(lengths):
        first, end = starts[index], starts[index + 1]
        begin, after = others.get(index, (end, end))
        pieces += [(index, first, begin, length - (end - begin)), (index, after, end, length)]
    pieces = [piece for piece in pieces if piece[1] < piece[2]]
    request = torch.tensor([piece[0] for piece in pieces], dtype=torch.int64)
    sizes = torch.tensor([0] + [end - first for _, first, end, _ in pieces], dtype=torch.int32)
    begins = sizes.cumsum(0, dtype=torch.int32)
    rows = torch.cat([torch.arange(first, end) for _, first, end, _ in pieces] or [begins[:0].long()])
    seen = torch.tensor([piece[3] for piece in pieces], dtype=torch.int32)
    ranges, prompts = step.mm_req_doc_ranges, step.rswa_prefix_lens
    rest = replace(
        step,
        query_start_loc=begins.to(step.query_start_loc),
        query_start_loc_cpu=begins,
        seq_lens=seen.to(step.seq_lens),
        num_reqs=len(pieces),
        num_actual_tokens=len(rows),
        max_query_len=int(sizes.max()),
        max_seq_len=int(seen.max()) if pieces else 0,
        block_table_tensor=step.block_table_tensor[request],
        slot_mapping=step.slot_mapping[rows],
        mm_req_doc_ranges=None if ranges is None else {i: ranges[piece[0]] for i, piece in enumerate(pieces)},
        rswa_prefix_lens=None if prompts is None else prompts[request],
    )
    return rest, rows


class SparsePrefill:
    """A head map as one process of the engine applies it."""

    def __init__(self, head_map: HeadMap, rank: int = 0, size: int = 1) -> None:
        """Take the heads that this process has.

        Args:
            head_map: of the whole model.
            rank: of this process among those that share the heads (tensor parallelism).
            size: processes that share them; divides the number of heads.
        """
        heads = head_map.num_heads // size
        self.options = head_map.options
        self.categories = tuple(layer[rank * heads : (rank + 1) * heads] for layer in head_map.categories)

    @classmethod
    @lru_cache(maxsize=4)
    def load(cls, folder: str, subfolder: str, rank: int, size: int) -> Self:
        """The head map of an exported checkpoint, read once for all layers; see `__init__`."""
        return cls(HeadMap.from_pretrained(folder, subfolder=subfolder), rank, size)

    def is_dense(self, layer: int) -> bool:
        """Whether no head of this layer, of those that this process has, leaves anything out."""
        return all(category is Category.DENSE for category in self.categories[layer])

    def attend(
        self,
        layer: int,
        requests: Sequence[SparseRequest],
        query: Tensor,
        kv_cache: Tensor,
        scaling: float,
        output: Tensor,
    ) -> None:
        """Write the attention of image tokens.

        Args:
            layer: index of the layer.
            requests: of this step.
            query: `[tokens, Hq, D]`, after RoPE, of all requests of the step.
            kv_cache: of this layer, which holds the step's keys and values already; see `read_tokens`.
            scaling: factor on the scores.
            output: `[tokens, Hq, D]` or `[tokens, Hq * D]`; image tokens (and text between them) are written.
        """
        out = output.view(query.shape)
        for request in requests:
            key, value = read_tokens(kv_cache, request.blocks, request.keys)
            rows = slice(*request.rows)
            attended = sparse_attention(
                query[rows].transpose(0, 1)[None],
                key[None],
                value[None],
                request.layout,
                self.categories[layer],
                options=self.options,
                scaling=scaling,
            )  # [1, Hq, S, D]
            out[rows] = attended[0].transpose(0, 1)
