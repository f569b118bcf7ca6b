"""What every task shares: optimizer and schedule, checkpoints that fit any stage of growth, exact resume."""

from __future__ import annotations

import dataclasses
import inspect
import math
import random
from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lit_tokenformer.compute import ModelCost, model_cost
from lit_tokenformer.growth import check_optimizer_state
from lit_tokenformer.models import Pattention, Tokenformer, param_tokens
from lit_tokenformer.tasks.schedule import LRSchedule


class LitTask(pl.LightningModule):
    """A backbone under training.

    Args:
        backbone: The model.
        optimizer: Makes the optimizer from parameter groups.
        schedule: Learning rate over the fit.
        lr_scheduler: Makes a torch scheduler that takes the place of ``schedule``; it steps once an epoch.
        compile: Whether the backbone is compiled with ``torch.compile``; it is compiled once for each size.
        grad_checkpointing: Whether blocks are computed again in the backward pass, to save memory.
    """

    def __init__(
        self,
        backbone: Tokenformer,
        optimizer: OptimizerCallable,
        schedule: LRSchedule | dict[str, Any],
        lr_scheduler: LRSchedulerCallable | None,
        compile: bool,
        grad_checkpointing: bool,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.make_optimizer = optimizer
        self.schedule = LRSchedule(**schedule) if isinstance(schedule, dict) else schedule
        self.make_lr_scheduler = lr_scheduler
        backbone.set_grad_checkpointing(grad_checkpointing)
        if compile:
            backbone.compile(dynamic=False)
        self._rng_states: list[dict[str, Any]] | None = None

    @staticmethod
    def plain(overrides: Any) -> dict[str, Any]:
        """The fields of an architecture that a user gave, from a dataclass or from what a checkpoint keeps of it."""
        given = overrides if isinstance(overrides, dict) else dataclasses.asdict(overrides)
        return {key: value for key, value in given.items() if value is not None}

    def remember_arguments(self) -> None:
        """Keeps the arguments of the calling ``__init__`` in the checkpoints, as plain types only.

        What makes the optimizer is plain where it comes from a config, and left out where it is a function.
        """
        frame = inspect.currentframe()
        self.save_hyperparameters(frame=frame and frame.f_back)
        made = ("optimizer", "lr_scheduler")
        plain = {key: value for key, value in self.hparams.items() if key not in made or isinstance(value, Mapping)}
        plain |= {"overrides": self.plain(plain["overrides"]), "schedule": dataclasses.asdict(self.schedule)}
        self.hparams.clear()
        self.save_hyperparameters(plain)

    def model_output(self, batch: Any) -> Tensor:
        """What the model gives for a batch, without loss; growth is checked on it."""
        raise NotImplementedError  # each task knows its batch

    def log_weight(self, count: int) -> int:
        """The weight of a mean over ``count`` items that is logged with ``sync_dist``.

        Lightning averages the weights of all processes as whole numbers; times their number, none is rounded.
        """
        return count * self.trainer.world_size

    def cost(self) -> ModelCost:
        """Parameters and operations of the model at its present size."""
        return model_cost(self.backbone.config, param_tokens(self.backbone), self.backbone.grad_checkpointing)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters that are decayed, and those that are not: one-dimensional ones and what the backbone declares."""
        declared = {f"backbone.{name}" for name in self.backbone.no_weight_decay()}
        decayed: list[nn.Parameter] = []
        spared: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                (spared if parameter.ndim <= 1 or name in declared else decayed).append(parameter)
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]

    def build_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer over the present parameters; it refuses state of a wrong shape when it is loaded."""
        optimizer = self.make_optimizer(self.parameter_groups())
        optimizer.register_load_state_dict_post_hook(check_optimizer_state)
        return optimizer

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.build_optimizer()
        if self.make_lr_scheduler is not None:
            scheduler = self.make_lr_scheduler(optimizer)
            if isinstance(scheduler, ReduceLROnPlateau):
                return {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": scheduler.monitor}
            return {"optimizer": optimizer, "lr_scheduler": scheduler}
        total = self.trainer.estimated_stepping_batches
        if math.isinf(total) and (self.schedule.name != "constant" or self.schedule.unit == "share"):
            raise ValueError(
                f"schedule.name: {self.schedule.name!r} needs an end; set trainer.max_epochs or trainer.max_steps"
            )
        per_epoch = self._steps_per_epoch() if self.schedule.unit == "epoch" else 1

        def factor(step: int) -> float:
            return self.schedule.factor(step, total, per_epoch)

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _steps_per_epoch(self) -> int:
        self.trainer.fit_loop.setup_data()  # a fit that is limited by steps has not done so yet
        batches = self.trainer.num_training_batches
        if math.isinf(batches):
            raise ValueError("schedule.unit: epochs of a stream have no known length; use 'step'")
        return math.ceil(batches / self.trainer.accumulate_grad_batches)

    def on_validation_epoch_end(self) -> None:
        """Tells callbacks the model's size, so that a checkpoint can have it in its name."""
        sizes = {f"size/tokens_{kind}": float(total) for kind, total in param_tokens(self.backbone).items()}
        self.log_dict(sizes, logger=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["task"] = type(self).__name__
        checkpoint["param_tokens"] = param_tokens(self)
        states: list[Any] = [_rng_state()]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, _rng_state())
        checkpoint["rng_states"] = states

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses the weights of another architecture; the layers themselves take the size of their tokens."""
        if "current_model_state" in checkpoint and self._trains_without_average():
            # the optimizer's state belongs to the weights that were trained, not to their moving average
            checkpoint["state_dict"] = checkpoint["current_model_state"]
        for problem in state_dict_problems(self, checkpoint["state_dict"]):
            raise ValueError(f"ckpt_path: the checkpoint is of another architecture: {problem}")
        self._rng_states = checkpoint.get("rng_states")

    def _trains_without_average(self) -> bool:
        trainer: Any = self._trainer
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return False
        return not any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)

    def on_train_start(self) -> None:
        if self._rng_states is not None and len(self._rng_states) == self.trainer.world_size:
            _set_rng_state(self._rng_states[self.global_rank])
        self._rng_states = None


def state_dict_problems(module: nn.Module, state_dict: dict[str, Tensor]) -> Iterator[str]:
    """What keeps a state dict from being that of ``module`` at some number of parameter tokens, a line each."""
    own = module.state_dict()
    free = {f"{name}.{part}" for name, layer in module.named_modules() for part in _free_parts(layer)}
    for name in own:
        if name not in state_dict:
            yield f"{name} is missing"
    for name, tensor in state_dict.items():
        if name not in own:
            yield f"{name} is not part of this model"
        elif name not in free and tensor.shape != own[name].shape:
            yield f"{name} has shape {tuple(tensor.shape)}, expected {tuple(own[name].shape)}"
        elif name in free and tensor.shape[-1] != own[name].shape[-1]:
            yield f"{name} has width {tensor.shape[-1]}, expected {own[name].shape[-1]}"


def _free_parts(layer: nn.Module) -> tuple[str, ...]:
    """Tensors of a layer that take the size of what is loaded."""
    if isinstance(layer, Pattention):
        return ("key_tokens", "value_tokens")
    return ("pos_embed",) if isinstance(getattr(layer, "pos_embed", None), Tensor) else ()


def _rng_state() -> dict[str, Any]:
    """The state of every generator that training may draw from, in types that load with ``weights_only=True``."""
    version, internal, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(internal), gauss],
        "numpy": [numpy_state[1].tolist(), *numpy_state[2:]],
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), *rest))
