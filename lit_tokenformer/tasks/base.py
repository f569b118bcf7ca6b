"""What every task shares: optimizer and schedule, checkpoints that fit any stage of growth, exact resume."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lit_tokenformer.cost import ModelCost, match_tokens, model_cost
from lit_tokenformer.distributed.checkpoint import check_has_optimizers
from lit_tokenformer.distributed.sharding import clip_gradients, shard
from lit_tokenformer.distributed.strategy import make_growing
from lit_tokenformer.errors import UserError
from lit_tokenformer.growth.optimizer import check_optimizer_state
from lit_tokenformer.models import Tokenformer, TokenformerConfig, model_size, param_tokens, preset_config
from lit_tokenformer.models.config import MAY_CHANGE, config_changes
from lit_tokenformer.tasks.optimization import OptimizedTask
from lit_tokenformer.tasks.resume import fit_settings, report_changes, report_nothing_left, rng_state, set_rng_state
from lit_tokenformer.tasks.schedule import LRSchedule, LRSchedulerConfig

_SIZES = {
    *("dim", "depth", "num_heads", "vocab_size", "context_length"),
    *("image_size", "patch_size", "in_chans", "num_classes"),
}
"""Fields of an architecture that another one takes over to be compared with it."""

COMPUTING_METHODS = ("training_step", "validation_step", "test_step", "predict_step", "model_output")
"""Methods that compute with a task's parameters, beside ``forward``."""


