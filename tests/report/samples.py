"""Made-up files in the formats that the commands write, for every section of a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from capsight.blindsight.draw import ATTENTION_TITLE

MACHINE = {"cpu": "x86_64", "cores": 2, "gpu": None, "torch": "2.13.0", "capsight": "0.1.0"}
BASELINES = {"evict": -1.5, "snapkv": -9.0, "cur": -5.0, "uniform": -24.0, "streaming": -38.0, "merge": -30.0}
TASKS = ("read a plate", "chart value", "table cell", "count shapes", "compare images")


def eval_json(protocol: str = "after") -> dict[str, Any]:
    def cell(percent: float, n: int) -> dict[str, Any]:
        p = min(max(percent, 0), 100) / 100
        half = 196 * (p * (1 - p) / n) ** 0.5 + 0.3
        ends = [round(max(100 * p - half, 0), 2), round(min(100 * p + half, 100), 2)]
        return {"exact_match": round(100 * p, 2), "interval": ends, "questions": n}

    def row(percent: float, share: float) -> dict[str, Any]:
        by = {
            "images": {n: cell(percent + d, 180) for n, d in (("1", 1.5), ("4", 0), ("8", -1.5))},
            "task": {task: cell(percent + 2 - i, 108) for i, task in enumerate(TASKS)},
        }
        drop = round(95.9 - percent, 2)
        return cell(percent, 540) | {
            "drop": drop, "p_value": 1.0 if drop < 0.5 else 0.21 if drop < 1.5 else 0.0004,
            "agreement": min(percent + 2, 100), "kl": drop / 300, "kv_bytes": int(4e8 * share),
            "kv_bytes_full": int(4e8), "module_bytes": 0 if share == 1 else 142_000, "by": by,
        }  # fmt: skip

    methods = {"full": row(95.9, 1.0)}
    best = {0.6: 95.7, 0.4: 95.0, 0.2: 86.5, 0.1: 65.6}
    for method, gap in {"heads": 0.0, "adaptive": -1.0, **BASELINES}.items():
        for retained, percent in best.items():
            methods[f"{method} {retained}"] = row(percent + gap * (1 - retained), 0.06 + 0.94 * retained)
    return {
        "model": "reference",
        "protocol": protocol,
        "samples": 30,
        "methods": methods,
        "machine": MACHINE,
    }


def bench_json() -> dict[str, Any]:
    rows = [
        {
            "method": method, "retained": retained, "batch": batch, "images": images,
            "prompt_tokens": 130 * images + 30, "ttft_s": (0.02 + 0.06 * images * batch) * (1 + slow),
            "tokens_per_s": 60 * batch / (1 + 0.02 * batch * images * kept),
            "kv_bytes": int(5e6 * images * batch * kept), "peak_bytes": None,
        }
        for method, retained, slow, kept in (("full", None, 0, 1), ("heads", 0.4, 0.03, 0.46))
        for batch, images in ((1, 1), (1, 4), (1, 8), (2, 4), (4, 4), (8, 4))
    ]  # fmt: skip
    return {"rows": rows, "machine": MACHINE | {"gpu": "a GPU"}}


def demo_json() -> dict[str, Any]:
    asked = [
        {"question": "What is the plate number in image 2?", "answer": "KD 4471", "task": "plate"},
        {"question": "Which image has <b>most</b> circles?", "answer": "image 3", "task": "count"},
    ]

    def side(second: str, nbytes: int, modules: int, speed: float) -> dict[str, Any]:
        return {
            "answers": ["KD 4471", second], "right": [True, second == "image 3"], "kv_bytes": nbytes,
            "module_bytes": modules, "ttft_s": 0.31, "ttft_ratio": 1.0,
            "tokens_per_s": speed, "speed_ratio": speed / 80,
            "steps": {
                "eager": {"tokens_per_s": speed / 2, "speed_ratio": speed / 160},
                "compiled": {"tokens_per_s": speed, "speed_ratio": speed / 80},
            },
        }  # fmt: skip

    sides = {
        "full cache": side("image 3", 9_000_000, 0, 80.0),
        "capsules, 40% retained": side("image 1", 4_200_000, 142_000, 74.0),
    }
    heads = side("image 3", 3_600_000, 142_000, 88.0) | {"name": "heads, 41% retained"}
    return {"images": 6, "questions": asked, "sides": sides, "heads": heads, "machine": MACHINE}


def picture(folder: Path, title: str = ATTENTION_TITLE) -> Path:
    """A PNG as `capsight attention` writes it."""
    path, text = folder / "attention.png", PngInfo()
    text.add_text("Title", title)
    text.add_text("Description", "layer 1, head 2 (sink); layer 3, head 0 (<dense>)")
    Image.linear_gradient("L").save(path, pnginfo=text)
    return path


def errors_json() -> dict[str, Any]:
    return {"layers": [{"index": i, "keys": 0.1 + 0.01 * i, "values": 0.3 + 0.02 * i} for i in range(8)]}


def write(folder: Path, name: str, values: Any) -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(values))
    return path
