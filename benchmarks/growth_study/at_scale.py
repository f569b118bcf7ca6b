"""The published growth ladder, 124M to 1.4B on 300B tokens, on paper; prints tables in Markdown.

    python -m benchmarks.growth_study.at_scale

FLOPs are those of ``cost.py`` for the presets ``tokenformer_owt_*`` (context 1,024, vocabulary 50,304).
Perplexities and TPU hours are published (arXiv 2410.23168, Tables 6 and 7, Figures 3 and 4). What growth is worth is
assumed: a grown model is worth what a model of its size from scratch with the same loss is worth (inheritance by loss
alone), and losses follow a law that was fitted to other models on other data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np

from lit_tokenformer.comparison.results import table
from lit_tokenformer.cost import model_cost
from lit_tokenformer.models import preset_config

OPTIMAL = 20
"""Tokens for each parameter of a compute-optimal training (arXiv 2203.15556)."""
BUDGET, EXTRA = 300e9, (15e9, 30e9, 60e9)
"""Tokens of the published trainings from scratch, and of each further stage of the published ladder."""
SHARES = [(0.02, 0.05, 0.1), (0.05, 0.1, 0.2), (0.1, 0.25, 0.5), (0.25, 0.5, 0.75), (0.7, 0.8, 0.9)]
"""Growths on one budget, as shares of its tokens."""
TRANSFORMER = {"354M": (13.02, 15.97, 4200), "757M": (11.99, 13.78, 7400), "1.4B": (11.63, 13.34, 11650)}
"""Perplexity from scratch after 300B and 30B tokens, and TPU hours for 300B."""
GROWN = {"354M": (14.58, 14.02, 13.59), "757M": (13.08, 12.59, 12.28), "1.4B": (12.14, 11.77, 11.60)}
"""Perplexity after the tokens of ``EXTRA`` in each stage."""
HOURS = {"354M": (1900, 2100, 2500), "757M": (2250, 2830, 3900), "1.4B": (2650, 3950, 6150)}
"""TPU hours of all stages, the first one included."""


class Size(NamedTuple):
    """A model on the ladder.

    Args:
        name: As published.
        parameters: Trainable parameters, N.
        flops: Training FLOPs per data token.
    """

    name: str
    parameters: int
    flops: float


class Law(NamedTuple):
    """L = E + A / N^alpha + B / D^beta: the loss of N parameters after training from scratch on D tokens."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, size: Size, tokens: float) -> float:
        """Nats per token."""
        return self.E + self.A / size.parameters**self.alpha + self.B / tokens**self.beta

    def tokens(self, size: Size, loss: Any) -> Any:
        """Tokens from scratch after which a model has a loss, or each of an array; infinite where it never has."""
        gap = np.asarray(loss) - self.E - self.A / size.parameters**self.alpha
        return np.where(gap > 0, (self.B / np.where(gap > 0, gap, 1)) ** (1 / self.beta), np.inf)


HOFFMANN = Law(1.69, 406.4, 410.7, 0.34, 0.28)
"""Hoffmann et al., arXiv 2203.15556, approach 3."""
BESIROGLU = Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658)
"""The same data fitted once more by Besiroglu et al., arXiv 2404.10102."""


def size(name: str, preset: str, tokens: dict[str, int] | None = None) -> Size:
    """Cost of a preset, at its own or at other numbers of parameter tokens."""
    cost = model_cost(preset_config(preset), tokens)
    return Size(name, cost.parameters, cost.training_flops / cost.data_tokens)


LADDER = [size(name, f"tokenformer_owt_{name.lower().replace('.', '_')}") for name in ("124M", "354M", "757M", "1.4B")]
COUNTS = np.geomspace(9, 8620, 150).round().astype(int).tolist()
EVERY_SIZE = [size("", "tokenformer_owt_124m", {"qkv": n, "proj": n, "ffn": 4 * n}) for n in COUNTS]
"""Sizes from 40M to 1.4B of the same width and depth, in steps of some 5 % of the parameter tokens."""


def flops(sizes: Sequence[Size], stages: Iterable[float]) -> float:
    """FLOPs of stages of these tokens."""
    return sum(one.flops * tokens for one, tokens in zip(sizes, stages, strict=True))


def grown_loss(law: Law, sizes: Sequence[Size], stages: Sequence[float]) -> float:
    """Loss of the last size, each inheriting by loss alone and trained on the tokens of its stage."""
    loss = law.loss(sizes[0], stages[0])
    for one, tokens in zip(sizes[1:], stages[1:], strict=True):
        loss = law.loss(one, law.tokens(one, loss) + tokens)
    return loss


def cheapest(law: Law, sizes: Sequence[Size], target: float, begin: float = math.inf) -> list[float]:
    """Tokens of each size on the cheapest way to a loss: each decrement by the size for which it costs least.

    Args:
        law: Law of the loss.
        sizes: In rising order; the last one reaches the target.
        target: The loss where it ends.
        begin: The loss where it begins; infinite before any training.
    """
    last = sizes[-1]
    if begin <= target:
        return [0.0] * len(sizes)
    first = 1e3 if math.isinf(begin) else law.tokens(last, begin)
    losses = law.loss(last, np.geomspace(first, law.tokens(last, target), 20_001))  # type: ignore[arg-type]
    with np.errstate(invalid="ignore"):
        steps = np.diff([law.tokens(one, losses) for one in sizes])  # (sizes, losses - 1)
    costs = np.array([[one.flops] for one in sizes]) * np.where(np.isnan(steps), np.inf, steps)
    best = costs.argmin(axis=0)
    assert (np.diff(best) >= 0).all(), "a model cannot shrink"
    return [float(step[best == number].sum()) for number, step in enumerate(steps)]


