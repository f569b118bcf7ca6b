"""Scaling of time and memory with the size of a model and of its input, against the closed form of ``cost.py``.

    python -m benchmarks.speed.scaling [--dtypes float32]
    python -m benchmarks.speed.scaling --presets rwkv4_small transformer_small --lengths 256 1024 4096 --vocab 256

Three things are measured: forward and backward pass of one Pattention layer (256 data tokens, width 256, N parameter
tokens); those of a small language model with its loss (width 128, 4 layers, 4 heads, 128 data tokens, N = 128 with
feed-forwards of 4 N, one of these numbers changed at a time); and one more data token of the same model at batch 1,
after T data tokens were read. The axes are parameter tokens N, data tokens T, depth, experts (each a feed-forward of
4 N; each of 1,024 data tokens uses one) and nested sizes (the first n of N = 4,096 parameter tokens, with the closed
form of a model with n). With ``--presets``, the second and the third of each preset over the lengths T instead.

Memory is, in training, what autograd keeps for the backward pass without parameters (the gradients that the loss keeps
instead do not count); in decoding, the state after what was read, such as keys and values.

An exponent is the slope of a straight line through the upper half of the points, at least two, in logarithms of both. A
cost that hardly depends on the size in closed form is given at the largest size, relative to the smallest.
That of time is compared with that of the operations in closed form, that of memory with that of the bytes.
``scaling.csv`` has the points, ``scaling.png`` the picture, where the closed form is dashed (its time at the speed of
the largest point).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.plots import scaling_picture
from benchmarks.speed.lines import Line
from benchmarks.speed.timing import Training, arguments, kept_bytes, main, median, take_turns
from lit_tokenformer.comparison.results import write_csv
from lit_tokenformer.cost import ModelCost, model_cost
from lit_tokenformer.growth import prefix, shrink
from lit_tokenformer.models import Pattention, Tokenformer, TokenformerConfig, preset_config
from lit_tokenformer.tasks.losses import linear_cross_entropy

AXES = {
    "N": ("parameter tokens N", [2**power for power in range(8, 16)]),
    "T": ("data tokens T", [2**power for power in range(7, 14)]),
    "depth": ("layers", [1, 2, 4, 8, 16, 32]),
    "experts": ("experts, one for each data token", [2**power for power in range(1, 7)]),
    "nested": ("parameter tokens in use, of 4,096", [2**power for power in range(7, 13)]),
}
"""Label and values of each axis."""
ROWS, WIDTH = 256, 256  # data tokens and width of the layer by itself

Point = tuple[Callable[[], object], float, float, float]
"""A function to time, its FLOPs in closed form, and its memory as counted and in closed form."""
Curve = list[dict[str, Any]]
"""Rows of the CSV: what, axis, size, seconds, operations, bytes, closed_bytes."""


def layer(size: int, dtype: torch.dtype, device: str) -> Point:
    """Forward and backward pass of one layer with ``size`` parameter tokens."""
    torch.manual_seed(0)
    one = Pattention(WIDTH, WIDTH, size).to(device)
    x = torch.randn(ROWS, WIDTH, device=device, requires_grad=True)
    run = Training(one, lambda: one(x).sum(), dtype).step
    return run, 12 * ROWS * WIDTH * size, kept_bytes(run, one.parameters()), dtype.itemsize * ROWS * (WIDTH + size)


def small(axis: str, size: int) -> TokenformerConfig:
    """The small language model with one number changed."""
    sizes = {"N": 128, "T": 1024 if axis == "experts" else 128, "depth": 4, "experts": 1, axis: size}
    more = {"context_length": sizes["T"], "depth": sizes["depth"], "experts": sizes["experts"]}
    return preset_config("tokenformer_lm_tiny", vocab_size=512, param_tokens=sizes["N"], **more)


def cost_at(config: TokenformerConfig, share: float) -> ModelCost:
    """Cost in closed form of a model with a share of the parameter tokens."""
    return model_cost(config, {kind: int(share * total) for kind, total in config.tokens.items()})


def at_share(model: Tokenformer, share: float) -> AbstractContextManager[None]:
    """Limit a model to the first ``share`` of its parameter tokens."""
    return prefix(model, share) if share < 1 else nullcontext()


def training(config: TokenformerConfig, dtype: torch.dtype, device: str, share: float = 1.0) -> Point:
    """Forward pass, loss and backward pass of one text, at a nested size with a ``share`` below 1."""
    torch.manual_seed(0)
    model, cost = Tokenformer(config).to(device).train(), cost_at(config, share)
    tokens = torch.randint(config.vocab_size, (1, config.context_length), device=device)
    weight = model.get_classifier().weight

    def loss() -> Tensor:
        with at_share(model, share):
            return linear_cross_entropy(model(tokens, pre_logits=True), weight, tokens)[0]  # type: ignore[arg-type]

    run = Training(model, loss, dtype).step
    kept = kept_bytes(run, [*model.parameters(), *model.buffers()])
    return run, cost.training_flops, kept, dtype.itemsize * cost.kept


def decoding(config: TokenformerConfig, dtype: torch.dtype, device: str, share: float = 1.0) -> Point:
    """Decode one more data token, at a nested size with a ``share`` below 1."""
    torch.manual_seed(0)
    read = config.context_length
    model = Tokenformer(config).to(device, dtype).eval()
    if share < 1:
        shrink(model, share)
    state = model.new_state(read + 1)
    with torch.inference_mode():
        for tokens in torch.randint(config.vocab_size, (1, read), device=device).split(512, dim=1):
            model(tokens, state=state, pre_logits=True)
    token = torch.zeros(1, 1, dtype=torch.long, device=device)

    def run() -> None:
        state.start = read
        with torch.inference_mode():
            model(token, state=state)

    run()
    parts = [value for block in state.blocks for part in block if part is not None for value in vars(part).values()]
    tensors = [one for value in parts for one in (value if isinstance(value, tuple) else (value,))]
    size = sum(one.nbytes for one in tensors if isinstance(one, Tensor))
    return run, cost_at(config, share).flops / read, size, 2 * config.depth * read * config.dim * dtype.itemsize


def planned(given: argparse.Namespace) -> dict[tuple[str, str], dict[int, Callable[..., Point]]]:
    """Points of each curve by size; a curve by what is measured and over which axis."""
    models: dict[str, Callable[..., Point]] = {"training": training, "decoding": decoding}
    if not given.presets:
        found: dict[tuple[str, str], dict[int, Callable[..., Point]]] = {
            ("layer", "N"): {size: partial(layer, size) for size in AXES["N"][1]}
        }
        *axes, nested = AXES
        sizes = AXES[nested][1]
        whole = small("N", sizes[-1])
        for what, make in models.items():
            for axis in axes:
                found[what, axis] = {size: partial(make, small(axis, size)) for size in AXES[axis][1]}
            found[what, nested] = {size: partial(make, whole, share=size / sizes[-1]) for size in sizes}
        return found
    vocabulary = {"vocab_size": given.vocab} if given.vocab else {}
    configs = {
        name: {size: preset_config(name, context_length=size, **vocabulary) for size in given.lengths}
        for name in given.presets
    }
    return {
        (f"{what}, `{name}`", "T"): {size: partial(models[what], config) for size, config in of_size.items()}
        for what in given.what
        for name, of_size in configs.items()
    }


def curves(given: argparse.Namespace, dtype: torch.dtype) -> Iterator[Curve]:
    """Measure all curves."""
    for (what, axis), points in planned(given).items():
        curve = []
        for size, make in points.items():
            run, *numbers = make(dtype, given.device)
            passed = median(take_turns({"run": run}, given.rounds, given.device, warmup=1)["run"])
            closed = dict(zip(("operations", "bytes", "closed_bytes"), numbers, strict=True))
            curve.append({"what": what, "axis": axis, "size": size, "seconds": float(f"{passed:.6g}"), **closed})
        yield curve


def exponent(curve: Curve, name: str) -> float:
    """Fit the slope of a column through the upper half of the points, in logarithms of both."""
    upper = curve[min(len(curve) // 2, len(curve) - 2) :]
    sizes, values = (np.log([row[key] for row in upper]) for key in ("size", name))
    return float(np.polyfit(sizes, values, 1)[0])


def lines_of(curve: Curve, dtype: str, columns: dict[str, tuple[str, str]]) -> Iterator[Line]:
    """Compare exponents of measured columns with those of the closed form."""
    for what, (measured, closed) in columns.items():
        mine, theirs = exponent(curve, measured), exponent(curve, closed)
        title = f"{curve[0]['what']}, {dtype}, {what} against {curve[0]['axis']}"
        if theirs > 0.1:
            yield Line(title, "the closed form", mine, theirs, "(exponent)", mine / theirs)
        else:
            mine, theirs = (curve[-1][name] / curve[0][name] for name in (measured, closed))
            yield Line(title, "the closed form", mine, theirs, "times", mine / theirs)


def measure(given: argparse.Namespace) -> tuple[list[Line], list[str]]:
    """Measure each dtype; write points and picture, or note the points of presets."""
    lines: list[Line] = []
    notes: list[str] = []
    columns = {"time": ("seconds", "operations")}
    columns |= {} if given.presets else {"memory": ("bytes", "closed_bytes")}
    for dtype in given.dtypes:
        found = list(curves(given, getattr(torch, dtype)))
        lines += [line for curve in found for line in lines_of(curve, dtype, columns)]
        rows = [row for curve in found for row in curve]
        if given.presets:
            numbers = "{what}, {dtype}, {size:,} tokens: {ms:.4g} ms, {mb:.3g} MB"
            notes += [
                numbers.format(**row, dtype=dtype, ms=1e3 * row["seconds"], mb=row["bytes"] / 1e6) for row in rows
            ]
            continue
        given.output.mkdir(parents=True, exist_ok=True)
        name = "scaling" if dtype == given.dtypes[0] else f"scaling-{dtype}"
        write_csv(given.output / f"{name}.csv", rows)
        labels = {axis: label for axis, (label, _) in AXES.items()}
        scaling_picture(found, labels, [exponent(one, "seconds") for one in found], given.output / f"{name}.png")
    return lines, notes


if __name__ == "__main__":
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--presets", nargs="+", default=[], help="measure language models over the lengths of a text")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 1024], help="of --presets, at least two")
    parser.add_argument("--what", nargs="+", default=["training", "decoding"], choices=["training", "decoding"])
    parser.add_argument("--vocab", type=int, help="of --presets; a small one does not hide the cost of the blocks")
    main("scaling-presets" if parser.parse_args().presets else "scaling", parser, measure)
