"""What `capsight demo --json` writes, read and checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capsight.report.fields import Fields

_WRITER = "capsight demo --json"


@dataclass(frozen=True, slots=True)
class DemoSide:
    """One side of the comparison.

    Attributes:
        name: such as "full cache".
        answers: in the order of the questions.
        right: whether each is right.
        kv_bytes: of the KV cache after the images.
        module_bytes: of the modules.
        ttft_s: seconds to the first token.
        tokens_per_s: decode speed.
        latent: bytes of the KV cache, seconds to the first token and tokens per second of latent decoding,
            where it was timed besides.
    """

    name: str
    answers: tuple[str, ...]
    right: tuple[bool, ...]
    kv_bytes: int
    module_bytes: int
    ttft_s: float
    tokens_per_s: float
    latent: tuple[int, float, float] | None = None


@dataclass(frozen=True, slots=True)
class DemoFile:
    """One demonstration.

    Attributes:
        images: how many the prompt has.
        questions: (question, right answer) pairs.
        full: the full cache.
        ours: with capsules.
        machine: what it ran on.
    """

    images: int
    questions: tuple[tuple[str, str], ...]
    full: DemoSide
    ours: DemoSide
    machine: dict[str, Any]


def read_demo(path: Path) -> DemoFile:
    """Read a file.

    Raises:
        CapsuleFileError: it cannot be read, or is not what `capsight demo --json` writes.
    """
    fields = Fields.read(path, _WRITER)
    questions = tuple((row.text("question"), row.text("answer")) for row in fields.rows("questions"))
    sides = [_side(name, side, len(questions)) for name, side in fields.named("sides")]
    if len(sides) != 2:
        fields.fail(f"there are {len(sides)} sides, expected the full cache and capsules")
    full, ours = sides
    return DemoFile(fields.count("images"), questions, full, ours, fields.object("machine").raw())


def _side(name: str, side: Fields, questions: int) -> DemoSide:
    answers, right = side.items("answers", str), side.items("right", bool)
    if not len(answers) == len(right) == questions:
        side.fail(f"side {name!r} does not have an answer for each of the {questions} questions")
    return DemoSide(
        name,
        tuple(answers),
        tuple(right),
        int(side.positive("kv_bytes")),
        side.count("module_bytes"),
        side.positive("ttft_s"),
        side.positive("tokens_per_s"),
        _latent(side.object("latent")) if side.has("latent") else None,
    )


def _latent(fields: Fields) -> tuple[int, float, float]:
    return (
        int(fields.positive("kv_bytes")),
        fields.positive("ttft_s"),
        fields.positive("tokens_per_s"),
    )
