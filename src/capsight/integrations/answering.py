"""`Answerer`: one chat in, one answer out, over any method; what every harness needs of capsight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from capsight.blindsight import HeadMap
from capsight.cli.methods import METHOD_NAMES, make_methods
from capsight.cli.models import REFERENCE, load_capsule, load_model
from capsight.errors import OptionError
from capsight.evaluation import FULL, PROTOCOLS
from capsight.evaluation.asking import to_device
from capsight.evaluation.drafts import append_tokens, collect_logits
from capsight.evaluation.prompting import Message, call, render
from capsight.execution import inputs_device
from capsight.kvcapsule import CacheMethod
from capsight.pictures import picture
from capsight.runtime import enable
from capsight.runtime.split import TOKEN_ENTRIES


@dataclass(frozen=True, slots=True)
class Answerer:
    """A model with a method.

    Attributes:
        model: the model.
        processor: its processor (left padding).
        method: capsule or baseline; None is the full cache.
        head_map: what prefill follows, or None.
        protocol: "after": what comes up to the last image is encapsulated first; "within": one prefill.
    """

    model: Any
    processor: Any
    method: CacheMethod | None
    head_map: HeadMap | None = None
    protocol: str = "after"

    @classmethod
    def load(
        cls,
        pretrained: str = REFERENCE,
        method: str = "joint",
        retained: float | None = None,
        capsule: str | None = None,
        head_map: str | None = None,
        protocol: str = "after",
        dtype: str | None = None,
        device: str | None = None,
        processor: str | None = None,
    ) -> Answerer:
        """Load by names, as the command line does.

        Args:
            pretrained: "reference", a folder or a hub id.
            method: "full", or a method that needs no calibration data.
            retained: fraction of the vision KV to keep; None is the method's default.
            capsule: folder or hub id, for the methods of capsules.
            head_map: folder or hub id.
            protocol: "after" or "within".
            dtype: compute type; None is the checkpoint's, float32 for the reference VLM.
            device: torch device; None is the GPU where there is one.
            processor: `module:factory` of one's own.

        Raises:
            OptionError: a name is unknown, or the method has to be fitted.
            CapsightError: something cannot be loaded or does not fit the model.
        """
        if protocol not in PROTOCOLS:
            raise OptionError(f"protocol is {protocol!r}; use 'after' or 'within'")
        if method not in (FULL, *METHOD_NAMES):
            raise OptionError(f"there is no method {method!r}; use {', '.join((FULL, *METHOD_NAMES))}")
        model, vlm_processor = load_model(pretrained, dtype, device, processor)
        methods: dict[str, CacheMethod] = {}
        if method != FULL:
            methods = make_methods(
                [method],
                [] if retained is None else [float(retained)],
                lambda: load_capsule(capsule, pretrained),
                _unfitted,
                model,
            )
        loaded_map = HeadMap.from_pretrained(head_map) if head_map else None
        return cls(model, vlm_processor, next(iter(methods.values()), None), loaded_map, protocol)

    def answer(
        self, messages: Sequence[Message], images: Sequence[Any], max_new_tokens: int = 128, **options: Any
    ) -> str:
        """The model's next message.

        Args:
            messages: the conversation.
            images: paths, PIL images or arrays, in the order of their placeholders.
            max_new_tokens: most tokens of the answer.
            **options: further ones of `generate`; greedy unless they say otherwise.
        """
        inputs = self._inputs(messages, images)
        with self._enabled() as fast, torch.no_grad():
            cache = fast.encapsulate(**inputs) if images and self.protocol == "after" else None
            options = {"do_sample": False, **options, "max_new_tokens": max_new_tokens}
            tokens = fast.generate(past_key_values=cache, **inputs, **options)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        return str(self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)[0]).strip()

    def score(
        self, messages: Sequence[Message], images: Sequence[Any], continuation: str
    ) -> tuple[float, bool]:
        """Log-likelihood of a continuation, and whether greedy decoding would say it.

        Always as in protocol "after": in one prefill the continuation would never meet a capsule.

        Args:
            messages: the conversation.
            images: paths, PIL images or arrays, in the order of their placeholders.
            continuation: what the model would go on with.

        Raises:
            OptionError: the continuation is empty.
        """
        inputs = self._inputs(messages, images)
        ids = self.processor.tokenizer(continuation, add_special_tokens=False)["input_ids"]
        if not ids:
            raise OptionError("the continuation is empty; there is nothing to score")
        with self._enabled() as fast, torch.no_grad(), collect_logits(self.model) as seen:
            cache = fast.encapsulate(**inputs) if images else None
            seen.clear()
            tokens = {key: value for key, value in inputs.items() if key in TOKEN_ENTRIES}
            longer = append_tokens(tokens, [ids], self.processor.tokenizer.pad_token_id)
            keep = len(ids) + 1
            fast.generate(
                past_key_values=cache, **longer, max_new_tokens=1, do_sample=False, logits_to_keep=keep
            )
        logs = seen[0][0, -keep:-1].float().log_softmax(-1)  # [n, V]
        target: Tensor = torch.tensor(ids, device=logs.device)
        return logs.gather(1, target[:, None]).sum().item(), bool((logs.argmax(-1) == target).all())

    def _inputs(self, messages: Sequence[Message], images: Sequence[Any]) -> dict[str, Any]:
        pictures = [picture(image) for image in images]
        inputs = call(self.processor, [render(self.processor, messages)], [pictures], "the prompt")
        return to_device(inputs, inputs_device(self.model))

    def _enabled(self) -> Any:
        return enable(self.model, capsule=self.method, head_map=self.head_map, prefill="sparse")


def _unfitted() -> list[Any]:
    raise OptionError("this method has to be fitted to calibration data; use one that need not be")


def until_stop(text: str, stops: str | Sequence[str] | None) -> str:
    """The text before the first of the stop strings."""
    for stop in [stops] if isinstance(stops, str) else stops or ():
        text = text.split(stop)[0] if stop else text
    return text
