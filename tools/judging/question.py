"""A question, its answer, and where heads may look for the parts of the answer while they learn."""

from dataclasses import dataclass

from judging.world import COLUMNS, Cell, World

#: (picture, cell number) of a prompt; cell -1 stands for the prompt's first token.
Place = tuple[int, int]
START: Place = (0, -1)
#: How many times what is counted a counting head looks at the first token.
REST = 4


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer, and where two attention heads may look for it while they learn."""

    text: str
    look: tuple[Place, ...]
    other: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its answer, and the kind it belongs to (called task as in the reference task)."""

    task: str
    text: str
    answer: str
    pieces: tuple[Piece, ...] = ()


def piece(text: str, look: list[Place], other: list[Place] | None = None) -> Piece:
    """A part of an answer; the second head looks where the first does unless `other` says where."""
    return Piece(text, tuple(look), tuple(look if other is None else other))


def question(task: str, text: str, *pieces: Piece) -> Question:
    """The question whose answer these parts make."""
    return Question(task, text, "".join(p.text for p in pieces), pieces)


def name_of(cell: Cell) -> str:
    """How a cell is called: its column's letter and its row from 1."""
    return f"{COLUMNS[cell[1]]}{cell[0] + 1}"


def places(k: int, world: World, cells: list[Cell]) -> list[Place]:
    """Places of cells of picture `k`."""
    return [(k, r * world.grid + c) for r, c in cells]
