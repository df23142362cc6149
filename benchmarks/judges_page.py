"""The page on judges: every method on every judge, with the kind of question that it loses most on."""

from __future__ import annotations

from typing import Any

INTRO = """# Other judges

Small VLMs of other classes, shapes and picture styles than the reference VLM, trained by `tools/judging`.
Nothing was chosen on their test split, and their questions ask about all that a picture holds: what is
usual, what is absent, counts, places, numbers, long descriptions. Protocol
[`after`](../evaluation.md#protocols); p by McNemar's test. Codecs of blocks leave a picture's tail exact.

`python benchmarks/judges.py {arguments} --json benchmarks/results/judges.json`, then
`python benchmarks/write_pages.py`. Bytes are those of all tokens, text and positions included, modules not.
"""


def page(report: dict[str, Any]) -> str:
    """Markdown of `benchmarks/results/judges.json`."""
    judges = report["judges"]
    arguments = " ".join(
        [
            *(f"--judge {name}" for name in judges),
            f"--prompts {report['prompts']} --split {report['split']} --block-size {report['block_size']}",
            "--method ... --retained 0.4,0.2,0.1,0.05",
        ]
    )
    parts = [INTRO.format(arguments=arguments)]
    for name, found in judges.items():
        full = found["full"]
        rows = [
            f"## {name}\n",
            f"{full['questions']} questions; full cache {full['exact_match']:.1f} %.\n",
            "| method | exact match % | points lost | p | loses most on | KV bytes |",
            "| --- | --: | --: | --: | --- | --: |",
        ]
        rows += [_row(label, own, full) for label, own in found.items() if label != "full"]
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def _row(label: str, own: dict[str, Any], full: dict[str, Any]) -> str:
    tasks = {
        kind: full["by"]["task"][kind]["exact_match"] - right["exact_match"]
        for kind, right in own["by"]["task"].items()
    }
    worst = max(tasks, key=lambda kind: tasks[kind])
    share = own["kv_bytes"] / own["kv_bytes_full"]
    return (
        f"| `{label}` | {own['exact_match']:.1f} | {own['drop']:.1f} | {own['p_value']:.3f} | "
        f"{worst}, {tasks[worst]:.1f} | {share:.2f}x |"
    )
