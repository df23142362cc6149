"""Feature-axis PCA: keys and values of vision tokens in fewer channels (cf. Palu, arXiv 2407.21118)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from capsight.baselines.base import Baseline
from capsight.errors import CalibrationError, ModelMismatchError
from capsight.execution import check_whole
from capsight.kvcapsule.budget import share_to_keep
from capsight.kvcapsule.cache import CapsuleCache
from capsight.kvcapsule.calibration.fit import prefilled_blocks
from capsight.kvcapsule.calibration.samples import calibration_inputs
from capsight.kvcapsule.codecs import BlockCodec, Payload
from capsight.kvcapsule.plan import DEFAULT_BLOCK_SIZE, Run
from capsight.layout import PromptLayout
from capsight.model_fingerprint import model_fingerprint, same_model
from capsight.processors import AnyProcessor

Bases = tuple[Tensor, Tensor]
"""Mean `[2, H, 1, D]` and principal axes `[2, H, D, D]` (columns, most variance first), keys and values."""


class FeaturePCA(Baseline):
    """Projects each head's channels on the leading principal axes of calibration images.

    The channel axis is where low-rank KV methods such as Palu, https://arxiv.org/abs/2407.21118, work.
    Differs from Palu: the basis comes from cached keys (after RoPE) and values of calibration images
    instead of from the projection weights, for vision tokens only, one rank for all layers and heads.
    All tokens stay, each in c_k + c_v = 2 r D / N channels, rounded.
    """

    name = "feature-pca"
    needs_attention = False
    calibrated = True

    def __init__(
        self, bases: Mapping[int, Bases], fingerprint: str, retained: float, block_size: int
    ) -> None:
        """Join what `fit` learnt and the budget; use `fit`."""
        super().__init__(retained, block_size)
        self._bases, self._fingerprint = dict(bases), fingerprint
        self._codecs = {
            index: PCACodec(block_size, self.kept, mean, axes) for index, (mean, axes) in self._bases.items()
        }

    @classmethod
    def fit(
        cls,
        model: PreTrainedModel,
        processor: AnyProcessor | None,
        samples: Iterable[Any],
        retained: float = 0.40,
        block_size: int = DEFAULT_BLOCK_SIZE,
        progress: bool = True,
    ) -> Self:
        """Fit in one pass over calibration samples, as `KVCapsule.fit` does.

        Args:
            model: a transformers vision-language model.
            processor: its processor; may be None where all samples are processor outputs.
            samples: processor outputs or lists of chat messages, with images.
            retained: fraction of the vision tokens' bytes to keep, in (0, 1].
            block_size: vision tokens in a run (N).
            progress: show a progress bar.

        Raises:
            CalibrationError: no image is as long as a run, or numbers are not finite.
            UnsupportedModelError: the model is none that capsight can run.
        """
        check_whole(model)
        sums: dict[int, tuple[Tensor, Tensor, int]] = {}
        for _, inputs in calibration_inputs(model, processor, samples, progress):
            for index, kv in prefilled_blocks(model, inputs, block_size).items():
                x = torch.stack(kv).double().transpose(1, 2).flatten(2, 3)  # [2, H, M * N, D]
                second, total, count = sums.get(index, (0, 0, 0))
                sums[index] = (second + x.mT @ x, total + x.sum(2, keepdim=True), count + x.shape[2])
        if not sums:
            raise CalibrationError(
                f"no calibration sample has an image of at least {block_size} tokens; use larger images or "
                "a smaller block_size"
            )
        bases = {}
        for index, (second, total, count) in sums.items():
            if not torch.isfinite(second).all():
                raise CalibrationError(
                    f"layer {index}: calibration keys or values hold NaN or infinite values; run the model "
                    "in float32 or bfloat16"
                )
            mean = total / count  # [2, H, 1, D]
            axes = torch.linalg.eigh(second / count - mean.mT @ mean).eigenvectors.flip(-1)
            bases[index] = (mean.float(), axes.float())
        return cls(bases, model_fingerprint(model), retained, block_size)

    @property
    def module_nbytes(self) -> int:
        """Bytes of the means and of the axes in use."""
        return sum(codec.module_nbytes for codec in self._codecs.values())

    def with_retained(self, retained: float | None = None, *, compression_ratio: float | None = None) -> Self:
        """This method with another budget, without fitting again. `compression_ratio` is 1 - retained.

        Raises:
            OptionError: `retained` is not in (0, 1], or both are given.
        """
        share = share_to_keep(retained, compression_ratio)
        return type(self)(self._bases, self._fingerprint, share, self.block_size)

    def check_model(self, model: Any) -> None:
        """Refuse a model other than the one the bases were fitted to."""
        if not same_model(model_fingerprint(model), self._fingerprint):
            raise ModelMismatchError(
                "these bases were fitted to another model; use FeaturePCA.fit on this one"
            )

    def _new_cache(self, layout: PromptLayout, config: PreTrainedConfig) -> CapsuleCache:
        return CapsuleCache(self._codecs, layout, config)


class PCACodec(BlockCodec):
    """Stores coordinates `[M, H, N, c]` of keys and of values.

    Buffers:
        mean: float32 `[2, H, 1, D]`.
        key_axes, value_axes: float32 `[H, D, c]`, orthonormal columns.
    """

    name = FeaturePCA.name
    mean: Tensor
    key_axes: Tensor
    value_axes: Tensor

    def __init__(self, block_size: int, kept: int, mean: Tensor, axes: Tensor) -> None:
        """Take as many axes as `kept` of `block_size` tokens are worth; keys get the odd one."""
        super().__init__(block_size)
        channels = max(round(2 * kept * axes.shape[-1] / block_size), 2)
        self.register_buffer("mean", mean)
        self.register_buffer("key_axes", axes[0, :, :, : channels - channels // 2].contiguous())
        self.register_buffer("value_axes", axes[1, :, :, : channels // 2].contiguous())
        self._whole = kept == block_size

    def encode_runs(self, keys: Tensor, values: Tensor, runs: Sequence[Run]) -> Payload:
        """Project; with nothing to save, store the numbers as they are."""
        if self._whole:
            return Payload({"keys": keys.contiguous(), "values": values.contiguous()})
        return Payload(
            {
                "keys": ((keys.float() - self.mean[0]) @ self.key_axes).to(keys.dtype),
                "values": ((values.float() - self.mean[1]) @ self.value_axes).to(values.dtype),
            }
        )

    def decode(self, payload: Payload) -> tuple[Tensor, Tensor]:
        """Expand."""
        keys, values = payload.tensors["keys"], payload.tensors["values"]
        if self._whole:
            return keys, values
        dtype = keys.dtype
        return (
            keys @ self.key_axes.mT.to(dtype) + self.mean[0].to(dtype),
            values @ self.value_axes.mT.to(dtype) + self.mean[1].to(dtype),
        )
