"""Times methods beside the full cache over batch sizes and image counts; all take turns in one run."""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from capsight.cache_argument import CACHE
from capsight.evaluation.asking import to_device
from capsight.evaluation.bench_row import BenchRow
from capsight.evaluation.cache_bytes import CacheBytes
from capsight.evaluation.items import Item, reference_items
from capsight.evaluation.prefill import Prefill, observes
from capsight.evaluation.prompting import chat_text
from capsight.evaluation.sharing import FULL
from capsight.evaluation.stock import compiled, why_not_compiled
from capsight.evaluation.summary import split_label
from capsight.evaluation.timing import Timing, medians, time_once
from capsight.execution import inputs_device
from capsight.kvcapsule import CacheMethod, LatentMethod
from capsight.kvcapsule.method import reads_latent
from capsight.layout import build_layout
from capsight.runtime import Decode, enable

_log = logging.getLogger("capsight")


@dataclass(frozen=True, slots=True)
class Variant:
    """What is timed as one.

    Attributes:
        label: of the method, such as "heads 0.4".
        method: None is the full cache.
        decode: how attention gets at capsules; None for what suits the method.
        compiled: whether decode steps run in a graph.
    """

    label: str
    method: CacheMethod | None = None
    decode: Decode | None = None
    compiled: bool = False

    def enabled(self, model: Any, room: int) -> AbstractContextManager[Any]:
        """The model with this method; `room` is the tokens a row that there will be at most."""
        enter = partial(enable, model, capsule=self.method, decode=self.decode)
        return compiled(enter, room) if self.compiled else enter()


def variants(
    methods: Mapping[str, CacheMethod], decodes: Sequence[Decode], with_compiled: bool = False
) -> list[Variant]:
    """The full cache, then every method, once for each way to decode that is given if it has capsules.

    Each is followed by itself with compiled steps, if these are asked for.
    """
    expanded = [Variant(FULL)]
    for label, method in methods.items():
        if not decodes or not isinstance(method, LatentMethod):
            expanded.append(Variant(label, method))
            continue
        for way in decodes:
            expanded.append(Variant(label, method.for_latent() if way == "latent" else method, way))
    if with_compiled:
        expanded = [each for own in expanded for each in (own, replace(own, compiled=True))]
    return expanded


def batch_inputs(processor: Any, items: Sequence[Item]) -> dict[str, Any]:
    """Processor outputs of one left-padded row per item, each with its first question."""
    texts = [chat_text(processor, len(i.images), i.asks[0].question) for i in items]
    images = [list(i.images) for i in items]
    return dict(processor(text=texts, images=images, return_tensors="pt", padding=True))


def bench(
    model: Any,
    processor: Any,
    timed: Sequence[Variant],
    batches: Sequence[int],
    images: Sequence[int],
    new_tokens: int = 32,
    runs: int = 3,
) -> Iterator[BenchRow]:
    """Time variants on prompts of the reference task.

    Args:
        model: the model.
        processor: its processor.
        timed: of `variants`, the full cache first; those whose steps cannot be compiled are left out, and a
            log line says why.
        batches: batch sizes.
        images: image counts.
        new_tokens: tokens generated per row.
        runs: counted runs, after one that warms up; variants take turns, run by run.

    Yields:
        Rows, the full cache first at every batch size and image count.
    """
    for count in images:
        for batch in batches:
            inputs = batch_inputs(processor, list(reference_items("calibration", count, batch)))
            inputs = to_device(inputs, inputs_device(model))
            timed = [own for own in timed if not own.compiled or _is_compiled(own, model, inputs, new_tokens)]
            timings = _timings(model, inputs, timed, new_tokens, runs)
            filling = _encode_seconds(model, inputs, timed, runs)
            for variant, timing, encode in zip(timed, timings, filling, strict=True):
                nbytes, peak = _memory(model, inputs, variant, new_tokens)
                name, retained = split_label(variant.label)
                yield BenchRow(
                    method=name,
                    retained=retained,
                    batch=batch,
                    images=count,
                    prompt_tokens=inputs["input_ids"].shape[1],
                    ttft_s=timing.ttft_s,
                    tokens_per_s=timing.tokens_per_s,
                    kv_bytes=nbytes.kv,
                    module_bytes=0 if variant.method is None else variant.method.module_nbytes,
                    encode_s=encode,
                    peak_bytes=peak,
                    decode=variant.decode,
                    state_bytes=nbytes.states,
                    compiled=variant.compiled,
                )


