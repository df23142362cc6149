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
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from capsight import KVCapsule, enable
from capsight.cli.output import machine, write_json
from capsight.evaluation.prompting import process
from capsight.evaluation.sharing import Asking
from capsight.kvcapsule.rest import for_rest
from capsight.kvcapsule.rest.parts import joint_codec
from capsight.layout import build_layout
from capsight.layout.positions import rope_positions

sys.path.insert(0, str(Path(__file__).resolve().parent))
from at_rest_asked import Prompt, alone, coarse_tower
from judges import LONGEST_ANSWER
from judges_known import REFERENCE, Source, load_source

SHARE = 100
"""Images that share the file of a capsule."""


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
