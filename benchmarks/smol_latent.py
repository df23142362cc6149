"""How many numbers a vision token's KV needs: rank of the keys and values of all layers taken together.

    python benchmarks/smol_latent.py [--data DATA] [--weights WEIGHTS] [--frozen] [--out FILE]

On capsight-smol (SmolLM2-135M-Instruct with a small tower; `tools/judging/smol`). A token's keys before RoPE
and its values, of all layers and KV heads, are 30 x 2 x 3 x 64 = 11,520 numbers. A PCA is fitted on the image
tokens of calibration prompts and measured on those of test prompts:

* the share of variance (about the calibration mean) that R components keep, in all and of each layer's keys
  and values; plain, and with every layer's keys and values scaled to equal variance first;
* the same for English prose read by the same language model: what is the model's and what the tower's;
* next-token agreement and KL divergence with the full cache on the answers to questions about the images,
  when the images' KV is replaced by its rank-R reconstruction, beside keeping every n-th vision token only.
"""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any

import torch
import typer
from smol_tokens import Packer, joint, prefix_of, recording
from torch import Tensor
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from capsight.cli.output import write_json
from judging.smol.loader import load_smol, smol_prompt
from judging.smol.registry import DATA, WEIGHTS

RANKS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
KEPT = (0.4, 0.2, 0.1)
HERE = Path(__file__).resolve().parent


class Pca:
    """Principal components of rows [N, D], fitted through their N x N inner products."""

    def __init__(self, rows: Tensor, width: int, even: bool) -> None:
        """Fit; with `even`, blocks of `width` columns (keys or values of a layer) get equal variance."""
        self.mean, self.width = rows.mean(0), width
        centred = rows - self.mean
        blocks = centred.unflatten(1, (-1, width)).pow(2).mean((0, 2)).sqrt()
        self.block = blocks if even else torch.ones_like(blocks)
        self.scale = self.block.repeat_interleave(width)
        centred = centred / self.scale
        values, vectors = torch.linalg.eigh(centred @ centred.T)
        top = vectors.flip(1)[:, : max(RANKS)]
        self.basis = (centred.T @ top) / values.flip(0)[: max(RANKS)].clamp_min(1e-6).sqrt()  # [D, R]

    def rebuild(self, rows: Tensor, rank: int) -> Tensor:
        """The rows from `rank` numbers each."""
        basis = self.basis[:, :rank]
        return (((rows - self.mean) / self.scale) @ basis @ basis.T) * self.scale + self.mean

    def shares(self, rows: Tensor) -> dict[str, dict[str, float]]:
        """Share of variance kept at each rank: in all, and in the layer that keeps least."""
        found = {}
        latent = ((rows - self.mean) / self.scale) @ self.basis
        total = (rows - self.mean).pow(2).unflatten(1, (-1, self.width)).sum((0, 2))
        for rank in RANKS:
            rebuilt = (latent[:, :rank] @ self.basis[:, :rank].T) * self.scale + self.mean
            left = (rows - rebuilt).pow(2).unflatten(1, (-1, self.width)).sum((0, 2))
            kept = 1 - left / total
            even = 1 - (left / self.block**2).sum() / (total / self.block**2).sum()
            found[str(rank)] = {
                "in all": 1 - (left.sum() / total.sum()).item(),
                "in all, as scaled": even.item(),
                "keys, mean of layers": kept[::2].mean().item(),
                "keys, worst layer": kept[::2].min().item(),
                "worst keys at layer": int(kept[::2].argmin()),
                "values, mean of layers": kept[1::2].mean().item(),
                "values, worst layer": kept[1::2].min().item(),
                "worst values at layer": int(kept[1::2].argmin()),
            }
        return found


@torch.no_grad()
def image_rows(model: Any, packer: Packer, split: str, prompts: int, images: int, data: Path) -> Tensor:
    """[tokens, D] of the image tokens of prompts."""
    rows = []
    with recording(model.model.text_model) as heard:
        for index in range(prompts):
            embeds, seen = prefix_of(model, packer, smol_prompt(split, index, images, 1, data))
            model.model.text_model(inputs_embeds=embeds, use_cache=False)
            rows.append(joint(heard, seen))
    return torch.cat(rows)


@torch.no_grad()
def text_rows(model: Any, tokenizer: Any, tokens: int) -> tuple[Tensor, Tensor]:
    """[tokens, D] twice: tokens of Python's own help texts, other pages for fitting than for measuring."""
    pages = sorted(topics.values(), key=len, reverse=True)[:40]
    length, halves = 320, []
    for half in (pages[::2], pages[1::2]):
        rows: list[Tensor] = []
        with recording(model.model.text_model) as heard:
            for page in half:
                ids = tokenizer(page, return_tensors="pt", add_special_tokens=False).input_ids[:, :length]
                model.model.text_model(input_ids=ids, use_cache=False)
                rows.append(joint(heard, torch.arange(ids.shape[1]) >= 16))
                if sum(map(len, rows)) >= tokens:
                    break
        halves.append(torch.cat(rows)[:tokens])
    return halves[0], halves[1]


