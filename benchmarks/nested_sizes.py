"""Compare one fit of nested sizes with fits of each size alone, and count the calls of the model with a draft.

Each seed trains the whole model without nesting, the whole model with :class:`~callbacks.NestedSizes`, and each smaller
size alone, for the same number of steps on Python's standard library (bytes). The whole model is nested
twice: with one nested size per step in turn, and with both. In the first fit a nested size takes part in one of two
steps, so the smaller sizes are also trained alone for as many. With ``--base_steps``, the whole models continue from
the same trained weights, and the smaller ones train as long in total. The draft is a nested size of the whole model.
``docs/nested_sizes.md`` has the figures.

    python -m benchmarks.nested_sizes [--steps 4500] [--distill 0] [--output nested_sizes.json]
    python -m benchmarks.nested_sizes --base_steps 3000 --steps 1500 --distill 1
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything

from callbacks import NestedSizes
from lit_tokenformer.cost import model_cost
from lit_tokenformer.data import TextDataModule, Tokenizer
from lit_tokenformer.growth import prefix
from lit_tokenformer.inference.text import TextGenerator
from lit_tokenformer.tasks import LitCausalLM, LRSchedule

SIZES = (0.25, 0.5)
DRAFT_LENGTH = 4


def build_task(tokens: int, smoke: bool) -> LitCausalLM:
    """Build a language model over bytes with ``tokens`` parameter tokens in the query, key and value projections."""
    sizes = {"dim": 16 if smoke else 32, "depth": 1 if smoke else 2, "num_heads": 2, "param_tokens": tokens}
    return LitCausalLM(
        "tokenformer_lm_tiny",
        vocab_size=257,
        context_length=128,
        separator_id=256,
        overrides={**sizes, "rotary_fraction": 0.5},  # type: ignore[arg-type]
        optimizer=partial(torch.optim.AdamW, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1),
        schedule=LRSchedule("cosine", warmup=0.1, min_factor=0.1, unit="share"),
    )


def train(task: LitCausalLM, steps: int, seed: int, nesting: NestedSizes | None = None) -> dict[str, float]:
    """Train a task and return its validation losses in nats per byte, by metric, and the seconds."""
    seed_everything(seed, verbose=False)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            default_root_dir=folder,
            accelerator="cpu",
            max_steps=steps,
            max_epochs=-1,
            callbacks=[nesting] if nesting else [],
            limit_val_batches=24,
            val_check_interval=steps,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(task, TextDataModule("python_stdlib", block_size=128, batch_size=8))
        found = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/loss")}
    return {**found, "seconds": time.perf_counter() - start}


def calls(task: LitCausalLM, size: float, temperature: float, tokens: int) -> float:
    """Count calls of the whole model per 100 tokens, with a nested size of it as the draft."""
    generator = TextGenerator(task.backbone.eval(), Tokenizer.bytes())
    generator.use_draft(size, DRAFT_LENGTH)
    generator.generate(["The module ", "class ", "The import statement", "a list of "], tokens, temperature)
    return 100 * generator.speculation.calls / generator.speculation.tokens


def flops(task: LitCausalLM, size: float = 1.0) -> int:
    """FLOPs of one training sample at a nested size."""
    backbone = task.backbone
    with prefix(backbone, size) if size < 1 else torch.no_grad():
        return model_cost(backbone.config, backbone.size).training_flops


def run(seed: int, base_steps: int, steps: int, tokens: int, distill: float, smoke: bool) -> dict[str, Any]:
    """Train all arms of a seed."""
    arms: dict[str, Any] = {}

    def build(count: int) -> LitCausalLM:
        seed_everything(seed, verbose=False)
        return build_task(count, smoke)

    base = build(tokens)
    if base_steps:
        arms["base"] = train(base, base_steps, seed)
    nested = {per_step: copy.deepcopy(base) for per_step in (1, len(SIZES))}
    arms["whole"] = train(base, steps, seed)
    whole, parts = flops(base), [flops(base, size) for size in SIZES]
    for per_step, task in nested.items():
        found = train(task, steps, seed, NestedSizes(list(SIZES), distill, per_step=per_step))
        for size in SIZES:
            for temperature in (0.0, 1.0):
                name = f"calls@{size:g},temperature={temperature:g}"
                found[name] = calls(task, size, temperature, 10 if smoke else 100)
        found["flops"] = (whole + per_step * mean(parts)) / (whole + sum(parts))
        arms[f"nested, {per_step} per step"] = found
    for size in SIZES:
        for name, length in (("alone", base_steps + steps), ("alone, own steps", base_steps + steps // len(SIZES))):
            arms[f"{name}@{size:g}"] = train(build(int(size * tokens)), length, seed)
    return arms


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base_steps", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--distill", type=float, default=0.0)
    parser.add_argument("--output", type=Path, help="JSON file for the results, rewritten after each seed")
    parser.add_argument("--smoke", action="store_true", help="two steps of a tiny model")
    given = parser.parse_args()
    base_steps, steps, tokens = (2, 2, 16) if given.smoke else (given.base_steps, given.steps, given.tokens)
    results: dict[str, Any] = {
        "base_steps": base_steps,
        "steps": steps,
        "tokens": tokens,
        "distill": given.distill,
        "seeds": {},
    }
    for seed in given.seeds[:1] if given.smoke else given.seeds:
        results["seeds"][seed] = found = run(seed, base_steps, steps, tokens, given.distill, given.smoke)
        for arm, values in found.items():
            print(f"seed {seed} {arm}:", ", ".join(f"{name} {value:.4g}" for name, value in values.items()), flush=True)
        if given.output is not None:
            given.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    main()
