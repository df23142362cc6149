"""`capsight examples`: pictures of the reference task and questions, to try other commands on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from capsight.cli.output import console
from capsight.cli.target import check_folder
from capsight.errors import OptionError
from capsight.reference import split_prompt

QUESTIONS = "questions.jsonl"


def examples(
    out: Annotated[Path, typer.Argument(help="Folder to write to.")] = Path("examples"),
    images: Annotated[int, typer.Option(help="Pictures to draw.")] = 4,
) -> None:
    """Write pictures that the reference VLM can read, 1.png and on, and questions.jsonl about them."""
    if images < 1:
        raise OptionError(f"images is {images}; it must be at least 1")
    names = [f"{number}.png" for number in range(1, images + 1)]
    check_folder(out, *names, QUESTIONS)
    out.mkdir(parents=True, exist_ok=True)
    prompt = split_prompt("test", 0, images)
    for name, scene in zip(names, prompt.scenes, strict=True):
        scene.image.save(out / name)
    rows = [
        {"images": names, "question": q.text, "answer": q.answer, "task": q.task} for q in prompt.questions
    ]
    (out / QUESTIONS).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    console().print(f"{images} pictures and {len(rows)} questions -> {out}", soft_wrap=True)
    console().print(f'ask one: capsight generate --prompt "{prompt.questions[0].text}"', *(
        f"--image {out / name}" for name in names
    ), soft_wrap=True)  # fmt: skip
