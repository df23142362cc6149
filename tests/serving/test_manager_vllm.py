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
from capsight.serving.plan import plan_request
from capsight.serving.vllm.manager import CapsuleManager
from capsight.serving.vllm.spec import CapsuleSpec

SIZE, BLOCKS = 32, 40
FULL = FullAttentionSpec(block_size=SIZE, num_kv_heads=2, head_size=32, head_size_v=32, dtype=torch.float32)
SPEC = CapsuleSpec.of(FULL, 0.4)


def feature(start, end, modality="image"):
    place = SimpleNamespace(extract_embeds_range=lambda: [(start, end)])
    return SimpleNamespace(modality=modality, mm_position=place)


def request(name, length, *features, resumable=False):
    return SimpleNamespace(
        request_id=name, num_prompt_tokens=length, mm_features=list(features), resumable=resumable
    )


@pytest.fixture(params=[True, False], ids=["prefix caching", "without"])
def manager(request, monkeypatch):
    pool = BlockPool(BLOCKS, request.param, SIZE)
    made = CapsuleManager(
        SPEC, block_pool=pool, enable_caching=request.param, kv_cache_group_id=0, scheduler_block_size=SIZE
    )
    made.hashed = []
    note = lambda self, asked, tokens, **options: self.hashed.append(tokens)  # noqa: E731
    monkeypatch.setattr(FullAttentionManager, "cache_blocks", note)
    return made


def test_vllm_knows_the_spec_and_its_own():
    assert KVCacheSpecRegistry.get_manager_class(SPEC) is CapsuleManager
    assert KVCacheSpecRegistry.get_manager_class(FULL) is FullAttentionManager
    assert KVCacheSpecRegistry.get_uniform_type_base_spec(SPEC) is FullAttentionSpec
    assert CapsuleSpec.merge([SPEC, SPEC]) == SPEC
    with pytest.raises(ValueError, match="alike"):
        CapsuleSpec.merge([SPEC, CapsuleSpec.of(FULL, 0.3)])


def test_blocks_are_freed_when_the_prompt_has_been_read_and_none_leak(manager):
    asked = request("a", 400, feature(70, 333), feature(340, 380, "audio"))
    plan = plan_request([(70, 333)], 400, SIZE, 0.4)
    free = manager.block_pool.get_num_free_blocks
    before = free()
    manager.allocate_new_blocks("a", 400, 400)
    manager.cache_blocks(asked, 400, replay_boundaries=())
    for read in (0, 200, 399):
        manager.remove_skipped_blocks("a", read, 400)
        assert free() == before - 13
    for read in (400, 401):
        manager.remove_skipped_blocks("a", read, 400)
        assert free() == before - 13 + len(plan.freed)
    assert manager.hashed == ([64] if manager._hashes else [])
    manager.free("a")
    assert free() == before
    assert not manager._plans


def test_images_too_few_to_shrink_are_not_shared_with_requests_that_do(manager):
    asked = request("few", 40, feature(33, 36))
    assert plan_request([(33, 36)], 40, SIZE, 0.4) is None
    manager.allocate_new_blocks("few", 40, 40)
    manager.cache_blocks(asked, 40, replay_boundaries=())
    manager.cache_blocks(request("text", 90), 90, replay_boundaries=())
    assert manager.hashed == ([32, 90] if manager._hashes else [])


def test_prompts_that_are_streamed_in(manager):
    manager.cache_blocks(request("text", 90, resumable=True), 90, replay_boundaries=())
    with pytest.raises(UnsupportedModelError, match="streamed in"):
        manager.cache_blocks(request("a", 90, feature(3, 60), resumable=True), 90, replay_boundaries=())
