"""Domains and arms of the study, read from ``domains.yaml`` and ``arms.yaml``, and the config of each fit."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf

from lit_tokenformer.comparison.setting import measured_trainer
from lit_tokenformer.cost import model_cost
from lit_tokenformer.models import Tokenformer, TokenformerConfig, preset_config
from lit_tokenformer.models.backbone import growable_size
from lit_tokenformer.models.config import KINDS

HERE = Path(__file__).parent
OWN = "benchmarks.growth_study.model_growth"
"""Module of the study's own callbacks."""


@dataclass(frozen=True)
class Domain:
    """Data, architecture, ladder and budget.

    Args:
        task: Class of the LightningModule.
        data: Class and settings of the data module.
        preset: The TokenFormer.
        twin: Its twin with linear projections.
        base: Fields of the architecture that all arms share.
        twin_base: Those of the twin, which match its parameters to the final size.
        of_data: Fields that follow from the data.
        ladder: Parameter tokens of each size, the final one last.
        budget: Training FLOPs C of the final size from scratch.
        rates: Learning rates that every arm tries.
        val_batches: Batches of each validation.
        weight_decay: Of AdamW.
    """

    task: str
    data: dict[str, Any]
    preset: str
    twin: str
    base: dict[str, Any]
    twin_base: dict[str, Any]
    of_data: dict[str, int]
    ladder: tuple[int, ...]
    budget: float
    rates: tuple[float, ...]
    val_batches: int
    weight_decay: float = 0.1

    @property
    def batch_size(self) -> int:
        return int(self.data["init_args"]["batch_size"])


