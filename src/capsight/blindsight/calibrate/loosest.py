"""The largest alpha whose head map is within the tolerance: as sparse as the answers allow (our rule)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from capsight.blindsight.calibrate.recovery import Evaluate, check_dense
from capsight.blindsight.calibrate.votes import Thresholds, Votes
from capsight.blindsight.categories import Category, MaskOptions
from capsight.blindsight.head_map import HeadMap


def loosest(
    votes: Votes,
    gammas: Thresholds,
    options: MaskOptions,
    evaluate: Evaluate,
    tolerance: float,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[HeadMap, float, Thresholds]:
    """The map of the largest alpha, the same in all layers, that bisection finds within the tolerance.

    The drop is taken to rise with alpha, and is measured about log2(3 L Hq) times; the map that is
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

    found = measured(len(alphas) - 1)
    if found[1] <= tolerance:
        return found
    within, beyond, best = -1, len(alphas) - 1, None
    while beyond - within > 1:
        middle = (within + beyond) // 2
        found = measured(middle)
        if found[1] <= tolerance:
            within, best = middle, found
        else:
            beyond = middle
    if best is None:
        dense = HeadMap.uniform(Category.DENSE, votes.layers, votes.heads, options)
        best = dense, check_dense(evaluate, dense, tolerance), replace(gammas, alpha=(0.0, 0.0))
    return best
