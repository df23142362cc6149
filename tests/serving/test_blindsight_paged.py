"""Sparse prefill out of paged memory, without vLLM: chunks, neighbours, heads shared out over processes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from capsight.blindsight import Category, HeadMap, MaskOptions, sparse_attention
from capsight.layout import PromptLayout, RowLayout, VisionBlock
from capsight.serving.vllm.blindsight import SparsePrefill, dense_rest, request_layout, sparse_requests
from capsight.serving.vllm.paged import read_tokens

HEADS, KV, D, SIZE = 4, 2, 8, 4
HEAD_MAP = HeadMap(
    (tuple(Category), (Category.SINK,) * 4, (Category.DENSE,) * 4), MaskOptions(sink_tokens=2, own_window=3)
)
PROMPTS = ([(3, 9), (12, 17)], [(1, 4), (7, 20), (23, 25)], [])
LENGTHS = (23, 30, 11)


class Pool:
    """Paged memory of one layer, as vLLM's CPU kernels keep it, with the blocks of each request scattered."""

    def __init__(self, key, value):
        torch.manual_seed(1)
        self.tables = torch.randperm(40)[: len(key) * 8].view(len(key), 8)
        self.cache = torch.full((40, KV, SIZE, 2 * D), torch.nan)
        for table, k, v in zip(self.tables, key, value, strict=True):
            for position in range(k.shape[1]):
                block = self.cache[table[position // SIZE]].view(KV, -1)
                offset = position % SIZE
                block[:, : SIZE * D].view(KV, D, SIZE)[:, :, offset] = k[:, position]
                block[:, SIZE * D :].view(KV, SIZE, D)[:, offset] = v[:, position]


def tensors():
    torch.manual_seed(0)
    return [(torch.randn(HEADS, n, D), torch.randn(KV, n, D), torch.randn(KV, n, D)) for n in LENGTHS]


def expected(layer, ranges, q, k, v):
    blocks = tuple(
        VisionBlock(a, b + 1, "image", (1, 1, b + 1 - a), i, (a - 1, b + 1))
        for i, (a, b) in enumerate(ranges)
    )
    layout = PromptLayout((RowLayout(q.shape[1], 0, blocks),))
    categories = HEAD_MAP.categories[layer]
    given = {"options": HEAD_MAP.options, "implementation": "reference"}
    return sparse_attention(q[None], k[None], v[None], layout, categories, **given)[0]


@dataclass
class Step:
    """What `CommonAttentionMetadata` of vLLM says of a step."""

    query_start_loc: Tensor
    query_start_loc_cpu: Tensor
    seq_lens: Tensor
    block_table_tensor: Tensor
    slot_mapping: Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    mm_req_doc_ranges: dict[int, list[tuple[int, int]]] | None
    rswa_prefix_lens: Tensor | None


def step(parts, tables):
    """A step in which requests read `[first, end)` of their prompts."""
    sizes = torch.tensor([0, *(end - first for first, end in parts)])
    begins = sizes.cumsum(0)
    return Step(
        query_start_loc=begins,
        query_start_loc_cpu=begins,
        seq_lens=torch.tensor([end for _, end in parts]),
        block_table_tensor=tables,
        slot_mapping=torch.arange(int(begins[-1])),
        num_reqs=len(parts),
        num_actual_tokens=int(begins[-1]),
        max_query_len=int(sizes.max()),
        max_seq_len=max(end for _, end in parts),
        mm_req_doc_ranges={i: list(ranges) for i, ranges in enumerate(PROMPTS)},
        rswa_prefix_lens=torch.tensor(LENGTHS),
    )


def dense(step, query, cache):
    """What vLLM's own kernel does: every request attends causally to its blocks."""
    out = torch.empty_like(query)
    starts = step.query_start_loc.tolist()
    for index, length in enumerate(step.seq_lens.tolist()):
        first, end = starts[index], starts[index + 1]
        k, v = read_tokens(cache, step.block_table_tensor[index], length)
        k, v = (x.repeat_interleave(HEADS // KV, 0) for x in (k, v))
        scores = query[first:end].transpose(0, 1) @ k.transpose(1, 2) * D**-0.5
        hidden = torch.ones(end - first, length).triu(length - (end - first) + 1).bool()
        out[first:end] = (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1)
    return out


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("chunk", [64, 6, 1])
def test_chunks_of_several_requests(layer, chunk):
    given = tensors()
    pool = Pool([k for _, k, _ in given], [v for _, _, v in given])
    prefill = SparsePrefill(HEAD_MAP)
    assert prefill.is_dense(layer) == (layer == 2)
    pairs = list(zip(PROMPTS, given, strict=True))
    right = [expected(layer, ranges, *qkv).transpose(0, 1) for ranges, qkv in pairs]
    done = [0, 0, 0]
    while any(d < n for d, n in zip(done, LENGTHS, strict=True)):
        parts = [(d, min(d + chunk, n)) for d, n in zip(done, LENGTHS, strict=True)]
        query = torch.cat([q[:, a:b] for (q, _, _), (a, b) in zip(given, parts, strict=True)], 1)
        query = query.transpose(0, 1)
        whole = step(parts, pool.tables)
        requests = sparse_requests(whole)
        rest, rows = dense_rest(whole, {request.index: request.rows for request in requests})
        assert rest.num_actual_tokens == len(rows) == rest.query_start_loc[-1]
        assert (
            rest.num_reqs == len(rest.seq_lens) == len(rest.block_table_tensor) == len(rest.rswa_prefix_lens)
        )
        output = torch.full((query.shape[0], HEADS * D), torch.nan)
        output[rows] = dense(rest, query[rows], pool.cache).flatten(1)
        prefill.attend(layer, requests, query, pool.cache, D**-0.5, output)
        now = torch.cat([found[a:b] for found, (a, b) in zip(right, parts, strict=True)])
        assert torch.allclose(output, now.flatten(1), atol=1e-6)
        done = [end for _, end in parts]


@pytest.mark.parametrize("size", [2, 4])
def test_heads_shared_out_over_processes(size):
    own = HEADS // size
    for layer in (0, 1):
        shared = [SparsePrefill(HEAD_MAP, rank, size).categories[layer] for rank in range(size)]
        assert all(len(part) == own for part in shared)
        assert sum(shared, ()) == HEAD_MAP.categories[layer]


def test_what_has_no_image_is_left_alone():
    nothing = step([(0, 3), (0, 1), (0, 11)], torch.zeros(3, 8, dtype=torch.int32))
    assert sparse_requests(nothing) == ()
    nothing.mm_req_doc_ranges = None
    assert sparse_requests(nothing) == ()
    decode = step([(22, 23), (29, 30), (10, 11)], torch.zeros(3, 8, dtype=torch.int32))
    assert sparse_requests(decode) == ()


def test_images_without_delimiters_between_them():
    layout = request_layout([(0, 3), (4, 7), (9, 12)], 5)
    assert [block.delimiters for block in layout.rows[0].blocks] == [(), (8,), (13,)]
    assert layout.length == 14
