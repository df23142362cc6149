"""`FitJournal`: what a calibration pass has added up so far, on disk; an interrupted fit goes on from it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capsight.adapters import adapters_fingerprint
from capsight.errors import CalibrationError, CapsuleFileError
from capsight.files import check_folder
from capsight.kvcapsule.calibration.processes import Processes
from capsight.kvcapsule.calibration.statistics import Calibration
from capsight.kvcapsule.codecs.moments import LayerMoments
from capsight.kvcapsule.fingerprint import tensors_fingerprint
from capsight.kvcapsule.store import HEADER_FILE, read_folder, write_folder
from capsight.model_fingerprint import model_fingerprint

KIND = "capsight.fit"
EVERY = 30.0
"""Seconds between two writes, at least."""

_SUMS = ("second", "channels", "total")


class FitJournal:
    """Sums over the samples seen, and a hash of these samples: a fit goes on with the same ones only.

    Of several processes each has its own, in a folder below.
    """

    def __init__(
        self, folder: str | os.PathLike[str], model: Any, block_size: int, processes: Processes
    ) -> None:
        """Name the folder, and what is fitted.

        Raises:
            CapsuleFileError: the folder holds something else, is damaged, or cannot be written.
            CalibrationError: it holds the fit of another model or block size.
        """
        subfolder = f"{processes.rank + 1}-of-{processes.count}" if processes.count > 1 else ""
        self._folder, self._block_size = Path(folder) / subfolder, block_size
        fingerprint = model_fingerprint(model) + adapters_fingerprint(model)
        self._about = {"model": fingerprint, "block_size": block_size}
        self._written, self._seen, self._chain = time.monotonic(), 0, ""
        self._header: dict[str, Any] = {"samples": 0}
        self.calibration = Calibration()
        try:
            check_folder(self._folder)
            begun = (self._folder / HEADER_FILE).exists()
        except (OSError, ValueError, RuntimeError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            raise CapsuleFileError(f"cannot write {self._folder}: {reason}") from error
        if begun:
            self._restore()

    def has(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the next sample was seen before the interruption; call it once for each, in order.

        Raises:
            CalibrationError: the samples are not the ones that were seen.
        """
        self._seen += 1
        tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
        self._chain = tensors_fingerprint(tensors, self._chain)
        if self._seen == self._header["samples"] and self._chain != self._header["chain"]:
            self._refuse("other samples")
        return self._seen <= int(self._header["samples"])

    def record(self) -> None:
        """Write the sums so far, if the last write is long ago.

        Raises:
            CapsuleFileError: the folder cannot be written.
        """
        if time.monotonic() - self._written >= EVERY:
            header, tensors = _serialize(self.calibration)
            header |= {**self._about, "samples": self._seen, "chain": self._chain}
            write_folder(self._folder, KIND, header, tensors)
            self._written = time.monotonic()

    def finish(self) -> None:
        """There are no more samples.

        Raises:
            CalibrationError: there were fewer than before the interruption.
        """
        if self._seen < int(self._header["samples"]):
            self._refuse("more samples")

    def _restore(self) -> None:
        try:
            header, tensors = read_folder(self._folder, KIND, "fit in progress")
        except CapsuleFileError as error:
            reason, *_ = str(error).split(";")  # what to do is another thing here
            raise CapsuleFileError(
                f"{self._folder} holds no interrupted fit that can go on ({reason}); name another folder, or "
                "remove it to fit anew"
            ) from error
        for name, value in self._about.items():
            if header.get(name) != value:
                self._refuse(f"another {name.replace('_', ' ')}")
        try:
            self.calibration = _deserialize(header, tensors, self._block_size)
            self._header = {"samples": int(header["samples"]), "chain": str(header["chain"])}
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise CapsuleFileError(
                f"{self._folder} does not hold an interrupted fit ({error!r}); remove it and fit anew"
            ) from error

    def _refuse(self, what: str) -> None:
        raise CalibrationError(
            f"{self._folder} holds an interrupted fit of {what}; give the same ones to go on with it, or "
            "remove the folder to fit anew"
        )


def remove_journal(folder: Path) -> None:
    """Remove what journals of one or several processes left in a folder, and it, unless it holds more."""
    with suppress(OSError):
        for each in (*folder.glob("*-of-*"), folder):
            for path in (*each.glob("capsule-*.safetensors"), *each.glob(".capsule*"), each / HEADER_FILE):
                path.unlink(missing_ok=True)
            each.rmdir()


def _serialize(calibration: Calibration) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A calibration as a header and tensors."""
    tensors: dict[str, Tensor] = {}
    for layer, moments in calibration.moments.items():
        for kind in ("keys", "values"):
            for name in _SUMS:
                tensors[f"{layer}.{kind}.{name}"] = getattr(getattr(moments, kind), name)
    draws, sample = calibration.sample.state()
    for layer, (keys, values) in sample.items():
        tensors |= {f"{layer}.sample.keys": keys, f"{layer}.sample.values": values}
    tensors |= {f"tokens.{name}": tensor for name, tensor in calibration.tokens.state().items()}
    header = {
        "blocks": {str(layer): moments.blocks for layer, moments in calibration.moments.items()},
        "sampled": draws,
        "attention": {str(layer): list(pair) for layer, pair in calibration.attention.state().items()},
    }
    return header, tensors


def _deserialize(header: Mapping[str, Any], tensors: Mapping[str, Tensor], block_size: int) -> Calibration:
    """The calibration of a header and tensors; all errors that malformed ones raise are built in."""
    calibration = Calibration()
    samples: dict[int, tuple[Tensor, Tensor]] = {}
    for name, blocks in header["blocks"].items():
        layer = int(name)
        heads, head_dim = tensors[f"{layer}.keys.channels"].shape[:2]
        moments = LayerMoments(heads, block_size, head_dim)
        for kind in ("keys", "values"):
            sums = getattr(moments, kind)
            for part in _SUMS:
                tensor = tensors[f"{layer}.{kind}.{part}"]
                if tensor.shape != getattr(sums, part).shape or tensor.dtype != torch.float64:
                    raise ValueError(f"tensor {layer}.{kind}.{part} is {tuple(tensor.shape)} {tensor.dtype}")
                setattr(sums, part, tensor)
            sums.blocks = int(blocks)
        calibration.moments[layer] = moments
        samples[layer] = tensors[f"{layer}.sample.keys"], tensors[f"{layer}.sample.values"]
    calibration.sample.restore(list(header["sampled"]), samples)
    if "tokens.seen" in tensors:
        token_state = {name: tensors[f"tokens.{name}"] for name in ("tokens", "keys", "total", "seen")}
        calibration.tokens.restore(token_state)
    calibration.attention.restore({int(k): (float(t), int(n)) for k, (t, n) in header["attention"].items()})
    return calibration
