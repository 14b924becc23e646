#!/usr/bin/env bash
# benchmarks/on_gpu.sh [option...]: tests and measures on this machine's GPU; needs torch, pytest and nvcc, no network.
# The options are those of `python -m benchmarks.on_gpu`, which says what it does. PYTHON names the Python with torch.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHONPATH=$root:$root/python${PYTHONPATH:+:$PYTHONPATH} exec "${PYTHON:-python}" -m benchmarks.on_gpu "$@"
