"""From images and questions to processor outputs; what a processor cannot read is refused in one sentence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from PIL import Image

from capsight.errors import LayoutError, OptionError
from capsight.evaluation.items import Item
from capsight.layout import build_layout
from capsight.pictures import picture

Message = Mapping[str, Any]
"""A chat message as processors' templates take it; images in `content` are `{"type": "image"}`."""

_VISION = ("image", "video", "vision", "boi_", "eoi_")
"""What is in the names, or the texts, of special tokens that stand for images and their ends."""


def chat_text(processor: Any, images: int, question: str) -> str:
    """One user turn of `images` images and a question, rendered by the processor's chat template."""
    content: list[dict[str, str]] = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    return render(processor, [{"role": "user", "content": content}])


def render(processor: Any, messages: Sequence[Message]) -> str:
    """The conversation and the start of the answer, as the processor's chat template writes them.

    Raises:
        OptionError: a text holds one of the tokens that stand for images, or there is no chat template
            that takes the messages.
    """
    tokens = vision_tokens(processor)
    for text in _texts(messages):
        if placeholder := max((token for token in tokens if token in text), key=len, default=None):
            raise OptionError(
                f"a question holds {placeholder!r}, which stands for an image in this model's prompts; leave "
                "it out"
            )
    try:
        return str(processor.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False))
    except Exception as error:  # templates are programs, and processors may be a user's own
        raise OptionError(f"the processor cannot write the prompt: {_reason(error)}") from error


def process(processor: Any, item: Item, questions: Sequence[str]) -> dict[str, Any]:
    """Processor outputs for one row per question, each with all images of the item.

    Raises:
        OptionError: the processor takes no such pictures or questions; names the item.
    """
    try:
        texts = [chat_text(processor, len(item.images), q) for q in questions]
    except OptionError as error:
        raise OptionError(f"{item.name}: {error}") from error
    images = [picture(image) for image in item.images]
    return call(processor, texts, [images for _ in questions], item.name)


def question_tokens(processor: Any, config: Any, images: int, questions: Sequence[str]) -> list[list[int]]:
    """Token ids of what follows the images of a prompt, for each question.

    Blank images stand in for those of the prompt: what follows them is the same.

    Args:
        processor: the processor.
        config: of the model.
        images: number of images of the prompt, at least 1.
        questions: the questions.

    Raises:
        LayoutError: the chat template writes something before the images that depends on the question.
    """
    blank = Item("a question", (Image.new("RGB", (56, 56)),) * images, ())
    inputs = process(processor, blank, questions)
    rows = zip(inputs["input_ids"].tolist(), build_layout(inputs, config).rows, strict=True)
    halves = [(ids[row.pad_left : row.last_vision_end], ids[row.last_vision_end :]) for ids, row in rows]
    if any(head != halves[0][0] for head, _ in halves):
        raise LayoutError("the chat template puts a question before the images; use protocol 'within'")
    return [tail for _, tail in halves]


def call(processor: Any, texts: Sequence[str], images: Sequence[Sequence[Any]], name: str) -> dict[str, Any]:
    """Processor outputs for rendered prompts, padded.

    Args:
        processor: the processor.
        texts: a prompt for each row.
        images: pictures of each row, as `capsight.pictures.picture` gives them.
        name: of what is asked, for messages.

    Raises:
        OptionError: the processor does not take them.
    """
    given = [list(row) for row in images] if any(images) else None
    try:
        return dict(processor(text=list(texts), images=given, return_tensors="pt", padding=True))
    except Exception as error:  # processors complain in every way of a picture or text that they cannot take
        sizes = ", ".join(sorted({f"{image.width} x {image.height}" for row in images for image in row}))
        of = f" of pictures of {sizes} pixels" if sizes else ""
        raise OptionError(f"{name}: the processor makes no input{of}: {_reason(error)}") from error


def vision_tokens(processor: Any) -> set[str]:
    """The tokens that stand for images, videos and their ends, as far as processor and tokenizer tell."""
    tokenizer = processor.tokenizer
    named = (
        *getattr(processor, "__dict__", {}).items(),
        *getattr(tokenizer, "special_tokens_map", {}).items(),
    )
    added = (str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values())
    return {
        text
        for name, text in (*((n, t) for n, t in named if n.endswith("_token")), *((t, t) for t in added))
        if isinstance(text, str) and text and any(word in name for word in _VISION)
    }


def _texts(messages: Iterable[Message]) -> Iterator[str]:
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            yield content
        else:
            yield from (part["text"] for part in content if part.get("type") == "text")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or repr(error)
