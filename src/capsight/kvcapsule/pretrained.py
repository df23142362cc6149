"""`PretrainedCapsule`: what a fitted capsule is, and its bytes; how it is saved, loaded and shared."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Self, Unpack

from transformers import AutoConfig, PreTrainedConfig

from capsight.errors import CapsuleFileError
from capsight.hub import HubOptions, push
from capsight.kvcapsule.capsule_file import Origin, read_again, read_capsule, write_capsule
from capsight.kvcapsule.codecs import LayerCodec, QuantisedCodec
from capsight.kvcapsule.info import CapsuleInfo

_INDEX_NBYTES = 16  # of a run in `Placement`: row and start, shared by all layers


class PretrainedCapsule:
    """Codecs and what is known of them, in a folder or on the hub.

    Attributes:
        codecs: codec of each layer, by layer index.
        info: sizes, options, and the model it belongs to.
        origin: the file that has more of a joint capsule than its fraction needs; None for others, and where
            `codecs` have all.
    """

    def __init__(
        self, codecs: Mapping[int, LayerCodec], info: CapsuleInfo, origin: Origin | None = None
    ) -> None:
        """Join codecs and what is known of them; use `fit` or `from_pretrained` to get a capsule."""
        self.codecs, self.info, self.origin = dict(codecs), info, origin

    def whole_codecs(self) -> Mapping[int, LayerCodec]:
        """Codecs with all that was learnt: `joint` axes that get no bits are read from the file again.

        Raises:
            CapsuleFileError: the capsule was read from a file that is missing, or another one, by now.
        """
        return self.codecs if self.origin is None else read_again(self.origin)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the capsule to a folder (safetensors + JSON), atomically.

        Raises:
            CapsuleFileError: the folder cannot be written, or `origin` is gone.
        """
        write_capsule(folder, self.whole_codecs(), self.info)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **hub: Unpack[HubOptions]) -> Self:
        """Load a capsule.

        Args:
            source: "reference" for the one shipped with capsight, a folder, or a hub repository id.
            **hub: `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder`: see `HubOptions`.

        Raises:
            CapsuleFileError: it is missing, truncated, changed, or of a format this capsight does not read.
        """
        return cls(*read_capsule(source, hub))

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Save to a repository of the Hugging Face hub, which is made if need be.

        Args:
            repo_id: "name" or "owner/name".
            **options: `token`, `private`, `revision`, `commit_message`, `create_pr`, `subfolder`.

        Returns:
            Address of the commit.

        Raises:
            CapsuleFileError: the hub does not take it.
        """
        return push(self.save_pretrained, repo_id, "a capsule", options)

    def __repr__(self) -> str:
        """Codec, what is retained, and the model's type."""
        kind = self.info.model_config.get("model_type")
        size = f"{self.retained:.3g} retained, {len(self.codecs)} layers"
        return f"{type(self).__name__}({self.name}, {kind}, {size})"

    @property
    def stored(self) -> Mapping[int, LayerCodec | QuantisedCodec]:
        """What caches use for each layer: `codecs`, or those that quantise around them."""
        bits = self.info.bits
        if bits is None:
            return self.codecs
        return {index: QuantisedCodec(codec, bits) for index, codec in self.codecs.items()}

    @property
    def config(self) -> PreTrainedConfig:
        """Config of the model that the capsule was fitted to.

        Raises:
            CapsuleFileError: this transformers does not know it.
        """
        values = dict(self.info.model_config)
        try:
            return AutoConfig.for_model(values.pop("model_type"), **values)
        except (KeyError, ValueError, TypeError) as error:
            raise CapsuleFileError(
                f"the capsule's model config cannot be read ({error}); pass config="
            ) from error

    @property
    def name(self) -> str:
        """Name of the codec, and stored bits: "heads", "heads-int8"."""
        return self.info.codec + ("" if self.info.bits is None else f"-int{self.info.bits}")

    @property
    def needs_attention(self) -> bool:
        """Whether evicted tokens have to be hidden by capsight's attention function."""
        return self.info.codec in ("heads", "evict")

    @property
    def rebuilds(self) -> bool:
        """Whether evicted tokens are rebuilt: else attention is best left to read the kept ones alone."""
        return self.info.codec not in ("joint", "heads", "evict")

    @property
    def retained(self) -> float:
        """Average retained fraction over the layers."""
        return sum(codec.retained for codec in self.codecs.values()) / len(self.codecs)

    @property
    def module_nbytes(self) -> int:
        """Bytes of the codecs' own tensors, resident once per model.

        Of the joint codec, axes that get bits at this fraction. The others lie in its file; those of a
        capsule that was fitted just now wait in host memory, and are not counted.
        """
        return sum(codec.module_nbytes for codec in self.codecs.values())

    def break_even_tokens(self, batch: int = 1) -> int | None:
        """Vision tokens per row from which capsules and modules together are smaller than the full cache.

        Args:
            batch: rows that share the modules.

        Returns:
            The smallest such number of tokens, a multiple of the block size; None if capsules save nothing.
        """
        info, stored = self.info, self.stored
        size, item = info.block_size, info.itemsize
        saved = 0.0 if size == 1 else -_INDEX_NBYTES  # a run of single tokens is a whole image
        for layer in info.layers:
            full = 2 * size * layer.heads * layer.head_dim * item
            saved += full - stored[layer.index].payload_nbytes(layer.heads, layer.head_dim, item)
        return size * int(self.module_nbytes // (saved * batch) + 1) if saved > 0 else None
