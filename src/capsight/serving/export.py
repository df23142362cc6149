"""`export_checkpoint`: a copy of a model's folder that a serving engine runs with capsules and a head map."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from transformers import PROCESSOR_MAPPING, PreTrainedModel

from capsight.blindsight import HeadMap
from capsight.errors import CapsuleFileError, OptionError, UnsupportedModelError
from capsight.files import replace_file, write_header
from capsight.kvcapsule import KVCapsule
from capsight.model_fingerprint import model_fingerprint
from capsight.serving.checkpoint import ARCHITECTURES, KEY, KIND, MANIFEST, PREFIX, SPANS, VERSION, Served
from capsight.serving.vllm.latents import joint_codecs

_SUFFIXES = {".json", ".jinja", ".safetensors", ".txt", ".model", ".tiktoken"}
PATTERNS = tuple(f"*{suffix}" for suffix in sorted(_SUFFIXES))
"""Names of the files of a checkpoint that are copied: no code, and no pickles."""

_PIECE = 1 << 24


def export_checkpoint(
    source: Path,
    out: Path,
    model: PreTrainedModel,
    *,
    capsule: KVCapsule | None = None,
    head_map: HeadMap | None = None,
    retained: float | None = None,
    overwrite: bool = False,
    copied: Callable[[int], object] = lambda _: None,
) -> Served:
    """Write a checkpoint that `vllm serve` runs with capsules and a head map, and transformers as before.

    The folder is made beside its place under another name and put there in one step.

    Args:
        source: folder of the model: safetensors, config, tokenizer and processor files.
        out: folder to make.
        model: what was loaded from `source`; nothing of it is written.
        capsule: of the codec `joint`, fitted to this very model; the engine's memory keeps its latents.
        head_map: calibrated on this very model.
        retained: with a capsule, part of the bytes to keep; None: as the capsule has it. Without one, part of
            an image's tokens; None: all.
        overwrite: replace what an earlier export wrote to `out`.
        copied: told the bytes of each piece that was copied.

    Raises:
        CapsuleFileError: `out` cannot be written.
        ModelMismatchError: capsule or head map were made for another model.
        OptionError: there is nothing to serve with, `out` is taken, `source` is no such folder, or the
            capsule is none that an engine can hold.
        UnsupportedModelError: vLLM cannot run this model with capsight.
    """
    if (capsule, head_map, retained) == (None, None, None):
        raise OptionError("name what to serve the model with: a capsule, a retained fraction, or a head map")
    if retained is not None and not 0 < retained <= 1:
        raise OptionError(f"retained is {retained}; it must lie above 0 and be at most 1")
    check_target(source, out, overwrite)
    files = checkpoint_files(source)
    check_carried(model.config)
    if capsule is not None:
        joint_codecs(capsule if retained is None else capsule.with_retained(retained))
        capsule.check_model(model)
    if head_map is not None:
        text = model.config.get_text_config()
        fingerprint = model_fingerprint(model) if head_map.model else ""
        head_map.check(text.num_hidden_layers, text.num_attention_heads, fingerprint)
    names = [None if part is None else name for name, part in (("capsule", capsule), ("head_map", head_map))]
    entry = Served(names[0], names[1], retained)
    with _new_folder(out.resolve()) as folder:
        listed = {path.name: _copy(path, folder / path.name, copied) for path in files}
        listed |= _edited(folder, model.config, entry)
        for name, part in zip(names, (capsule, head_map), strict=True):
            if part is not None and name is not None:
                part.save_pretrained(folder / name)
                listed |= {f"{name}/{p.name}": _listing(p) for p in sorted((folder / name).iterdir())}
        write_header(folder / MANIFEST, KIND, VERSION, {"files": listed})
    return entry


def check_target(source: Path, out: Path, overwrite: bool) -> None:
    """Refuse a folder that is not free, before the long work starts.

    Raises:
        OptionError: something is there, and is not an export to overwrite; or it is the model's own folder.
    """
    target, model = out.resolve(), source.resolve()
    if target == model or model in target.parents or target in model.parents:
        raise OptionError(f"{out} is the model's own folder, or inside or around it; name another one")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / MANIFEST).is_file():
        raise OptionError(f"{out} exists and is no exported checkpoint; name a new folder")
    if not overwrite:
        raise OptionError(f"{out} holds an exported checkpoint already; say --overwrite to replace it")


def checkpoint_files(source: Path) -> list[Path]:
    """The files of a model's folder that an export copies, by name.

    Raises:
        OptionError: it has no weights as safetensors, or not all of them.
    """
    files = sorted(p for p in source.iterdir() if p.suffix in _SUFFIXES and p.name[0] != "." and p.is_file())
    files = [path for path in files if path.name != MANIFEST]
    names = {path.name for path in files}
    if not any(name.endswith(".safetensors") for name in names):
        raise OptionError(f"{source} holds no weights as safetensors; save the model with save_pretrained")
    index = source / "model.safetensors.index.json"
    if index.is_file():
        try:
            missing = set(json.loads(index.read_text())["weight_map"].values()) - names
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise OptionError(f"{index} cannot be read ({error!r}); download the model again") from error
        if missing:
            raise OptionError(f"{source} lacks {min(missing)}, which its index names; download it again")
    return files


def check_carried(config: Any) -> None:
    """Refuse models that vLLM with capsight would not run as transformers does.

    Raises:
        UnsupportedModelError: by family, sliding windows, or rotary embeddings.
    """
    if config.model_type not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"capsight's vLLM plugin runs {' and '.join(ARCHITECTURES)} so far, not {config.model_type}; "
            "run this model with transformers (`capsight generate`)"
        )
    text = config.get_text_config()
    layers = getattr(text, "layer_types", None) or ()
    if "sliding_attention" in layers:
        raise UnsupportedModelError("capsight's vLLM plugin runs no models with sliding windows")
    rope = text.rope_parameters
    kind = rope.get("rope_type", "default")
    plain = rope.get("short_factor") == rope.get("long_factor") and rope.get("factor", 1) == 1
    if kind not in ("default", "yarn", "longrope") or (kind == "longrope" and not plain):
        raise UnsupportedModelError(
            f"vLLM has no multimodal rotary embedding of type {kind!r} with these factors, so it would run "
            "this model wrongly; run it with transformers (`capsight generate`)"
        )


def _edited(folder: Path, config: Any, entry: Served) -> dict[str, Any]:
    """Rewrite the files that a serving engine reads otherwise than transformers does; their listings."""
    names = ["config.json"]
    values = _json(folder / "config.json")
    values |= {"architectures": [PREFIX + ARCHITECTURES[config.model_type]], **SPANS, KEY: entry.to_dict()}
    replace_file(folder / "config.json", json.dumps(values, indent=2) + "\n")
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            values = _json(folder / name)
            if not hasattr(transformers, values.get("processor_class", "ProcessorMixin")):
                processor: Any = PROCESSOR_MAPPING[type(config)]
                values["processor_class"] = processor.__name__
                replace_file(folder / name, json.dumps(values, indent=2) + "\n")
                names.append(name)
    names += _video_processor(folder)
    return {name: _listing(folder / name) for name in names}


def _video_processor(folder: Path) -> list[str]:
    """Write the settings of a video processor, without which vLLM starts no Qwen-VL, where there are none."""
    name, whole = "video_preprocessor_config.json", folder / "processor_config.json"
    settings = _json(whole) if whole.is_file() else {}
    others = (name, "preprocessor_config.json")
    if "video_processor" in settings or any((folder / other).is_file() for other in others):
        return []
    images = dict(settings.get("image_processor", {}))
    images.pop("image_processor_type", None)
    images["video_processor_type"] = "Qwen2VLVideoProcessor"
    replace_file(folder / name, json.dumps(images, indent=2) + "\n")
    return [name]


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
        if isinstance(values, dict):
            return values
        raise ValueError("no object")
    except ValueError as error:
        raise OptionError(f"{path.name} of the model is not JSON ({error}); download it again") from error


def _copy(path: Path, target: Path, copied: Callable[[int], object]) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as source, target.open("wb") as file:
        while piece := source.read(_PIECE):
            file.write(piece)
            digest.update(piece)
            size += len(piece)
            copied(len(piece))
        file.flush()
        os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def _listing(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place at the end, or goes if anything fails."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name[:64]}."))
    except OSError as error:
        raise CapsuleFileError(f"cannot write {out}: {error.strerror or error}") from error
    try:
        yield folder
        folder.chmod(0o755)
        if (out / MANIFEST).is_file():
            out.rename(folder / ".before")  # and comes back if the next step fails
        try:
            folder.rename(out)
        except BaseException:
            if (folder / ".before").is_dir():
                (folder / ".before").rename(out)
            raise
        shutil.rmtree(out / ".before", ignore_errors=True)
    except OSError as error:
        raise CapsuleFileError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
