"""Pattention with its forms for CPUs against operations that run on every device.

    python -m benchmarks.speed.cpu_forms [--threads 1] [--dtypes float32 bfloat16] [--shapes ...]

A shape is data tokens x width x parameter tokens. More than one data token run forward and backward: on a CPU the norm
in bfloat16 and its derivative are kernels of weight normalization. One data token runs forward, as in decoding: on a
CPU by matrix-vector products and a GELU of its own. A form stays if it saves more than 3 %.
"""

from __future__ import annotations

import argparse
import math
from functools import partial

import torch

from benchmarks.speed.lines import Line
from benchmarks.speed.timing import arguments, main, median, ratio, take_turns
from lit_tokenformer.models import pattention, pattention_kernels

SHAPES = ("2048x384x1536", "512x768x768", "512x768x3072", "1x768x576", "1x768x2304")


def measure(shape: tuple[int, int, int], dtype: str, rounds: int) -> Line:
    """Measure one shape; the rounds of one data token count tenfold."""
    torch.manual_seed(0)
    length, dim, tokens = shape
    kind = getattr(torch, dtype)
    training = length > 1
    x = torch.randn(length, dim, dtype=kind).requires_grad_(training)
    keys, values = ((0.02 * torch.randn(tokens, dim)).to(kind).requires_grad_() for _ in range(2))
    grad, tau = torch.randn(length, dim, dtype=kind), torch.tensor(math.sqrt(tokens))

    def step(special: bool) -> None:
        before = pattention_kernels._on_cpu
        if not special:
            pattention_kernels._on_cpu = lambda x: False
        try:
            with torch.set_grad_enabled(training):
                y = pattention(x, keys, values, tau)
                if training:
                    torch.autograd.grad(y, (x, keys, values), grad)
        finally:
            pattention_kernels._on_cpu = before

    taken = take_turns(
        {"CPU": partial(step, True), "any device": partial(step, False)}, rounds * (1 if training else 10)
    )
    ours, theirs = taken["CPU"], taken["any device"]
    case = f"{dtype} {length} x {dim} x {tokens}"
    return Line(case, "any device", 1e3 * median(ours), 1e3 * median(theirs), "ms", ratio(ours, theirs), "<= 0.97")


def measure_all(given: argparse.Namespace) -> tuple[list[Line], list[str]]:
    """Measure every shape in each precision."""
    lines: list[Line] = []
    for dtype in given.dtypes:
        for shape in given.shapes:
            length, dim, tokens = map(int, shape.split("x"))
            lines.append(measure((length, dim, tokens), dtype, given.rounds))
    return lines, []


if __name__ == "__main__":
    parser = arguments(__doc__ or "", rounds=20, dtypes=("float32", "bfloat16"))
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    main("cpu_forms", parser, measure_all)
