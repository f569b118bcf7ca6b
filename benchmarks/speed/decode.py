"""Greedy decoding: tokens per second, against transformers' ``generate`` and against the memory bandwidth.

    python -m benchmarks.speed.decode [--dtypes float32 bfloat16] [--batch 1] [--compile] [--quantize int8 int4]

Ours is ``generate_tokens`` on ``tokenformer_owt_124m``, also compiled (``--compile``) and with quantized weights, and
32 prompts at once in slots; theirs is ``generate`` with its default cache, or with a static one on a GPU with
``--compile``, on a ``GPTNeoXForCausalLM`` of equal width, depth, heads and vocabulary, whose 3,072 hidden units make a
decoded token take as many FLOPs, so both read equally many weights. Both have random weights in the same dtype, decode
greedily without an end token, and go from 32 to 512 tokens; the prompt is not timed. They take turns of 32 tokens:
theirs waits in its streamer meanwhile. 32 prompts take turns of 4 tokens each.

The bandwidth is that of the sum of a float32 matrix of 1.6 GB (the fastest pass over the memory in torch), once per
turn. A model that only read its weights would decode bandwidth / bytes tokens per second.
The last line is the bound of the bare products: each of our weight matrices times a vector, in the same dtype.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import GPTNeoXForCausalLM
from transformers.generation.streamers import BaseStreamer

from benchmarks.speed.lines import Line
from benchmarks.speed.quantization import weight_bytes
from benchmarks.speed.timing import arguments, main, median, ratio, seconds
from benchmarks.speed.training import neox_config
from lit_tokenformer.inference.batching import SlotDecoder
from lit_tokenformer.inference.quantization import quantize
from lit_tokenformer.inference.readers import compile_step
from lit_tokenformer.inference.sampling import Sampling, generate_tokens
from lit_tokenformer.models import Tokenformer, create_backbone

PRESET = "tokenformer_owt_124m"
FIRST, LAST, TURN = 32, 512, 32  # tokens of the text when the clock starts, when it stops, and of a turn
PASS = (98_304, 4096)  # the matrix that the bandwidth is measured with


class Turns(BaseStreamer):
    """Call a function between two turns of ``generate``, the first time before the first turn.

    Args:
        between: Called with the seconds of the turn, ``None`` the first time.
    """

    def __init__(self, between: Callable[[float | None], None]) -> None:
        self.between = between
        self.tokens = 0
        self.start = 0.0

    def put(self, value: torch.Tensor) -> None:
        """Receive the prompts (B, T), then each token (B,); all are on the CPU, so the device has finished."""
        self.tokens += value.shape[1] if value.ndim == 2 else 1
        if self.tokens >= FIRST and (self.tokens - FIRST) % TURN == 0:
            self.between(None if self.tokens == FIRST else time.perf_counter() - self.start)
            self.start = time.perf_counter()

    def end(self) -> None:
        """Do nothing."""


@torch.inference_mode()
def multiply(weights: Sequence[torch.Tensor], vectors: torch.Tensor) -> None:
    """Multiply each weight (N, D) with one vector (D,) or several (D, B)."""
    for weight in weights:
        torch.matmul(weight, vectors)


class Variant(NamedTuple):
    """A way to decode.

    Args:
        model: Model, for the size of its weights.
        steps: Yields the next tokens; ``None`` for transformers' model, which calls back instead.
        batch: Texts decoded at once.
        turn: Tokens of each text in a turn; the seconds are scaled to ``TURN``.
    """

    model: nn.Module
    steps: Iterator[object] | None
    batch: int = 1
    turn: int = TURN


def variants(ours: Tokenformer, given: argparse.Namespace, prompt: torch.Tensor) -> dict[str, Variant]:
    """Build our ways to decode: as it is, compiled, quantized, and many texts at once."""
    count, greedy = given.last - FIRST + 1, Sampling(temperature=0)

    def steps(model: Tokenformer, compiled: bool = False) -> Iterator[object]:
        return generate_tokens(model, list(prompt), count, greedy, step=compile_step(model) if compiled else None)

    batch = len(prompt)
    found = {"eager": Variant(ours, steps(ours), batch)}
    if given.compile:
        model = copy.deepcopy(ours)  # a compiled step stores weights in another order
        found["compiled"] = Variant(model, steps(model, compiled=True), batch)
    for scheme in given.quantize:
        model = quantize(copy.deepcopy(ours), scheme)
        found[scheme] = Variant(model, steps(model), batch)
        if given.compile:
            model = copy.deepcopy(model)
            found[f"{scheme}, compiled"] = Variant(model, steps(model, compiled=True), batch)
    if given.together > 1:
        many = torch.randint(ours.config.vocab_size, (given.together, FIRST - 1))
        decoder = SlotDecoder(ours, list(many), given.together, count, greedy)
        found["together"] = Variant(ours, decoder, given.together, max(1, TURN // 8))
    return found


def texts(
    ours: Tokenformer, theirs: GPTNeoXForCausalLM, matrix: torch.Tensor, given: argparse.Namespace
) -> tuple[dict[str, Variant], dict[str, list[float]]]:
    """Time every turn of a text in all variants, and in each turn a pass over the memory and the bare products."""
    device = str(theirs.device)
    prompt = torch.randint(ours.config.vocab_size, (given.batch, FIRST - 1))  # the token after it starts the clock
    ways = variants(ours, given, prompt)
    weights = [weight for weight in ours.parameters() if weight.ndim == 2]
    shape = (ours.config.dim,) if given.batch == 1 else (ours.config.dim, given.batch)
    vectors = weights[0].new_ones(shape)
    taken: dict[str, list[float]] = {name: [] for name in (*ways, "theirs", "pass", "products")}

    def advance(way: Variant, count: int) -> None:
        for _ in range(count):
            next(way.steps)  # type: ignore[arg-type]

    def between(passed: float | None) -> None:
        if passed is None:
            for way in ways.values():
                advance(way, 1)
            return
        taken["theirs"].append(passed)
        order = list(ways.items())
        for name, way in order if len(taken["theirs"]) % 2 else order[::-1]:
            taken[name].append(seconds(partial(advance, way, way.turn), device) * TURN / way.turn)
        taken["pass"].append(seconds(matrix.sum, device))
        taken["products"].append(seconds(lambda: multiply(weights, vectors), device))

    theirs.generate(
        prompt.to(device),
        attention_mask=torch.ones_like(prompt, device=device),
        max_new_tokens=given.last - FIRST + 1,
        do_sample=False,
        **({"cache_implementation": "static"} if given.compile and device.startswith("cuda") else {}),
        streamer=Turns(between),
    )
    return ways, taken


def compare(dtype: str, given: argparse.Namespace) -> list[Line]:
    """Measure one dtype: ``given.rounds`` texts up to ``given.last`` data tokens."""
    ours = create_backbone(given.preset).eval().requires_grad_(False).to(given.device, getattr(torch, dtype))
    tokens: Any = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    # tied as ours: an embedding alone is not read whole, and would count as bandwidth
    config = neox_config(ours.config, tie_word_embeddings=True, **tokens)
    theirs = GPTNeoXForCausalLM(config).eval().requires_grad_(False).to(given.device, getattr(torch, dtype))
    matrix = torch.ones(given.rows, PASS[1], device=given.device)
    taken: dict[str, list[float]] = {}
    for _ in range(given.rounds):
        ways, passed = texts(ours, theirs, matrix, given)
        for name, found in passed.items():
            taken.setdefault(name, []).extend(found)
    ways["theirs"] = Variant(theirs, None, given.batch)
    what, bandwidth = f"{dtype}, {FIRST} to {given.last} tokens", matrix.nbytes / median(taken["pass"])
    speeds = {name: way.batch * TURN / median(taken[name]) for name, way in ways.items()}
    lines = []
    for name, way in ways.items():
        who = "GPT-NeoX" if name == "theirs" else f"{given.preset}, {name}"
        who += f", {way.batch} texts" if way.batch > 1 else ""
        size = weight_bytes(way.model)
        bound = [TURN * size / matrix.nbytes * one for one in taken["pass"]]  # seconds to read the weights only
        if name == "together":
            gain = way.batch / given.batch * ratio(taken["eager"], taken[name])
            lines.append(Line(f"{who}, {what}", "one text", speeds[name], speeds["eager"], "tokens/s", gain, ">= 8"))
            continue
        if name != "theirs":
            goal = ">= 1.1" if given.batch == 1 else ""
            gain = ratio(taken["theirs"], taken[name])
            lines.append(Line(f"{who}, {what}", "GPT-NeoX", speeds[name], speeds["theirs"], "tokens/s", gain, goal))
        scheme, *compiled = name.split(", ")
        if scheme in given.quantize:
            goal = ">= 1.8" if scheme == "int8" and dtype == "bfloat16" and given.batch == 1 else ""
            for plain in ("eager", "compiled") if compiled else ("eager",):
                gain = ratio(taken[plain], taken[name])
                against = f"{dtype}, {plain}"
                lines.append(Line(f"{who}, {what}", against, speeds[name], speeds[plain], "tokens/s", gain, goal))
        limit = f"bandwidth / weights ({bandwidth / 1e9:.1f} GB/s / {size / 1e6:.0f} MB)"
        best, share = way.batch * TURN / median(bound), ratio(bound, taken[name])
        goal = ">= 0.7" if name == ("compiled" if given.compile else "eager") and given.batch == 1 else ""
        lines.append(Line(f"{who}, {what}", limit, speeds[name], best, "tokens/s", share, goal))
    bare = [TURN * one for one in taken["products"]]
    size = weight_bytes(ours)
    bound = [TURN * size / matrix.nbytes * one for one in taken["pass"]]
    speed = [given.batch * TURN / median(one) for one in (bare, bound)]
    limit = f"bandwidth / weights ({bandwidth / 1e9:.1f} GB/s / {size / 1e6:.0f} MB)"
    return [*lines, Line(f"bare products, {what}", limit, speed[0], speed[1], "tokens/s", ratio(bound, bare))]


def measure(given: argparse.Namespace) -> tuple[list[Line], list[str]]:
    """Measure each dtype."""
    return [line for dtype in given.dtypes for line in compare(dtype, given)], []


if __name__ == "__main__":
    parser = arguments(__doc__, rounds=3, dtypes=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, default=1, help="texts at once")
    parser.add_argument("--compile", action="store_true", help="measure the compiled step too")
    parser.add_argument("--quantize", nargs="*", default=["int8"], help="schemes to measure too: int8 int4")
    parser.add_argument("--together", type=int, default=32, help="prompts in slots, against one; 1 for none")
    parser.add_argument("--preset", default=PRESET)
    parser.add_argument("--last", type=int, default=LAST, help="data tokens when the clock stops")
    parser.add_argument("--rows", type=int, default=PASS[0], help="rows of the matrix of the bandwidth")
    main("decode", parser, measure)
