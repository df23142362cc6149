"""Calibration samples as processor outputs, one after another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

from tqdm.auto import tqdm

from capsight.kvcapsule.calibration.processes import Processes
from capsight.processors.samples import sample_inputs


def calibration_inputs(
    model: Any, processor: Any, samples: Iterable[Any], progress: bool, processes: Processes | None = None
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Number and processor outputs of every sample, with a progress bar, the model in eval mode meanwhile.

    Args:
        model: see `fit.calibrate`.
        processor: see `fit.calibrate`.
        samples: see `fit.calibrate`.
        progress: show a progress bar.
        processes: those that share the samples, so that only some are this one's; None: all are.
    """
    processes = processes or Processes.alone()
    total = len(range(processes.rank, len(samples), processes.count)) if isinstance(samples, Sized) else None
    hidden = not progress or processes.rank > 0
    training = model.training
    model.eval()
    try:
        with tqdm(processes.shard(samples), "calibrating", total, disable=hidden) as bar:
            for index, sample in bar:
                yield index, sample_inputs(sample, processor, index)
    finally:
        model.train(training)
