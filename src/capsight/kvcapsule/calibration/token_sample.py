"""`TokenSample`: a random sample of calibration tokens, each with what all layers hold of it."""

from __future__ import annotations

import torch
from torch import Tensor

from capsight.errors import CalibrationError

_NUMBERS = 2**29  # of all sampled tokens: 1 GiB in float16
_MOST = 32768
_FEWEST = 8192


class TokenSample:
    """Tokens drawn from all that were seen, any as likely as any other; sums over all of them.

    Every token draws a random key, seeded by the number of its calibration sample, and those with the
    smallest keys stay: a pass can go on from its `state`, and however samples are shared out over
    processes, what these have drawn joins to the same tokens.

    Attributes:
        seen: tokens seen.
    """

    def __init__(self) -> None:
        """Start empty."""
        self.seen = 0
        self._tokens: Tensor | None = None  # [n, F], float16
        self._keys = torch.empty(0, dtype=torch.float64)
        self._total: Tensor | None = None  # [F], float64

    def add(self, tokens: Tensor, index: int) -> None:
        """See tokens `[T, F]` of the calibration sample with this number.

        Raises:
            CalibrationError: they hold NaN or infinite numbers, or numbers beyond 65504.
        """
        half = tokens.half().cpu()
        if not torch.isfinite(half).all():
            raise CalibrationError(
                "calibration keys or values hold NaN or infinite values, or too large ones; run the model in "
                "float32 or bfloat16"
            )
        generator = torch.Generator().manual_seed(index)
        keys = torch.rand(len(half), generator=generator, dtype=torch.float64)
        total = tokens.sum(0, dtype=torch.float64).cpu()
        self._total = total if self._total is None else self._total + total
        self.seen += len(half)
        self._merge(half, keys)

    def join(self, other: TokenSample) -> None:
        """See what another sample has seen, of other calibration samples."""
        if other._tokens is None or other._total is None:
            return
        self._total = other._total if self._total is None else self._total + other._total
        self.seen += other.seen
        self._merge(other._tokens, other._keys)

    def state(self) -> dict[str, Tensor]:
        """Tensors for `restore`; empty if nothing was seen."""
        if self._tokens is None or self._total is None:
            return {}
        seen = torch.tensor([self.seen])
        return {"tokens": self._tokens, "keys": self._keys, "total": self._total, "seen": seen}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state`.

        Raises:
            ValueError: it is malformed.
        """
        tokens, keys, total = state["tokens"], state["keys"], state["total"]
        if tokens.ndim != 2 or keys.shape != tokens.shape[:1] or total.shape != tokens.shape[1:]:
            raise ValueError("the sampled tokens do not fit together")
        self._tokens, self._keys, self._total = tokens, keys, total
        self.seen = int(state["seen"])

    @property
    def mean(self) -> Tensor:
        """Mean of all tokens seen: float32 `[F]`."""
        assert self._total is not None
        return (self._total / self.seen).float()

    @property
    def tokens(self) -> Tensor:
        """The sample: float16 `[n, F]`."""
        assert self._tokens is not None
        return self._tokens

    def _merge(self, tokens: Tensor, keys: Tensor) -> None:
        if self._tokens is not None:
            tokens, keys = torch.cat([self._tokens, tokens]), torch.cat([self._keys, keys])
        stay = keys.argsort()[: min(max(_NUMBERS // tokens.shape[1], _FEWEST), _MOST)]
        self._tokens, self._keys = tokens[stay], keys[stay]
