#!/usr/bin/env bash
# Check on a GPU that the project is right, and how fast it is, in a few minutes and without a network:
#     benchmarks/gpu/check.sh [--budget SECONDS] [--parts right speed profile study] [--output FOLDER]
#     benchmarks/gpu/check.sh --device cpu --tiny --budget 120          # a rehearsal
# Packages that are missing are taken from benchmarks/gpu/wheels, which benchmarks/gpu/wheels.sh makes.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
if compgen -G 'benchmarks/gpu/wheels/*.whl' >/dev/null && ! "$python" -c 'import datasets, jsonargparse, omegaconf' 2>/dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" benchmarks/gpu/wheels/*.whl
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
"$python" -m benchmarks.gpu "$@"
