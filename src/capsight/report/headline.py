"""The report's first sentence: what is gained and what it costs, in numbers of the files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from capsight.evaluation.bench_row import BenchRow
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


@dataclass(frozen=True, slots=True)
class Speed:
    """Speed against the full cache.

    Attributes:
        decode: ratio of tokens per second.
        ttft: ratio of the times to the first token.
        of: what was timed, where it is not the row that the sentence is about.
    """

    decode: float
    ttft: float
    of: str


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
    speed = None if bench is None else _bench_ratios(bench, method, row)
    if evaluation is not None and row is not None:
        if speed is None and demo is not None:
            speed = _demo_ratios(demo)
        return _from_eval(evaluation.full, row, speed)
    if demo is not None:
        return _from_demo(demo)
    if speed is None:
        return None
    return Headline(f"With {method}: {_gains_and_costs([], [], speed)}", _speed_tiles(speed))


def _from_eval(full: MethodRow, row: MethodRow, speed: Speed | None) -> Headline:
    keeping = (
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
    return Headline(f"With {row.method}{keeping}: {words}", tiles + (_speed_tiles(speed) if speed else ()))


def _from_demo(demo: DemoFile) -> Headline:
    (full, ours), asked = demo.both, len(demo.questions)
    smaller = full.kv_bytes / ours.kv_bytes
    speed, images = _demo_ratios(demo), f"{demo.images} image{'s' * (demo.images != 1)}"
    sentence = (
        f"On one prompt of {images} the KV cache is {smaller:.1f}x smaller and "
        f"{sum(ours.right)} of {asked} answers are right, against {sum(full.right)} with the full cache, at "
        f"{speed.decode:.2f}x the decode speed and {speed.ttft:.2f}x the time to the first token. "
        f"`heads` keeps {100 * demo.heads.kv_bytes / full.kv_bytes:.0f}% of the bytes and decodes at "
        f"{demo.heads.speed_ratio:.2f}x."
    )
    tiles = (
        Tile(f"{smaller:.1f}x", "smaller KV cache", "one prompt"),
        Tile(f"{sum(ours.right)} / {asked}", "right answers", f"{sum(full.right)} with the full cache"),
    )
    return Headline(sentence, tiles + _speed_tiles(speed))


def _bench_ratios(bench: BenchFile, method: str, row: MethodRow | None) -> Speed | None:
    """Medians over what both the full cache and the row, or the method's nearest budget, were run on."""
    full = _by_prompt(r for r in bench.rows if r.method == FULL)
    name = None if row is None else row.name
    rows = [r for r in bench.rows if r.label == name]
    if not rows:
        rows = [r for r in bench.rows if r.method == method and r.decode != "latent"]
        if row is not None and row.retained is not None and rows:
            wanted = row.retained
            name = min(rows, key=lambda r: abs((r.retained or 1.0) - wanted)).label
            rows = [r for r in rows if r.label == name]
    pairs = [(own, full[key]) for key, own in _by_prompt(rows).items() if key in full]
    if not pairs:
        return None
    decode = median(_fastest(own) / _fastest(base) for own, base in pairs)
    other = name if row is not None and name != row.name else ""
    return Speed(decode, median(own[0].ttft_s / base[0].ttft_s for own, base in pairs), other or "")


def _fastest(rows: Iterable[BenchRow]) -> float:
    return max(row.tokens_per_s for row in rows)


def _by_prompt(rows: Iterable[BenchRow]) -> dict[tuple[int, int, int], list[BenchRow]]:
    """Rows of the same batch and images: eager steps before compiled ones."""
    found: dict[tuple[int, int, int], list[BenchRow]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.compiled):
        found[row.batch, row.images, row.prompt_tokens].append(row)
    return found


def _demo_ratios(demo: DemoFile) -> Speed:
    _, ours = demo.both
    return Speed(ours.speed_ratio, ours.ttft_ratio, "the demo")


def _gains_and_costs(gains: list[str], costs: list[str], speed: Speed | None) -> str:
    """The end of the sentence: what there is on each side, speed and time to first token included."""
    if speed is not None:
        (gains if speed.decode > 1 else costs).append(f"{speed.decode:.2f}x the decode speed")
        (gains if speed.ttft < 1 else costs).append(f"{speed.ttft:.2f}x the time to the first token")
    gained = f"you gain {_listed(gains)}" if gains else "nothing is gained"
    sentence = f"{gained}; it costs {_listed(costs)}" if costs else gained
    return f"{sentence} (speed and time of {speed.of})." if speed and speed.of else f"{sentence}."


def _listed(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def signed(points: float) -> str:
    """Points with their sign, as people write it."""
    return "0.0" if round(points, 1) == 0 else f"{points:+.1f}".replace("-", "\N{MINUS SIGN}")


def _speed_tiles(speed: Speed) -> tuple[Tile, ...]:
    of = f"; of {speed.of}" if speed.of else ""
    return (
        Tile(f"{speed.decode:.2f}x", "decode speed", f"tokens per second against the full cache{of}"),
        Tile(f"{speed.ttft:.2f}x", "time to first token", f"against the full cache; below 1 is faster{of}"),
    )
