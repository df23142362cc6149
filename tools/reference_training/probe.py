"""What the token that closes an image should know: the image's kind, and how many marks it has.

Throw-away heads like those of the vision tower (`dense`). Questions over several images compare these tokens,
and answers alone taught them slowly what to hold ready.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from capsight.reference.drawing.scene import KINDS, Scene

#: The layer whose output is read.
LAYER = 2
_MOST_MARKS = 24


@dataclass(frozen=True, slots=True)
class Ends:
    """The closing tokens of a batch's images: row, position, kind and number of marks, each [n]."""

    row: Tensor
    position: Tensor
    kind: Tensor
    marks: Tensor

    @classmethod
    def of(cls, found: list[tuple[int, int, Scene]]) -> "Ends":
        """Describe images, each with the row and the position of its closing token."""
        rows = [(b, at, KINDS.index(s.kind), min(len(s.marks), _MOST_MARKS)) for b, at, s in found]
        return cls(*(torch.tensor(column) for column in zip(*rows, strict=True)))

    def to(self, device: torch.device) -> "Ends":
        """The same on a device."""
        return Ends(*(getattr(self, name).to(device) for name in self.__slots__))


class Probe(nn.Module):
    """Linear heads over the closing tokens' hidden states [n, width]."""

    def __init__(self, language_model: PreTrainedModel) -> None:
        """Listen to the output of layer `LAYER`."""
        super().__init__()
        width: int = language_model.config.hidden_size
        self.norm = nn.LayerNorm(width)
        self.kind = nn.Linear(width, len(KINDS))
        self.marks = nn.Linear(width, _MOST_MARKS + 1)
        self.heard: Tensor | None = None
        layers = language_model.layers
        assert isinstance(layers, nn.ModuleList)
        layers[LAYER].register_forward_hook(self._hear)

    def _hear(self, module: nn.Module, args: object, output: Tensor) -> None:
        self.heard = output

    def forward(self, ends: Ends) -> tuple[Tensor, dict[str, float]]:
        """Return the summed loss and the accuracies on the last batch."""
        assert self.heard is not None
        hidden = self.norm(self.heard[ends.row, ends.position])
        self.heard = None
        kind, marks = self.kind(hidden), self.marks(hidden)
        loss = nn.functional.cross_entropy(kind, ends.kind) + nn.functional.cross_entropy(marks, ends.marks)
        return loss, {
            "kinds": (kind.argmax(-1) == ends.kind).float().mean().item(),
            "counts": (marks.argmax(-1) == ends.marks).float().mean().item(),
        }
