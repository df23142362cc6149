"""Times methods beside the full cache over batch sizes and image counts; all take turns in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch

from capsight.evaluation.asking import cache_nbytes, chat_text, to_device
from capsight.evaluation.bench_row import BenchRow
from capsight.evaluation.items import Item, reference_items
from capsight.evaluation.memory import peak_bytes
from capsight.evaluation.prefill import Prefill, observes
from capsight.evaluation.sharing import FULL
from capsight.evaluation.summary import split_label
from capsight.evaluation.timing import Timing, medians, time_once
from capsight.kvcapsule import CacheMethod
from capsight.layout import build_layout
from capsight.runtime import enable

Methods = Mapping[str, CacheMethod | None]
"""By label, such as "adaptive 0.4"; None is the full cache."""


def batch_inputs(processor: Any, items: Sequence[Item]) -> dict[str, Any]:
    """Processor outputs of one left-padded row per item, each with its first question."""
    texts = [chat_text(processor, len(i.images), i.asks[0].question) for i in items]
    images = [list(i.images) for i in items]
    return dict(processor(text=texts, images=images, return_tensors="pt", padding=True))


def bench(
    model: Any,
    processor: Any,
    methods: Mapping[str, CacheMethod],
    batches: Sequence[int],
    images: Sequence[int],
    new_tokens: int = 32,
    runs: int = 3,
) -> Iterator[BenchRow]:
    """Time the full cache and every method on prompts of the reference task.

    Args:
        model: the model.
        processor: its processor.
        methods: by label, such as "adaptive 0.4".
        batches: batch sizes.
        images: image counts.
        new_tokens: tokens generated per row.
        runs: counted runs, after one that warms up; methods take turns, run by run.

    Yields:
        Rows, the full cache first at every batch size and image count.
    """
    everything: dict[str, CacheMethod | None] = {FULL: None} | dict(methods)
    for count in images:
        for batch in batches:
            inputs = batch_inputs(processor, list(reference_items("calibration", count, batch)))
            inputs = to_device(inputs, model.device)
            timings = _timings(model, inputs, everything, new_tokens, runs)
            filling = _encode_seconds(model, inputs, everything, runs)
            for label, method in everything.items():
                kv_bytes, peak = _memory(model, inputs, method, new_tokens)
                name, retained = split_label(label)
                yield BenchRow(
                    method=name,
                    retained=retained,
                    batch=batch,
                    images=count,
                    prompt_tokens=inputs["input_ids"].shape[1],
                    ttft_s=timings[label].ttft_s,
                    tokens_per_s=timings[label].tokens_per_s,
                    kv_bytes=kv_bytes,
                    module_bytes=0 if method is None else method.module_nbytes,
                    encode_s=filling[label],
                    peak_bytes=peak,
                )


def _timings(
    model: Any, inputs: Mapping[str, Any], methods: Methods, new_tokens: int, runs: int
) -> dict[str, Timing]:
    found: dict[str, list[Timing]] = {label: [] for label in methods}
    for _ in range(1 + runs):
        for label, method in methods.items():
            with enable(model, capsule=method) as fast:
                found[label].append(time_once(fast, inputs, new_tokens))
    return {label: medians(timings[1:]) for label, timings in found.items()}


def _encode_seconds(model: Any, inputs: Mapping[str, Any], methods: Methods, runs: int) -> dict[str, float]:
    chosen = [method for method in methods.values() if method is not None]
    layout = build_layout(inputs, model.config)
    observe = any(observes(method, layout, model.config) for method in chosen)
    found: dict[str, list[float]] = {label: [] for label in methods}
    with enable(model, capsule=next((m for m in chosen if m.needs_attention), None)), torch.no_grad():
        prefill = Prefill.record(model, inputs, None, observe)
        for _ in range(1 + runs):
            for label, method in methods.items():
                found[label].append(_seconds(partial(_fill, prefill, method), model.device))
    return {label: median(seconds[1:]) for label, seconds in found.items()}


def _fill(prefill: Prefill, method: CacheMethod | None) -> None:
    cache_nbytes(prefill.cache(method))  # asking for its bytes has a cache encode what it put off


def _memory(
    model: Any, inputs: Mapping[str, Any], method: CacheMethod | None, new_tokens: int
) -> tuple[int, int | None]:
    """Bytes of the cache after the first token, and the peak of a whole generation."""
    with enable(model, capsule=method) as fast:

        def generate(tokens: int) -> Any:
            return fast.generate(
                **inputs,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                return_dict_in_generate=True,
            )

        nbytes = cache_nbytes(generate(2).past_key_values)[0]
        fast.cache = None
        return nbytes, peak_bytes(lambda: generate(new_tokens), model.device)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
