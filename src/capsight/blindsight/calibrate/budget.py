"""The head map that loses least among those of a given cost, so that criteria are compared at equal FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from capsight.blindsight.categories import SPARSE, Category, MaskOptions
from capsight.blindsight.head_map import HeadMap
from capsight.errors import OptionError

Cost = Callable[[HeadMap], float]
"""What a prefill under a head map costs, in any unit (`attention_flops` of a prompt, for one)."""


def cheapest_within(
    lost: Tensor, alpha: float, order: Sequence[Category], options: MaskOptions | None = None
) -> HeadMap:
    """Every head at the cheapest category that loses at most `alpha`, Dense where none does.

    Args:
        lost: `[L, 3, Hq]`, mean losses in the order of `SPARSE`.
        alpha: in their unit.
        order: the categories of `SPARSE`, cheapest first.
        options: mask options of the map.
    """
    good = (lost <= alpha).tolist()

    def chosen(layer: list[list[bool]], head: int) -> Category:
        return next((c for c in order if layer[SPARSE.index(c)][head]), Category.DENSE)

    categories = tuple(tuple(chosen(layer, head) for head in range(lost.shape[2])) for layer in good)
    return HeadMap(categories, options or MaskOptions())


def at_cost(lost: Tensor, cost: Cost, most: float, options: MaskOptions | None = None) -> HeadMap:
    """The map of the smallest alpha that costs at most so much; deterministic.

    The cost does not rise with alpha, so alpha is found by bisection over the losses themselves, and maps
    of several criteria for one `most` differ in cost by one head at the utmost.

    Args:
        lost: `[L, 3, Hq]`, mean losses in the order of `SPARSE`.
        cost: of a map.
        most: in the unit of `cost`.
        options: mask options of the map.

    Raises:
        OptionError: no map is that cheap.
    """
    shape = lost.shape[0], lost.shape[2]
    order = sorted(SPARSE, key=lambda c: cost(HeadMap.uniform(c, *shape, options)))
    if cost(HeadMap.uniform(order[0], *shape, options)) > most:
        raise OptionError(f"no head map costs as little as {most:.4g}; ask for a smaller saving")
    if cost(HeadMap.uniform(Category.DENSE, *shape, options)) <= most:
        return HeadMap.uniform(Category.DENSE, *shape, options)
    alphas = torch.unique(lost).tolist()  # ascending
    few, enough = -1, len(alphas) - 1
    while enough - few > 1:
        middle = (few + enough) // 2
        within = cost(cheapest_within(lost, alphas[middle], order, options)) <= most
        few, enough = (few, middle) if within else (middle, enough)
    return cheapest_within(lost, alphas[enough], order, options)
