"""vLLM's CPU attention with capsules in its paged memory and head maps in its prefill.

What happens in a step, layer by layer (`CapsightImpl.forward`):

1. vLLM writes the step's keys and values to its blocks.
2. Its own kernel computes attention: of requests that are still being read over all tokens, of those that
   have been read and keep slots over a shortened block table and length (`shrink_step`), of which it knows
   nothing.
3. With a head map, `SparsePrefill.attend` computes the output of image tokens; everything before them is
   still exact in paged memory then.
4. `LatentStep.run` computes that of requests that have been read and keep latents.
5. What is read to its end in this step shrinks, and tokens behind the prompt's end, which only a request that
   was preempted reads in the same step, are computed again over what is left: slots layer by layer, latents
   in a second pass through the model (`models.second_pass`).

With no entry `capsight` in the model's config the classes do what vLLM's do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec

from capsight.kvcapsule.codecs import JointCodec
from capsight.serving.checkpoint import Served, carried
from capsight.serving.plan import Latents, Slots
from capsight.serving.select import select_tokens
from capsight.serving.vllm.blindsight import SparsePrefill, SparseRequest, dense_rest, sparse_requests
from capsight.serving.vllm.latent_steps import LatentStep, latent_step
from capsight.serving.vllm.latents import LatentMemory, load_codecs
from capsight.serving.vllm.paged import check_readable, read_tokens
from capsight.serving.vllm.settings import check_engine, served_by
from capsight.serving.vllm.spec import CapsuleSpec
from capsight.serving.vllm.steps import Shrinking, behind, shrink_step

Part = tuple[Tensor, CPUAttentionMetadata | None]
"""Rows of a step for vLLM's kernel, int64 `[n]`, and as a step of their own; None if there are none."""


@dataclass
class CapsightMetadata(CPUAttentionMetadata):
    """A step of vLLM's kernel, and what is done besides.

    Attributes:
        dense: what its kernel has to do; None: everything.
        sparse: requests whose image tokens are read in this step, with a head map.
        rest: what its kernel has to do besides them.
        shrinking: requests with slots that are read to their prompt's end in this step.
        tails: the rows behind those prompts' ends, over what is left of the images.
        latents: requests with latents.
        again: rows of the step that the model has to read a second time, int64 `[n]`, and as what.
    """

    dense: Part | None = None
    sparse: tuple[SparseRequest, ...] = ()
    rest: Part | None = None
    shrinking: tuple[Shrinking, ...] = ()
    tails: Part | None = None
    latents: LatentStep | None = None
    again: tuple[Tensor, CapsightMetadata] | None = None


class CapsightBuilder(CPUAttentionMetadataBuilder):
    """Plans each step once for all layers."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Take what vLLM's builder takes."""
        super().__init__(*arguments, **options)
        self.served = served_by(self.vllm_config)
        self.capsules: Slots | Latents | None = getattr(self.kv_cache_spec, "capsules", None)
        if self.served is not None:
            check_readable(self.isa)
            if isinstance(self.capsules, Latents):
                self.memory = LatentMemory(self.capsules, _codecs(self.vllm_config, self.served))

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """The step's metadata."""
        step = common_attn_metadata
        if self.served is None:
            return super().build(common_prefix_len, step, fast_build)
        sparse = () if self.served.head_map is None else sparse_requests(step)
        shrinking: tuple[Shrinking, ...] = ()
        latents, prompts = None, step.rswa_prefix_lens.tolist()
        if isinstance(self.capsules, Slots):
            tables, lengths, shrinking = shrink_step(step, prompts, self.block_size, self.capsules.retained)
            step = replace(step, block_table_tensor=tables, seq_lens=lengths)
        elif isinstance(self.capsules, Latents):
            latents = latent_step(step, prompts, self.block_size, self.memory)
        made = CapsightMetadata(**vars(super().build(common_prefix_len, step, fast_build)))
        made.sparse, made.shrinking, made.latents = sparse, shrinking, latents
        others = {} if latents is None else latents.rows
        if others:
            made.dense = self._part(*dense_rest(step, others))
        if sparse:
            made.rest = self._part(*dense_rest(step, others | {r.index: r.rows for r in sparse}))
        tails = [request for request in shrinking if request.tail[0] < request.tail[1]]
        if tails:
            made.tails = self._part(*behind(step, tails))
        if latents is not None and latents.tails:
            again, rows = latents.second_pass()
            nothing: Part = rows[:0], None
            made.again = rows, replace(made, dense=nothing, sparse=(), latents=again)
        return made

    def _part(self, step: Any, rows: Tensor) -> Part:
        """Some rows of a step as a step of their own."""
        return rows, super().build(0, step) if len(rows) else None


