"""Queries, keys and values of three Pattention layers by one product with all key tokens, against three layers.

    python -m benchmarks.speed.qkv [--dtypes float32 bfloat16] [--shapes ...]

A shape is data tokens x width x parameter tokens of each layer. ``copied`` concatenates the key tokens in every pass,
as separate parameters require; ``stored`` finds them in one tensor, the most that another layout could gain. Scores,
their normalization and GELU, and the products of the backward pass with x and the key tokens are one call instead of
three; values are three products with strided weights. All run forward and backward for input and weights; a shape of
one data token runs forward alone, as in decoding.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.speed.lines import Line
from benchmarks.speed.timing import arguments, main, median, ratio, take_turns
from lit_tokenformer.models import kernel_choice, pattention
from lit_tokenformer.models.pattention_kernels import _before_gelu, _before_norm, _weigh, _weigh_

SHAPES = ("2048x384x384", "2048x768x768", "512x768x768", "1x768x768")


class Together(torch.autograd.Function):
    """Three layers: x (T, D), key tokens (3 N, D) and value tokens three times (N, D) -> three times (T, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tau: Tensor, keys: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        """Compute all scores at once; rows of (3 T, N) are those of one layer and data token."""
        weights, kept, scale = _weigh(F.linear(x, keys).view(-1, len(values[0])), tau, False)
        ctx.save_for_backward(x, tau, keys, kept, scale, *values)
        parts = weights.view(len(x), 3, -1).unbind(dim=1)
        return tuple(part @ value for part, value in zip(parts, values, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Compute gradients of x and the keys by one product each."""
        x, tau, keys, kept, scale, *values = ctx.saved_tensors
        parts = F.gelu(kept).view(len(x), 3, -1).unbind(dim=1)
        values_grads = [part.T @ grad for part, grad in zip(parts, grads, strict=True)]
        scores_grad = torch.empty_like(kept)
        for part, grad, value in zip(scores_grad.view(len(x), 3, -1).unbind(dim=1), grads, values, strict=True):
            torch.mm(grad, value.T, out=part)
        scores_grad = _before_norm(_before_gelu(scores_grad, kept), kept, scale, tau).view(len(x), -1)
        return scores_grad @ keys, None, scores_grad.T @ x, *values_grads


def measure(shape: tuple[int, int, int], dtype: str, rounds: int, device: str) -> list[Line]:
    """Measure one shape."""
    torch.manual_seed(0)
    length, dim, tokens = shape
    kind: dict[str, Any] = {"device": device, "dtype": getattr(torch, dtype)}
    training = length > 1
    x, grad = torch.randn(length, dim, **kind).requires_grad_(training), torch.randn(length, dim, **kind)
    keys, values = ([(0.02 * torch.randn(tokens, dim, **kind)).requires_grad_() for _ in range(3)] for _ in range(2))
    stored = torch.cat([one.detach() for one in keys]).requires_grad_()
    tau = torch.tensor(math.sqrt(tokens), device=device)

    def together(keys: Tensor) -> tuple[Tensor, ...]:
        if training:
            return Together.apply(x, tau, keys, *values)
        weights = _weigh_(F.linear(x, keys).view(-1, tokens), tau, False).view(length, 3, tokens).unbind(dim=1)
        return tuple(part @ value for part, value in zip(weights, values, strict=True))

    forward = {
        "three layers": lambda: tuple(pattention(x, *own, tau) for own in zip(keys, values, strict=True)),
        "copied": lambda: together(torch.cat(keys)),
        "stored": lambda: together(stored),
    }
    for form in ("copied", "stored"):  # the same numbers
        torch.testing.assert_close(forward[form](), forward["three layers"](), rtol=0.02, atol=0.02)

    def step(name: str) -> None:
        with torch.set_grad_enabled(training):
            out = forward[name]()
            if training:
                torch.autograd.backward(out, [grad] * 3)
        for one in (x, stored, *keys, *values):
            one.grad = None

    before, kernel_choice.form = kernel_choice.form, "plain"  # on both sides
    try:
        taken = take_turns({name: partial(step, name) for name in forward}, rounds, device)
    finally:
        kernel_choice.form = before
    three, case = taken["three layers"], f"{dtype} {length} x {dim} x {tokens}"
    figures = {name: (1e3 * median(taken[name]), 1e3 * median(three)) for name in ("copied", "stored")}
    return [
        Line(f"{name}, {case}", "three layers", *figures[name], "ms", ratio(taken[name], three)) for name in figures
    ]


def measure_all(given: argparse.Namespace) -> tuple[list[Line], list[str]]:
    """Measure every shape in each precision."""
    lines: list[Line] = []
    for dtype in given.dtypes:
        for shape in given.shapes:
            length, dim, tokens = map(int, shape.split("x"))
            lines += measure((length, dim, tokens), dtype, given.rounds, given.device)
    return lines, []


if __name__ == "__main__":
    parser = arguments(__doc__ or "", rounds=20, dtypes=("float32", "bfloat16"))
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    main("qkv", parser, measure_all)
