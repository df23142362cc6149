"""Greedy answers, checked against a draft in one pass instead of being written token by token.

The draft is the full cache's answer. Where a method would have written the same tokens, one forward pass says
so; where it would not, its own token replaces the draft's first wrong one and it writes on from there. What
comes out is what greedy decoding gives, up to rounding of equal logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from capsight.evaluation.prefill import Prefill
from capsight.kvcapsule.cache import full_attention_layers

GREEDY: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.0}
"""Options of `generate`: the most likely token, whatever the model's own defaults are."""

Rows = Sequence[Sequence[int]]


def append_tokens(tokens: dict[str, Tensor], tails: Rows, pad: int) -> dict[str, Tensor]:
    """Token entries `[B, S]` (or `[1, S]`, for all) with one left-padded tail a row after them."""
    ids = tokens["input_ids"]
    width, rows = max(len(tail) for tail in tails), len(tails)
    new = torch.tensor([[pad] * (width - len(t)) + list(t) for t in tails], device=ids.device)
    real = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in tails], device=ids.device)
    longer = {"input_ids": new, "attention_mask": real}
    longer |= {k: torch.zeros_like(new) for k in ("mm_token_type_ids", "token_type_ids") if k in tokens}
    return {key: torch.cat([tokens[key].expand(rows, -1), part], 1) for key, part in longer.items()}


def end_tokens(model: Any) -> set[int]:
    """The tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    return set(ends) if isinstance(ends, list) else set() if ends is None else {ends}


def until_end(tokens: Sequence[int], ends: set[int], limit: int) -> list[int]:
    """At most `limit` tokens, up to the first that ends the answer, that one included."""
    stop = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[: min(stop, limit)])


def write(
    prefill: Prefill, cache: Any, tokens: dict[str, Tensor], limit: int, pad: int, rows: Tensor | None = None
) -> tuple[list[list[int]], Tensor]:
    """Decode every row greedily.

    Args:
        prefill: what the cache was filled from.
        cache: one row per row of `tokens`.
        tokens: entries `[B, S]` of all tokens so far; the cache lacks the last of them.
        limit: most tokens of an answer.
        pad: the padding token.
        rows: which rows of the prefill these are; None: all of them, or all of one.

    Returns:
        The answers, end tokens included, and `[B, V]` float32 logits of their first tokens.
    """
    out: Any = prefill.generate(
        cache,
        rows,
        **tokens,
        **GREEDY,
        max_new_tokens=limit,
        pad_token_id=pad,
        output_logits=True,
        return_dict_in_generate=True,
    )
    ends = end_tokens(prefill.model)
    new = out.sequences[:, tokens["input_ids"].shape[1] :].tolist()
    return [until_end(row, ends, limit) for row in new], out.logits[0].float()


def check(
    prefill: Prefill, cache: Any, tokens: dict[str, Tensor], tails: Rows, drafts: Rows, limit: int, pad: int
) -> tuple[list[list[int]], Tensor]:
    """Decode every row greedily, given drafts of what it will say.

    Args:
        prefill: what the cache was filled from.
        cache: one row per tail; of no use afterwards.
        tokens: entries `[B, S]` (or `[1, S]`) of the tokens in the cache.
        tails: the tokens that come next, row by row.
        drafts: answers, end token included or `limit` tokens long; empty where nothing is to be said.
        limit: most tokens of an answer.
        pad: the padding token.

    Returns:
        As `write`.
    """
    model = prefill.model
    if len(full_attention_layers(model.config)) < len(cache.layers):
        # Rejected tokens stay in the cache, hidden: in a sliding window they would take room.
        return write(prefill, cache, append_tokens(tokens, tails, pad), limit, pad)
    fed = [[*tail, *draft[:-1]] for tail, draft in zip(tails, drafts, strict=True)]
    inputs = append_tokens(tokens, fed, pad)
    width, ends = max(len(row) for row in fed), end_tokens(model)
    with collect_logits(model) as seen:
        prefill.generate(
            cache,
            **inputs,
            **GREEDY,
            max_new_tokens=1,
            pad_token_id=pad,
            logits_to_keep=width,
        )
    starts = [width - len(draft) for draft in drafts]  # where the token before the answer lies
    logits = seen[0][:, -width:]
    answers, unfinished = [], []
    for row, (start, draft) in enumerate(zip(starts, drafts, strict=True)):
        predicted = logits[row, start:].argmax(-1).tolist()
        right = next((i for i, (a, b) in enumerate(zip(predicted, draft, strict=True)) if a != b), len(draft))
        answers.append([*draft[:right], *predicted[right : right + 1]])
        if right < len(draft):
            hidden = len(draft) - 1 - right  # draft tokens that were fed although they are wrong
            inputs["attention_mask"][row, inputs["attention_mask"].shape[1] - hidden :] = 0
            if predicted[right] not in ends and len(answers[row]) < limit:
                unfinished.append(row)
    first = torch.stack([logits[row, min(start, width - 1)] for row, start in enumerate(starts)]).float()
    if unfinished:
        rows = torch.tensor(unfinished, device=logits.device)
        if len(unfinished) < len(fed):
            cache.batch_select_indices(rows)
        rest = {key: value[rows] for key, value in inputs.items()}
        rest = append_tokens(rest, [answers[row][-1:] for row in unfinished], pad)
        left = limit - min(len(answers[row]) for row in unfinished)
        for row, more in zip(unfinished, write(prefill, cache, rest, left, pad, rows)[0], strict=True):
            answers[row] = until_end([*answers[row], *more], ends, limit)
    return answers, first


@contextmanager
def collect_logits(model: Any) -> Iterator[list[Tensor]]:
    """Collect the logits `[B, n, V]` of every forward pass inside the block."""
    seen: list[Tensor] = []
    hook = model.register_forward_hook(lambda module, args, output: seen.append(output.logits))
    try:
        yield seen
    finally:
        hook.remove()
