"""Capsules and head maps on the hub: a stand-in for it notes what is asked, and gives what was pushed."""

from __future__ import annotations

import fnmatch
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest

from capsight import HeadMap, KVCapsule
from capsight.errors import CapsuleFileError, OptionError


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The folder of repositories, and the calls so far."""
    calls = []

    class Api:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, repo_id, *, private, exist_ok):
            calls.append((self.token, private))
            return SimpleNamespace(repo_id="me/" + repo_id)

        def upload_folder(self, *, repo_id, folder_path, path_in_repo, commit_message, **rest):
            assert not rest
            shutil.copytree(folder_path, tmp_path / repo_id / (path_in_repo or ""), dirs_exist_ok=True)
            return f"https://hub/{repo_id}/{commit_message}"

    def snapshot_download(repo_id, *, allow_patterns, **options):
        calls.append(options)
        if not (tmp_path / repo_id).is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError("not there")
        fetched = tmp_path / "cache" / repo_id
        for path in (tmp_path / repo_id).rglob("*"):
            name = str(path.relative_to(tmp_path / repo_id))
            if path.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (fetched / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, fetched / name)
        return str(fetched)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


@pytest.mark.parametrize("inside", [None, "a/b"])
def test_what_was_pushed_comes_back(hub, inside):
    where = {} if inside is None else {"subfolder": inside}
    capsule, head_map = KVCapsule.from_pretrained("reference"), HeadMap.from_pretrained("reference")
    for thing in (capsule, head_map):
        assert thing.push_to_hub("thing", token="t", private=True, **where).startswith("https://hub/me/thing")
        assert hub[-1] == ("t", True)
        options = {"revision": "v1", "token": "t", "cache_dir": "c"}
        back = type(thing).from_pretrained("me/thing", **options, **where)
        assert hub[-1] == options
        if thing is head_map:
            assert back == head_map
        else:
            assert back.info == capsule.info
            assert repr(back) == repr(capsule)


def test_subfolders_of_folders_and_what_is_not_there(hub, tmp_path):
    for thing in (KVCapsule.from_pretrained("reference"), HeadMap.from_pretrained("reference")):
        thing.save_pretrained(tmp_path / "all" / "one")
        type(thing).from_pretrained(tmp_path / "all", subfolder="one")
        with pytest.raises(CapsuleFileError, match="hub does not give it"):
            type(thing).from_pretrained("me/nothing", revision="x")


@pytest.mark.parametrize("cls", [KVCapsule, HeadMap])
def test_misspelt_options_are_refused_wherever_it_is_loaded_from(cls, tmp_path):
    for source in ("reference", tmp_path, "somebody/something"):
        with pytest.raises(OptionError, match="not revison"):
            cls.from_pretrained(source, revison="main")


def test_what_is_loaded_says_what_it_is_in_a_line():
    for loaded in (KVCapsule.from_pretrained("reference"), HeadMap.from_pretrained("reference")):
        said = repr(loaded)
        assert said.startswith(type(loaded).__name__)
        assert "layers" in said
        assert len(said) < 150


@pytest.mark.parametrize("error", [OSError("no route"), RuntimeError("refused\nby the proxy")])
def test_a_hub_that_cannot_be_reached_is_told_in_a_line(monkeypatch, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fails)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    for thing in (KVCapsule.from_pretrained("reference"), HeadMap.from_pretrained("reference")):
        for call in (thing.push_to_hub, type(thing).from_pretrained):
            with pytest.raises(CapsuleFileError, match="me/thing") as caught:
                call("me/thing")
            assert "\n" not in str(caught.value)
