"""`StoredLayer`: what one layer's keys and values are stored as, apart from how they come in."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from capsight.kvcapsule.cache.layer_tokens import LayerTokens
from capsight.kvcapsule.cache.ledger import Ledger
from capsight.kvcapsule.cache.placement import Placement
from capsight.kvcapsule.cache.waiting import Waiting
from capsight.kvcapsule.codecs import BlockCodec, Payload
from capsight.kvcapsule.plan import CapsulePlan


class StoredLayer(DynamicLayer):
    """Keys and values in three parts.

    - capsules: all runs of the plan that are complete;
    - packed: exact keys and values `[2, E, H, D]` of all other tokens up to the last update that
      completed a run, rows end to end, no padding;
    - tail: exact keys and values `[2, B, T, H, D]` of the tokens that came since, at the start of a
      buffer with room for more, so that a step copies nothing.
    """

    def __init__(self, codec: BlockCodec, ledger: Ledger) -> None:
        """Start empty; `ledger` is shared by all layers of the cache."""
        super().__init__()
        self.codec, self._ledger = codec, ledger
        self.reset()

    def reset(self) -> None:
        """Drop all that is stored."""
        self.keys = self.values = None
        self.is_initialized = False
        self.placement: Placement | None = None
        self._payload: Payload | None = None
        self._waiting: tuple[Waiting, Tensor] | None = None  # new blocks, and `Intake.order`
        self._packed: Tensor | None = None  # [2, E, H, D]
        self._room: Tensor | None = None  # [2, B, R, H, D], R >= T
        self._held = 0  # tokens of the tail (T)
        self._left: LayerTokens | None = None  # what was last left to attention
        self._all_placed: tuple[Placement, CapsulePlan] | None = None  # where no run of the plan is to come
        self._bias: Tensor | None = None  # [B, H or 1, 1, S]

    def __getstate__(self) -> dict[str, Any]:
        """The tail without the room behind it, and no views of it, which pickled were memory of their own."""
        cut = None if self._tail is None else self._tail.clone()
        return self.__dict__ | {"_left": None, "_all_placed": None, "_room": cut}

    @property
    def payload(self) -> Payload | None:
        """Capsules of all complete runs, in the order of the runs: by row, then position."""
        if self._waiting is not None:
            waiting, order = self._waiting
            self._waiting, new = None, self._ledger.queue.payload(waiting)
            old = self._payload
            self._payload = new if old is None else old.join(new).select(order)
        return self._payload

    @payload.setter
    def payload(self, payload: Payload | None) -> None:
        self._payload, self._waiting = payload, None

    @property
    def _tail(self) -> Tensor | None:  # [2, B, T, H, D]
        return None if self._room is None else self._room[:, :, : self._held]

    @_tail.setter
    def _tail(self, tail: Tensor | None) -> None:
        self._room, self._held, self._left = tail, 0 if tail is None else tail.shape[2], None

    def get_seq_length(self) -> int:
        """Logical length: tokens seen per row, padding included."""
        return 0 if self.placement is None else self.placement.settled + self._held

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that the next update of `query_length` tokens returns."""
        return self.get_seq_length() + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `tokens_to_remove` tokens (given as a negative number; 0 does nothing).

        Raises:
            CapsightError: that would cut a capsule.
        """
        if not tokens_to_remove or self.placement is None or self._tail is None or self._packed is None:
            return
        self.check_crop(removed := abs(tokens_to_remove))
        remaining, settled = max(self.get_seq_length() - removed, 0), self.placement.settled
        if remaining >= settled:
            self._tail = self._tail[:, :, : remaining - settled].clone()
            return
        stays = self.placement.exact_cols < remaining
        self._packed, self._tail = self._packed[:, stays], self._tail[:, :, :0].clone()
        self.placement = self._ledger.place(self.placement.runs, remaining, stays.device)

    def check_crop(self, removed: int) -> None:
        """Refuse to remove the last `removed` tokens if that would cut a capsule; see `Placement`."""
        if removed and self.placement is not None:
            self.placement.check_crop(self.get_seq_length() - removed)

    def move_rows(self, rows: Tensor, placement: Placement, run_index: Tensor, exact_index: Tensor) -> None:
        """Make row i what row `rows[i]` was; the indices are those of `Placement.select`."""
        assert self._packed is not None
        assert self._tail is not None
        self.placement, self._bias = placement, None
        self.payload = None if self.payload is None or not len(run_index) else self.payload.select(run_index)
        self._packed, self._tail = self._packed[:, exact_index], self._tail[:, rows]

    @property
    def nbytes(self) -> int:
        """Bytes of capsules and exact tokens."""
        return self.exact_nbytes + (0 if self.payload is None else self.payload.nbytes // self.codec.sharing)

    @property
    def exact_nbytes(self) -> int:
        """Bytes of exact tokens; room for more, an eighth of the tail or 16 tokens, left out."""
        return sum(part.nbytes for part in (self._packed, self._tail) if part is not None)

    @property
    def nbytes_full(self) -> int:
        """Bytes that a full cache takes for the same tokens, padding left out."""
        if self._packed is None:
            return 0
        of_token = 2 * self._packed.shape[2:].numel() * self._packed.element_size()
        return of_token * self._ledger.plan.real_tokens(self.get_seq_length())
