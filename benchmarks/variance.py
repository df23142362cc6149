"""How much of a vision token's keys and values R shared coordinates keep, on every judge.

    python benchmarks/variance.py --judge reference --judge mosaic --judge tiles

A joint capsule is fitted to half of the calibration prompts and looks at the other half; keys and values are
weighted as in the codec. Writes `benchmarks/results/variance.json`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from judges_known import load_source

from capsight.cli.output import write_json
from capsight.evaluation.prefill import Prefill
from capsight.kvcapsule import KVCapsule
from capsight.kvcapsule.cache import full_attention_layers
from capsight.kvcapsule.calibration.joint_fit import token_vectors
from capsight.kvcapsule.codecs.joint_axes import numbers
from capsight.layout import build_layout
from capsight.layout.positions import rope_positions
from capsight.runtime import enable

RESULTS = Path(__file__).resolve().parent / "results"
RANKS = (8, 16, 32, 64, 96, 128, 192, 256)


@torch.no_grad()
def curve(judge: str) -> dict[str, Any]:
    """Shares of the variance of unseen calibration tokens that the first R coordinates keep."""
    source = load_source(judge, torch.float32)
    seen, unseen = source.samples[::2], source.samples[1::2]
    capsule = KVCapsule.fit(source.model, None, seen, codec="joint", progress=False)
    layers = list(full_attention_layers(source.model.config))
    codecs = [capsule.codecs[layer] for layer in layers]
    learnt = [codec.whole() for codec in codecs]
    axes = torch.cat([numbers(own["axes"], own["steps"], torch.float32).flatten(1) for own in learnt], 1)
    mean = torch.cat([c.mean.flatten() for c in codecs])
    size = codecs[0].mean[0].numel()
    weight = torch.cat([c.weight.repeat_interleave(size) for c in codecs])
    total, kept, tokens = 0.0, torch.zeros(len(axes), dtype=torch.float64), 0
    with enable(source.model):
        for inputs in unseen:
            layout = build_layout(inputs, source.model.config)
            prefill = Prefill.record(source.model, inputs, None, False)
            cache = prefill.cache(None)
            places = torch.cat([torch.arange(b.start, b.end) for b in layout.rows[0].blocks])
            states = {
                layer: tuple(x[0, :, places].transpose(0, 1) for x in (held.keys, held.values))
                for layer, held in enumerate(cache.layers)
                if layer in layers
            }
            positions = rope_positions(layout, source.model.config)[:, 0, places]
            x = (token_vectors(states, codecs[0].rotary, positions) - mean) * weight
            kept += ((x * weight) @ axes.T).double().square().sum(0)
            total += float(x.double().square().sum())
            tokens += len(x)
    shares = (kept.cumsum(0) / total).tolist()
    return {
        "numbers": axes.shape[1],
        "tokens": tokens,
        "kept": {str(rank): round(shares[rank - 1], 5) for rank in RANKS if rank <= len(shares)},
    }


def main(
    judge: Annotated[list[str], typer.Option(help="reference, mosaic, tiles...; repeat for several.")],
    json: Annotated[Path, typer.Option(help="Where to write the figures.")] = RESULTS / "variance.json",
) -> None:
    """Fit, look and write."""
    torch.set_num_threads(1)
    values = {name: curve(name) for name in judge}
    print(values)
    write_json(json, {"judges": values})


if __name__ == "__main__":
    typer.run(main)
