"""Calibration samples as processor outputs, one after another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from capsight.kvcapsule.calibration.processes import Processes
from capsight.processors.samples import sample_inputs

T = TypeVar("T")


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
    training = model.training
    model.eval()
    try:
        for index, sample in _track(processes.own(samples), samples, progress, processes):
            yield index, sample_inputs(sample, processor, index)
    finally:
        model.train(training)


def _track(own: Iterable[T], samples: Iterable[Any], show: bool, processes: Processes) -> Iterable[T]:
    total = len(range(processes.rank, len(samples), processes.count)) if isinstance(samples, Sized) else None
    columns = (TextColumn("calibrating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not show or processes.rank > 0, transient=True) as bar:
        yield from bar.track(own, total=total)
