"""Which requests of a step have shrunk, and which shrink in it: what the worker's attention has to know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from capsight.serving.plan import BlockPlan, RequestPlan, plan_request


@dataclass(frozen=True, slots=True)
class Shrinking:
    """A request whose prompt is read to its end in this step.

    Attributes:
        plan: of its blocks.
        region: int64 `[blocks]`, the blocks of its images.
        tail: `[start, end)` of its rows in the step behind the prompt's end: of output that is read again
            after a preemption. Mostly empty.
        length: tokens of the request after the step, as if nothing had been freed.
        table: int `[n]`, its blocks.
    """

    plan: RequestPlan
    region: Tensor
    tail: tuple[int, int]
    length: int
    table: Tensor


def shortened(table: Tensor, plan: BlockPlan) -> Tensor:
    """A block table `[n]` without the blocks that were freed; the end repeats what was there."""
    short = table.clone()
    short[plan.freed.start : len(table) - len(plan.freed)] = table[plan.freed.stop :]
    return short


def shrink_step(
    step: Any, prompts: Sequence[int], block_size: int, retained: float
) -> tuple[Tensor, Tensor, tuple[Shrinking, ...]]:
    """Block tables and lengths as the kernel has to see them, and the requests that shrink in this step.

    Args:
        step: vLLM's `CommonAttentionMetadata`: of it `query_start_loc_cpu`, `seq_lens`, `block_table_tensor`
            and `mm_req_doc_ranges` (request -> first and last position of each image).
        prompts: tokens of each request's prompt.
        block_size: tokens in a block.
        retained: share of the image tokens to keep.

    Returns:
        Block tables int `[R, n]`, lengths int `[R]`, and what shrinks.
    """
    tables, lengths, shrinking = step.block_table_tensor, step.seq_lens, []
    known, starts = lengths.tolist(), step.query_start_loc_cpu.tolist()
    for index, ranges in sorted((step.mm_req_doc_ranges or {}).items()):
        if index >= len(known) or known[index] < prompts[index]:
            continue
        plan = plan_request(ranges, prompts[index], block_size, retained)
        if plan is None:
            continue
        table, first = step.block_table_tensor[index], known[index] - (starts[index + 1] - starts[index])
        if first < prompts[index]:
            region = table[plan.first : plan.first + plan.blocks].to(torch.int64)
            tail = starts[index] + prompts[index] - first, starts[index + 1]
            shrinking.append(Shrinking(plan, region, tail, known[index], table))
            continue
        if tables is step.block_table_tensor:
            tables, lengths = tables.clone(), lengths.clone()
        tables[index] = shortened(table, plan)
        lengths[index] -= plan.freed_tokens
    return tables, lengths, tuple(shrinking)


def behind(step: Any, tails: Sequence[Shrinking]) -> tuple[Any, Tensor]:
    """The tokens behind the prompts' ends as a step of its own, and their rows in the whole step.

    Args:
        step: see `shrink_step`; a dataclass.
        tails: requests that have such tokens.
    """
    sizes = torch.tensor([end - start for start, end in (request.tail for request in tails)])
    starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).to(torch.int32)
    rows = torch.cat([torch.arange(*request.tail) for request in tails])
    made = replace(
        step,
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor([r.length - r.plan.freed_tokens for r in tails], dtype=torch.int32),
        num_reqs=len(tails),
        num_actual_tokens=len(rows),
        max_query_len=int(sizes.max()),
        block_table_tensor=torch.stack([shortened(request.table, request.plan) for request in tails]),
        slot_mapping=step.slot_mapping[rows],
    )
    return made, rows
