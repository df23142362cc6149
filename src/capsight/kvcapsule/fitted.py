"""`FittedCapsule`: a capsule as it was fitted, and the others that the same fit gives."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import Any, Self

from capsight.errors import OptionError
from capsight.kvcapsule.budget import Budget, check_budget, share_out, share_to_keep
from capsight.kvcapsule.calibration.config import CapsuleConfig
from capsight.kvcapsule.calibration.fit import kept_tokens
from capsight.kvcapsule.capsule_file import make_codec
from capsight.kvcapsule.codecs import JointCodec
from capsight.kvcapsule.codecs.adaptive import Weights
from capsight.kvcapsule.codecs.quantise import check_bits
from capsight.kvcapsule.codecs.rotary import as_turned_by
from capsight.kvcapsule.plan import DEFAULT_BLOCK_SIZE
from capsight.kvcapsule.pretrained import PretrainedCapsule

ALIKE = ("heads", "adaptive", "evict")
"""Codecs that learn the same."""


class FittedCapsule(PretrainedCapsule):
    """What a fit gave, at any retained fraction, budget and number of bits, without fitting again."""

    @property
    def capsule_config(self) -> CapsuleConfig:
        """What the capsule is like, for `with_config`."""
        info = self.info
        size = DEFAULT_BLOCK_SIZE if info.share is not None else info.block_size
        return CapsuleConfig(
            codec=info.codec,
            retained=info.share or self.retained,
            block_size=size,
            budget=info.budget,
            bits=info.bits,
            options=info.options,
        )

    def with_config(self, config: CapsuleConfig) -> Self:
        """This capsule as a config says, without fitting again: all `with_...` at once.

        Example:
            >>> capsule.with_config(dataclasses.replace(capsule.capsule_config, retained=0.1, bits=8))

        Raises:
            OptionError: it has to be fitted for that.
        """
        current = self.capsule_config
        fixed = [dict(each.options, weights=None, block_size=each.block_size) for each in (current, config)]
        if fixed[0] != fixed[1]:
            raise OptionError("block_size and options other than weights are what a capsule was fitted with")
        changed = self if config.codec == current.codec else self.with_codec(config.codec)
        if config.sharing != current.sharing:
            changed = changed.with_budget(config.sharing)
        if config.share != current.share:
            changed = changed.with_retained(config.share)
        if "weights" in config.options:
            changed = changed.with_weights(config.options["weights"])
        return changed if config.bits == current.bits else changed.with_bits(config.bits)

    def with_retained(self, retained: float | None = None, *, compression_ratio: float | None = None) -> Self:
        """This capsule at another retained fraction, without fitting again (not static, static-mlp).

        Of blocks the fraction is an average over the layers, shared out as the capsule's budget says; it may
        be given as `compression_ratio`, which is 1 - retained.

        Raises:
            CapsuleFileError: a joint capsule's file is gone, from which its axes are read again.
            OptionError: out of range, given twice, or the codec has to be fitted for it.
        """
        retained = share_to_keep(retained, compression_ratio)
        if self.info.share is not None:
            lean = self.origin is not None
            whole = self.whole_codecs().items()
            codecs = {i: codec.at(retained, lean) for i, codec in whole if isinstance(codec, JointCodec)}
            return type(self)(codecs, replace(self.info, share=retained), self.origin)
        return self._resized(kept_tokens(retained, self.info.block_size), self.info.budget)

    def with_budget(self, budget: Budget) -> Self:
        """This capsule with its average shared out over the layers "water-filled" or "uniform".

        Water-filled, a layer keeps the more, the more error further tokens remove from it and the more
        attention it pays to vision tokens; both were measured when the capsule was fitted.

        Raises:
            OptionError: the budget is neither, or the capsule holds no such measurements.
        """
        return self._resized(round(self.retained * self.info.block_size), check_budget(budget))

    def _resized(self, kept: int, budget: Budget) -> Self:
        """This capsule with `kept` tokens of a block on average."""
        info = self.info
        if info.share is not None:
            raise OptionError("the joint codec stores all layers together; it has no budget to share out")
        counts = share_out(budget, info.needs, len(info.layers), kept, info.block_size)
        layers = tuple(replace(layer, kept=n) for layer, n in zip(info.layers, counts, strict=True))
        codecs = {layer.index: self.codecs[layer.index].resized(layer.kept) for layer in layers}
        return type(self)(codecs, replace(info, layers=layers, budget=budget))

    def with_weights(self, weights: Weights) -> Self:
        """This capsule with the weights that rebuild tokens "solved" or "stored" (adaptive).

        "solved" is smallest, "stored" fastest; both rebuild the same up to rounding.

        Raises:
            OptionError: the codec has none, or `weights` is neither.
        """
        codecs = {index: codec.with_weights(weights) for index, codec in self.codecs.items()}
        return type(self)(codecs, replace(self.info, options=self.info.options | {"weights": weights}))

    def for_latent(self) -> Self:
        """This capsule with its weights stored, if it may have any and was not told what to do with them."""
        decided = self.info.codec != "adaptive" or "weights" in self.info.options
        return self if decided else self.with_weights("stored")

    def for_model(self, model: Any) -> Self:
        """This capsule for a model in hand, which `check_model` takes: one that was cast turns keys by
        frequencies that are rounded (joint).
        """
        codecs = dict(self.codecs)
        for index, codec in self.codecs.items():
            if isinstance(codec, JointCodec):
                other = copy(codec)
                other.rotary = as_turned_by(model, codec.rotary)
                codecs[index] = codec if other.rotary is codec.rotary else other
        return self if codecs == self.codecs else type(self)(codecs, self.info, self.origin)

    def with_codec(self, name: str) -> Self:
        """This capsule as "heads", "adaptive" or "evict", which learn the same.

        Raises:
            OptionError: the codecs do not share what they learn.
        """
        if name not in ALIKE or self.info.codec not in ALIKE:
            raise OptionError(f"only {ALIKE} share what they learn; fit a capsule with codec={name!r}")
        options = {key: value for key, value in self.info.options.items() if key != "weights"}
        info = replace(self.info, codec=name, options=options)
        codecs = {
            layer.index: make_codec(self.codecs[layer.index].state_dict(), info, layer)
            for layer in info.layers
        }
        return type(self)(codecs, info)

    def with_bits(self, bits: int | None) -> Self:
        """This capsule with its numbers stored in 8 or 4 bits (or as they are: None), without fitting again.

        Raises:
            OptionError: `bits` is none of these.
        """
        if bits is not None:
            check_bits(bits)
            if self.info.share is not None:
                raise OptionError(
                    "joint latents choose their bits by what is retained: with_retained, --retained"
                )
        return type(self)(self.codecs, replace(self.info, bits=bits), self.origin)
