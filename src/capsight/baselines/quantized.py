"""transformers' `QuantizedCache` on optimum-quanto: all tokens stay, in 4 or 2 bits (arXiv 2402.02750)."""

from __future__ import annotations

import math
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedConfig
from transformers.cache_utils import QuantizedCache, QuantoQuantizedLayer
from transformers.utils import is_optimum_quanto_available

from capsight.baselines.base import Baseline
from capsight.errors import CapsightError, OptionError, UnsupportedModelError
from capsight.kvcapsule.cache import full_attention_layers
from capsight.layout import PromptLayout


class QuantoInt4(Baseline):
    """The stock int4 `QuantizedCache`, keys by channel and values by token, as in KIVI.

    KIVI, https://arxiv.org/abs/2402.02750, quantises keys channel by channel because some channels are much
    larger than others; transformers' own default (`axis_key=0`) puts the channels of a token together.
    Differs from the other baselines: text is quantised with the images, and the bytes follow from the
    bits, so `retained` has no say (about 0.28 of a bf16 cache and 0.16 of a float32 one in 4 bits). Up
    to 128 later tokens stay exact. Full-attention models only; needs `pip install optimum-quanto`.
    """

    name = "quanto-int4"
    needs_attention = False
    bits: ClassVar[int] = 4

    @property
    def label(self) -> str:
        """The name alone: there is no budget to choose."""
        return self.name

    def check_model(self, model: Any) -> None:
        """Refuse models with other than full-attention layers.

        Raises:
            UnsupportedModelError: the model has such layers.
            OptionError: optimum-quanto is not installed.
            CapsightError: a build of its kernels was cut off, and nothing would end the wait for it.
        """
        self._check_usable()
        config = model.config.get_text_config(decoder=True)
        if len(full_attention_layers(model.config)) != config.num_hidden_layers:
            raise UnsupportedModelError(
                f"the {self.name} method cannot run on a {model.config.model_type} model: transformers' "
                "QuantizedCache takes full-attention layers only; use another method"
            )

    def _new_cache(self, layout: PromptLayout, config: PreTrainedConfig) -> QuantoCache:
        self._check_usable()
        return QuantoCache(layout, config, self.bits)

    def _check_usable(self) -> None:
        if not is_optimum_quanto_available():
            raise OptionError(
                f"the {self.name} method needs optimum-quanto; install it with `pip install optimum-quanto`"
            )
        wait_for_kernels()


class QuantoInt2(QuantoInt4):
    """The stock int2 `QuantizedCache`, after KIVI, https://arxiv.org/abs/2402.02750; see `QuantoInt4`."""

    name = "quanto-int2"
    bits = 2


class _ChannelLayer(QuantoQuantizedLayer):
    """The stock layer, for any number of tokens: quanto cuts the tokens of a channel into whole groups."""

    def _quantize(self, tensor: Tensor, axis: int) -> Any:  # type: ignore[override]
        """Quantise `[B, H, S, D]`; what fills up the last group of tokens repeats the last one."""
        if axis == -1:
            self._tokens = tensor.shape[2]
            extra = -self._tokens % self.q_group_size
            tensor = pad(tensor.flatten(0, 1), (0, 0, 0, extra), "replicate").unflatten(0, tensor.shape[:2])
        return super()._quantize(tensor.contiguous(), axis)

    def _dequantize(self, qtensor: Any) -> Tensor:
        """The tokens alone."""
        numbers: Tensor = super()._dequantize(qtensor)
        return numbers[:, :, : self._tokens]


