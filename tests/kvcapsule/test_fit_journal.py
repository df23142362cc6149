"""An interrupted fit goes on where it was, and with nothing else."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from capsight.errors import CalibrationError, CapsuleFileError
from capsight.files import CHECKSUM, write_header
from capsight.kvcapsule import KVCapsule
from capsight.kvcapsule.calibration import fit as fitting
from capsight.kvcapsule.calibration import fit_journal
from tiny import FAMILIES

COUNT = 5


@pytest.fixture(scope="module")
def qwen():
    return FAMILIES["qwen2_5_vl"]()


@pytest.fixture(autouse=True)
def write_at_once(monkeypatch):
    monkeypatch.setattr(fit_journal, "EVERY", 0.0)


def samples(qwen, count=COUNT, first=0):
    return [qwen.inputs([([qwen.picture(first + n, (96, 64))], f"what {n}")]) for n in range(count)]


def fit(qwen, given, folder=None, block_size=8):
    options = {"codec": "heads", "block_size": block_size, "progress": False}
    return KVCapsule.fit(qwen.model, None, given, resume=folder, **options)


def stopped_after(given, count):
    yield from given[:count]
    raise KeyboardInterrupt


@pytest.fixture
def interrupted(qwen, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(qwen, stopped_after(samples(qwen), 3), tmp_path / "x.partial")
    return tmp_path / "x.partial"


def test_it_ends_as_if_nothing_had_happened(qwen, interrupted, monkeypatch):
    plain, prefilled, add = fit(qwen, samples(qwen)), [], fitting.add_sample

    def counted(*arguments):
        prefilled.append(1)
        add(*arguments)

    monkeypatch.setattr(fitting, "add_sample", counted)
    again = fit(qwen, samples(qwen), interrupted)
    assert len(prefilled) == COUNT - 3
    assert again.info == plain.info
    for index, codec in plain.codecs.items():
        for name, tensor in codec.state_dict().items():
            assert torch.equal(tensor, again.codecs[index].state_dict()[name])
    assert fit(qwen, samples(qwen), interrupted).info == plain.info  # all seen: nothing is left to do
    assert len(prefilled) == COUNT - 3


def test_other_samples_models_and_sizes_are_refused(qwen, interrupted):
    with pytest.raises(CalibrationError, match="other samples"):
        fit(qwen, samples(qwen, first=7), interrupted)
    with pytest.raises(CalibrationError, match="more samples"):
        fit(qwen, samples(qwen, 2), interrupted)
    with pytest.raises(CalibrationError, match="another model"):
        fit(FAMILIES["smolvlm"](), [], interrupted)
    with pytest.raises(CalibrationError, match="another block size"):
        fit(qwen, samples(qwen), interrupted, block_size=4)


def test_damage_is_noticed_and_what_is_there_stays(qwen, interrupted):
    (file,) = interrupted.glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    with pytest.raises(CapsuleFileError, match="checksum"):
        fit(qwen, samples(qwen), interrupted)
    file.write_bytes(whole)
    header = (interrupted / "capsule.json").read_text()
    for old, new in (('"samples": 3', '"samples": "x"'), ('"sampled"', '"simple"'), ('"blocks"', '"rocks"')):
        changed = json.loads(header.replace(old, new))
        del changed[CHECKSUM]
        write_header(interrupted / "capsule.json", changed["format"], changed["format_version"], changed)
        with pytest.raises(CapsuleFileError, match="interrupted fit"):
            fit(qwen, samples(qwen), interrupted)
    (interrupted / "capsule.json").write_text(header)
    fit(qwen, samples(qwen), interrupted)


def spoil(folder, how):
    header, (tensors,) = folder / "capsule.json", folder.glob("*.safetensors")
    if how == "cut header":
        header.write_bytes(header.read_bytes()[:-9])
    elif how == "no tensors":
        tensors.unlink()
    elif how == "another version":
        write_header(header, fit_journal.KIND, 3, json.loads(header.read_text()))
    elif how == "a capsule":
        KVCapsule.from_pretrained("reference-heads").save_pretrained(folder)
    else:
        header.write_text("[]")


@pytest.mark.parametrize("how", ["cut header", "no tensors", "another version", "a capsule", "no header"])
def test_what_cannot_go_on_is_told_before_the_pass(qwen, interrupted, how):
    spoil(interrupted, how)
    before = {path.name: path.read_bytes() for path in interrupted.iterdir()}

    def never():
        pytest.fail("the pass began")
        yield

    with pytest.raises(CapsuleFileError) as caught:
        fit(qwen, never(), interrupted)
    said = str(caught.value)
    assert said.startswith(f"{interrupted} holds no interrupted fit that can go on")
    assert said.endswith("name another folder, or remove it to fit anew")
    assert "a capsule" not in said
    assert {path.name: path.read_bytes() for path in interrupted.iterdir()} == before


@pytest.mark.parametrize("codec", ["heads", "joint"])
def test_a_folder_that_cannot_be_is_told_before_the_pass(qwen, tmp_path, codec):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "a", "/proc/a", tmp_path / "a\0b"):
        with pytest.raises(CapsuleFileError, match="cannot write"):
            KVCapsule.fit(qwen.model, None, [None], codec=codec, resume=folder, progress=False)


def test_a_journal_is_removed_and_nothing_else(interrupted):
    other = interrupted / "2-of-2"
    shutil.copytree(interrupted, other)
    fit_journal.remove_journal(interrupted)
    assert not interrupted.exists()
    fit_journal.remove_journal(interrupted)  # there is none
    interrupted.mkdir()
    (interrupted / "mine.txt").write_text("")
    fit_journal.remove_journal(interrupted)
    assert [path.name for path in interrupted.iterdir()] == ["mine.txt"]


def test_joint_latents_end_as_if_nothing_had_happened(qwen, tmp_path):
    options = {"codec": "joint", "progress": False}
    folder = tmp_path / "joint.partial"
    with pytest.raises(KeyboardInterrupt):
        KVCapsule.fit(qwen.model, None, stopped_after(samples(qwen), 3), resume=folder, **options)
    plain = KVCapsule.fit(qwen.model, None, samples(qwen), **options)
    again = KVCapsule.fit(qwen.model, None, samples(qwen), resume=folder, **options)
    assert again.info == plain.info
    for index, codec in plain.codecs.items():
        for name, tensor in codec.state_dict().items():
            assert torch.equal(tensor, again.codecs[index].state_dict()[name])
