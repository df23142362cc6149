"""Prompts as training tensors: one prefix of pictures a row, and many questions that each see it alone."""

import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from judging.dense import Labels, labels_of
from judging.prompts import Prompt
from judging.question import Place, Question
from judging.questions import SUBJECTS
from judging.shapes import Judge
from reference_training.batches import patches

_PICTURE = re.compile(r"(?<=picture )\d|(?<=pictures )\d|(?<=and )\d")
#: How much an answer counts, more where a prompt has room for few questions of the kind.
_WEIGHT = {"odd": 5.0, "differ": 3.0, "which_scene": 2.0, "describe": 2.0}
_CELL = re.compile(r"(?<=at )[a-p]\d+")


@dataclass(frozen=True, slots=True)
class Group:
    """Questions of about one length: Q of each prompt, T tokens each, padded on the right.

    Attributes:
        ids: [B, Q, T] int64.
        labels: [B, Q, T] int64, the next token where it belongs to the answer, else -100.
        weights: [B, Q, T] float32, `_WEIGHT` over the number of tokens of the answer.
        look: [B, Q * T, P] float32, where in the prefix a head should look; rows sum to 1 or 0.
        other: the same for another head.
        number: [B * Q, T, T] float32, where in its own question.
        subject: the same for another head.
    """

    ids: Tensor
    labels: Tensor
    weights: Tensor
    look: Tensor
    other: Tensor
    number: Tensor
    subject: Tensor


@dataclass(frozen=True, slots=True)
class Lesson:
    """What one step learns from: pictures, their dense labels, and the token rows (the tower alone: none).

    Attributes:
        pixels: what the tower takes.
        grid_thw: [pictures, 3].
        dense: labels of the cells.
        prefix: [P] int64, the tokens of the pictures.
        positions: [3, P] int64, M-RoPE or three times the same.
        after: the position of the first token after the pictures.
        firsts: place in the prefix of each picture's first vision token.
        groups: the questions.
    """

    pixels: Tensor
    grid_thw: Tensor
    dense: Labels
    prefix: Tensor
    positions: Tensor
    after: int
    firsts: list[int]
    groups: list[Group]


