"""Growth into experts against other uses of the same compute, from the same trained base.

    python -m benchmarks.experts [--steps 500] [--base_steps 3000] [--seeds 3] [--arms dense split experts ...]

A byte-level language model (width 32, depth 2) is trained on Python's standard library until more steps gain little,
once per seed. Arms, each at every rate of the same grid:

``dense``    the base is trained on
``split``    growth to 4 times the parameter tokens of the feed-forward, four times its FLOPs
``short``    the same for fewer steps, so that it takes the FLOPs of ``dense``
``experts``  growth to 4 experts, top-1
``top2``     growth to 4 experts, top-2
``shards``   growth to 4 experts for each of 4 shards of the tokens, under one norm
``scratch``  4 experts from scratch, for as many FLOPs as the base and ``experts`` together

A figure is the mean over the seeds at the best rate of the arm. ``time`` compares a training step of 2,048 data tokens
with that of the base, in a model of width 128 and depth 4. Results are printed as Markdown and written to
``benchmarks/results/experts.json`` after every run; a run that is already there is skipped, so an interrupted command
continues.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_tokenformer.cost import model_cost
from lit_tokenformer.data import TextDataModule
from lit_tokenformer.growth import grow
from lit_tokenformer.models import create_backbone
from lit_tokenformer.models.experts import expert_metrics, finish_step

RESULTS = Path(__file__).parent / "results" / "experts.json"
SIZES = {"dim": 32, "depth": 2, "num_heads": 2, "param_tokens": 32, "vocab_size": 257, "context_length": 128}
TIMED_SIZES = {**SIZES, "dim": 128, "depth": 4, "num_heads": 4, "param_tokens": 128}
GROWTHS: dict[str, dict[str, int]] = {
    "dense": {},
    "split": {"ffn": 16 * SIZES["param_tokens"]},
    "short": {"ffn": 16 * SIZES["param_tokens"]},
    "experts": {"experts": 4},
    "top2": {"experts": 4},
    "shards": {"experts": 4},
    "scratch": {"experts": 4},
}
CONFIG = {"top2": {"experts_top_k": 2}, "shards": {"expert_groups": 4}}
RATES = (1e-3, 2e-3, 4e-3)
WARMUP = 20


class Text:
    """Training rows and evaluation batches of Python's standard library."""

    def __init__(self, evaluation: int) -> None:
        data = TextDataModule("python_stdlib", tokenizer="bytes", block_size=128, batch_size=8)
        data.prepare_data()
        data.setup("fit")
        self.held = [one for _, one in zip(range(evaluation), data.val_dataloader(), strict=False)]
        self.rows = torch.cat([one for _, one in zip(range(1500), data.train_dataloader(), strict=False)])

    def batches(self, seed: int) -> Iterator[Tensor]:
        """Random batches of 8 x 128 bytes, (8, 129)."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self.rows[torch.randint(len(self.rows), (8,), generator=generator)]

    @torch.inference_mode()
    def loss(self, model: nn.Module) -> float:
        """Mean loss on held-out files, in nats per byte."""
        model.eval()
        return statistics.mean(loss(model, one).item() for one in self.held)


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Cross-entropy of the next byte, ()."""
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def make_optimizer(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """AdamW of all arms."""
    return torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Iterator[Tensor], steps: int, rate: float) -> None:
    """Train with a warm-up of 20 steps and a cosine schedule down to a tenth."""
    model.train()
    for step in range(steps):
        share = min(1.0, (step + 1) / WARMUP)
        cosine = 0.55 + 0.45 * torch.cos(torch.tensor(torch.pi * step / steps)).item()
        for group in optimizer.param_groups:
            group["lr"] = rate * share * cosine
        optimizer.zero_grad()
        loss(model, next(data)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        finish_step(model)
        optimizer.step()


def base_of(text: Text, seed: int, steps: int, **config: Any) -> tuple[Any, torch.optim.Optimizer]:
    """Train the base of a seed, with its optimizer."""
    torch.manual_seed(seed)
    model = create_backbone("tokenformer_lm_tiny", **SIZES, **config)
    optimizer = make_optimizer(model, 3e-3)
    train(model, optimizer, text.batches(seed), steps, 3e-3)
    return model, optimizer


def run_arm(
    arm: str, base: tuple[nn.Module, torch.optim.Optimizer], text: Text, seed: int, rate: float, steps: int, before: int
) -> dict[str, Any]:
    """Train one arm at one rate; ``before`` is the number of steps of the base."""
    if arm == "scratch":
        torch.manual_seed(seed)
        model: Any = create_backbone("tokenformer_lm_tiny", **SIZES, **GROWTHS[arm])
        optimizer = make_optimizer(model, rate)
        before_change, steps = 0.0, steps + before * flops(base[0]) // flops(model)
    else:
        model, optimizer = copy.deepcopy(base)
        model.config = create_backbone("tokenformer_lm_tiny", **SIZES, **CONFIG.get(arm, {})).config
        sample = text.held[0][:, :-1]
        with torch.no_grad():
            model.eval()
            outputs = model(sample)
            grow(model, GROWTHS[arm], seed=seed, optimizer=optimizer) if GROWTHS[arm] else None
            before_change = ((model(sample) - outputs).norm() / outputs.norm()).item()
        if arm == "short":
            steps = steps * flops(base[0]) // flops(model)
    train(model, optimizer, text.batches(1000 + seed), steps, rate)
    cost = model_cost(model.config, model.size)
    return {
        "loss": text.loss(model),
        "change_at_growth": before_change,
        "parameters": cost.parameters,
        "active": cost.active_parameters,
        "flops": cost.flops / model_cost(base[0].config).flops,  # type: ignore[arg-type]
        "steps": steps,
        "load_max": expert_metrics(model).get("experts/load_max"),
    }


def flops(model: Any) -> int:
    """FLOPs of a forward pass per sample."""
    return model_cost(model.config, model.size).flops


def step_times(text: Text, rounds: int) -> dict[str, float]:
    """Time of a training step of 16 x 128 data tokens, in seconds: the median over rounds of all arms in turn."""
    tokens = torch.cat([next(batches) for batches in [text.batches(0)] for _ in range(2)])
    arms = {}
    for arm in ("dense", "split", "experts", "top2", "shards"):
        torch.manual_seed(0)
        model = create_backbone("tokenformer_lm_tiny", **TIMED_SIZES, **CONFIG.get(arm, {}))
        optimizer = make_optimizer(model, 1e-3)
        growth = {"ffn": 16 * TIMED_SIZES["param_tokens"]} if arm == "split" else GROWTHS[arm]
        grow(model, growth, optimizer=optimizer) if growth else None
        arms[arm] = (model, optimizer)
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(rounds + 2):
        for arm, (model, optimizer) in arms.items():
            start = time.perf_counter()
            train(model, optimizer, iter([tokens]), 1, 1e-3)
            times[arm].append(time.perf_counter() - start)
    return {arm: statistics.median(seconds[2:]) for arm, seconds in times.items()}


def report(results: dict[str, Any]) -> Iterator[str]:
    """Format the results as Markdown."""
    columns = "arm", "parameters", "active", "FLOPs", "best rate", "loss", "spread", "largest load", "change at growth"
    yield f"| {' | '.join((*columns, 'step time'))} |"
    yield "|---" * 10 + "|"
    for arm in GROWTHS:
        runs = {key: one for key, one in results["runs"].items() if key.split()[0] == arm}
        rates = {key.split()[1] for key in runs}
        losses = {rate: [one["loss"] for key, one in runs.items() if key.split()[1] == rate] for rate in rates}
        if not losses:
            continue
        rate = min(losses, key=lambda rate: statistics.mean(losses[rate]))
        best = [one for key, one in runs.items() if key.split()[1] == rate]
        loads = [one["load_max"] for one in best if one["load_max"] is not None]
        times = results.get("time", {})
        ratio = f"{times[arm] / times['dense']:.2f}x" if arm in times else ""
        yield (
            f"| {arm} | {best[0]['parameters']:,} | {best[0]['active']:,} | {best[0]['flops']:.3f}x | {rate} | "
            f"{statistics.mean(losses[rate]):.4f} | {statistics.pstdev(losses[rate]):.4f} | "
            f"{f'{max(loads):.2f}x' if loads else ''} | {max(one['change_at_growth'] for one in best):.1e} | {ratio} |"
        )


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--base_steps", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--arms", nargs="+", default=list(GROWTHS), choices=list(GROWTHS))
    parser.add_argument("--evaluation", type=int, default=24, help="held-out batches")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    settings = {"steps": args.steps, "base_steps": args.base_steps, "evaluation": args.evaluation}
    found = json.loads(args.output.read_text()) if args.output.exists() else {}
    if found.get("settings") != settings:
        found = {"settings": settings, "torch": torch.__version__, "runs": {}}
    text = Text(args.evaluation)

    def write() -> None:
        args.output.write_text(json.dumps(found, indent=1) + "\n")

    for seed in range(args.seeds):
        jobs = [
            (arm, rate) for arm in args.arms for rate in args.rates if f"{arm} {rate:g} {seed}" not in found["runs"]
        ]
        if not jobs:
            continue
        base = base_of(text, seed, args.base_steps)
        print(f"base of seed {seed}: {text.loss(base[0]):.4f}", flush=True)
        for arm, rate in jobs:
            one = run_arm(arm, base, text, seed, rate, args.steps, args.base_steps)
            found["runs"][f"{arm} {rate:g} {seed}"] = one
            print(f"{arm} {rate:g} seed {seed}: {one}", flush=True)
            write()
    if "time" not in found:
        found["time"] = step_times(text, 15)
        write()
    print("", *report(found), sep="\n", flush=True)


if __name__ == "__main__":
    main()
