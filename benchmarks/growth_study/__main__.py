"""Growth study: train grown models and their controls on equal budgets of training FLOPs; write tables and pictures.

    python -m benchmarks.growth_study OUTPUT [--domains text images] [--reduced] [--root FOLDER] [--seeds 0 1 2]
        [--jobs 2] [--logs FOLDER] [--phases search final family] [--draw-only]

OUTPUT is a folder. In the order of the work, for each domain:

1. the search, in the first domain: growth policies that differ from the first in one factor, on 0.65 C, one seed. What
   won on text is the group ``grown`` of ``arms.yaml``;
2. every arm tries three learning rates on a quarter of its budget, and the best of them and half of it on all of its
   budget, since longer runs want smaller rates; the sizes of the ladder on half of it too. The final size must be the
   best of them at C, or a comparison at C says nothing;
3. the winner at several shares of C and all controls, with every seed;
4. the family: a size is trained to its end, then grown and trained on.

``--reduced`` is text with the most important arms, one seed, and the learning rates that step 2 found: the same fits as
in the whole study, in less than ten minutes on two cores. Fashion-MNIST is read from ``--root`` (FashionMNIST/raw below
it). Each fit is a process of its own that runs the project's command line; finished fits with the same settings in
``--logs`` are reused, so an interrupted study resumes. Needs matplotlib (``pip install -e '.[dev]'``).
"""

from __future__ import annotations

import argparse
import copy
import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.growth_study.arms import (
    DOMAINS,
    Arm,
    Domain,
    controls,
    family_steps,
    few_patches,
    load_arms,
    policies,
)
from benchmarks.growth_study.outcome import Outcome, Recorded, mean_loss
from benchmarks.growth_study.results_files import write
from lit_tokenformer.comparison.fits import Fit, Runner
from lit_tokenformer.comparison.meter import MEASURED

SHARES = (0.45, 0.65, 0.85)
"""Shares of C at which the grown model is trained, to find where it reaches the loss of the control."""
FAMILY = ((0.5, 1.0), (0.5, 0.5), (0.75, 1.0))
"""Costs of a further size, as shares of its cost from scratch, with multiples of the smaller one's rate."""

PHASES = ("search", "final", "family")
"""Phases that can be skipped."""


class Study:
    """Fits of one domain; those in ``recorded``, by :func:`key_of`, are not repeated."""

    def __init__(
        self,
        name: str,
        domain: Domain,
        options: argparse.Namespace,
        runner: Runner,
        recorded: Mapping[tuple[Any, ...], Recorded] | None = None,
    ) -> None:
        self.name, self.domain, self.options, self.runner = name, domain, options, runner
        self.recorded = recorded or {}
        self.outcomes: list[Outcome] = []

    def train(self, phase: str, arms: Sequence[Arm], seeds: Sequence[int], evaluations: int = 6) -> list[Outcome]:
        """Train arms, or read their results."""
        fits: list[tuple[Arm, int, Fit | Recorded]] = []
        for arm in arms:
            for seed in seeds[:1] if arm.once else seeds:
                config = arm.fit(self.domain, seed, evaluations)
                fit = self.runner.fit(f"{self.name} {arm.name}", f"{phase}, seed {seed}", config)
                key = key_of(arm.name, arm.share, arm.lr * arm.rate_factor, seed, arm.steps(self.domain))
                known = self.recorded.get(key)
                fits.append((arm, seed, known if known and not (fit.folder / MEASURED).exists() else fit))
        self.runner.run([fit for *_, fit in fits if isinstance(fit, Fit)])
        found = [Outcome(self.name, phase, arm, seed, fit.result, fit.folder) for arm, seed, fit in fits]
        self.outcomes += found
        return found

    def with_rates(self, arms: Sequence[Arm]) -> list[Arm]:
        """Set the learning rate of each arm to the best after a quarter of its budget."""
        tried = [replace(arm, lr=rate, share=arm.share / 4) for arm in arms for rate in self.domain.rates]
        found = self.train("learning rate", tried, self.options.seeds[:1], evaluations=1)
        return [replace(arm, lr=best([one for one in found if one.arm.name == arm.name]).lr) for arm in arms]

    def halved(self, arms: Sequence[Arm], evaluations: int = 6) -> list[Arm]:
        """Set the learning rate of each arm to the better of itself and its half at the end of the budget."""
        tried = [replace(arm, lr=arm.lr * factor) for arm in arms for factor in (1, 0.5)]
        found = self.train("learning rate", tried, self.options.seeds[:1], evaluations)
        return [best([one for one in found if one.arm.name == arm.name]) for arm in arms]

    def run(self) -> None:
        """Run all phases."""
        domain, seeds, first = self.domain, self.options.seeds, self.options.seeds[:1]
        groups = load_arms(domain)
        if self.options.reduced:
            self.train("final", groups["reduced"], seeds)
            return
        if "search" in self.options.phases and self.name == self.options.domains[0]:
            (base,) = self.with_rates(groups["base"])
            self.train("search", [base, *(replace(arm, lr=base.lr) for arm in policies(domain))], first)
        *known, grown = self.with_rates([*controls(domain), *groups["grown"]])
        self.halved([replace(arm, share=0.5) for arm in known if is_size(arm)], evaluations=2)
        *known, grown = self.halved([*known, grown])
        if "final" in self.options.phases:
            self.train("final", [replace(grown, share=share) for share in SHARES], seeds)
            self.train("final", [*(replace(arm, lr=grown.lr) for arm in groups["tokens"]), *known], seeds)
            if "image_size" in domain.of_data:
                few, scratch = self.halved([few_patches(grown), few_patches(known[0])])
                self.train("final", [replace(few, share=0.5), few, scratch], seeds)
                fewer = [replace(few_patches(arm, left=4), lr=few.lr) for arm in (grown, known[0])]
                self.train("final", fewer, seeds)
        if "family" in self.options.phases:
            self.train("family", self.family(grown, known), seeds)

    def family(self, winner: Arm, known: Sequence[Arm]) -> list[Arm]:
        """Build the arms of the family: a smaller size, trained to its end on the tokens of the final one, then grown.

        All take the learning rate of the second of the sizes from scratch (``known``), of which the final is the first.
        """
        steps = known[0].steps(self.domain)
        return [
            Arm(
                f"family: {small} to {large} at {cost:.0%}" + (", half the rate" if factor == 0.5 else ""),
                sizes,
                (1 / (1 + cost),),
                winner.growth if "way" not in winner.growth else {},
                {"warmup": 0.05},
                restart=True,
                length=round(steps * (1 + cost)),
                lr=known[1].lr,
                rate_at_growth=factor,
            )
            for (small, large), sizes in family_steps(self.domain).items()
            for cost, factor in FAMILY
        ]


