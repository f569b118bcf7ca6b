"""What every task shares: optimizer and schedule, checkpoints that fit any stage of growth, exact resume."""

from __future__ import annotations

import dataclasses
import inspect
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lit_tokenformer.compute import ModelCost, match_tokens, model_cost
from lit_tokenformer.errors import UserError
from lit_tokenformer.models import Pattention, Tokenformer, model_size, param_tokens, preset_config
from lit_tokenformer.optimizer_growth import check_optimizer_state
from lit_tokenformer.parallel import clip_gradients, divide
from lit_tokenformer.sharded_checkpoints import load_into, save_folder
from lit_tokenformer.tasks.schedule import LRSchedule

_SIZES = {
    *("dim", "depth", "num_heads", "vocab_size", "context_length"),
    *("image_size", "patch_size", "in_chans", "num_classes"),
}
"""Fields of an architecture that another one takes over to be compared with it."""

COMPUTING_METHODS = ("training_step", "validation_step", "test_step", "predict_step", "model_output")
"""Methods that compute with a task's parameters, beside ``forward``."""


class LitTask(pl.LightningModule):
    """A backbone under training.

    Args:
        backbone: The model; ``None`` for a task that is made of others, which hold theirs.
        optimizer: Makes the optimizer from parameter groups.
        schedule: Learning rate over the fit.
        lr_scheduler: Makes a torch scheduler that takes the place of ``schedule``; it steps once an epoch.
        compile: Whether the backbone is compiled with ``torch.compile``; it is compiled once for each size.
        grad_checkpointing: Whether blocks are computed again in the backward pass, to save memory.
    """

    backbone: Tokenformer
    dynamic_shapes: bool | None = False
    """What ``torch.compile`` is told of the shapes of batches."""
    layerwise_lr = False
    """Whether parameters get the multiples of the learning rate that their architecture declares."""

    def __init__(
        self,
        backbone: Tokenformer | None,
        optimizer: OptimizerCallable,
        schedule: LRSchedule | dict[str, Any],
        lr_scheduler: LRSchedulerCallable | None,
        compile: bool,
        grad_checkpointing: bool,
    ) -> None:
        super().__init__()
        self.make_optimizer = optimizer
        self.schedule = LRSchedule(**schedule) if isinstance(schedule, dict) else schedule
        self.make_lr_scheduler = lr_scheduler
        if backbone is not None:
            self.backbone = backbone
            backbone.set_grad_checkpointing(grad_checkpointing)
            if compile:
                backbone.compile(dynamic=self.dynamic_shapes)
        self._rng_states: list[dict[str, Any]] | None = None
        self._within: tuple[LitTask, str] | None = None

    @staticmethod
    def make_backbone(preset: str, given: dict[str, Any], match: str | None, match_to: str | None) -> Tokenformer:
        """The model of a task; with ``match`` at the parameter tokens that make it as large as another.

        Args:
            preset: A name from ``lit_tokenformer.models.list_presets()``.
            given: Fields of the architecture that replace the preset's.
            match: ``parameters``, ``flops`` or ``None``, as of :func:`~lit_tokenformer.compute.match_tokens`.
            match_to: A preset, with those of the given fields that are sizes; ``None`` for the same model with linear
                projections.

        Raises:
            ValueError: For an unknown preset or field, and what cannot be matched.
        """
        config = preset_config(preset, **given)
        if match is None:
            if match_to is not None:
                raise UserError("model.match_to: it needs model.match: parameters or flops")
            return Tokenformer(config)
        if given.get("param_tokens") is not None:
            raise UserError("model.match: it chooses param_tokens; leave model.overrides.param_tokens out, or null")
        if match_to is None:
            feed_forward = "mlp" if config.feed_forward == "pattention" else config.feed_forward
            reference = dataclasses.replace(config, projection="linear", feed_forward=feed_forward)
        else:
            reference = preset_config(match_to, **{key: given[key] for key in given if key in _SIZES})
        try:
            tokens = match_tokens(config, reference, match)
        except ValueError as error:
            raise UserError(f"model.{error}") from None
        return Tokenformer(dataclasses.replace(config, param_tokens=tokens))

    @staticmethod
    def plain(overrides: Any) -> dict[str, Any]:
        """The fields of an architecture that a user gave, from a dataclass or from what a checkpoint keeps of it."""
        given = overrides if isinstance(overrides, dict) else dataclasses.asdict(overrides)
        return {key: value for key, value in given.items() if value is not None}

    def remember_arguments(self, overrides: Sequence[str] = ("overrides",)) -> None:
        """Keeps the arguments of the calling ``__init__`` in the checkpoints, as plain types only.

        What makes the optimizer is plain where it comes from a config, and left out where it is a function.

        Args:
            overrides: Those that hold fields of an architecture.
        """
        frame = inspect.currentframe()
        self.save_hyperparameters(frame=frame and frame.f_back)
        made = ("optimizer", "lr_scheduler")
        plain = {key: value for key, value in self.hparams.items() if key not in made or isinstance(value, Mapping)}
        plain |= {key: self.plain(plain[key]) for key in overrides}
        plain |= {"schedule": dataclasses.asdict(self.schedule)}
        self.hparams.clear()
        self.save_hyperparameters(plain)

    def model_output(self, batch: Any) -> Any:
        """What the model gives for a batch, without loss, a tensor or several; growth is checked on it."""
        raise NotImplementedError  # each task knows its batch

    def configure_model(self) -> None:
        """Under Lightning's ``ModelParallelStrategy``, divides the model among the processes, block by block."""
        if self.device_mesh is None:
            return
        averages = [callback for callback in self.trainer.callbacks if isinstance(callback, WeightAveraging)]  # type: ignore
        if averages:
            raise UserError(
                f"trainer.callbacks: {type(averages[0]).__name__} averages whole models, and under "
                "ModelParallelStrategy no process holds one; leave it out, or use 'ddp'"
            )
        divide(self, self.device_mesh, COMPUTING_METHODS)
        strategy: Any = self.trainer.strategy
        save = partial(type(strategy).save_checkpoint, strategy)

        def save_checkpoint(checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
            if strategy._save_distributed_checkpoint:
                save_folder(strategy, save, checkpoint, filepath)
            else:
                save(checkpoint, filepath, storage_options)

        def load_checkpoint(checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
            path = strategy.broadcast(checkpoint_path)
            return load_into(self, strategy.optimizers, path, self._take_trained_weights, self._check_architecture)

        strategy.save_checkpoint, strategy.load_checkpoint = save_checkpoint, load_checkpoint

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Lightning's, and for a model that is divided in several ways the same over all its parts."""
        if isinstance(self, FSDPModule) and gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            clip_gradients(self.parameters(), gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def put_within(self, task: LitTask, name: str) -> None:
        """Makes this a part of another task, which logs for it from now on: ``val/loss`` as ``val/NAME/loss``."""
        self._within = task, name  # in a tuple, or it would be a module of this one

    def metric(self, name: str) -> str:
        """What a score such as ``val/loss`` is called in the logs."""
        stage, _, score = name.partition("/")
        return name if self._within is None else f"{stage}/{self._within[1]}/{score}"

    def log(self, name: str, value: Any, **settings: Any) -> None:  # type: ignore[override]
        """Lightning's ``log``; the task that this one is a part of does it, if there is one."""
        if self._within is None:
            super().log(name, value, **settings)
        else:
            self._within[0].log(self.metric(name), value, **{**settings, "add_dataloader_idx": False})

    def log_scores(self, stage: str) -> None:
        """Logs what follows from the means over a whole evaluation; nothing, where a task does not say what.

        Args:
            stage: val or test.
        """

    def log_weight(self, count: int) -> int:
        """The weight of a mean over ``count`` items that is logged with ``sync_dist``.

        Lightning averages the weights of all processes as whole numbers; times their number, none is rounded.
        """
        return count * self.trainer.world_size

    @property
    def backbones(self) -> dict[str, Tokenformer]:
        """The models by the name of their task; of a task by itself the name is empty."""
        return {"": self.backbone}

    def cost(self) -> ModelCost:
        """Parameters and operations of the model at its present size."""
        return model_cost(self.backbone.config, self.backbone.size, self.backbone.grad_checkpointing)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters that are decayed, and those that are not: one-dimensional ones and what the backbone declares.

        Those with a learning rate of their own stand in groups with its multiple, ``lr_scale``.
        """
        models = [(path, model) for path, model in self.named_modules() if isinstance(model, Tokenformer)]
        spared = {f"{path}.{name}" for path, model in models for name in model.no_weight_decay()}
        scales: dict[str, float] = {}
        for path, model in models if self.layerwise_lr else []:
            scales |= {f"{path}.{name}": scale for name, scale in model.lr_scales().items()}
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                key = scales.get(name, 1.0), parameter.ndim <= 1 or name in spared
                groups.setdefault(key, []).append(parameter)
        return [
            {"params": groups[scale, bare]}
            | ({"weight_decay": 0.0} if bare else {})
            | ({"lr_scale": scale} if scale != 1 else {})
            for scale, bare in sorted(groups)
        ]

    def build_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer over the present parameters; it refuses state of a wrong shape when it is loaded."""
        optimizer = self.make_optimizer(self.parameter_groups())
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * group.get("lr_scale", 1.0)
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
            raise UserError(
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
            raise UserError("schedule.unit: epochs of a stream have no known length; use 'step'")
        return math.ceil(batches / self.trainer.accumulate_grad_batches)

    def on_validation_epoch_end(self) -> None:
        """Tells callbacks the model's size, so that a checkpoint can have it in its name."""
        sizes = {f"size/tokens_{kind}": float(total) for kind, total in param_tokens(self).items()}
        self.log_dict(sizes, logger=False, sync_dist=True)
        self.log_scores("val")

    def on_test_epoch_end(self) -> None:
        self.log_scores("test")

    def save_extras(self, checkpoint: dict[str, Any]) -> None:
        """Adds to a checkpoint what a task needs beside its weights; nothing, where it does not say what."""

    def load_extras(self, checkpoint: dict[str, Any]) -> None:
        """Takes what :meth:`save_extras` put into a checkpoint.

        Raises:
            ValueError: If it does not fit the data.
        """

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.save_extras(checkpoint)
        checkpoint["task"] = type(self).__name__.removeprefix("FSDP")  # which torch names the class of a divided model
        checkpoint["param_tokens"] = param_tokens(self)
        born = {model.config.depth for model in self.modules() if isinstance(model, Tokenformer)}
        if (depth := model_size(self).get("depth")) not in {*born, None}:
            checkpoint["grown_depth"] = depth
        states: list[Any] = [_rng_state()]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, _rng_state())
        checkpoint["rng_states"] = states

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses the weights of another architecture; the layers themselves take the size of their tokens."""
        self.load_extras(checkpoint)
        self._take_trained_weights(checkpoint)
        for model in (module for module in self.modules() if isinstance(module, Tokenformer)):
            depth = checkpoint.get("grown_depth", model.config.depth)
            if depth != len(model.blocks):
                model.set_depth(depth)
        if "state_dict" in checkpoint:  # else they were loaded already
            self._check_architecture(checkpoint["state_dict"])
        self._rng_states = checkpoint.get("rng_states")

    def _take_trained_weights(self, checkpoint: dict[str, Any]) -> None:
        if "current_model_state" in checkpoint and self._trains_without_average():
            # the optimizer's state belongs to the weights that were trained, not to their moving average
            checkpoint["state_dict"] = checkpoint["current_model_state"]

    def _check_architecture(self, state_dict: Mapping[str, Any]) -> None:
        for problem in state_dict_problems(self, state_dict):
            raise UserError(f"ckpt_path: the checkpoint is of another architecture: {problem}")

    def _trains_without_average(self) -> bool:
        trainer: Any = self._trainer
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return False
        return not any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)

    def on_train_start(self) -> None:
        loop = self.trainer.fit_loop
        epochs = loop.epoch_progress.current
        if loop.restarted_mid_epoch and epochs.completed == epochs.ready:
            loop.reset_restart_stage()  # the epoch was over; else Lightning would miscount all that come after it
        if self._rng_states is not None and len(self._rng_states) == self.trainer.world_size:
            _set_rng_state(self._rng_states[self.global_rank])
        self._rng_states = None


def state_dict_problems(module: nn.Module, state_dict: Mapping[str, Any]) -> Iterator[str]:
    """What keeps a state dict from being that of ``module`` at some number of parameter tokens, a line each."""
    own = module.state_dict()
    layers = module.named_modules(remove_duplicate=False)  # a layer that tasks share has a name in each of them
    free = {f"{name}.{part}" for name, layer in layers for part in _free_parts(layer)}
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
        return Pattention.PARTS
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
