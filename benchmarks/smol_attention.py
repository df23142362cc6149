"""Sinks, massive activations and cross-image attention of capsight-smol, whose language model is pretrained.

    python benchmarks/smol_attention.py [--data DATA] [--weights WEIGHTS] [--frozen] [--out FILE]

Means over test prompts of several images, of the attention weights of every head: where rows of image tokens
look (the first token, their own image, other images, delimiters of either, other text), where rows of the
question look, and which tokens hold the largest activations of the residual stream.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from smol_tokens import Packer, prefix_of
from torch import Tensor

from capsight.cli.output import write_json
from judging.smol.loader import load_smol, smol_prompt
from judging.smol.registry import DATA, WEIGHTS
from judging.smol.tower import FAKE, GLOBAL

HERE = Path(__file__).resolve().parent
GROUPS = ("first token", "own image", "other images", "own delimiters", "other delimiters", "other text")


def image_numbers(ids: Tensor, image: int, delimiters: list[int]) -> tuple[Tensor, Tensor]:
    """[S] the image a vision token lies in, and the one a delimiter belongs to; -1 elsewhere."""
    seen, fence = ids == image, torch.isin(ids, torch.tensor(delimiters))
    starts = seen & ~seen.roll(1)
    number = starts.long().cumsum(0) - 1
    opening = fence & (seen.roll(-1) | seen.roll(-2))
    return torch.where(seen, number, -1), torch.where(opening, number + 1, torch.where(fence, number, -1))


@torch.no_grad()
def measure(
    model: Any, packer: Packer, tokenizer: Any, index: int, images: int, data: Path
) -> dict[str, Any]:
    """Shares [layers, heads] of one prompt, and what holds the largest activations in every layer."""
    prompt = smol_prompt("test", index, images, 4, data)
    embeds, _ = prefix_of(model, packer, prompt)
    asked = tokenizer(prompt.questions[0].text, return_tensors="pt", add_special_tokens=False).input_ids
    inner = model.model.text_model
    embeds = torch.cat([embeds, inner.embed_tokens(asked)], 1)
    ids = torch.cat([torch.tensor(packer.prefix(images)), asked[0]])
    vision, fence = image_numbers(
        ids, model.config.image_token_id, tokenizer.convert_tokens_to_ids([FAKE, GLOBAL])
    )
    output = inner(inputs_embeds=embeds, output_attentions=True, output_hidden_states=True, use_cache=False)
    weights = torch.stack(output.attentions)[:, 0].float()  # [layers, heads, S, S]
    rows = vision >= 0
    own, other = (
        vision[rows][:, None] == vision[None],
        (vision >= 0)[None] & (vision[rows][:, None] != vision[None]),
    )
    own_fence = vision[rows][:, None] == fence[None]
    first = torch.zeros(len(ids), dtype=torch.bool)
    first[0] = True
    masks = {
        "first token": first[None].expand_as(own), "own image": own, "other images": other,
        "own delimiters": own_fence, "other delimiters": (fence >= 0)[None] & ~own_fence,
        "other text": ((vision < 0) & (fence < 0) & ~first)[None].expand_as(own),
    }  # fmt: skip
    later = rows & (vision >= images // 2)
    result: dict[str, Any] = {k: (weights[:, :, rows] * m).sum(-1).mean(-1) for k, m in masks.items()}
    result["other images, later images"] = (weights[:, :, later] * other[later[rows]]).sum(-1).mean(-1)
    result["question to images"] = weights[:, :, -asked.shape[1] :][..., rows].sum(-1).mean(-1)
    prefix = len(ids) - asked.shape[1]  # later tokens are seen by too few rows
    received = (weights.sum(-2) / torch.arange(len(ids), 0, -1)).mean(1)  # [layers, S]
    result["sinks"] = [
        _describe(ids, vision, fence, int(p), tokenizer) for p in received[:, 1 : prefix - 16].argmax(-1) + 1
    ]
    result["largest"] = []
    for hidden in output.hidden_states[:-1]:
        size = hidden[0].float().abs()
        position, dimension = divmod(int(size.argmax()), size.shape[1])
        rest = size[vision >= 0]
        result["largest"].append(
            {
                "over median": (size.max() / size.median()).item(), "dimension": dimension,
                "token": _describe(ids, vision, fence, position, tokenizer),
                "image tokens, over median": (rest.max() / rest.median()).item(),
            }
        )  # fmt: skip
    return result


def _describe(ids: Tensor, vision: Tensor, fence: Tensor, position: int, tokenizer: Any) -> str:
    if position == 0:
        return "first token"
    if vision[position] >= 0:
        return "image token" if position and vision[position - 1] >= 0 else "image's first token"
    return "delimiter" if fence[position] >= 0 else f"text {tokenizer.decode([int(ids[position])])!r}"


def main(
    data: Annotated[Path, typer.Option(help="Folder of what the judge is made of.")] = DATA,
    weights: Annotated[Path, typer.Option(help="Folder of the judge's weights.")] = WEIGHTS,
    frozen: Annotated[bool, typer.Option(help="SmolLM2 without the low-rank additions.")] = False,
    test: Annotated[int, typer.Option(help="Test prompts.")] = 6,
    images: Annotated[int, typer.Option(help="Images of each prompt.")] = 4,
    out: Annotated[Path, typer.Option(help="Where to write.")] = HERE / "results" / "smol_attention.json",
) -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    model, processor = load_smol(
        torch.bfloat16, data, weights, additions="" if frozen else "lora.safetensors"
    )
    model.model.text_model.set_attn_implementation("eager")
    packer = Packer(processor.tokenizer)
    found = [measure(model, packer, processor.tokenizer, i, images, data) for i in range(test)]
    shares = (*GROUPS, "other images, later images", "question to images")
    heads = {k: torch.stack([f[k] for f in found]).mean(0) for k in shares}
    result: dict[str, Any] = {"prompts": test, "images": images, "adapted": not frozen}
    result["mean of heads"] = {k: v.mean().item() for k, v in heads.items()}
    result["heads with more than half on the first token"] = int((heads["first token"] > 0.5).sum())
    crossing = heads["other images, later images"]
    result["heads by cross-image share"] = {
        f"over {t:.0%}": int((crossing > t).sum()) for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.3)
    }
    result["layers"] = [
        {k: round(v[layer].mean().item(), 4) for k, v in heads.items()}
        | {"second sink": Counter(f["sinks"][layer] for f in found).most_common(1)[0][0]}
        | {"largest activation": found[0]["largest"][layer]}
        for layer in range(len(crossing))
    ]
    result["heads"] = {k: [[round(x, 4) for x in row] for row in v.tolist()] for k, v in heads.items()}
    write_json(out, result)
    print(json.dumps({k: v for k, v in result.items() if k not in ("heads", "layers")}, indent=1))


if __name__ == "__main__":
    typer.run(main)
