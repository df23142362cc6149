"""`KVCapsule`: a fitted capsule - fit it, save it, load it, make caches with it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, Self

from transformers import PreTrainedConfig, PreTrainedModel

from capsight.errors import ModelMismatchError
from capsight.execution import check_whole, inputs_device, own_precision
from capsight.kvcapsule.cache import CapsuleCache
from capsight.kvcapsule.cache.conversation import Conversation
from capsight.kvcapsule.calibration.config import CapsuleConfig
from capsight.kvcapsule.calibration.fit_capsule import fit_capsule
from capsight.kvcapsule.calibration.processes import Processes
from capsight.kvcapsule.fitted import FittedCapsule
from capsight.layout import PromptLayout, build_layout
from capsight.model_fingerprint import model_fingerprint, same_model
from capsight.processors import AnyProcessor


class KVCapsule(FittedCapsule):
    """Codecs for all full-attention layers of one model; after KVCapsule (arXiv 2605.16439), codecs our own.

    Attributes:
        codecs: codec of each layer, by layer index.
        info: sizes, options, and the model it belongs to.
    """

    @classmethod
    def fit(
        cls,
        model: PreTrainedModel,
        processor: AnyProcessor | None,
        samples: Iterable[Any],
        config: CapsuleConfig | float | None = None,
        codec: str | None = None,
        block_size: int | None = None,
        *,
        progress: bool = True,
        resume: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> Self:
        """Fit to a model in one pass over calibration samples.

        Where torch.distributed runs several processes, each with the whole model, they share the samples
        out: each reads its own and all return the same capsule, that of one process up to rounding.

        Args:
            model: a transformers vision-language model of a family that `build_layout` knows.
            processor: its processor; may be None where all samples are processor outputs.
            samples: processor outputs (any batch size) or lists of chat messages, with images.
            config: what the capsule is to be like; a number says what to retain, None takes the defaults.
            codec: instead of that of `config`.
            block_size: instead of that of `config`.
            progress: show a progress bar (tqdm, on stderr).
            resume: folder where the pass leaves, every half minute, what it has added up; a fit that was
                interrupted goes on from there, given the same samples. Remove it afterwards.
            **options: its other fields, `compression_ratio` (1 - `retained`), and the codec's own options:
                `KVCapsule.fit(..., codec="heads", retained=0.2, bits=8, ridge=1e-3)`.

        Raises:
            CalibrationError: no image is as long as a block, keys or values are not finite, or `resume`
                holds the pass of another model, block size or samples.
            CapsuleFileError: `resume` cannot be read or written.
            ElsewhereError: another process failed; a `CalibrationError`.
            OptionError: an option is unknown or out of range.
            UnsupportedModelError: the model is none that capsight can run.
        """
        processes = Processes.launched()
        with processes.together():
            named = {"codec": codec, "block_size": block_size}
            chosen = CapsuleConfig.of(config, options | {k: v for k, v in named.items() if v is not None})
            check_whole(model)
            with own_precision(inputs_device(model)):
                return cls(*fit_capsule(model, processor, samples, chosen, progress, resume, processes))

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
        cache.lean, cache.fitted_to = not self.rebuilds, self.info.fingerprint
        if not isinstance(inputs, PromptLayout):
            cache.conversation = Conversation.of(inputs, layout)
        return cache

    def check_model(self, model: PreTrainedModel) -> None:
        """Refuse a model other than the one the capsule was fitted to.

        Raises:
            ModelMismatchError: architecture or weights differ.
        """
        if not same_model(model_fingerprint(model), self.info.fingerprint):
            raise ModelMismatchError(
                f"this capsule was fitted to another {self.info.model_config.get('model_type')} model "
                "(or other weights of the same); fit one for this model with KVCapsule.fit"
            )
