"""Base class of all tasks: optimizer and schedule, checkpoints of any growth stage, exact resume."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from lit_tokenformer.growth.axes import quantized_parameters
from lit_tokenformer.growth.optimizer import check_optimizer_state
from lit_tokenformer.models import Tokenformer, TokenformerConfig, model_size, param_tokens, preset_config
from lit_tokenformer.models.config import MAY_CHANGE, config_changes
from lit_tokenformer.models.experts import saved_experts
from lit_tokenformer.optim import MuonWithAuxAdam
from lit_tokenformer.tasks.optimization import LRSchedule, LRSchedulerConfig, OptimizedTask
from lit_tokenformer.tasks.resume import (
    fit_settings,
    redraw_iterators,
    report_changes,
    report_nothing_left,
    rng_state,
    set_rng_state,
)

_SIZES = {
    *("dim", "depth", "num_heads", "vocab_size", "context_length"),
    *("image_size", "patch_size", "in_chans", "num_classes"),
}
"""Fields of an architecture that a reference model adopts for a comparison."""

COMPUTING_METHODS = ("training_step", "validation_step", "test_step", "predict_step", "model_output")
"""Methods that compute with a task's parameters, in addition to ``forward``."""


class LitTask(OptimizedTask):
    """Train a backbone.

    Args:
        backbone: The model; ``None`` for a task composed of others, which have their own.
        optimizer: Optimizer factory, called with parameter groups.
        schedule: Learning rate over the fit.
        lr_scheduler: Factory of a torch scheduler that replaces ``schedule``.
        compile: Whether to compile the backbone with ``torch.compile``, once per size.
        grad_checkpointing: Whether to recompute blocks in the backward pass, to save memory.
        lr_scheduler_config: Timing of ``lr_scheduler``.
    """

    backbone: Tokenformer
    dynamic_shapes: bool | None = False
    """Argument ``dynamic`` of ``torch.compile``, for the shapes of batches."""
    layerwise_lr = False
    """Whether to apply the learning-rate multiples declared by the architecture."""
    scores: tuple[str, ...] = ("loss",)
    """Names of the evaluation scores."""
    required_fields: ClassVar[Mapping[str, Any]] = {}
    """Architecture fields, including ``head``, that adapt a preset with another head to this task."""

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
        self._resumed: dict[str, Any] | None = None  # settings of the resumed fit
        self._within: tuple[LitTask, str] | None = None
        self.loss_terms: list[Callable[[LitTask, Any], Tensor]] = []
        """Terms of callbacks, ``(task, batch) -> ()``, added to the training loss."""

    @staticmethod
    def make_backbone(preset: str, given: dict[str, Any], match: str | None, match_to: str | None) -> Tokenformer:
        """Build the backbone of a task; with ``match``, at the number of parameter tokens that matches a reference.

        Args:
            preset: A name from ``lit_tokenformer.models.list_presets()``.
            given: Fields of the architecture that replace the preset's.
            match: ``parameters``, ``flops`` or ``None``, see :func:`~lit_tokenformer.cost.match_tokens`.
            match_to: Reference preset, with the size fields of ``given``; ``None`` for the same model with linear
                projections.

        Raises:
            ValueError: For an unknown preset or field, and if no number of tokens matches.
        """
        config = preset_config(preset, **given)
        if match is None:
            if match_to is not None:
                raise UserError("model.match_to: needs model.match: parameters or flops")
            return Tokenformer(config)
        if given.get("param_tokens") is not None:
            raise UserError("model.match: conflicts with model.overrides.param_tokens (expected null)")
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
        """Return the set fields of an architecture, from a dataclass or from a checkpoint's dictionary."""
        given = overrides if isinstance(overrides, dict) else dataclasses.asdict(overrides)
        return {key: value for key, value in given.items() if value is not None}

    @classmethod
    def architectures(cls, arguments: Mapping[str, Any]) -> dict[str, TokenformerConfig]:
        """Return the architectures described by a task's arguments, by name as in :attr:`backbones`."""
        sizes = ("num_classes", "image_size", "in_chans", "vocab_size", "context_length")
        given = {name: arguments[name] for name in sizes if arguments.get(name) is not None}
        return {"": preset_config(arguments["preset"], **{**given, **arguments["overrides"]})}

    def architecture_changes(self, checkpoint: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """Compare the architecture with a checkpoint's, whose weights may match in shape but differ in meaning.

        Returns:
            Changed fields that must not change, and those that may; both empty if the checkpoint has no arguments of
            such a task.
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
                elif field not in ("param_tokens", "depth", "experts"):  # determined by the weights
                    changed.append(f"{setting} {before!r} -> {now!r}")
        return wrong, changed

    def remember_arguments(self, overrides: Sequence[str] = ("overrides",)) -> None:
        """Save the arguments of the calling ``__init__`` in the checkpoints, as plain types only.

        Optimizer and scheduler factories are saved if they come from a config, and omitted if they are functions.

        Args:
            overrides: Names of the arguments with fields of an architecture.
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
        """Return the model's output for a batch, without loss, as one or several tensors; used to check growth."""
        raise NotImplementedError  # depends on the task's batch

    def batch_features(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Compute what the loss of a batch depends on: features (..., D) or logits, and their targets (...)."""
        raise NotImplementedError  # depends on the task's batch

    def feature_loss(self, features: Tensor, target: Tensor) -> tuple[Tensor, Tensor | int]:
        """Compute the mean loss of :meth:`batch_features`, (), as in evaluation, and its number of items."""
        raise NotImplementedError

    def feature_logits(self, features: Tensor) -> Tensor:
        """Compute the logits (..., C) of :meth:`batch_features`."""
        raise NotImplementedError

    def total_loss(self, batch: Any) -> tuple[Tensor, Tensor | int]:
        """Compute the training loss plus auxiliary losses of the model's parts, each logged as ``train/aux/NAME``.

        The terms of callbacks, in ``loss_terms``, are added as well.
        """
        loss, count = self.training_loss(batch)
        for name, extra in self.backbone.take_aux_losses().items():
            self.log(f"train/aux/{name}", extra.detach())
            loss = loss + extra
        for term in self.loss_terms:
            loss = loss + term(self, batch)
        return loss, count

    def configure_model(self) -> None:
        """Shard the model, block by block, under ``fsdp2`` or a plain ``ModelParallelStrategy``."""
        if self.device_mesh is None:
            return
        averages = [callback for callback in self.trainer.callbacks if isinstance(callback, WeightAveraging)]  # type: ignore
        if averages:
            raise UserError(
                f"trainer.callbacks: {type(averages[0]).__name__} needs an unsharded model in each process (got "
                "ModelParallelStrategy); remove it, or use 'ddp'"
            )
        for model in self.backbones.values():
            if len(model.blocks) != model.config.depth and self.trainer.state.fn == TrainerFn.FITTING:
                raise UserError(
                    f"model.overrides.depth: expected {len(model.blocks)}, the depth of the initial weights, got "
                    f"{model.config.depth}; under ModelParallelStrategy the fit could not be resumed"
                )
            if (now := model.size.get("experts", 1)) != model.config.experts:
                raise UserError(
                    f"model.overrides.experts: expected {now}, those of the initial weights, got "
                    f"{model.config.experts}; under ModelParallelStrategy the fit could not be resumed"
                )
        experts = getattr(self.trainer.strategy, "expert_parallel_size", 1)
        shard(self, self.device_mesh, COMPUTING_METHODS, experts)
        make_growing(self.trainer.strategy)  # type: ignore[arg-type]

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients as Lightning does, or by the norm over all shards of a sharded model."""
        if isinstance(self, FSDPModule) and gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            clip_gradients(self.parameters(), gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def put_within(self, task: LitTask, name: str) -> None:
        """Nest this task in another one, which logs for it: ``val/loss`` as ``val/NAME/loss``."""
        self._within = task, name  # a tuple avoids registration as a submodule

    def metric(self, name: str) -> str:
        """Return the logged name of a score such as ``val/loss``."""
        stage, _, score = name.partition("/")
        return name if self._within is None else f"{stage}/{self._within[1]}/{score}"

    @property
    def task_data(self) -> Any:
        """Data module of the trainer; for a nested task, its part with the same name."""
        data = getattr(self._trainer, "datamodule", None)
        return data if self._within is None else getattr(data, self._within[1], data)

    def log(self, name: str, value: Any, **settings: Any) -> None:  # type: ignore[override]
        """Log with Lightning, through the enclosing task of a nested one."""
        if self._within is None:
            super().log(name, value, **settings)
        else:
            self._within[0].log(self.metric(name), value, **{**settings, "add_dataloader_idx": False})

    def logged_metrics(self, data: Any = None) -> set[str]:
        """Return the names of training and validation metrics that a callback can monitor.

        Args:
            data: Data module of the fit; ``None`` for that of the trainer.
        """
        model = self.backbones.get("")
        own = [f"train/aux/{name}" for name in model.loss_names] if model is not None else []
        return {self.metric(name) for name in ("train/loss", *own, *(f"val/{score}" for score in self.scores))}

    def log_scores(self, stage: str) -> None:
        """Log scores derived from the means over a whole evaluation; none by default.

        Args:
            stage: val or test.
        """

    def log_weight(self, count: int) -> int:
        """Return the weight of a mean over ``count`` items logged with ``sync_dist``.

        Lightning averages the weights of all processes as integers. Multiplication by the number of processes avoids
        rounding.
        """
        return count * self.trainer.world_size

    @property
    def backbones(self) -> dict[str, Tokenformer]:
        """Models by task name; the name is empty for a task that is not nested."""
        return {"": self.backbone}

    def cost(self) -> ModelCost:
        """Return parameters and FLOPs of the model at its current size."""
        return model_cost(self.backbone.config, self.backbone.size, self.backbone.grad_checkpointing)

    def parameter_groups(self, matrices: bool = False) -> list[dict[str, Any]]:
        """Build parameter groups with and without weight decay.

        One-dimensional parameters and those declared by the backbone are not decayed. Parameters with their own
        learning rate are in groups with its multiple, ``lr_scale``.

        Args:
            matrices: Separate the decayed matrices of the blocks, by ``use_muon``, from embeddings and heads.
        """
        models = [(path, model) for path, model in self.named_modules() if isinstance(model, Tokenformer)]
        spared = {f"{path}.{name}" for path, model in models for name in model.no_weight_decay()}
        scales: dict[str, float] = {}
        for path, model in models if self.layerwise_lr else []:
            scales |= {f"{path}.{name}": scale for name, scale in model.lr_scales().items()}
        hidden = {f"{path}.blocks.{name}" for path, model in models for name, _ in model.blocks.named_parameters()}
        groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                bare = parameter.ndim <= 1 or name in spared
                rest = matrices and (bare or parameter.ndim != 2 or name not in hidden)
                groups.setdefault((scales.get(name, 1.0), bare, rest), []).append(parameter)
        return [
            {"params": groups[scale, bare, rest]}
            | ({"weight_decay": 0.0} if bare else {})
            | ({"lr_scale": scale} if scale != 1 else {})
            | ({"use_muon": not rest} if matrices else {})
            for scale, bare, rest in sorted(groups)
        ]

    def build_optimizer(self) -> torch.optim.Optimizer:
        """Build the optimizer over the current parameters; it rejects loaded state of a wrong shape."""
        if not any(parameter.requires_grad for parameter in self.parameters()):
            for name in quantized_parameters(self):
                raise UserError(f"model: {name} is quantized, for inference only (expected training before it)")
        optimizer = self.make_optimizer(self.parameter_groups())
        if isinstance(optimizer, MuonWithAuxAdam):
            optimizer = self.make_optimizer(self.parameter_groups(matrices=True))
        for group in optimizer.param_groups:
            rate = group["lr"] if self.learning_rate is None else self.learning_rate
            group["lr"] = rate * group.get("lr_scale", 1.0)
        optimizer.register_load_state_dict_post_hook(check_optimizer_state)
        return optimizer

    def on_validation_epoch_end(self) -> None:
        """Report the model's size to callbacks, for use in checkpoint names."""
        sizes = {f"size/tokens_{kind}": float(total) for kind, total in param_tokens(self).items()}
        self.log_dict(sizes, logger=False, sync_dist=True)
        self.log_scores("val")
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self._step_after_validation()

    def on_test_epoch_end(self) -> None:
        self.log_scores("test")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Show the losses in the progress bar; with ``prog_bar`` Lightning would wait for the device in each batch."""
        trainer = self.trainer
        shows = trainer._logger_connector.should_update_logs or batch_idx == 0
        for name, loss in trainer.callback_metrics.items() if shows and trainer.progress_bar_callback else ():
            if name.startswith("train/") and name.endswith("loss"):
                trainer.progress_bar_metrics[name] = float(loss)

    def save_extras(self, checkpoint: dict[str, Any]) -> None:
        """Add task state other than the weights to a checkpoint; none by default."""

    def load_extras(self, checkpoint: dict[str, Any]) -> None:
        """Restore the state added by :meth:`save_extras`.

        Raises:
            ValueError: If it does not match the data.
        """

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.save_extras(checkpoint)
        checkpoint["task"] = type(self).__name__.removeprefix("FSDP")  # torch's prefix of sharded classes
        self.save_size(checkpoint)
        states: list[Any] = [rng_state()]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, rng_state())
        checkpoint["rng_states"] = states
        if self._settings is not None:
            checkpoint["fit_settings"] = self._settings

    def save_size(self, checkpoint: dict[str, Any]) -> None:
        """Add the totals of growth to a checkpoint, which its tensors do not reveal before a model is built."""
        checkpoint["param_tokens"] = param_tokens(self)
        initial = {model.config.depth for model in self.modules() if isinstance(model, Tokenformer)}
        if (depth := model_size(self).get("depth")) not in {*initial, None}:
            checkpoint["grown_depth"] = depth

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Reject the weights of another architecture; layers adopt their number of tokens on their own."""
        trainer: Any = self._trainer
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            if trainer.strategy.lightning_restore_optimizer:  # otherwise the strategy has checked
                check_has_optimizers(checkpoint)
            saved = checkpoint.get("fit_settings")
            self._resumed = saved if isinstance(saved, dict) else {}
        self.load_extras(checkpoint)
        self.take_trained_weights(checkpoint)
        for model in (module for module in self.modules() if isinstance(module, Tokenformer)):
            depth = checkpoint.get("grown_depth", model.config.depth)
            if depth != len(model.blocks):
                model.set_depth(depth)
        for path, model in self.named_modules(remove_duplicate=False):
            if isinstance(model, Tokenformer) and "state_dict" in checkpoint:  # otherwise already loaded
                experts = saved_experts(checkpoint["state_dict"], f"{path}.")
                model.set_experts(max(experts, model.config.experts))
        self.check_architecture(checkpoint)
        self._rng_states = checkpoint.get("rng_states")

    def check_data(self, checkpoint: Mapping[str, Any], data: Any) -> None:
        """Raise a ``UserError`` if the data do not fit a checkpoint; any data fit by default.

        Args:
            checkpoint: The checkpoint.
            data: The data module.
        """

    def check_architecture(self, checkpoint: Mapping[str, Any]) -> None:
        """Raise a ``UserError`` if a checkpoint's architecture or its tensor shapes do not match this model."""
        wrong, _ = self.architecture_changes(checkpoint) if self._trainer is not None else ([], [])
        if wrong:
            raise UserError(f"ckpt_path: the checkpoint is of another architecture: {', '.join(wrong)}")
        if "state_dict" in checkpoint:  # otherwise they are already loaded
            self.check_weights(checkpoint["state_dict"])

    def take_trained_weights(self, checkpoint: dict[str, Any]) -> None:
        """Replace the moving average in a checkpoint by the trained weights, if this fit has no average."""
        if "current_model_state" in checkpoint and self._trains_without_average():
            # the optimizer state belongs to the trained weights, not to their moving average
            checkpoint["state_dict"] = checkpoint["current_model_state"]

    def check_weights(self, state_dict: Mapping[str, Any]) -> None:
        """Reject the weights of another architecture; only names and shapes are read.

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
        loop._load_combined_loader_states()  # pending if the schedule set up the data before they were restored
        epochs = loop.epoch_progress.current
        if loop.restarted_mid_epoch and epochs.completed == epochs.ready:
            loop.reset_restart_stage()  # the epoch had ended; otherwise Lightning miscounts all later ones
        self.update_schedule()
        if self._rng_states is not None and len(self._rng_states) == self.trainer.world_size:
            set_rng_state(self._rng_states[self.global_rank], str(self.trainer.ckpt_path))
        self._rng_states = None

    def on_train_epoch_start(self) -> None:
        redraw_iterators(self.trainer.fit_loop)


def state_dict_problems(module: nn.Module, state_dict: Mapping[str, Any]) -> Iterator[str]:
    """Yield the mismatches of a state dict with ``module`` at any number of parameter tokens, one line each."""
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
    """Map tensor names to the dimensions that adopt the size of a loaded tensor."""
    found: dict[str, set[int]] = {}
    for name, part in module.named_modules(remove_duplicate=False):  # a shared part has one name per task
        for axis in part.axes() if callable(getattr(part, "axes", None)) else ():  # type: ignore[operator]
            for tensor in axis.tensors:
                found.setdefault(f"{name}.{tensor.name}".lstrip("."), set()).add(tensor.dim)
        if isinstance(positions := getattr(part, "pos_embed", None), Tensor):
            found[f"{name}.pos_embed"] = set(range(positions.ndim - 1))
    return found
