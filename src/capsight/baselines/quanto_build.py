"""Waiting for optimum-quanto's kernels: torch builds them at first use, and outwaits a build that died."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path

from capsight.errors import CapsightError

ABANDONED_S = 300.0
"""Seconds after which a build counts as cut off; that of the CPU kernels takes less than one minute."""


def wait_for_kernels(folder: Path | None = None) -> None:
    """Return once no other process builds kernels: while one does, a file named `lock` lies beside them.

    Args:
        folder: that of optimum-quanto's extensions; None to look it up.

    Raises:
        CapsightError: a lock is older than `ABANDONED_S`, so whoever made it was killed.
    """
    if folder is None:
        spec = find_spec("optimum.quanto")
        if spec is None or spec.origin is None:
            return
        folder = Path(spec.origin).parent / "library" / "extensions"
    while ages := {lock: _age_s(lock) for lock in folder.glob("*/build/lock")}:
        lock, age = max(ages.items(), key=lambda pair: pair[1])
        if age > ABANDONED_S:
            raise CapsightError(
                f"a build of optimum-quanto's kernels was cut off {age:.0f} s ago and torch waits for it "
                f"without end; if no other process builds them, delete {lock}"
            )
        time.sleep(0.5)


def _age_s(lock: Path) -> float:
    try:
        return time.time() - lock.stat().st_mtime
    except FileNotFoundError:  # the build ended
        return 0.0
