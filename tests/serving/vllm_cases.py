"""Questions about pictures for engines in tests, and what transformers answers to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import capsight
from capsight import KVCapsule
from capsight.kvcapsule.attention.native.build import library, missing
from capsight.layout import build_layout
from capsight.reference import split_prompt
from capsight.serving.method import PagedCapsules
from capsight.serving.plan import BlockPlan, Latents, Ranges, plan_request
from serving.ask_vllm import assert_same_answer

SIZE = 32  # tokens of a block

COUNTS = (8, 1, 2, 8, 0, 3, 5)  # images of each prompt; those of the last one are asked about twice
TOKENS, END = 48, 4  # the end token stops nothing here


@pytest.fixture(scope="module", autouse=True)
def float32():
    """Processors that multiply in bfloat16 round more than engines do; modules that import this have none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
        _forget()
        yield
    _forget()


def _forget():
    """Have the native code chosen anew."""
    missing.cache_clear()
    library.cache_clear()


@dataclass(frozen=True)
class Kept:
    """What an engine keeps of images.

    Attributes:
        options: of `export_checkpoint`.
        method: the same in transformers.
        planned: how the blocks of a prompt shrink, from image ranges, its length and the size of a block.
        beyond: see `assert_same_answer`.
    """

    options: Mapping[str, Any]
    method: Any
    planned: Callable[[Ranges, int, int], BlockPlan | None]
    beyond: float

    @classmethod
    def slots(cls, retained):
        """This share of image tokens."""
        method = PagedCapsules(retained)
        return cls({"retained": retained}, method, lambda *given: plan_request(*given, retained), 1e-3)

    @classmethod
    def latents(cls, capsule):
        """Latents of a capsule."""
        codec = capsule.codecs[0]
        kind = Latents(len(capsule.codecs), codec.levels.nbytes, codec.mean.numel() * 4)
        return cls({"capsule": capsule}, capsule, kind.plan, 0.02)

    def plan(self, model, inputs):
        """How the blocks of one prompt shrink; None: its images stay as they are."""
        row = build_layout(inputs, model.config).rows[0]
        return self.planned([(block.start, block.end - 1) for block in row.blocks], row.length, SIZE)

    def answer(self, model, inputs):
        """What transformers says."""
        return expected(model, inputs, self.method if self.plan(model, inputs) else None)


def kept(name):
    """Both kinds, of the reference VLM."""
    return Kept.slots(0.4) if name == "slots" else Kept.latents(KVCapsule.from_pretrained("reference"))


def asked(processor, folder, count, number, question, of=None):
    """Text, picture files and model inputs of one question about the first `count` of the pictures."""
    prompt = split_prompt("test", number, of or count or 1)
    files = [str(folder / f"{number}-{index}.png") for index in range(count)]
    scenes = prompt.scenes[:count]
    for scene, file in zip(scenes, files, strict=True):
        scene.image.save(file)
    content = [{"type": "image"}] * count + [{"type": "text", "text": prompt.questions[question].text}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    images = {"images": [[scene.image for scene in scenes]]} if count else {}
    return text, files, processor(text=[text], return_tensors="pt", **images)


def all_asked(processor, folder):
    """One question for each of `COUNTS`, and another about the last pictures."""
    made = [asked(processor, folder, count, number, 0) for number, count in enumerate(COUNTS)]
    return [*made, asked(processor, folder, COUNTS[-1], len(COUNTS) - 1, 3)]


def expected(model, inputs, capsule, count=TOKENS):
    """Tokens and their log-probabilities on the transformers path."""
    options = {"max_new_tokens": count, "do_sample": False, "return_dict_in_generate": True}
    options |= {"eos_token_id": [-1], "pad_token_id": 0}  # on and on
    with torch.no_grad(), capsight.enable(model, capsule=capsule) as fast:
        out = fast.generate(**inputs, **options, output_logits=True)
    tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    rows = torch.stack(out.logits)[:, 0].float().log_softmax(-1)
    return tokens, [rows[i, token].item() for i, token in enumerate(tokens)]


def requests(prompts, counts=None):
    return [(text, files, (counts or {}).get(i, 1)) for i, (text, files, _) in enumerate(prompts)]


def check(found, right, beyond=1e-3):
    """Every answer is that of transformers; see `assert_same_answer`."""
    for answers, (tokens, logprobs) in zip(found["answers"], right, strict=True):
        for one in answers:
            assert_same_answer(one, tokens, logprobs, END, beyond)
    if found["seen"]:
        assert found["seen"]["leaked"] == 0
