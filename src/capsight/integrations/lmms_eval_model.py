"""The model class that lmms-eval loads; importing it needs lmms-eval (written against 0.7)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lmms_eval.api.model import lmms

from capsight.errors import OptionError
from capsight.evaluation.prompting import Message
from capsight.integrations.answering import Answerer, until_stop

_GENERATION = ("temperature", "top_p", "top_k", "num_beams", "repetition_penalty")


class CapsightModel(lmms):
    """A chat model over `capsight.enable`; images only."""

    is_simple = False

    def __init__(self, batch_size: int | str = 1, max_batch_size: int | None = None, **options: Any) -> None:
        """Load the model.

        Args:
            batch_size: 1; prompts are asked one by one.
            max_batch_size: lmms-eval passes it; of no use here.
            **options: `pretrained`, `method` and what else `Answerer.load` takes.
        """
        super().__init__()
        if int(batch_size) != 1:
            raise OptionError(f"batch_size is {batch_size}; prompts are asked one by one, use 1")
        self.answerer = Answerer.load(**options)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.answerer.model.device
        return device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers to instances with args (context, doc_to_messages, options, doc id, task, split)."""
        answers = []
        for request in requests:
            _, to_messages, options, doc_id, task, split = request.args
            messages, images = _chat(to_messages(self.task_dict[task][split][doc_id]))
            answers.append(self._answer(messages, images, options))
        return answers

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not supported.

        Raises:
            OptionError: always.
        """
        raise OptionError("capsight answers one turn; choose tasks of one round")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Scores of instances with args (context, continuation, doc_to_visual, doc id, task, split).

        The continuation, as in lmms-eval, is a text or a function of the document.
        """
        scores = []
        for request in requests:
            context, continuation, to_visual, doc_id, task, split = request.args
            document = self.task_dict[task][split][doc_id]
            said = continuation(document) if callable(continuation) else continuation
            images = _visuals(to_visual, document)
            content: list[Message] = [{"type": "image"}] * len(images)
            messages = [{"role": "user", "content": [*content, {"type": "text", "text": context}]}]
            scores.append(self.answerer.score(messages, images, said))
        return scores

    def _answer(self, messages: list[Message], images: list[Any], options: dict[str, Any]) -> str:
        chosen = {key: options[key] for key in _GENERATION if options.get(key) is not None}
        if not chosen.get("temperature"):  # 0 says greedy there
            chosen = {k: v for k, v in chosen.items() if k not in ("temperature", "top_p", "top_k")}
        else:
            chosen["do_sample"] = True
        limit = int(options.get("max_new_tokens", 128))
        return until_stop(self.answerer.answer(messages, images, limit, **chosen), options.get("until"))


def _chat(messages: Sequence[Message]) -> tuple[list[Message], list[Any]]:
    """Messages for a processor's template, and their images."""
    images: list[Any] = []

    def parts(content: Any) -> Iterator[Message]:
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "image":
                images.append(part["url"])
                yield {"type": "image"}
            elif part["type"] == "text":
                yield {"type": "text", "text": part["text"]}
            else:
                raise OptionError(f"capsight takes images and text, not {part['type']}; choose another task")

    return [{"role": m["role"], "content": list(parts(m["content"]))} for m in messages], images


def _visuals(to_visual: Callable[[Any], Any] | None, document: Any) -> list[Any]:
    return [] if to_visual is None else list(to_visual(document) or ())
