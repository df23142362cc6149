"""Loads what a command line names: models, processors, capsules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from capsight.blindsight import HeadMap
from capsight.errors import CapsuleFileError, OptionError
from capsight.kvcapsule import KVCapsule
from capsight.layout.families import family_for
from capsight.reference import load_reference_vlm, reference_path
from capsight.reference.loader import load_reference_processor

REFERENCE = "reference"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(name: str, dtype: str = "float32", device: str = "cpu") -> tuple[Any, Any]:
    """Load a model and its processor.

    Args:
        name: "reference", a folder, or a hub id.
        dtype: compute type.
        device: where to put it.

    Raises:
        OptionError: the dtype is unknown, or the model or a processor that takes images cannot be loaded.
        UnsupportedModelError: its family is not supported; neither weights nor a processor were loaded.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if dtype not in _DTYPES:
        raise OptionError(f"dtype is {dtype!r}; use one of {', '.join(_DTYPES)}")
    if name == REFERENCE:
        return load_reference_vlm(_DTYPES[dtype], device)
    family_for(load_config(name))  # before anything large is loaded or downloaded
    try:
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=_DTYPES[dtype])
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise _cannot_load(name, error) from error
    processor = load_processor(name)
    model.to(torch.device(device))  # type: ignore[arg-type]
    return model.eval(), processor


def load_config(name: str) -> Any:
    """Read a model's config and nothing else.

    Args:
        name: "reference", a folder, a config.json, or a hub id.

    Raises:
        OptionError: it cannot be read.
    """
    logging.set_verbosity_error()
    source = str(reference_path()) if name == REFERENCE else name
    try:
        return AutoConfig.from_pretrained(source)
    except Exception as error:  # transformers lets errors of strict dataclasses and of the hub through
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise OptionError(f"cannot read the config of {name!r}: {reason}") from error


def load_processor(name: str) -> Any:
    """Load the processor of a model ("reference", a folder, or a hub id); it pads on the left.

    Raises:
        OptionError: there is none that takes images.
    """
    if name == REFERENCE:
        return load_reference_processor()
    try:
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise _cannot_load(name, error) from error
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise OptionError(
            f"{name!r} has no processor that takes images, only a {type(processor).__name__}; "
            "save the processor of the model into the same folder: processor.save_pretrained(folder)"
        )
    processor.tokenizer.padding_side = "left"
    return processor


def _cannot_load(name: str, error: Exception) -> OptionError:
    reason = (str(error).strip() or repr(error)).splitlines()[0]
    return OptionError(f"cannot load the model {name!r}: {reason}")


def load_capsule(source: str | None, model_name: str) -> KVCapsule:
    """Load a capsule; without a source the one shipped for the reference VLM.

    Raises:
        OptionError: there is none for this model.
    """
    if source is not None:
        return KVCapsule.from_pretrained(source)
    if model_name != REFERENCE:
        raise OptionError("name the capsule of this model with --capsule; `capsight fit` makes one")
    return KVCapsule.from_pretrained(REFERENCE)


def reference_head_map() -> HeadMap | None:
    """The head map shipped for the reference VLM, where the installation has one."""
    try:
        return HeadMap.from_pretrained(REFERENCE)
    except CapsuleFileError:
        return None


def check_out(path: Path | None) -> None:
    """Refuse an output path whose folder is missing, before the long work starts.

    Raises:
        OptionError: it is.
    """
    if path is not None and not path.absolute().parent.is_dir():
        raise OptionError(f"the folder of {path} does not exist; make it first")
