#!/usr/bin/env bash
# In torch 2.13 `torch.compiler.is_compiling()` is true in every thread while one of them compiles, not in that one
# alone: the flag belongs to the process. Code that branches on it, to hand a tracer something that only a tracer may
# see, does so in an eager call of another thread, such as a second request of a server whose first one compiles.
# `torch.compiler.is_dynamo_compiling()` is false there.
# Seen with torch 2.13.0; output, of a thread that compiles nothing:
#   before: is_compiling False, is_dynamo_compiling False
#   while another thread compiles: is_compiling True, is_dynamo_compiling False
# Exits with 1 when that has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
cat > "$work/run.py" <<'PY'
import threading

import torch

compiling, asked = threading.Event(), threading.Event()


def backend(graph, example_inputs):
    compiling.set()
    asked.wait(60)
    return graph.forward


def state():
    return torch.compiler.is_compiling(), torch.compiler.is_dynamo_compiling()


before = state()
worker = threading.Thread(target=torch.compile(lambda x: x + 1, backend=backend), args=(torch.ones(2),))
worker.start()
assert compiling.wait(60)
during = state()
asked.set()
worker.join()
for when, (any_thread, here) in (("before", before), ("while another thread compiles", during)):
    print(f"{when}: is_compiling {any_thread}, is_dynamo_compiling {here}")
raise SystemExit((before, during) != ((False, False), (True, False)))
PY
"$work/venv/bin/python" "$work/run.py"
