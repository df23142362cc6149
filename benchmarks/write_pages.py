"""Writes what is generated from the JSON files under benchmarks/results: README numbers and the pages.

    python benchmarks/write_pages.py

A file that has not been made leaves its part out.
"""

from __future__ import annotations

from pathlib import Path

import ablations_page
import accuracy_page
import decode_page
import head_maps_page
import judges_page
import judges_sections
import readme_numbers
import readme_picture
import smol_page
import smol_repeats_page
import speed_page
from judges_record import Record
from readme_numbers import load

ROOT = Path(__file__).resolve().parents[1]

BITS = (
    "Capsules in the numbers of the cache, in 8 bits and in 4. The model and its cache are in bfloat16, the "
    "full cache too: bytes are shares of 16-bit ones."
)

MORE_PROMPTS = (
    "The table of the [accuracy page](accuracy.md) again, five times as many prompts, those of that page "
    "among them."
)


def main(root: Path = ROOT) -> None:
    """Write README.md and docs/benchmarks/*.md below `root`."""
    results, pages = root / "benchmarks" / "results", root / "docs" / "benchmarks"
    pages.mkdir(parents=True, exist_ok=True)

    def write(name: str, text: str) -> None:
        (pages / f"{name}.md").write_text(text)

    if (accuracy := load(results, "accuracy.json")) is not None:
        write("accuracy", accuracy_page.page(accuracy))
    if (more := load(results, "accuracy_more.json")) is not None:
        write("accuracy-more", accuracy_page.page(more, "More prompts", MORE_PROMPTS, "make accuracy-more"))
    if (bits := load(results, "bits.json")) is not None:
        write("bits", accuracy_page.page(bits, "Stored bits", BITS))
    speed = [load(results, f"{name}.json") for name in ("bench", "prefill", "encode_cost", "peak_memory")]
    if any(report is not None for report in speed):
        write("speed", speed_page.page(*speed))
    decode = [
        load(results, f"decode_{name}.json")
        for name in ("attention", "model", "joint", "reference", "attention_amx", "reference_zen4")
    ]
    if any(report is not None for report in decode):
        write("decode", decode_page.page(*decode))
    maps = [load(results, f"{name}.json") for name in ("head_map_curve", "sink_choice", "ttft")]
    if any(report is not None for report in maps):
        write("head-maps", head_maps_page.page(*maps))
    if (ablations := load(results, "ablations.json")) is not None:
        write("ablations", ablations_page.page(ablations))
    record = Record(results / "judges")
    if judges := record.judges("test"):
        sections = (
            judges_sections.means(judges),
            judges_sections.pretrained(judges),
            judges_sections.smallest(record.judges("dev"), judges),
            judges_sections.left_out(load(results, "judges_choice.json")),
            judges_sections.variance(load(results, "variance.json")),
            judges_sections.long_answers(load(results, "long_answers.json")),
        )
        more = [line for lines in sections if lines for line in (*lines, "")]
        write("judges", judges_page.page(judges, more))
        (root / "docs" / "images").mkdir(exist_ok=True)
        readme_picture.draw(
            {name: judged.rows() for name, judged in judges.items()},
            root / "docs" / "images" / "accuracy.svg",
        )
    if (card := load(root / "tools" / "judging" / "weights" / "smol", "card.json")) is not None:
        measured = [load(results, f"smol_{name}.json") for name in ("head_maps", "attention", "latent")]
        text = smol_page.page(card, *measured)
        if (learnt := load(root / "tools" / "judging" / "weights" / "smol", "repeats.json")) is not None:
            curve = load(results, "smol_repeats_head_maps.json")
            text += "\n".join(["", *smol_repeats_page.repeats(learnt, curve), ""])
        write("smol", text)
    readme_numbers.main(root)


if __name__ == "__main__":
    main()
