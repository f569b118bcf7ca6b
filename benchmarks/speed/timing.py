"""Timing in turns, memory, and the command line that all benchmarks of speed share.

Absolute times mean little on a machine with other load. So what is compared runs in turn, round by round, and the
reported ratio is the median of the ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.speed.lines import Line, table
from lit_tokenformer.comparison.meter import environment, resident_bytes

RESULTS = Path(__file__).parents[1] / "results" / "speed"


def arguments(doc: str, rounds: int, dtypes: Sequence[str] = ("float32",)) -> argparse.ArgumentParser:
    """Build a parser with the options of all these commands."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch on the CPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=list(dtypes), help="float32 bfloat16 float16")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file")
    return parser


def seconds(function: Callable[[], object], device: str = "cpu") -> float:
    """Time one call until the device has finished."""
    start = time.perf_counter()
    function()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def take_turns(
    functions: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu", warmup: int = 2
) -> dict[str, list[float]]:
    """Time each function in each round, (rounds,) by name; every second round runs in reverse order."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + warmup):
        names = list(functions) if number % 2 == 0 else list(functions)[::-1]
        for name in names:
            passed = seconds(functions[name], device)
            if number >= warmup:
                taken[name].append(passed)
    return taken


median = statistics.median


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of the ratios within a round."""
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def kept_bytes(run: Callable[[], object], own: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once, without the tensors in ``own``."""
    weights = {one.untyped_storage().data_ptr() for one in own}
    kept: dict[int, Tensor] = {}  # alive, so that no storage is counted twice

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
        run()
    return sum(one.untyped_storage().nbytes() for one in kept.values())


def reset_peak(device: str) -> None:
    """Start a new measurement of peak memory."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes(device: str, others: int = 0) -> int:
    """Peak memory since the reset: allocated on CUDA, else resident without ``others``."""
    cuda = device.startswith("cuda")
    return torch.cuda.max_memory_allocated(device) if cuda else resident_bytes("VmHWM") - others


@dataclass
class Training:
    """A model in training on one batch.

    Args:
        model: Model or task.
        loss: Computes the loss of the batch.
        dtype: Precision of autocast; float32 for none.
        optimizer: Optimizer of its parameters; None for forward and backward pass alone.
    """

    model: nn.Module
    loss: Callable[[], Tensor]
    dtype: torch.dtype = torch.float32
    optimizer: torch.optim.Optimizer | None = None

    def gradients(self) -> None:
        """Run forward and backward pass."""
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.loss()
        loss.backward()

    def step(self) -> None:
        """Run one training step."""
        self.gradients()
        if self.optimizer is not None:
            self.optimizer.step()
        self.model.zero_grad(set_to_none=True)


def unlogged(task: nn.Module) -> nn.Module:
    """Detach a task from logging, so that its steps run without a trainer."""
    task.log = lambda *_, **__: None  # type: ignore[assignment]
    return task


def main(
    name: str, parser: argparse.ArgumentParser, measure: Callable[[argparse.Namespace], tuple[list[Line], list[str]]]
) -> None:
    """Measure, print a Markdown table, and write it, with machine and versions, to ``OUTPUT/NAME.json``."""
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    lines, notes = measure(given)
    found = environment(torch.device(given.device))
    rows = [line.as_dict() for line in lines]
    print(", ".join(f"{key} {value}" for key, value in found.items()) + f"; medians of {given.rounds} rounds\n")
    print("\n\n".join([table("what", rows), *notes]))
    given.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"environment": found, "rounds": given.rounds, "lines": rows, "notes": notes}, indent=1)
    (given.output / f"{name}.json").write_text(text + "\n", encoding="utf-8")
