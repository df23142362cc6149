"""Prompts as batches: the images once, then every question on its own, hidden from the others by the mask."""

from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from judging.smol.asks import Prompt, Question
from judging.smol.tower import FAKE, GLOBAL, IMAGE, TOKENS

_IGNORE = -100


@dataclass(frozen=True, slots=True)
class Packed:
    """A batch.

    Attributes:
        input_ids: [B, S], padded on the right.
        position_ids: [B, S]; every question starts where the images end.
        mask: [B, 1, S, S] bool, what may be seen.
        at: [N] flat positions whose next token belongs to an answer.
        target: [N] these tokens.
        question: [N] which question of the batch each belongs to.
        prefix: tokens of each prompt up to its last image's end.
    """

    input_ids: Tensor
    position_ids: Tensor
    mask: Tensor
    at: Tensor
    target: Tensor
    question: Tensor
    prefix: list[int]


class Hidden(Enum):
    """What of the images is kept from some rows before the questions."""

    FROM_TEXT = "text between the images sees no image"
    FROM_IMAGES = "an image sees no other image"


def hide(packed: Packed, image: int, what: Hidden) -> Packed:
    """The batch with images hidden from the text between them, or from each other.

    Args:
        packed: a batch.
        image: id of the image token.
        what: the rows that see less.
    """
    is_image = packed.input_ids == image  # [B, S]
    number = (is_image & ~torch.nn.functional.pad(is_image, (1, 0))[:, :-1]).cumsum(1)
    if what is Hidden.FROM_IMAGES:
        other = number[:, :, None] != number[:, None, :]
        hidden = is_image[:, :, None] & is_image[:, None, :] & other
    else:
        before = torch.arange(is_image.shape[1]) < torch.tensor(packed.prefix)[:, None]
        hidden = (before & ~is_image)[:, :, None] & is_image[:, None, :]
    return replace(packed, mask=packed.mask & ~hidden[:, None])


class Packer:
    """Packs prompts with one tokenizer, in the words of the chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Spell the fixed parts once."""
        self._tokenizer, self._memo = tokenizer, dict[str, list[int]]()

    def _encode(self, text: str) -> list[int]:
        if text not in self._memo:
            self._memo[text] = self._tokenizer.encode(text, add_special_tokens=False)
        return self._memo[text]

    def prefix(self, images: int) -> list[int]:
        """The tokens of a turn that shows images."""
        ids = self._encode("<|im_start|>user\n")
        for number in range(1, images + 1):
            image = [*self._encode(f"{FAKE}{GLOBAL}"), *self._encode(IMAGE) * TOKENS, *self._encode(FAKE)]
            ids = [*ids, *self._encode(f"Image {number}:"), *image, *self._encode("\n")]
        return ids

    def _spell(self, question: Question) -> tuple[list[int], list[int]]:
        """The tokens up to the answer, and the answer's."""
        text = self._encode(f"{question.text}<|im_end|>\n<|im_start|>assistant\nAnswer:")
        return text, self._encode(f" {question.answer}<|im_end|>")

    def fitting(self, prompt: Prompt, length: int) -> Prompt:
        """The prompt with as many of its questions as fit into `length` tokens."""
        left, kept = length - len(self.prefix(len(prompt.pictures))), []
        for question in prompt.questions:
            size = sum(map(len, self._spell(question))) - 1
            if size <= left:
                left -= size
                kept.append(question)
        return Prompt(prompt.pictures, tuple(kept))

    def __call__(self, prompts: list[Prompt], length: int = 0) -> Packed:
        """Pack prompts of any lengths; the batch is at least `length` tokens long."""
        rows: list[tuple[list[int], list[int], list[int]]] = []  # ids, positions, segment
        answers: list[tuple[int, int, int, int]] = []  # row, position, target, question
        asked, prefixes = 0, []
        for b, prompt in enumerate(prompts):
            ids = list(self.prefix(len(prompt.pictures)))
            prefix = len(ids)
            prefixes.append(prefix)
            positions, segments = list(range(prefix)), [0] * prefix
            for segment, question in enumerate(prompt.questions, 1):
                text, answer = self._spell(question)
                first = len(ids) + len(text) - 1
                answers += [(b, first + i, token, asked) for i, token in enumerate(answer)]
                new = [*text, *answer[:-1]]
                ids += new
                positions += range(prefix, prefix + len(new))
                segments += [segment] * len(new)
                asked += 1
            rows.append((ids, positions, segments))
        length = max(length, *(len(ids) for ids, _, _ in rows))
        input_ids, position_ids, segment_ids = (
            torch.zeros(len(rows), length, dtype=torch.long) for _ in range(3)
        )
        segment_ids -= 1
        for b, row in enumerate(rows):
            for tensor, values in zip((input_ids, position_ids, segment_ids), row, strict=True):
                tensor[b, : len(values)] = torch.tensor(values)
        key, query = segment_ids[:, None, :], segment_ids[:, :, None]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        mask = causal & ((key == query) | ((key == 0) & (query >= 0)))
        columns = [torch.tensor(c) for c in zip(*answers, strict=True)]
        at = columns[0] * length + columns[1]
        return Packed(input_ids, position_ids, mask.unsqueeze(1), at, columns[2], columns[3], prefixes)
