"""Late growth of a deep model: one block to eight after 30 to 80 % of the steps, at equal steps (arXiv 2511.04981).

The paper reports that a model of one block that grows after 80 % of the steps reaches the loss of the deep model from
scratch at the same step. New blocks are identities, copies of the block, or random ones. All arms use Muon and have the
same number of steps; the learning rate of a grown one decays over the second half of what follows the growth. The
controls are the deep model from scratch, with a decay over 40 % of the steps, and over the last 10 % as in the paper;
and three blocks at several budgets with the same learning rate, which show whether eight are too many.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from benchmarks.family import DECAY, OPTIMIZER, tflops
from benchmarks.growth_study.__main__ import Study
from benchmarks.growth_study.arms import DOMAINS, Arm, depth_ladder, load_arms
from benchmarks.growth_study.outcome import Curve, Findings, Outcome, compute_for, mean_loss, spread
from lit_tokenformer.cost import model_cost
from lit_tokenformer.models import preset_config

BLOCKS = 8
STEPS = 2_400
AT = (0.3, 0.5, 0.65, 0.8)
"""Shares of the steps after which the model grows."""
WAYS: dict[str, dict[str, Any]] = {
    "identities": {},
    "copies": {"way": "stack", "keep_state": True},
    "random blocks": {"way": "append_random", "keep_state": True},
}
"""New blocks, and the settings of the growth; the state of old parameters is kept, that of new ones starts at zero
(identities, random blocks) or with that of the copied block."""
MIXED = 0.01
"""Difference from the control in nats below which a grown model counts as mixed."""
SMALLER = 0.3, 0.6, 1.0
"""Budgets of three blocks, as shares of C."""
EVALUATIONS = 30

_TEXT = DOMAINS["text"]
_DEEP = {**_TEXT.base, "depth": BLOCKS}
_FLOPS = model_cost(
    preset_config(_TEXT.preset, **{**_DEEP, **_TEXT.of_data, "param_tokens": _TEXT.ladder[-1]})
).training_flops
DOMAIN = replace(_TEXT, base=_DEEP, budget=1.0 * STEPS * _FLOPS * _TEXT.batch_size)
"""The text domain with eight blocks; C is the FLOPs of these steps."""


def late(study: Study) -> Iterator[None]:
    """Train the controls and the grown models; yields after each phase."""
    domain, seeds = study.domain, study.options.seeds
    control = replace(load_arms(domain)["controls"][0], optimizer=OPTIMIZER)
    if study.options.reduced:
        control = replace(control, lr=domain.rates[0], share=0.25)
        steps = control.steps(domain)
        few = [replace(grown(control, way, 0.65), length=steps) for way in WAYS]
        study.train("final", [control, *few], seeds, EVALUATIONS)
        return
    (control,) = study.halved(study.with_rates([control]), EVALUATIONS)
    last = replace(control, name=f"{control.name}, decay over the last 10 %", schedule={"decay": 0.1})
    study.train("final", [last], seeds[:1], EVALUATIONS)
    yield
    found = study.train("late", [grown(control, way, at) for at in AT for way in WAYS], seeds[:1], EVALUATIONS)
    yield
    three = replace(control, name="from scratch, 3 blocks", sizes=depth_ladder(domain, 3))
    study.train("final", [replace(three, share=share) for share in SMALLER], seeds[:1], EVALUATIONS)
    study.train("final", [control, replace(control, share=0.5)], seeds, EVALUATIONS)
    yield
    ways = [min((one for one in found if one.arm.at == (at,)), key=lambda one: one.loss).arm for at in AT]
    study.train("final", ways, seeds, EVALUATIONS)
    yield
    rates = [replace(ways[-1], lr=control.lr * factor) for factor in (0.5, 2.0)]
    study.train("learning rate", rates, seeds[:1], EVALUATIONS)


def grown(control: Arm, way: str, at: float) -> Arm:
    """Grow from one block after a share of the control's steps."""
    return replace(
        control,
        name=f"{way} at {at:.0%}",
        sizes=({**control.sizes[0], "depth": 1}, {**control.sizes[0], "depth": BLOCKS}),
        at=(at,),
        growth=WAYS[way],
        schedule={"decay": (1 - at) / 2},
        length=STEPS,
    )


