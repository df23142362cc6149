"""What every tiny model offers to the tests, and the offline parts they are made of."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

Sample = tuple[list[Image.Image], str]


@dataclass
class TinyVLM:
    """A tiny model and what is needed to talk to it.

    Attributes:
        name: the family, `config.model_type`.
        model: random weights, fp32, eval mode.
        processor: the family's real processor class.
        placeholder: what a prompt writes for one image, before the processor expands it.
        video_placeholder: the same for a video; empty where the family has none.
        special: names of the family's special tokens -> their text (`image`, `start`, `end`, `pad`...).
        size: a (width, height) that makes every image a block of at least 64 vision tokens.
        other_size: another size, which where the family has it makes another number of tokens.
        template: a one-turn prompt with `{images}` and `{text}`.
    """

    name: str
    model: PreTrainedModel
    processor: ProcessorMixin
    placeholder: str
    special: dict[str, str]
    size: tuple[int, int]
    other_size: tuple[int, int]
    video_placeholder: str = ""
    template: str = "<|im_start|>user\n{images}{text}<|im_end|>\n<|im_start|>assistant\n"

    @property
    def config(self) -> Any:
        return self.model.config

    def save(self, folder: Path, **options: Any) -> None:
        """Write a checkpoint of the model; `save_pretrained` itself would change its config."""
        copy.deepcopy(self.model).save_pretrained(folder, **options)

    def state(self) -> list[str]:
        """All of the model that a test could leave changed, line by line: configs, modes, weights."""
        model = self.model
        lines = model.config.to_json_string(use_diff=False).splitlines()
        lines += str(model.generation_config).splitlines()
        for name, module in model.named_modules():
            config = getattr(module, "config", None)
            lines.append(f"{name}: {module.training} {getattr(config, '_attn_implementation', None)}")
        for name, weight in model.named_parameters():
            kind = f"{weight.dtype} {weight.device} {weight.requires_grad} {weight.grad is None}"
            lines.append(f"{name}: {kind} {weight.data_ptr()} {weight._version}")
        return lines

    def token_id(self, name: str) -> int:
        """The id of a special token by its name in `special`."""
        return self.processor.tokenizer.convert_tokens_to_ids(self.special[name])

    def picture(self, seed: int = 0, size: tuple[int, int] | None = None) -> Image.Image:
        """A picture of random blobs of this family's `size`."""
        return picture(seed, size or self.size)

    def prompt(self, images: Sequence[Image.Image], text: str) -> str:
        """A one-turn prompt: all the images next to each other, then the text."""
        return self.template.format(images=self.placeholder * len(images), text=text)

    def inputs(self, samples: Sequence[Sample], **kwargs: Any) -> Any:
        """A left-padded batch from `[(images, text), ...]`, as the processor returns it."""
        texts = [self.prompt(images, text) for images, text in samples]
        return self.process(texts, [list(images) for images, _ in samples], **kwargs)

    def video_inputs(self, samples: Sequence[tuple[list[np.ndarray], str]], **kwargs: Any) -> Any:
        """A left-padded batch from `[(clips, text), ...]`; see `clip`."""
        texts = [
            self.template.format(images=self.video_placeholder * len(clips), text=text)
            for clips, text in samples
        ]
        clips = [list(row) for row, _ in samples]
        return self.processor(text=texts, videos=clips, padding=True, return_tensors="pt", **kwargs)

    def process(self, texts: list[str], images: list[list[Image.Image]], **kwargs: Any) -> Any:
        """Processor outputs for ready prompts; `images` has one list per row."""
        given = {"images": images} if any(images) else {}
        return self.processor(text=texts, padding=True, return_tensors="pt", **given, **kwargs)


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """A picture of `size` (width, height): an 8 x 8 grid of random colours, smoothly enlarged."""
    colours = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)


def clip(seed: int = 0, frames: int = 4, side: int = 32) -> np.ndarray:
    """A film of random pixels (T, H, W, 3) for the stand-in video processors."""
    return np.random.default_rng(seed).integers(0, 256, (frames, side, side, 3), dtype=np.uint8)


def byte_tokenizer(
    special: Sequence[str], pad: str, eos: str, bos: str | None = None, **names: str
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: 256 byte tokens, then `special` in the order given.

    `names` become attributes of the tokenizer, as `image_token="<image>"` does for real ones.
    A newline pair is one token of its own, as in most real vocabularies.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate([*alphabet, "ĊĊ"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n+|[^\n]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        eos_token=eos,
        bos_token=bos,
        padding_side="left",
        extra_special_tokens=names,
    )


def offline(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The processor class without the type check of its parts.

    Video processors need torchvision, so a stand-in has to take their place; everything else of
    the class is as it is.
    """

    class Offline(processor_class):  # type: ignore[valid-type, misc]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
            return type(argument)

    Offline.__name__ = processor_class.__name__
    return Offline


def seeded(model_class: type[PreTrainedModel], config: Any, embedding_std: float = 0.5) -> PreTrainedModel:
    """A random-weight fp32 model in eval mode, with weights large enough that its logits differ."""
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "norm" not in name:
                is_embedding = "embed_tokens" in name
                parameter.normal_(0.0, embedding_std if is_embedding else parameter[0].numel() ** -0.5)
    return model.float().eval()
