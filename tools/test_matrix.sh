#!/usr/bin/env bash
# Runs the tests at both ends of the supported range of torch and transformers, each in a venv of its own.
# It downloads both and takes long, so CI leaves it out:  make test-matrix
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

# "torch>=2.11" and "transformers>=5.17.0,<6" of pyproject.toml; their lower ends.
mapfile -t range < <(sed -nE 's/^ *"((torch|transformers)>=[^"]*)".*/\1/p' pyproject.toml)
mapfile -t oldest < <(printf '%s\n' "${range[@]}" | sed -E 's/>=([^,]+).*/==\1.*/; s/(==[0-9]+\.[0-9]+\.[0-9]+)\.\*/\1/')

failed=()
try() { # name requirement...
    local venv=.venv-$1 name=$1
    shift
    test -x "$venv/bin/python" || "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade "$@"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@" --editable ".[quanto]" \
        pytest pytest-xdist hypothesis
    echo "== $name: $("$venv/bin/python" -m pip freeze | grep -E '^(torch|transformers)==' | paste -sd' ')"
    OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -n auto --dist worksteal || failed+=("$name")
}

try oldest "${oldest[@]}"
try newest "${range[@]}"
test ${#failed[@]} -eq 0 || { echo "failed: ${failed[*]}"; exit 1; }
