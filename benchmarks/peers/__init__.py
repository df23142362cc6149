"""Methods that are compared with and not shipped: scores of eviction, whole caches in few bits, pruning.

All are methods of `capsight.evaluation.evaluate`, for one prompt at a time on the CPU.
"""

from __future__ import annotations

from typing import Any

from capsight.kvcapsule.cache import full_attention_layers
from capsight.kvcapsule.codecs.rotary import find_rotary
from capsight.serving.method import PagedCapsules
from peers.evicting import PeerEviction
from peers.paged import PooledPaged
from peers.pruning import Given, Pruning
from peers.scores import capkv, compactor, expected_attention, keydiff, leverage
from peers.whole import WholeQuantised

SCORES = {
    "keydiff": keydiff,
    "leverage": leverage,
    "capkv": capkv,
    "compactor": compactor,
    "expected-attention": expected_attention,
}
POOLED = ("keydiff", "leverage", "capkv")
"""Scores with a row whose heads share a layer's budget, too."""
WHOLE = ("kivi", "kivi-plain", "rotated")
WIDTHS = (4, 3, 2)
PAGED_BLOCK = 16
"""Tokens of a block: vLLM's on GPUs. Its CPU kernels want 32, which is coarse for small pictures."""
PAGED = {"paged": PagedCapsules, "paged-pooled": PooledPaged}
PEERS = (
    *SCORES,
    *(f"{name}-pooled" for name in POOLED),
    "diverse",
    "distinct",
    *PAGED,
    *(f"{name}-{bits}" for name in WHOLE for bits in WIDTHS),
)


def make_peers(names: list[str], retained: list[float], model: Any, block_size: int) -> dict[str, Any]:
    """Methods at every budget by their labels; those without one once."""
    rotary = find_rotary(model, list(full_attention_layers(model.config)))
    given = Given(model) if {"diverse", "distinct"} & set(names) else None
    made: list[Any] = []
    for name in names:
        kind, _, last = name.rpartition("-")
        if name in ("diverse", "distinct"):
            assert given is not None
            budgets = retained if name == "diverse" else [0.5]
            made += [Pruning(name, given, rho, block_size) for rho in budgets]
        elif name in PAGED:
            made += [PAGED[name](rho, PAGED_BLOCK) for rho in retained]
        elif kind in WHOLE:
            made.append(WholeQuantised(kind, int(last), rotary))
        else:
            pooled = last == "pooled"
            score = SCORES[kind if pooled else name]
            made += [PeerEviction(name, score, rotary, rho, block_size, pooled) for rho in retained]
    return {method.label: method for method in made}
