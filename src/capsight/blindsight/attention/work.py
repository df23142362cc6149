"""What one call of sparse attention comes down to: heads of one category in one row, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from capsight.blindsight.categories import Category, MaskOptions
from capsight.blindsight.rule import BaseRule
from capsight.blindsight.spans import Chunk
from capsight.errors import LayoutError, OptionError
from capsight.layout import PromptLayout, RowLayout


@dataclass(frozen=True, slots=True)
class Work:
    """A mask to attend under; hashable, so plans are made once and used by every layer.

    Attributes:
        row: the layout of the prompt.
        category: of the heads.
        options: which tokens are sinks.
        rule: the layer's own.
        chunk: which keys and queries are at hand.
    """

    row: RowLayout
    category: Category
    options: MaskOptions
    rule: BaseRule
    chunk: Chunk

    @property
    def first_row(self) -> int:
        """Position of the first query that is no padding."""
        return max(self.chunk.first_query, self.row.pad_left)


Attend = Callable[[Tensor, Tensor, Tensor, Work, float], Tensor]
"""`(query [N, G, S, D], key [N, T, D], value [N, T, D], work, scaling) -> [N, G, S, D]`, padding rows zero.

G query heads share each of the N KV heads.
"""


def attend_all(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PromptLayout,
    categories: Sequence[Category],
    options: MaskOptions,
    rule: BaseRule,
    chunk: Chunk,
    scaling: float,
    choose: Callable[[Work, Tensor], Attend],
) -> Tensor:
    """Every row and category through the implementation that `choose(work, query)` names.

    Args:
        query: `[B, Hq, S, D]`.
        key: `[B, Hkv, T, D]`.
        value: `[B, Hkv, T, D]`.
        layout: B rows, at least up to the chunk's end.
        categories: one per query head.
        options: which tokens are sinks.
        rule: the layer's own.
        chunk: the positions of keys and queries.
        scaling: factor on the scores.
        choose: picks the implementation.

    Returns:
        `[B, Hq, S, D]`; rows of padding are zero.
    """
    groups = [(c, [h for h, kind in enumerate(categories) if kind is c]) for c in Category if c in categories]
    size = query.shape[1] // key.shape[1]
    out = torch.empty_like(query) if len(groups) > 1 or layout.batch_size > 1 else None
    for index, row in enumerate(layout.rows):
        for category, heads in groups:
            work = Work(row, _effective(row, category), options, rule, chunk)
            q, k, v = _grouped(query[index], key[index], value[index], heads, size)
            output = choose(work, q)(q, k, v, work, scaling)  # [N, G, S, D]
            if out is None:
                return output.flatten(0, 1)[None]
            neighbours = _in_a_row(heads)
            if neighbours:
                out[index, neighbours].unflatten(0, output.shape[:2]).copy_(output)
            else:
                out[index, heads] = output.flatten(0, 1)
    assert out is not None
    return out


def check(query: Tensor, key: Tensor, value: Tensor, layout: PromptLayout, categories: int) -> None:
    """Raise unless the shapes belong together.

    Raises:
        OptionError: they do not.
    """
    b, hq, s, _ = query.shape
    if key.shape != value.shape or key.shape[0] != b or hq % key.shape[1] or key.shape[2] < s:
        raise OptionError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not "
            "belong together: expected [B, Hq, S, D] and twice [B, Hkv, T, D], T >= S, Hq a multiple of Hkv"
        )
    if categories != hq:
        raise OptionError(f"{categories} categories for {hq} query heads; give one per head of the layer")
    if layout.batch_size != b:
        raise LayoutError(f"the layout has {layout.batch_size} rows, the query {b}")


def chunk_of(layout: PromptLayout, queries: int, keys: int, prefix: int | None) -> Chunk:
    """Where keys and queries lie in the prompt.

    Args:
        layout: of the whole prompt so far.
        queries: tokens in the query (S).
        keys: tokens in the key (T).
        prefix: tokens before the first query; None: T - S.

    Raises:
        LayoutError: the layout ends before the last query.
        OptionError: there are more keys than positions.
    """
    first = keys - queries if prefix is None else prefix
    end = first + queries
    if end < keys:
        raise OptionError(f"{keys} keys for {end} positions; prefix counts the tokens before the first query")
    if layout.length < end:
        raise LayoutError(
            f"the layout covers {layout.length} tokens, the queries reach {end}; "
            f"if the rest is text, pass layout.extended({end - layout.length})"
        )
    return Chunk(end - keys, first, end)


def _effective(row: RowLayout, category: Category) -> Category:
    """Dense where the row has one image at most and the category sees all of it: the masks are the same."""
    if category.sees_own_image and row.num_images + row.num_videos <= 1:
        return Category.DENSE
    return category


def _grouped(
    query: Tensor, key: Tensor, value: Tensor, heads: list[int], size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Some query heads of one row and the KV heads that they read, as `Attend` takes them.

    Where the query heads share KV heads evenly, as all heads of a layer do, nothing is copied on a CPU. GPU
    kernels were not tried on keys that heads share, so there each query head gets its own.

    Args:
        query: `[Hq, S, D]`.
        key: `[Hkv, T, D]`.
        value: `[Hkv, T, D]`.
        heads: which query heads (H).
        size: query heads that share a KV head.
    """
    read = [head // size for head in heads]
    each = read.count(read[0]) if query.device.type == "cpu" else 1
    if read != [head for head in read[::each] for _ in range(each)]:
        each = 1
    k, v = (_heads(x, read[::each]) for x in (key, value))
    return _heads(query, heads).unflatten(0, (-1, each)), k, v


def _heads(x: Tensor, heads: list[int]) -> Tensor:
    """Heads of `[H, S, D]`, without a copy where they lie in a row."""
    neighbours = _in_a_row(heads)
    return x[neighbours] if neighbours else x.index_select(0, torch.tensor(heads, device=x.device))


def _in_a_row(heads: list[int]) -> slice | None:
    """These heads as a slice, if they are one."""
    first, end = heads[0], heads[-1] + 1
    return slice(first, end) if heads == list(range(first, end)) else None
