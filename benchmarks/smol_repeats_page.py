"""The part of capsight-smol's page about `smol-repeats`, the judge whose images look at each other."""

from __future__ import annotations

from typing import Any

from head_maps_page import maps
from page_parts import machine, table
from smol_page import percent, some

Report = dict[str, Any]
COMMAND = (
    "python benchmarks/head_map_curve.py --judge smol-repeats --dtype bfloat16 --criteria output --voting 1 "
    "--held 1 --images 4 --samples 16 --shares 0.75 --tolerances 0.01 --json "
    "benchmarks/results/smol_repeats_head_maps.json"
)


def repeats(card: Report, curve: Report | None) -> list[str]:
    """What it is, how often it is right with images apart, its training, its head maps."""
    lines = [
        "## A judge of head maps: `smol-repeats`\n",
        "The same model with other low-rank additions (`tools/judging/weights/smol/REPEATS.md`). It is asked "
        "one thing: What is shown twice? Nothing says where to look; every image has to be held against "
        "every earlier one, which only its own tokens do while it is read. In training a probe, thrown away, "
        "asked image tokens for it, at first alone, and the text between the images saw none of them, "
        "later in half of the steps; when it is asked, all is seen. "
        f"{card['test prompts of each']} test prompts of each number of images, % right (of so many); "
        "*apart*: no image token sees another image:\n",
        *apart(card),
        "",
        "Over training, % of training questions right since the line before; *probe*: of image tokens, "
        "whether they know that their picture is a repeat, or new:\n",
        *trained(card["curve"]),
    ]
    return lines if curve is None else [*lines, "", *tested(curve)]


def apart(card: Report) -> list[str]:
    """Right answers by kind, with everything seen and with images apart."""
    seen, cut = (card[f"{name}, by images and kind"] for name in ("right", "right, images apart"))
    kinds = list(dict.fromkeys(kind for part in seen.values() for kind in part))
    rows = [
        [f"{n} images{more}", *(percent(part[n].get(kind)) for kind in kinds)]
        for n in seen
        for more, part in (("", seen), (", apart", cut))
    ]
    return table(["", *kinds], rows)


def trained(lines: list[Report]) -> list[str]:
    """The curve of training."""
    kinds = list(dict.fromkeys(k for line in reversed(lines) for k in line["train"]))
    rows = [
        [str(line["step"]), str(line["tokens"]),
         *(f"{100 * line['train'][k]:.0f}" if k in line["train"] else "" for k in kinds)]
        for line in some(lines)
    ]  # fmt: skip
    return table(["step", "tokens", *kinds], rows)


def tested(curve: Report) -> list[str]:
    """Its head maps, beside the controls."""
    prompts, rows = curve["prompts"], curve["rows"]
    worst = max((row for row in rows if row["group"] == "control"), key=lambda row: row["drop"])
    low, high = worst["drop_interval"]
    equal = [row for row in rows if row["group"] == "equal FLOPs"]
    chosen = next(row for row in equal if not row["name"].startswith("random"))
    drawn = [row["drop"] for row in equal if row["name"].startswith("random")]
    return [
        "### Its head maps\n",
        f"{prompts['voting']} calibration prompts vote, {prompts['held_out']} others measure the drop, "
        f"{prompts['test, each image count']} test prompts of each image count are asked. "
        f"{machine(curve['machine'])} `{COMMAND}` measures it.\n",
        f"The worst control, {worst['name']}, costs {worst['drop']:.1f} points (95 % interval "
        f"{low:.1f} to {high:.1f}); at equal FLOPs the calibrated map costs {chosen['drop']:.1f}, random "
        f"ones {min(drawn):.1f} to {max(drawn):.1f}. A tolerance is only as good as the held-out prompts, "
        "here one question each: too few to find the largest alpha.\n",
        *maps(rows),
    ]
