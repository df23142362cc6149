"""Saved capsules: replaced atomically, refused when damaged."""

from __future__ import annotations

import json
import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capsight.errors import CapsuleFileError
from capsight.files import CHECKSUM, write_header
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
    """Change the header and its checksum."""
    header = json.loads((folder / "capsule.json").read_text()) | changes
    kind, version = header["format"], header["format_version"]
    write_header(folder / "capsule.json", kind, version, {k: v for k, v in header.items() if k != CHECKSUM})


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


@pytest.mark.parametrize("change", ["kept", "swapped", "dropped", "budget", "blocks", "another"])
def test_a_header_changed_by_hand_is_refused(qwen, saved, tmp_path, change):
    header = json.loads((saved / "capsule.json").read_text())
    layers = header["layers"]
    if change == "kept":
        layers[0]["kept"] = 2
    elif change == "swapped":
        layers[0], layers[1] = layers[1] | {"index": 0}, layers[0] | {"index": 1, "kept": 3}
    elif change == "dropped":
        del header[CHECKSUM]
    elif change == "budget":
        header["options"] = {"ridge": 1.0}
    elif change == "blocks":
        header["blocks"] += 1
    else:  # the checksum of another capsule
        fitted(qwen, 0.8).save_pretrained(tmp_path / "other")
        header[CHECKSUM] = json.loads((tmp_path / "other" / "capsule.json").read_text())[CHECKSUM]
    (saved / "capsule.json").write_text(json.dumps(header))
    with pytest.raises(CapsuleFileError, match=r"capsule\.json was changed"):
        KVCapsule.from_pretrained(saved)


def test_a_header_laid_out_otherwise_is_the_same(saved):
    header = json.loads((saved / "capsule.json").read_text())
    (saved / "capsule.json").write_text(json.dumps(dict(reversed(header.items())), indent=7))
    assert KVCapsule.from_pretrained(saved).info.codec == "adaptive"


def test_writers_and_readers_at_once(qwen, tmp_path):
    """Whole capsules at every moment, and one in the end, whoever came last."""
    folder, wanted = tmp_path / "shared", (0.3, 0.5, 0.7, 0.9)
    made = [fitted(qwen, retained, codec="static") for retained in wanted]
    made[0].save_pretrained(folder)
    known = {capsule.retained for capsule in made}

    def write(capsule: KVCapsule) -> None:
        for _ in range(15):
            capsule.save_pretrained(folder)

    def look(_: int) -> set[float]:
        return {KVCapsule.from_pretrained(folder).retained for _ in range(15)}

    with ThreadPoolExecutor(8) as pool:
        writers, readers = [pool.submit(write, capsule) for capsule in made], list(pool.map(look, range(4)))
        for writer in writers:
            writer.result()
    assert set().union(*readers) <= known
    assert KVCapsule.from_pretrained(folder).retained in known
    assert len(list(folder.iterdir())) == 2


def test_writers_in_two_processes(qwen, tmp_path):
    folder, made = tmp_path / "shared", [fitted(qwen, r, codec="static") for r in (0.3, 0.7)]
    context = multiprocessing.get_context("fork")
    for _ in range(8):
        writers = [context.Process(target=capsule.save_pretrained, args=(folder,)) for capsule in made]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert KVCapsule.from_pretrained(folder).retained in {capsule.retained for capsule in made}


def test_where_folders_cannot_be_locked_nothing_is_deleted(qwen, saved, monkeypatch):
    monkeypatch.setattr("capsight.files.fcntl", None)
    fitted(qwen, 0.5, codec="static").save_pretrained(saved)
    assert KVCapsule.from_pretrained(saved).info.codec == "static"
    assert len(list(saved.iterdir())) == 3


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


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
