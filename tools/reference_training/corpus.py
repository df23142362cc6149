"""The wording the tokenizer is trained on: questions and word answers of the train split."""

from collections.abc import Iterator

from capsight.reference.prompts import draw_prompt, split_rng


def wording(prompts: int = 400) -> Iterator[str]:
    """Yield the text of training questions and of answers that are words."""
    for index in range(prompts):
        prompt = draw_prompt(split_rng("train", index, "wording"), 1 + index % 8, 12)
        for question in prompt.questions:
            yield question.text
            if question.answer.islower():
                yield question.answer
