"""What switching heads does to the next tokens, to first order: one pass forward and a few back.

A logit's gradient by the attention output of a layer, times what a category changes of that output, is what
the logit moves, for all heads and categories at once. First order is as good as a pass for each of them as
long as logits move little. Where they move much it is not: another token may become the likeliest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from capsight.blindsight.calibrate.answers import Answers
from capsight.blindsight.calibrate.capture import LayerCall, shape_of, watching
from capsight.blindsight.categories import SPARSE, Category, MaskOptions

TOKENS = 3
"""Tokens of a position that are followed, the likeliest of the dense model; the others count as nothing."""


def first_order(
    model: Any, answers: Answers, options: MaskOptions, together: int = 1
) -> tuple[Tensor, Tensor]:
    """KL divergence along the answers, and how far logits move, if some heads follow a category.

    Takes `n (TOKENS - 1)` passes back for answers of n tokens, and the memory of a training step at the
    prompt's length, without gradients of weights.

    Args:
        model: the model of the answers.
        answers: of the dense model.
        options: which tokens are sinks, and the window.
        together: heads switched together (g).

    Returns:
        Twice float32 `[L, 3, Hq / g]`: KL in nats, mean over tokens and answers; and the most that a
        followed logit moves against the likeliest token's.

    Raises:
        RuntimeError: the model cannot be differentiated here, or there is no memory for it.
    """
    outputs: dict[int, Tensor] = {}
    changes: dict[int, Tensor] = {}
    layout = answers.text.layout

    def observe(call: LayerCall) -> Tensor:
        with torch.no_grad():
            dense = call.attend_uniform(layout, Category.DENSE, options)
            sparse = [call.attend_uniform(layout, category, options) for category in SPARSE]
            changes[call.layer] = torch.stack(sparse) - dense  # [3, B, Hq, S, D]
        output = call.attend_uniform(layout, Category.DENSE, options, implementation="segments")
        outputs[call.layer] = output if output.requires_grad else output.requires_grad_()
        return output

    layers, heads = shape_of(model)
    with torch.inference_mode(False), watching(model, observe), torch.enable_grad(), _frozen(model):
        logits = answers.text.observed(answers.counted.shape[1] + 1)[:, :-1]  # [B, n, V]
        likeliest = logits.detach().topk(TOKENS, -1)  # [B, n, T]
        followed = logits.gather(-1, likeliest.indices)
        margins = (followed[..., 1:] - followed[..., :1]).sum(0).flatten()  # rows do not see each other
        moves = []
        for margin in margins:
            gradients = torch.autograd.grad(
                margin, list(outputs.values()), retain_graph=True, allow_unused=True
            )
            move = torch.zeros(layers, len(SPARSE), len(logits), heads // together, device=logits.device)
            for layer, gradient in zip(outputs, gradients, strict=True):
                if gradient is not None:
                    by_head = torch.einsum("cbhsd,bhsd->cbh", changes[layer].float(), gradient.float())
                    move[layer] = by_head.unflatten(-1, (-1, together)).sum(-1)
            moves.append(move)
    return _losses(likeliest.values, torch.stack(moves), answers.counted)


def _losses(logits: Tensor, moves: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """What `first_order` returns.

    Args:
        logits: of the followed tokens `[B, n, T]`.
        moves: of all but the first of them against the first: `[n (T - 1), L, 3, B, G]`.
        counted: bool `[B, n]`.
    """
    moved = moves.unflatten(0, (logits.shape[1], -1)).permute(2, 3, 5, 4, 0, 1)  # [L, 3, G, B, n, T - 1]
    moved = torch.cat((torch.zeros_like(moved[..., :1]), moved), -1)  # [L, 3, G, B, n, T]
    before, after = logits.log_softmax(-1), (logits + moved).log_softmax(-1)
    each = (before.exp() * (before - after)).sum(-1) * counted  # [L, 3, G, B, n]
    kl = (each.sum(-1) / counted.sum(-1)).mean(-1)
    return kl.cpu(), (moved.abs().amax(-1) * counted).amax((-2, -1)).cpu()


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Inside the context no weight wants a gradient; weights may be other tensors afterwards (offloading)."""
    wanted = {name for name, weight in model.named_parameters() if weight.requires_grad}
    try:
        for weight in model.parameters():
            weight.requires_grad_(False)
        yield
    finally:
        for name, weight in model.named_parameters():
            weight.requires_grad_(name in wanted)
