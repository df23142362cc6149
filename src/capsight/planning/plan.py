"""`plan`: all figures of one request mix on one GPU, with and without capsules and a head map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from capsight.blindsight.categories import MaskOptions
from capsight.blindsight.head_map import HeadMap
from capsight.errors import OptionError
from capsight.kvcapsule import CapsulePlan
from capsight.planning.cache import (
    capsule_kv_bytes,
    full_kv_bytes,
    planned_capsule,
    scratch_bytes,
    state_bytes,
)
from capsight.planning.flops import (
    HeadCounts,
    attention_flops,
    dense_heads,
    linear_flops,
    mapped_heads,
    shared_heads,
    vision_flops,
)
from capsight.planning.images import ImageGrids, mix_layout
from capsight.planning.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Budget:
    """What a plan is made for.

    Attributes:
        gpu_bytes: memory of the GPU.
        itemsize: bytes of one number of the KV cache, and of a weight unless `weights_bytes` is given.
        weights_bytes: memory that the weights take; None: parameters * itemsize.
        reserve: fraction of the GPU left to activations and workspace, in [0, 1).
        batch: requests of one prefill, and rows that share the capsules' modules at break-even.
        retained: of a 16-bit cache's bytes that vision tokens may take in capsules, in (0, 1].

    Raises:
        OptionError: a number is out of range.
    """

    gpu_bytes: int
    itemsize: int = 2
    weights_bytes: int | None = None
    reserve: float = 0.1
    batch: int = 1
    retained: float = 0.05

    def __post_init__(self) -> None:
        """Check the ranges; `retained` is checked where it is used."""
        if self.gpu_bytes < 1 or self.batch < 1 or (self.weights_bytes or 0) < 0:
            raise OptionError("GPU memory and batch must be positive, the weights' size not negative")
        if not 0 <= self.reserve < 1:
            raise OptionError(f"the reserve is a fraction in [0, 1), not {self.reserve}")


@dataclass(frozen=True, slots=True)
class CachePlan:
    """One kind of cache.

    Attributes:
        kv_bytes: keys and values of one request, persistent.
        state_bytes: states of one request, of layers that keep one instead of keys and values.
        scratch_bytes: transient buffer of one request while it is decoded.
        module_bytes: of the capsules' modules, once per GPU.
        requests: requests that fit on the GPU beside the weights.
    """

    kv_bytes: int
    state_bytes: int
    scratch_bytes: int
    module_bytes: int
    requests: int


@dataclass(frozen=True, slots=True)
class Prefill:
    """FLOPs of one prefill of the batch.

    Attributes:
        attention: the language model's attention.
        linear: the language model's linear layers.
        vision: the vision tower.
    """

    attention: int
    linear: int
    vision: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.attention + self.linear + self.vision


@dataclass(frozen=True, slots=True)
class Plan:
    """The figures; bytes and tokens are whole numbers.

    Attributes:
        parameters: of the model.
        weights_bytes: memory of the weights.
        prompt_tokens: tokens of one prompt.
        vision_tokens: those that are vision tokens.
        capsule_tokens: those that become capsules; the others stay exact.
        full: without capsules.
        capsules: with capsules.
        break_even_tokens: vision tokens per request from which capsules with their modules are smaller
            than the full cache; None: they never are.
        dense: prefill of the model as it is.
        sparse: prefill under the head map; None without one.
    """

    parameters: int
    weights_bytes: int
    prompt_tokens: int
    vision_tokens: int
    capsule_tokens: int
    full: CachePlan
    capsules: CachePlan
    break_even_tokens: int | None
    dense: Prefill
    sparse: Prefill | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, the prefills' totals included."""
        values = asdict(self)
        for name, prefill in (("dense", self.dense), ("sparse", self.sparse)):
            if prefill is not None:
                values[name]["total"] = prefill.total
        return values


def plan(
    config: Any,
    images: Sequence[ImageGrids],
    text_tokens: int,
    budget: Budget,
    new_tokens: int = 0,
    head_map: HeadMap | float | None = None,
) -> Plan:
    """Work out one plan; nothing is loaded and nothing is measured.

    Requests that fit: `floor((gpu * (1 - reserve) - weights - modules) / (kv + state + scratch))`,
    with modules and scratch only where there are capsules.

    Args:
        config: of the whole vision-language model.
        images: the images of one request, see `grids_of_size` and `grids_of_tokens`.
        text_tokens: prompt tokens that belong to no image.
        budget: memory, dtype and the rest.
        new_tokens: tokens generated per request; they take KV bytes.
        head_map: a head map, the share of dense heads of one not made yet, or nothing.

    Raises:
        UnsupportedModelError: the family is not known.
        ModelMismatchError: the head map is of another shape than the model.
        OptionError: a number is out of range.
    """
    if new_tokens < 0:
        raise OptionError(f"new tokens must be 0 or more, not {new_tokens}")
    layout, shape = mix_layout(config, images, text_tokens), ModelShape.of(config)
    item, tokens = budget.itemsize, layout.length + new_tokens
    weights = shape.parameters * item if budget.weights_bytes is None else budget.weights_bytes
    capsule = planned_capsule(shape, budget.retained, item)
    states = state_bytes(shape, item)
    room = budget.gpu_bytes * (1 - budget.reserve) - weights

    def cache(kv: int, scratch: int, modules: int) -> CachePlan:
        fit = max(int((room - modules) // (kv + states + scratch)), 0)
        return CachePlan(kv, states, scratch, modules, fit)

    def prefill(heads: HeadCounts, options: MaskOptions) -> Prefill:
        once = (
            attention_flops(shape, config, layout, heads, options),
            linear_flops(shape, layout),
            vision_flops(shape, images),
        )
        return Prefill(*(budget.batch * flops for flops in once))

    sparse = None
    if isinstance(head_map, HeadMap):
        sparse = prefill(mapped_heads(shape, head_map), head_map.options)
    elif head_map is not None:
        sparse = prefill(shared_heads(shape, head_map), MaskOptions())
    return Plan(
        parameters=shape.parameters,
        weights_bytes=weights,
        prompt_tokens=layout.length,
        vision_tokens=layout.vision_tokens,
        capsule_tokens=CapsulePlan.from_layout(layout, capsule.info.block_size).capsule_tokens,
        full=cache(full_kv_bytes(shape, tokens, item), 0, 0),
        capsules=cache(
            capsule_kv_bytes(shape, layout, new_tokens, item, capsule),
            scratch_bytes(shape, tokens, item),
            capsule.module_nbytes,
        ),
        break_even_tokens=capsule.break_even_tokens(budget.batch),
        dense=prefill(dense_heads(shape), MaskOptions()),
        sparse=sparse,
    )
