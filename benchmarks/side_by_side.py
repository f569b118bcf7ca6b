"""What the measurements of speed share: calls that take turns, their medians, and a table with a goal in each line.

Absolute times mean little on a machine that does other things too. So what is compared runs in turn, round by round,
and what is reported is the median of the ratios within a round. A table goes to the standard output, and with machine
and versions into a JSON file beside the other results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from runs import environment

RESULTS = Path(__file__).parent / "results" / "speed"


def arguments(doc: str, rounds: int, dtypes: Sequence[str] = ("float32",)) -> argparse.ArgumentParser:
    """A parser with what each of these commands takes: ``--rounds --threads --device --dtypes --output``."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch on the CPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=list(dtypes), help="float32 bfloat16 float16")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file")
    return parser


def seconds(function: Callable[[], object], device: str = "cpu") -> float:
    """What one call takes, until the device has done its work."""
    start = time.perf_counter()
    function()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def take_turns(
    functions: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu", warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of each function in each round, (rounds,) by name; every second round goes backwards."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + warmup):
        names = list(functions) if number % 2 == 0 else list(reversed(functions))
        for name in names:
            passed = seconds(functions[name], device)
            if number >= warmup:
                taken[name].append(passed)
    return taken


def median(taken: Sequence[float]) -> float:
    """The median."""
    return statistics.median(taken)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


@dataclass(frozen=True)
class Line:
    """One figure.

    Args:
        what: What was measured.
        against: What it is compared with.
        ours: Our figure.
        theirs: The figure of what it is compared with.
        unit: Of both, such as ``ms`` or ``images/s``.
        ratio: What the goal is about.
        goal: Such as ``<= 1.05``; empty where none is set.
    """

    what: str
    against: str
    ours: float
    theirs: float
    unit: str
    ratio: float
    goal: str = ""

    @property
    def reached(self) -> bool | None:
        """Whether the ratio is what it shall be; ``None`` without a goal."""
        if not self.goal:
            return None
        sign, bound = self.goal.split()
        return self.ratio <= float(bound) if sign == "<=" else self.ratio >= float(bound)


def report(name: str, lines: Sequence[Line], rounds: int, device: str, folder: Path, notes: Sequence[str] = ()) -> None:
    """Prints the lines as a Markdown table and writes them to ``NAME.json`` in the folder.

    Args:
        name: Of the file.
        lines: The figures.
        rounds: How often each was measured.
        device: Where.
        folder: Where the file goes; it is made if need be.
        notes: Sentences that belong to the figures.
    """
    found = environment(torch.device(device))
    print(", ".join(f"{key} {value}" for key, value in found.items()) + f"; medians of {rounds} rounds\n")
    print("| what | against | ours | theirs | ratio | goal |\n|---|---|---|---|---|---|")
    for line in lines:
        mark = {None: "", True: " reached", False: " **missed**"}[line.reached]
        print(
            f"| {line.what} | {line.against} | {line.ours:,.4g} {line.unit} | {line.theirs:,.4g} {line.unit} "
            f"| {line.ratio:.3f} | {line.goal}{mark} |"
        )
    for note in notes:
        print(f"\n{note}")
    rows = [{**asdict(line), "reached": line.reached} for line in lines]
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"environment": found, "rounds": rounds, "lines": rows, "notes": list(notes)}, indent=1)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
