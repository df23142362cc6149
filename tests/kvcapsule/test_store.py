"""Saved capsules: replaced atomically, refused when damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capsight.errors import CapsuleFileError
from capsight.kvcapsule import KVCapsule
from kvcapsule.conftest import fitted


@pytest.fixture
def saved(qwen, tmp_path):
    fitted(qwen).save_pretrained(tmp_path / "capsule")
    return tmp_path / "capsule"


def test_saving_again_replaces_and_leaves_no_litter(qwen, saved):
    other = fitted(qwen, 0.8)
    other.with_retained(0.5).save_pretrained(saved)
    assert KVCapsule.from_pretrained(saved).retained == 0.5
    fitted(qwen, 0.5, codec="static").save_pretrained(saved)
    assert KVCapsule.from_pretrained(saved).info.codec == "static"
    assert len(list(saved.iterdir())) == 2
    with pytest.raises(CapsuleFileError, match="cannot write"):
        other.save_pretrained(saved / "capsule.json" / "below")
    assert KVCapsule.from_pretrained(saved).info.codec == "static"


def test_a_full_disk_loses_nothing(qwen, saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    monkeypatch.setattr(
        "os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(CapsuleFileError, match="No space left"):
        fitted(qwen, codec="static").save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def edit_header(folder: Path, **changes: object) -> None:
    header = json.loads((folder / "capsule.json").read_text())
    (folder / "capsule.json").write_text(json.dumps(header | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 99}, "format version 99"),
        ({"format": "something"}, "does not describe"),
        ({"sha256": "0"}, "checksum"),
        ({"tensors": "../../etc/passwd"}, "does not name"),
        ({"tensors": "capsule-0123456789abcdef.safetensors"}, "missing"),
        ({"codec": "magic"}, "magic"),
        ({"block_size": 8}, "layer 0"),
        ({"block_size": "16"}, "block_size"),
        ({"layers": []}, "no layers"),
        ({"layers": [{"index": 0}]}, "malformed layer"),
        ({"layers": [{"index": 0, "kept": 0, "heads": 2, "head_dim": 16}]}, "kept"),
        ({"layers": [{"index": 0, "kept": 99, "heads": 2, "head_dim": 16}]}, "keeps between"),
        ({"layers": [{"index": 0, "kept": 6, "heads": 3, "head_dim": 16}]}, "layer 0"),
        ({"layers": [{"index": 0, "kept": 6, "heads": 2, "head_dim": 16}]}, "does not list"),
        ({"layers": [{"index": 7, "kept": 6, "heads": 2, "head_dim": 16}]}, "layer 7"),
        ({"fingerprint": None}, "fingerprint"),
        ({"model_config": []}, "model_config"),
    ],
)
def test_malformed_headers_are_refused(saved, changes, message):
    edit_header(saved, needs=None, **changes)  # else those would be found not to fit first
    with pytest.raises(CapsuleFileError, match=message):
        KVCapsule.from_pretrained(saved)


def test_missing_truncated_and_tampered_files_are_refused(saved, tmp_path):
    tensors = next(saved.glob("*.safetensors"))
    data = bytearray(tensors.read_bytes())
    tensors.write_bytes(data[:-3])
    with pytest.raises(CapsuleFileError, match="truncated"):
        KVCapsule.from_pretrained(saved)
    data[-1] ^= 1
    tensors.write_bytes(data)
    with pytest.raises(CapsuleFileError, match="changed"):
        KVCapsule.from_pretrained(saved)
    (saved / "capsule.json").write_text("{")
    with pytest.raises(CapsuleFileError, match="not JSON"):
        KVCapsule.from_pretrained(saved)
    for missing in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(CapsuleFileError, match="missing"):
            KVCapsule.from_pretrained(missing)
    with pytest.raises(CapsuleFileError, match="no folder"):
        KVCapsule.from_pretrained("not a repository name!")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_gives_a_capsule_file_error_or_the_same_capsule(saved, data):
    path = data.draw(st.sampled_from(sorted(saved.iterdir())))
    good = path.read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    try:
        path.write_bytes(
            good[:at] + data.draw(st.binary(max_size=3)) + good[at + data.draw(st.integers(0, 3)) :]
        )
        KVCapsule.from_pretrained(saved).retained  # noqa: B018
    except CapsuleFileError:
        pass
    finally:
        path.write_bytes(good)


def test_no_temporary_files_stay(saved):
    assert sorted(path.suffix for path in saved.iterdir()) == [".json", ".safetensors"]
