"""Accuracy against bytes of images at rest, and of images taken from elsewhere, protocol `after`.

    python benchmarks/at_rest.py --judge mosaic --judge tiles --json benchmarks/results/at_rest.json

Every row answers the same questions as the full cache. Images at rest are made and read with a capsule that
has no more than their quality needs where a hundred images share its file (`for_rest`). `tower-int4` stores
what the vision tower gave, in so many bits with a 16-bit scale a token, and prefills the language model
again: the rival at rest. Bytes are those of files: latents, token ids, layout and checksums; of the rival,
its numbers and scales alone.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import DynamicCache

from capsight import KVCapsule, enable
from capsight.cli.output import machine, write_json
from capsight.evaluation.asking import split_questions
from capsight.evaluation.prompting import process
from capsight.evaluation.sharing import Asking, _Prompt
from capsight.kvcapsule.cache.conversation import Conversation
from capsight.kvcapsule.codecs.positions import TokenPositions
from capsight.kvcapsule.rest import for_rest, load_rest, save_rest
from capsight.kvcapsule.rest.latents import code, decode
from capsight.kvcapsule.rest.parts import joint_codec, open_latents, packed
from capsight.layout import build_layout
from capsight.layout.positions import rope_positions
from capsight.runtime.text_pass import read_text

sys.path.insert(0, str(Path(__file__).resolve().parent))
from judges import LONGEST_ANSWER
from judges_known import REFERENCE, Source, load_source

STORED = 0.98
"""Quality of images that are taken from elsewhere."""
SHARE = 100
"""Images that share the file of a capsule."""


class Prompt(_Prompt):
    """One item; its questions are asked over caches that are made here."""

    def __init__(self, asking: Asking, item: Any, capsule: KVCapsule) -> None:
        """Read the item."""
        super().__init__(asking, item, None)
        self.model, self.capsule, self.codec = asking.model, capsule, joint_codec(capsule)
        self.layout = self._layout
        self.ids = self._prefill.tokens["input_ids"]

    def joint(self, capsule: KVCapsule) -> Any:
        """The joint cache, with what it has read."""
        cache = self._prefill.cache(capsule)
        names = tuple("" for _ in range(self.layout.num_images))
        cache.conversation = Conversation(self.layout, self.ids, self.ids.shape[1], (names,))
        return cache

    def said(self, cache: Any) -> list[str]:
        """Answers over a cache that was made here."""
        if not isinstance(cache, DynamicCache):
            self._prefill._lean.add(cache)
        tokens, _ = self._over(cache)
        if self._drafts is None:
            self._drafts = tokens
        return [t.strip() for t in self._processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def rest(self, quality: float, capsule: KVCapsule) -> tuple[Any, int, float, float]:
        """A cache that was in a file; the file's bytes, seconds to write and to read."""
        cache = self.joint(capsule)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "x"
            start = time.perf_counter()
            save_rest(path, cache, capsule, quality, True)
            wrote = time.perf_counter()
            devices = {i: torch.device("cpu") for i in capsule.codecs}
            reread = partial(read_text, self.model, capsule.codecs)
            again = load_rest(path, capsule, self.model.config, devices, self.model.dtype, reread)
            return again, path.stat().st_size, wrote - start, time.perf_counter() - wrote

    def full(self, latents: torch.Tensor, thw: torch.Tensor) -> DynamicCache:
        """The full cache of latents `[T, R]`, keys turned to positions `[3, T]`; text is read anew."""
        payload, places = packed(latents, self.codec), TokenPositions(thw)
        text = read_text(self.model, self.capsule.codecs, self.layout, self.ids, payload, places)
        vision = torch.zeros(self.layout.length, dtype=torch.bool)
        for block in self.layout.rows[0].blocks:
            vision[block.start : block.end] = True
        cache = DynamicCache(config=self.model.config)
        for index, codec in self.capsule.codecs.items():
            parts = []
            for own, known in zip(
                text[index], codec.decode_at(payload, places, own_dtype(text)), strict=True
            ):
                whole = own.new_empty(1, self.layout.length, *own.shape[1:])
                whole[:, vision], whole[:, ~vision] = known[:, :, 0], own
                parts.append(whole.transpose(1, 2))
            cache.update(*parts, index)
        return cache


