"""Loads what a command line names: models, processors, capsules."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText, PreTrainedConfig
from transformers.utils import logging

from capsight.blindsight import HeadMap
from capsight.errors import CapsuleFileError, OptionError, UnsupportedModelError
from capsight.kvcapsule import KVCapsule
from capsight.layout.families import family_for, supported_families
from capsight.processors import load_processor, own_processor
from capsight.reference import load_reference_vlm, reference_path

REFERENCE = "reference"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    name: str, dtype: str | None = None, device: str | None = None, processor: str | None = None
) -> tuple[Any, Any]:
    """Load a model and its processor.

    Args:
        name: "reference", a folder, or a hub id.
        dtype: compute type; None is that of the checkpoint, float32 for the reference VLM.
        device: where to put it; None is the GPU where there is one (CUDA), else the CPU.
        processor: `module:factory` of one's own; None is the checkpoint's.

    Raises:
        OptionError: an option is unknown, or the model or its processor cannot be loaded.
        UnsupportedModelError: its family is not supported; neither weights nor a processor were loaded.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if dtype is not None and dtype not in _DTYPES:
        raise OptionError(f"dtype is {dtype!r}; use one of {', '.join(_DTYPES)}")
    place = checked_device(device)
    custom = None if processor is None else own_processor(processor, name)
    if name == REFERENCE:
        vlm, shipped = load_reference_vlm(_DTYPES[dtype or "float32"], place)
        return vlm, custom or shipped
    family_for(load_config(name))  # before anything large is loaded or downloaded
    try:
        model: Any = AutoModelForImageTextToText.from_pretrained(
            name, dtype=_DTYPES[dtype] if dtype else "auto"
        )
    except Exception as error:  # of files, the hub, safetensors, strict dataclasses...
        reason = " ".join(str(error).split()) or repr(error)
        raise OptionError(f"cannot load the model {name!r}: {reason}") from error
    loaded = custom or load_processor(name)
    model.to(place)
    return model.eval(), loaded


def load_config(name: str) -> Any:
    """Read a model's config and nothing else.

    Args:
        name: "reference", a folder, a config.json, or a hub id.

    Raises:
        OptionError: it cannot be read.
        UnsupportedModelError: it is of a type that transformers does not know.
    """
    logging.set_verbosity_error()
    source = str(reference_path()) if name == REFERENCE else name
    try:
        values, _ = PreTrainedConfig.get_config_dict(source)
        kind = values.get("model_type")
        if isinstance(kind, str) and kind not in CONFIG_MAPPING:
            supported = ", ".join(supported_families())  # other packages may add models as well
            if kind not in CONFIG_MAPPING:
                raise UnsupportedModelError(
                    f"{name} has the model type {kind!r}, which transformers {transformers.__version__} does "
                    f"not know, and code that a checkpoint brings is not run; supported are {supported}"
                )
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except UnsupportedModelError:
        raise
    except Exception as error:  # transformers lets errors of strict dataclasses and of the hub through
        reason = " ".join(str(error).split()) or repr(error)
        raise OptionError(f"cannot read the config of {name!r}: {reason}") from error


def checked_device(name: str | None) -> torch.device:
    """A device that takes tensors.

    Args:
        name: as torch writes it; None is CUDA where there is a GPU, else the CPU.

    Raises:
        OptionError: torch does not know it, or this machine has none.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise OptionError("device is 'meta', which computes nothing; use cpu or cuda")
        torch.zeros(1, device=device)
    except OptionError:
        raise
    except Exception as error:  # torch raises AssertionError, RuntimeError and others, in many lines
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise OptionError(f"device is {name!r}, which cannot be used here: {reason}") from error
    return device


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
