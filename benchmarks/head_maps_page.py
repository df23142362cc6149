"""The page of head maps, from the JSON of `head_map_curve.py`, `sink_choice.py` and `ttft.py`."""

from __future__ import annotations

from typing import Any

from page_parts import GENERATED, machine, table

Report = dict[str, Any]


def page(curve: Report | None, sinks: Report | None, ttft: Report | None) -> str:
    """The whole page, of what there is."""
    lines = [GENERATED, "", "# Head maps", ""]
    if curve is not None:
        prompts = curve["prompts"]
        lines += [
            "## Attention FLOPs saved against accuracy lost",
            "",
            f"Reference VLM. {prompts['voting']} calibration prompts vote, {prompts['held_out']} others "
            f"measure the drop, {prompts['test, each image count']} test prompts of each image count are "
            "asked: three disjoint sets. *saved* is the share of the attention FLOPs of the prefill of the "
            "images. *equal FLOPs*: maps of one cost, by criterion, beside random maps of the same "
            "categories. *tolerance*: the largest alpha with which at most so many held-out answers change. "
            "*recovery*: a given alpha, heads returned to Dense. "
            f"{machine(curve['machine'])} `python benchmarks/head_map_curve.py` measures it.",
            "",
            *maps(curve["rows"]),
            "",
        ]
    if sinks is not None:
        lines += [
            "## What a sink is, and what a Sink head sees",
            "",
            "All heads of one category, so that only the option differs; "
            f"{sinks['prompts, each image count']} test prompts of each image count. "
            f"{machine(sinks['machine'])} `python benchmarks/sink_choice.py` measures it.",
            "",
            *maps(sinks["rows"]),
            "",
        ]
    if ttft is not None:
        lines += [
            "## Time to the first token of whole models",
            "",
            "Vision tower, language model and all, with and without a head map, in one run, taking turns; "
            f"medians. {machine(ttft['machine'])} `python benchmarks/ttft.py` measures it.",
            "",
            *_first_tokens(ttft["models"]),
            "",
        ]
    return "\n".join(lines)


def maps(rows: list[Report]) -> list[str]:
    """A table of maps."""
    images = list(rows[0]["by_images"])
    heads = ["maps", "", *(f"saved at {n} images, %" for n in images), "right %", "points lost", "same %"]
    return table(heads, [_map_cells(row, images) for row in rows], 2)


def _map_cells(row: Report, images: list[str]) -> list[str]:
    label = row["name"]
    if "share" in row:
        label += f", {row['share']:.0%} of the possible saving"
    if "tolerance" in row:
        label += f", tolerance {row['tolerance']:.0%}"
    return [
        row["group"],
        label,
        *(f"{100 * row['by_images'][n]['attention_saved']:.1f}" for n in images),
        f"{row['exact_match']:.1f}",
        _drop(row),
        f"{row['agreement']:.1f}",
    ]


def _drop(row: Report) -> str:
    """Points lost, with the interval where it was measured."""
    if "drop_interval" not in row or row["group"] == "dense":
        return f"{row['drop']:+.1f}"
    low, high = row["drop_interval"]
    return f"{row['drop']:+.1f} ({low:+.1f} to {high:+.1f})"


def _first_tokens(models: list[Report]) -> list[str]:
    heads = ["model", "variant", "tokens", "images", "first token", "faster", "attention saved", "of the LM"]
    rows = [
        [
            model["model"],
            row["variant"],
            str(model["tokens"]),
            str(model["images"]),
            f"{row['ttft_s'] * 1e3:.0f} ms",
            f"{row['speedup']:.2f}x",
            f"{row['attention_saved']:.0%}",
            f"{row['prefill_saved']:.0%}",
        ]
        for model in models
        for row in model["rows"]
    ]
    return table(heads, rows, 2)
