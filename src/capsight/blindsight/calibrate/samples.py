"""Calibration prompts as they come: processor outputs, or what the processor makes them from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from capsight.execution import inputs_device
from capsight.layout import PromptLayout, build_layout
from capsight.processors import AnyProcessor
from capsight.processors.samples import sample_inputs

Sample = Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""Processor outputs (with `input_ids`), chat messages, or keyword arguments of the processor (`text`...)."""


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A batch of prompts, ready for the model.

    Attributes:
        inputs: processor outputs on the model's device, in its dtype.
        layout: their layout.
    """

    inputs: dict[str, Any]
    layout: PromptLayout

    @property
    def is_multi_image(self) -> bool:
        """Whether a row has two images or more, so that there is something to leave out."""
        return any(row.num_images + row.num_videos > 1 for row in self.layout.rows)


def prompts(
    model: PreTrainedModel, processor: AnyProcessor | None, samples: Iterable[Sample]
) -> Iterator[Prompt]:
    """The samples one by one, none kept.

    Args:
        model: names the device, the dtype and the config.
        processor: makes inputs of samples that have no `input_ids`; may be None if all have them.
        samples: any iterable.

    Raises:
        CalibrationError: a sample has no `input_ids` and there is no processor.
        LayoutError: a sample is not what the model's processor writes.
    """
    for index, sample in enumerate(samples):
        outputs = sample_inputs(sample, processor, index)
        inputs = {name: _ready(model, value) for name, value in outputs.items()}
        yield Prompt(inputs, build_layout(inputs, model.config))


class Digest:
    """SHA-256 over the prompts seen, so that a head map tells what it was calibrated on."""

    def __init__(self) -> None:
        """Start with nothing."""
        self._hash = hashlib.sha256()

    def add(self, prompt: Prompt) -> None:
        """Take in the tensors of one prompt, in the order of their names."""
        for name, value in sorted(prompt.inputs.items()):
            if isinstance(value, Tensor):
                self._hash.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
                content = value.detach().cpu().contiguous().flatten().view(torch.uint8)
                self._hash.update(content.numpy().tobytes())

    def hexdigest(self) -> str:
        """64 hex digits."""
        return self._hash.hexdigest()


def _ready(model: Any, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    device = inputs_device(model)
    return value.to(device, model.dtype) if value.is_floating_point() else value.to(device)