def key_of(name: str, share: Any, lr: Any, seed: Any, steps: Any) -> tuple[Any, ...]:
    """Identify a fit within a study: name of the arm, share of the budget, learning rate, seed, steps."""
    return name, round(float(share), 6), round(float(lr), 9), int(seed), int(steps)


def read_recorded(file: Path) -> dict[tuple[Any, ...], Recorded]:
    """Read the finished fits of a table, by :func:`key_of`; a non-finite loss is a result."""
    with file.open(newline="", encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if row["steps"]]
    return {
        key_of(*(row[name] for name in ("arm", "share_of_budget", "lr", "seed", "steps"))): Recorded(row)
        for row in rows
    }


def best(outcomes: Sequence[Outcome]) -> Arm:
    """Find the arm with the lowest mean loss, by its learning rate; the first if all failed."""
    arms = {one.arm.lr: one.arm for one in outcomes}
    return min(arms.values(), key=lambda arm: mean_loss([one for one in outcomes if one.arm.lr == arm.lr]))


def is_size(arm: Arm) -> bool:
    """Check whether an arm is a size of the ladder from scratch."""
    return arm.name.startswith("from scratch") and not (arm.schedule or arm.learned_tau)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="folder of the results")
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, help="default: all, text alone if reduced")
    parser.add_argument("--reduced", action="store_true", help="the most important arms, one seed")
    parser.add_argument("--root", default="data", help="folder with FashionMNIST/raw")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="fits at a time")
    parser.add_argument("--logs", default="lightning_logs/growth", help="folder of the fits")
    parser.add_argument("--phases", nargs="+", choices=PHASES, help="default: all; --reduced has one")
    parser.add_argument("--draw-only", action="store_true", help="train nothing; tables and pictures of what is there")
    options = parser.parse_args(args)
    options.domains = options.domains or list(DOMAINS)[: 1 if options.reduced else None]
    options.phases = options.phases or PHASES
    if options.reduced:
        options.seeds = options.seeds[:1]
    for name in options.domains:
        domain = copy.deepcopy(DOMAINS[name])
        if "root" in domain.data["init_args"]:
            domain.data["init_args"]["root"] = options.root
        with Runner(Path(options.logs), options.jobs, options.draw_only) as runner:
            study = Study(name, domain, options, runner)
            study.run()
        write(Path(options.output), name, domain, study.outcomes, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
