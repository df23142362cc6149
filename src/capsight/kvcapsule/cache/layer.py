"""`CapsuleLayer`: one layer's keys and values as capsules plus exact tokens; a stock cache layer outside."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from capsight.kvcapsule.cache.buffers import grown
from capsight.kvcapsule.cache.layer_tokens import LayerTokens
from capsight.kvcapsule.cache.placement import Placement
from capsight.kvcapsule.cache.stored import StoredLayer
from capsight.kvcapsule.codecs import Payload, TokenPositions
from capsight.kvcapsule.plan import Run


class CapsuleLayer(StoredLayer):
    """Stores what it has seen and gives attention full-length keys and values.

    `update` returns its own arguments at the first prefill (a later one attends to capsules of what
    came before), otherwise a rebuilt copy in the scratch buffer, valid until the next layer's update. Where
    the ledger says so it returns new tokens only and leaves the rest to `CapsuleCache.take_latent`.
    """

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
                self._make_room(key_states.shape[2])
                self._left = self._as_left(self.placement, self.payload)
                self._append(key_states, value_states)
                self._bias, self._ledger.left = None, (self._left, self._held)
                return key_states, value_states
            keys, values = self._rebuilt(self.placement, key_states, value_states)
            if grows:
                self._append(key_states, value_states)
            else:
                self._store(keys, values)
        return keys, values

    def grow(self, keys: Tensor, values: Tensor) -> bool:
        """`update` with one new token, where native code takes it and all has been left to attention before.

        Returns:
            Whether that was so; if not, nothing is done.
        """
        left = self._growing()
        if left is None or not left.append(keys, values, self._held):
            return False
        self._held, self._bias = self._held + 1, None
        self._ledger.left = left, self._held
        return True

    def step(self, query: Tensor, keys: Tensor, values: Tensor, *how: Any) -> Tensor | None:
        """Add one new token and attend to all, where native code does both; see `LayerTokens.step`."""
        left = self._growing()
        out = None if left is None else left.step(query, keys, values, self._held, *how)
        if out is not None:
            self._held, self._bias = self._held + 1, None
        return out

    def _growing(self) -> LayerTokens | None:
        """What was last left to attention, if one more token makes nothing else of it than a longer tail."""
        left, placement, plan = self._left, self.placement, self._ledger.plan
        if left is None or placement is None or left.room is not self._room:
            return None
        if (
            self._all_placed is None
            or self._all_placed[0] is not placement
            or self._all_placed[1] is not plan
        ):
            if not self._grows(placement, 1):
                return None
            if len(placement.runs) == len(plan.runs):
                self._all_placed = placement, plan
        return left

    def key_bias(self) -> Tensor | None:
        """What attention has to add to its scores over the keys last returned: `[B, H or 1, 1, S]`."""
        return self._bias

    def _as_left(self, placement: Placement, payload: Payload) -> LayerTokens:
        """All that is stored, as attention reads it."""
        assert self._packed is not None
        assert self._room is not None
        parts = payload, self._ledger.exact_rows(placement), self._packed, self._room
        if self._left is not None and self._left.are(*parts[:3]):
            return self._left.in_room(self._room)
        places = self._ledger.latent_tokens(placement) if self.codec.needs_positions else None
        return LayerTokens(self.codec, *parts, places)

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

    def _make_room(self, new: int) -> Tensor:
        """Have the buffer of the tail take `new` more tokens."""
        assert self._room is not None
        self._room = grown(self._room, self._held, new)
        return self._room

    def _append(self, keys: Tensor, values: Tensor) -> None:
        """Put new tokens `[B, H, Q, D]` at the end of the tail."""
        room, left, end = self._make_room(keys.shape[2]), self._left, self._held + keys.shape[2]
        if left is None or left.room is not room or not left.append(keys, values, self._held):
            for side, new in zip(room.transpose(2, 3), (keys, values), strict=True):
                side[:, :, self._held : end] = new
        self._held = end
