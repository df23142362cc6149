"""Dense supervision of a vision tower: what lies in the cell of every vision token."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from judging.world import COLORS, SHAPES, TEXTURES, TIMES, World

_IGNORE = -100
_SIZES = {
    "shape": len(SHAPES) + 2, "color": len(COLORS) + 1, "tens": 11, "ones": 11, "row": 16, "column": 16,
    "ground": len(COLORS), "texture": len(TEXTURES), "time": len(TIMES),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Labels:
    """Labels [vision tokens of all pictures] by name; -100 where nothing is asked."""

    by_name: dict[str, Tensor]


def labels_of(worlds: list[World], side: int = 1) -> Labels:
    """Labels of all vision tokens (`side` x `side` a cell), picture by picture.

    Ground and texture are asked where they are seen alone, digits where they lie.
    """
    columns: dict[str, list[int]] = {name: [] for name in _SIZES}
    for w in worlds:
        ground, texture, time = COLORS.index(w.ground), TEXTURES.index(w.texture), TIMES.index(w.time)
        for y in range(w.grid * side):
            for x in range(w.grid * side):
                r, c = y // side, x // side
                left, right = 2 * (x % side) < side, 2 * (x % side) >= side - 1
                thing = w.things.get((r, c))
                digits = thing.number if thing else ""
                shape = 0 if thing is None else 1 if digits else 2 + SHAPES.index(thing.shape)
                columns["shape"].append(shape)
                columns["color"].append(0 if thing is None else 1 + COLORS.index(thing.color))
                columns["tens"].append(1 + int(digits[0]) if digits and left else 0)
                columns["ones"].append(1 + int(digits[1]) if digits and right else 0)
                columns["row"].append(r)
                columns["column"].append(c)
                columns["ground"].append(_IGNORE if thing else ground)
                columns["texture"].append(_IGNORE if thing else texture)
                columns["time"].append(_IGNORE if thing else time)
    return Labels({name: torch.tensor(column) for name, column in columns.items()})


class Heads(nn.Module):
    """Throw-away linear heads over vision tokens [n, width]."""

    def __init__(self, width: int) -> None:
        """Make a head for each label."""
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in _SIZES.items()})

    def forward(self, features: Tensor, labels: Labels) -> tuple[Tensor, dict[str, float]]:
        """The summed loss, and the accuracy by label (for what lies in a cell: where something does)."""
        loss, right = features.new_zeros((), dtype=torch.float32), {}
        for name, head in self.heads.items():
            target = labels.by_name[name]
            logits = head(features).float()
            weight = torch.ones(logits.shape[-1])
            if name in ("tens", "ones"):
                weight[0] = 0.1
            loss = loss + nn.functional.cross_entropy(logits, target, weight, ignore_index=_IGNORE)
            asked = target > 0 if name in ("shape", "color", "tens", "ones") else target >= 0
            right[name] = (logits.argmax(-1)[asked] == target[asked]).float().mean().item()
        return loss, right
