"""Finds a head map whose measured drop is tolerable: by the largest alpha, or by returning heads to Dense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from capsight.blindsight.calibrate.losses import Losses
from capsight.blindsight.calibrate.votes import Thresholds, Votes
from capsight.blindsight.categories import Category, MaskOptions
from capsight.blindsight.head_map import HeadMap
from capsight.errors import CalibrationError

Evaluate = Callable[[HeadMap], float]
"""What a head map costs: 0 for the dense model, larger is worse; accuracy points, KL, anything."""

STEPS = 16
"""Parts of the values of alpha at which a head changes its category; after each of them a map is measured."""

_Unit = list[tuple[int, int]]


def recover(
    head_map: HeadMap,
    losses: Losses,
    evaluate: Evaluate,
    tolerance: float,
    group: int = 1,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[HeadMap, float]:
    """The map with as few heads returned to Dense as bring the drop within the tolerance.

    How many is found by bisection, so the drop is measured about log2(L * Hq) times; the map that is
    returned has itself been measured.

    Args:
        head_map: as voted.
        losses: what each head loses by its category; decides which return first.
        evaluate: measures a map; has to be within the tolerance for an all-Dense one.
        tolerance: in the unit of `evaluate`.
        group: query heads that return together, and share a number in `losses`.
        on_step: called after each measurement.

    Returns:
        The map, and its drop.

    Raises:
        CalibrationError: even an all-Dense map is outside the tolerance.
    """
    order = _units(head_map, losses, group)

    def measured(units: int) -> tuple[HeadMap, float]:
        changed = head_map.replaced({head: Category.DENSE for unit in order[:units] for head in unit})
        drop = float(evaluate(changed))
        on_step()
        return changed, drop

    best = measured(0)
    if best[1] <= tolerance:
        return best
    few, enough = 0, len(order)
    dense = head_map.replaced({head: Category.DENSE for unit in order for head in unit})
    best = dense, check_dense(evaluate, dense, tolerance)
    on_step()
    while enough - few > 1:
        middle = (few + enough) // 2
        candidate = measured(middle)
        if candidate[1] <= tolerance:
            best, enough = candidate, middle
        else:
            few = middle
    return best


def loosest(
    votes: Votes,
    gammas: Thresholds,
    options: MaskOptions,
    evaluate: Evaluate,
    tolerance: float,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[HeadMap, float, Thresholds]:
    """The map of the largest alpha, the same in all layers, that is found within the tolerance.

    A drop of few answers does not rise evenly with alpha, so `STEPS` values are tried from the largest on;
    bisection then goes on between the first within the tolerance and the one before. The map that is
    returned has itself been measured.

    Args:
        votes: what was counted.
        gammas: the other thresholds; its alpha is not used.
        options: mask options of the map.
        evaluate: measures a map; has to be within the tolerance for an all-Dense one.
        tolerance: in the unit of `evaluate`.
        on_step: called after each measurement.

    Returns:
        The map, its drop, and the thresholds it was found with.

    Raises:
        CalibrationError: even an all-Dense map is outside the tolerance.
    """
    alphas = votes.change_points(gammas)

    def measured(place: int) -> tuple[HeadMap, float, Thresholds]:
        chosen = replace(gammas, alpha=(alphas[place], alphas[place]))
        head_map = HeadMap(votes.decide(chosen), options)
        drop = float(evaluate(head_map))
        on_step()
        return head_map, drop, chosen

    beyond = len(alphas)
    for step in range(STEPS, -1, -1):
        within = round(step * (len(alphas) - 1) / STEPS)
        if within == beyond:
            continue
        best = measured(within)
        if best[1] <= tolerance:
            break
        beyond = within
    else:
        dense = HeadMap.uniform(Category.DENSE, votes.layers, votes.heads, options)
        return dense, check_dense(evaluate, dense, tolerance), replace(gammas, alpha=(0.0, 0.0))
    while beyond - within > 1:
        middle = (within + beyond) // 2
        candidate = measured(middle)
        if candidate[1] <= tolerance:
            within, best = middle, candidate
        else:
            beyond = middle
    return best


def check_dense(evaluate: Evaluate, dense: HeadMap, tolerance: float) -> float:
    """The drop of an all-Dense map.

    Raises:
        CalibrationError: it is outside the tolerance.
    """
    drop = float(evaluate(dense))
    if not drop <= tolerance:
        raise CalibrationError(
            f"evaluate gives a drop of {drop:.4g} for the dense model itself, more than the tolerance of "
            f"{tolerance:.4g}; it must return how much worse than the dense model a head map is"
        )
    return drop


def _units(head_map: HeadMap, losses: Losses, group: int) -> list[_Unit]:
    """The heads (or groups of heads) that are not Dense, those with the largest loss first."""
    units: list[tuple[float, _Unit]] = []
    for layer, categories in enumerate(head_map.categories):
        for first in range(0, len(categories), group):
            unit = [(layer, head) for head in range(first, first + group)]
            if categories[first] is not Category.DENSE:  # the whole unit is alike
                loss = max(losses.of(layer, head, categories[head]) for _, head in unit)
                units.append((loss, unit))
    return [unit for _, unit in sorted(units, key=lambda item: (-item[0], item[1]))]