class QuantoCache(QuantizedCache):
    """The stock cache, with byte counts, and rows that can be repeated."""

    def __init__(self, layout: PromptLayout, config: PreTrainedConfig, bits: int) -> None:
        """Make an empty cache for prompts of `layout`."""
        text = config.get_text_config(decoder=True)
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        # Groups of 64, the stock size, wherever the channels of a token can be cut into them.
        group = math.gcd(64, text.num_key_value_heads * head_dim)
        super().__init__("quanto", config, nbits=bits, q_group_size=group)
        self.layers = [_ChannelLayer(bits, axis_key=-1, q_group_size=group) for _ in self.layers]
        self._pads = [row.pad_left for row in layout.rows]

    @property
    def nbytes(self) -> int:
        """Bytes of packed numbers, scales, shifts and the exact tokens; left padding is stored, too."""
        return sum(
            _quantized_nbytes(x)
            for layer in self._filled
            for x in (layer._quantized_keys, layer._quantized_values, layer.keys, layer.values)
        )

    @property
    def nbytes_full(self) -> int:
        """Bytes that a stock `DynamicCache` takes for the same tokens; left padding is not counted."""
        total = 0
        for layer in self._filled:
            batch, heads, _, head_dim = layer._quantized_keys.shape
            pads = [pad for pad in self._pads for _ in range(batch // len(self._pads))]
            tokens = sum(max(layer.get_seq_length() - pad, 0) for pad in pads)
            total += 2 * tokens * heads * head_dim * layer._quantized_keys.dtype.itemsize
        return total

    def key_bias(self, layer_idx: int) -> None:
        """Nothing is hidden."""
        return

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens: as many as a negative number says, or down to a positive length.

        Raises:
            CapsightError: that would cut quantised tokens; nothing has been removed then.
        """
        length = self.get_seq_length()
        drop = max(length - tokens_to_remove, 0) if tokens_to_remove > 0 else -tokens_to_remove
        exact = min((_exact_tokens(layer) for layer in self._filled), default=0)
        if drop > exact:
            raise CapsightError(
                f"cannot crop {drop} tokens: only the last {exact} are exact, those before are quantised "
                "together; reset the cache and prefill again"
            )
        for layer in self._filled:
            if drop:
                layer.keys, layer.values = layer.keys[:, :, :-drop], layer.values[:, :, :-drop]
                layer.cumulative_length -= drop

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Make row i of the batch what row `beam_idx[i]` was (`[B]`); transformers 5.17 does it in part."""
        if all(hasattr(layer, "_pending_beam_idx") for layer in self.layers):
            super().reorder_cache(beam_idx)
        else:
            self._move_rows(lambda x: x[beam_idx])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times in place."""
        self._pads = [pad for pad in self._pads for _ in range(repeats)]
        self._move_rows(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows that `indices` (int64 `[B']`, or bool `[B]`) names."""
        self._pads = [self._pads[i] for i in torch.arange(len(self._pads))[indices.cpu()].tolist()]
        self._move_rows(lambda x: x[indices])

    def _move_rows(self, move: Any) -> None:
        for layer in self._filled:
            beams = getattr(layer, "_pending_beam_idx", None)  # which newer transformers move at an update
            for kind, axis in (("_quantized_keys", layer.axis_key), ("_quantized_values", layer.axis_value)):
                numbers = layer._dequantize(getattr(layer, kind))
                moved = move(numbers if beams is None else numbers[beams]).contiguous()
                setattr(layer, kind, layer._quantize(moved, axis))
            if beams is not None:
                layer._pending_beam_idx = None
            if _exact_tokens(layer):
                layer.keys, layer.values = move(layer.keys), move(layer.values)

    @property
    def _filled(self) -> list[Any]:
        layers: list[Any] = self.layers
        return [layer for layer in layers if layer.is_initialized]


def _exact_tokens(layer: Any) -> int:
    return layer.keys.shape[-2] if layer.keys.dim() == 4 else 0


def _quantized_nbytes(x: Any) -> int:
    """Bytes of a plain tensor, or of the parts of one that quanto packed."""
    if not hasattr(x, "_scale"):
        return x.nbytes
    return x._data._data.nbytes + x._scale.nbytes + x._shift.nbytes


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
