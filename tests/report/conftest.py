"""The files that tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from capsight.blindsight import Category, HeadMap
from capsight.kvcapsule.info import CapsuleInfo, LayerInfo
from capsight.report import BenchFile, DemoFile, EvalFile, LayerErrors, Material, read, read_picture
from report import samples


@pytest.fixture
def everything(tmp_path: Path) -> Material:
    """Material for every section, through the readers."""
    counts = {Category.DENSE: 14, Category.SINK: 10, Category.INTRA_IMAGE: 20, Category.INTRA_IMAGE_SINK: 20}
    kept = (38, 32, 28, 24, 22, 20, 22, 26)
    layers = tuple(LayerInfo(index, r, 4, 32) for index, r in enumerate(kept))
    return Material(
        (read(EvalFile, samples.write(tmp_path, "eval", samples.eval_json())),),
        read(BenchFile, samples.write(tmp_path, "bench", samples.bench_json())),
        read(DemoFile, samples.write(tmp_path, "demo", samples.demo_json())),
        HeadMap.random(8, 8, counts, 0),
        CapsuleInfo("heads", 64, 4, layers, {}, "", {}, 1),
        read(LayerErrors, samples.write(tmp_path, "errors", samples.errors_json())),
        (read_picture(samples.picture(tmp_path)),),
    )
