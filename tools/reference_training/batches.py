"""Prompts as training tensors: right-padded, several question turns each, loss on the answers only."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from capsight.reference.prompts import Prompt
from reference_training.architecture import (
    ASSISTANT,
    END,
    IMAGE_PAD,
    MERGE,
    PAD,
    PATCH,
    TEMPORAL,
    USER,
    VISION_END,
    VISION_START,
)
from reference_training.pointing import RowMap, Targets, targets
from reference_training.probe import Ends

_IGNORE = -100

#: How much an answer counts in training, however long it is: more where learning lagged behind.
_TASK_WEIGHT = {
    "order": 3.0,
    "priciest": 3.0,
    "odd_one_out": 3.0,
    "compare": 4.0,
    "count_shapes": 4.0,
    "count_images": 5.0,
    "same_kind": 3.0,
    "find": 2.0,
}


@dataclass(frozen=True, slots=True)
class Batch:
    """One training batch.

    Attributes:
        input_ids: [B, S] int64, right-padded.
        position_ids: [3, B, S] int64, M-RoPE.
        labels: [B, S] int64, the next token where it belongs to an answer, else -100.
        weights: [B, S] float32, `_TASK_WEIGHT` over the number of tokens of the answer.
        targets: where the heads of `pointing.SLOTS` should look.
        ends: the closing tokens of the images.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    weights: Tensor
    targets: dict[str, Targets]
    ends: Ends

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return Batch(
            self.input_ids.to(device),
            self.position_ids.to(device),
            self.labels.to(device),
            self.weights.to(device),
            {name: one.to(device) for name, one in self.targets.items()},
            self.ends.to(device),
        )


def patches(images: list[Image.Image]) -> tuple[Tensor, Tensor]:
    """What the image processor makes of images whose sides are multiples of 28 px, without its overhead."""
    values, grids = [], []
    for image in images:
        pixels = torch.from_numpy(np.array(image)).float().div_(127.5).sub_(1)  # [height, width, 3]
        gh, gw = image.height // PATCH, image.width // PATCH
        cut = pixels.view(gh // MERGE, MERGE, PATCH, gw // MERGE, MERGE, PATCH, 3)
        cut = cut.permute(0, 3, 1, 4, 6, 2, 5).reshape(gh * gw, 3, 1, PATCH * PATCH)
        values.append(cut.expand(-1, -1, TEMPORAL, -1).reshape(gh * gw, -1))
        grids.append([1, gh, gw])
    return torch.cat(values), torch.tensor(grids)


class Batcher:
    """Turns prompts into batches with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Look up the special tokens once."""
        self._tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        self._special = {t: vocabulary[t] for t in (USER, ASSISTANT, END, PAD)}
        self._vision = {t: vocabulary[t] for t in (VISION_START, VISION_END, IMAGE_PAD)}
        self._memo: dict[str, list[int]] = {}
        self._texts: dict[int, str] = {}

    def _encode(self, text: str) -> list[int]:
        if text not in self._memo:
            self._memo[text] = self._tokenizer.encode(text, add_special_tokens=False)
        return self._memo[text]

    def _words(self, first: int, tokens: list[int]) -> list[tuple[int, str]]:
        for token in tokens:
            if token not in self._texts:
                self._texts[token] = str(self._tokenizer.decode([token]))
        return [(first + k, self._texts[token]) for k, token in enumerate(tokens)]

    def _row(self, prompt: Prompt) -> tuple[list[int], Tensor, list[int], RowMap]:
        ids, labels, positions, offset = (
            [self._special[USER]],
            [_IGNORE],
            [torch.zeros(3, 1, dtype=torch.long)],
            1,
        )
        row = RowMap([], [])

        def text(tokens: list[int], answer: bool) -> None:
            nonlocal offset
            ids.extend(tokens)
            labels.extend(tokens if answer else [_IGNORE] * len(tokens))
            positions.append((torch.arange(len(tokens)) + offset).expand(3, -1))
            offset += len(tokens)

        for number, scene in enumerate(prompt.scenes, 1):
            text([*self._encode(str(number)), self._vision[VISION_START]], False)
            h, w = scene.image.height // (PATCH * MERGE), scene.image.width // (PATCH * MERGE)
            ids.extend([self._vision[IMAGE_PAD]] * (h * w))
            labels.extend([_IGNORE] * (h * w))
            where = torch.stack(
                [
                    torch.zeros(h * w, dtype=torch.long),
                    torch.arange(h).repeat_interleave(w),
                    torch.arange(w).repeat(h),
                ]
            )
            positions.append(where + offset)
            offset += max(h, w)
            row.images.append((len(ids) - h * w - 2, len(ids) - h * w, len(ids)))
            text([self._vision[VISION_END]], False)
        for turn, question in enumerate(prompt.questions):
            start = [self._special[USER]] if turn else []
            asked, answer = self._encode(question.text), self._encode(question.answer)
            words = self._words(len(ids) + len(start), asked)
            text([*start, *asked, self._special[ASSISTANT]], False)
            row.questions.append((words, self._words(len(ids), answer)))
            text([*answer, self._special[END]], True)
        return ids, torch.cat(positions, 1), labels, row

    def __call__(self, prompts: list[Prompt]) -> Batch:
        """Build one batch; rows are padded on the right, where causal attention cannot see the padding."""
        rows = [self._row(p) for p in prompts]
        length = max(len(ids) for ids, _, _, _ in rows)
        input_ids = torch.full((len(rows), length), self._special[PAD])
        labels = torch.full((len(rows), length), _IGNORE)
        weights = torch.zeros(len(rows), length)
        position_ids = torch.zeros(3, len(rows), length, dtype=torch.long)
        for b, (ids, positions, row_labels, row) in enumerate(rows):
            input_ids[b, : len(ids)] = torch.tensor(ids)
            position_ids[:, b, : len(ids)] = positions
            labels[b, : len(ids) - 1] = torch.tensor(row_labels[1:])
            for question, (_, answer) in zip(prompts[b].questions, row.questions, strict=True):
                first, tokens = answer[0][0] - 1, len(answer) + 1
                weights[b, first : first + tokens] = _TASK_WEIGHT.get(question.task, 1.0) / tokens
        maps = [row for _, _, _, row in rows]
        ends = [
            (b, end, scene)
            for b, (prompt, row) in enumerate(zip(prompts, maps, strict=True))
            for (_, _, end), scene in zip(row.images, prompt.scenes, strict=True)
        ]
        return Batch(input_ids, position_ids, labels, weights, targets(prompts, maps), Ends.of(ends))
