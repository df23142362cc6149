"""capsight-smol's prompts, packing and additions, without its language model and its pictures."""

import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from judging.smol.across import Probe
from judging.smol.asks import ASKED, KINDS, Prompt, draw_prompt
from judging.smol.course import Course
from judging.smol.lora import FIRST_LAYER, adapt, merge
from judging.smol.packed import Hidden, Packer, hide
from judging.smol.pictures import Pictures
from judging.smol.repeats import draw_repeats, repeated
from judging.smol.tower import FAKE, GLOBAL, IMAGE, TOKENS
from judging.smol.words import COLORS, ICONS, SHAPES, SORTS
from tiny.base import byte_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Noise in the place of the packages' pictures."""
    folder, made = tmp_path_factory.mktemp("smol"), np.random.default_rng(0)
    parts = ("train", "test")
    photos = {f"{p}_image": made.integers(0, 256, (60, 32, 32, 3), np.uint8) for p in parts}
    photos |= {f"{p}_label": np.arange(60, dtype=np.uint8) % 10 for p in parts}
    np.savez(folder / "photos.npz", **photos)
    shapes = {f"{p}_image": made.integers(0, 256, (30, 64, 64, 3), np.uint8) for p in parts}
    shapes |= {f"{p}_shape": np.array(SHAPES * 10) for p in parts}
    shapes |= {f"{p}_color": np.array(list(COLORS) * 3) for p in parts}
    np.savez(folder / "shapes.npz", **shapes)
    np.savez(folder / "icons.npz", **{n: made.integers(0, 256, (64, 64, 4), np.uint8) for n in ICONS})
    return folder


@pytest.fixture(scope="module")
def pictures(folder):
    return Pictures(folder, "test")


@pytest.fixture(scope="module")
def packer():
    start, end = "<|im_start|>", "<|im_end|>"
    return Packer(byte_tokenizer([IMAGE, FAKE, GLOBAL, start, end], pad=end, eos=end))


def test_answers_are_true_of_the_pictures(pictures):
    asked = Counter()
    for index in range(60):
        prompt = draw_prompt(pictures, random.Random(index), (1, 4, 8)[index % 3], 20)
        names, sorts = [p.name for p in prompt.pictures], [p.sort for p in prompt.pictures]
        for question in prompt.questions:
            asked[question.task] += 1
            numbers = [int(w.strip("?")) - 1 for w in question.text.split() if w.strip("?").isdigit()]
            said = question.answer
            match question.task:
                case "photo" | "icon" | "shape" | "word":
                    assert names[numbers[0]] == said
                case "sort":
                    assert sorts[numbers[0]] == said
                case "number":
                    assert prompt.pictures[numbers[0]].number == said
                case "color":
                    assert prompt.pictures[numbers[0]].color == said
                case "find":
                    name = question.text.split()[-1].strip("?")
                    assert [i for i, n in enumerate(names) if n == name] == [int(said) - 1]
                case "after":
                    name = question.text.split()[-1].strip("?")
                    assert names[names.index(name) + 1] == said
                case "same":
                    first, second = (int(question.text.split()[i].strip("?")) - 1 for i in (2, 4))
                    assert (said == "yes") == (names[first] == names[second])
                case "odd":
                    assert sorts.count(sorts[int(said) - 1]) == 1
                    assert len(set(sorts)) == 2
                case "order":
                    first, last = numbers
                    assert said.split(", ") == names[first : last + 1]
    assert set(asked) == set(KINDS)


def test_only_wanted_kinds_are_asked_and_those_across_images_more_often_in_the_lesson(pictures):
    def drawn(**wanted):
        prompts = [draw_prompt(pictures, random.Random(i), 4, 12, **wanted) for i in range(20)]
        return Counter(q.task for p in prompts for q in p.questions)

    assert set(drawn(kinds=("photo", "find"))) == {"photo", "find"}
    usual, lesson = drawn(), drawn(across=3)
    across = ("find", "after", "same", "odd", "order")
    assert sum(lesson[k] for k in across) / lesson.total() > sum(usual[k] for k in across) / usual.total()


def test_what_is_asked_suffices_for_a_judge():
    assert set(ASKED) <= set(KINDS)
    assert len(ASKED) >= 5
    assert {"photo", "word"} <= set(ASKED)
    assert {"find", "after", "same", "odd", "order"} & set(ASKED)


def test_splits_share_no_picture_of_a_package(folder):
    held = [Pictures(folder, s) for s in ("calibration", "dev", "test")]
    seen = [{image.tobytes() for image in p.photos[0]} for p in held]
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]
    assert all(p.sort in SORTS for p in (held[0].draw(random.Random(i)) for i in range(8)))


def test_a_question_sees_the_images_and_itself(pictures, packer):
    prompt = draw_prompt(pictures, random.Random(1), 2, 3)
    packed = packer([prompt], length=900)
    assert packed.input_ids.shape == (1, 900)
    mask, prefix = packed.mask[0, 0], packed.prefix[0]
    assert int((packed.input_ids[0, :prefix] == packer._encode(IMAGE)[0]).sum()) == 2 * TOKENS
    for number in range(3):
        last = int(packed.at[packed.question == number][-1])
        seen = mask[last].nonzero()[:, 0]
        own = seen[seen >= prefix]
        assert set(range(prefix)) <= set(seen.tolist())
        assert own.tolist() == list(range(int(own[0]), last + 1))
        assert int(packed.position_ids[0, int(own[0])]) == prefix
    assert mask[:prefix, prefix:].sum() == 0
    told = [int(t) for t in packed.target[packed.question == 1]]
    assert packer._tokenizer.decode(told) == f" {prompt.questions[1].answer}<|im_end|>"


