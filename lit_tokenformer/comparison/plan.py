"""Plan of a comparison: matched parameter tokens, growths, steps and learning rate of each arm."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from callbacks import ParameterGrowthCallback, PatchDropSchedule
from lit_tokenformer.comparison.arms import Arm, Planned, Schedule, has_pattention, naming, parse_arm
from lit_tokenformer.comparison.fits import Runner
from lit_tokenformer.comparison.setting import LEFT_OUT, Setting
from lit_tokenformer.cost import match_tokens, model_cost
from lit_tokenformer.errors import UserError
from lit_tokenformer.models import TokenformerConfig
from lit_tokenformer.models.config import KINDS

SPEED_STEPS = 12
"""Optimizer steps of a speed measurement."""


def plan_arms(setting: Setting, arms: Sequence[Arm], match: str | None, reference: str | None) -> list[Planned]:
    """Choose architecture, parameter tokens and growth schedule of all arms.

    Args:
        setting: Data and budget.
        arms: Entries of ``presets``.
        match: Match the ``parameters`` or ``flops`` of the reference's blocks by the number of parameter tokens.
        reference: Label or preset to match; defaults to the first arm.

    Raises:
        UserError: With the label of the arm.
    """
    labels = [arm.label for arm in arms]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"presets: {label!r}: more than one entry with this label; set another label")
    reference_arm = reference_of(arms, reference)
    matched_to = setting.architecture(reference_arm)
    planned = [_planned(setting, arm, arm == reference_arm, matched_to, match) for arm in arms]
    by = match or "parameters"
    own = _of_blocks(matched_to, by)
    for one in planned:
        one.differs = _of_blocks(one.final, by) / own - 1
        one.parameters = sum(parameter.numel() for parameter in setting.module(one).parameters())
        one.blocks = _of_blocks(one.final, "parameters")
    return planned


def reference_of(arms: Sequence[Arm], reference: str | None) -> Arm:
    """Find the reference arm by label or preset, or build one of another preset."""
    if reference is None:
        return arms[0]
    return next((arm for arm in arms if reference in (arm.label, arm.preset)), None) or parse_arm(reference)


def _of_blocks(config: TokenformerConfig, by: str) -> int:
    """Count ``parameters``, or ``flops`` per sample without patch dropping, without embedding and head."""
    config = replace(config, patch_drop_rate=0.0)
    whole, half = (getattr(model_cost(replace(config, depth=n * config.depth)), by) for n in (2, 1))
    return whole - half  # embedding and head cost the same at any depth


def _planned(
    setting: Setting, arm: Arm, is_reference: bool, reference: TokenformerConfig, match: str | None
) -> Planned:
    config = setting.architecture(arm)
    matched: dict[str, int] | None = None
    with naming(arm):
        for name in (str(one["class_path"]).split(".")[-1] for one in arm.callbacks):
            if name in LEFT_OUT:
                raise UserError(f"callbacks: {name} cannot be added (growth: grow; dropped patches: patch_drop)")
        if match and not is_reference and has_pattention(config):
            matched = match_tokens(config, reference, match)
        growths = _growths(setting, arm, config, matched) if arm.grow else {}
        drops = _drops(setting, arm, config)
    if matched and not arm.grow and "param_tokens" not in arm.overrides:
        config = setting.architecture(arm, matched)
    return Planned(arm, config, growths, drops)


def _growths(setting: Setting, arm: Arm, config: TokenformerConfig, matched: dict[str, int] | None) -> Schedule:
    of_config = arm.grow is True
    wanted: dict[Any, Any] = setting.growth.get("schedule") or {} if of_config else arm.grow
    unit = setting.growth.get("unit", "epoch") if of_config else "step"
    if not wanted:
        raise UserError("grow: no growth schedule in the config; write grow: {0.3: TOKENS, ...}")
    if "matched" in wanted.values() and matched is None:
        raise UserError("grow: 'matched' requires match, and another arm as reference")
    at = _shares(setting, "grow", wanted, unit)
    shares: Schedule = {share: matched if size == "matched" else size for share, size in at.items()}
    named = {kind for size in shares.values() if isinstance(size, dict) for kind in size}
    initial = dict(config.tokens.items()) if has_pattention(config) else {}
    initial |= {kind: config.size[kind] for kind in config.size if kind in named and kind not in KINDS}
    if not initial:
        raise UserError("grow: no Pattention layer to grow; set overrides.projection to pattention")
    numbered = {**setting.growth, **arm.growth, "schedule": dict(enumerate(shares.values())), "unit": "step"}
    try:
        stages = ParameterGrowthCallback(**numbered).stages(initial)
    except ValueError as error:
        message = re.sub(r"^schedule: step (\d+): ", lambda found: f"{list(wanted)[int(found[1])]}: ", str(error))
        raise UserError(f"grow: {message}") from None
    return {share: tokens for share, (_, tokens) in zip(shares, stages, strict=True)}


def _shares(setting: Setting, name: str, wanted: Mapping[Any, Any], unit: str) -> dict[float, Any]:
    """Convert the keys of a schedule, shares of the steps or steps of the config, to shares."""
    shares: dict[float, Any] = {}
    for key, value in wanted.items():
        if isinstance(key, bool) or not isinstance(key, (int, float)) or key <= 0:
            raise UserError(f"{name}: expected a share of the steps or a step of the config as key, got {key!r}")
        share = key if isinstance(key, float) and key < 1 else setting.as_share(key, unit)
        if share >= 1 or share <= max(shares, default=0):
            raise UserError(f"{name}: {key} expected before the end of the fit and after the previous change")
        shares[share] = value
    return shares


def _drops(setting: Setting, arm: Arm, config: TokenformerConfig) -> dict[float, float]:
    """Patch drop rates of an arm by share of the steps."""
    drops = setting.patch_drop if arm.patch_drop is None else _shares(setting, "patch_drop", arm.patch_drop, "step")
    PatchDropSchedule(dict(enumerate(drops.values())))  # rejects rates out of range
    if drops and config.stem != "patch":
        raise UserError("patch_drop: no image stem (stem: patch), so no patches can be dropped")
    return drops


def training_flops(setting: Setting, planned: Planned, steps: int) -> int:
    """Compute the training FLOPs of a fit in closed form."""
    checkpointing = bool(setting.model.get("grad_checkpointing"))
    return sum(
        count * setting.samples_per_step * model_cost(config, checkpointing=checkpointing).training_flops
        for count, config in planned.stages(steps)
    )


def steps_within(setting: Setting, planned: Planned, total: float) -> int:
    """Find the maximum number of optimizer steps within a compute budget in FLOPs.

    Raises:
        UserError: If the budget is below two steps.
    """
    steps = int(total // (training_flops(setting, planned, 10_000) / 10_000)) + 2
    while steps > 0 and training_flops(setting, planned, steps) > total:
        steps -= 1
    if steps < 2:
        raise UserError(f"budget: {total:.3g} FLOPs are less than two steps of {planned.arm.label!r}")
    return steps


def set_steps(setting: Setting, planned: list[Planned], budget: str, reference: str | None, runner: Runner) -> None:
    """Set the optimizer steps of all arms.

    Raises:
        UserError: If the budget is unknown, or too small for an arm.
    """
    kind, _, amount = budget.partition("=")
    try:
        value = float(amount) if amount else None
    except ValueError:
        value = 0.0
    if kind not in ("steps", "flops", "wall") or (value is not None and not value > 0):
        raise UserError(f"budget: expected steps[=N], flops[=F] or wall=SECONDS, got {budget!r}")
    if kind == "steps":
        for one in planned:
            one.steps = int(value or setting.steps)
    elif kind == "flops":
        if value is None:
            arm = reference_of([one.arm for one in planned], reference)
            to_match = next((one for one in planned if one.arm == arm), Planned(arm, setting.architecture(arm)))
            value = training_flops(setting, to_match, setting.steps)
        for one in planned:
            one.steps = steps_within(setting, one, value)
    elif value is None:
        raise UserError("budget: wall requires seconds (expected wall=SECONDS)")
    else:
        _set_steps_by_speed(setting, planned, value, runner)


def _set_steps_by_speed(setting: Setting, planned: list[Planned], seconds: float, runner: Runner) -> None:
    run_of = 10_000  # steps; long enough for exact shares of each size
    fits = {
        one.arm.label: [
            runner.fit(one.arm.label, "speed", setting.fit_config(one, SPEED_STEPS, 0, one.arm.lr, config))
            for _, config in one.stages(run_of)
        ]
        for one in planned
    }
    runner.run([fit for own in fits.values() for fit in own])
    for one in planned:
        measured = [fit.measured for fit in fits[one.arm.label]]
        failed = [found["failed"] for found in measured if found["failed"]]
        if failed:
            one.notes.append(f"speed measurement failed: {failed[0]}")
            continue
        counts = [count for count, _ in one.stages(run_of)]
        mean = sum(n * found["step_seconds"] for n, found in zip(counts, measured, strict=True)) / run_of
        one.steps = max(2, int(seconds / mean))
        one.notes.append(f"{one.steps} steps of {mean:.3f} s measured over {SPEED_STEPS} steps at each size")


def set_rates(
    setting: Setting, planned: list[Planned], rates: Sequence[float], steps: int, seed: int, runner: Runner
) -> None:
    """Set the learning rate of each arm: its own, the best of a search over equal trials, or that of the config."""
    for one in planned:
        one.lr = one.arm.lr or (setting.lr if not rates else None)
    searched = [one for one in planned if rates and one.arm.lr is None and one.steps]
    fits = {
        (one.arm.label, rate): runner.fit(one.arm.label, f"rate {rate:g}", setting.fit_config(one, steps, seed, rate))
        for rate in rates
        for one in searched
    }
    runner.run(list(fits.values()))
    for one in searched:
        losses = {rate: fits[one.arm.label, rate].result for rate in rates}
        tried = {rate: found["loss"] for rate, found in losses.items() if not found["failed"]}
        if not tried:
            one.notes.append(f"learning-rate search failed: {losses[rates[0]]['failed']}")
            continue
        one.lr = min(tried, key=lambda rate: tried[rate])
        note = ", ".join(f"{rate:g}: {tried[rate]:.4f}" if rate in tried else f"{rate:g}: failed" for rate in rates)
        edge = " (best at the edge of the range)" if len(rates) > 1 and one.lr in (min(rates), max(rates)) else ""
        one.notes.append(f"loss by learning rate after {steps} steps {note}{edge}")


def describe_plan(setting: Setting, planned: list[Planned]) -> str:
    """Describe the planned fits, one line per arm."""
    lines = []
    for one in planned:
        stages = [config for _, config in one.stages(10_000)]
        sizes = {kind: [config.size[kind] for config in stages] for kind in one.config.size if kind not in KINDS}
        shown: dict[str, list[Any]] = {kind: found for kind, found in sizes.items() if len(set(found)) > 1}
        if has_pattention(one.config):
            tokens = ["/".join(map(str, dict(config.tokens.items()).values())) for config in stages]
            shown = {"tokens qkv/proj/ffn": tokens, **shown}
        length = f"{one.steps} steps, {training_flops(setting, one, one.steps):.3g} FLOPs"
        lines.append(
            f"{one.arm.label}: {one.parameters:,} parameters ({one.blocks:,} non-embedding, {one.differs:+.1%}), "
            + "".join(f"{kind} {' -> '.join(map(str, dict.fromkeys(found)))}, " for kind, found in shown.items())
            + (length if one.steps else "steps unknown before the speed measurement")
        )
    return "\n".join(lines)
