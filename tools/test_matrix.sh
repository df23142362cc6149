#!/usr/bin/env bash
# Runs the tests on the oldest and the newest transformers that pyproject.toml allows, each in a venv of its own, with
# everything else as in constraints.txt (which is what `make test` runs on). Takes long, so CI leaves it out.
#   make test-matrix
#   tools/test_matrix.sh 5.20.0                     these releases
#   tools/test_matrix.sh 5.20.0 -- -k saved         what follows -- goes to pytest
#   TORCH="torch==2.11.*" tools/test_matrix.sh      another torch, which may be a large download
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
torch=${TORCH:-$(grep '^torch==' constraints.txt)}
export OMP_NUM_THREADS=1 KMP_BLOCKTIME=0 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

releases=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do releases+=("==$1"); shift; done
if [ $# -gt 0 ]; then shift; fi # what is left is pytest's

range=$(sed -nE 's/^ *"transformers(>=[^"]*)".*/\1/p' pyproject.toml) # ">=5.17.0,<6"
oldest=$(sed -E 's/>=([0-9]+\.[0-9]+).*/==\1.*/' <<<"$range")         # "==5.17.*"
if [ ${#releases[@]} -eq 0 ]; then releases=("$oldest" "$range"); fi

# A release of transformers has its own say about the hub's client.
pins=$(mktemp)
trap 'rm -f "$pins"' EXIT
grep -vE '^(torch|transformers|huggingface_hub|hf-xet)==' constraints.txt >"$pins"

failed=()
for release in "${releases[@]}"; do
    venv=.venv-transformers$(tr -c '0-9.\n' '_' <<<"$release")
    test -x "$venv/bin/python" || "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade -c "$pins" \
        "$torch" "transformers$release" --editable ".[quanto,rest]" pytest pytest-xdist hypothesis accelerate peft
    "$venv/bin/python" -m pip check
    what=$("$venv/bin/python" -m pip freeze | grep -E '^(torch|transformers)==' | paste -sd' ')
    echo "== $what"
    "$venv/bin/python" -m pytest -n auto --dist worksteal "$@" || failed+=("$what")
done
test ${#failed[@]} -eq 0 || { printf 'failed: %s\n' "${failed[@]}"; exit 1; }
