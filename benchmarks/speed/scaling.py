"""Scaling of time and memory with parameter tokens N, data tokens T and depth, against the closed form of ``cost.py``.

    python -m benchmarks.speed.scaling [--dtypes float32]

Three things are measured: forward and backward pass of one Pattention layer (256 data tokens, width 256, N parameter
tokens); those of a small language model with its loss (width 128, 4 layers, 4 heads, 128 data tokens, N = 128 with
feed-forwards of 4 N, one of these numbers changed at a time); and one more data token of the same model at batch 1,
after T data tokens were read.

Memory is, in training, what is kept for the backward pass without parameters, counted by
``torch.autograd.graph.saved_tensors_hooks`` (the loss keeps the gradients it has made instead, which the hooks do not
see: as much as the embedding and T rows of the width); in decoding, keys and values of what was read.

An exponent is the slope of a straight line through the upper half of the points, in logarithms of both. That of time is
compared with that of the operations in closed form, that of memory with that of the bytes. ``scaling.csv`` has the
points, ``scaling.png`` the picture, where the closed form is dashed (its time at the speed of the largest point).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.plots import scaling_picture
from benchmarks.speed.lines import Line
from benchmarks.speed.timing import arguments, kept_bytes, main, median, take_turns
from lit_tokenformer.comparison.results import write_csv
from lit_tokenformer.cost import model_cost
from lit_tokenformer.models import Pattention, Tokenformer, TokenformerConfig, preset_config
from lit_tokenformer.tasks.losses import linear_cross_entropy

AXES = {
    "N": ("parameter tokens N", [2**power for power in range(8, 16)]),
    "T": ("data tokens T", [2**power for power in range(7, 14)]),
    "depth": ("layers", [1, 2, 4, 8, 16, 32]),
}
"""Label and values of each axis."""
ROWS, WIDTH = 256, 256  # data tokens and width of the layer by itself


Point = tuple[Callable[[], object], float, float, float]
"""A function to time, its FLOPs in closed form, and its memory as counted and in closed form."""
Curve = list[dict[str, Any]]
"""Rows of the CSV: what, axis, size, seconds, operations, bytes, closed_bytes."""


def layer(axis: str, size: int, dtype: torch.dtype, device: str) -> Point:
    """Forward and backward pass of one layer with ``size`` parameter tokens."""
    torch.manual_seed(0)
    one = Pattention(WIDTH, WIDTH, size).to(device)
    x = torch.randn(ROWS, WIDTH, device=device, requires_grad=True)
    run = trained(one, lambda: one(x).sum(), dtype)
    return run, 12 * ROWS * WIDTH * size, kept_bytes(run, one.parameters()), dtype.itemsize * ROWS * (WIDTH + size)


def config_of(axis: str, size: int) -> TokenformerConfig:
    """The small language model with one number changed."""
    sizes = {"N": 128, "T": 128, "depth": 4, axis: size}
    more = {"context_length": sizes["T"], "depth": sizes["depth"], "param_tokens": sizes["N"]}
    return preset_config("tokenformer_lm_tiny", vocab_size=512, **more)


def training(axis: str, size: int, dtype: torch.dtype, device: str) -> Point:
    """Forward pass, loss and backward pass of one text."""
    torch.manual_seed(0)
    config = config_of(axis, size)
    model, cost = Tokenformer(config).to(device).train(), model_cost(config)
    tokens = torch.randint(512, (1, config.context_length), device=device)
    weight = model.get_classifier().weight

    def loss() -> Tensor:
        return linear_cross_entropy(model(tokens, pre_logits=True), weight, tokens)[0]  # type: ignore[arg-type]

    run = trained(model, loss, dtype)
    kept = kept_bytes(run, [*model.parameters(), *model.buffers()])
    return run, cost.training_flops, kept, dtype.itemsize * cost.kept


def decoding(axis: str, size: int, dtype: torch.dtype, device: str) -> Point:
    """Decode one more data token."""
    torch.manual_seed(0)
    config = config_of(axis, size)
    model, read = Tokenformer(config).to(device, dtype).eval(), config.context_length
    state = model.new_state(read + 1)
    with torch.inference_mode():
        for tokens in torch.randint(512, (1, read), device=device).split(512, dim=1):
            model(tokens, state=state, pre_logits=True)
    token = torch.zeros(1, 1, dtype=torch.long, device=device)

    def run() -> None:
        state.start = read
        with torch.inference_mode():
            model(token, state=state)

    run()
    cached = [one for mixer, _ in state.blocks for one in vars(mixer).values() if isinstance(one, Tensor)]
    numbers = 2 * config.depth * read * config.dim
    return run, model_cost(config).flops / read, sum(one.nbytes for one in cached), numbers * dtype.itemsize


def trained(model: nn.Module, loss: Callable[[], Tensor], dtype: torch.dtype) -> Callable[[], None]:
    """Build a forward and backward pass under autocast to ``dtype``, unless that is float32."""
    device = next(model.parameters()).device.type

    def run() -> None:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            found = loss()
        found.backward()
        model.zero_grad(set_to_none=True)

    return run


MEASURED = (
    ("layer", "N", layer),
    *(("training", axis, training) for axis in AXES),
    *(("decoding", axis, decoding) for axis in AXES),
)


def curves(rounds: int, dtype: torch.dtype, device: str) -> Iterator[Curve]:
    """Measure all curves."""
    for what, axis, make in MEASURED:
        curve = []
        for size in AXES[axis][1]:
            run, *numbers = make(axis, size, dtype, device)
            passed = median(take_turns({"run": run}, rounds, device, warmup=1)["run"])
            closed = dict(zip(("operations", "bytes", "closed_bytes"), numbers, strict=True))
            curve.append({"what": what, "axis": axis, "size": size, "seconds": float(f"{passed:.6g}"), **closed})
        yield curve


def exponent(curve: Curve, name: str) -> float:
    """Fit the slope of a column through the upper half of the points, in logarithms of both."""
    upper = curve[len(curve) // 2 :]
    sizes, values = (np.log([row[key] for row in upper]) for key in ("size", name))
    return float(np.polyfit(sizes, values, 1)[0])


def lines_of(found: Sequence[Curve], dtype: str) -> Iterator[Line]:
    """Compare the exponents with the closed form."""
    for curve in found:
        kind, axis = curve[0]["what"], curve[0]["axis"]
        memory = "memory of the cache" if kind == "decoding" else "memory kept"
        for what, measured, closed in (("time", "seconds", "operations"), (memory, "bytes", "closed_bytes")):
            mine, theirs = exponent(curve, measured), exponent(curve, closed)
            if theirs > 0.01:  # a KV cache does not depend on N
                title = f"{kind}, {dtype}, {what} against {axis}"
                yield Line(title, "the closed form", mine, theirs, "(exponent)", mine / theirs)


def measure(given: argparse.Namespace) -> tuple[list[Line], list[str]]:
    """Measure each dtype, and write its points and picture."""
    lines: list[Line] = []
    for dtype in given.dtypes:
        found = list(curves(given.rounds, getattr(torch, dtype), given.device))
        lines += lines_of(found, dtype)
        given.output.mkdir(parents=True, exist_ok=True)
        name = "scaling" if dtype == given.dtypes[0] else f"scaling-{dtype}"
        write_csv(given.output / f"{name}.csv", [row for curve in found for row in curve])
        labels = {axis: label for axis, (label, _) in AXES.items()}
        scaling_picture(found, labels, [exponent(one, "seconds") for one in found], given.output / f"{name}.png")
    return lines, []


if __name__ == "__main__":
    main("scaling", arguments(__doc__, rounds=3), measure)
