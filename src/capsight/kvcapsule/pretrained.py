"""`PretrainedCapsule`: how a capsule is saved, loaded and shared."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Self, Unpack

from capsight.hub import HubOptions, push
from capsight.kvcapsule.capsule_file import read_capsule, write_capsule
from capsight.kvcapsule.codecs import LayerCodec
from capsight.kvcapsule.info import CapsuleInfo


class PretrainedCapsule:
    """Codecs and what is known of them, in a folder or on the hub.

    Attributes:
        codecs: codec of each layer, by layer index.
        info: sizes, options, and the model it belongs to.
    """

    def __init__(self, codecs: Mapping[int, LayerCodec], info: CapsuleInfo) -> None:
        """Join codecs and what is known of them; use `fit` or `from_pretrained` to get a capsule."""
        self.codecs, self.info = dict(codecs), info

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the capsule to a folder (safetensors + JSON), atomically.

        Raises:
            CapsuleFileError: the folder cannot be written.
        """
        write_capsule(folder, self.codecs, self.info)

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
