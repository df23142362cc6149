"""The JSON that `capsight eval`, `bench` and `demo` write, and reconstruction errors: read and checked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field

from capsight.errors import CapsuleFileError
from capsight.evaluation import FULL, split_label
from capsight.evaluation.bench_row import BenchRow, Count, Positive, Size
from capsight.files import checked

T = TypeVar("T")


@dataclass(frozen=True)
class Cell:
    """Exact match of some questions.

    Attributes:
        questions: how many; none have no accuracy.
        exact_match: in percent.
        interval: its 95 % interval, low and high.
    """

    questions: Size
    exact_match: float
    interval: tuple[float, float]

    def __post_init__(self) -> None:
        """Check that the interval is one."""
        if self.interval[0] > self.interval[1]:
            raise ValueError(f"the interval is {self.interval}, expected two ascending numbers")


@dataclass(frozen=True)
class MethodRow(Cell):
    """One method at one retained fraction, over all questions.

    Attributes:
        drop: points below the full cache.
        p_value: of the paired test against the full cache.
        agreement: percent of answers equal to those of the full cache.
        kl: mean KL divergence of the first answer token, in nats.
        kv_bytes: of keys and values or what stands for them, summed over the prompts.
        kv_bytes_full: the same of the full cache.
        module_bytes: of the modules, once.
        state_bytes: of states beside keys and values, summed over the prompts.
        by: "images" and "task" -> value -> exact match.
        name: its key in the file, such as "heads 0.4".
    """

    drop: float
    p_value: float
    agreement: float
    kl: float
    kv_bytes: Count
    kv_bytes_full: Size
    module_bytes: Count
    by: dict[str, dict[str, Cell]]
    state_bytes: Count = 0
    name: str = ""

    @property
    def method(self) -> str:
        """The name without the retained fraction."""
        return split_label(self.name)[0]

    @property
    def retained(self) -> float | None:
        """The fraction; None where the name has none, as "full"."""
        return split_label(self.name)[1]

    @property
    def share(self) -> float:
        """KV bytes as a fraction of the full cache's."""
        return self.kv_bytes / self.kv_bytes_full


@dataclass(frozen=True)
class EvalFile:
    """One evaluation.

    Attributes:
        model: what was evaluated.
        protocol: "after" or "within".
        methods: name -> row, the full cache among them.
        machine: what it ran on.
    """

    model: str
    protocol: str
    methods: dict[str, MethodRow]
    machine: dict[str, Any]

    def __post_init__(self) -> None:
        """Check that there is something to compare with."""
        if FULL not in self.methods:
            raise ValueError(f"there is no method {FULL!r} to compare with")

    @cached_property
    def rows(self) -> tuple[MethodRow, ...]:
        """The methods with their names, the full cache first, then as in the file."""
        names = sorted(self.methods, key=lambda name: name != FULL)
        return tuple(replace(self.methods[name], name=name) for name in names)

    @property
    def full(self) -> MethodRow:
        """The full cache."""
        return self.rows[0]


@dataclass(frozen=True)
class BenchFile:
    """One benchmark run.

    Attributes:
        rows: of one method, batch size and prompt each, in the order of the file.
        machine: what it ran on.
    """

    rows: Annotated[tuple[BenchRow, ...], Field(min_length=1)]
    machine: dict[str, Any]

    def names(self) -> list[str]:
        """The methods, the full cache first."""
        rows = sorted(self.rows, key=lambda row: row.method != FULL)
        return [*dict.fromkeys(row.name for row in rows)]


@dataclass(frozen=True)
class DemoSpeed:
    """Decode speed, and how many times that of the full cache where it is fastest, in the same rounds."""

    tokens_per_s: Positive
    speed_ratio: Positive


@dataclass(frozen=True)
class DemoSide(DemoSpeed):
    """One side of the comparison; its speed is that of the steps that take less time.

    Attributes:
        answers: in the order of the questions.
        right: whether each is right.
        kv_bytes: of the KV cache after the images.
        module_bytes: of the modules.
        ttft_s: seconds to the first token, with eager steps.
        ttft_ratio: to that of the full cache in the same rounds.
        steps: decode speed by how steps ran: "eager" or "compiled".
        name: its key in the file, such as "full cache".
    """

    answers: tuple[str, ...]
    right: tuple[bool, ...]
    kv_bytes: Size
    module_bytes: Count
    ttft_s: Positive
    ttft_ratio: Positive
    steps: Annotated[dict[str, DemoSpeed], Field(min_length=1)]
    name: str = ""


@dataclass(frozen=True)
class Asked:
    """A question and its right answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class DemoFile:
    """One demonstration.

    Attributes:
        images: how many the prompt has.
        questions: what was asked.
        sides: name -> side: the full cache, then capsules.
        heads: capsules that decode fast, under their own name.
        machine: what it ran on.
    """

    images: Count
    questions: tuple[Asked, ...]
    sides: Annotated[dict[str, DemoSide], Field(min_length=2, max_length=2)]
    heads: DemoSide
    machine: dict[str, Any]

    def __post_init__(self) -> None:
        """Check that everything was answered."""
        count = len(self.questions)
        for name, side in {**self.sides, "heads": self.heads}.items():
            if not len(side.answers) == len(side.right) == count:
                raise ValueError(f"side {name!r} does not have an answer for each of the {count} questions")

    @cached_property
    def both(self) -> tuple[DemoSide, DemoSide]:
        """The sides with their names: the full cache, then capsules."""
        full, ours = (replace(side, name=name) for name, side in self.sides.items())
        return full, ours


@dataclass(frozen=True)
class LayerError:
    """Relative errors of a layer's rebuilt keys and values.

    The norm of the difference over the norm of the original, on images not used for fitting: 0 is perfect,
    1 is as bad as zeros.
    """

    index: Count
    keys: float
    values: float


@dataclass(frozen=True)
class LayerErrors:
    """Reconstruction errors of the layers."""

    layers: Annotated[tuple[LayerError, ...], Field(min_length=1)]


_WRITERS: dict[type, str] = {
    EvalFile: "capsight eval --json",
    BenchFile: "capsight bench --json",
    DemoFile: "capsight demo --json",
    LayerErrors: "capsight report --help",
}


def read(kind: type[T], path: Path) -> T:
    """Read a file.

    Args:
        kind: `EvalFile`, `BenchFile`, `DemoFile` or `LayerErrors`.
        path: of the JSON.

    Raises:
        CapsuleFileError: it cannot be read, or is not what the command writes; the message says where.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CapsuleFileError(f"cannot read {path}: {error.strerror or error}") from error
    return checked(kind, text, path, f"write it again with `{_WRITERS[kind]}`", extra=True)
