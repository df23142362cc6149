from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capsight.errors import OptionError
from capsight.reference import split_prompt
from capsight.reference.drawing import KINDS, draw_scene
from capsight.reference.prompts import split_rng
from capsight.reference.questions import CROSS_TASKS, TASKS, ask


@given(st.sampled_from(KINDS), st.integers(0, 10**6), st.booleans())
@settings(max_examples=40)
def test_scenes_repeat_from_their_seed(kind, seed, large):
    first, again = (draw_scene(random.Random(seed), kind, float(large)) for _ in range(2))
    assert first.image.tobytes() == again.image.tobytes()
    assert first.facts == again.facts
    assert first.image.width % 28 == first.image.height % 28 == 0
    assert first.image.width * first.image.height // 28**2 == (128 if large else 64)


@given(st.sampled_from(KINDS), st.integers(0, 10**6), st.floats(0, 1))
@settings(max_examples=60)
def test_all_text_and_marks_lie_inside_the_picture(kind, seed, large):
    scene = draw_scene(random.Random(seed), kind, large)
    assert scene.glyphs or scene.marks
    for thing in (*scene.glyphs, *scene.marks, *scene.words):
        assert 0 <= thing.x < scene.image.width
        assert 0 <= thing.y < scene.image.height


def test_glyphs_spell_the_facts():
    scene = draw_scene(random.Random(1), "plate")
    assert "".join(g.char for g in scene.glyphs) == scene.facts["code"]


@given(st.integers(0, 10**6), st.integers(1, 8))
@settings(max_examples=40)
def test_answers_follow_from_the_facts(seed, images):
    rng = random.Random(seed)
    scenes = [draw_scene(rng, None, 0.5) for _ in range(images)]
    question = ask(scenes, rng)
    assert question.task in TASKS
    assert (question.task in CROSS_TASKS) <= (images > 1)
    if question.task in ("find", "odd_one_out", "compare"):
        assert 1 <= int(question.answer) <= images
    elif question.task == "count_images":
        assert 0 <= int(question.answer) <= images
    elif question.task == "order":
        assert question.answer.split() == [s.kind for s in scenes]
    elif question.task not in CROSS_TASKS:
        scene = scenes[int(question.text.removeprefix("Image ").split(":")[0]) - 1]
        if question.task == "total":
            assert float(question.answer) == pytest.approx(sum(map(float, scene.facts["prices"].values())))
        elif question.task == "bar_height":
            color = question.text.split()[-2]
            assert scene.facts["bars"][color] == int(question.answer)
        elif question.task in ("read_code", "plate", "small_print"):
            drawn = "".join(g.char for g in scene.glyphs)
            assert question.answer in drawn


def test_every_task_is_asked():
    tasks = Counter(q.task for i in range(120) for q in split_prompt("calibration", i, 4).questions)
    assert set(tasks) == set(TASKS)


def test_splits_are_disjoint():
    seen = {}
    for split in ("train", "calibration", "test"):
        for index in range(30):
            for scene in split_prompt(split, index, 2).scenes:
                assert seen.setdefault(scene.image.tobytes(), split) == split
    assert len(seen) == 180


def test_unknown_split():
    with pytest.raises(OptionError, match="calibration"):
        split_rng("validation", 0)
