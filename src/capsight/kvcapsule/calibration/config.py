"""`CapsuleConfig`: what a capsule is to be like, in one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch

from capsight.errors import OptionError
from capsight.kvcapsule.budget import DEFAULT_BUDGET, Budget, check_budget, default_retained, share_to_keep
from capsight.kvcapsule.calibration.fit import MEASURED, kept_tokens, solve
from capsight.kvcapsule.calibration.joint_fit import check_rank
from capsight.kvcapsule.codecs import ALL_CODECS, JointCodec
from capsight.kvcapsule.codecs.moments import LayerMoments
from capsight.kvcapsule.codecs.quantise import check_bits
from capsight.kvcapsule.plan import DEFAULT_BLOCK_SIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class CapsuleConfig:
    """What a capsule is to be like; `dataclasses.replace` makes another one of it.

    Everything is checked when it is made, before a model is loaded or run.

    Attributes:
        codec: "joint", "heads", "adaptive" and its control "evict", "static", or "static-mlp" (trained
            after the closed-form fit, reads the samples twice).
        retained: what to keep, in (0, 1]: of a 16-bit cache's bytes ("joint"; by default 0.05), or of each
            block's tokens, an average over the layers (others; 0.40).
        block_size: vision tokens per capsule (N); "joint" has none.
        budget: how the average is shared out over the layers: "water-filled" (by their errors and their
            attention, see `KVCapsule.with_budget`) or "uniform"; None for the codec's default.
        bits: bits of a stored number, 8 or 4; None for numbers as they are, and for "joint", which chooses.
        options: the codec's own, see its `fit`: of "joint" `rank` (coordinates at most), of others `ridge`,
            of "heads", "adaptive" and "evict" `joint`, of "adaptive" `weights`, of "static-mlp" `width`.

    Raises:
        OptionError: something is unknown or out of range.
    """

    codec: str = "joint"
    retained: float | None = None
    block_size: int = DEFAULT_BLOCK_SIZE
    budget: Budget | None = None
    bits: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what a fit would refuse, by fitting a codec to one block of zeros."""
        if not isinstance(self.codec, str) or self.codec not in ALL_CODECS:
            raise OptionError(f"codec must be one of {sorted(ALL_CODECS)}, not {self.codec!r}")
        share = share_to_keep(self.retained, None, default_retained(self.codec))
        if self.bits is not None:
            check_bits(self.bits)
        if self.codec == JointCodec.name:
            self._check_joint()
            return
        size = self.block_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 2:
            raise OptionError(f"block_size is a whole number of at least 2 tokens, not {size!r}")
        dry = LayerMoments(1, size, 1)
        dry.update(torch.zeros(1, 1, size, 1), torch.zeros(1, 1, size, 1))
        solve({0: dry}, self.codec, [kept_tokens(share, size)], self.options)
        if self.budget is not None and check_budget(self.budget) != "uniform" and self.codec not in MEASURED:
            raise OptionError(f"the {self.codec} codec keeps the same of every layer; use budget='uniform'")

    def _check_joint(self) -> None:
        if self.budget not in (None, "uniform"):
            raise OptionError("the joint codec stores all layers together; use budget='uniform'")
        if self.bits is not None:
            raise OptionError("joint latents choose their bits by what is retained; leave bits out")
        if unknown := sorted(set(self.options) - {"rank"}):
            raise OptionError(f"the joint codec has no option {unknown}; it has ['rank']")
        check_rank(self.options.get("rank"))

    @classmethod
    def of(cls, given: CapsuleConfig | float | None, named: Mapping[str, Any]) -> Self:
        """The config that the arguments of `KVCapsule.fit` give.

        Args:
            given: a config, or what to retain.
            named: its fields by name, which go before those of `given`; `compression_ratio`, which is
                1 - `retained`; and options of the codec.

        Raises:
            OptionError: something is unknown, out of range, or said twice.
        """
        known = {each.name for each in fields(cls)}
        changed = {name: value for name, value in named.items() if name in known - {"options"}}
        codec_options = {
            name: value for name, value in named.items() if name not in known | {"compression_ratio"}
        }
        if given is not None and not isinstance(given, CapsuleConfig):
            if changed.get("retained") is not None:
                raise OptionError("retained is given twice")
            changed["retained"] = given
        if named.get("compression_ratio") is not None:
            changed["retained"] = share_to_keep(changed.get("retained"), named["compression_ratio"])
        base = given if isinstance(given, cls) else cls()
        return replace(base, **changed, options={**base.options, **named.get("options", {}), **codec_options})

    @property
    def share(self) -> float:
        """`retained`, or the codec's default."""
        return default_retained(self.codec) if self.retained is None else float(self.retained)

    @property
    def sharing(self) -> Budget:
        """`budget`, or the codec's default."""
        return self.budget or (DEFAULT_BUDGET if self.codec in MEASURED else "uniform")
