"""How time and memory grow with parameter tokens N, data tokens T and depth, beside the closed form of ``compute.py``.

    python benchmarks/speed_scaling.py [--rounds 3] [--dtypes float32] [--threads 2] [--device cpu]

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

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from side_by_side import Line, arguments, median, report, take_turns
from torch import Tensor, nn

from lit_tokenformer.cost import model_cost
from lit_tokenformer.models import Pattention, Tokenformer, TokenformerConfig, preset_config
from lit_tokenformer.tasks.losses import linear_cross_entropy

AXES = {
    "N": ("parameter tokens N", [2**power for power in range(8, 16)]),
    "T": ("data tokens T", [2**power for power in range(7, 14)]),
    "depth": ("layers", [1, 2, 4, 8, 16, 32]),
}
"""What is changed: its name in the picture, and its values."""
ROWS, WIDTH = 256, 256  # data tokens and width of the layer by itself


@dataclass
class Curve:
    """What was measured along an axis, a number for each of its values.

    Args:
        what: What was measured.
        axis: A name in ``AXES``.
        seconds: Medians.
        operations: In closed form.
        bytes: Measured memory.
        closed_bytes: Memory in closed form.
    """

    what: str
    axis: str
    seconds: list[float] = field(default_factory=list)
    operations: list[float] = field(default_factory=list)
    bytes: list[float] = field(default_factory=list)
    closed_bytes: list[float] = field(default_factory=list)

    @property
    def sizes(self) -> list[int]:
        """The values of the axis."""
        return AXES[self.axis][1]


@dataclass
class Point:
    """One measurement to be made: what is timed, and what the closed form and a count say of it."""

    run: Callable[[], object]
    operations: float
    bytes: float
    closed_bytes: float


def layer(axis: str, size: int, dtype: torch.dtype, device: str) -> Point:
    """Forward and backward pass of one layer with ``size`` parameter tokens."""
    torch.manual_seed(0)
    one = Pattention(WIDTH, WIDTH, size).to(device)
    x = torch.randn(ROWS, WIDTH, device=device, requires_grad=True)
    run = trained(one, lambda: one(x).sum(), dtype)
    return Point(run, 12 * ROWS * WIDTH * size, kept_bytes(one, run), dtype.itemsize * ROWS * (WIDTH + size))


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
    return Point(run, cost.training_flops, kept_bytes(model, run), dtype.itemsize * cost.kept)


def decoding(axis: str, size: int, dtype: torch.dtype, device: str) -> Point:
    """One more data token, of which the logits are wanted."""
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
    return Point(run, model_cost(config).flops / read, sum(one.nbytes for one in cached), numbers * dtype.itemsize)


def trained(model: nn.Module, loss: Callable[[], Tensor], dtype: torch.dtype) -> Callable[[], None]:
    """Forward and backward pass; autocast computes in ``dtype``, if it is not float32."""
    device = next(model.parameters()).device.type

    def run() -> None:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            found = loss()
        found.backward()
        model.zero_grad(set_to_none=True)

    return run


def kept_bytes(model: nn.Module, run: Callable[[], None]) -> int:
    """What is kept for the backward pass, without the parameters."""
    own = {one.untyped_storage().data_ptr() for one in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(one: Tensor) -> Tensor:
        storage = one.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return one

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
        run()
    return sum(kept.values())


MEASURED = (
    ("layer", "N", layer),
    *(("training", axis, training) for axis in AXES),
    *(("decoding", axis, decoding) for axis in AXES),
)


def curves(rounds: int, dtype: torch.dtype, device: str) -> Iterator[Curve]:
    """All that is measured."""
    for what, axis, make in MEASURED:
        curve = Curve(what, axis)
        for size in curve.sizes:
            point = make(axis, size, dtype, device)
            curve.seconds.append(median(take_turns({"run": point.run}, rounds, device, warmup=1)["run"]))
            curve.operations.append(point.operations)
            curve.bytes.append(point.bytes)
            curve.closed_bytes.append(point.closed_bytes)
        yield curve


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """The slope through the upper half of the points, in logarithms of both."""
    half = len(sizes) // 2
    return float(np.polyfit(np.log(sizes[half:]), np.log(values[half:]), 1)[0])


def lines_of(found: Sequence[Curve], dtype: str) -> Iterator[Line]:
    """The exponents, measured and in closed form."""
    for curve in found:
        memory = "memory of the cache" if curve.what == "decoding" else "memory kept"
        pairs = (("time", curve.seconds, curve.operations), (memory, curve.bytes, curve.closed_bytes))
        for what, measured, closed in pairs:
            mine, theirs = exponent(curve.sizes, measured), exponent(curve.sizes, closed)
            title = f"{curve.what}, {dtype}, {what} against {curve.axis}"
            if theirs > 0.01:  # a cache does not grow with N
                yield Line(title, "the closed form", mine, theirs, "(exponent)", mine / theirs)


def draw(found: Sequence[Curve], file: Path) -> None:
    """Time above and memory below, a column for each axis."""
    colours = {"layer": "tab:green", "training": "tab:blue", "decoding": "tab:orange"}
    names = {"layer": "one layer, forward + backward", "training": "training step", "decoding": "decoding one token"}
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.5), sharex="col", sharey="row")
    for column, (axis, (label, _)) in enumerate(AXES.items()):
        upper, lower = axes[:, column]
        for curve in (one for one in found if one.axis == axis):
            colour, sizes = colours[curve.what], curve.sizes
            speed = curve.operations[-1] / curve.seconds[-1]
            closed = [1000 * one / speed for one in curve.operations]
            given = {"color": colour, "marker": "o", "markersize": 4}
            upper.plot(sizes, [1000 * one for one in curve.seconds], label=names[curve.what], **given)
            upper.plot(sizes, closed, color=colour, linestyle="--", linewidth=1)
            lower.plot(sizes, [one / 1e6 for one in curve.bytes], **given)
            lower.plot(sizes, [one / 1e6 for one in curve.closed_bytes], color=colour, linestyle="--", linewidth=1)
            place = (sizes[-1], 1000 * curve.seconds[-1])
            text = f"{exponent(sizes, curve.seconds):.2f}"
            upper.annotate(text, place, xytext=(0, 6), textcoords="offset points", ha="right", color=colour)
        upper.plot([], [], color="k", linestyle="--", linewidth=1, label="closed form")
        for one in (upper, lower):
            one.set_xscale("log", base=2)
            one.set_yscale("log")
            one.grid(alpha=0.3)
            one.margins(y=0.12)
        upper.legend(loc="upper left", fontsize=8)
        lower.set_xlabel(label)
    axes[0, 0].set_ylabel("time (ms); number: exponent of the upper half")
    axes[1, 0].set_ylabel("kept for backward, or cache (MB)")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def write(found: Sequence[Curve], file: Path) -> None:
    """The points, a row each."""
    with file.open("w", newline="", encoding="utf-8") as target:
        rows = csv.writer(target, lineterminator="\n")
        rows.writerow(["what", "axis", "size", "seconds", "operations", "bytes", "closed_bytes"])
        for one in found:
            columns = zip(one.sizes, one.seconds, one.operations, one.bytes, one.closed_bytes, strict=True)
            rows.writerows([one.what, one.axis, size, f"{seconds:.6g}", *rest] for size, seconds, *rest in columns)


if __name__ == "__main__":
    given = arguments(__doc__, rounds=3).parse_args()
    torch.set_num_threads(given.threads)
    lines = []
    for dtype in given.dtypes:
        found = list(curves(given.rounds, getattr(torch, dtype), given.device))
        lines += lines_of(found, dtype)
        given.output.mkdir(parents=True, exist_ok=True)
        name = "scaling" if dtype == given.dtypes[0] else f"scaling-{dtype}"
        write(found, given.output / f"{name}.csv")
        draw(found, given.output / f"{name}.png")
    report("scaling", lines, given.rounds, given.device, given.output)
