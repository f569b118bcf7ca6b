"""Greedy decoding: tokens per second, against transformers' ``generate`` and against the memory bandwidth.

    python -m benchmarks.speed.decode [--dtypes float32 bfloat16] [--batch 1]

Ours is ``generate_tokens`` on ``tokenformer_owt_124m``; theirs is ``generate`` with its default cache on a
``GPTNeoXForCausalLM`` of equal width, depth, heads and vocabulary, whose 3,072 hidden units make a decoded token take
as many FLOPs, so both read equally many weights. Both have random weights in the same dtype, decode greedily without an
end token, and go from 32 to 512 tokens; the prompt is not timed. They take turns of 32 tokens: theirs waits in its
streamer meanwhile.

The bandwidth is that of one product of a float32 matrix of 1.6 GB with a vector (rows of 16 KiB: the fastest pass over
the memory in torch), once per turn. A model that only read its weights would decode bandwidth / bytes tokens per
second. The last line is the bound of the bare products: each of our weight matrices times a vector, in the same dtype.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from transformers import GPTNeoXForCausalLM
from transformers.generation.streamers import BaseStreamer

from benchmarks.speed.lines import Line
from benchmarks.speed.timing import arguments, main, median, ratio, seconds
from benchmarks.speed.training import neox_config
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


def texts(
    ours: Tokenformer, theirs: GPTNeoXForCausalLM, matrix: torch.Tensor, batch: int, last: int
) -> dict[str, list[float]]:
    """Time every turn of a batch of texts, and in each turn a pass over the memory and the bare products."""
    device = str(theirs.device)
    prompt = torch.randint(ours.config.vocab_size, (batch, FIRST - 1))  # the token after it starts the clock
    steps = generate_tokens(ours, list(prompt), last - FIRST + 1, Sampling(temperature=0))
    weights = [weight for weight in ours.parameters() if weight.ndim == 2]
    shape = (ours.config.dim,) if batch == 1 else (ours.config.dim, batch)
    vectors, row = weights[0].new_ones(shape), matrix.new_ones(matrix.shape[1])
    taken: dict[str, list[float]] = {"ours": [], "theirs": [], "pass": [], "products": []}

    def between(passed: float | None) -> None:
        if passed is None:
            next(steps)
            return
        taken["theirs"].append(passed)
        taken["ours"].append(seconds(lambda: [next(steps) for _ in range(TURN)], device))
        taken["pass"].append(seconds(lambda: torch.mv(matrix, row), device))
        taken["products"].append(seconds(lambda: multiply(weights, vectors), device))

    theirs.generate(
        prompt.to(device),
        attention_mask=torch.ones_like(prompt, device=device),
        max_new_tokens=last - FIRST + 1,
        do_sample=False,
        streamer=Turns(between),
    )
    return taken


def compare(
    dtype: str, device: str, rounds: int, batch: int = 1, preset: str = PRESET, last: int = LAST, rows: int = PASS[0]
) -> list[Line]:
    """Measure one dtype: ``rounds`` batches of texts up to ``last`` data tokens; the matrix has ``rows`` rows."""
    ours = create_backbone(preset).eval().requires_grad_(False).to(device, getattr(torch, dtype))
    config = neox_config(ours.config, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    theirs = GPTNeoXForCausalLM(config).eval().requires_grad_(False).to(device, getattr(torch, dtype))
    matrix = torch.ones(rows, PASS[1], device=device)
    taken: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, found in texts(ours, theirs, matrix, batch, last).items():
            taken.setdefault(name, []).extend(found)
    size = sum(weight.nbytes for weight in ours.parameters())
    bound = [TURN * size / matrix.nbytes * one for one in taken["pass"]]  # seconds of a turn that only reads weights
    bare = [TURN * one for one in taken["products"]]
    speed, their_speed, bound_speed, bare_speed = (
        batch * TURN / median(one) for one in (taken["ours"], taken["theirs"], bound, bare)
    )
    what = f"{dtype}, {f'batch {batch}, ' if batch > 1 else ''}{FIRST} to {last} tokens"
    limit = f"bandwidth / weights ({matrix.nbytes / median(taken['pass']) / 1e9:.1f} GB/s / {size / 1e6:.0f} MB)"
    goals = (">= 1.1", ">= 0.7") if batch == 1 else ("", "")
    lines = [
        (f"{preset}, {what}", "GPT-NeoX", speed, their_speed, ratio(taken["theirs"], taken["ours"]), goals[0]),
        (f"{preset}, {what}", limit, speed, bound_speed, ratio(bound, taken["ours"]), goals[1]),
        (f"GPT-NeoX, {what}", limit, their_speed, bound_speed, ratio(bound, taken["theirs"]), ""),
        (f"bare products, {what}", limit, bare_speed, bound_speed, ratio(bound, bare), ""),
    ]
    return [Line(name, against, a, b, "tokens/s", share, goal) for name, against, a, b, share, goal in lines]


def measure(given: argparse.Namespace) -> tuple[list[Line], list[str]]:
    """Measure each dtype."""
    return [line for dtype in given.dtypes for line in compare(dtype, given.device, given.rounds, given.batch)], []


if __name__ == "__main__":
    parser = arguments(__doc__, rounds=3, dtypes=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, default=1, help="texts at once")
    main("decode", parser, measure)
