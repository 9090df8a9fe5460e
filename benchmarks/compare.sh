#!/usr/bin/env bash
# What a change did to the speed: this tree against another commit, in alternation, generation and training.
#
#   benchmarks/compare.sh COMMIT                            on the recipes' tiny Llama (training: a random one)
#   benchmarks/compare.sh COMMIT MODEL_FOLDER ROWS.jsonl    on a real model and its own training rows
set -euo pipefail
cd "$(dirname "$0")/.."
commit=${1:?a commit to compare with} model=${2:-} rows=${3:-}
python=${PYTHON:-.venv/bin/python}
tree=$(mktemp -d)/before
git worktree add --quiet --detach "$tree" "$commit"
trap 'git worktree remove --force "$tree"' EXIT
export OMP_WAIT_POLICY=passive TOKENIZERS_PARALLELISM=false
"$python" benchmarks/decode.py --before "$tree" --model "${model:-recipes/tiny/assets/llama}"
"$python" benchmarks/train.py --before "$tree" --rounds 3 ${model:+--model "$model"} ${rows:+--data "$rows"}
