"""`enable`: the one way in. Inside the context a model runs with capsules; outside it is what it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from transformers import PreTrainedModel

from capsight.attention_swap import attention_fits
from capsight.blindsight import HeadMap
from capsight.errors import OptionError
from capsight.execution import check_generates, check_whole
from capsight.kvcapsule import CacheMethod, LatentMethod
from capsight.kvcapsule.rest import CapsuleStore
from capsight.model_fingerprint import model_fingerprint
from capsight.runtime.calls import serving
from capsight.runtime.decode import Decode, check_decode
from capsight.runtime.fast_model import FastModel
from capsight.runtime.prefill import Prefill, check_prefill
from capsight.runtime.stored import check_store
from capsight.runtime.switch import capsight_attention_on


@contextmanager
def enable(
    model: PreTrainedModel,
    *,
    capsule: CacheMethod | None = None,
    head_map: HeadMap | None = None,
    decode: Decode | None = None,
    store: CapsuleStore | None = None,
    prefill: Prefill = "auto",
) -> Iterator[FastModel]:
    """Run a model with capsules, with sparse prefill, or with both.

    Args:
        model: a transformers vision-language model of a supported family; also wrapped by PEFT,
            `torch.compile` or accelerate.
        capsule: a `KVCapsule` fitted to this very model, or one of `capsight.baselines`.
        head_map: calibrated on this very model; prefill then skips what its heads do not use (see `prefill`).
        decode: "materialise" rebuilds keys and values one layer at a time for the model's own
            attention; "latent" attends to capsules as they are, which is faster, with an attention
            function of capsight's, and has an `adaptive` capsule store its weights unless it was told
            not to (`KVCapsule.with_weights`). Both give the same up to rounding. By default capsules
            that rebuild nothing are read as they are where that is possible, and others are rebuilt.
        store: where images are looked for that were read before, and put once they are (joint capsules);
            images are then read before the question, as by `encapsulate`.
        prefill: "auto" follows the head map only where that was measured to be faster on this device: a
            shorter prompt (on CPUs one of less than 2,048 tokens) is read by the model's own attention, with
            its exact outputs. "sparse" follows it at any length: to see what it does to answers. With a
            store, whose images are read once for prompts of all lengths, "auto" does so, too.

    Yields:
        A `FastModel`: `generate` takes what `model.generate` takes.

    Raises:
        ModelMismatchError: the capsule or the head map was made for another model.
        OptionError: something is of the wrong kind, `decode` or `prefill` is neither, the method has no
            capsules to attend to, or cannot go with a store.
        UnsupportedModelError: it is no transformers model, its architecture is not known, or the method
            cannot run on it, as those that need capsight's attention on a model whose own caps scores or has
            sinks.

    Example:
        >>> with capsight.enable(model, capsule=capsule) as fast:
        ...     tokens = fast.generate(**inputs, max_new_tokens=32)
    """
    _check_kinds(model, capsule, head_map)
    if decode is None:
        lean = isinstance(capsule, LatentMethod) and not capsule.rebuilds
        decode = "latent" if lean and attention_fits(model) else "materialise"
    check_decode(decode)
    check_prefill(prefill)
    if capsule is not None or head_map is not None:
        check_whole(model)
    if capsule is not None:
        capsule.check_model(model)
    if decode == "latent":
        if not isinstance(capsule, LatentMethod):
            raise OptionError('decode="latent" attends to capsules; pass capsule=, a KVCapsule')
        capsule = capsule.for_latent()
    text = model.config.get_text_config()
    if head_map is not None:
        fingerprint = model_fingerprint(model) if head_map.model else ""
        head_map.check(text.num_hidden_layers, text.num_attention_heads, fingerprint)
    if store is not None:
        check_store(store, capsule, model.config)
    fast = FastModel(model, capsule, head_map, decode, store, prefill if store is None else "sparse")
    needs_attention = (
        head_map is not None or decode == "latent" or (capsule is not None and capsule.needs_attention)
    )
    with capsight_attention_on(model) if needs_attention else nullcontext(), serving(fast):
        yield fast


def _check_kinds(model: object, capsule: object, head_map: object) -> None:
    """Refuse names and classes in the place of what they name."""
    check_generates(model)
    if capsule is not None and (isinstance(capsule, type) or not hasattr(capsule, "check_model")):
        raise OptionError(
            "capsule= takes a KVCapsule, such as KVCapsule.from_pretrained('folder'), or a method of "
            f"capsight.baselines, not {capsule!r:.60}"
        )
    if head_map is not None and not isinstance(head_map, HeadMap):
        raise OptionError(
            f"head_map= takes a HeadMap, such as HeadMap.from_pretrained('folder'), not {head_map!r:.60}"
        )
