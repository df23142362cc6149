"""Serializes a capsule cache to named tensors; deserializing checks every one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from capsight.errors import CapsightError, CapsuleFileError
from capsight.kvcapsule.cache import CapsuleCache
from capsight.kvcapsule.cache.conversation import Conversation
from capsight.kvcapsule.cache.layer import CapsuleLayer
from capsight.kvcapsule.cache.stock import has_states, set_state, states
from capsight.kvcapsule.capsule import KVCapsule
from capsight.kvcapsule.codecs import Payload, RaggedPayload
from capsight.kvcapsule.info import LayerInfo
from capsight.kvcapsule.parts import DTYPES, Parts
from capsight.kvcapsule.plan import Run, exact_spans
from capsight.layout import PromptLayout
from capsight.text_layers import layer_sizes


def conversation_of(cache: CapsuleCache) -> Conversation:
    """What a cache that is to be saved has read.

    Raises:
        CapsightError: nobody has said so, or its tokens are those of beams.
    """
    read = cache.conversation
    if read is None:
        raise CapsightError(
            "it is not known which prompt the cache was made from; make it with capsule.cache(inputs)"
        )
    if read.branched and cache.get_seq_length() > read.prompt:
        raise CapsightError(
            f"the cache went on with beams, whose tokens are not known; crop it to {read.prompt} tokens first"
        )
    return read


def serialize(cache: CapsuleCache) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """All that a cache holds.

    Returns:
        JSON-ready values, and tensors by name: `layers.I.exact` `[2, E, H, D]`, `layers.I.tail`
        `[2, B, T, H, D]` and `layers.I.capsule.*` of full-attention layers, `layers.I.window`
        `[2, B, H, T, D]` of sliding-window layers, `layers.I.conv.N` and `layers.I.recurrent.N` `[B, ...]` of
        layers with states.

    Raises:
        CapsightError: the cache is empty, or has a layer of another kind.
    """
    length, sliding = cache.get_seq_length(), {}
    tensors: dict[str, Tensor] = {}
    written: list[Payload] = []
    settled = {layer.placement.settled for layer in cache.capsule_layers.values() if layer.placement}
    layers: list[Any] = cache.layers
    if (
        not length
        or len(settled) != 1
        or any(layer.get_seq_length() != length for layer in layers if not has_states(layer))
    ):
        raise CapsightError("the cache has not been prefilled; encapsulate a prompt before saving it")
    for index, layer in enumerate(layers):
        if isinstance(layer, CapsuleLayer):
            assert layer._packed is not None
            assert layer._tail is not None
            tensors |= {f"layers.{index}.exact": layer._packed, f"layers.{index}.tail": layer._tail}
            payload = layer.payload
            if payload is not None and all(payload is not other for other in written):  # layers may share one
                written.append(payload)
                for name, tensor in payload.tensors.items():
                    tensors[f"layers.{index}.capsule.{name}"] = tensor
        elif isinstance(layer, DynamicSlidingWindowLayer):
            sides: tuple[Any, Any] = (layer.keys, layer.values)
            sliding[str(index)] = layer.cumulative_length
            window = [x[:, :, -layer.sliding_window + 1 :] for x in sides]
            tensors[f"layers.{index}.window"] = torch.stack(window)
        elif has_states(layer):
            tensors |= {f"layers.{index}.{kind}.{n}": state for kind, n, state in states(layer)}
        else:
            raise CapsightError(f"a cache with a {type(layer).__name__} cannot be saved; use it as it is")
    header = {"layout": cache.layout.to_dict(), "settled": settled.pop(), "sliding": sliding}
    if any(map(has_states, layers)):
        kinds = [[f"{kind}.{n}" for kind, n, _ in states(layer)] for layer in layers]
        header["states"] = kinds
    if cache.kept_states == length:
        header["states_kept"] = True
    return header, tensors


def deserialize(
    header: Mapping[str, Any],
    tensors: dict[str, Tensor],
    capsule: KVCapsule,
    config: PreTrainedConfig,
    devices: Mapping[int, torch.device],
) -> CapsuleCache:
    """The cache whose parts `serialize` gave.

    Args:
        header: its JSON-ready values.
        tensors: its tensors; those that belong to the cache are removed.
        capsule: the capsule that made it.
        config: the model's config.
        devices: where each layer goes.

    Raises:
        CapsuleFileError: a value or tensor is missing, or is not what the layout asks for.
        LayoutError: the layout is not one.
    """
    layout = PromptLayout.from_dict(_field(header, "layout", dict))
    settled, sliding = _field(header, "settled", int), _field(header, "sliding", dict)
    cache = capsule.cache(layout, config)
    sizes = {layer.index: layer for layer in capsule.info.layers}
    parts = Parts(tensors, layout.batch_size)
    templates: dict[LayerInfo, Payload] = {}
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        device = devices[index]
        if isinstance(layer, CapsuleLayer):
            template = templates.get(shape := _alike(sizes[index]))
            if template is None:
                dtype = parts.peek(f"layers.{index}.exact").dtype
                template = templates[shape] = _template(layer, sizes[index], dtype)
            _fill(layer, cache, parts, index, settled, sizes[index], template, device)
        elif has_states(layer):
            names = _field(dict(enumerate(_field(header, "states", list))), index, list)
            _fill_states(layer, parts, index, names, device)
        else:
            seen = _field(sliding, str(index), int)
            _fill_window(layer, parts, index, seen, config, device)
    lengths = {layer.get_seq_length() for layer in layers if not has_states(layer)}
    if len(lengths) != 1:
        raise CapsuleFileError(f"the layers of the saved cache differ in length: {sorted(lengths)}")
    if header.get("states_kept") is True:
        cache.keep_states()
    return cache


def _fill(
    layer: CapsuleLayer,
    cache: CapsuleCache,
    parts: Parts,
    index: int,
    settled: int,
    sizes: LayerInfo,
    template: Payload,
    device: torch.device,
) -> None:
    """Give a layer its exact tokens and capsules."""
    ledger, prefix = cache._ledger, f"layers.{index}."
    plan, runs = ledger.plan, ledger.complete(settled)
    spans = exact_spans(runs, plan.pads, settled)
    exact = sum(end - start for row in spans for start, end in row)
    packed = parts.take(prefix + "exact", (2, exact, sizes.heads, sizes.head_dim))
    tail = parts.take(prefix + "tail", (2, parts.batch, None, sizes.heads, sizes.head_dim))
    layer.lazy_initialization(tail[0].to(device), tail[1].to(device))
    layer.dtype = tail.dtype
    layer.codec.to(device)
    layer.placement = ledger.place(runs, settled, device)
    layer._packed, layer._tail = packed.to(device), tail.to(device)
    first = next(iter(cache.capsule_layers.values()))
    if runs and layer.codec.sharing > 1 and layer is not first:
        layer.payload = first.payload
    elif runs:
        count = sum(run.length for run in runs) // plan.block_size
        many = {name: count * len(like) for name, like in template.tensors.items()}
        capsules = type(template)(
            {
                name: parts.take(f"{prefix}capsule.{name}", (many[name], *like.shape[1:]), like.dtype)
                for name, like in template.tensors.items()
            }
        )
        _check_kept(capsules, runs, plan.block_size, prefix)
        layer.payload = type(template)({name: x.to(device) for name, x in capsules.tensors.items()})


def _check_kept(capsules: Payload, runs: Sequence[Run], block_size: int, prefix: str) -> None:
    """Refuse kept positions and counts that no choice of tokens gives."""
    if (positions := capsules.tensors.get("kept")) is None:
        return
    if isinstance(capsules, RaggedPayload):
        counts, rows = capsules.tensors["counts"].long(), torch.tensor([run.row for run in runs])
        blocks = torch.bincount(rows)
        counted = torch.zeros_like(blocks).index_add(0, rows, counts.sum(1))
        shared = len(positions) // len(runs) * blocks  # what a row has to share out
        if (counts < 1).any() or (counts > block_size).any() or (counted != shared).any():
            raise CapsuleFileError(
                f"{prefix}capsule.counts does not share out the tokens of a row; save the cache again"
            )
        places = capsules.slots(block_size)
    else:
        places = positions.long()
    if (positions >= block_size).any() or (places.diff() <= 0).any():
        raise CapsuleFileError(f"{prefix}capsule.kept does not ascend within a block; save the cache again")


def _fill_states(layer: Any, parts: Parts, index: int, names: Sequence[Any], device: torch.device) -> None:
    """Give a linear-attention or convolution layer its states; their dtypes are their own."""
    for name in names:
        kind, _, number = str(name).partition(".")
        if kind not in ("conv", "recurrent") or number not in map(str, layer.conv_states):
            raise CapsuleFileError(f"{name!r} of layer {index} of the saved cache is no state; save it again")
        tensor = parts.peek(f"layers.{index}.{name}")
        dtype = tensor.dtype if tensor.dtype in DTYPES else DTYPES[0]
        shape = (parts.batch, *(None,) * max(tensor.ndim - 1, 1))
        set_state(layer, kind, int(number), parts.take(f"layers.{index}.{name}", shape, dtype).to(device))


def _fill_window(
    layer: Any, parts: Parts, index: int, seen: int, config: PreTrainedConfig, device: torch.device
) -> None:
    """Give a sliding-window layer its last tokens."""
    _, heads, head_dim = layer_sizes(config)[index]
    length = min(seen, layer.sliding_window - 1)
    window = parts.take(f"layers.{index}.window", (2, parts.batch, heads, length, head_dim)).to(device)
    layer.lazy_initialization(window[0], window[1])
    layer.keys, layer.values = window[0].clone(), window[1].clone()
    layer.cumulative_length = seen


def _alike(layer: LayerInfo) -> LayerInfo:
    """The same for all layers whose capsules have the same shapes."""
    return LayerInfo(0, layer.kept, layer.heads, layer.head_dim)


def _template(layer: CapsuleLayer, sizes: LayerInfo, dtype: torch.dtype) -> Payload:
    """The capsule of one block of zeros: names, shapes and dtypes are those of any other."""
    if dtype not in DTYPES:
        raise CapsuleFileError(f"the saved cache holds keys in {dtype}; save it again")
    with torch.no_grad():
        return layer.codec.template(sizes.heads, sizes.head_dim, dtype)


def _field(values: Mapping[Any, Any], name: Any, kind: type) -> Any:
    value = values.get(name)
    fits = isinstance(value, kind) and not isinstance(value, bool)
    if not fits or (isinstance(value, int) and value < 0):
        raise CapsuleFileError(f"field {name} of the saved cache is {value!r}, expected {kind.__name__}")
    return value
