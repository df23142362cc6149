"""Full-cache accuracy of a judge by kind and number of pictures, many questions of a prompt at once.

    python -m judging.check --judge mosaic --run runs/mosaic    (in tools/; a checkpoint)
    python -m judging.check --judge mosaic                      (the weights that ship)

Right answers are forced token by token, and an answer counts when every token would have been said: what
greedy generation gives, in one forward pass. `benchmarks/judges.py` generates.
"""

from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedTokenizerFast

from judging.lessons import Teacher
from judging.packed import Packed
from judging.prompts import Prompt, draw_prompt, split_rng
from judging.questions import KINDS
from judging.shapes import JUDGES, Judge, untrained
from judging.train import answers, features_of


@torch.no_grad()
def accuracy(
    judge: Judge,
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    split: str,
    prompts: int,
    every: bool = False,
) -> dict[int, dict[str, tuple[int, int]]]:
    """(right, asked) by number of pictures and kind; `every` asks the kinds that are not learnt, too."""
    teacher, packed = Teacher(judge, tokenizer), Packed(model.model.language_model)
    found: dict[int, dict[str, tuple[int, int]]] = {}
    for pictures in (1, 2, 4):
        counts: dict[str, list[bool]] = defaultdict(list)
        for index in range(prompts):
            rng = split_rng(judge.name, split, index, f"{pictures} pictures")
            prompt = draw_prompt(rng, judge.grid, judge.style, pictures, 24, KINDS if every else judge.kinds)
            lesson = teacher([prompt])
            packed.begin(lesson, judge.tokens)
            logits, target, _ = answers(judge, model, lesson, features_of(judge, model, lesson))
            right = (logits.argmax(-1) == target).tolist()
            for question in _in_order(prompt):
                tokens = sum(len(teacher.encode(p.text)) for p in question.pieces) + 1
                counts[question.task].append(all(right[:tokens]))
                right = right[tokens:]
        found[pictures] = {k: (sum(counts[k]), len(counts[k])) for k in KINDS if counts[k]}
    return found


def _in_order(prompt: Prompt) -> list[Any]:
    return [q for long in (False, True) for q in prompt.questions if (q.task == "describe") == long]


def table(found: dict[int, dict[str, tuple[int, int]]]) -> str:
    """A Markdown table of percentages: kinds down, numbers of pictures across."""
    lines = [
        "| kind | " + " | ".join(f"{n} picture{'s' * (n > 1)}" for n in found) + " |",
        "|---|" + "--:|" * len(found),
    ]
    for kind in (k for k in KINDS if any(k in c for c in found.values())):
        cells = [f"{100 * c[kind][0] / c[kind][1]:.1f}" if kind in c else "" for c in found.values()]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    totals = [(sum(r for r, _ in c.values()), sum(n for _, n in c.values())) for c in found.values()]
    lines.append("| all | " + " | ".join(f"{100 * r / n:.1f} ({n})" for r, n in totals) + " |")
    return "\n".join(lines)


def check(
    judge: Annotated[str, typer.Option(help="Which judge.")],
    run: Annotated[Path | None, typer.Option(help="Folder of a training run; else what ships.")] = None,
    split: Annotated[str, typer.Option(help="calibration, dev or test.")] = "dev",
    prompts: Annotated[int, typer.Option(help="Prompts of each number of pictures.")] = 30,
    every: Annotated[bool, typer.Option(help="Ask the kinds that are not learnt, too.")] = False,
) -> None:
    """Print the accuracy of a judge."""
    torch.set_num_threads(1)
    made = JUDGES[judge]
    if run is None:
        from judging.loader import load_judge

        model, processor = load_judge(judge)
        tokenizer = processor.tokenizer
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(run / "tokenizer")
        model = untrained(made, tokenizer)
        model.load_state_dict(torch.load(run / "checkpoint.pt", weights_only=True)["model"])
        model.eval()
    print(table(accuracy(made, model, tokenizer, split, prompts, every)))


if __name__ == "__main__":
    typer.run(check)
