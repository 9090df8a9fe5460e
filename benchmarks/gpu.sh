#!/usr/bin/env bash
# LoRA and QLoRA at 8B and 9B shapes with random weights on one GPU: tokens/s, MFU, peak memory.
#   bash benchmarks/gpu.sh                                  about 20 GB of disk for the weights; writes results/gpu.md
#   bash benchmarks/gpu.sh --attention flash_attention_2    where flash-attn is installed
#   bash benchmarks/gpu.sh --small                          small shapes on the CPU; writes nothing
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=.venv/bin/python
[ -x "$PYTHON" ] || PYTHON=python3
exec "$PYTHON" benchmarks/gpu.py "$@"
