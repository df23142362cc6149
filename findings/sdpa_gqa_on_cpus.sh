#!/usr/bin/env bash
# On CPUs `scaled_dot_product_attention(..., enable_gqa=True)` reads the keys of a KV head once for each of its query
# heads. A decode step with 28 query heads and 4 KV heads takes two to four times as long as the same call with the
# query heads of a KV head as its rows (`query.view(1, 4, 7, 128)`: one new token sees all keys, so no mask is needed).
# One would guess that the flag is there to spare just that. It spares memory: nothing is repeated.
# Seen with torch 2.13.0, one thread, 8,448 tokens, medians of 15 calls that take turns; an Intel Xeon with AMX that
# others used, so times differ from run to run, the ratio less:
#   bfloat16: enable_gqa 6.7 ms, as rows 2.6 ms, 2.5 times; apart 6e-05
#   float32: enable_gqa 10.9 ms, as rows 3.3 ms, 3.3 times; apart 2e-07
# Exits with 1 when one of them is less than 1.5 times as long, or outputs differ by more than rounding.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
cat > "$work/run.py" <<'PY'
import statistics
import time

import torch
from torch.nn.functional import scaled_dot_product_attention

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
changed = False
for dtype in (torch.bfloat16, torch.float32):
    query, keys, values = (
        torch.randn(1, heads, tokens, 128, generator=generator).to(dtype)
        for heads, tokens in ((28, 1), (4, 8448), (4, 8448))
    )
    calls = {
        "enable_gqa": lambda: scaled_dot_product_attention(query, keys, values, enable_gqa=True),
        "as rows": lambda: scaled_dot_product_attention(query.view(1, 4, 7, 128), keys, values).view(query.shape),
    }
    times = {name: [] for name in calls}
    for _ in range(15):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - began)
    flag, rows = (statistics.median(x) for x in times.values())
    apart = (calls["enable_gqa"]().float() - calls["as rows"]().float()).abs().max().item()
    print(f"{str(dtype)[6:]}: enable_gqa {flag * 1e3:.1f} ms, as rows {rows * 1e3:.1f} ms, {flag / rows:.1f} times; apart {apart:.0e}")
    changed |= flag < 1.5 * rows or apart > 1e-2
raise SystemExit(changed)
PY
"$work/venv/bin/python" "$work/run.py"