def test_questions_that_do_not_fit_are_left_out(pictures, packer):
    prompt = draw_prompt(pictures, random.Random(2), 1, 6)
    whole = len(packer([prompt]).input_ids[0])
    fewer = packer.fitting(prompt, whole - 1)
    assert len(fewer.questions) == len(prompt.questions) - 1
    assert len(packer([fewer], length=whole - 1).input_ids[0]) == whole - 1
    assert packer.fitting(prompt, whole) == Prompt(prompt.pictures, prompt.questions)


@torch.no_grad()
def test_merged_additions_do_what_they_did_apart():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=FIRST_LAYER + 2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    apart, plain = LlamaModel(config).eval(), LlamaModel(config).eval()
    plain.load_state_dict(apart.state_dict())
    ids = torch.arange(20)[None]
    before = apart(ids).last_hidden_state
    added = adapt(apart)
    assert torch.equal(apart(ids).last_hidden_state, before)  # they start at nothing
    for name, part in added.items():
        if name.endswith(".up"):
            part.normal_(std=0.1)
    merge(plain, dict(added))
    after = apart(ids).last_hidden_state
    assert (after - before).abs().max() > 1e-3
    assert torch.allclose(plain(ids).last_hidden_state, after, atol=1e-4)


def test_what_comes_twice_is_told_truly(pictures):
    pairs = Counter()
    for index in range(60):
        prompt = draw_repeats(pictures, random.Random(index), (2, 4, 8)[index % 3], 6)
        names = [p.name for p in prompt.pictures]
        later = [i for i, name in enumerate(names) if name in names[:i]]
        pairs[len(later)] += 1
        assert len(set(names)) == len(names) - len(later)
        assert all(prompt.pictures[i].sort == prompt.pictures[names.index(names[i])].sort for i in later)
        twice, *others = prompt.questions
        assert twice.answer == (", ".join(names[i] for i in later) or "nothing")
        assert {q.task for q in others} <= set(ASKED)
    assert set(pairs) == {0, 1, 2}


def test_images_can_be_hidden_from_each_other_and_from_the_text_between(pictures, packer):
    packed = packer([draw_repeats(pictures, random.Random(3), n, 4) for n in (2, 4)])
    image = packer._encode(IMAGE)[0]
    for row, prefix in enumerate(packed.prefix):
        is_image = packed.input_ids[row] == image
        number = torch.repeat_interleave(torch.arange(4), TOKENS)[: int(is_image.sum())]
        before = packed.mask[row, 0]
        apart = hide(packed, image, Hidden.FROM_IMAGES).mask[row, 0]
        other = number[:, None] != number[None, :]
        seen = before[is_image][:, is_image]
        assert torch.equal(apart[is_image][:, is_image], seen & ~other)
        assert torch.equal(apart[~is_image], before[~is_image])
        assert torch.equal(apart[:, ~is_image], before[:, ~is_image])
        blind = hide(packed, image, Hidden.FROM_TEXT).mask[row, 0]
        text = ~is_image & (torch.arange(len(is_image)) < prefix)
        assert not blind[text][:, is_image].any()
        assert torch.equal(blind[~text], before[~text])
        assert torch.equal(blind[:, ~is_image], before[:, ~is_image])


def test_the_probe_is_told_which_pictures_repeat(pictures):
    layer = torch.nn.Identity()
    probe = Probe(layer, 8)
    prompts = [draw_repeats(pictures, random.Random(i), 4, 1) for i in range(3)]
    where = torch.ones(3, 4 * TOKENS, dtype=torch.bool)
    again = torch.tensor([[float(name >= 0) for name in repeated(p.pictures)] for p in prompts])
    layer((again.repeat_interleave(TOKENS, 1) * 2 - 1)[..., None].expand(-1, -1, 8))
    with torch.no_grad():
        probe.say.weight.fill_(1.0)
        probe.say.bias.zero_()
    loss, repeats, new = probe(where, [p.pictures for p in prompts])
    assert (repeats, new) == (1.0, 1.0)
    assert loss < 0.01


def test_a_course_that_was_cut_off_goes_on_as_if_it_had_not_been(tmp_path):
    def weights(file, stops):
        for steps in stops:
            torch.manual_seed(0)
            weight = torch.nn.Parameter(torch.randn(4))
            course = Course(tmp_path / file, [weight], 6, 0.1, 1e9)
            if course.saved is not None:
                weight.data.copy_(course.saved["added"])
            while course.goes_on() and course.step < steps:
                loss = (weight * torch.arange(4) - course.step).square().sum()
                course.learn(loss, 10)
                course.right["kind"].append(1.0)
            course.save(loss, {}, added=weight.data)
        return weight

    assert torch.equal(weights("whole.pt", [6]), weights("parts.pt", [2, 6]))
    lines = [json.loads(line) for line in (tmp_path / "parts.jsonl").read_text().splitlines()]
    assert [(x["step"], x["tokens"], x["train"]) for x in lines] == [
        (n, 10 * n, {"kind": 1.0}) for n in (2, 6)
    ]
