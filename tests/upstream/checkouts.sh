#!/bin/sh
# Check out the upstream test suites: tests/upstream/checkouts.sh FOLDER
set -eu
folder=${1:?usage: checkouts.sh FOLDER}
version() { python -c "from importlib.metadata import version; print(version('$1'))"; }
git clone --depth 1 --branch "v$(version timm)" https://github.com/huggingface/pytorch-image-models "$folder/timm"
git clone --depth 1 --branch "v$(version transformers)" https://github.com/huggingface/transformers "$folder/transformers"
