"""Whether a question is one of the task's, in the words that the reference VLM was trained on."""

import re

_SINGLE = (
    r"what is the small print", r"what is the .+ code", r"what is the total", r"which item costs the most",
    r"what does the .+ cost", r"what is in row .+, column .+", r"which bar is the (highest|lowest)",
    r"how high is the .+ bar", r"what color is the .+", r"how many shapes are there", r"what is on the plate",
)  # fmt: skip
_CROSS = (
    r"which image (is|has|lists|shows) .+", r"how many images are .+", r"what are the images, in order",
    r"are images \d+ and \d+ of the same kind", r"which .+, image \d+ or image \d+",
)  # fmt: skip
_KNOWN = re.compile(rf"(image \d+: ({'|'.join(_SINGLE)})|{'|'.join(_CROSS)})\?", re.IGNORECASE)

HINT = (
    "the reference VLM reads drawn cards, receipts, tables, charts, shapes and plates only, and knows "
    'questions such as "Image 1: what is the total?" or "How many images are tables?"; `capsight examples` '
    "writes pictures and questions, and --model takes a model for others"
)


def is_task_question(text: str) -> bool:
    """Whether the text is worded as a question of the reference task."""
    return _KNOWN.fullmatch(" ".join(text.split())) is not None