def own_dtype(text: dict[int, torch.Tensor]) -> torch.dtype:
    """Of the numbers of text."""
    return next(iter(text.values())).dtype


def alone(prompt: Prompt, processor: Any, item: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of each picture read by itself, and the positions that it had then; from at rest."""
    latents, places = [], []
    for image in item.images:
        single = type(item)(item.name, (image,), item.asks)
        head, _ = split_questions(prompt.model, processor, single, [item.asks[0].question])
        with enable(prompt.model, capsule=prompt.capsule) as fast:
            z = open_latents(fast.encapsulate(**head), prompt.codec)
        layout = build_layout(head, prompt.model.config)
        piece = code(z, prompt.codec.lost, STORED)
        latents.append(decode(piece, len(z), prompt.codec.levels.rank))
        own = rope_positions(layout, prompt.model.config)
        places += [own[:, 0, b.start : b.end] for b in layout.rows[0].blocks]
    return torch.cat(latents), torch.cat(places, 1)


@contextmanager
def coarse_tower(model: Any, bits: int) -> Iterator[list[int]]:
    """Inside the block the vision tower's output has so many bits a number; gives the bytes."""
    spent = [0]
    inner = model.model

    def rounded(x: torch.Tensor) -> torch.Tensor:
        top = 2 ** (bits - 1) - 1
        scale = (x.abs().amax(-1, keepdim=True) / top).clamp_min(1e-12)
        spent[0] += x.shape[:-1].numel() * (x.shape[-1] * bits / 8 + 2)
        return (x / scale).round().clamp(-top, top) * scale

    original = inner.get_image_features

    @wraps(original)
    def features(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        if isinstance(out, torch.Tensor):
            return rounded(out)
        pooled = out.pooler_output
        out.pooler_output = (
            rounded(pooled) if isinstance(pooled, torch.Tensor) else tuple(map(rounded, pooled))
        )
        return out

    inner.get_image_features = features
    try:
        yield spent
    finally:
        del inner.get_image_features


def judged(
    name: str, items: list[Any], model: Any, processor: Any, capsule: KVCapsule, qualities: list[float]
) -> Any:
    """Right answers and bytes of every row on one judge."""
    rows: dict[str, dict[str, Any]] = {}
    times = {"prefill": 0.0, "write": 0.0, "read": 0.0}
    images = 0
    vision = 0
    per_token = joint_codec(capsule).full_nbytes
    shared = round(SHARE * vision_tokens_an_image(processor, model, items[0]))
    small = {quality: for_rest(capsule, quality, shared) for quality in qualities}
    modules = {f"rest {quality:g}": file_nbytes(own) for quality, own in small.items()}

    def count(label: str, item: Any, texts: list[str], nbytes: float) -> None:
        row = rows.setdefault(label, {"right": [], "bytes": 0.0})
        row["right"] += [
            t.lower() in [r.lower() for r in a.references] for t, a in zip(texts, item.asks, strict=True)
        ]
        row["bytes"] += nbytes

    with enable(model, capsule=capsule), torch.no_grad():
        for at, item in enumerate(items):
            start = time.perf_counter()
            asking = Asking(model, processor, {"joint": capsule}, max_new_tokens=LONGEST_ANSWER)
            prompt = Prompt(asking, item, capsule)
            times["prefill"] += time.perf_counter() - start
            images += len(item.images)
            vision += prompt.layout.vision_tokens
            count("full", item, prompt.said(prompt._prefill.cache(None)), prompt.layout.length * per_token)
            held = prompt.joint(capsule)
            nbytes = held.nbytes
            count("joint", item, prompt.said(held), nbytes)
            for quality in qualities:
                cache, nbytes, wrote, read = prompt.rest(quality, small[quality])
                times["write"] += wrote / len(qualities)
                times["read"] += read / len(qualities)
                count(f"rest {quality:g}", item, prompt.said(cache), nbytes)
            if len(item.images) > 1:
                z, old = alone(prompt, processor, item)
                new = rope_positions(prompt.layout, model.config)[:, 0]
                new = torch.cat([new[:, b.start : b.end] for b in prompt.layout.rows[0].blocks], 1)
                for label, thw in (("anywhere", new), ("concatenated", old)):
                    count(label, item, prompt.said(prompt.full(z, thw)), 0)
                own = rows.setdefault("full, several pictures", {"right": [], "bytes": 0.0})
                own["right"] += rows["full"]["right"][-len(item.asks) :]
            for bits in (4, 3):
                with coarse_tower(model, bits) as spent:
                    other = Prompt(asking, item, capsule)
                other._drafts = prompt._drafts
                count(f"tower-int{bits}", item, other.said(other._prefill.cache(None)), spent[0])
            print(
                name,
                at,
                {k: round(100 * sum(r["right"]) / len(r["right"]), 1) for k, r in rows.items()},
                flush=True,
            )
    return {
        "images": images,
        "vision_tokens": vision,
        "vision_bytes": vision * per_token,
        "milliseconds_an_image": {k: round(1000 * v / images, 2) for k, v in times.items()},
        "module_bytes": file_nbytes(capsule),
        "rows": {
            k: {
                "questions": len(r["right"]),
                "exact_match": round(100 * sum(r["right"]) / len(r["right"]), 2),
                "bytes": round(r["bytes"]),
                "share_of_vision_bytes": round(r["bytes"] / (vision * per_token), 5),
                "module_bytes": modules.get(k, 0),
                "share_of_100_images": round(
                    (r["bytes"] / images + modules.get(k, 0) / SHARE) / (vision * per_token / images), 5
                ),
            }
            for k, r in rows.items()
        },
    }


def vision_tokens_an_image(processor: Any, model: Any, item: Any) -> float:
    """Of a prompt."""
    inputs = process(processor, item, [item.asks[0].question])
    return build_layout(inputs, model.config).vision_tokens / len(item.images)


def file_nbytes(capsule: KVCapsule) -> int:
    """Bytes of the tensors in a capsule's file."""
    first = min(capsule.codecs)
    return sum(
        x.nbytes
        for index, codec in capsule.whole_codecs().items()
        for name, x in codec.learnt().items()
        if index == first or name not in codec.shared
    )


def fitted(name: str, source: Source, folder: Path | None) -> KVCapsule:
    """The joint capsule of a judge; fitted, unless it is shipped or lies in a folder."""
    if name == REFERENCE:
        return KVCapsule.from_pretrained(REFERENCE)
    if folder is not None and (folder / name).is_dir():
        return KVCapsule.from_pretrained(folder / name)
    capsule = KVCapsule.fit(source.model, source.processor, source.samples, progress=False)
    if folder is not None:
        capsule.save_pretrained(folder / name)
    return capsule


def main(
    judge: Annotated[list[str], typer.Option(help="reference, mosaic, tiles...; repeat for several.")],
    quality: Annotated[str, typer.Option(help="Qualities, comma-separated.")] = "0.99,0.98,0.97,0.95",
    pictures: Annotated[str, typer.Option(help="Pictures of a prompt, comma-separated.")] = "1,2,4",
    prompts: Annotated[int, typer.Option(help="Prompts of each number of pictures.")] = 6,
    split: Annotated[str, typer.Option(help="dev or test.")] = "test",
    capsules: Annotated[Path | None, typer.Option(help="Folder that keeps fitted capsules.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write all figures here.")] = None,
) -> None:
    """Ask and write JSON."""
    torch.set_num_threads(1)
    counts, qualities = [int(x) for x in pictures.split(",")], [float(x) for x in quality.split(",")]
    found = {}
    for name in judge:
        source = load_source(name, torch.bfloat16)
        items = [item for n in counts for item in source.items(split, n, prompts)]
        capsule = fitted(name, source, capsules)
        found[name] = judged(name, items, source.model, source.processor, capsule, qualities)
        Console().print(found[name])
    write_json(
        json, {"split": split, "prompts": prompts, "pictures": counts, "judges": found, "machine": machine()}
    )


if __name__ == "__main__":
    typer.run(main)
