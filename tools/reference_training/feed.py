"""The lessons of a stage as tensors, step by step; worker processes may draw them ahead."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from reference_training.batches import Batch, Batcher, patches
from reference_training.dense import DenseLabels, dense_labels
from reference_training.stages import Stage, pages, prompts


@dataclass(frozen=True, slots=True)
class Lesson:
    """What one step learns from.

    Attributes:
        pixel_values: [patches, 1176] float32, in Qwen's patch order.
        grid_thw: [images, 3] int64.
        labels: dense labels of the images' merged tokens.
        batch: token rows, None in a stage that trains the tower alone.
    """

    pixel_values: Tensor
    grid_thw: Tensor
    labels: DenseLabels
    batch: Batch | None

    def to(self, device: torch.device) -> "Lesson":
        """The same lesson on a device."""
        batch = self.batch and self.batch.to(device)
        labels = DenseLabels(*(t.to(device) for t in self.labels.tensors()))
        return Lesson(self.pixel_values.to(device), self.grid_thw.to(device), labels, batch)


class _Steps(Dataset[Lesson]):
    def __init__(self, stage: Stage, batcher: Batcher, first: int) -> None:
        self.stage, self.batcher, self.first = stage, batcher, first

    def __len__(self) -> int:
        return self.stage.steps - self.first

    def __getitem__(self, index: int) -> Lesson:
        return lesson(self.stage, self.first + index, self.batcher)


def lesson(stage: Stage, step: int, batcher: Batcher) -> Lesson:
    """The lesson of one step; equal arguments give equal lessons."""
    if stage.counts:
        asked = prompts(stage, step)
        scenes, batch = [s for p in asked for s in p.scenes], batcher(asked)
    else:
        scenes, batch = pages(stage, step), None
    return Lesson(*patches([s.image for s in scenes]), dense_labels(scenes), batch)


def lessons(stage: Stage, first: int, batcher: Batcher, workers: int) -> Iterator[Lesson]:
    """All lessons of a stage from step ``first`` on, in order."""
    steps = _Steps(stage, batcher, first)
    return iter(
        DataLoader(steps, batch_size=None, num_workers=workers, prefetch_factor=8 if workers else None)
    )
