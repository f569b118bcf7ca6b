"""Largest difference between the outputs of a model and of its exports, for each architecture and engine.

::

    python -m benchmarks.engines onnx torch_export aoti

The models have random weights and few blocks. Each export is run at two sizes other than traced; the difference is
relative to the largest value of an output. Prints a row of the table in ``docs/interop.md`` per architecture.
"""

from __future__ import annotations

import sys
import tempfile

import torch

from lit_tokenformer.interop import export_engine
from lit_tokenformer.models import create_backbone, preset_config

MODELS: dict[str, dict[str, int]] = {
    "tokenformer_vit_tiny_patch16_224": {},
    "vit_tiny_patch16_224": {},
    "tokenformer_lm_tiny": {},
    "gpt2_tiny": {},
    "pythia_tiny": {},
    "llama_tiny": {"num_kv_heads": 2},
    "pangu_pi_tiny": {},
    "rwkv4_tiny": {},
    "hybrid_tiny": {},
    "bert_tiny": {},
    "mosaic_bert_tiny": {},
}
"""Preset and overrides of each model."""


def main(engines: list[str]) -> None:
    """Print the table for the engines."""
    print(f"| model | {' | '.join(engines)} |\n|---|{'---|' * len(engines)}", flush=True)
    for name, more in MODELS.items():
        row = []
        for engine in engines:
            torch.manual_seed(0)
            config = preset_config(name)
            text = {"vocab_size": 257, "context_length": 64} if config.stem == "token" else {"num_classes": 10}
            model = create_backbone(name, depth=config.pattern_length, **text, **more)
            for parameter in model.parameters():  # some are initially zero
                parameter.data += 0.05 * torch.randn_like(parameter)
            with tempfile.TemporaryDirectory() as folder:
                row.append(f"{export_engine(folder, model, engine):.0e}")
        print(f"| `{name}` | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["onnx", "torch_export", "aoti"])
