"""Pattention against a GELU MLP of the same shapes, ten plain lines of the formula, and its bare matrix products.

    python -m benchmarks.speed.pattention [--dtypes float32 bfloat16] [--modes eager compiled] [--shapes ...]

A shape is data tokens x width x parameter tokens. All run forward and backward for input and both weights on the same
numbers; the MLP has no biases, so the same six products. What is kept for backward is counted in bytes, weights apart.
In ``compiled``, ``torch.compile`` gets the MLP and Pattention; the formula stays as it is written. On a GPU, Pattention
also runs with its Triton kernels and with operations of torch, between which it chooses by itself.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.speed.lines import Line
from benchmarks.speed.timing import arguments, kept_bytes, main, median, ratio, take_turns
from lit_tokenformer.models import kernel_choice, pattention

SHAPES = ("2048x384x1536", "2048x768x768", "2048x768x3072", "1024x768x8560")


def mlp(x: Tensor, into: Tensor, out: Tensor) -> Tensor:
    """Two linear layers with a GELU between them: (T, D), (N, D), (D, N) -> (T, D)."""
    return F.linear(F.gelu(F.linear(x, into)), out)


def formula(x: Tensor, key_tokens: Tensor, value_tokens: Tensor, tau: Tensor) -> Tensor:
    """arXiv 2410.23168, eq. 4 with appendix A, eq. 16, as it is written."""
    scores = x @ key_tokens.T
    norm = torch.linalg.vector_norm(scores, dim=-1, keepdim=True)
    weights = F.gelu(scores / norm * tau.to(scores.dtype))
    return weights @ value_tokens


FORMS = {"operations of torch": "plain", "Triton kernels": "triton"}
"""Forms of Pattention, by setting of ``LIT_TOKENFORMER_KERNELS``."""


def measure(
    shape: tuple[int, int, int], dtype: str, mode: str, rounds: int, device: str, forms: bool = False
) -> tuple[list[Line], float]:
    """Measure one shape, also with each of its forms if asked; return its lines and the speed-up over the formula."""
    torch.manual_seed(0)
    length, dim, tokens = shape
    kind = {"device": device, "dtype": getattr(torch, dtype)}
    x, grad = torch.randn(length, dim, **kind, requires_grad=True), torch.randn(length, dim, **kind)
    keys, values = ((0.02 * torch.randn(tokens, dim, **kind)).requires_grad_() for _ in range(2))
    out = values.detach().T.contiguous().requires_grad_()
    tau = torch.tensor(math.sqrt(tokens), device=device)
    compiled: Any = torch.compile if mode == "compiled" else lambda function: function
    mlp_, pattention_ = compiled(mlp), compiled(pattention)
    forward: dict[str, Callable[[], Tensor]] = {
        "MLP": lambda: mlp_(x, keys, out),
        "formula": lambda: formula(x, keys, values, tau),
        "Pattention": lambda: pattention_(x, keys, values, tau),
    }

    def in_form(form: str) -> Tensor:
        before, kernel_choice.form = kernel_choice.form, form
        try:
            return pattention_(x, keys, values, tau)
        finally:
            kernel_choice.form = before

    forward |= {name: partial(in_form, form) for name, form in FORMS.items() if forms}

    def step(name: str) -> None:
        x.grad = keys.grad = values.grad = out.grad = None
        forward[name]().backward(grad)

    wide = torch.randn(length, tokens, **kind)
    with torch.no_grad():
        key, value, data = keys.detach(), values.detach(), x.detach()

    def products() -> None:
        with torch.no_grad():
            F.linear(data, key), wide @ value, wide.T @ grad, grad @ value.T, wide.T @ data, wide @ key

    functions = {name: lambda name=name: step(name) for name in forward} | {"products": products}
    taken = take_turns(functions, rounds, device)
    kept = {name: kept_bytes(function, [keys, values, out]) / 1e6 for name, function in forward.items()}
    ours, case = taken["Pattention"], f"{dtype} {mode} {length} x {dim} x {tokens}"

    def line(against: str, figure: float, goal: str) -> Line:
        return Line(f"time, {case}", against, 1e3 * median(ours), 1e3 * median(taken[against]), "ms", figure, goal)

    faster = ratio(taken["formula"], ours)
    lines = [
        line("MLP", ratio(ours, taken["MLP"]), "<= 1.05"),
        line("formula", faster, ">= 1.0"),
        line("products", ratio(ours, taken["products"]), ""),
        *(line(name, ratio(ours, taken[name]), "<= 1.03") for name in FORMS if forms),
    ]
    for against, goal in ("MLP", "<= 1.01"), ("formula", "<= 0.45"):
        part = kept["Pattention"] / kept[against]
        lines.append(Line(f"kept, {case}", against, kept["Pattention"], kept[against], "MB", part, goal))
    return lines, faster


def measure_all(given: argparse.Namespace) -> tuple[list[Line], list[str]]:
    """Measure every shape in each precision and mode."""
    lines: list[Line] = []
    for dtype in given.dtypes:
        for mode in given.modes:
            faster = []
            for shape in given.shapes:
                torch.compiler.reset()
                length, dim, tokens = map(int, shape.split("x"))
                forms = given.device.startswith("cuda")
                found, than_formula = measure((length, dim, tokens), dtype, mode, given.rounds, given.device, forms)
                lines += found
                faster.append(than_formula)
            lines.append(speedup(f"{dtype} {mode}", faster, ">= 1.25"))
    return lines, []


def speedup(what: str, faster: list[float], goal: str) -> Line:
    """Summarize the speed-ups over the formula."""
    mean = math.exp(sum(map(math.log, faster)) / len(faster))
    return Line(f"time, {what}, geometric mean", "formula", 1, mean, "x", mean, goal)


if __name__ == "__main__":
    parser = arguments(__doc__, rounds=15, dtypes=("float32", "bfloat16"))
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    main("pattention", parser, measure_all)
