#!/usr/bin/env bash
# In transformers 5.17 beam search over a QuantizedCache reads other beams than it chose. `reorder_cache` moves the
# rows of the newest tokens, which are not quantised yet, and leaves those of all quantised ones where they were; no
# error, no warning. One would take `cache_implementation="quantized"` to change rounding alone. (5.23 moves both.)
# Seen with transformers 5.17.0, optimum-quanto 0.2.7 and torch 2.13.0 on a CPU; output:
#   two rows swapped: newest token True, quantised tokens False
#   four rows, all made row 3: rows read next are equal False
# Exits with 1 when that has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.17.0 optimum-quanto==0.2.7 ninja
cat > "$work/run.py" <<'PY'
import torch
from transformers import LlamaConfig, QuantizedCache

config = LlamaConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)


def filled(rows, seed=0):
    """A cache of 64 quantised tokens and one newest, and these."""
    cache, generator = QuantizedCache("quanto", config, nbits=4), torch.Generator().manual_seed(seed)
    for tokens in (64, 1):
        states = torch.randn(rows, 2, tokens, 32, generator=generator)
        cache.update(states, states, 0)
    return cache


def read(cache):
    """What attention is given of the tokens held."""
    rows = cache.layers[0].keys.shape[0]
    return cache.update(torch.zeros(rows, 2, 1, 32), torch.zeros(rows, 2, 1, 32), 0)[0][:, :, :65]


before = read(filled(2))
cache = filled(2)
cache.reorder_cache(torch.tensor([1, 0]))
after = read(cache)
newest = torch.equal(after[:, :, 64], before.flip(0)[:, :, 64])
quantised = torch.equal(after[:, :, :64], before.flip(0)[:, :, :64])
print(f"two rows swapped: newest token {newest}, quantised tokens {quantised}")
cache = filled(4)
cache.reorder_cache(torch.full((4,), 3))
rows = read(cache)
alike = bool((rows == rows[:1]).all())
print(f"four rows, all made row 3: rows read next are equal {alike}")
raise SystemExit((newest, quantised, alike) != (True, False, False))
PY
"$work/venv/bin/python" "$work/run.py"
