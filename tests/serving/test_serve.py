"""`capsight serve` without vLLM: what it would run, and what it refuses."""

from __future__ import annotations

import json
import shlex

import pytest

from capsight.cli import serve
from capsight.errors import OptionError
from capsight.serving.checkpoint import Served
from capsight.serving.export import export_checkpoint
from cli.test_cli import run
from tiny import qwen2_vl


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("serve")
    vlm = qwen2_vl.build()
    vlm.model.save_pretrained(root / "model")
    export_checkpoint(root / "model", root / "served", vlm.model, retained=0.4)
    return root / "served"


def test_the_command(monkeypatch, capsys, folder):
    options = ("--images", 8, "--tensor-parallel", 2, "--dry-run", "--", "--dtype", "bfloat16")
    code, out, _ = run(monkeypatch, capsys, "serve", folder, *options)
    assert code == 0
    words = shlex.split(out)
    assert words[1:5] == ["-m", "vllm.entrypoints.launchers.api_server.entry", "--model", str(folder)]
    assert json.loads(words[words.index("--limit-mm-per-prompt") + 1]) == {"image": 8, "video": 0}
    assert words[words.index("--served-model-name") + 1] == "served"
    assert words[words.index("--tensor-parallel-size") + 1] == "2"
    assert words[words.index("--block-size") + 1] == "32"
    assert words[words.index("--dtype") + 1] == "float32"
    assert words[-2:] == ["--dtype", "bfloat16"]


def test_what_it_refuses(monkeypatch, capsys, tmp_path, folder):
    code, _, err = run(monkeypatch, capsys, "serve", tmp_path)
    assert code == 2
    assert "capsight export" in err
    with pytest.raises(OptionError, match="a capsule is served by one process"):
        serve.vllm_command(folder, Served("capsule", None, None), "localhost", 8000, "name", None, 2)
    assert run(monkeypatch, capsys, "serve", folder, "--port", 0)[0] == 2
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    code, _, err = run(monkeypatch, capsys, "serve", folder)
    assert code == 2
    assert "pip install 'capsight[vllm]'" in err.replace("\n", " ")
    monkeypatch.setattr(serve, "find_spec", lambda name: "there")
    monkeypatch.setattr(serve, "_version", lambda name: "0.31.2" if name == "vllm" else None)
    code, _, err = run(monkeypatch, capsys, "serve", folder)
    assert code == 2
    assert "0.31.2" in err
