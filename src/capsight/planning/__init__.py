"""Plans from a model's config alone: KV bytes, requests per GPU, break-even, prefill FLOPs; no weights.

shape (what the config says) -> images (a prompt's layout) -> cache, flops -> `plan`. Every formula is in
the docstring of the function that uses it, and together in docs/plan.md.
"""

from capsight.planning.images import ImageGrids, grids_of_size, grids_of_tokens, mix_layout
from capsight.planning.plan import Budget, CachePlan, Plan, Prefill, plan
from capsight.planning.shape import ModelShape

__all__ = [
    "Budget",
    "CachePlan",
    "ImageGrids",
    "ModelShape",
    "Plan",
    "Prefill",
    "grids_of_size",
    "grids_of_tokens",
    "mix_layout",
    "plan",
]