def tupled(given: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Turn the lists under some names into tuples."""
    return {name: tuple(value) if name in names else value for name, value in given.items()}


DOMAINS = {
    name: Domain(**tupled(given, "ladder", "rates"))
    for name, given in yaml.safe_load((HERE / "domains.yaml").read_text(encoding="utf-8")).items()
}


@dataclass(frozen=True)
class Arm:
    """A way to spend the budget.

    Args:
        name: Its name in tables.
        sizes: Fields of the architecture at each stage, in addition to those that all arms share.
        at: Shares of the steps at which the second size and those after it begin.
        growth: Settings of the growth callback; with ``way``, of the study's own.
        schedule: The learning rate's; shares of the whole run, or of the stage with ``restart``.
        twin: Whether it has linear projections.
        restart: Whether the learning-rate schedule restarts at each growth.
        share: Its share of the budget C.
        learned_tau: Whether tau is a parameter.
        dropped: Share of the patches that is dropped before the last stage.
        length: Optimizer steps; 0 follows from the budget.
        once: Train one seed only.
        lr: Its learning rate.
        rate_factor: Multiple of it to use.
        rate_at_growth: Factor of it at each growth.
        optimizer: Class and settings of the optimizer, in place of AdamW.
        callbacks: Configs of further callbacks.
    """

    name: str
    sizes: tuple[dict[str, Any], ...]
    at: tuple[float, ...] = ()
    growth: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    twin: bool = False
    restart: bool = False
    share: float = 1.0
    learned_tau: bool = False
    dropped: float = 0.0
    length: int = 0
    once: bool = False
    lr: float = 0.0
    rate_factor: float = 1.0
    rate_at_growth: float = 1.0
    optimizer: dict[str, Any] = field(default_factory=dict)
    callbacks: tuple[dict[str, Any], ...] = ()

    def configs(self, domain: Domain) -> list[TokenformerConfig]:
        """The architecture at each stage."""
        preset = domain.twin if self.twin else domain.preset
        shared = {**domain.base, **(domain.twin_base if self.twin else {}), **domain.of_data}
        *before, last = (preset_config(preset, **{**shared, **size}) for size in self.sizes)
        return [*(replace(config, patch_drop_rate=self.dropped) for config in before), last]

    def steps(self, domain: Domain) -> int:
        """Optimizer steps within its share of the budget."""
        if self.length:
            return self.length
        starts = (0.0, *self.at)
        lengths = [end - start for start, end in zip(starts, (*self.at, 1.0), strict=True)]
        costs = [model_cost(config).training_flops for config in self.configs(domain)]
        mean = sum(length * cost for length, cost in zip(lengths, costs, strict=True))
        return max(2, int(self.share * domain.budget / (mean * domain.batch_size)))

    def starts(self, domain: Domain) -> list[int]:
        """First step of each stage after the first."""
        return [max(1, round(share * self.steps(domain))) for share in self.at]

    def fit(self, domain: Domain, seed: int, evaluations: int) -> dict[str, Any]:
        """Build the config of its fit."""
        steps, starts = self.steps(domain), self.starts(domain)
        callbacks = list(self.callbacks)
        if len({str(size) for size in self.sizes}) > 1:
            callbacks.append({"class_path": f"{OWN}.LossAtGrowth", "init_args": {"steps": starts}})
            callbacks.append(self._growth(domain, starts))
        if self.learned_tau:
            callbacks.append({"class_path": f"{OWN}.LearnedTau"})
        if self.rate_at_growth != 1:
            scaled = {"steps": starts, "factor": self.rate_at_growth}
            callbacks.append({"class_path": f"{OWN}.RateAtGrowth", "init_args": scaled})
        if self.dropped:
            whole = {"schedule": {starts[-1]: 0.0}, "unit": "step"}
            callbacks.append({"class_path": "callbacks.PatchDropSchedule", "init_args": whole})
        schedule = {"name": "wsd", "warmup": 0.05, "decay": 0.4, "unit": "share", **self.schedule}
        if self.restart:
            schedule["restarts"] = starts
        shared = {**domain.base, **(domain.twin_base if self.twin else {}), **self.sizes[0]}
        if self.dropped:
            shared["patch_drop_rate"] = self.dropped
        common = {"lr": self.lr * self.rate_factor, "betas": [0.9, 0.95], "weight_decay": domain.weight_decay}
        optimizer = self.optimizer or {"class_path": "torch.optim.AdamW", "init_args": {"fused": True}}
        optimizer = {**optimizer, "init_args": {**common, **optimizer.get("init_args", {})}}
        trainer = measured_trainer(steps, max(1, steps // evaluations), callbacks) | {
            "accelerator": "cpu",
            "log_every_n_steps": max(1, steps // 40),
            "limit_val_batches": domain.val_batches,
            "gradient_clip_val": 1.0,
        }
        return {
            "seed_everything": seed,
            "trainer": trainer,
            "model": {
                "class_path": f"lit_tokenformer.tasks.{domain.task}",
                "init_args": {
                    "preset": domain.twin if self.twin else domain.preset,
                    "overrides": shared,
                    "optimizer": optimizer,
                    "schedule": schedule,
                },
            },
            "data": copy.deepcopy(domain.data),
        }

    def _growth(self, domain: Domain, starts: list[int]) -> dict[str, Any]:
        settings = dict(self.growth)
        if "way" in settings:
            field_name = "dim" if settings["way"] == "widen" else "depth"
            schedule = {step: size[field_name] for step, size in zip(starts, self.sizes[1:], strict=True)}
            return {"class_path": f"{OWN}.ModelGrowth", "init_args": {**settings, "schedule": schedule}}
        waits = settings.get("trigger", "schedule") != "schedule"
        keys = range(1, len(starts) + 1) if waits else starts
        with torch.device("meta"):
            sizes = [growable_size(Tokenformer(config)) for config in self.configs(domain)]
        schedule = {
            step: {kind: total for kind, total in size.items() if kind in KINDS or total != before[kind]}
            for step, before, size in zip(keys, sizes, sizes[1:], strict=False)
        }
        return {
            "class_path": "callbacks.ParameterGrowthCallback",
            "init_args": {"unit": "step", "check": False, **settings, "schedule": schedule},
        }


def load_arms(domain: Domain) -> dict[str, list[Arm]]:
    """Read ``arms.yaml`` for a domain: lists of arms by the name of their group."""
    small, middle, final = domain.ladder
    dim, depth, heads = (domain.base[name] for name in ("dim", "depth", "num_heads"))
    values: dict[str, Any] = {"small": small, "middle": middle, "final": final, "half": final // 2}
    values |= {"ffn_small": 4 * small, "ffn_final": 4 * final, "blocks": depth, "dim": dim, "heads": heads}
    values |= {"half_dim": dim // 2, "half_heads": heads // 2}
    values["depths"] = list(depth_ladder(domain, *range(1, depth + 1)))
    values["depths_at"] = [0.35] if depth == 2 else [0.15, 0.35]
    groups = yaml.safe_load((HERE / "arms.yaml").read_text(encoding="utf-8"))
    found: Any = OmegaConf.to_container(OmegaConf.create({**values, **groups}), resolve=True)
    return {name: [Arm(**tupled(arm, "sizes", "at")) for arm in found[name]] for name in groups}


def depth_ladder(domain: Domain, *blocks: int) -> tuple[dict[str, Any], ...]:
    """Sizes by their blocks, each with all parameter tokens."""
    return tuple({"param_tokens": domain.ladder[-1], "depth": depth} for depth in blocks)


def family_steps(domain: Domain) -> dict[tuple[str, str], tuple[dict[str, Any], ...]]:
    """Pairs of a smaller size and the final one, by their names."""
    *_, small, final = domain.ladder
    name = f"{final} tokens"
    return {
        (f"{small} tokens", name): ({"param_tokens": small}, {"param_tokens": final}),
        ("1 block", name): depth_ladder(domain, 1, domain.base["depth"]),
    }


def controls(domain: Domain) -> list[Arm]:
    """Baselines of growth; the sizes of the ladder first, the final one at their head."""
    groups = load_arms(domain)
    return groups["controls"] + (groups["controls of text"] if domain.task == "LitCausalLM" else [])


def policies(domain: Domain) -> list[Arm]:
    """Arms of the search apart from its base."""
    others = ("base", "grown", "tokens", "controls", "controls of text", "reduced")
    return [arm for name, arms in load_arms(domain).items() if name not in others for arm in arms]


def few_patches(arm: Arm, left: int = 9) -> Arm:
    """Drop all but ``left`` of the 16 patches in the first half, and grow after it."""
    sizes = arm.sizes if arm.at else 2 * arm.sizes
    name = f"{arm.name}, {left} of 16 patches first"
    return replace(arm, name=name, sizes=sizes, at=(0.5,), dropped=1 - left / 16, share=0.65)
