"""Prompts whose images a store knows: their latents are taken from it, and only text is read."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from capsight.adapters import adapters_fingerprint
from capsight.errors import CapsuleFileError, CapsuleStoreWarning, OptionError
from capsight.kvcapsule import CapsuleCache, KVCapsule
from capsight.kvcapsule.cache.conversation import Conversation
from capsight.kvcapsule.cache_parts import deserialize
from capsight.kvcapsule.codecs.entropy import check_coder
from capsight.kvcapsule.rest import CapsuleStore, ImageKey
from capsight.kvcapsule.rest.parts import (
    can_reread,
    image_sizes,
    joint_codec,
    open_latents,
    packed,
)
from capsight.layout import PromptLayout, build_layout
from capsight.layout.pixels import VISION_PREFIXES, select_images
from capsight.runtime.options import check_options
from capsight.runtime.split import PIXEL_PREFIXES, TOKEN_ENTRIES, prompt_entries
from capsight.runtime.text_pass import can_read_text, read_text

Read = Callable[..., CapsuleCache]
"""Prefills the images of processor outputs: `encapsulate` of a `FastModel` without its store."""


def check_store(store: CapsuleStore, capsule: Any, config: Any) -> None:
    """Refuse what a store cannot serve, before anything is read.

    Raises:
        OptionError: it is no store, the capsule is not a joint one, the entropy coder is not installed, or
            the model's text cannot be read without pixels.
    """
    if not isinstance(store, CapsuleStore):
        raise OptionError(f"store= takes a CapsuleStore, such as CapsuleStore('folder'), not {store!r}")
    if not isinstance(capsule, KVCapsule):
        raise OptionError("a store holds images of a KVCapsule; pass capsule=")
    joint_codec(capsule)
    check_coder()
    if not can_read_text(config):
        raise OptionError(
            "text of this model cannot be read without its images: layers with states or sliding windows, or "
            "delimiters from the vision tower, hold more of them than a store does; leave store= out"
        )


def read_with_store(fast: Any, store: CapsuleStore, inputs: Mapping[str, Any], read: Read) -> CapsuleCache:
    """A cache of the images of a prompt, as far as may be from the store; what it did not have is put there.

    Prompts that a store cannot serve are read as without one: batches of several rows, image tokens outside
    images, and whatever is given beside what a processor writes, such as positions of one's own.

    Args:
        fast: a `FastModel`, whose capsule is as `check_store` says.
        store: the store.
        inputs: processor outputs up to the last image.
        read: prefills images.
    """
    layout = build_layout(inputs, fast.model.config)
    ids = inputs["input_ids"].detach().cpu()
    if not layout.vision_tokens or not can_reread(layout, ids) or _more_than_prompts(inputs):
        return read(**inputs)
    pages = _Pages(fast, store, dict(inputs), layout, ids)
    return pages.anywhere(read) if store.reuse == "anywhere" else pages.prefix(read)


class _Pages:
    """One prompt and its images."""

    def __init__(
        self, fast: Any, store: CapsuleStore, inputs: dict[str, Any], layout: PromptLayout, ids: Tensor
    ) -> None:
        self._store, self._model, self._capsule, self._inputs = store, fast.model, fast.capsule, inputs
        self._layout, self._ids, self._codec = layout, ids, joint_codec(fast.capsule)
        sparse = fast.head_map
        self._adapters = adapters_fingerprint(fast.model)
        self._read_as = self._adapters + ("" if sparse is None else f"{sparse.categories} {sparse.options}")
        self._spans = _spans(layout)
        self._sizes = image_sizes(layout)
        self._keys = list(self._made_keys())

    def prefix(self, read: Read) -> CapsuleCache:
        """Images from the first on, as long as the store has them after what stands before them here."""
        stored: list[Tensor] = []
        for index in range(len(self._keys)):
            if (latents := self._get(index)) is None:
                break
            stored.append(latents)
        cache = self._joined(stored) if stored else None
        if len(stored) < len(self._keys):
            cache = read(**self._inputs, **({} if cache is None else {"past_key_values": cache}))
            self._put_all(range(len(stored), len(self._keys)), cache)
        assert cache is not None
        return cache

    def anywhere(self, read: Read) -> CapsuleCache:
        """All images from the store, those that it does not have after reading each by itself."""
        latents = []
        for index, key in enumerate(self._keys):
            image_latents = self._get(index)
            if image_latents is None:
                cache = read(**self._alone(index))
                image_latents = open_latents(cache, self._codec)
                self._put(key if key.first else self._key_alone(index), image_latents)
            latents.append(image_latents)
        return self._joined(latents)

    def _joined(self, latents: Sequence[Tensor]) -> CapsuleCache:
        """A cache of the prompt up to as many images as there are latents."""
        end = self._spans[len(latents) - 1][1]
        layout, payload = self._layout.prefix(end), packed(torch.cat(list(latents)), self._codec)
        text = read_text(self._model, self._capsule.codecs, layout, self._ids[:, :end], payload)
        first = min(self._capsule.codecs)
        tensors = {f"layers.{first}.capsule.{name}": x for name, x in payload.tensors.items()}
        for index, exact in text.items():
            tensors[f"layers.{index}.exact"] = exact
            tensors[f"layers.{index}.tail"] = exact.new_empty(2, 1, 0, *exact.shape[2:])
        devices = {index: exact.device for index, exact in text.items()}
        header = {"layout": layout.to_dict(), "settled": end, "sliding": {}}
        cache = deserialize(header, tensors, self._capsule, self._model.config, devices)
        conversation = Conversation.of(self._inputs, self._layout)
        images = tuple(row[: len(latents)] for row in conversation.images)
        cache.conversation = Conversation(cache.layout, self._ids[:, :end], end, images)
        cache.adapters = self._adapters
        return cache

    def _alone(self, index: int) -> dict[str, Any]:
        """Processor outputs of one image after what stands before the first."""
        start, end = self._spans[index]
        head = self._spans[0][0]
        columns = torch.cat((torch.arange(head), torch.arange(start, end)))
        tokens = {
            name: value[..., columns.to(value.device)]
            for name, value in self._inputs.items()
            if name in TOKEN_ENTRIES
        }
        return {**tokens, **select_images(self._inputs, self._layout, {(0, index)})}

    def _key_alone(self, index: int) -> ImageKey:
        return ImageKey(self._keys[index].image, self._keys[0].before, True)

    def _made_keys(self) -> Any:
        before = hashlib.sha256()
        at = 0
        for index, (start, end) in enumerate(self._spans):
            before.update(self._ids[0, at:start].numpy().tobytes())
            ids = self._ids[0, start:end]
            image = _image_hash(self._inputs, self._layout, index, ids, self._read_as)
            yield ImageKey(image, before.hexdigest()[:32], index == 0)
            before.update(image.encode())
            at = end

    def _get(self, index: int) -> Tensor | None:
        latents = self._store.get(self._keys[index], self._capsule, self._model.dtype)
        return latents if latents is not None and len(latents) == self._sizes[index] else None

    def _put_all(self, indices: Sequence[int], cache: CapsuleCache) -> None:
        latents = open_latents(cache, self._codec).split(self._sizes)
        for index in indices:
            self._put(self._keys[index], latents[index])

    def _put(self, key: ImageKey, latents: Tensor) -> None:
        try:
            self._store.put(key, latents, self._capsule, self._model.dtype)
        except (CapsuleFileError, OptionError) as error:
            warnings.warn(f"an image was not stored: {error}", CapsuleStoreWarning, stacklevel=5)


def _more_than_prompts(inputs: Mapping[str, Any]) -> bool:
    """Whether inputs say anything of how images are read that neither their tokens nor their pixels do."""
    prompt = {*TOKEN_ENTRIES, "use_cache"} - {"position_ids"}
    return any(
        value is not None and name not in prompt and not name.startswith(VISION_PREFIXES)
        for name, value in inputs.items()
    )


def _spans(layout: PromptLayout) -> list[tuple[int, int]]:
    """First and last token of each image, delimiters and what stands between its tiles included."""
    row = layout.rows[0]
    spans = []
    for image in dict.fromkeys(block.image for block in row.blocks):
        blocks = row.image_blocks(image)
        start = min(min((block.start, *block.delimiters)) for block in blocks)
        spans.append((start, max(block.reach for block in blocks)))
    return spans


def _image_hash(
    inputs: Mapping[str, Any], layout: PromptLayout, image: int, ids: Tensor, read_as: str
) -> str:
    """Hash of all that a model is given of an image, its own tokens included, and of how it is read."""
    digest = hashlib.sha256(read_as.encode() + ids.numpy().tobytes())
    digest.update(
        str([(b.kind, b.grid, b.frame_seconds) for b in layout.rows[0].image_blocks(image)]).encode()
    )
    for name, value in sorted(select_images(inputs, layout, {(0, image)}).items()):
        value = torch.as_tensor(value).detach().cpu().contiguous()
        if value.is_floating_point():
            value = value.bfloat16()  # a cast of the inputs changes nothing
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def images_first(fast: Any, inputs: dict[str, Any]) -> tuple[CapsuleCache | None, dict[str, Any]]:
    """Read the images of a prompt before what follows them.

    Args:
        fast: a `FastModel` with a store.
        inputs: processor outputs and options of `generate`.

    Returns:
        Their cache, and the inputs without pixels; None and the inputs where nothing follows the last image.
    """
    layout = build_layout(inputs, fast.model.config)
    if not 0 < layout.last_vision_end < layout.length:
        return None, inputs
    check_options(inputs, layout.last_vision_end, fast.model)
    cache = fast.encapsulate(**prompt_entries(inputs, fast.model))
    return cache, {k: v for k, v in inputs.items() if not k.startswith(PIXEL_PREFIXES)}
