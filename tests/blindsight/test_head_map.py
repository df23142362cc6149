"""Head maps: controls, tying, and files good and bad."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import huggingface_hub
import pytest

from capsight.blindsight import CalibrationRecord, Category, HeadMap, MaskOptions
from capsight.blindsight.head_map import union
from capsight.errors import CapsuleFileError, ModelMismatchError, OptionError
from capsight.files import CHECKSUM, write_header

DENSE, SINK = Category.DENSE, Category.SINK
INTRA, BOTH = Category.INTRA_IMAGE, Category.INTRA_IMAGE_SINK
RECORD = CalibrationRecord(
    criterion="output",
    unit="head",
    thresholds={"alpha_first": 0.1, "alpha_last": 0.2, "gamma_d": 0.1, "gamma_s": 0.9, "gamma_i": 0.9},
    votes={category: [[0.5] * 4] * 2 for category in (SINK, INTRA, BOTH)},
    prompts=12,
    dataset="ab" * 32,
    recovered=1,
    measured_drop=0.005,
    tolerance=0.01,
)
MAP = HeadMap(
    ((DENSE, SINK, INTRA, BOTH), (BOTH, BOTH, SINK, SINK)), MaskOptions(False, 3, 7), "cd" * 32, RECORD
)


def test_counts_and_controls():
    assert MAP.counts() == {DENSE: 1, SINK: 3, INTRA: 1, BOTH: 3}
    assert HeadMap.all_dense(3, 4).counts()[DENSE] == 12
    assert HeadMap.uniform(INTRA, 2, 2, MAP.options).options == MAP.options
    shuffled = HeadMap.random(2, 4, MAP.counts(), seed=1)
    assert shuffled.counts() == MAP.counts()
    assert shuffled == HeadMap.random(2, 4, MAP.counts(), seed=1)
    assert len({HeadMap.random(2, 4, MAP.counts(), seed=seed).categories for seed in range(9)}) > 4


def test_tying_never_hides_what_a_head_saw():
    tied = MAP.tie_kv_groups(2)
    assert tied.categories == ((DENSE, DENSE, BOTH, BOTH), (BOTH, BOTH, SINK, SINK))
    assert tied.tie_kv_groups(2) == tied
    assert MAP.tie_kv_groups(4) == MAP
    assert union([SINK, INTRA]) is BOTH
    assert union([SINK, SINK]) is SINK
    assert union([SINK, DENSE]) is DENSE


def test_replaced():
    changed = MAP.replaced({(0, 1): DENSE, (1, 3): DENSE})
    assert changed.categories == ((DENSE, DENSE, INTRA, BOTH), (BOTH, BOTH, SINK, DENSE))


@pytest.mark.parametrize("head_map", [MAP, HeadMap.all_dense(1, 1)])
def test_a_file_and_back(tmp_path, head_map):
    path = head_map.save_pretrained(tmp_path / "new" / "folder")
    assert HeadMap.from_pretrained(path.parent) == head_map
    assert HeadMap.from_pretrained(str(path)) == head_map
    assert [p.name for p in path.parent.iterdir()] == ["head_map.json"]


def test_saving_again_replaces(tmp_path):
    MAP.save_pretrained(tmp_path)
    HeadMap.all_dense(1, 1).save_pretrained(tmp_path)
    assert HeadMap.from_pretrained(tmp_path).num_layers == 1


def test_a_model_of_another_shape_or_weights():
    MAP.check(2, 4)
    MAP.check(2, 4, "cd" * 32)
    with pytest.raises(ModelMismatchError, match="calibrate"):
        MAP.check(3, 4)
    with pytest.raises(ModelMismatchError, match="other weights"):
        MAP.check(2, 4, "ef" * 32)
    MAP.for_model("").check(2, 4, "ef" * 32)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: HeadMap(()),
        lambda: HeadMap(((),)),
        lambda: HeadMap(((DENSE,), (DENSE, DENSE))),
        lambda: HeadMap.random(2, 2, {DENSE: 3}, seed=0),
        lambda: MAP.tie_kv_groups(3),
    ],
)
def test_shapes_that_are_none(wrong):
    with pytest.raises(OptionError):
        wrong()


def damage(change):
    """A change, with the checksum made right again."""

    def made(content):
        change(content)
        kept = {k: v for k, v in content.items() if k not in (CHECKSUM, "format", "format_version")}
        with TemporaryDirectory() as folder:
            path = Path(folder) / "x.json"
            write_header(path, content["format"], content["format_version"], kept)
            return path.read_text()

    return made


BAD = {
    "not JSON": lambda content: json.dumps(content)[:-40],
    "a list": lambda content: "[]",
    "another format": damage(lambda c: c.update(format="capsule")),
    "a later version": damage(lambda c: c.update(format_version=99)),
    "no categories": damage(lambda c: c.pop("categories")),
    "a category that is none": damage(lambda c: c["categories"][0].__setitem__(0, "sparse")),
    "ragged layers": damage(lambda c: c["categories"][0].pop()),
    "no layers": damage(lambda c: c.update(categories=[])),
    "categories that are a number": damage(lambda c: c.update(categories=3)),
    "options out of range": damage(lambda c: c["options"].update(own_window=0)),
    "an option that is none": damage(lambda c: c["options"].update(colour=1)),
    "an option that is no number": damage(lambda c: c["options"].update(sink_tokens=1.5)),
    "a model that is no string": damage(lambda c: c.update(model=3)),
    "votes of another shape": damage(lambda c: c["calibration"]["votes"]["sink"].pop()),
    "a vote that is no number": damage(lambda c: c["calibration"]["votes"]["sink"][0].__setitem__(0, None)),
    "an infinite drop": damage(lambda c: c["calibration"].update(measured_drop=float("inf"))),
    "a unit that is no string": damage(lambda c: c["calibration"].update(unit=3)),
    "a record without prompts": damage(lambda c: c["calibration"].pop("prompts")),
}


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_file_is_named(tmp_path, name):
    path = MAP.save_pretrained(tmp_path)
    path.write_text(BAD[name](json.loads(path.read_text())))
    with pytest.raises(CapsuleFileError, match=r"head_map\.json"):
        HeadMap.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["categories"][0].reverse(),
        lambda c: c["categories"].reverse(),
        lambda c: c["options"].update(own_window=9),
        lambda c: c.update(model=""),
        lambda c: c.update(calibration=None),
        lambda c: c.pop(CHECKSUM),
        lambda c: c.update({CHECKSUM: "0" * 64}),
    ],
)
def test_a_file_changed_by_hand_is_refused(tmp_path, change):
    path = MAP.save_pretrained(tmp_path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(CapsuleFileError, match=r"head_map\.json was changed"):
        HeadMap.from_pretrained(tmp_path)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "head_map.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CapsuleFileError, match="not JSON"):
        HeadMap.from_pretrained(tmp_path)


def test_no_file(tmp_path):
    with pytest.raises(CapsuleFileError, match="missing"):
        HeadMap.from_pretrained(tmp_path)
    with pytest.raises(CapsuleFileError, match="missing"):
        HeadMap.from_pretrained(str(tmp_path / "other.json"))


def test_a_hub_id_that_does_not_exist(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CapsuleFileError, match="offline"):
        HeadMap.from_pretrained("someone/a-head-map")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CapsuleFileError, match="cannot write"):
        MAP.save_pretrained(tmp_path / "file" / "folder")
