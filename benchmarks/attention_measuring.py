"""What the attention benchmarks share: prompts, timing in turns, memory, the machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capsight.execution import processor
from capsight.layout import PromptLayout, RowLayout, VisionBlock

TEXT_TOKENS = 256
"""Tokens of the instructions before the images (a quarter) and of the question after them."""

Run = Callable[[], Tensor]


def images_of(length: int) -> int:
    """8 images up to 4k tokens, 32 at 36k, in between in proportion."""
    return max(8, min(32, round(length / 1152)))


def layout_of(length: int, images: int) -> PromptLayout:
    """One prompt: a quarter of the text, so many equal images between delimiters, the rest of the text."""
    size = (length - TEXT_TOKENS) // images - 2
    position, blocks = TEXT_TOKENS // 4, []
    for image in range(images):
        start, end = position + 1, position + 1 + size
        blocks.append(VisionBlock(start, end, "image", (1, 1, size), image, (position, end)))
        position = end + 1
    return PromptLayout((RowLayout(length, 0, tuple(blocks)),))


def tensors(length: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: str) -> Any:
    """Query `[1, Hq, S, D]`, key and value `[1, Hkv, S, D]`, normally distributed."""
    generator = torch.Generator().manual_seed(length)
    return [
        torch.randn(1, h, length, head_dim, generator=generator).to(device, dtype)
        for h in (heads, kv_heads, kv_heads)
    ]


def measure(
    runs: Mapping[str, Run], repeats: int, device: str, rivals: Collection[str] = ()
) -> dict[str, float]:
    """Median seconds of each run; they take turns, after one warm-up each.

    Of the rivals only the fastest counts, so those that take twice as long are timed once.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        best = min((t for name in rivals for t in times[name]), default=float("inf"))
        for name, run in runs.items():
            if name in rivals and times[name] and min(times[name]) > 2 * best:
                continue
            wait(device)
            start = time.perf_counter()
            run()
            wait(device)
            if repeat:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes(run: Run, device: str) -> int:
    """Bytes that a run, already warm, holds at its peak beyond those held before it (CPU: Linux only)."""
    run()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def wait(device: str) -> None:
    """Until the device is idle."""
    if device == "cuda":
        torch.cuda.synchronize()


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": processor(),
        "cores": torch.get_num_threads(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "torch": torch.__version__,
    }


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
