"""`CapsuleLayer`: one layer's keys and values as capsules plus exact tokens; a stock cache layer outside."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from capsight.kvcapsule.cache.buffers import appended
from capsight.kvcapsule.cache.layer_tokens import LayerTokens
from capsight.kvcapsule.cache.ledger import Ledger
from capsight.kvcapsule.cache.placement import Placement
from capsight.kvcapsule.cache.waiting import Waiting
from capsight.kvcapsule.codecs import BlockCodec, Payload, TokenPositions
from capsight.kvcapsule.plan import Run


class CapsuleLayer(DynamicLayer):
    """Stores what it has seen in three parts and gives attention full-length keys and values.

    - capsules: all runs of the plan that are complete;
    - packed: exact keys and values `[2, E, H, D]` of all other tokens up to the last update that
      completed a run, rows end to end, no padding;
    - tail: exact keys and values `[2, B, T, H, D]` of the tokens that came since, at the start of a
      buffer with room for more, so that a step copies nothing.

    `update` returns its own arguments at the first prefill (a later one attends to capsules of what
    came before), otherwise a rebuilt copy in the scratch buffer, valid until the next layer's update. Where
    the ledger says so it returns new tokens only and leaves the rest to `CapsuleCache.take_latent`.
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
        self._bias: Tensor | None = None  # [B, H or 1, 1, S]

    def __getstate__(self) -> dict[str, Any]:
        """Without views of the buffer: pickled, they would be memory of their own."""
        return self.__dict__ | {"_left": None}

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

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add new tokens.

        Args:
            key_states: `[B, H, Q, D]`, after RoPE.
            value_states: `[B, H, Q, D]`.

        Returns:
            `[B, H, S, D]` of all tokens seen, capsules rebuilt; or new ones, where all are left to attention.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.codec.to(key_states.device)
            self.dtype = key_states.dtype  # transformers 5.24 no longer sets it
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
            if self.placement is None:
                self._store(key_states, value_states)
                return key_states, value_states
            grows = self._grows(self.placement, key_states.shape[2])
            latent = self._ledger.latent and self.codec.leaves(key_states)
            if grows and latent and self.payload is not None:
                self._append(key_states, value_states)
                self._leave(self.placement, self.payload)
                return key_states, value_states
            keys, values = self._rebuilt(self.placement, key_states, value_states)
            if grows:
                self._append(key_states, value_states)
            else:
                self._store(keys, values)
        return keys, values

    def step(self, query: Tensor, keys: Tensor, values: Tensor, *how: Any) -> Tensor | None:
        """Add one new token and attend to all, where native code does both; see `LayerTokens.step`."""
        left, placement = self._left, self.placement
        if left is None or placement is None or left.room is not self._room or not self._grows(placement, 1):
            return None
        out = left.step(query, keys, values, self._held, *how)
        if out is not None:
            self._held, self._bias = self._held + 1, None
        return out

    def key_bias(self) -> Tensor | None:
        """What attention has to add to its scores over the keys last returned: `[B, H or 1, 1, S]`."""
        return self._bias

    def _leave(self, placement: Placement, payload: Payload) -> None:
        """Leave all that is stored to attention."""
        assert self._packed is not None
        assert self._room is not None
        parts = payload, self._ledger.exact_rows(placement), self._packed, self._room
        if self._left is not None and self._left.are(*parts[:3]):
            self._left = self._left.in_room(self._room)
        else:
            places = self._ledger.latent_tokens(placement) if self.codec.needs_positions else None
            self._left = LayerTokens(self.codec, *parts, places)
        self._bias, self._ledger.left = None, (self._left, self._held)

    def _rebuilt(self, placement: Placement, new_keys: Tensor, new_values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, H, S, D]` in the scratch buffer: what is stored, then the new tokens."""
        assert self._packed is not None
        assert self._tail is not None
        length = self.get_seq_length() + new_keys.shape[2]
        capsules = None
        if self.payload is not None:
            positions = self._positions(placement.runs, new_keys.device)
            capsules = self.codec.decode_at(self.payload, positions, new_keys.dtype)
        run_slots, exact_slots = placement.run_slots(length), placement.exact_slots(length)
        results = []
        for kind, (role, new) in enumerate((("keys", new_keys), ("values", new_values))):
            full = self._ledger.full(role, length, new)  # [B, S, H, D]
            flat = full.flatten(0, 1)
            flat.index_copy_(0, exact_slots, self._packed[kind])
            if capsules is not None:
                flat.index_copy_(0, run_slots, capsules[kind].transpose(1, 2).flatten(0, 1))
            full[:, placement.settled : length - new.shape[2]] = self._tail[kind]
            full[:, length - new.shape[2] :] = new.transpose(1, 2)
            results.append(full.transpose(1, 2))
        bias = None if self.payload is None else self.codec.bias(self.payload)  # [M, H or 1, N]
        self._bias = None
        if bias is not None:
            bias = bias.clamp_min(torch.finfo(new_keys.dtype).min).to(new_keys)
            self._bias = placement.spread(bias, length)[:, :, None]
        return results[0], results[1]

    def _store(self, keys: Tensor, values: Tensor) -> None:
        """Keep all tokens seen, `[B, H, S, D]` (capsules as rebuilt); new runs become capsules."""
        intake = self._ledger.intake(self.placement, keys.shape[2], keys.device)
        self._tail = keys.new_empty(2, keys.shape[0], 0, keys.shape[1], keys.shape[3])
        flat = [x.transpose(1, 2).flatten(0, 1) for x in (keys, values)]  # [B * S, H, D]
        if intake.runs:
            size = (-1, self.codec.block_size)
            taken = [x.index_select(0, intake.blocks).unflatten(0, size) for x in flat]  # [M, N, H, D]
            new_keys, new_values = (x.transpose(1, 2) for x in taken)
            positions = self._positions(intake.runs, keys.device)
            waiting = self._ledger.queue.add(self.codec, new_keys, new_values, intake.runs, positions)
            self._waiting = waiting, intake.order
        self._packed = torch.stack([x.index_select(0, intake.exact) for x in flat])
        self.placement = intake.placement

    def _positions(self, runs: tuple[Run, ...], device: torch.device) -> TokenPositions | None:
        """Of the tokens of `runs`, where the codec asks for them."""
        return self._ledger.positions(runs, device) if self.codec.needs_positions else None

    def _grows(self, placement: Placement, new: int) -> bool:
        """Whether `new` more tokens go to the tail: none is padding, and they complete no run."""
        runs = self._ledger.complete(self.get_seq_length() + new)
        return len(runs) == len(placement.runs) and placement.settled >= max(placement.pads)

    def _append(self, keys: Tensor, values: Tensor) -> None:
        """Put new tokens `[B, H, Q, D]` at the end of the tail."""
        assert self._room is not None
        left = self._left
        if left is None or left.room is not self._room or not left.append(keys, values, self._held):
            self._room = appended(self._room, self._held, keys, values)
        self._held += keys.shape[2]

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
