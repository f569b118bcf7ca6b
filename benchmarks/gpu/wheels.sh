#!/usr/bin/env bash
# Download what a GPU machine without a network lacks, as wheels for CPython 3.12 on x86-64 Linux:
#     benchmarks/gpu/wheels.sh [FOLDER]        # default: benchmarks/gpu/wheels, which git ignores
# PyTorch, Lightning, timm, transformers, torchmetrics and what they need are expected on that machine.
set -euo pipefail
folder=${1:-$(dirname "$0")/wheels}
wanted="datasets dill multiprocess pandas python_dateutil tzdata six xxhash
    jsonargparse docstring_parser typeshed_client importlib_resources omegaconf"
resolved=$(mktemp -d)
trap 'rm -rf "$resolved"' EXIT
target=(--python-version 3.12 --implementation cp --only-binary=:all:)
for glibc in 2_28 2_27 2_24 2_17 2_14 2_12; do target+=(--platform "manylinux_${glibc}_x86_64"); done
target+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
python3 -m pip download --quiet --dest "$resolved" "${target[@]}" \
    'datasets>=3.0' 'jsonargparse[signatures,omegaconf]>=4.40,<5' 'omegaconf>=2.3'
mkdir -p "$folder"
rm -f "$folder"/*.whl
for name in $wanted; do cp "$resolved/$name"-*.whl "$folder" 2>/dev/null || true; done  # not every release needs each
du -ch "$folder"/*.whl