class Teacher:
    """Turns prompts of a judge into lessons."""

    def __init__(self, judge: Judge, tokenizer: PreTrainedTokenizerFast) -> None:
        """Look up the special tokens once."""
        self.judge, self._tokenizer = judge, tokenizer
        ids = tokenizer.get_vocab()
        self._user, self._assistant, self._end, self._pad = (
            ids[t] for t in ("<|user|>", "<|assistant|>", "<|end|>", "<|pad|>")
        )
        self._image = [ids[t] for t in judge.image]
        self._memo: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        if text not in self._memo:
            self._memo[text] = self._tokenizer.encode(text, add_special_tokens=False)
        return self._memo[text]

    def prefix(self, pictures: int) -> tuple[Tensor, Tensor, int, list[int]]:
        """Tokens, positions, the position after them, and where each picture begins."""
        grid, tokens = self.judge.grid, self.judge.tokens
        ids, positions, offset, firsts = [self._user], [torch.zeros(3, 1, dtype=torch.long)], 1, []
        start, pad, end = self._image
        for number in range(1, pictures + 1):
            head = [*self.encode(str(number)), start]
            ids += head
            positions.append((torch.arange(len(head)) + offset).expand(3, -1))
            offset += len(head)
            firsts.append(len(ids))
            ids += [pad] * tokens
            if self.judge.mrope:
                side = torch.arange(grid)
                where = torch.stack(
                    [torch.zeros(grid**2, dtype=torch.long), side.repeat_interleave(grid), side.repeat(grid)]
                )
                positions.append(where + offset)
                offset += grid
            else:
                positions.append((torch.arange(tokens) + offset).expand(3, -1))
                offset += tokens
            ids.append(end)
            positions.append(torch.full((3, 1), offset))
            offset += 1
        return torch.tensor(ids), torch.cat(positions, 1), offset, firsts

    def pixels(self, prompts: list[Prompt]) -> tuple[Tensor, Tensor]:
        """What the tower takes, and the patch grids."""
        images = [image for p in prompts for image in p.images]
        if self.judge.mrope:
            return patches(images)
        stacked = torch.from_numpy(np.stack([np.asarray(i) for i in images])).float().div_(127.5).sub_(1)
        return stacked.permute(0, 3, 1, 2).contiguous(), torch.zeros(len(images), 3, dtype=torch.long)

    def __call__(self, prompts: list[Prompt]) -> Lesson:
        """A lesson of prompts with equally many pictures and questions of each group."""
        prefix, positions, after, firsts = self.prefix(len(prompts[0].scenes))
        dense = labels_of([s.world for p in prompts for s in p.scenes], self.judge.side)
        groups = []
        for long in (False, True):
            chosen = [[q for q in p.questions if (q.task == "describe") == long] for p in prompts]
            if any(chosen):
                groups.append(self._group(chosen, firsts, len(prefix)))
        return Lesson(*self.pixels(prompts), dense, prefix, positions, after, firsts, groups)

    def _row(self, q: Question) -> tuple[list[int], int, list[int]]:
        """Tokens, the length of the question, and the piece of the answer that each token belongs to."""
        asked = self.encode(q.text)
        ids, pieces = [*asked, self._assistant], []
        for number, piece in enumerate(q.pieces):
            tokens = self.encode(piece.text)
            ids += tokens
            pieces += [number] * len(tokens)
        return [*ids, self._end], len(asked), pieces

    def _group(self, asked: list[list[Question]], firsts: list[int], width: int) -> Group:
        rows = [[self._row(q) for q in some] for some in asked]
        B, Q = len(rows), max(len(r) for r in rows)
        T = max(len(ids) for r in rows for ids, _, _ in r) - 1
        ids = np.full((B, Q, T), self._pad)
        labels = np.full((B, Q, T), -100)
        weights = np.zeros((B, Q, T), np.float32)
        look, other = (np.zeros((B, Q, T, width), np.float32) for _ in range(2))
        number, subject = (np.zeros((B, Q, T, T), np.float32) for _ in range(2))
        for b, (row, some) in enumerate(zip(rows, asked, strict=True)):
            for q, ((tokens, n, pieces), question) in enumerate(zip(row, some, strict=True)):
                size = len(tokens) - 1
                ids[b, q, :size] = tokens[:-1]
                labels[b, q, n:size] = tokens[n + 1 :]
                weights[b, q, n:size] = _WEIGHT.get(question.task, 1.0) / (size - n)
                numbers, subjects = self._spans(question.text)
                if numbers:
                    number[b, q, n:size, numbers[0]] = 1
                if subjects:
                    subject[b, q, n:size, subjects] = 1 / len(subjects)
                for t, piece in enumerate(pieces, n):
                    for target, places in (
                        (look, question.pieces[piece].look),
                        (other, question.pieces[piece].other),
                    ):
                        at = [i for place in places for i in self._tokens_at(place, firsts)]
                        np.add.at(target[b, q, t], at, 1 / len(at))
        return Group(
            torch.from_numpy(ids),
            torch.from_numpy(labels),
            torch.from_numpy(weights),
            torch.from_numpy(look).view(B, Q * T, width),
            torch.from_numpy(other).view(B, Q * T, width),
            torch.from_numpy(number).view(B * Q, T, T),
            torch.from_numpy(subject).view(B * Q, T, T),
        )

    def _tokens_at(self, place: Place, firsts: list[int]) -> list[int]:
        """Where a place lies in the prefix; the first token stands for as many as a cell has."""
        k, cell = place
        if cell < 0:
            return [0] * self.judge.side**2
        return [firsts[k] + token for token in self.judge.tokens_of(cell)]

    def _spans(self, text: str) -> tuple[list[int], list[int]]:
        """Places of the tokens that name a picture, and of those that say what is asked for."""
        numbers, subjects, at = [], [], 0
        cells = [m.span() for m in _CELL.finditer(text)]
        pictures = {m.start() for m in _PICTURE.finditer(text)}
        for place, token in enumerate(self.encode(text)):
            word = str(self._tokenizer.decode([token]))
            start = at + len(word) - len(word.lstrip())
            if start in pictures:
                numbers.append(place)
            if word.strip() in SUBJECTS or any(a <= start < b for a, b in cells):
                subjects.append(place)
            at += len(word)
        return numbers, subjects