def show(title: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table."""
    print(f"\n{title}\n\n{table([dict(zip(head, row, strict=True)) for row in rows])}", end="")


def row_of(values: Iterable[float], form: str) -> str:
    """Join several numbers in one cell."""
    return " / ".join(format(value, form) for value in values)


def published() -> None:
    """Show FLOPs and results of the published ladder."""
    costs, results, gaps = [], [], []
    for number, one in enumerate(LADDER):
        path, whole = LADDER[: number + 1], one.flops * BUDGET
        shares = [[flops(path, [base, *[extra] * number]) / whole for extra in EXTRA] for base in (300e9, 60e9)]
        cells = [row_of(ways if number else ways[:1], ".0%") for ways in shares]
        costs.append([one.name, f"{one.parameters:,}", f"{one.flops / 1e9:.2f}", f"{whole:.2e}", *cells])
        if number:
            long, short, hours = TRANSFORMER[one.name]
            spent = row_of((value / hours for value in HOURS[one.name]), ".0%")
            results.append([one.name, long, short, row_of(GROWN[one.name], ".2f"), spent, cells[0]])
            ladders = [grown_loss(HOFFMANN, path, [BUDGET, *[extra] * number]) for extra in EXTRA]
            law = [loss - HOFFMANN.loss(one, BUDGET) for loss in (HOFFMANN.loss(one, 30e9), *ladders)]
            found = [math.log(value / long) for value in (short, *GROWN[one.name])]
            gaps.append([one.name, *(row_of(g, "+.3f") for g in (found[:1], law[:1], found[1:], law[1:]))])
    head = ["size", "parameters", "training GFLOPs a token", "FLOPs, 300B tokens"]
    head += ["ladder of it, 124M on 300B", "ladder of it, 124M on 60B"]
    show("Computed: all stages together, with 15B / 30B / 60B tokens in each further one:", head, costs)
    head = ["size", "Transformer, 300B", "Transformer, 30B", "grown, 15B / 30B / 60B", "share of TPU hours"]
    show("Published: perplexity and hours; computed: FLOPs:", [*head, "share of FLOPs"], results)
    head = [
        "size",
        "30B from scratch, published",
        "by the law",
        "grown, 15B / 30B / 60B, published",
        "grown, by the law",
    ]
    show("Nats above those of 300B tokens from scratch:", [*head, "grown, by the law"], gaps)


def on_paper() -> None:
    """Show one budget of tokens, and the cheapest ways to grow."""
    last, budgets, ways, existing = LADDER[-1], [], [], []
    for shares in SHARES:
        stages = [(end - begin) * BUDGET for begin, end in pairwise((0.0, *shares, 1.0))]
        loss, cost = grown_loss(HOFFMANN, LADDER, stages), flops(LADDER, stages) / (last.flops * BUDGET)
        worth = float(HOFFMANN.tokens(last, loss)) / BUDGET
        gap = f"{loss - HOFFMANN.loss(last, BUDGET):+.3f}"
        budgets.append([row_of(shares, ".0%"), f"{cost:.1%}", gap, f"{worth:.1%}", f"{cost / worth:.2f}"])
    head = ["growth after", "FLOPs (computed)", "nats", "share of 300B tokens that it is worth", "FLOPs for that worth"]
    show("To 1.4B on 300B tokens in total, against from scratch:", head, budgets)

    for number, one in enumerate(LADDER[1:], 1):
        path, before = LADDER[: number + 1], LADDER[number - 1]
        every = [*(step for step in EVERY_SIZE if step.parameters < one.parameters), one]
        for tokens in (OPTIMAL * one.parameters, BUDGET):
            whole, found, left = one.flops * tokens, [], []
            for law in (HOFFMANN, BESIROGLU):
                target = law.loss(one, tokens)
                found += [flops(sizes, cheapest(law, sizes, target)) / whole for sizes in (path, every)]
                for had in (tokens, 4 * OPTIMAL * before.parameters):
                    stages = cheapest(law, [before, one], target, law.loss(before, had))
                    left.append(flops([before, one], stages) / whole)
            stages = cheapest(HOFFMANN, path, HOFFMANN.loss(one, tokens))
            ends = row_of((end / sum(stages) for end in list(accumulate(stages))[:-1]), ".0%")
            cells = row_of((stage / 1e9 for stage in stages), ".1f")
            ways.append([one.name, f"{tokens / 1e9:.1f}B", cells, ends, *(f"{ratio:.3f}" for ratio in found)])
            more = f"{4 * OPTIMAL * before.parameters / 1e9:.1f}B"
            ratios = [row_of(left[case::2], ".2f") for case in (0, 1)]
            existing.append([f"{before.name} to {one.name}", f"{tokens / 1e9:.1f}B", ratios[0], more, ratios[1]])
    head = ["size", "tokens from scratch", "stages (B tokens)", "growth after", "FLOPs", "FLOPs, every size"]
    head += ["FLOPs, other fit", "FLOPs, every size, other fit"]
    show("The cheapest growth to the loss of from scratch, of its FLOPs:", head, ways)
    head = ["growth", "tokens from scratch", "FLOPs if the smaller one had as many", "if it had", "FLOPs then"]
    show("From a model that exists to the loss of from scratch, of its FLOPs (both fits):", head, existing)


if __name__ == "__main__":
    published()
    on_paper()
