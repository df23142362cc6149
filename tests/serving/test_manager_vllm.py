"""The scheduler's side of capsules, without an engine. Needs vLLM."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from capsight.errors import UnsupportedModelError
from capsight.serving.plan import Slots, plan_request
from capsight.serving.vllm.manager import CapsuleManager
from capsight.serving.vllm.spec import CapsuleSpec

SIZE, BLOCKS = 32, 40
FULL = FullAttentionSpec(block_size=SIZE, num_kv_heads=2, head_size=32, head_size_v=32, dtype=torch.float32)
SPEC = CapsuleSpec.of(FULL, Slots(0.4))


def feature(start, end, modality="image"):
    place = SimpleNamespace(extract_embeds_range=lambda: [(start, end)])
    return SimpleNamespace(modality=modality, mm_position=place)


def request(name, length, *features, resumable=False, tokens=()):
    """A request whose blocks are those of another as far as `tokens` are."""
    blocks = [tuple(tokens[:end]) for end in range(1, length // SIZE + 1)]
    return SimpleNamespace(
        request_id=name,
        num_prompt_tokens=length,
        num_computed_tokens=0,
        mm_features=list(features),
        resumable=resumable,
        shared_prefix_boundary=0,
        block_hashes=[repr((block, end)).encode() for end, block in enumerate(blocks)],
    )


@pytest.fixture(params=[True, False], ids=["prefix caching", "without"])
def manager(request):
    return made(BLOCKS, request.param)


def made(blocks=BLOCKS, hashes=True):
    pool = BlockPool(blocks, hashes, SIZE)
    return CapsuleManager(
        SPEC, block_pool=pool, enable_caching=hashes, kv_cache_group_id=0, scheduler_block_size=SIZE
    )


def found(manager, asked):
    """What of a prompt is in memory."""
    blocks, length = manager.find_longest_cache_hit(
        block_hashes=asked.block_hashes,
        max_length=asked.num_prompt_tokens - 1,
        kv_cache_group_ids=[0],
        block_pool=manager.block_pool,
        kv_cache_spec=SPEC,
        drop_eagle_block=False,
        alignment_tokens=SIZE,
    )
    assert length == len(blocks[0]) * SIZE
    return blocks[0]


def read(manager, asked, end=None):
    """Schedule a request up to `end`, as vLLM does; its blocks."""
    end = asked.num_prompt_tokens if end is None else end
    if asked.request_id not in manager.num_cached_block:
        hits = found(manager, asked) if manager._hashes else []
        manager.add_local_computed_blocks(asked.request_id, hits, len(hits) * SIZE, 0)
    manager.remove_skipped_blocks(asked.request_id, asked.num_computed_tokens, asked.num_prompt_tokens)
    manager.allocate_new_blocks(asked.request_id, end, end)
    manager.cache_blocks(asked, end, replay_boundaries=())
    asked.num_computed_tokens = end
    return [block.block_id for block in manager.req_to_blocks[asked.request_id]]


def test_vllm_knows_the_spec_and_its_own():
    assert KVCacheSpecRegistry.get_manager_class(SPEC) is CapsuleManager
    assert KVCacheSpecRegistry.get_manager_class(FULL) is FullAttentionManager
    assert KVCacheSpecRegistry.get_uniform_type_base_spec(SPEC) is FullAttentionSpec
    assert CapsuleSpec.merge([SPEC, SPEC]) == SPEC
    with pytest.raises(ValueError, match="alike"):
        CapsuleSpec.merge([SPEC, CapsuleSpec.of(FULL, Slots(0.3))])


PLAN = plan_request([(70, 333)], 400, SIZE, 0.4)  # of 12 blocks, 2 to 6 are freed, 7 to 10 written


def long(name, **options):
    return request(name, 400, feature(70, 333), feature(340, 380, "audio"), **options)


def short(name, **options):
    """Fewer images, of which more is text: it writes to blocks 4 and 5, which it shares with `long`."""
    return request(name, 210, feature(70, 190), **options)


def test_blocks_are_freed_when_the_prompt_has_been_read_and_none_leak(manager):
    assert PLAN is not None
    assert (PLAN.freed, PLAN.written) == (range(2, 7), range(7, 11))
    asked, free = long("a"), manager.block_pool.get_num_free_blocks
    before = free()
    for end in (200, 399):
        read(manager, asked, end)
        assert free() == before - -(-end // SIZE)
    read(manager, asked, 400)
    assert free() == before - 13
    read(manager, asked, 401)
    assert free() == before - 13 + 5
    manager.free("a")
    assert free() == before
    assert not manager._known


def test_the_same_images_are_found_up_to_what_is_written():
    manager = made()
    first = read(manager, long("a"))
    assert len(found(manager, long("b"))) == 2  # those of images have not been computed yet
    read(manager, manager._known["a"][0], 401)
    later = read(manager, long("b"))
    assert later[:7] == first[:7]
    assert not set(later[7:]) & set(first)
    assert not manager.take_pending_cow_copies()
    manager.free("a")
    manager.free("b")
    assert [block.block_id for block in found(manager, long("c"))] == first[:7]


def test_what_was_read_stays_when_a_request_is_preempted():
    manager, asked = made(), long("a")
    read(manager, asked, 200)
    manager.free("a")
    assert len(found(manager, long("b"))) == 6


def test_blocks_that_will_be_written_are_taken_over():
    plan = plan_request([(70, 190)], 210, SIZE, 0.4)
    assert plan.written == range(4, 6)
    manager, asked = made(), long("a")
    read(manager, asked)
    read(manager, asked, 401)
    manager.free("a")
    hits = found(manager, short("b"))
    assert len(hits) == 6
    blocks = read(manager, short("b"))
    assert blocks[:6] == [block.block_id for block in hits]
    assert not manager.take_pending_cow_copies()
    assert all(manager.block_pool.is_block_writable(manager.req_to_blocks["b"][i]) for i in plan.written)
    assert len(found(manager, long("c"))) == 4


def test_blocks_that_will_be_written_and_are_read_by_others_are_copied():
    manager, asked = made(), long("a")
    first = read(manager, asked, 300)
    read(manager, asked, 330)
    blocks = read(manager, short("b"))
    assert blocks[:4] == first[:4]
    copies = manager.take_pending_cow_copies()
    assert [(a.block_id, b.block_id) for a, b in copies] == list(zip(first[4:6], blocks[4:6], strict=True))
    manager.block_pool.free_blocks([block for pair in copies for block in pair])
    assert all(manager.block_pool.is_block_writable(manager.req_to_blocks["b"][i]) for i in (4, 5))
    assert [block.block_id for block in manager.req_to_blocks["a"][:10]] == first
    manager.free("a")
    manager.free("b")
    assert manager.block_pool.get_num_free_blocks() == BLOCKS - 1


def test_nothing_is_found_where_copies_have_no_room():
    manager = made(16)  # 10 of 15 blocks are taken by the first
    asked = long("a")
    read(manager, asked, 300)
    read(manager, asked, 310)
    assert len(found(manager, short("b"))) == 6
    manager.block_pool.get_new_blocks(1)
    assert found(manager, short("b")) == []


def test_images_too_few_to_shrink_are_shared_too(manager):
    few = request("few", 100, feature(33, 36))
    assert plan_request([(33, 36)], 100, SIZE, 0.4) is None
    read(manager, few, 100)
    read(manager, few, 101)
    assert len(found(manager, request("again", 100, feature(33, 36)))) == (3 if manager._hashes else 0)


def test_prompts_that_are_streamed_in(manager):
    manager.cache_blocks(request("text", 90, resumable=True), 90, replay_boundaries=())
    with pytest.raises(UnsupportedModelError, match="streamed in"):
        manager.cache_blocks(request("a", 90, feature(3, 60), resumable=True), 90, replay_boundaries=())
