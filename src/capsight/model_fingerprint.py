"""A cheap hash that tells one model from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from transformers import PreTrainedModel

from capsight.execution import check_whole
from capsight.text_layers import config_value

_TENSORS, _NUMBERS, _OF_VECTORS = 24, 256, 8
_UNKNOWN = "0" * 32
_FREQUENCIES = torch.float64, torch.bfloat16, torch.float16  # as they are, and as casting a model leaves them
_SMALLEST = 2.0**-15  # numbers below have fewer bits in float16 than in bfloat16
_PEFT = ("original_module", "base_layer")  # what its wrappers call the layer that they are put around
_CONFIG_KEYS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


def model_fingerprint(model: Any) -> str:
    """Hash of the text config's essentials, of rotary frequencies, and of numbers sampled from all weights.

    Fine-tunes of one architecture differ in it. Matrices are sampled from all over the model, of norms and
    biases some numbers each. They are rounded to bfloat16 first, and what float16 cannot hold is left out, so
    that a model loaded in float32, bfloat16 and (from a bfloat16 checkpoint) float16 has one fingerprint. A
    float32 model whose numbers float16 would round otherwise has a second one, of itself in float16; one
    whose frequencies `model.to(torch.bfloat16)` or `half()` rounds has those of itself with such, too.

    Args:
        model: a transformers model.

    Returns:
        64 hex digits, or up to six times as many. The first 32 of each are of what quantisation leaves
        alone: norms, biases, frequencies. The others, of the matrices, are 0 where these are quantised; see
        `same_model`.

    Raises:
        UnsupportedModelError: this process holds a part of the model only.
    """
    check_whole(model)
    parameters = sorted(_own_parameters(model))
    weights = [(name, p) for name, p in parameters if p.ndim > 1 and p.is_floating_point()]
    projections = [item for item in weights if ".k_proj." in item[0] or ".v_proj." in item[0]]
    quantised = any(map(_is_quantised, (p for _, p in parameters)))
    matrices = () if quantised else _sampled((*_spread(weights), *_spread(projections)), _NUMBERS)
    essentials = {key: config_value(model.config, key) for key in _CONFIG_KEYS}
    rest = [item for item in parameters if item[1].ndim == 1 and item[1].is_floating_point()]
    vectors = _sampled(rest, _OF_VECTORS)
    abouts = [json.dumps([essentials, _rotary(model, dtype)], sort_keys=True) for dtype in _FREQUENCIES]

    def of(about: str, half: bool) -> str:
        return _digest(about, vectors, half) + (_UNKNOWN if quantised else _digest("", matrices, half))

    return "".join(dict.fromkeys(of(about, half) for about in abouts for half in (False, True)))


def same_model(one: str, other: str) -> bool:
    """Whether two fingerprints are of one model; one or both may be quantised, in float16, or cast."""
    return any(_same(a, b) for a in _each(one) for b in _each(other))


def _each(fingerprint: str) -> list[str]:
    """The one to six that a model has."""
    size = 2 * len(_UNKNOWN)
    return [fingerprint[start : start + size] for start in range(0, len(fingerprint), size)] or [""]


def _same(one: str, other: str) -> bool:
    size = len(_UNKNOWN)
    halves = one[size:], other[size:]
    return one[:size] == other[:size] and (halves[0] == halves[1] or _UNKNOWN in halves)


def _sampled(weights: Iterable[tuple[str, Tensor]], count: int) -> list[tuple[str, Tensor]]:
    """Names and shapes of weights, and `count` of the numbers of each."""
    numbers = ((name, w, w.detach().flatten()[:: max(w.numel() // count, 1)][:count]) for name, w in weights)
    return [(f"{name} {tuple(weight.shape)}", some.cpu()) for name, weight, some in numbers]


def _digest(about: str, sampled: Iterable[tuple[str, Tensor]], half: bool) -> str:
    """Half of the hex digits of SHA-256 of sampled numbers; of what they are in float16, if `half`."""
    digest = hashlib.sha256(about.encode())
    for name, some in sampled:
        numbers = (some.half() if half else some).bfloat16()
        digest.update(name.encode())
        digest.update(_bytes(numbers.masked_fill(numbers.abs() < _SMALLEST, 0)))
    return digest.hexdigest()[: len(_UNKNOWN)]


def _is_quantised(weight: Tensor) -> bool:
    """Whether a weight's numbers are others than those it was made from (quanto, torchao, 8-bit floats)."""
    plain = type(weight) in (Tensor, Parameter) and weight.is_floating_point()
    return not plain or weight.element_size() == 1


def _rotary(model: Any, dtype: torch.dtype) -> list[list[float]]:
    """Frequencies that text positions turn at, rounded to `dtype`, as sixteenths of octaves, and scalings.

    Of the buffers, not of the config, whose form differs between versions of transformers. Types that change
    their frequencies with the length of a prompt keep what they began with under another name.
    """
    inner = next((x for x in model.modules() if isinstance(x, PreTrainedModel)), model)
    decoder, frequencies = inner.get_decoder() or inner, []
    for module in decoder.modules():
        buffers = {name: b for name, b in vars(module).get("_buffers", {}).items() if "inv_freq" in name}
        first = {name: getattr(module, name) for name in dir(module) if "original_inv_freq" in name}
        for name, buffer in (first or buffers).items():
            numbers = buffer.detach().cpu().to(dtype).double().flatten()
            octaves = (numbers[numbers > 2.0**-12].log2() * 16).round().tolist()
            scaling = getattr(
                module, name.replace("original_inv_freq", "inv_freq")[:-8] + "attention_scaling", 1
            )
            frequencies.append([round(float(scaling or 1), 3), *octaves])
    return sorted(frequencies)


def _own_parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    """A transformers model's parameters under its own names, whatever is wrapped around it or them.

    `torch.compile` and PEFT put the model into another, PEFT puts adapters around its layers, and accelerate
    leaves weights that it has offloaded on the meta device, their values with a hook of the module.
    """
    inner = next((x for x in model.modules() if isinstance(x, PreTrainedModel)), model)
    seen: set[int] = set()  # tied weights count once
    tied = set(getattr(inner, "all_tied_weights_keys", None) or ())
    for prefix, module in _own_modules(inner, ""):
        for local, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = f"{prefix}.{local}"
            if name in tied:  # offloaded, the same weight is several tensors
                continue
            weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
            yield name, weights[local] if parameter.is_meta and weights is not None else parameter


def _own_modules(module: Module, name: str) -> Iterator[tuple[str, Module]]:
    """A module and all below it, as if PEFT had put nothing around them."""
    for around in _PEFT:
        while isinstance(held := getattr(module, around, None), Module):
            module = held
    yield name, module
    for local, child in module.named_children():
        yield from _own_modules(child, f"{name}.{local}" if name else local)


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a tensor on the CPU."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def _spread(items: list[Any]) -> list[Any]:
    """At most `_TENSORS` of `items`, evenly spread."""
    return items[:: max(len(items) // _TENSORS, 1)][:_TENSORS]
