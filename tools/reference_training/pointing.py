"""The pointing lesson: some attention heads are told, while they learn, where to look.

Trained from answers alone, a language model of this size stayed at chance for hours on everything that is
found by a word of the question (docs/reference-vlm.md). So each entry of `SLOTS` names heads and what they
should look at; the loss is the cross entropy between their attention and a uniform distribution over these
tokens. The trained model has an ordinary attention; nothing of the lesson is left in it but the weights.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from capsight.reference.drawing.figures import SHAPES
from capsight.reference.drawing.palette import COLORS, ITEMS, LABELS
from capsight.reference.drawing.scene import KINDS
from capsight.reference.prompts import Prompt
from capsight.reference.questions import PLURAL
from reference_training.evidence import END, NUMBER, START, Place, bindings, content_cells, evidence

#: name: (layer, query head) pairs that learn the same thing.
SLOTS: dict[str, tuple[tuple[int, int], ...]] = {
    "number": ((0, 0),),  # what lies on an image -> the number of the image
    "label": ((1, 0),),  # a value -> what it is about (the row, in a table)
    "column": ((1, 2),),  # the same (the column, in a table)
    "subject": ((1, 4),),  # an answer -> the words of its question that say what
    "first": ((1, 6),),  # an answer -> the image number in its question
    "second": ((2, 2),),  # the same; the second number when there are two
    "page": ((2, 0),),  # the end of an image -> what lies on it
    "text": ((3, 0), (5, 0), (3, 2), (5, 2)),  # an answer -> the text that is the answer
    "marks": ((3, 4), (5, 4)),  # an answer -> the shapes that are asked for
    "extreme": ((3, 3), (5, 3)),  # an answer -> the largest or smallest value
    "find": ((3, 1), (5, 1)),  # an answer -> what was to be found on some image
    "ends": ((3, 6), (5, 6)),  # an answer -> the ends of the images that are asked about
    "others": ((3, 7), (5, 7)),  # the same; the second image when two are compared, those that are counted
    "odd": ((5, 7),),  # the same; the one that is unlike the rest, which layer 3 cannot know yet
}

_SUBJECT = re.compile(
    r"\b(" + "|".join(
        sorted(
            {*LABELS, *ITEMS, *COLORS, *SHAPES, *KINDS, *PLURAL.values(), "code", "small", "plate", "total",
             "most", "highest", "lowest", "color", "order", "odd", "same", "shapes", "larger", "more"},
            key=len, reverse=True,
        )
    ) + r")\b|(?<=row )\w|(?<=column )\d"
)  # fmt: skip
_NUMBER = re.compile(r"(?<=[Ii]mage )\d|(?<=images )\d|(?<=and )\d")

#: The slots of the answers to a task; those of all other tasks are texts on one image.
_ANSWERS: dict[str, tuple[str, str]] = {
    "shape_color": ("marks", "marks"),
    "count_shapes": ("marks", "ends"),
    "priciest": ("extreme", "extreme"),
    "bar_extreme": ("extreme", "extreme"),
    "find": ("find", "find"),
    "odd_one_out": ("ends", "odd"),
} | dict.fromkeys(("count_images", "same_kind", "order", "compare"), ("ends", "others"))

_IMPLEMENTATION = "capsight_pointing"


@dataclass(frozen=True, slots=True)
class RowMap:
    """Where things lie in one row of a batch.

    Attributes:
        images: (position of the number token, of the first image token, of the end token) of each image.
        questions: (positions and texts of the question's tokens, the same of the answer's) of each question.
    """

    images: list[tuple[int, int, int]]
    questions: list[tuple[list[tuple[int, str]], list[tuple[int, str]]]]

    def position(self, place: Place) -> int:
        """The position of a place in the row."""
        if place == START:
            return 0
        number, first, end = self.images[place[0]]
        return number if place[1] == NUMBER else end if place[1] == END else first + place[1]


@dataclass(frozen=True, slots=True)
class Targets:
    """What one slot should look at: ``queries`` [B, M] positions, and the entries ``[n]`` of its target.

    Entry e says that query ``query[e]`` of row ``row[e]`` should give ``weight[e]`` of its attention to
    position ``key[e]``; the weights of a query add up to one.
    """

    queries: Tensor
    row: Tensor
    query: Tensor
    key: Tensor
    weight: Tensor

    def to(self, device: torch.device) -> "Targets":
        """The same on a device."""
        return Targets(*(getattr(self, name).to(device) for name in self.__slots__))


def _spans(tokens: list[tuple[int, str]], pattern: re.Pattern[str]) -> list[list[int]]:
    """The positions of the tokens that each match of a pattern touches."""
    text = "".join(t for _, t in tokens)
    found = []
    for match in pattern.finditer(text):
        at, touched = 0, []
        for position, token in tokens:
            if at < match.end() and match.start() < at + len(token):
                touched.append(position)
            at += len(token)
        found.append(touched)
    return found


def _looks(prompt: Prompt, row: RowMap) -> dict[str, list[tuple[int, list[int]]]]:
    """(query position, positions to look at) of one row, for each slot."""
    looks: dict[str, list[tuple[int, list[int]]]] = {name: [] for name in SLOTS}
    for index, scene in enumerate(prompt.scenes):
        number, first, end = row.images[index]
        cells = [first + c for c in content_cells(scene)]
        looks["number"] += [(p, [number]) for p in (*cells, end)]
        looks["page"].append((end, [number, *cells]))
        for cell, rows, columns in bindings(scene):
            looks["label"].append((first + cell, [first + c for c in rows]))
            looks["column"].append((first + cell, [first + c for c in columns]))
    for question, (asked, answer) in zip(prompt.questions, row.questions, strict=True):
        numbers, subject = _spans(asked, _NUMBER), [p for span in _spans(asked, _SUBJECT) for p in span]
        seen = evidence(prompt, question)
        at = 0
        for position, token in answer:
            query = position - 1
            if numbers:
                looks["first"].append((query, numbers[0]))
                looks["second"].append((query, numbers[-1]))
            if subject:
                looks["subject"].append((query, subject))
            one, two = seen[min(at, len(seen) - 1)]
            slot, other = _ANSWERS.get(question.task, ("text", "text"))
            looks[slot].append((query, [row.position(p) for p in one]))
            if other != slot:
                looks[other].append((query, [row.position(p) for p in two]))
            at += len(token)
    return looks


def targets(prompts: list[Prompt], rows: list[RowMap]) -> dict[str, Targets]:
    """What every slot should look at in a batch."""
    made: dict[str, Targets] = {}
    by_row = [_looks(p, r) for p, r in zip(prompts, rows, strict=True)]
    for name in SLOTS:
        most = max(len(looks[name]) for looks in by_row)
        if most == 0:
            continue
        queries = torch.zeros(len(rows), most, dtype=torch.long)
        entries: list[tuple[int, int, int, float]] = []
        for b, looks in enumerate(by_row):
            for m, (query, keys) in enumerate(looks[name]):
                queries[b, m] = query
                entries += [(b, m, key, keys.count(key) / len(keys)) for key in set(keys)]
        made[name] = Targets(queries, *(torch.tensor(column) for column in zip(*entries, strict=True)))
    return made


class Pointing:
    """Runs a language model's attention as ever and, on the way, measures where the slots' heads look."""

    def __init__(self, language_model: PreTrainedModel) -> None:
        """Give the model an attention implementation that calls back here."""
        AttentionInterface.register(_IMPLEMENTATION, self._attention)
        AttentionMaskInterface.register(_IMPLEMENTATION, sdpa_mask)
        language_model.set_attn_implementation(_IMPLEMENTATION)
        self.targets: dict[str, Targets] = {}
        self.losses: dict[str, list[Tensor]] = {}

    def begin(self, targets: dict[str, Targets]) -> None:
        """Forget the last batch; measure against these targets."""
        self.targets, self.losses = targets, {}

    def loss(self) -> tuple[Tensor | float, dict[str, float]]:
        """The summed loss of the last batch, and each slot's attention on its target (geometric mean)."""
        total = sum((one for many in self.losses.values() for one in many), start=0.0)
        return total, {
            name: float(torch.exp(-torch.stack(many).detach().mean())) for name, many in self.losses.items()
        }

    def _attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        layer: int = module.layer_idx  # type: ignore[assignment]
        for name, target in self.targets.items():
            for slot_layer, head in SLOTS[name]:
                if slot_layer == layer:
                    self.losses.setdefault(name, []).append(
                        _pointing_loss(
                            query[:, head],
                            key[:, head * key.shape[1] // query.shape[1]],
                            target,
                            kwargs["scaling"],
                        )
                    )
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _pointing_loss(query: Tensor, key: Tensor, target: Targets, scaling: float) -> Tensor:
    """Cross entropy of one head's causal attention; query, key [B, S, D]."""
    chosen = query.gather(1, target.queries.unsqueeze(-1).expand(-1, -1, query.shape[-1]))  # [B, M, D]
    scores = (chosen @ key.mT).float() * scaling  # [B, M, S]
    future = torch.arange(key.shape[1], device=key.device) > target.queries.unsqueeze(-1)
    chances = scores.masked_fill(future, -torch.inf).log_softmax(-1)
    picked = chances[target.row, target.query, target.key]
    return -(picked * target.weight).sum() / target.weight.sum()
