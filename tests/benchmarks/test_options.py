"""Options that cannot be measured are refused at once, in a sentence."""

from __future__ import annotations

import decode_model
import decode_reference
import peak_memory
import pytest
import typer
from typer.testing import CliRunner


def asked(module, *arguments):
    app = typer.Typer()
    app.command()(module.main)
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.mark.parametrize(
    ("module", "option", "value"),
    [
        (decode_reference, "--rounds", 1),  # quartiles are between two
        (decode_reference, "--threads", 0),
        *((decode_reference, "--batches", text) for text in ("1,x", "", "0", "8,")),
        (decode_model, "--tokens", 1023),  # less than an image
        (decode_model, "--batches", "1;8"),
        *((decode_model, "--retained", text) for text in ("0", "1.1", "nan", "a")),
        (decode_model, "--new", 1),
        (decode_model, "--runs", 0),
        (decode_model, "--dtype", "int8"),
        *((peak_memory, option, 0) for option in ("--batch", "--images", "--threads")),
        (peak_memory, "--one", "joint"),
    ],
)
def test_what_cannot_be_measured_is_refused(monkeypatch, tmp_path, module, option, value):
    monkeypatch.setattr(module, "load_reference_vlm", lambda: pytest.fail("too late"))
    found = asked(module, option, value, "--json", tmp_path / "x.json")
    assert found.exit_code == 2
    assert f"Invalid value for '{option}'" in found.output


@pytest.mark.parametrize("module", [decode_reference, decode_model])
def test_a_folder_for_the_figures_is_made_first(monkeypatch, tmp_path, module):
    def stop():
        raise SystemExit(7)

    monkeypatch.setattr(module, "load_reference_vlm", stop)
    assert asked(module, "--json", tmp_path / "a" / "x.json").exit_code == 7
    assert (tmp_path / "a").is_dir()