class CapsightImpl(CPUAttentionBackendImpl):
    """Attention of one layer."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Take what vLLM's takes, and read what the engine is told of capsight.

        Raises:
            UnsupportedModelError: an option of the engine is in the way.
        """
        super().__init__(*arguments, **options)
        config = get_current_vllm_config()
        served = served_by(config)
        self.prefill: SparsePrefill | None = None
        CapsightBackend.capsules = None
        if served is not None:
            check_engine(config)
            CapsightBackend.capsules = _capsules(config, served)
            if served.head_map is not None:
                folder = carried(config.model_config, served)
                share = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
                self.prefill = SparsePrefill.load(folder, served.head_map, *share)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *others: Any,
        **options: Any,
    ) -> Tensor:
        """Attention of all requests of a step; see the module."""
        step, given = attn_metadata, (layer, query, key, value, kv_cache)
        if not isinstance(step, CapsightMetadata):
            return super().forward(*given, step, output, *others, **options)
        index, prefill = extract_layer_index(layer.layer_name), self.prefill
        if prefill is not None and step.sparse and not prefill.is_dense(index):
            self._rows(given, step.rest, output)
            prefill.attend(index, step.sparse, query, kv_cache, self.scale, output)
        elif step.dense is None:
            super().forward(*given, step, output, *others, **options)
        else:
            self._rows(given, step.dense, output)
        if step.latents is not None:
            step.latents.run(index, query, kv_cache, self.scale, output)
        for request in step.shrinking:
            self._shrink(layer, kv_cache, request)
        self._rows(given, step.tails, output)
        return output

    def _rows(self, given: tuple[Any, ...], part: Part | None, output: Tensor) -> None:
        """Dense attention of some rows, as a step of their own."""
        if part is None or part[1] is None:
            return
        layer, query, key, value, kv_cache = given
        rows, step = part
        attended = torch.empty_like(query[rows])
        super().forward(layer, query[rows], key, value, kv_cache, step, attended)
        output.view(query.shape)[rows] = attended

    def _shrink(self, layer: Any, kv_cache: Tensor, request: Shrinking) -> None:
        """Write what each head keeps of a request's region to the region's last blocks."""
        plan = request.plan
        keys, values = read_tokens(kv_cache, request.region, plan.tokens)  # [H, T, D]
        shown = torch.cat([torch.arange(*span) for span in plan.images])
        chosen = shown[select_tokens(keys[:, shown], values[:, shown], plan.kept_image_tokens, plan.sizes)]
        keep = torch.ones(keys.shape[:2], dtype=torch.bool).index_fill_(1, shown, False)
        positions = keep.scatter_(1, chosen, True).nonzero()[:, 1].view(len(keys), -1, 1)  # [H, S, 1]
        slots = request.region[-plan.kept_blocks :, None] * plan.block_size + torch.arange(plan.block_size)
        blocks, heads, size, _ = kv_cache.shape
        ops.cpu_attn_reshape_and_cache(
            *(torch.take_along_dim(x, positions, 1).transpose(0, 1).contiguous() for x in (keys, values)),
            *kv_cache.view(blocks, heads, size * 2, -1).chunk(2, dim=2),
            slots.flatten(),
            layer.isa,
            k_scale=layer._k_scale_float,
            v_scale=layer._v_scale_float,
            kv_cache_dtype=self.kv_cache_dtype,
        )


class CapsightBackend(CPUAttentionBackend):
    """What vLLM finds under the name of its CPU backend.

    Attributes:
        capsules: of the model that was built last in this process, given a layer's KV cache; vLLM asks a
            class for the kind of KV cache, and tells it nothing of the model.
    """

    capsules: ClassVar[Callable[[FullAttentionSpec], Slots | Latents] | None] = None

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """The KV cache of a layer, with capsules where the model's config asks for them."""
        if cls.capsules is None or type(spec) is not FullAttentionSpec:
            return spec
        return CapsuleSpec.of(spec, cls.capsules(spec))

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """The attention."""
        return CapsightImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        """What plans a step."""
        return CapsightBuilder


def _capsules(config: Any, served: Served) -> Callable[[FullAttentionSpec], Slots | Latents] | None:
    """What images become; None: they stay as they are."""
    if served.retained == 1 or (served.retained, served.capsule) == (None, None):
        return None
    if served.capsule is None:
        return lambda spec: Slots(served.retained or 1)
    codecs = _codecs(config, served)
    sizes = len(codecs), codecs[0].levels.nbytes
    return lambda spec: Latents(*sizes, 2 * spec.num_kv_heads * spec.head_size * spec.dtype.itemsize)


def _codecs(config: Any, served: Served) -> tuple[JointCodec, ...]:
    """The codecs of all layers."""
    return load_codecs(carried(config.model_config, served), served.capsule or "", served.retained)
