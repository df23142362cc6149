"""Times methods beside the full cache over batch sizes and image counts, interleaved in one run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from capsight.evaluation.asking import cache_nbytes, chat_text
from capsight.evaluation.items import Item, reference_items
from capsight.evaluation.run import FULL
from capsight.evaluation.timing import time_generation
from capsight.kvcapsule import CacheMethod
from capsight.runtime import enable


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One method at one batch size and image count.

    Attributes:
        method: its name; "full" is the full cache.
        retained: fraction of the vision KV kept; None for "full".
        batch: rows.
        images: images per row.
        prompt_tokens: tokens per row, padding included.
        ttft_s: seconds to the first token, median.
        tokens_per_s: new tokens per second over all rows, after the first; median.
        kv_bytes: bytes of the cache when generation ends, modules not counted.
        module_bytes: bytes of the method's own tensors.
        peak_bytes: peak device memory of a run; None on the CPU.
    """

    method: str
    retained: float | None
    batch: int
    images: int
    prompt_tokens: int
    ttft_s: float
    tokens_per_s: float
    kv_bytes: int
    module_bytes: int
    peak_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-ready."""
        return asdict(self)


def batch_inputs(processor: Any, items: Sequence[Item]) -> dict[str, Any]:
    """Processor outputs of one left-padded row per item, each with its first question."""
    texts = [chat_text(processor, len(i.images), i.asks[0].question) for i in items]
    images = [list(i.images) for i in items]
    return dict(processor(text=texts, images=images, return_tensors="pt", padding=True))


def bench(
    model: Any,
    processor: Any,
    methods: Sequence[tuple[CacheMethod, float]],
    batches: Sequence[int],
    images: Sequence[int],
    new_tokens: int = 32,
    runs: int = 3,
) -> Iterator[BenchRow]:
    """Time the full cache and every method on prompts of the reference task.

    Args:
        model: the model.
        processor: its processor.
        methods: each with its retained fraction.
        batches: batch sizes.
        images: image counts.
        new_tokens: tokens generated per row.
        runs: counted runs, after one that warms up.

    Yields:
        Rows, the full cache first at every batch size and image count.
    """
    for count in images:
        for batch in batches:
            inputs = batch_inputs(processor, list(reference_items("calibration", count, batch)))
            inputs = {k: v.to(model.device) if hasattr(v, "to") else v for k, v in inputs.items()}
            for method, retained in [(None, None), *methods]:
                yield _row(model, inputs, method, retained, count, new_tokens, runs)


def _row(
    model: Any,
    inputs: Mapping[str, Any],
    method: CacheMethod | None,
    retained: float | None,
    images: int,
    new_tokens: int,
    runs: int,
) -> BenchRow:
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with enable(model, capsule=method) as fast:
        timing = time_generation(fast, inputs, new_tokens, runs)
        out: Any = fast.generate(
            **inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False, return_dict_in_generate=True
        )
    return BenchRow(
        method=FULL if method is None else method.name,
        retained=retained,
        batch=inputs["input_ids"].shape[0],
        images=images,
        prompt_tokens=inputs["input_ids"].shape[1],
        ttft_s=timing.ttft_s,
        tokens_per_s=timing.tokens_per_s,
        kv_bytes=cache_nbytes(out.past_key_values)[0],
        module_bytes=getattr(method, "module_nbytes", 0),
        peak_bytes=torch.cuda.max_memory_allocated() if cuda else None,
    )