def curve(one: Outcome) -> tuple[np.ndarray, np.ndarray]:
    """Steps and validation losses of a run; all its steps have the same distance in training."""
    losses = np.array(one.result["curve"]["losses"])
    return np.linspace(0, one.result["steps"], len(losses) + 1)[1:], losses


def constant_until(one: Outcome, control: Outcome) -> float:
    """Step at which the first of two learning rates starts to decay."""
    decay = max(each.arm.schedule.get("decay", DECAY) for each in (one, control))
    return (1 - decay) * one.result["steps"]


def mixing_steps(one: Outcome, control: Outcome) -> int | None:
    """Steps from the growth until the loss is within ``MIXED`` of a control at the same step, before either decay."""
    steps, losses = curve(one)
    start, end = one.arm.at[0] * one.result["steps"], constant_until(one, control)
    others = np.interp(steps, *curve(control))
    reached = [step for step, loss, other in zip(steps, losses, others, strict=True) if loss - other <= MIXED]
    return next((round(step - start) for step in reached if start < step <= end), None)


def mixing_text(runs: Sequence[Outcome], stable: Sequence[Outcome]) -> str:
    """Name the mixing steps of the first seed with curves of the arm and a control; a recorded fit has none."""
    for other in stable:
        for one in runs:
            compared = one.seed == other.seed and min(len(curve(each)[0]) for each in (one, other)) > 1
            if compared and one.arm.at[0] * one.result["steps"] < constant_until(one, other):
                return str(mixing_steps(one, other) or "not mixed")
    return "-"


def report(found: Findings) -> tuple[list[dict[str, Any]], str]:
    """Build a row for each arm: FLOPs, loss, the difference from the control at equal steps, and the mixing time."""
    control = found.of(found.final, share=1.0)
    cost = partial(tflops, domain=found.domain)
    whole = statistics.mean(map(cost, control))
    curves: dict[str, Curve] = {}
    for name in (name for name in found.names("final") if len({one.arm.share for one in found.of(name)}) > 1):
        budgets = [found.of(name, share=share) for share in sorted({one.arm.share for one in found.of(name)})]
        curves[name] = [(statistics.mean(map(cost, runs)), mean_loss(runs)) for runs in budgets]
    stable = [*found.of(f"{found.final}, decay over the last 10 %"), *control]
    rows = []
    for phase in ("final", "late"):
        for name in found.names(phase):
            if phase == "late" and found.of(name):
                continue
            for share in sorted({one.arm.share for one in found.of(name, (phase,))}):
                runs = found.of(name, (phase,), share)
                pairs = [(one.loss, other.loss) for one in runs for other in control if other.seed == one.seed]
                ratios = {}
                for reference, points in curves.items():
                    needed = [(cost(one), compute_for(points, one.loss)) for one in runs]
                    ratios[f"ratio to {reference}"] = spread([spent / most for spent, most in needed if most], 2)
                mixed = mixing_text(runs, stable) if runs[0].arm.at else "-"
                rows.append(
                    {
                        "arm": name,
                        "FLOPs": f"{cost(runs[0]) / whole:.2f} C",
                        "validation loss": spread([one.loss for one in runs], 4),
                        "above the control": spread([one - other for one, other in pairs], 3),
                        **ratios,
                        "steps to mix": mixed,
                        "seeds": len(runs),
                    }
                )
    return rows, (
        f"C = {whole:.3g} TFLOP, {STEPS:,} steps of {BLOCKS} blocks. Ratio: FLOPs over those of that control at equal "
        "loss, interpolated; all stages and Muon's updates count. Steps to mix (one seed): from the growth until "
        f"the loss is within {MIXED} nats of the control's at the same step, while both learning rates are constant.\n"
    )
