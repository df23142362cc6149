"""The part of vLLM's scheduler that owns blocks: it frees those that a request's images no longer need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from capsight.errors import UnsupportedModelError
from capsight.serving.plan import RequestPlan, plan_request


class CapsuleManager(FullAttentionManager):
    """Blocks of requests whose images shrink, in place, in the step that reads the prompt's last token.

    Blocks in front of the first image are hashed, so that prompts share them. Those from there on are not:
    they will hold what is kept of the images, and text that was computed from it; and a request whose own
    images are too few to shrink must not share theirs with one that writes to them.
    """

    def __init__(self, kv_cache_spec: Any, **options: Any) -> None:
        """Take what vLLM's manager takes."""
        super().__init__(kv_cache_spec, **options)
        self._hashes: bool = options["enable_caching"]
        self.enable_caching = True  # the coordinator then shows each request to `cache_blocks`
        self._retained: float = kv_cache_spec.retained
        self._plans: dict[str, RequestPlan | None] = {}

    def cache_blocks(
        self,
        request: Any,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Note where the request's images lie, and hash the blocks in front of the first.

        Raises:
            UnsupportedModelError: the prompt has images and is streamed in, so its end is not known.
        """
        ranges = self._ranges(request)
        if ranges and request.resumable:
            raise UnsupportedModelError(
                "capsight serves no prompts with images that are streamed in; send them whole"
            )
        if request.request_id not in self._plans:
            self._plans[request.request_id] = plan_request(
                ranges, request.num_prompt_tokens, self.block_size, self._retained
            )
        if self._hashes:
            super().cache_blocks(
                request,
                min([num_tokens, *(start // self.block_size * self.block_size for start, _ in ranges)]),
                retention_interval=retention_interval,
                replay_boundaries=replay_boundaries,
            )

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free what the images gave up, once the worker has read the whole prompt."""
        plan = self._plans.get(request_id)
        if (
            plan is not None
            and num_prompt_tokens is not None
            and processed_computed_tokens >= num_prompt_tokens
        ):
            self._remove_blocks_in_range(request_id, plan.freed.start, plan.freed.stop)

    def pop_blocks_for_free(self, request_id: str) -> Any:
        """Forget a request that ended, was aborted or was preempted."""
        self._plans.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    @staticmethod
    def _ranges(request: Any) -> list[tuple[int, int]]:
        """First and last position of each image's tokens, as the worker's `mm_req_doc_ranges` has them."""
        return [
            span
            for feature in request.mm_features
            if feature.modality != "audio"
            for span in feature.mm_position.extract_embeds_range()
        ]
