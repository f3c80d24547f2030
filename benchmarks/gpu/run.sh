#!/usr/bin/env bash
# All that has to be seen and measured on a card, in one command: the GPU tests, then the tables of docs/gpu.md.
#
#   OUT=out/gpu bash benchmarks/gpu/run.sh                       # at most 8 minutes
#   OUT=out/gpu bash benchmarks/gpu/run.sh --quick               # at most 2
#   OUT=out/gpu bash benchmarks/gpu/run.sh --device cpu --tiny   # whether the script itself works
#
# Needs torch (CUDA), numpy, tokenizers, safetensors and transformers; what else is missing is left out by name.
# Writes $OUT/results.json, report.md, tests.txt and log.txt, after each part anew.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OUT="${OUT:-out/gpu}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$OUT"
exec "${PYTHON:-python3}" benchmarks/gpu/run.py "$@"