def _is_compiled(variant: Variant, model: Any, inputs: Mapping[str, Any], new_tokens: int) -> bool:
    """Whether steps are, by then."""
    with variant.enabled(model, _room(inputs, new_tokens)) as fast:
        reason = why_not_compiled(fast, inputs)
    if reason:
        _log.warning("decode steps of %s are not compiled: %s", variant.label, reason)
    return not reason


def _room(inputs: Mapping[str, Any], new_tokens: int) -> int:
    """Tokens a row that a generation has."""
    return int(inputs["input_ids"].shape[1]) + new_tokens


def _timings(
    model: Any, inputs: Mapping[str, Any], timed: Sequence[Variant], new_tokens: int, runs: int
) -> list[Timing]:
    by_variant: list[list[Timing]] = [[] for _ in timed]
    for _ in range(1 + runs):
        for variant, timings in zip(timed, by_variant, strict=True):
            with variant.enabled(model, _room(inputs, new_tokens)) as fast:
                timings.append(time_once(fast, inputs, new_tokens))
    return [medians(timings[1:]) for timings in by_variant]


def _encode_seconds(
    model: Any, inputs: Mapping[str, Any], timed: Sequence[Variant], runs: int
) -> list[float]:
    chosen = [variant.method for variant in timed if variant.method is not None]
    layout = build_layout(inputs, model.config)
    observe = any(observes(method, layout, model.config) for method in chosen)
    by_variant: list[list[float]] = [[] for _ in timed]
    needy = next((m for m in chosen if m.needs_attention or reads_latent(m)), None)
    with enable(model, capsule=needy), torch.no_grad():
        prefill = Prefill.record(model, inputs, None, observe)
        for _ in range(1 + runs):
            for variant, seconds in zip(timed, by_variant, strict=True):
                seconds.append(_seconds(partial(_fill, prefill, variant.method), model.device))
    return [median(seconds[1:]) for seconds in by_variant]


def _fill(prefill: Prefill, method: CacheMethod | None) -> None:
    CacheBytes.of(prefill.cache(method))  # asking for its bytes has a cache encode what it put off


def _memory(
    model: Any, inputs: Mapping[str, Any], variant: Variant, new_tokens: int
) -> tuple[CacheBytes, int | None]:
    """Bytes of the cache after the first token, and the peak of a whole generation."""

    def generate(tokens: int) -> Any:
        with variant.enabled(model, _room(inputs, new_tokens)) as fast:
            return fast.generate(
                **inputs,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                return_dict_in_generate=True,
            )

    nbytes = CacheBytes.of(generate(2)[CACHE])
    return nbytes, peak_bytes(lambda: generate(new_tokens), model.device)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


_PROCESS = Path("/proc/self")


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Run something and say how much memory it held at most, beyond what was held before.

    On CUDA, torch's own count; on a CPU, growth of the process's resident memory, which Linux alone tells
    and which counts what glibc keeps of blocks that were freed between others.

    Args:
        run: the work; run it once before, so that what it loads only once is there.
        device: where it allocates.

    Returns:
        Bytes, or None where this cannot be measured.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        with suppress(OSError, AttributeError):  # give back what is free, or the run would use it unseen
            ctypes.CDLL(None).malloc_trim(0)
        (_PROCESS / "clear_refs").write_text("5")  # sets the high-water mark back
        before = _status("VmRSS")
        run()
        return max(0, _status("VmHWM") - before)
    except (OSError, StopIteration):
        run()
        return None


def _status(name: str) -> int:
    lines = (_PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
