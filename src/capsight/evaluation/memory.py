"""Peak memory of a piece of work."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Run something and say how much memory it held at most, beyond what was held before.

    On CUDA, torch's own count; on a CPU, growth of the process's resident memory, which Linux alone tells
    and which is exact to some hundred kilobytes at best.

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
