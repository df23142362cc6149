"""Long answers, and ten questions over one cache: `joint` beside the full cache.

    python benchmarks/long_answers.py --judge mosaic --judge tiles --judge reference

Four pictures are read once. Then, over that one cache:

- `own`: ten questions one after another, the cache cut back to the pictures after each;
- `chain`: the same ten in one conversation, which no judge was trained for;
- `describe`: the four pictures described one after another in one conversation (not the reference VLM);
- `long`: `--tokens` tokens to one question, with no way to end: how many equal those of the full cache.

Writes `benchmarks/results/long_answers.json`; judges that are not named keep what stands there.
"""

from __future__ import annotations

import random
from json import loads
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from judges_known import REFERENCE, Source, load_source

import capsight
from capsight.cli.output import write_json
from capsight.evaluation import Ask
from capsight.evaluation.asking import split_questions, tokens_of
from capsight.evaluation.drafts import GREEDY, append_tokens
from capsight.evaluation.metric import exact_match
from capsight.evaluation.score import mcnemar_p
from capsight.kvcapsule import KVCapsule
from judging.loader import judge_prompt
from judging.questions import describe

RESULTS = Path(__file__).resolve().parent / "results"
QUESTIONS, PICTURES = 10, 4


def answered(
    source: Source, fast: Any, tails: list[list[int]], head: Any, chain: bool
) -> tuple[list[str], int]:
    """Answers to questions over one cache, in one conversation or each on its own, and their tokens."""
    tokenizer = source.processor.tokenizer
    pad, cache, tokens = tokenizer.pad_token_id, fast.encapsulate(**head), tokens_of(head)
    length, answers, written = cache.get_seq_length(), [], 0
    for tail in tails:
        inputs = append_tokens(tokens, [tail], pad)
        said = fast.generate(past_key_values=cache, **inputs, max_new_tokens=40, pad_token_id=pad, **GREEDY)
        new = said[0, inputs["input_ids"].shape[1] :].tolist()
        answers.append(tokenizer.decode(new, skip_special_tokens=True).strip())
        written += len(new)
        if chain:
            tokens = append_tokens(inputs, [new], pad)
        else:
            cache.crop(length - cache.get_seq_length())
    return answers, written


def endless(source: Source, fast: Any, tail: list[int], head: Any, count: int) -> list[int]:
    """`count` tokens after one question."""
    pad = source.processor.tokenizer.pad_token_id
    cache = fast.encapsulate(**head)
    inputs = append_tokens(tokens_of(head), [tail], pad)
    said = fast.generate(
        past_key_values=cache,
        **inputs,
        min_new_tokens=count,
        max_new_tokens=count,
        pad_token_id=pad,
        **GREEDY,
    )
    new: list[int] = said[0, inputs["input_ids"].shape[1] :].tolist()
    return new


def descriptions(judge: str, index: int, pictures: int) -> list[Ask]:
    """A description of each picture of a prompt."""
    worlds = [scene.world for scene in judge_prompt(judge, "test", index, pictures).scenes]
    found = [describe(world, k, random.Random(0)) for k, world in enumerate(worlds)]
    return [Ask(f"picture {k + 1}: {q.text}", q.answer, q.task) for k, q in enumerate(found)]


def asked(judge: str, retained: float, prompts: int, count: int) -> dict[str, Any]:
    """The figures of one judge."""
    source = load_source(judge, torch.bfloat16)
    if judge == REFERENCE:
        capsule = source.capsule()
    else:
        capsule = KVCapsule.fit(source.model, None, source.samples, progress=False)
    methods = {"full": None, "joint": capsule.with_retained(retained)}
    parts: dict[str, dict[str, list[int]]] = {}
    same, before = [], []
    for index, item in enumerate(source.items("test", PICTURES, prompts)):
        asks = {"own": list(item.asks[:QUESTIONS]), "chain": list(item.asks[:QUESTIONS])}
        if judge != REFERENCE:
            asks["describe"] = descriptions(judge, index, PICTURES)
        for part, own in asks.items():
            head, tails = split_questions(source.model, source.processor, item, [a.question for a in own])
            texts = {}
            row = parts.setdefault(part, {key: [] for key in ("full", "joint", "agree", "tokens")})
            for name, made in methods.items():
                with capsight.enable(source.model, capsule=made) as fast:
                    texts[name], written = answered(source, fast, tails, head, part != "own")
                row[name] += [int(exact_match(t, a.answer)) for t, a in zip(texts[name], own, strict=True)]
            row["agree"] += [int(a == b) for a, b in zip(texts["joint"], texts["full"], strict=True)]
            row["tokens"].append(written)
        free = {}
        for name, made in methods.items():
            with capsight.enable(source.model, capsule=made) as fast:
                free[name] = endless(source, fast, tails[0], head, count)
        marks = [a == b for a, b in zip(free["joint"], free["full"], strict=True)]
        same.append(sum(marks) / count)
        before.append(next((i for i, mark in enumerate(marks) if not mark), count))
    return {
        "retained": retained,
        "pictures": PICTURES,
        "prompts": prompts,
        "parts": {
            part: {
                "questions": len(row["full"]),
                "full": round(100 * sum(row["full"]) / len(row["full"]), 2),
                "joint": round(100 * sum(row["joint"]) / len(row["joint"]), 2),
                "p": round(mcnemar_p(row["joint"], row["full"]), 4),
                "agreement": round(100 * sum(row["agree"]) / len(row["agree"]), 2),
                "tokens": round(sum(row["tokens"]) / prompts),
            }
            for part, row in parts.items()
        },
        "long": {
            "tokens": count,
            "same": round(100 * sum(same) / len(same), 2),
            "before": sorted(before)[len(before) // 2],
        },
    }


def main(
    judge: Annotated[list[str], typer.Option(help="reference, mosaic, tiles...; repeat for several.")],
    retained: Annotated[float, typer.Option(help="Retained fraction of `joint`.")] = 0.05,
    prompts: Annotated[int, typer.Option(help="Prompts of four pictures.")] = 12,
    tokens: Annotated[int, typer.Option(help="Tokens of a long answer.")] = 300,
    json: Annotated[Path, typer.Option(help="Where to write the figures.")] = RESULTS / "long_answers.json",
) -> None:
    """Ask, print and write, judge by judge."""
    torch.set_num_threads(1)
    found: dict[str, Any] = loads(json.read_text())["judges"] if json.exists() else {}
    for name in judge:
        found[name] = asked(name, retained, prompts, tokens)
        print(name, found[name])
        write_json(json, {"judges": found})


if __name__ == "__main__":
    typer.run(main)
