"""Plans of paged requests: pure arithmetic, and what a step makes of them. Needs no vLLM."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from capsight.errors import OptionError
from capsight.serving.plan import Latents, Slots, plan_request
from capsight.serving.select import leverage, select_tokens
from capsight.serving.vllm.steps import shortened, shrink_step


@st.composite
def prompts(draw):
    """Ranges of images, as vLLM has them, and the length of their prompt."""
    ranges, at = [], 0
    for _ in range(draw(st.integers(0, 5))):
        start = at + draw(st.integers(0, 40))
        at = start + draw(st.integers(1, 90))
        ranges.append((start, at - 1))
    return ranges, at + draw(st.integers(0, 70))


SIZES = st.sampled_from([1, 8, 16, 32])
RETAINED = st.sampled_from([0.01, 0.05, 0.1, 0.3, 0.4, 0.75, 1.0])


@given(prompts(), SIZES, RETAINED)
def test_what_stays_and_what_goes(prompt, size, retained):
    ranges, length = prompt
    plan = plan_request(ranges, length, size, retained)
    full = length // size  # blocks that the prompt fills
    if plan is None:
        return
    assert 0 <= plan.first < plan.first + plan.kept_blocks < plan.first + plan.blocks <= full
    assert plan.first == ranges[0][0] // size
    assert list(plan.freed) == list(range(plan.first, plan.written.start))
    assert len(plan.written) == plan.kept_blocks
    assert plan.written.stop == plan.first + plan.blocks
    shown = {p for a, b in ranges for p in range(a, b + 1)}
    region = range(plan.first * size, (plan.first + plan.blocks) * size)
    assert {region.start + p for a, b in plan.images for p in range(a, b)} == shown & set(region)
    assert all(p // size >= full for p in shown - set(region))  # those in a block that is not full stay
    assert plan.image_tokens == len(shown & set(region))
    # All text stays, and of the images what was asked for, to half a block, or at least a token each.
    assert plan.kept_image_tokens >= len(plan.images)
    more = plan.kept_image_tokens - retained * plan.image_tokens
    assert more >= -size / 2 - 1e-6
    assert more <= size / 2 + 1e-6 or plan.kept_image_tokens < len(plan.images) + size
    assert plan.kept_image_tokens + len(region) - plan.image_tokens == plan.kept_blocks * size


@given(prompts(), SIZES)
def test_all_that_is_kept_changes_nothing(prompt, size):
    assert plan_request(*prompt, size, 1.0) is None


@pytest.mark.parametrize("retained", [0, -0.1, 1.01, math.nan])
def test_impossible_shares(retained):
    with pytest.raises(OptionError, match="retained"):
        plan_request([(0, 63)], 80, 32, retained)
    with pytest.raises(OptionError, match="block"):
        plan_request([(0, 63)], 80, 0, 0.4)


@given(prompts(), SIZES, st.integers(1, 9), st.integers(2, 300), st.integers(8, 1024))
def test_latents_and_text_fit_into_what_stays(prompt, size, layers, latent_nbytes, token_nbytes):
    ranges, length = prompt
    kind = Latents(layers, latent_nbytes, token_nbytes)
    plan = kind.plan(ranges, length, size)
    shown = {p for a, b in ranges for p in range(a, b + 1)}
    if plan is None:
        return
    assert 0 < plan.kept_blocks < plan.blocks
    assert plan.first == ranges[0][0] // size
    assert plan.first + plan.blocks <= length // size
    assert plan.written.stop == plan.first + plan.blocks
    # All images have latents, whatever lies in front of `after` and is no image is text.
    assert plan.image_tokens == len(shown)
    assert max(shown) < plan.after <= length
    assert plan.after >= plan.written.stop * size
    assert plan.text_tokens == plan.after - plan.first * size - len(shown) >= 0
    nbytes = plan.text_tokens * token_nbytes + kind.share(len(shown)) * latent_nbytes
    room = size * token_nbytes
    assert (plan.kept_blocks - 1) * room < nbytes <= plan.kept_blocks * room
    assert kind.share(len(shown)) * layers >= len(shown)


def test_latents_of_images_that_end_in_a_block_that_is_not_full():
    kind = Latents(4, 10, 256)
    plan = kind.plan([(40, 139), (150, 259)], 270, 32)
    assert plan is not None
    assert (plan.first, plan.blocks, plan.kept_blocks) == (1, 7, 1)
    assert plan.images == ((8, 108), (118, 228))
    assert (plan.after, plan.text_tokens, plan.image_tokens) == (260, 18, 210)
    assert kind.plan([(40, 70)], 200, 32) is None  # nothing would be freed
    assert kind.plan([], 200, 32) is None
    assert Slots(0.4).plan([(40, 139)], 200, 32) == plan_request([(40, 139)], 200, 32, 0.4)


def test_a_step_of_requests_that_shrink_have_shrunk_and_have_no_images():
    ranges = [(2, 66)]
    plan = plan_request(ranges, 80, 16, 0.4)
    assert plan is not None
    assert (plan.first, plan.blocks, plan.kept_blocks) == (0, 5, 3)
    tables = torch.arange(4 * 8).view(4, 8)
    step = SimpleNamespace(
        query_start_loc_cpu=torch.tensor([0, 60, 80, 81, 111]),
        seq_lens=torch.tensor([60, 80, 97, 90]),  # being read, read to its end, decoding, read again
        block_table_tensor=tables,
        mm_req_doc_ranges=dict.fromkeys(range(4), ranges),
    )
    short, lengths, shrinking = shrink_step(step, [80] * 4, 16, 0.4)
    assert lengths.tolist() == [60, 80, 97 - 32, 90]
    assert short[2, :6].tolist() == [18, 19, 20, 21, 22, 23]
    assert torch.equal(short[[0, 1, 3]], tables[[0, 1, 3]])
    assert torch.equal(tables, torch.arange(4 * 8).view(4, 8))
    assert [request.tail for request in shrinking] == [(80, 80), (101, 111)]
    assert shrinking[1].region.tolist() == [24, 25, 26, 27, 28]
    assert shortened(tables[3], plan)[:6].tolist() == [26, 27, 28, 29, 30, 31]
    step.mm_req_doc_ranges = None
    assert shrink_step(step, [80] * 4, 16, 0.4)[2] == ()


def test_heads_choose_alone_and_what_stands_out():
    torch.manual_seed(0)
    keys, values = torch.randn(2, 3, 50, 8)
    keys[1, 7], values[1, 7] = 9, -9
    both = select_tokens(keys, values, 10, [20, 30])
    assert both.shape == (3, 10)
    assert 7 in both[1].tolist()
    assert torch.equal(both, both.sort(1).values)
    assert torch.equal(both[1:2], select_tokens(keys[1:2], values[1:2], 10, [20, 30]))


def test_every_image_has_its_part_of_half_the_tokens():
    torch.manual_seed(0)
    keys, values = torch.randn(2, 3, 60, 8)
    keys[:, 2:40], values[:, 2:40] = 20 * keys[:, 2:40], 20 * values[:, 2:40]  # the first two say nothing
    chosen = select_tokens(keys, values, 12, [2, 38, 20])
    assert (chosen < 2).sum(1).tolist() == [2] * 3
    assert ((chosen >= 40).sum(1) == 2).all()
    few = select_tokens(keys, values, 3, [2, 38, 20])
    assert ((few < 2).sum(1) == 1).all()
    assert ((few >= 40).sum(1) == 1).all()


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
def test_exactly_as_many_as_asked_for(images, data):
    count = data.draw(st.integers(len(images), sum(images)))
    keys, values = torch.randn(2, 2, sum(images), 4, generator=torch.Generator().manual_seed(0))
    chosen = select_tokens(keys, values, count, images)
    assert all(len(set(head)) == count for head in chosen.tolist())
    assert all(
        set(head) & set(own.tolist())
        for head in chosen.tolist()
        for own in torch.arange(sum(images)).split(images)
    )


def test_tokens_all_alike():
    same = torch.ones(2, 20, 4)
    assert select_tokens(same, same, 5, [20]).tolist() == [[0, 1, 2, 3, 4]] * 2


def test_scores_do_not_depend_on_how_sums_are_rounded():
    channels = torch.logspace(0, -2, 32)
    keys = torch.randn(2, 300, 32, generator=torch.Generator().manual_seed(0)) * channels + 3 * channels
    permuted = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    scores, again = leverage(keys), leverage(keys[:, permuted])
    torch.testing.assert_close(scores[:, permuted], again, rtol=1e-9, atol=0)
