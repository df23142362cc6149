"""A course of training of low-rank additions: its rate, its clock, its log, and where it goes on from."""

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from judging.smol.packed import Packed

_WARM_UP = 30
"""Steps in which the rate rises."""


class Course:
    """Optimiser steps over one loss, checkpoints and a log of one JSON line each.

    Attributes:
        step: steps done.
        right: by kind, since the last line: 1 for each question answered right, else 0.
    """

    def __init__(
        self, file: Path, learnt: Sequence[nn.Parameter], steps: int, rate: float, minutes: float
    ) -> None:
        """Begin, or find what a run that stopped has saved.

        Args:
            file: the checkpoint; the log lies beside it, as `.jsonl`.
            learnt: what is trained.
            steps: optimiser steps.
            rate: highest learning rate.
            minutes: the rate falls to nothing by then, if sooner.
        """
        self.saved: dict[str, Any] | None = None
        self.step, self.right = 0, defaultdict[str, list[float]](list)
        self._file, self._learnt, self._steps, self._rate, self._minutes = file, learnt, steps, rate, minutes
        self._optimiser = torch.optim.AdamW(learnt, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        self._tokens, seconds = 0, 0.0
        if file.exists():
            self.saved = torch.load(file, weights_only=True)
            self._optimiser.load_state_dict(self.saved["optimiser"])
            self.step, seconds, self._tokens = (self.saved[name] for name in ("step", "seconds", "tokens"))
        self._begun, self._said = time.time() - seconds, time.time()

    def goes_on(self) -> bool:
        """Whether steps and minutes are left."""
        return self.step < self._steps and not self._late()

    def learn(self, loss: Tensor, tokens: int) -> None:
        """One optimiser step.

        Args:
            loss: to be made smaller.
            tokens: how many were read for it.
        """
        loss.backward()
        nn.utils.clip_grad_norm_(self._learnt, 1.0)
        done = max(self.step / self._steps, (time.time() - self._begun) / 60 / self._minutes)
        rate = self._rate * min(1.0, (self.step + 1) / _WARM_UP) * max(0.03, 1 - done)
        self._optimiser.param_groups[0]["lr"] = rate
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        self.step, self._tokens = self.step + 1, self._tokens + tokens

    def is_due(self, seconds: float) -> bool:
        """Whether the last line was written so long ago, or there is no step left."""
        return time.time() - self._said > seconds or not self.goes_on()

    def save(self, loss: Tensor, measured: dict[str, Any], **state: Any) -> None:
        """Write a line and a checkpoint.

        Args:
            loss: of the last step.
            measured: more for the line.
            state: more for the checkpoint.
        """
        seconds = time.time() - self._begun
        line = {"step": self.step, "seconds": seconds, "tokens": self._tokens, "loss": loss.item()}
        line["train"] = {k: round(sum(v) / len(v), 3) for k, v in sorted(self.right.items())}
        self._said = time.time()
        self.right.clear()
        print(json.dumps(line | measured), flush=True)
        with self._file.with_suffix(".jsonl").open("a") as log:
            log.write(json.dumps(line | measured) + "\n")
        state |= {"optimiser": self._optimiser.state_dict(), "step": self.step, "tokens": self._tokens}
        torch.save(state | {"seconds": seconds}, self._file)

    def _late(self) -> bool:
        return (time.time() - self._begun) / 60 >= self._minutes


def answer_loss(logits: Tensor, packed: Packed) -> Tensor:
    """Cross entropy of `logits` `[N, vocabulary]`: mean over a question's tokens, then over questions."""
    each = nn.functional.cross_entropy(logits, packed.target, reduction="none")
    count = torch.bincount(packed.question)
    return (each / count[packed.question]).sum() / len(count)


def answered(logits: Tensor, packed: Packed) -> list[float]:
    """For each question 1 if every token of its answer would have been said, else 0."""
    miss = (logits.argmax(-1) != packed.target).float()
    asked = int(packed.question.max()) + 1
    return [1.0 - float(wrong) for wrong in torch.bincount(packed.question, miss, asked) > 0]
