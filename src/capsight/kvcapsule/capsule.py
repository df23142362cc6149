"""`KVCapsule`: a fitted capsule - fit it, save it, load it, make caches with it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Self

from transformers import PreTrainedConfig

from capsight.errors import ModelMismatchError, OptionError
from capsight.execution import inputs_device, own_precision
from capsight.kvcapsule.budget import Budget, check_budget, default_retained, share_out, share_to_keep
from capsight.kvcapsule.cache import CapsuleCache
from capsight.kvcapsule.cache.conversation import Conversation
from capsight.kvcapsule.calibration.fit import kept_tokens
from capsight.kvcapsule.calibration.fit_capsule import fit_capsule
from capsight.kvcapsule.calibration.processes import Processes
from capsight.kvcapsule.capsule_file import make_codec
from capsight.kvcapsule.codecs import JointCodec
from capsight.kvcapsule.codecs.adaptive import Weights
from capsight.kvcapsule.codecs.quantise import check_bits
from capsight.kvcapsule.plan import DEFAULT_BLOCK_SIZE
from capsight.kvcapsule.pretrained import PretrainedCapsule
from capsight.layout import PromptLayout, build_layout
from capsight.model_fingerprint import model_fingerprint, same_model

ALIKE = ("heads", "adaptive", "evict")
"""Codecs that learn the same."""


class KVCapsule(PretrainedCapsule):
    """Codecs for all full-attention layers of one model; after KVCapsule (arXiv 2605.16439), codecs our own.

    Attributes:
        codecs: codec of each layer, by layer index.
        info: sizes, options, and the model it belongs to.
    """

    @classmethod
    def fit(
        cls,
        model: Any,
        processor: Any,
        samples: Iterable[Any],
        retained: float | None = None,
        codec: str = "joint",
        block_size: int = DEFAULT_BLOCK_SIZE,
        progress: bool = True,
        budget: Budget | None = None,
        resume: str | os.PathLike[str] | None = None,
        compression_ratio: float | None = None,
        **options: Any,
    ) -> Self:
        """Fit to a model in one pass over calibration samples.

        Where torch.distributed runs several processes, each with the whole model, they share the samples
        out: each reads its own and all return the same capsule, that of one process up to rounding.

        Args:
            model: a transformers vision-language model of a family that `build_layout` knows.
            processor: its processor; may be None where all samples are processor outputs.
            samples: processor outputs (any batch size) or lists of chat messages, with images.
            retained: what to keep, in (0, 1]: of a 16-bit cache's bytes ("joint"; by default 0.05), or of
                each block's tokens, an average over the layers (others; 0.40).
            codec: "joint", "heads", "adaptive" and its control "evict", "static", or "static-mlp" (trained
                after the closed-form fit, reads the samples twice).
            block_size: vision tokens per capsule (N); "joint" has none.
            progress: show a progress bar.
            budget: how the average is shared out: "water-filled" (by the errors and the attention of the
                layers, see `with_budget`) or "uniform"; None for the codec's default.
            resume: folder where the pass leaves, every half minute, what it has added up; a fit that was
                interrupted goes on from there, given the same samples. Remove it afterwards.
            compression_ratio: 1 - retained, instead of `retained`.
            **options: the codec's own, see its `fit`: of "joint" `rank` (coordinates at most), of others
                `ridge`, of "heads", "adaptive" and "evict" `joint`, of "adaptive" `weights`, of
                "static-mlp" `width`.

        Raises:
            CalibrationError: no image is as long as a block, keys or values are not finite, or `resume`
                holds the pass of another model, block size or samples.
            CapsuleFileError: `resume` cannot be read or written.
            ElsewhereError: another process failed; a `CalibrationError`.
            OptionError: an option is unknown or out of range.
        """
        processes = Processes.found()
        with processes.together():
            share = share_to_keep(retained, compression_ratio, default_retained(codec))
            arguments = (share, codec, block_size, progress, budget, resume, options, processes)
            with own_precision(inputs_device(model)):
                return cls(*fit_capsule(model, processor, samples, *arguments))

    def cache(
        self, inputs: Mapping[str, Any] | PromptLayout, config: PreTrainedConfig | None = None
    ) -> CapsuleCache:
        """An empty cache for a batch of prompts; give it to `model.generate(**inputs, past_key_values=...)`.

        Args:
            inputs: processor outputs, or the layout made of them.
            config: the model's config; by default the one of the model the capsule was fitted to.

        Raises:
            LayoutError: the inputs do not form a layout.
            ModelMismatchError: `config` has other layers than the capsule.
        """
        config = self.config if config is None else config
        layout = inputs if isinstance(inputs, PromptLayout) else build_layout(inputs, config)
        cache = CapsuleCache(self.stored, layout, config)
        cache.lean = not self.rebuilds
        if not isinstance(inputs, PromptLayout):
            cache.conversation = Conversation.of(inputs, layout)
        return cache

    def check_model(self, model: Any) -> None:
        """Refuse a model other than the one the capsule was fitted to.

        Raises:
            ModelMismatchError: architecture or weights differ.
        """
        if not same_model(model_fingerprint(model), self.info.fingerprint):
            raise ModelMismatchError(
                f"this capsule was fitted to another {self.info.model_config.get('model_type')} model "
                "(or other weights of the same); fit one for this model with KVCapsule.fit"
            )

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
            found = self.whole_codecs().items()
            codecs = {i: codec.at(retained, lean) for i, codec in found if isinstance(codec, JointCodec)}
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
        told = self.info.codec != "adaptive" or "weights" in self.info.options
        return self if told else self.with_weights("stored")

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
                raise OptionError("joint latents choose their bits by what is retained; use with_retained")
        return type(self)(self.codecs, replace(self.info, bits=bits), self.origin)
