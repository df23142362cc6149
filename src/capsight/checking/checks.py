"""The checks of the family kit, each a function of a `Case` that raises or says what it saw."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import DynamicCache

import capsight
from capsight.blindsight import Category, HeadMap, MaskOptions, sparse_attention
from capsight.blindsight.calibrate.capture import LayerCall, watching
from capsight.cache_argument import CACHE
from capsight.checking.case import Case, continued, same
from capsight.errors import OptionError
from capsight.layout import build_layout
from capsight.layout.positions import positions_after, rope_positions


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one check.

    Attributes:
        name: of the check.
        passed: whether it did; None where it does not apply to the model.
        detail: one line.
    """

    name: str
    passed: bool | None
    detail: str


class NotApplicableError(Exception):
    """A check that the model cannot be put to."""


def layout(case: Case) -> str:
    """Every picture is found in the prompt."""
    actual, expected = case.layout, [len(pictures) for pictures, _ in case.rows]
    counts = [row.num_images for row in actual.rows]
    assert [bool(n) for n in counts] == [bool(n) for n in expected], f"{counts} images, not {expected}"
    return f"{actual.num_images} images, {actual.vision_tokens} vision tokens"


def positions(case: Case) -> str:
    """Rotary positions from the layout are those that the model gives its tokens."""
    seen: list[torch.Tensor] = []

    def note(module: object, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        position_ids = kwargs["position_ids"]
        position_ids = (
            position_ids[-3:] if position_ids.ndim == 3 else position_ids.expand(3, *position_ids.shape)
        )
        seen.append(position_ids.expand(3, len(case.batch["input_ids"]), -1))

    hook = case.model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    try:
        answer = case.generate(case.model.generate, case.batch)
    finally:
        hook.remove()
    config, new = case.model.config, answer.sequences.shape[1] - case.layout.length - 1
    ours = torch.cat([rope_positions(case.layout, config), positions_after(case.layout, config, new)], -1)
    assert torch.equal(torch.cat(seen, -1), ours), "other positions than the model's own"
    return "as the model's own"


def whole(codec: str) -> Callable[[Case], str]:
    """With all tokens retained, a padded batch is answered as with the full cache."""

    def check(case: Case) -> str:
        return same(case.answer(case.batch, case.capsule(codec))[0], case.full)

    return check


def smaller(case: Case) -> str:
    """With 0.4 retained it runs and takes fewer bytes."""
    answer, cache = case.answer(case.batch, case.capsule(retained=0.4))
    assert all(torch.isfinite(x).all() for x in answer.logits), "logits are not finite"
    assert cache.nbytes < cache.nbytes_full, f"{cache.nbytes} bytes, the full cache {cache.nbytes_full}"
    states = f", {cache.state_nbytes} of them states" if cache.state_nbytes else ""
    return f"{cache.nbytes} bytes of {cache.nbytes_full}{states}"


def joint(case: Case) -> str:
    """Latents of the default codec take fewer bytes, and read as they are give what is rebuilt from them."""
    capsule = case.capsule("joint", 0.4)
    rebuilt, cache = case.answer(case.batch, capsule, "materialise")
    read, _ = case.answer(case.batch, capsule, "latent")
    assert cache.nbytes < cache.nbytes_full, f"{cache.nbytes} bytes, the full cache {cache.nbytes_full}"
    theirs, ours = rebuilt.logits[1], read.logits[1]  # the first ones that see latents
    worst = float((ours - theirs).abs().max() / theirs.abs().max())
    assert worst <= 0.05, f"logits differ by {worst:.1%}"  # bfloat16 arithmetic, random weights
    return f"{cache.nbytes} bytes of {cache.nbytes_full}, logits within {worst:.0e}"


def padding(case: Case) -> str:
    """A row alone is answered as in the batch."""
    alone = dict(case.make(case.rows[1:2]))
    one = case.answer(alone, case.capsule())[0].sequences[:, alone["input_ids"].shape[1] :]
    several = case.answer(case.batch, case.capsule())[0].sequences[1:2, case.layout.length :]
    assert torch.equal(one, several), "other tokens than in the batch"
    return f"{case.layout.rows[1].pad_left} tokens of padding"


def turns(case: Case) -> str:
    """A second turn goes on with the same cache."""
    full = DynamicCache(config=case.model.config)
    first = case.generate(case.model.generate, case.batch, **{CACHE: full})
    later = continued(first.sequences, case.batch)
    expected = case.generate(case.model.generate, later, **{CACHE: full})
    with capsight.enable(case.model, capsule=case.capsule()) as fast:
        case.generate(fast.generate, case.batch)
        return same(case.generate(fast.generate, later, past_key_values=fast.cache), expected)


def ask(case: Case) -> str:
    """The images are read first, the question is asked over capsules; three times, cropping in between."""
    with capsight.enable(case.model, capsule=case.capsule()) as fast:
        cache = fast.encapsulate(**case.batch)
        length = cache.get_seq_length()
        for _ in range(3):
            seen = same(case.generate(fast.generate, case.batch, past_key_values=cache), case.full)
            cache.crop(length)
    return seen


def beams(case: Case) -> str:
    """Beam search finds the same."""
    try:
        full = case.generate(case.model.generate, case.batch, num_beams=2)
    except Exception as error:  # no two families fail in the same way
        raise NotApplicableError(f"the model itself cannot: {error}") from error
    with capsight.enable(case.model, capsule=case.capsule()) as fast:
        ours = case.generate(fast.generate, case.batch, num_beams=2)
    assert torch.equal(ours.sequences, full.sequences), "other tokens than with the full cache"
    return "same tokens"


def saved(case: Case) -> str:
    """A cache that was saved and loaded answers as before."""
    for codec in ("heads", "joint"):
        with (
            capsight.enable(case.model, capsule=case.capsule(codec, 0.4)) as fast,
            tempfile.TemporaryDirectory() as folder,
        ):
            fast.encapsulate(**case.batch)
            fast.save(Path(folder) / "images")
            direct = case.generate(fast.generate, case.batch, past_key_values=fast.cache)
            loaded = fast.load(Path(folder) / "images")
            seen = same(case.generate(fast.generate, case.batch, past_key_values=loaded), direct)
    return seen


def blindsight(case: Case) -> str:
    """Sparse prefill under a map of all categories is attention by the written-out masks."""
    text = case.model.config.get_text_config(decoder=True)
    count = text.num_hidden_layers * text.num_attention_heads
    counts = dict.fromkeys(Category, count // 4) | {Category.DENSE: count // 4 + count % 4}
    options = MaskOptions(own_window=3)
    head_map = HeadMap.random(text.num_hidden_layers, text.num_attention_heads, counts, 1, options)

    def masked(call: LayerCall) -> torch.Tensor:
        return sparse_attention(
            call.query,
            call.key,
            call.value,
            case.layout,
            head_map.categories[call.layer],
            implementation="reference",
            options=options,
            rule=call.rule,
            scaling=call.scaling,
        )

    with watching(case.model, masked), torch.no_grad():
        expected = case.model(**case.batch, use_cache=False, logits_to_keep=1).logits[:, -1]
    with capsight.enable(case.model, head_map=head_map, prefill="sparse") as fast:
        logits = case.generate(fast.generate, case.batch).logits[0]
    worst = float((logits - expected).abs().max())
    assert worst <= 1e-4, f"logits differ by {worst:.1e}"
    return f"logits within {worst:.0e}"


def video(case: Case) -> str:
    """A batch of videos with all tokens retained is answered as with the full cache."""
    if case.make_video is None:
        raise NotApplicableError("no videos to try")
    inputs = dict(case.make_video())
    prompt = build_layout(inputs, case.model.config)
    detail = same(case.answer(inputs, case.capsule())[0], case.generate(case.model.generate, inputs))
    return f"{prompt.num_videos or prompt.num_images} of {prompt.vision_tokens} tokens, {detail}"


CHECKS: dict[str, Callable[[Case], str]] = {
    "layout": layout,
    "positions": positions,
    "joint 1.0": whole("joint"),
    "heads 1.0": whole("heads"),
    "adaptive 1.0": whole("adaptive"),
    "joint 0.4": joint,
    "heads 0.4": smaller,
    "padding": padding,
    "turns": turns,
    "ask, crop": ask,
    "beams": beams,
    "save, load": saved,
    "blindsight": blindsight,
    "video": video,
}
"""All checks by name, in order."""


def run_checks(case: Case, names: list[str] | None = None) -> list[Result]:
    """Put a model to the checks; whatever one raises is its result.

    Args:
        case: the model and its prompts.
        names: which checks; None for all.

    Raises:
        OptionError: a check is unknown.
    """
    unknown = sorted(set(names or ()) - CHECKS.keys())
    if unknown:
        raise OptionError(f"there is no check {unknown[0]!r}; there are {', '.join(CHECKS)}")
    return [_result(name, case) for name in names or CHECKS]


def _result(name: str, case: Case) -> Result:
    try:
        return Result(name, True, CHECKS[name](case))
    except NotApplicableError as error:
        return Result(name, None, str(error))
    except Exception as error:  # a check is there to find out
        text = (str(error).strip().splitlines() or [""])[0]
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        return Result(name, False, kind + text)
