"""The report's first sentence: what is gained and what it costs, in numbers of the files."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from capsight.report.inputs import FULL, BenchFile, DemoFile, EvalFile, MethodRow

TOLERANCE = 1.0
"""Points of exact match that the headline's row may lose, where any row loses so little."""

SIGNIFICANT = 0.05
"""p-values below this are called significant."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One large number."""

    value: str
    label: str
    note: str


@dataclass(frozen=True, slots=True)
class Headline:
    """The first screen.

    Attributes:
        sentence: gain and cost.
        tiles: the same, as large numbers.
    """

    sentence: str
    tiles: tuple[Tile, ...]


def chosen_row(file: EvalFile, method: str) -> MethodRow | None:
    """The row that speaks for a method: of those within `TOLERANCE`, the smallest; else the least drop.

    Returns:
        None where the file has no row of the method.
    """
    rows = [row for row in file.rows if row.method == method and row.name != FULL]
    within = [row for row in rows if row.drop <= TOLERANCE]
    if within:
        return min(within, key=lambda row: row.share)
    return min(rows, key=lambda row: row.drop, default=None)


def headline(
    evaluation: EvalFile | None, bench: BenchFile | None, demo: DemoFile | None, method: str
) -> Headline | None:
    """Build the headline from what is there; None where no file says anything of the method."""
    row = None if evaluation is None else chosen_row(evaluation, method)
    name = None if row is None else row.name
    speed = None if bench is None else _bench_ratios(bench, method, name)
    if evaluation is not None and row is not None:
        return _from_eval(evaluation.full, row, speed)
    if demo is not None:
        return _from_demo(demo)
    if speed is None:
        return None
    return Headline(f"With {method}: {_gains_and_costs([], [], speed)}", _speed_tiles(*speed))


def _from_eval(full: MethodRow, row: MethodRow, speed: tuple[float, float] | None) -> Headline:
    kept = (
        ""
        if row.retained is None
        else f", keeping {100 * row.retained:.0f}\xa0% of each image's keys and values"
    )
    smaller, chance = 1 / row.share, row.p_value >= SIGNIFICANT
    against = f"{row.exact_match:.1f}\xa0% against {full.exact_match:.1f}\xa0%"
    points = f"{abs(row.drop):.1f} points of" if round(row.drop, 1) else "no"
    answers = f"{points} right answers ({against}{', could be chance' if chance else ''})"
    gains = [f"a KV cache {smaller:.1f}x smaller"] if smaller > 1 else []
    costs = [] if smaller > 1 else [f"a KV cache {row.share:.1f}x larger"]
    (costs if row.drop >= 0 else gains).append(answers)
    words = _gains_and_costs(gains, costs, speed)
    tiles = (
        Tile(f"{smaller:.1f}x", "smaller KV cache", f"{100 * row.share:.0f} % of the full cache's bytes"),
        Tile(
            signed(-row.drop),
            "points of right answers",
            f"{against}; {'could be chance' if chance else 'a real difference'} (p = {row.p_value:.2g})",
        ),
    )
    return Headline(f"With {row.method}{kept}: {words}", tiles + (_speed_tiles(*speed) if speed else ()))


def _from_demo(demo: DemoFile) -> Headline:
    (full, ours), asked = demo.both, len(demo.questions)
    smaller = full.kv_bytes / ours.kv_bytes
    speed = ours.tokens_per_s / full.tokens_per_s, ours.ttft_s / full.ttft_s
    sentence = (
        f"On one prompt of {demo.images} images the KV cache is {smaller:.1f}x smaller and "
        f"{sum(ours.right)} of {asked} answers are right, against {sum(full.right)} with the full cache."
    )
    tiles = (
        Tile(f"{smaller:.1f}x", "smaller KV cache", "one prompt"),
        Tile(f"{sum(ours.right)} / {asked}", "right answers", f"{sum(full.right)} with the full cache"),
    )
    return Headline(sentence, tiles + _speed_tiles(*speed))


def _bench_ratios(bench: BenchFile, method: str, name: str | None) -> tuple[float, float] | None:
    """Decode speed and time to first token against the full cache: medians over what both were run on."""
    full = {(row.batch, row.images, row.prompt_tokens): row for row in bench.rows if row.name == FULL}
    pairs = [
        (row, full[key])
        for row in bench.rows
        if (row.name == name if name else row.method == method and row.decode != "latent")
        and (key := (row.batch, row.images, row.prompt_tokens)) in full
    ]
    if not pairs:
        return None
    speed = median(row.tokens_per_s / base.tokens_per_s for row, base in pairs)
    return speed, median(row.ttft_s / base.ttft_s for row, base in pairs)


def _gains_and_costs(gains: list[str], costs: list[str], speed: tuple[float, float] | None) -> str:
    """The end of the sentence: what there is on each side, speed and time to first token included."""
    if speed is not None:
        decode, ttft = speed
        (gains if decode > 1 else costs).append(f"{decode:.2f}x the decode speed")
        (gains if ttft < 1 else costs).append(f"{ttft:.2f}x the time to the first token")
    gained = f"you gain {_listed(gains)}" if gains else "nothing is gained"
    return f"{gained}; it costs {_listed(costs)}." if costs else f"{gained}."


def _listed(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def signed(points: float) -> str:
    """Points with their sign, as people write it."""
    return "0.0" if round(points, 1) == 0 else f"{points:+.1f}".replace("-", "\N{MINUS SIGN}")


def _speed_tiles(speed: float, ttft: float) -> tuple[Tile, ...]:
    return (
        Tile(f"{speed:.2f}x", "decode speed", "tokens per second against the full cache"),
        Tile(f"{ttft:.2f}x", "time to first token", "against the full cache; below 1 is faster"),
    )
