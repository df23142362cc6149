"""A head map as a JSON file: written atomically, checked in full when read."""

from __future__ import annotations

import json
import math
import os
import tempfile
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from capsight.blindsight.categories import Category, MaskOptions
from capsight.blindsight.head_map import CalibrationRecord, HeadMap
from capsight.errors import CapsuleFileError, OptionError

FILE_NAME = "head_map.json"
FORMAT, FORMAT_VERSION = "capsight-head-map", 1


def write(head_map: HeadMap, folder: Path) -> Path:
    """See `HeadMap.save_pretrained`."""
    content = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(head_map)}
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    path = folder / FILE_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{FILE_NAME}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise CapsuleFileError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def read(source: str | os.PathLike[str]) -> HeadMap:
    """See `HeadMap.from_pretrained`."""
    path = _locate(source)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CapsuleFileError(f"{path} is missing; is this the folder of a saved head map?") from error
    except OSError as error:
        raise CapsuleFileError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # also what is not UTF-8
        raise CapsuleFileError(f"{path} is not JSON ({error}); save or download it again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CapsuleFileError(f"{path} is not a head map")
    if content.get("format_version") != FORMAT_VERSION:
        raise CapsuleFileError(
            f"{path} has format version {content.get('format_version')!r}, this capsight reads "
            f"{FORMAT_VERSION}; use the capsight that wrote it, or calibrate again"
        )
    try:
        return _head_map(content)
    except (KeyError, TypeError, ValueError, AttributeError, OptionError) as error:
        raise CapsuleFileError(
            f"{path} is a damaged head map ({error!r}); save or download it again"
        ) from error


def _locate(source: str | os.PathLike[str]) -> Path:
    if source == "reference":
        return Path(str(files("capsight").joinpath("reference", "weights", "head_map", FILE_NAME)))
    path = Path(source)
    if path.is_dir():
        return path / FILE_NAME
    if path.exists() or path.suffix == ".json" or not isinstance(source, str):
        return path
    try:
        return Path(hf_hub_download(source, FILE_NAME))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CapsuleFileError(
            f"there is no head map at {source!r}, and the hub does not give it: {error}"
        ) from error


def _head_map(content: dict[str, Any]) -> HeadMap:
    categories = tuple(tuple(Category(name) for name in layer) for layer in content["categories"])
    model, record = content["model"], content["calibration"]
    if not isinstance(model, str):
        raise TypeError("model must be a string")
    head_map = HeadMap(categories, _options(content["options"]), model)
    if record is None:
        return head_map
    return HeadMap(categories, head_map.options, model, _record(record, head_map))


def _options(content: dict[str, Any]) -> MaskOptions:
    options = MaskOptions(**content)
    if not isinstance(options.sink_delimiters, bool):
        raise TypeError("sink_delimiters must be true or false")
    for number in (options.sink_tokens, options.own_window):
        _whole(number)
    return options


def _record(content: dict[str, Any], head_map: HeadMap) -> CalibrationRecord:
    votes = {
        Category(name): [[_number(share) for share in layer] for layer in layers]
        for name, layers in content["votes"].items()
    }
    for layers in votes.values():
        if [len(layer) for layer in layers] != [head_map.num_heads] * head_map.num_layers:
            raise ValueError("votes are not of the shape of the categories")
    if not all(isinstance(content[name], str) for name in ("criterion", "unit", "dataset")):
        raise TypeError("criterion, unit and dataset must be strings")
    return CalibrationRecord(
        criterion=content["criterion"],
        unit=content["unit"],
        thresholds={str(name): _number(value) for name, value in content["thresholds"].items()},
        votes=votes,
        prompts=_whole(content["prompts"]),
        dataset=content["dataset"],
        recovered=_whole(content["recovered"]),
        measured_drop=None if content["measured_drop"] is None else _number(content["measured_drop"]),
        tolerance=None if content["tolerance"] is None else _number(content["tolerance"]),
    )


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"expected a finite number, found {value!r}")
    return float(value)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TypeError(f"expected a whole number, found {value!r}")
    return value
