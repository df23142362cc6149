"""What goes to rest: the latents of a joint cache by image, and whether token ids say the rest."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from capsight.errors import CapsightError, OptionError
from capsight.kvcapsule.cache import CapsuleCache
from capsight.kvcapsule.capsule import KVCapsule
from capsight.kvcapsule.codecs import JointCodec, Payload
from capsight.kvcapsule.codecs.joint_coarse import is_coarse, typical_loss
from capsight.kvcapsule.codecs.joint_payload import JointPayload
from capsight.kvcapsule.codecs.levels import pack, unpack
from capsight.kvcapsule.fingerprint import tensors_fingerprint
from capsight.kvcapsule.rest.axes import coarse
from capsight.kvcapsule.rest.latents import check_quality
from capsight.layout import PromptLayout

USUAL_TOKENS = 10_000
"""Vision tokens that share a capsule's file: about a hundred images."""
_MOST_LOST = 0.5  # share of the variance
_LEARNT: WeakKeyDictionary[KVCapsule, str] = WeakKeyDictionary()


def learnt_fingerprint(capsule: KVCapsule) -> str:
    """Hash of what a joint capsule learnt; the same at every retained fraction. Computed once a capsule.

    Means, and what bits cost in every group, stand for the axes that they were measured with.
    """
    if (known := _LEARNT.get(capsule)) is None:
        tensors: dict[str, Tensor] = {}
        for i, codec in capsule.codecs.items():
            state = codec.state_dict().items()
            tensors |= {f"{i}.{name}": x for name, x in state if name not in ("axes", "steps")}
        known = _LEARNT[capsule] = tensors_fingerprint(tensors, [capsule.info.codec])
    return known


def joint_codec(capsule: KVCapsule) -> JointCodec:
    """The first layer's codec.

    Raises:
        OptionError: the capsule is not of the joint codec, or stores nothing.
    """
    codec = next(iter(capsule.codecs.values()))
    if not isinstance(codec, JointCodec) or capsule.retained == 1:
        raise OptionError(
            "quality= is for latents of the joint codec that retain less than 1; leave it out, or fit with "
            "codec='joint'"
        )
    return codec


def for_rest(capsule: KVCapsule, quality: float, tokens: int = USUAL_TOKENS) -> KVCapsule:
    """A joint capsule with no more than images at rest of a quality need: its file is many times smaller.

    Axes that such images hardly use are left out. The others are rounded until the file and the images
    together lose least for their bytes (see `axes`), and entropy coded in files. Write images with the
    capsule that reads them: what one of the two capsules wrote at rest the other reads, but loses more.
    Caches are made with these axes as well.

    Args:
        capsule: the whole one.
        quality: of images, as `save` and stores take it; the axes' rounding is lost beside it.
        tokens: vision tokens that will be at rest with this capsule, of all images together. Twice as many
            get finer axes, and a larger file.

    Raises:
        CapsuleFileError: the capsule's file is gone, from which its axes are read again.
        OptionError: the capsule is of another codec or made by this, `quality` is not between 0 and 1, or
            `tokens` is no positive whole number, or too small for such a file.
    """
    if is_coarse(joint_codec(capsule).axes):
        raise OptionError("this capsule is for rest already: its axes are rounded; give the whole one")
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise OptionError(f"tokens is how many vision tokens will be at rest, a whole number, not {tokens!r}")
    whole = {i: codec for i, codec in capsule.whole_codecs().items() if isinstance(codec, JointCodec)}
    small = coarse({i: codec.whole() for i, codec in whole.items()}, check_quality(quality), tokens)
    made = {i: JointCodec(small[i], codec.share) for i, codec in whole.items()}
    if (lost := typical_loss(next(iter(made.values())))) > _MOST_LOST:
        raise OptionError(
            f"a file that {tokens} tokens share would lose {lost:.0%} of the variance; give more tokens, or "
            "a higher quality"
        )
    return KVCapsule(made, capsule.info)


def open_latents(cache: CapsuleCache, codec: JointCodec) -> Tensor:
    """Latents float32 `[T, R]` of all vision tokens of a cache, by row, then position."""
    payload = next(iter(cache.capsule_layers.values())).payload
    if payload is None:
        raise CapsightError("the cache holds no image; encapsulate a prompt with images before saving it")
    tensors = payload.tensors
    return unpack(tensors["codes"].cpu(), tensors["scales"].cpu(), codec.levels, torch.float32)


def packed(latents: Tensor, codec: JointCodec) -> Payload:
    """Latents `[T, R]` as a cache of the codec holds them."""
    wide = torch.nn.functional.pad(latents, (0, max(codec.levels.rank - latents.shape[1], 0)))
    return JointPayload(dict(zip(("codes", "scales"), pack(wide, codec.levels), strict=True)))


def image_sizes(layout: PromptLayout) -> list[int]:
    """Vision tokens of each image, by row, then order."""
    sizes: dict[tuple[int, int], int] = {}
    for index, row in enumerate(layout.rows):
        for block in row.blocks:
            sizes[index, block.image] = sizes.get((index, block.image), 0) + block.num_tokens
    return list(sizes.values())


def can_reread(layout: PromptLayout, ids: Tensor) -> bool:
    """Whether ids say all that the text of a prompt is: one row, and no vision token outside images."""
    if layout.batch_size > 1 or layout.rows[0].pad_left or ids.shape[1] < layout.length:
        return False
    vision = torch.zeros(layout.length, dtype=torch.bool)
    for block in layout.rows[0].blocks:
        vision[block.start : block.end] = True
    return not torch.isin(ids[0, ~vision], ids[0, vision]).any()