class LitTask(OptimizedTask):
    """A backbone under training.

    Args:
        backbone: The model; ``None`` for a task that is made of others, which hold theirs.
        optimizer: Makes the optimizer from parameter groups.
        schedule: Learning rate over the fit.
        lr_scheduler: Makes a torch scheduler that takes the place of ``schedule``.
        compile: Whether the backbone is compiled with ``torch.compile``; it is compiled once for each size.
        grad_checkpointing: Whether blocks are computed again in the backward pass, to save memory.
        lr_scheduler_config: When ``lr_scheduler`` steps.
    """

    backbone: Tokenformer
    dynamic_shapes: bool | None = False
    """What ``torch.compile`` is told of the shapes of batches."""
    layerwise_lr = False
    """Whether parameters get the multiples of the learning rate that their architecture declares."""
    scores: tuple[str, ...] = ("loss",)
    """Names of the scores of an evaluation."""
    required_fields: ClassVar[Mapping[str, Any]] = {}
    """Fields of the architecture, ``head`` among them, that make a preset with another head one of this task."""

    def __init__(
        self,
        backbone: Tokenformer | None,
        optimizer: OptimizerCallable,
        schedule: LRSchedule | dict[str, Any],
        lr_scheduler: LRSchedulerCallable | None,
        compile: bool,
        grad_checkpointing: bool,
        lr_scheduler_config: LRSchedulerConfig | dict[str, Any] = LRSchedulerConfig(),  # noqa: B008  (frozen)
    ) -> None:
        super().__init__(optimizer, schedule, lr_scheduler, lr_scheduler_config)
        if backbone is not None:
            self.backbone = backbone
            backbone.set_grad_checkpointing(grad_checkpointing)
            if compile:
                backbone.compile(dynamic=self.dynamic_shapes)
        self._rng_states: list[dict[str, Any]] | None = None
        self._settings: dict[str, Any] | None = None  # of the fit
        self._resumed: dict[str, Any] | None = None  # settings of the fit that is resumed
        self._within: tuple[LitTask, str] | None = None

    @staticmethod
    def make_backbone(preset: str, given: dict[str, Any], match: str | None, match_to: str | None) -> Tokenformer:
        """The model of a task; with ``match`` at the parameter tokens that make it as large as another.

        Args:
            preset: A name from ``lit_tokenformer.models.list_presets()``.
            given: Fields of the architecture that replace the preset's.
            match: ``parameters``, ``flops`` or ``None``, as of :func:`~lit_tokenformer.cost.match_tokens`.
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

    @classmethod
    def architectures(cls, arguments: Mapping[str, Any]) -> dict[str, TokenformerConfig]:
        """The architectures that a task's arguments describe, by name as in :attr:`backbones`."""
        sizes = ("num_classes", "image_size", "vocab_size", "context_length")
        given = {name: arguments[name] for name in sizes if name in arguments}
        return {"": preset_config(arguments["preset"], **{**given, **arguments["overrides"]})}

    def architecture_changes(self, checkpoint: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """Compare the architecture with that of a checkpoint, whose weights may fit in shape and mean something else.

        Returns:
            Fields that must not differ and do, and those that may differ and do; none where the checkpoint has no
            arguments of such a task.
        """
        try:
            saved = self.architectures(checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY])
        except (ValueError, TypeError, AttributeError, KeyError):
            return [], []
        wrong, changed = [], []
        for name, model in self.backbones.items():
            for field, (before, now) in config_changes(saved[name], model.config).items() if name in saved else ():
                setting = f"{name}.{field}".lstrip(".")
                if field not in MAY_CHANGE:
                    wrong.append(f"{setting} {before!r} (this model: {now!r})")
                elif field not in ("param_tokens", "depth"):  # the weights have their own
                    changed.append(f"{setting} {before!r} -> {now!r}")
        return wrong, changed

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
        plain |= {"lr_scheduler_config": dataclasses.asdict(self.lr_scheduler_config)}
        self.hparams.clear()
        self.save_hyperparameters(plain)

    def model_output(self, batch: Any) -> Any:
        """What the model gives for a batch, without loss, a tensor or several; growth is checked on it."""
        raise NotImplementedError  # each task knows its batch

    def total_loss(self, batch: Any) -> tuple[Tensor, Tensor | int]:
        """Training loss with the auxiliary losses of the model's parts, each logged as ``train/aux/NAME``."""
        loss, count = self.training_loss(batch)
        for name, extra in self.backbone.take_aux_losses().items():
            self.log(f"train/aux/{name}", extra.detach())
            loss = loss + extra
        return loss, count

    def configure_model(self) -> None:
        """Shard the model, block by block, under ``fsdp2`` or a plain ``ModelParallelStrategy``."""
        if self.device_mesh is None:
            return
        averages = [callback for callback in self.trainer.callbacks if isinstance(callback, WeightAveraging)]  # type: ignore
        if averages:
            raise UserError(
                f"trainer.callbacks: {type(averages[0]).__name__} averages whole models, and under "
                "ModelParallelStrategy no process holds one; leave it out, or use 'ddp'"
            )
        for model in self.backbones.values():
            if len(model.blocks) != model.config.depth and self.trainer.state.fn == TrainerFn.FITTING:
                raise UserError(
                    f"model.overrides.depth: expected {len(model.blocks)}, the blocks of the initial weights, got "
                    f"{model.config.depth}; under ModelParallelStrategy the fit could not be resumed"
                )
        shard(self, self.device_mesh, COMPUTING_METHODS)
        make_growing(self.trainer.strategy)  # type: ignore[arg-type]

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

    @property
    def task_data(self) -> Any:
        """The trainer's data module; of a part of another task, the part of it with the same name."""
        data = getattr(self._trainer, "datamodule", None)
        return data if self._within is None else getattr(data, self._within[1], data)

    def log(self, name: str, value: Any, **settings: Any) -> None:  # type: ignore[override]
        """Lightning's ``log``; the task that this one is a part of does it, if there is one."""
        if self._within is None:
            super().log(name, value, **settings)
        else:
            self._within[0].log(self.metric(name), value, **{**settings, "add_dataloader_idx": False})

    def logged_metrics(self) -> set[str]:
        """Names of the training and validation metrics that a callback can monitor."""
        model = self.backbones.get("")
        own = [f"train/aux/{name}" for name in model.loss_names] if model is not None else []
        return {self.metric(name) for name in ("train/loss", *own, *(f"val/{score}" for score in self.scores))}

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
            rate = group["lr"] if self.learning_rate is None else self.learning_rate
            group["lr"] = rate * group.get("lr_scale", 1.0)
        optimizer.register_load_state_dict_post_hook(check_optimizer_state)
        return optimizer

    def on_validation_epoch_end(self) -> None:
        """Tells callbacks the model's size, so that a checkpoint can have it in its name."""
        sizes = {f"size/tokens_{kind}": float(total) for kind, total in param_tokens(self).items()}
        self.log_dict(sizes, logger=False, sync_dist=True)
        self.log_scores("val")
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self._step_after_validation()

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
        self.save_size(checkpoint)
        states: list[Any] = [rng_state()]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, rng_state())
        checkpoint["rng_states"] = states
        if self._settings is not None:
            checkpoint["fit_settings"] = self._settings

    def save_size(self, checkpoint: dict[str, Any]) -> None:
        """Write into a checkpoint what its tensors do not tell before a model is built: totals of growth."""
        checkpoint["param_tokens"] = param_tokens(self)
        initial = {model.config.depth for model in self.modules() if isinstance(model, Tokenformer)}
        if (depth := model_size(self).get("depth")) not in {*initial, None}:
            checkpoint["grown_depth"] = depth

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses the weights of another architecture; the layers themselves take the size of their tokens."""
        trainer: Any = self._trainer
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            if trainer.strategy.lightning_restore_optimizer:  # else the strategy has looked
                check_has_optimizers(checkpoint)
            saved = checkpoint.get("fit_settings")
            self._resumed = saved if isinstance(saved, dict) else {}
        self.load_extras(checkpoint)
        self.take_trained_weights(checkpoint)
        for model in (module for module in self.modules() if isinstance(module, Tokenformer)):
            depth = checkpoint.get("grown_depth", model.config.depth)
            if depth != len(model.blocks):
                model.set_depth(depth)
        self.check_architecture(checkpoint)
        self._rng_states = checkpoint.get("rng_states")

    def check_architecture(self, checkpoint: Mapping[str, Any]) -> None:
        """Raise a ``UserError`` if the weights of a checkpoint, or their shapes, are not of this model."""
        wrong, _ = self.architecture_changes(checkpoint) if self._trainer is not None else ([], [])
        if wrong:
            raise UserError(f"ckpt_path: the checkpoint is of another architecture: {', '.join(wrong)}")
        if "state_dict" in checkpoint:  # else they were loaded already
            self.check_weights(checkpoint["state_dict"])

    def take_trained_weights(self, checkpoint: dict[str, Any]) -> None:
        """Replace the moving average in a checkpoint by the trained weights, where this fit has no average."""
        if "current_model_state" in checkpoint and self._trains_without_average():
            # the optimizer's state belongs to the weights that were trained, not to their moving average
            checkpoint["state_dict"] = checkpoint["current_model_state"]

    def check_weights(self, state_dict: Mapping[str, Any]) -> None:
        """Refuse the weights of another architecture; only names and shapes are read.

        Raises:
            UserError: For the first tensor that does not fit.
        """
        for problem in state_dict_problems(self, state_dict):
            raise UserError(f"ckpt_path: the checkpoint is of another architecture: {problem}")

    def _trains_without_average(self) -> bool:
        trainer: Any = self._trainer
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return False
        return not any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)

    def on_fit_start(self) -> None:
        self._settings = fit_settings(self.trainer)

    def on_fit_end(self) -> None:
        if self._resumed is not None:
            report_nothing_left(self.trainer)
        self._resumed = None

    def on_train_start(self) -> None:
        if self._resumed is not None and self._settings is not None:
            self._settings = report_changes(self.trainer, self._settings, self._resumed)
            self._resumed = None
        loop = self.trainer.fit_loop
        loop._load_combined_loader_states()  # not yet, where the schedule asked for the data before they were restored
        epochs = loop.epoch_progress.current
        if loop.restarted_mid_epoch and epochs.completed == epochs.ready:
            loop.reset_restart_stage()  # the epoch was over; else Lightning would miscount all that come after it
        self.update_schedule()
        if self._rng_states is not None and len(self._rng_states) == self.trainer.world_size:
            set_rng_state(self._rng_states[self.global_rank], str(self.trainer.ckpt_path))
        self._rng_states = None


def state_dict_problems(module: nn.Module, state_dict: Mapping[str, Any]) -> Iterator[str]:
    """What keeps a state dict from being that of ``module`` at some number of parameter tokens, a line each."""
    own, free = module.state_dict(), resizable_dims(module)
    for name in own:
        if name not in state_dict:
            yield f"{name} is missing"
    for name, tensor in state_dict.items():
        if name not in own:
            if name not in free:
                yield f"{name} is not part of this model"
            continue
        shape, dims = own[name].shape, free.get(name, set())
        if tensor.ndim != len(shape) or any(
            have != want for dim, (have, want) in enumerate(zip(tensor.shape, shape, strict=True)) if dim not in dims
        ):
            wanted = ", ".join("any" if dim in dims else str(want) for dim, want in enumerate(shape))
            yield f"{name} has shape {tuple(tensor.shape)}, expected ({wanted}{',' if len(shape) == 1 else ''})"


def resizable_dims(module: nn.Module) -> dict[str, set[int]]:
    """Dimensions that take the size of what is loaded, by the names of the tensors."""
    found: dict[str, set[int]] = {}
    for name, part in module.named_modules(remove_duplicate=False):  # a part that tasks share has a name in each
        for axis in part.axes() if callable(getattr(part, "axes", None)) else ():  # type: ignore[operator]
            for tensor in axis.tensors:
                found.setdefault(f"{name}.{tensor.name}".lstrip("."), set()).add(tensor.dim)
        if isinstance(positions := getattr(part, "pos_embed", None), Tensor):
            found[f"{name}.pos_embed"] = set(range(positions.ndim - 1))
    return found