class Replayed:
    """One prompt's full cache and the questions asked of it, each hidden from the others."""

    @torch.no_grad()
    def __init__(self, model: Any, packer: Packer, index: int, images: int, data: Path) -> None:
        """Read the images once."""
        self.model = model
        prompt = smol_prompt("test", index, images, 12, data)
        embeds, self.seen = prefix_of(model, packer, prompt)
        self.packed = packer([prompt])
        self.prefix = embeds.shape[1]
        with recording(model.model.text_model) as heard:
            cache = model.model.text_model(inputs_embeds=embeds, use_cache=True).past_key_values
            self.rows = joint(heard, self.seen)
        self.keys, self.values = [x.keys for x in cache.layers], [x.values for x in cache.layers]
        self.angles = model.model.text_model.rotary_emb(embeds, torch.arange(self.prefix)[None])

    @torch.no_grad()
    def logits(self, rows: Tensor | None = None, keep: float = 1.0) -> Tensor:
        """[N, vocabulary] at the answers, after other KV for the image tokens, or some of them dropped."""
        cache, n = DynamicCache(), self.prefix
        each = None if rows is None else rows.unflatten(1, (len(self.keys), 2, 3, 64))
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            key, value = key.clone(), value.clone()
            if each is not None:
                cos, sin = (a[:, self.seen] for a in self.angles)
                plain = each[:, layer, 0].transpose(0, 1)[None].to(key.dtype)  # [1, KV heads, tokens, 64]
                key[:, :, self.seen] = apply_rotary_pos_emb(plain, plain, cos, sin)[1].to(key.dtype)
                value[:, :, self.seen] = each[:, layer, 1].transpose(0, 1)[None].to(value.dtype)
            cache.update(key, value, layer)
        mask = self.packed.mask[:, :, n:].clone()
        places = self.seen.nonzero()[:, 0]
        wanted = torch.linspace(0, len(places) - 1, round(keep * len(places))).round().long()
        dropped = torch.ones(len(places), dtype=torch.bool).index_fill(0, wanted, False)
        mask[..., places[dropped]] = False
        hidden = self.model.model.text_model(
            input_ids=self.packed.input_ids[:, n:],
            position_ids=self.packed.position_ids[:, n:],
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        out: Tensor = self.model.lm_head(hidden[0, self.packed.at - n]).float()
        return out


def against(full: Tensor, other: Tensor, packed: Any) -> dict[str, list[float]]:
    """Agreement of the most likely token, KL divergence, and whether the whole answer is right."""
    a, b = full.log_softmax(-1), other.log_softmax(-1)
    miss = (other.argmax(-1) != packed.target).float()
    right = torch.bincount(packed.question, miss) == 0
    return {
        "agreement": (full.argmax(-1) == other.argmax(-1)).float().tolist(),
        "kl": (a.exp() * (a - b)).sum(-1).tolist(),
        "right": right.float().tolist(),
    }


def main(
    data: Annotated[Path, typer.Option(help="Folder of what the judge is made of.")] = DATA,
    weights: Annotated[Path, typer.Option(help="Folder of the judge's weights.")] = WEIGHTS,
    frozen: Annotated[bool, typer.Option(help="SmolLM2 without the low-rank additions.")] = False,
    fit: Annotated[int, typer.Option(help="Calibration prompts.")] = 12,
    test: Annotated[int, typer.Option(help="Test prompts.")] = 5,
    images: Annotated[int, typer.Option(help="Images of each prompt.")] = 4,
    out: Annotated[Path, typer.Option(help="Where to write.")] = HERE / "results" / "smol_latent.json",
) -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, processor = load_smol(
        torch.bfloat16, data, weights, additions="" if frozen else "lora.safetensors"
    )
    packer, width = Packer(processor.tokenizer), 3 * 64
    rows = image_rows(model, packer, "calibration", fit, images, data)
    replayed = [Replayed(model, packer, i, images, data) for i in range(test)]
    tested = torch.cat([r.rows for r in replayed])
    text, other_text = text_rows(model, processor.tokenizer, len(rows))
    pcas = {"plain": Pca(rows, width, False), "equal layers": Pca(rows, width, True)}
    result: dict[str, Any] = {
        "numbers a token": rows.shape[1], "calibration tokens": len(rows), "test tokens": len(tested),
        "prompts": {"calibration": fit, "test": test, "images": images}, "adapted": not frozen,
        "images": {name: pca.shares(tested) for name, pca in pcas.items()},
        "images, calibration itself": {name: pca.shares(rows) for name, pca in pcas.items()},
        "text": {"equal layers": Pca(text, width, True).shares(other_text), "tokens": len(text)},
    }  # fmt: skip
    ways: dict[str, dict[str, Any]] = {"full": {}, "full, taken apart and put together": {"pca": None}}
    ways |= {f"keep {share:.0%}": {"keep": share} for share in KEPT} | {"no image": {"keep": 0.0}}
    ways |= {
        f"{n}, rank {r}": {"pca": p, "rank": r} for n, p in pcas.items() for r in RANKS if r in RANKS[::2]
    }
    replay: dict[str, dict[str, list[float]]] = {}
    for one in replayed:
        full = one.logits()
        for name, way in ways.items():
            rebuilt = one.rows if "pca" in way else None
            if way.get("pca"):
                rebuilt = way["pca"].rebuild(one.rows, way["rank"])
            for k, v in against(full, one.logits(rebuilt, way.get("keep", 1.0)), one.packed).items():
                replay.setdefault(name, {}).setdefault(k, []).extend(v)
        print(one.rows.shape, flush=True)
    result["replay"] = {n: {k: sum(v) / len(v) for k, v in found.items()} for n, found in replay.items()}
    result["replay, answer tokens"] = len(next(iter(replay.values()))["kl"])
    write_json(out, result)
    print(json.dumps(result["replay"], indent=1))


if __name__ == "__main__":
    typer.run(main)
