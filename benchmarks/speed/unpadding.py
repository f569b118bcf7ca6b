"""Unpadding: a training step of a masked language model without padding, against the padded form.

    python -m benchmarks.speed.unpadding [--presets mosaic_bert_small mosaic_bert_base] [--shares 0 0.25 0.5 0.75]

Both forms have the same weights and see the same batches in turn, without dropout. Lengths are spaced evenly around
what gives the share of padding. The ratio is the padded form's time over the unpadded form's: were all work
proportional to the real tokens, it would be 1 / (1 - share); the head, which is computed for masked tokens alone in
both, and the optimizer are not. The base preset has batches of 8 x 512 tokens and is measured at half padding alone.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import torch

from benchmarks.speed.lines import Line
from benchmarks.speed.timing import Training, arguments, main, median, ratio, take_turns, unlogged
from lit_tokenformer.tasks import LitMaskedLM


class Shape(NamedTuple):
    """Batch of a preset: sequences, their padded length, vocabulary size, and shares of padding."""

    batch: int
    length: int
    vocabulary: int
    shares: tuple[float, ...] | None = None


SHAPES = {"mosaic_bert_small": Shape(32, 128, 4096), "mosaic_bert_base": Shape(8, 512, 30528, (0.5,))}


def make_batch(share: float, shape: Shape, device: str) -> tuple[torch.Tensor, ...]:
    """Draw random tokens and mask 15 % of the real ones."""
    batch, length = shape.batch, shape.length
    mean = (1 - share) * length
    spread = min(mean - 1, length - mean)
    lengths = torch.linspace(mean - spread, mean + spread, batch).round().long()
    tokens = torch.randint(shape.vocabulary, (batch, length))
    real = torch.arange(length) < lengths[:, None]
    labels = torch.where((torch.rand(batch, length) < 0.15) & real, tokens, -100)
    labels[:, 0] = tokens[:, 0]
    return tuple(one.to(device) for one in (tokens, labels, lengths))


def training(task: Any, batch: tuple[torch.Tensor, ...], dtype: torch.dtype) -> Training:
    """Build the training of a task on a batch."""
    optimizer = torch.optim.AdamW(task.parameter_groups(), lr=0.0, fused=True)  # both forms keep the same weights
    return Training(task, lambda: task.training_step(batch, 0), dtype, optimizer)


def measure(preset: str, given: argparse.Namespace) -> list[Line]:
    """Measure each precision and share of padding."""
    torch.manual_seed(0)
    shape, lines = SHAPES[preset], []
    tasks: dict[str, Any] = {}
    for form in ("padded", "unpadded"):
        overrides: Any = {"unpad": form == "unpadded", "dropout": 0.0, "attn_dropout": 0.0}
        task = LitMaskedLM(preset, shape.vocabulary, shape.length, overrides=overrides)
        tasks[form] = unlogged(task.to(given.device).train())
    tasks["unpadded"].load_state_dict(tasks["padded"].state_dict())
    for dtype in given.dtypes:
        for share in shape.shares or given.shares:
            batch = make_batch(share, shape, given.device)
            with torch.no_grad():
                losses = [task.training_step(batch, 0).item() for task in tasks.values()]
            assert abs(losses[0] - losses[1]) < 1e-4 * losses[0], losses
            steps = {form: training(task, batch, getattr(torch, dtype)).step for form, task in tasks.items()}
            taken = take_turns(steps, given.rounds, given.device, warmup=1)
            padded, unpadded = ([1000 * one for one in taken[form]] for form in ("padded", "unpadded"))
            real = batch[2].float().mean().item() / shape.length
            what = f"`{preset}`, {shape.batch} x {shape.length}, {dtype}, {100 * (1 - real):.0f} % padding"
            goal = ">= 1.6" if share == 0.5 else ""
            found = ratio(padded, unpadded)
            lines.append(Line(what, "the padded form", median(unpadded), median(padded), "ms", found, goal))
    return lines


def measure_all(given: argparse.Namespace) -> tuple[list[Line], list[str]]:
    """Measure all presets."""
    return [line for preset in given.presets for line in measure(preset, given)], []


if __name__ == "__main__":
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--presets", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75])
    main("unpadding", parser, measure_all)
