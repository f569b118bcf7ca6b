"""Peak memory of ``lit-tokenformer import`` for a model of 1.5 billion parameters, compared with its weights.

    python -m benchmarks.import_memory FOLDER [--dtype bfloat16] [--width 1600 --depth 48]

Writes a GPT-2 XL with random weights as transformers does, in shards of 1 GB, imports it in a process of its own, and
reports that process's peak resident memory. FOLDER needs twice the size of the weights and is left empty.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

IMPORT = """
import sys
from pathlib import Path
from lit_tokenformer.cli.commands import import_weights

def peak():  # of this program; getrusage would count its parent, which wrote the model
    return next(line.split()[1] for line in Path("/proc/self/status").open() if line.startswith("VmHWM"))

libraries = peak()
import_weights(sys.argv[1], sys.argv[2])
print(libraries, peak())
"""
"""Print the peak resident memory in KiB, before and after the import."""


def measure(folder: Path, dtype: str, width: int, depth: int) -> dict[str, float | str]:
    """Write and import a model; return sizes in GiB and the time of the import in seconds."""
    import transformers

    config = transformers.GPT2Config(n_embd=width, n_layer=depth, n_head=width // 64)
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(config)
    model.to(getattr(torch, dtype)).to_empty(device="cpu").tie_weights()
    noise = torch.randn(2**20) / width**0.5
    for parameter in model.parameters():  # the values do not matter; drawing all of them takes a minute
        flat = parameter.data.view(-1)
        flat.copy_(noise.repeat(len(flat) // len(noise) + 1)[: len(flat)])
    model.save_pretrained(folder / "source", max_shard_size="1GB")
    parameters = model.num_parameters()
    del model
    weights = sum(file.stat().st_size for file in (folder / "source").glob("*.safetensors"))
    start = time.perf_counter()
    command = [sys.executable, "-c", IMPORT, str(folder / "source"), str(folder / "base.ckpt")]
    *_, last = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    libraries, peak = (int(number) * 1024 / 2**30 for number in last.split())
    return {
        "parameters": parameters,
        "dtype": dtype,
        "weights_gib": weights / 2**30,
        "libraries_gib": libraries,
        "peak_gib": peak,
        "above_weights_gib": peak - weights / 2**30,
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--width", type=int, default=1600)
    parser.add_argument("--depth", type=int, default=48)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        print(json.dumps(measure(Path(folder), given.dtype, given.width, given.depth), indent=1))


if __name__ == "__main__":
    main()
