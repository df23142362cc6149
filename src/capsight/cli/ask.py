"""`capsight ask`: a question about images that `capsight encapsulate` has read; they are not needed again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from rich.console import Console
from torch import Tensor

from capsight.cli.models import REFERENCE, load_model
from capsight.cli.options import BitsOption, CompressionOption, RetainedOption, chosen_capsule
from capsight.cli.output import human_bytes
from capsight.errors import OptionError
from capsight.evaluation import Ask, Item
from capsight.evaluation.asking import process
from capsight.layout import build_layout
from capsight.runtime import enable


def ask(
    cache: Annotated[Path, typer.Argument(help="File that `capsight encapsulate` wrote.")],
    prompt: Annotated[str, typer.Option(help="What to ask.")],
    model: Annotated[str, typer.Option(help="The model that read the images.")] = REFERENCE,
    capsule: Annotated[str | None, typer.Option(help="The capsule that was used then.")] = None,
    retained: RetainedOption = None,
    compression_ratio: CompressionOption = None,
    bits: BitsOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of the answer.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16, as then.")] = "float32",
    device: Annotated[str, typer.Option(help="Torch device.")] = "cpu",
) -> None:
    """Answer a question about images from their saved capsules; options have to be those of `encapsulate`."""
    if max_new_tokens < 1:
        raise OptionError(f"max-new-tokens is {max_new_tokens}; it must be at least 1")
    chosen = chosen_capsule(capsule, model, retained, bits, compression_ratio)
    vlm, processor = load_model(model, dtype, device)
    with enable(vlm, capsule=chosen) as fast, torch.no_grad():
        held = fast.load(cache)
        seen = fast.prompt_ids
        if held.layout.batch_size > 1 or seen.shape[1] < held.get_seq_length() or not held.layout.num_images:
            raise OptionError(f"{cache} holds more than one row, or more than images; load it with fast.load")
        new = question_ids(processor, vlm.config, held.layout.num_images, prompt)
        ids = torch.cat([seen, new], 1).to(vlm.device)
        tokens = fast.generate(
            past_key_values=held,
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
    print(processor.tokenizer.batch_decode(tokens[:, ids.shape[1] :], skip_special_tokens=True)[0].strip())
    Console(stderr=True).print(
        f"[dim]KV cache {human_bytes(held.nbytes)}, full {human_bytes(held.nbytes_full)}[/]"
    )


def question_ids(processor: Any, config: Any, images: int, question: str) -> Tensor:
    """What follows the images in a prompt of `images` images and a question: int64 `[1, T]`.

    Blank images stand in for those that are not there any more; what follows them is the same.
    """
    blank = Image.new("RGB", (224, 224))
    inputs = process(processor, Item("", (blank,) * images, (Ask(question, ""),)), [question])
    ids: Tensor = inputs["input_ids"]
    return ids[:, build_layout(inputs, config).last_vision_end :]
