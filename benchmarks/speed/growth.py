"""A growth event of a language model in a fit, against one training step at the new size: time and peak memory.

    python -m benchmarks.speed.growth [--whole]

The model is grown as a fit grows it: ``ParameterGrowthCallback.on_train_batch_start`` is called with a trainer, the
task, AdamW whose moments are filled, the gradients of the last step, and a batch. So the time includes the comparison
of the outputs before and after. Every growth begins with a new model.

The training step is forward, backward, clipping and AdamW at the new size on 8 sequences of 1,024 tokens. Only one
sequence is computed unless ``--whole`` is given, and its forward and backward count eight times.

Peak memory is that of the event: of the process on a CPU, less that before the event without weights, gradients and
moments; on CUDA what is allocated there. It may reach weights and moments at the new size and two copies of the largest
tensor; a second line takes two copies of the largest of the tensors that grow.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import multiprocessing
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer

from benchmarks.speed.lines import Line
from benchmarks.speed.timing import arguments, main, median, peak_bytes, reset_peak, seconds, unlogged
from callbacks import ParameterGrowthCallback
from lit_tokenformer.comparison.meter import resident_bytes
from lit_tokenformer.models import Pattention
from lit_tokenformer.models.presets import PRESETS
from lit_tokenformer.tasks import LitCausalLM

SEQUENCES = 8


class Event(NamedTuple):
    """A growth: seconds; in bytes the highest memory, weights and moments at the end, the largest tensor, and the
    largest that grows."""

    seconds: float
    peak: int
    state: int
    largest: int
    growing: int


METHODS = ("split", "zero", "random")


def measure(args: argparse.Namespace) -> tuple[list[Line], list[str]]:
    """Measure each method of growth, then a training step."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    found: dict[str, list[Event]] = {method: [] for method in METHODS}
    with alone(args.device) as call:
        for number in range(args.rounds):
            for method in METHODS if number % 2 == 0 else reversed(METHODS):
                found[method].append(call(growth_event, method, args))
                print(f"{method}: {found[method][-1]}", flush=True)
        computing, updating = call(training_step, args)
    step = SEQUENCES // (SEQUENCES if args.whole else 1) * computing + updating
    lines = []
    for method, events in found.items():
        passed, peak = (median([getattr(event, name) for event in events]) for name in ("seconds", "peak"))
        state, largest, growing = events[0].state, events[0].largest, events[0].growing
        what = f"growth by {method}, {args.before} to {args.after}"
        against = f"training step, {SEQUENCES} x {args.length:,} tokens"
        lines.append(Line(what, against, passed, step, "s", passed / step, "<= 1.0"))
        for name, copied, goal in (("largest tensor", largest, "<= 1.0"), ("largest that grows", growing, "")):
            bound = state + 2 * copied
            against = f"final state and 2 x {name}"
            lines.append(Line(f"{what}, peak", against, peak / 1e9, bound / 1e9, "GB", peak / bound, goal))
    notes = [
        f"Training step: {computing:.2f} s for forward and backward of {SEQUENCES if args.whole else 1} x "
        f"{args.length:,} tokens, {updating:.2f} s for clipping and AdamW.",
        f"{state / 1e9:.2f} GB of weights and moments after the growth; the largest tensor has {largest / 1e6:.0f} MB, "
        f"the largest that grows {growing / 1e6:.0f} MB.",
    ]
    return lines, notes


@contextlib.contextmanager
def alone(device: str) -> Iterator[Callable[..., Any]]:
    """Call each function in a fork of this process, so that none reuses memory of another.

    On CUDA allocations are counted exactly, and a fork cannot use the device, so they run here.
    """
    if device.startswith("cuda"):

        def call(function: Callable[..., Any], *values: Any) -> Any:
            gc.collect()
            torch.cuda.empty_cache()
            return function(*values)

        yield call
        return
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        yield lambda function, *values: pool.apply(function, values)


def trained(preset: str, args: argparse.Namespace) -> tuple[LitCausalLM, torch.optim.Optimizer]:
    """Build a task and its AdamW after one step with constant gradients, which are kept."""
    adamw = partial(torch.optim.AdamW, lr=1e-5, fused=True)
    task = LitCausalLM(preset, context_length=args.length, optimizer=adamw).to(args.device)
    optimizer = task.build_optimizer()
    for parameter in task.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    return task, optimizer


def growth_event(method: str, args: argparse.Namespace) -> Event:
    """Grow a new model."""
    torch.set_num_threads(args.threads)
    task, optimizer = trained(args.before, args)
    callback = ParameterGrowthCallback({0: PRESETS[args.after]["param_tokens"]}, method=method)
    trainer = Trainer(
        accelerator=args.device.split(":")[0],
        devices=1,
        logger=False,
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.strategy._lightning_module = task
    trainer.optimizers = [optimizer]
    batch = make_batch(SEQUENCES, args)
    with torch.no_grad():
        task.model_output(batch)  # it has computed before in a fit
    event = partial(callback.on_train_batch_start, trainer, task, batch, 0)
    seconds(lambda: None, args.device)  # wait for the device
    others = resident_bytes("VmRSS") - state_bytes(task, optimizer)
    reset_peak(args.device)
    passed = seconds(event, args.device)
    peak = peak_bytes(args.device, others)
    tokens = [layer.key_tokens for layer in task.modules() if isinstance(layer, Pattention)]
    largest, growing = (max(one.nbytes for one in tensors) for tensors in (task.parameters(), tokens))
    return Event(passed, peak, state_bytes(task, optimizer), largest, growing)


def training_step(args: argparse.Namespace) -> tuple[float, float]:
    """Seconds of forward and backward, and of clipping and AdamW, at the new size."""
    torch.set_num_threads(args.threads)
    task, optimizer = trained(args.after, args)
    unlogged(task)
    batch = make_batch(SEQUENCES if args.whole else 1, args)

    def compute() -> None:
        task.training_step(batch, 0).backward()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(task.parameters(), 1.0)
        optimizer.step()

    computing, updating = [], []
    optimizer.state.clear()  # activations take its place; the first update rebuilds it
    for _ in range(args.rounds + 1):
        optimizer.zero_grad()
        computing.append(seconds(compute, args.device))
    for _ in range(args.rounds + 1):
        updating.append(seconds(update, args.device))
    return median(computing[1:]), median(updating[1:])


def make_batch(sequences: int, args: argparse.Namespace) -> torch.Tensor:
    """Token ids, (sequences, length + 1)."""
    return torch.randint(50277, (sequences, args.length + 1), device=args.device)


def state_bytes(task: LitCausalLM, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of weights, gradients and the optimizer's state."""
    moments = [one for state in optimizer.state.values() for one in state.values() if isinstance(one, torch.Tensor)]
    gradients = [parameter.grad for parameter in task.parameters() if parameter.grad is not None]
    return sum(one.nbytes for one in (*task.parameters(), *gradients, *moments))


if __name__ == "__main__":
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--before", default="tokenformer_owt_354m", help="preset before the growth")
    parser.add_argument("--after", default="tokenformer_owt_757m", help="preset after it; another number of tokens")
    parser.add_argument("--length", type=int, default=1024, help="data tokens of a sequence")
    parser.add_argument("--whole", action="store_true", help="compute all 8 sequences in the training step")
    main("growth", parser, measure)
