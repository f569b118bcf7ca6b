"""Growth inside a running fit: schedule and context. :mod:`lit_tokenformer.growth` grows the model itself."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.core.mixins import HyperparametersMixin
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from callbacks.growth_check import OutputCheck
from callbacks.growth_steps import StepSettings, add_step_hooks, row_map
from callbacks.growth_strategies import growth_context
from callbacks.growth_triggers import LossSignal
from callbacks.schedules import Key, check_end, check_last_step, checked_keys, multiplied, position
from lit_tokenformer.errors import UserError, nearest_name, unknown_name
from lit_tokenformer.growth import Rows, grow_with_optimizers, growth_method, target_sizes
from lit_tokenformer.growth.axes import UNITS, added_bytes, check_memory, describe_sizes, grown_sizes
from lit_tokenformer.growth.depth import check_depth
from lit_tokenformer.growth.experts import check_expert_growth
from lit_tokenformer.growth.methods import check_rows
from lit_tokenformer.growth.optimizer import NEW_STATES
from lit_tokenformer.growth.rows import record_kept
from lit_tokenformer.growth.shards import ShardedParameters
from lit_tokenformer.growth.shrink import Order
from lit_tokenformer.models import Pattention, Tokenformer, Tokens
from lit_tokenformer.models.axes import find_axes, follow_sizes
from lit_tokenformer.models.backbone import growable_size
from lit_tokenformer.models.config import KINDS, OTHER
from lit_tokenformer.registry import TRIGGERS


class ParameterGrowthCallback(HyperparametersMixin, Callback):
    """Grow a model at scheduled epochs or optimizer steps of a running fit.

    Parameter tokens, hidden units of the feed-forward, attention heads and blocks can grow, and units of any part that
    declares :class:`~lit_tokenformer.models.Axis`.

    A growth is due at ``epoch >= key`` and, with a ``trigger``, once the training loss fires it. It takes place before
    the next batch without a pending gradient. The schedule contains totals, so a resumed run determines the due stages
    from the model's size.

    Args:
        schedule: ``{epoch: size}``, zero-indexed and in increasing order. A size is a total: a number n of parameter
            tokens (qkv n, proj n, ffn 4n; layers without a kind n) or ``{qkv: n, proj: n, ffn: m, other: k, hidden: h,
            heads: H, depth: L, experts: E}``. Omitted kinds keep their size. ``other`` applies to Pattention layers
            without a kind, as in a user's own model, ``hidden`` to MLP, GLU and channel mix. ``depth`` is the total
            number of blocks; new ones are inserted as identities under any ``method``. ``experts`` is the total number
            of feed-forwards of each block behind a router; new ones are copies under any ``method``. ``{hidden: 1.5x}``
            is a multiple of the size at which the fit began, rounded to a whole number.
        unit: Unit of the keys of ``schedule``: ``epoch``, or ``step`` (optimizer steps).
        method: Growth method: ``split`` (exact for every activation and score normalization), ``zero`` (exact except
            for softmax) or ``random`` (as published; changes the function).
        noise: Scale of the difference between the copies of a split, in standard deviations of the value
            initialization.
        new_state: Optimizer state of rows that are not copies: second moments ``mean`` of the old rows or ``zeros``;
            ``reset`` drops the whole state of each grown parameter, and starts the copies of blocks without state.
            ``reset_copies`` starts all new rows and the copies of blocks without state; originals keep theirs.
        tau_steps: Optimizer steps over which tau moves to the square root of the number of tokens; 0 keeps it.
        ramp_steps: Optimizer steps over which the updates of new rows ramp up from zero to full size.
        freeze_old_steps: Optimizer steps for which old rows are frozen; -1 until the end.
        old_updates: Share of their updates that old rows apply in these steps, from 0 (frozen) to 1.
        rewarm_steps: Optimizer steps over which the learning rate warms up again to its schedule.
        seed: Seed of the new rows.
        check: Compare the model's outputs for the next batch before and after each growth: those of the module's
            ``model_output(batch)``, or else of its ``forward``.
        trigger: Condition of a growth after its key is reached: none (``schedule``), or a rule on the training loss
            averaged over windows. ``plateau`` fires when the loss stops improving. ``slope`` fires when the loss
            decreases much less per e-fold of compute than at its steepest since the last growth (after arXiv
            2203.06211). A trigger may fire before the key, causes one growth each time, and resets after it.
        window: Optimizer steps in a window.
        patience: Windows without improvement before ``plateau`` fires; number of latest windows in the slope of
            ``slope``, at least 2.
        min_delta: Minimum decrease of the loss that counts as an improvement for ``plateau``, in nats.
        threshold: Share of the steepest slope at which ``slope`` fires, between 0 and 1.
        cooldown: Optimizer steps after the start and after each growth whose loss is ignored by the trigger.
        freeze_rest: Whether to freeze parameters that do not grow as long as old rows are frozen: embeddings, norms and
            heads. With ``zero`` and ``freeze_old_steps: -1``, the model before the growth stays a prefix of the grown
            one, bit for bit.
        new_updates: Size of the updates of new rows after ``ramp_steps`` and until the next growth, relative to the
            learning rate: 1.3 with 250 ``ramp_steps`` and ``new_state: reset_copies`` as in SPARKLING.

    Raises:
        ValueError: For a schedule that shrinks, is out of order or names an unknown kind of projection, and for
            settings out of range. When a fit starts, for a schedule that begins beyond its end, for more tokens than
            memory, and for a strategy or weight averaging that does not support growth.

    Note:
        Other callbacks that define ``on_parameter_growth(trainer, pl_module, event)`` are called after each growth; an
        EMA of the weights grows there. A trigger costs one reduction of three numbers per window.

    Example:
        >>> callback = ParameterGrowthCallback({10: 192, 20: {"qkv": 384, "proj": 384, "ffn": 1536}})
        >>> callback.schedule
        {10: 192, 20: {'qkv': 384, 'proj': 384, 'ffn': 1536}}
    """

    def __init__(
        self,
        schedule: dict[Key, int | dict[str, int | str]],
        unit: str = "epoch",
        method: str = "split",
        noise: float = 1.0,
        new_state: str = "mean",
        tau_steps: int = 0,
        ramp_steps: int = 0,
        freeze_old_steps: int = 0,
        old_updates: float = 0.0,
        rewarm_steps: int = 0,
        seed: int = 0,
        check: bool = True,
        trigger: str = "schedule",
        window: int = 50,
        patience: int = 4,
        min_delta: float = 0.01,
        threshold: float = 0.5,
        cooldown: int = 100,
        freeze_rest: bool = False,
        new_updates: float = 1.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        for setting, value, choices in (
            ("new_state", new_state, NEW_STATES),
            ("trigger", trigger, ("schedule", *TRIGGERS)),
        ):
            if value not in choices:
                raise unknown_name(setting, value, choices)
        for setting, number, least in (
            ("noise", noise, 0),
            ("tau_steps", tau_steps, 0),
            ("ramp_steps", ramp_steps, 0),
            ("new_updates", new_updates, 0),
            ("freeze_old_steps", freeze_old_steps, -1),
            ("old_updates", old_updates, 0),
            ("rewarm_steps", rewarm_steps, 0),
            ("window", window, 1),
            ("patience", patience, 1),
            ("min_delta", min_delta, 0),
            ("cooldown", cooldown, 0),
        ):
            if not least <= number < math.inf:
                raise UserError(f"{setting}: expected at least {least}, got {number}")
        if old_updates > 1:
            raise UserError(f"old_updates: expected at most 1, got {old_updates}")
        if freeze_rest and not freeze_old_steps:
            raise UserError("freeze_rest: true needs freeze_old_steps (expected -1 or a number of steps)")
        if growth_method(method).rows(1, 2).copies > 1 and noise == 0:
            raise UserError("noise: 0 keeps the copies of a split identical (expected more than 0)")
        self.schedule = _checked_schedule(schedule, unit)
        self.unit = unit
        self.method = method
        self.noise = noise
        self.new_state = new_state
        self.steps = StepSettings(
            tau_steps, ramp_steps, freeze_old_steps, old_updates, rewarm_steps, freeze_rest, new_updates
        )
        self.seed = seed
        self.check = check
        self.trigger = trigger
        self.events: list[dict[str, Any]] = []
        """One entry per growth: epoch, step, totals before and after, settings, results.

        ``rows`` is its row map: ``[before, after, copies, dim, block]`` by parameter name.
        """
        self._signal: LossSignal | None = None
        if trigger in TRIGGERS:
            make_trigger = partial(TRIGGERS[trigger], patience, min_delta, threshold)
            self._signal = LossSignal(make_trigger, window, cooldown)
        self._next = 0
        self._step_hooks: list[Any] = []

    def stages(self, tokens: Mapping[str, int], grown: bool = False) -> list[tuple[int, dict[str, int]]]:
        """Expand the schedule to totals for each kind that a model has.

        Args:
            tokens: The model's initial totals.
            grown: Whether the model grew before the fit; the first stages that its totals reach are then skipped.

        Returns:
            Pairs (key, totals) in order.

        Raises:
            ValueError: If a stage does not fit the model or would shrink it.
        """
        found: list[tuple[int, dict[str, int]]] = []
        current = dict(tokens)
        if not current:
            return []  # not growable
        for key, wanted in multiplied(self.schedule, tokens).items():
            setting = f"schedule: {self.unit} {key}"
            if grown and not found and _is_reached(wanted, current, setting):
                continue
            current = target_sizes(wanted, current, setting=setting)
            found.append((key, current))
        return found

    def remaining_stages(self, module: nn.Module) -> list[tuple[int, dict[str, int]]]:
        """Return the stages of the schedule, without the first ones that a model reached before the fit."""
        grown = any(model.grown for model in module.modules() if isinstance(model, Tokenformer))
        return self.stages(self._initial_size(module), grown)

    def _initial_size(self, module: nn.Module) -> dict[str, int]:
        """Return the size at which the first fit of a model began."""
        before = self.events[0]["before"] if self.events else {}  # `lit-tokenformer grow` does not record depth
        return {**self.size(module), **before}

    def _totals(self, module: nn.Module) -> dict[int, Tokens]:
        """Return the schedule with totals in place of multiples."""
        return multiplied(self.schedule, self._initial_size(module))

    def size(self, module: nn.Module) -> dict[str, int]:
        """Return the scheduled sizes of a model: parameter tokens, and the other kinds that the schedule names."""
        named = {kind: 1 for size in self.schedule.values() if isinstance(size, Mapping) for kind in size}
        return grown_sizes(module, named)

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        for _, part, _ in find_axes(pl_module):
            follow_sizes(part)  # a checkpoint of a user's module may have another size
        if stage != "fit":
            return
        growth_context(trainer)
        sizes = growable_size(pl_module)
        for key, wanted in self.schedule.items():
            for kind in wanted if isinstance(wanted, Mapping) else ():
                if kind not in sizes and kind not in (*KINDS, OTHER):
                    raise unknown_name(f"schedule: {self.unit} {key}", kind, sizes)
        initial = self._initial_size(pl_module)
        if not initial:  # one config serves growing and linear architectures
            rank_zero_warn("schedule: the model has no Pattention layer and will not grow (projection: linear)")
            return
        stages = self.remaining_stages(pl_module)
        self._check_modules(trainer, pl_module, initial, stages)
        method = growth_method(self.method)
        for name, part, axis in find_axes(pl_module):
            if axis.kind not in initial:
                continue
            first = initial[axis.kind] if self.events else axis.size(part)
            for before, after in itertools.pairwise([first, *(size[axis.kind] for _, size in stages)]):
                rows = method.rows(before, after) if after >= before else Rows(before, after)
                check_rows(axis, rows, method, name)
        shares = trainer.world_size if isinstance(trainer.strategy, ModelParallelStrategy) else 1
        for key, size in stages:
            needed = added_bytes(pl_module, size)
            check_memory(needed // shares, trainer.strategy.root_device, f"schedule: {self.unit} {key}")
        if stages:
            _check_averages(trainer)
        check_end(dict(stages), self.unit, trainer)

    @staticmethod
    def _check_modules(trainer: Any, pl_module: nn.Module, initial: dict[str, int], stages: list[Any]) -> None:
        """Check the stages that add modules: blocks and experts."""
        models = [model for model in pl_module.modules() if isinstance(model, Tokenformer)]
        for kind, what, check in (
            ("depth", "blocks", check_depth),
            ("experts", "experts", check_expert_growth),
        ):
            final = stages[-1][1].get(kind, 0) if stages else initial.get(kind, 0)
            if final == initial.get(kind, 0):
                continue
            if isinstance(trainer.strategy, ModelParallelStrategy):
                raise UserError(f"schedule: {what} cannot be inserted under ModelParallelStrategy; use 'auto' or 'ddp'")
            for model, (_, tokens) in itertools.product(models, stages):
                if growable_size(model)[kind] < tokens.get(kind, 0):
                    check(model, tokens[kind], setting=f"schedule: {kind}")
        totals = [initial.get("experts", 1), *(tokens["experts"] for _, tokens in stages if "experts" in tokens)]
        for before, after in itertools.pairwise(totals):
            if after % before:
                raise UserError(f"schedule: experts: expected a multiple of {before}, the stage before, got {after}")

    def on_fit_start(self, trainer: Any, pl_module: LightningModule) -> None:
        stages = dict(self.remaining_stages(pl_module))
        if self.size(pl_module) and (skipped := [key for key in self.schedule if key not in stages]):
            keys = ", ".join(f"{self.unit} {key}" for key in skipped)
            rank_zero_info(f"schedule: skipped stages ({keys}); the initial model has reached their totals")
        check_last_step(stages, self.unit, trainer)
        if stages and self.size(pl_module):
            ShardedParameters(pl_module)  # reject an unsupported torch now, not at the first growth

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        current = self.size(pl_module)
        stages = list(self._totals(pl_module).items())
        self._next = 0 if current else len(stages)
        while self._next < len(stages) and _is_reached(stages[self._next][1], current):
            self._next += 1  # the resumed checkpoint already contains this growth
        for key, wanted in stages[self._next :]:
            current = target_sizes(wanted, current, setting=f"schedule: {self.unit} {key}")
        callbacks: list[Any] = list(getattr(trainer, "callbacks", []))
        place = callbacks.index(self) + 1 if self in callbacks else len(callbacks)
        for optimizer in trainer.optimizers if self.steps else []:
            self._step_hooks += add_step_hooks(self.steps, self._latest, trainer, pl_module, optimizer, place)
        if self._signal is not None:
            self._signal.begin_fit(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        keys = list(self.schedule)
        while self._next < len(keys) and position(trainer, self.unit) >= keys[self._next]:
            if self._signal is not None and not self._signal.fired:
                return
            if batch_idx % trainer.accumulate_grad_batches:
                return  # a gradient is pending
            wanted = self._totals(pl_module)[keys[self._next]]
            targets = target_sizes(wanted, self.size(pl_module))
            targets = trainer.strategy.broadcast(targets)  # all processes grow to the same size
            if targets != self.size(pl_module):
                self._grow(trainer, pl_module, targets, batch)
            self._next += 1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._signal is not None and self._next < len(self.schedule):
            self._signal.add_batch(trainer, outputs, batch)

    def on_cost_change(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Update the cost of a sample, which the compute of a trigger depends on."""
        if self._signal is not None:
            self._signal.measure(trainer, pl_module)

    def on_unit_order(self, trainer: Trainer, pl_module: LightningModule, order: Order) -> None:
        """Record the order of parameter tokens that were sorted after a growth; see :class:`~callbacks.NestedSizes`."""
        for key, units in order.items() if self.events else ():
            name = key.rpartition("/")[0]
            if isinstance(pl_module.get_submodule(name), Pattention):
                record_kept(self.events[-1], f"{name}.key_tokens".lstrip("."), units.tolist())

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._signal is not None and self._next < len(self.schedule):
            self._signal.agree(trainer)  # each process continues with the state in the checkpoint
            checkpoint["callbacks"][self.state_key] = self.state_dict()

    def on_train_end(self, trainer: Any, pl_module: LightningModule) -> None:
        self._remove_step_hooks()
        if self._signal is None or trainer.fast_dev_run:
            return
        current, rest = self.size(pl_module), list(self._totals(pl_module).values())[self._next :]
        left = [str(tokens) for tokens in rest if not _is_reached(tokens, current)]
        if left:
            rank_zero_warn(
                f"training ended before trigger {self.trigger!r} fired; remaining growth: {', then '.join(left)} tokens"
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._remove_step_hooks()

    def state_dict(self) -> dict[str, Any]:
        if self._signal is None:
            return {"events": self.events}
        return {"events": self.events, "signal": {**self._measured_for(), **self._signal.state_dict()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.events = list(state_dict["events"])
        signal = state_dict.get("signal", {})
        if self._signal is not None and self._measured_for().items() <= signal.items():
            self._signal.load_state_dict(signal)

    def _latest(self) -> dict[str, Any] | None:
        """Return the latest growth, or ``None``."""
        return self.events[-1] if self.events else None

    def _measured_for(self) -> dict[str, Any]:
        """Identify the signal: it is invalid for another trigger, and after a growth between two runs."""
        return {"trigger": self.trigger, "growths": len(self.events)}

    def _grow(self, trainer: Trainer, pl_module: LightningModule, targets: dict[str, int], batch: Any) -> None:
        before = self.size(pl_module)
        parameters = sum(parameter.numel() for parameter in pl_module.parameters())
        flops = _flops(pl_module)
        outputs = OutputCheck(pl_module, batch, self.check)
        rows: dict[str, list[int]] = {}

        start = time.perf_counter()
        for optimizer in trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)
        with growth_context(trainer):
            settings: Any = {"noise": self.noise, "seed": self.seed, "new_state": self.new_state}
            for grown in grow_with_optimizers(pl_module, targets, trainer.optimizers, self.method, **settings):
                rows |= row_map(grown.name, grown.grown)
                del grown  # the last reference to the old parameter
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()  # code for the old size would count against the recompile limit
        seconds = time.perf_counter() - start

        event = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "before": before,
            "after": targets,
            "rows": rows,
            "trigger": self.trigger,
            "method": self.method,
            "noise": self.noise,
            "seed": self.seed,
            "parameters": sum(parameter.numel() for parameter in pl_module.parameters()),
            "flops_per_sample": _flops(pl_module),
            "output_difference": outputs.difference(),
            "seconds": seconds,
        }
        self.events.append(event)
        _start_new_size(trainer)
        if self._signal is not None:
            self._signal.begin_size(trainer, pl_module)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(callback, "on_parameter_growth"):
                callback.on_parameter_growth(trainer, pl_module, event)
        self._report(trainer, event, parameters, flops)

    def _report(self, trainer: Trainer, event: dict[str, Any], parameters: int, flops: float) -> None:
        before = event["before"]
        pairs = {kind: f"{before[kind]} -> {total}" for kind, total in event["after"].items() if total > before[kind]}
        facts = [
            f"Growth at epoch {event['epoch']}, step {event['step']} by {self.method}: {describe_sizes(pairs)}",
            f"{parameters / 1e6:.2f} -> {event['parameters'] / 1e6:.2f} M parameters",
        ]
        if not math.isnan(flops):
            facts.append(f"{flops / 1e9:.3g} -> {event['flops_per_sample'] / 1e9:.3g} GFLOPs per sample")
        if not math.isnan(event["output_difference"]):
            facts.append(f"relative output difference {event['output_difference']:.1e}")
        rank_zero_info("; ".join([*facts, f"{event['seconds']:.2f} s"]))
        if growth_method(self.method).exact and event["output_difference"] > 0.05:
            rank_zero_warn(
                f"method: {self.method!r} should preserve the model's output (got a relative difference of "
                f"{event['output_difference']:.1e})"
            )
        for logger in trainer.loggers:
            metrics = {
                "growth/output_difference": event["output_difference"],
                "growth/seconds": event["seconds"],
                "growth/added_parameters": event["parameters"] - parameters,
            }
            logger.log_metrics({k: v for k, v in metrics.items() if not math.isnan(v)}, step=event["step"])

    def _remove_step_hooks(self) -> None:
        for hook in self._step_hooks:
            hook.remove()
        self._step_hooks.clear()


def _checked_schedule(schedule: Mapping[Key, Any], unit: str) -> dict[int, Any]:
    """Validate that the keys of a schedule increase and no total shrinks; multiples are compared once sizes are known.

    Raises:
        ValueError: Otherwise.
    """
    checked = checked_keys(schedule, unit)
    named = {str(kind) for size in checked.values() if isinstance(size, Mapping) for kind in size}
    misspelled = [kind for kind in sorted(named - UNITS.keys()) if nearest_name(kind, UNITS)]
    current = dict.fromkeys((*UNITS, *sorted(named.difference(misspelled))), 1)  # parts may declare their own kinds
    for key, tokens in multiplied(checked, None, f"schedule: {unit}").items():
        current = target_sizes(tokens, current, setting=f"schedule: {unit} {key}")
    return checked


def _check_averages(trainer: Any) -> None:
    """Raise a ``UserError`` if another callback averages the weights and cannot follow a growth."""
    for callback in trainer.callbacks:
        averages = isinstance(callback, (WeightAveraging, StochasticWeightAveraging))
        if averages and not hasattr(callback, "on_parameter_growth"):
            raise UserError(
                f"trainer.callbacks: {type(callback).__name__} averages weights of a fixed size, but the schedule "
                "grows the model; use callbacks.GrowingEMA"
            )


def _is_reached(tokens: Tokens, current: Mapping[str, int], setting: str = "tokens") -> bool:
    """Return whether a model has at least these totals of every kind."""
    wanted = target_sizes(tokens, dict.fromkeys(current, 1), setting)
    named = tokens if isinstance(tokens, Mapping) else wanted
    return all(current[kind] >= wanted[kind] for kind in named)


def _flops(pl_module: Any) -> float:
    """Return the FLOPs of one forward pass per sample, or NaN if the module does not report them."""
    return float(pl_module.cost().flops) if hasattr(pl_module, "cost") else float("nan")


def _start_new_size(trainer: Trainer) -> None:
    """Reset best scores and patience, and keep the best checkpoint of each size: sizes are not compared."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            callback.best_k_models = {}
            callback.kth_best_model_path = ""
            callback.kth_value = torch.tensor(math.inf if callback.mode == "min" else -math.inf)
            callback.current_score = callback.best_model_score = None
        elif isinstance(callback, EarlyStopping):
            callback.wait_count = 0
            callback.best_score = torch.tensor(math.inf if callback.mode == "min" else -math.inf)
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            config.scheduler.num_bad_epochs = 0
            config.scheduler.best = config.scheduler.mode_worse
