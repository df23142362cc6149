"""The part of vLLM's scheduler that owns blocks: it frees those that a request's images no longer need.

Images shrink into the last blocks of their region (see `serving.plan`), in place. These blocks are *written*:
they belong to one request alone and are never found by another. All blocks in front of them stay as they were
read and are hashed, so a request with the same images finds them in the prefix cache, also after they have
been freed, and reads only what comes behind. What it finds where its own images will be written, because its
prompt has fewer or more images, it takes over, or copies if somebody else reads it, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from capsight.errors import UnsupportedModelError
from capsight.serving.plan import BlockPlan


class CapsuleManager(FullAttentionManager):
    """Blocks of requests whose images shrink in the step that reads the prompt's last token."""

    def __init__(self, kv_cache_spec: Any, **options: Any) -> None:
        """Take what vLLM's manager takes."""
        super().__init__(kv_cache_spec, **options)
        self._hashes: bool = options["enable_caching"]
        self.enable_caching = True  # the coordinator then shows each request to `cache_blocks`
        self._capsules = kv_cache_spec.capsules
        self._known: dict[str, tuple[Any, BlockPlan | None]] = {}  # requests with images
        self._shown: set[int] = set()  # blocks that were hashed, from the first image of a prompt on

    def find_longest_cache_hit(
        self, block_hashes: Any, max_length: int, **options: Any
    ) -> tuple[tuple[list[Any], ...], int]:
        """What of a prompt is in memory; nothing where there is no room for the copies it may take."""
        found, length = super().find_longest_cache_hit(block_hashes, max_length, **options)
        read = sum(block.ref_cnt > 0 for block in found[0])  # by other requests, at this moment
        copies = sum(block.ref_cnt > 0 and block.block_id in self._shown for block in found[0])
        needed = -(-(max_length + 1) // self.block_size) - read + copies
        if copies and needed > self.block_pool.get_num_free_blocks():
            return tuple([] for _ in found), 0
        return found, length

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[Any]:
        """Blocks for more tokens."""
        new = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        self._shown.difference_update(block.block_id for block in new)
        return new

    def cache_blocks(
        self,
        request: Any,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Note where a new request's images lie, and hash its blocks; those of images one step later.

        Only then have they been computed, and a request that finds them may have to copy them.

        Raises:
            UnsupportedModelError: the prompt has images and is streamed in, so its end is not known.
        """
        ranges = self._ranges(request)
        if ranges and request.resumable:
            raise UnsupportedModelError(
                "capsight serves no prompts with images that are streamed in; send them whole"
            )
        if ranges and request.request_id not in self._known:
            plan = self._capsules.plan(ranges, request.num_prompt_tokens, self.block_size)
            self._known[request.request_id] = request, plan
            if plan is not None:
                self._own(request.request_id, plan.written)
        if ranges:
            front = min(start for start, _ in ranges) // self.block_size * self.block_size
            num_tokens = min(num_tokens, max(front, request.num_computed_tokens))
        self._hash(request, num_tokens, retention_interval, replay_boundaries)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free what the images gave up, once the worker has read the whole prompt."""
        request, plan = self._known.get(request_id, (None, None))
        if (
            plan is not None
            and num_prompt_tokens is not None
            and processed_computed_tokens >= num_prompt_tokens
        ):
            self._hash(request, num_prompt_tokens)
            self._remove_blocks_in_range(request_id, plan.freed.start, plan.freed.stop)

    def pop_blocks_for_free(self, request_id: str) -> Any:
        """Forget a request that ended, was aborted or was preempted; what it had read may be found."""
        request, _ = self._known.get(request_id, (None, None))
        if request is not None:
            self._hash(request, min(request.num_computed_tokens, request.num_prompt_tokens))
            del self._known[request_id]
        return super().pop_blocks_for_free(request_id)

    def _hash(
        self, request: Any, tokens: int, interval: int | None = None, boundaries: Sequence[int] = ()
    ) -> None:
        """Let other requests find the first blocks of one, up to those that are written."""
        _, plan = self._known.get(request.request_id, (None, None))
        if plan is not None:
            tokens = min(tokens, plan.written.start * self.block_size)
        if not self._hashes:
            return
        super().cache_blocks(request, tokens, interval, replay_boundaries=boundaries)
        if ranges := self._ranges(request):
            first, end = min(start for start, _ in ranges) // self.block_size, tokens // self.block_size
            blocks = self.req_to_blocks[request.request_id][first:end]
            self._shown.update(block.block_id for block in blocks if not block.is_null)

    def _own(self, request_id: str, written: range) -> None:
        """Make blocks that a new request found, and will write, its own."""
        blocks = self.req_to_blocks[request_id]
        for index in written:
            if index >= len(blocks) or blocks[index].block_hash is None:
                continue
            if blocks[index].ref_cnt == 1:
                self.block_pool.evict_blocks({blocks[index].block_id})
            else:
                (copy,) = self.block_pool.get_new_blocks(1)
                self._shown.discard(copy.block_id)
                self._apply_cow(request_id, index, blocks[index], copy)

    @staticmethod
    def _ranges(request: Any) -> list[tuple[int, int]]:
        """First and last position of each image's tokens, as the worker's `mm_req_doc_ranges` has them."""
        return [
            span
            for feature in request.mm_features
            if feature.modality != "audio"
            for span in feature.mm_position.extract_embeds_range()
        ]
