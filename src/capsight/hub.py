"""Folders on the Hugging Face hub: fetched as transformers fetches models, and pushed."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypedDict

import huggingface_hub

from capsight.errors import CapsuleFileError, OptionError


class HubOptions(TypedDict, total=False):
    """Where on the hub something is, as `from_pretrained` of transformers takes it.

    Attributes:
        revision: branch, tag or commit.
        token: of the account, or True for the one that is logged in.
        cache_dir: folder for what is fetched.
        local_files_only: whether to look no further than it.
        subfolder: folder inside the repository, or inside a folder given.
    """

    revision: str | None
    token: str | bool | None
    cache_dir: str | os.PathLike[str] | None
    local_files_only: bool
    subfolder: str


def check_names(hub: HubOptions) -> None:
    """Refuse options of `from_pretrained` that neither capsight nor the hub's client knows.

    Raises:
        OptionError: there is one, a misspelt `revision` perhaps.
    """
    known = [*HubOptions.__annotations__, *inspect.signature(huggingface_hub.snapshot_download).parameters]
    unknown = next((name for name in hub if name not in known), None)
    if unknown is not None:
        raise OptionError(f"from_pretrained takes {', '.join(HubOptions.__annotations__)}, not {unknown}")


def folder_of(source: str | os.PathLike[str], patterns: Sequence[str], what: str, hub: HubOptions) -> Path:
    """The folder that `source` names, on this machine or on the hub.

    Args:
        source: a folder or file, or a hub repository id.
        patterns: names of the files that are wanted of a repository.
        what: it is, for messages.
        hub: see `HubOptions`.

    Raises:
        CapsuleFileError: there is no such folder, and the hub has no such repository or cannot be reached.
    """
    given = dict(hub)
    inside = str(given.pop("subfolder", "") or "").strip("/")
    path = Path(source)
    if path.exists() or not isinstance(source, str):
        return path / inside if inside else path
    wanted = [f"{inside}/{pattern}" if inside else pattern for pattern in patterns]
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=wanted, **options)) / inside
    except TypeError:
        raise
    except Exception as error:  # the client's errors come from several libraries
        raise CapsuleFileError(
            f"there is no {what} {source!r}, and the hub does not give it: {_in_a_line(error)}"
        ) from error


def push(save: Callable[[str], Any], repo_id: str, what: str, options: dict[str, Any]) -> str:
    """Save to a folder and upload it, in one commit.

    Args:
        save: writes a folder.
        repo_id: "name" or "owner/name"; made if it does not exist.
        what: it is, for the commit's message.
        options: `token`, `private`, `revision`, `commit_message`, `create_pr`, `subfolder`.

    Returns:
        Address of the commit.

    Raises:
        CapsuleFileError: the hub does not take it.
        TypeError: an option is unknown.
    """
    given = {"commit_message": f"Upload {what}", **options}
    api = huggingface_hub.HfApi(token=given.pop("token", None))
    inside, private = given.pop("subfolder", None), given.pop("private", None)
    with TemporaryDirectory() as folder:
        save(folder)
        try:
            repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return str(
                api.upload_folder(repo_id=repository, folder_path=folder, path_in_repo=inside, **given)
            )
        except TypeError:
            raise
        except Exception as error:  # the client's errors come from several libraries
            raise CapsuleFileError(f"the hub does not take {repo_id!r}: {_in_a_line(error)}") from error


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
