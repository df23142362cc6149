"""The page of `smol`, the judge with a pretrained language model, and of its head maps."""

from __future__ import annotations

import json

from benchmarks.made_up import (
    maps,
    smol,
    tables_are_square,
    write,
)


def test_page_of_the_judge_with_a_pretrained_language_model(root):
    card, attention, latent = smol()
    folder = root / "tools" / "judging" / "weights" / "smol"
    folder.mkdir(parents=True)
    (folder / "card.json").write_text(json.dumps(card))
    write(root, smol_attention=attention, smol_latent=latent, smol_head_maps=maps())
    page = (root / "docs" / "benchmarks" / "smol.md").read_text()
    assert "75.0 % at 1, 75.0 % at 4" in page
    assert "| 4 images | 50 (2) | 100 (2) |" in page
    assert "| 300 | 3000 | 75 | 100 |" in page
    assert "more than half of it in 27 of 27 heads" in page
    assert "5,000 times the median" in page
    assert "| 64 | 90.0 | 90.0 |" in page
    assert "| full | 90.0 | 100.0 | 0.0000 |" in page
    assert tables_are_square(page)


def test_page_of_the_judge_of_head_maps(root):
    card, *_ = smol()
    folder = root / "tools" / "judging" / "weights" / "smol"
    folder.mkdir(parents=True)
    (folder / "card.json").write_text(json.dumps(card))
    repeats = {
        "right, by images and kind": {"4": {"twice": "3/4", "photo": "1/2"}, "8": {"twice": "2/4"}},
        "right, images apart, by images and kind": {"4": {"twice": "1/4", "photo": "1/2"}, "8": {}},
        "test prompts of each": 4,
        "curve": [
            {"step": 10, "tokens": 100, "train": {"probe, new": 0.5}},
            {"step": 20, "tokens": 200, "train": {"probe, new": 0.9, "twice": 0.7}},
        ],
    }
    (folder / "repeats.json").write_text(json.dumps(repeats))
    curve = maps()
    control = {"group": "control", "name": "all sink", "drop": 12.0, "drop_interval": [7.5, 16.0]}
    equal = [{"group": "equal FLOPs", "name": n, "drop": d} for n, d in (("output", 0.5), ("random 0", 9.0))]
    curve["rows"] += [curve["rows"][0] | facts for facts in (control, *equal)]
    curve["rows"][0] |= {"group": "dense"}
    write(root, smol_repeats_head_maps=curve)
    page = (root / "docs" / "benchmarks" / "smol.md").read_text()
    assert "| 4 images, apart | 25 (4) | 50 (2) |" in page
    assert "| 8 images, apart |  |  |" in page
    assert "| 20 | 200 | 90 | 70 |" in page
    assert "The worst control, all sink, costs 12.0 points (95 % interval 7.5 to 16.0); at equal" in page
    assert "the calibrated map costs 0.5, random ones 9.0 to 9.0" in page
    assert "| 95.0 | +12.0 (+7.5 to +16.0) | 98.0 |" in page
    assert tables_are_square(page)
