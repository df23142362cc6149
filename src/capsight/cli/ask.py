"""`capsight ask`: a question about images that `capsight encapsulate` has read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from capsight.cli.models import REFERENCE, load_model
from capsight.cli.options import (
    BitsOption,
    CompressionOption,
    DeviceOption,
    DtypeOption,
    ProcessorOption,
    RetainedOption,
    chosen_capsule,
    picture_item,
)
from capsight.cli.output import cache_bytes, note
from capsight.errors import OptionError
from capsight.evaluation import ask_item
from capsight.evaluation.cache_bytes import CacheBytes
from capsight.evaluation.prompting import question_tokens
from capsight.kvcapsule.rest import CapsuleStore
from capsight.reference.wording import HINT, is_task_question
from capsight.runtime import enable


def ask(
    prompt: Annotated[str, typer.Option(help="What to ask.")],
    cache: Annotated[Path | None, typer.Argument(help="File that `capsight encapsulate` wrote.")] = None,
    store: Annotated[
        Path | None, typer.Option(help="A store instead, in which images are looked for.")
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="With --store: an image; give the option once for each.")
    ] = None,
    reuse: Annotated[
        str | None,
        typer.Option(
            help="With --store: prefix (images after what they were read after; the default) or anywhere "
            "(each by itself)."
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="The model that read the images.")] = REFERENCE,
    capsule: Annotated[str | None, typer.Option(help="The capsule that was used then.")] = None,
    retained: RetainedOption = None,
    compression_ratio: CompressionOption = None,
    bits: BitsOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of the answer.")] = 64,
    processor: ProcessorOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
) -> None:
    """Answer a question about images from their saved capsules; options have to be those of `encapsulate`.

    Images that a store does not hold are read and put there.
    """
    if max_new_tokens < 1:
        raise OptionError(f"max-new-tokens is {max_new_tokens}; it must be at least 1")
    if (cache is None) == (store is None):
        raise OptionError("name either a file that `capsight encapsulate` wrote, or a --store")
    if bool(image) != (store is not None):
        raise OptionError("name the images to ask about with --image, and the --store that may hold them")
    if store is None and reuse is not None:
        raise OptionError("--reuse is for images of a --store; a file is used as it was read")
    chosen = chosen_capsule(capsule, model, retained, bits, compression_ratio)
    if store is not None:
        capsule_store = CapsuleStore(store, reuse=reuse or "prefix")  # type: ignore[arg-type]  # which checks it
        item = picture_item(image or (), prompt)
        vlm, vlm_processor = load_model(model, dtype, device, processor)
        with enable(vlm, capsule=chosen, store=capsule_store) as fast, torch.no_grad():
            answers = ask_item(fast, vlm_processor, item, "after", max_new_tokens)
        _say(answers.texts[0], model, prompt, answers.nbytes)
        return
    assert cache is not None
    vlm, vlm_processor = load_model(model, dtype, device, processor)
    with enable(vlm, capsule=chosen) as fast, torch.no_grad():
        loaded = fast.load(cache)
        seen = fast.prompt_ids
        if (
            loaded.layout.batch_size > 1
            or seen.shape[1] < loaded.get_seq_length()
            or not loaded.layout.num_images
        ):
            raise OptionError(f"{cache} holds more than one row, or more than images; load it with fast.load")
        new = question_tokens(vlm_processor, vlm.config, loaded.layout.num_images, [prompt])
        ids = torch.cat([seen, torch.tensor(new)], 1).to(vlm.device)
        tokens = fast.generate(
            past_key_values=loaded,
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
    texts = vlm_processor.tokenizer.batch_decode(tokens[:, ids.shape[1] :], skip_special_tokens=True)
    _say(texts[0].strip(), model, prompt, CacheBytes.of(loaded))


def _say(answer: str, model: str, prompt: str, nbytes: CacheBytes) -> None:
    print(answer)
    if model == REFERENCE and not is_task_question(prompt):
        note(HINT)
    note(cache_bytes(nbytes))
