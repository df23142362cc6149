"""Compiles the C++ of this folder at first use, once for each machine and version, and loads it.

Nothing of torch is compiled in, so it takes seconds, and what was compiled serves any version of torch. It
is put in place in one step: several processes may compile at once, and one that is cut off leaves nothing
that others would wait for.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from itertools import product
from pathlib import Path

import torch

from capsight.errors import CapsightError
from capsight.execution import has_amx, has_avx512_bf16

SWITCH = "CAPSIGHT_NATIVE"
"""Environment variable: 0 keeps attention with torch, 1 makes it an error if native code cannot be used."""

INTERFACE = 9
UNITS = ("centre.cpp", "decode.cpp", "joint.cpp", "pack.cpp", "step.cpp")
HEADERS = (
    *(
        "amx.h",
        "amx_fold.h",
        "amx_levels.h",
        "amx_nodes.h",
        "amx_open.h",
        "amx_products.h",
        "amx_tiles.h",
        "chunk.h",
        "fold.h",
    ),
    *("joint.h", "joint_chunk.h", "latents.h", "nodes.h", "numbers.h", "plan.h", "products.h", "rebuild.h"),
    *("softmax.h", "tile.h", "vectors.h"),
)
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fPIC", "-shared", "-fvisibility=hidden", "-w")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c")
_BF16 = (*_AVX512, "-mavx512bf16")
LEVELS = {
    "AMX": (*_BF16, "-mavx512vbmi", "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
    "AVX512BF16": _BF16,
    "AVX512": _AVX512,
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
    "DEFAULT": (),
}
"""Compiler flags for `best_level`; for levels that are not here, what compilers assume."""

_P, _N = ctypes.c_void_p, ctypes.c_int64
_AFTER = (_P, _N, ctypes.c_float, _N, _P, _P)  # sources, scaling, threads, results
FUNCTIONS = {
    "capsight_append": (_P, _P, _P, _N, _N, _N),
    "capsight_decode": (_P, ctypes.c_int32, _N, _N, _N, _N, *_AFTER),
    "capsight_centre": (
        *(_P, _P, ctypes.c_int32, _N, _N, _N),
        *(_P, _P, _N, ctypes.c_int32, _P, _P, _N, _P, ctypes.c_int32, _P),
    ),
    "capsight_joint": (_P, _P, ctypes.c_int32, _N, _N, _N, *_AFTER),
    "capsight_pack": (_P, _N, _N, _P, ctypes.c_float, _N, _P, _P),
    "capsight_step": (_P, _P, _P, _P, ctypes.c_float, _N, _P),
}

_TIMEOUT_S = 300
_log = logging.getLogger("capsight")


class NativeBuildError(CapsightError):
    """The native code cannot be compiled or loaded here; set CAPSIGHT_NATIVE=0 to go without."""


@cache
def missing() -> str:
    """Why attention stays with torch; empty if it has native code. Compiles at the first call.

    Raises:
        NativeBuildError: there is no native code, and the switch asks for it.
    """
    wanted = os.environ.get(SWITCH, "")
    if wanted == "0":
        reason = f"{SWITCH} is 0"
    else:
        try:
            library()
        except NativeBuildError as error:
            if wanted == "1":
                raise
            reason = str(error)
            warnings.warn(
                f"attention over capsules runs in torch, more slowly: {reason}", RuntimeWarning, stacklevel=2
            )
        else:
            reason = ""
    _log.info("attention over capsules: %s", f"torch ({reason})" if reason else "native code")
    return reason


@cache
def library(level: str | None = None) -> ctypes.CDLL:
    """The native code, compiled if need be.

    Args:
        level: a name of `LEVELS`; None for the best of this machine.

    Raises:
        NativeBuildError: it cannot be compiled or loaded.
    """
    level = best_level() if level is None else level
    known = LEVELS if platform.machine() in ("x86_64", "AMD64") else {}
    flags = [(*FLAGS, *known.get(level, ()))]
    if level in ("AMX", "AVX512BF16"):
        flags.append((*FLAGS, *_AVX512))  # for compilers that do not know it
    compiler = _compiler()
    here = Path(__file__).parent
    text = b"".join((here / name).read_bytes() for name in (*UNITS, *HEADERS))
    target = repr((flags, compiler, platform.machine(), sys.platform)).encode()
    path = _folder() / f"decode-{hashlib.sha256(text + target).hexdigest()[:20]}.so"
    for fresh in (not path.exists(), True):
        if fresh:
            _compile(compiler, flags, [str(here / name) for name in UNITS], path)
        try:
            loaded = ctypes.CDLL(str(path))
            if loaded.capsight_interface() == INTERFACE:
                for name, arguments in FUNCTIONS.items():
                    function = getattr(loaded, name)
                    function.argtypes, function.restype = list(arguments), None
                return loaded
        except (OSError, AttributeError) as error:
            if fresh:
                raise NativeBuildError(f"{path} cannot be loaded: {error}") from None
    raise NativeBuildError(f"{path} is of another version; delete it")


def best_level() -> str:
    """The name of what this machine's processor has."""
    level = torch.backends.cpu.get_cpu_capability()
    if level != "AVX512":
        return level
    if sys.platform == "linux" and has_amx():
        return "AMX"
    return "AVX512BF16" if has_avx512_bf16() else level


def _compiler() -> str:
    named = os.environ.get("CXX", "")
    for name in (named,) if named else ("c++", "g++", "clang++"):
        path = shutil.which(name)
        if path:
            return path
    raise NativeBuildError(f"no C++ compiler ({named or 'c++, g++ or clang++'}) was found")


@cache
def _folder() -> Path:
    """Where compiled code is kept; a folder of this process alone, if nothing lasting can be written."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(root) / "capsight"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(tempfile.mkdtemp(prefix="capsight-"))


def _compile(compiler: str, flags: list[tuple[str, ...]], units: list[str], path: Path) -> None:
    """Compile to `path` with the first flags that work, and with OpenMP where the compiler has it."""
    first = ""
    try:
        with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as folder:
            made = Path(folder) / path.name
            for level_flags, threads in product(flags, (("-fopenmp",), ())):
                command = [compiler, *level_flags, *threads, *units, "-o", str(made)]
                done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
                if done.returncode == 0:
                    if level_flags != flags[0]:
                        _log.warning(
                            "%s makes slower native code than this processor runs: %s", compiler, first
                        )
                    made.replace(path)
                    return
                first = first or _first_error(done.stderr)
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeBuildError(f"{compiler} failed: {error}") from None
    raise NativeBuildError(f"{compiler} failed: {_first_error(done.stderr)}")


def _first_error(text: str) -> str:
    lines = text.strip().splitlines() or ["no message"]
    return next((line for line in lines if "error" in line), lines[0])
