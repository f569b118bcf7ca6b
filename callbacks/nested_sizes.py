"""Training of nested sizes: every size of a model from one fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from callbacks.parameter_growth import ParameterGrowthCallback
from lit_tokenformer.errors import UserError
from lit_tokenformer.growth.shrink import planned_prefix, prefix, reorder_units, unit_importance
from lit_tokenformer.tasks import LitTask

ROWS_BYTES = 2**26
"""Maximum size of the logits of a chunk of rows in the distillation loss, in bytes."""
RANKED_SAMPLES = 64
"""Maximum number of samples of the first batch, in each process, that rank the units by importance."""


class NestedSizes(Callback):
    """Train the first units of every layer as smaller models, next to the whole model (MatFormer, arXiv 2310.07707).

    Each optimizer step trains the whole model and ``per_step`` nested sizes, in turn. ``lit-tokenformer shrink
    --tokens 0.25`` then writes a size as an ordinary checkpoint. A fit that starts from trained weights sorts the units
    of each layer by importance on its first batch, which preserves the function of the whole model
    (:func:`~lit_tokenformer.growth.shrink.unit_importance`); optimizer state and :class:`~callbacks.GrowingEMA` follow.

    A step costs the forward and backward pass of those nested sizes in addition. ``val/loss@0.25`` (also
    ``test/...``) is the loss of a size in evaluation, ``train/nested@0.25`` its training loss.

    Args:
        sizes: Shares of the units of each layer, above 0 and below 1.
        distill: Weight of the Kullback-Leibler divergence from the whole model's predictions in the loss of a nested
            size; the rest is the weight of the task's own loss.
        kinds: Kinds of axes that nest: ``qkv``, ``proj``, ``ffn``, ``other``, ``hidden``, ``heads``. ``None`` for all
            parameter tokens, or for the hidden units of a model without any.
        sort: Whether to sort the units by importance, once per fit. Set ``false`` if the order has a meaning already:
            after an earlier fit with nested sizes, or where the first units are a model that must stay as it is.
        per_step: Number of nested sizes that each optimizer step trains; their losses add up.

    Raises:
        UserError: For sizes out of range. When a fit starts, for a size that leaves a layer without units, for a task
            or strategy that is not supported, and for a weight averaging that cannot follow the order.

    Note:
        A growth in the same fit changes what a share contains. After ``split`` by a whole factor each size computes the
        same function as before, if its number of units was whole; after ``zero`` it contains more of the old units.
        Activation checkpointing applies to the whole model only.

    Example:
        >>> NestedSizes([0.5, 0.25]).sizes
        (0.25, 0.5)
    """

    def __init__(
        self,
        sizes: list[float],
        distill: float = 1.0,
        kinds: list[str] | None = None,
        sort: bool = True,
        per_step: int = 1,
    ) -> None:
        if not sizes or any(not 0 < size < 1 for size in sizes) or len(set(sizes)) < len(sizes):
            raise UserError(f"sizes: expected different shares above 0 and below 1, got {sizes}")
        if not 0 <= distill <= 1:
            raise UserError(f"distill: expected a weight from 0 to 1, got {distill}")
        if not 1 <= per_step <= len(sizes):
            raise UserError(f"per_step: expected a number from 1 to {len(sizes)}, that of sizes, got {per_step}")
        self.sizes = tuple(sorted(map(float, sizes)))
        self.distill = distill
        self.kinds = kinds
        self.sort = sort
        self.per_step = per_step
        self._sorted = False
        self._recorded: dict[LitTask, _Recorded] = {}

    def logged_metrics(self, pl_module: LightningModule) -> set[str]:
        """Return the names of the validation metrics that a callback can monitor."""
        return {task.metric(f"val/loss@{size:g}") for task in _tasks(pl_module).values() for size in self.sizes}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for task in _tasks(pl_module).values():
            for size in self.sizes:
                planned_prefix(task.backbone, self._tokens(size), "sizes")
        strategy = trainer.strategy
        if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) or isinstance(strategy, DeepSpeedStrategy):
            raise UserError(
                "trainer.strategy: NestedSizes needs an unsharded model in each process (got "
                f"{type(strategy).__name__}); use 'auto' or 'ddp'"
            )
        for callback in trainer.callbacks if self.sort else ():  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging) and not hasattr(callback, "on_unit_order"):
                raise UserError(
                    f"trainer.callbacks: {type(callback).__name__} cannot follow the order of the units; use "
                    "callbacks.GrowingEMA, or set sort: false"
                )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trainer = trainer
        for task in _tasks(pl_module).values():
            self._recorded[task] = _Recorded(task)
            task.loss_terms.append(self._loss)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for task, recorded in self._recorded.items():
            recorded.remove()
            task.loss_terms.remove(self._loss)
        self._recorded = {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_fit_end(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.sort and not self._sorted and batch_idx % trainer.accumulate_grad_batches == 0:
            self._sort_units(trainer, pl_module, batch)
            self._sorted = True

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, loader: int = 0
    ) -> None:
        self._evaluate(trainer, pl_module, batch, loader, "val")

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, loader: int = 0
    ) -> None:
        self._evaluate(trainer, pl_module, batch, loader, "test")

    def state_dict(self) -> dict[str, Any]:
        return {"sorted": self._sorted}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._sorted = state_dict["sorted"]

    def _tokens(self, size: float) -> float | dict[str, int | float]:
        return size if self.kinds is None else dict.fromkeys(self.kinds, size)

    @contextmanager
    def _nested(self, task: LitTask, size: float) -> Iterator[None]:
        """Evaluate a task at a nested size, without activation checkpointing: the block ends before the backward."""
        model = task.backbone
        checkpointing = model.grad_checkpointing
        model.set_grad_checkpointing(False)
        try:
            with prefix(model, self._tokens(size)):
                yield
        finally:
            model.set_grad_checkpointing(checkpointing)

    def _loss(self, task: LitTask, batch: Any) -> Tensor:
        """Compute the loss of the nested sizes of the current optimizer step, ()."""
        teacher = self._recorded[task].last
        first = self.per_step * self._trainer.global_step
        numbers = range(first, first + self.per_step)
        losses = [self._loss_at(task, batch, self.sizes[one % len(self.sizes)], teacher) for one in numbers]
        return torch.stack(losses).sum()

    def _loss_at(self, task: LitTask, batch: Any, size: float, teacher: Tensor) -> Tensor:
        with self._nested(task, size):
            features, target = self._recorded[task].compute(batch)
        task.backbone.take_aux_losses()
        loss = torch.zeros((), device=features.device)
        if self.distill > 0:
            loss = loss + self.distill * distillation_loss(task, features, teacher, target)
        if self.distill < 1:
            loss = loss + (1 - self.distill) * task.feature_loss(features, target)[0]
        task.log(f"train/nested@{size:g}", loss.detach())
        return loss

    def _evaluate(self, trainer: Any, pl_module: LightningModule, batch: Any, loader: int, stage: str) -> None:
        tasks = list(_tasks(pl_module).values())
        task = tasks[loader if len(tasks) > 1 else 0]
        for size in self.sizes:
            with self._nested(task, size), trainer.precision_plugin.val_step_context():
                loss, count = task.feature_loss(*task.batch_features(batch))
            task.log(f"{stage}/loss@{size:g}", loss, batch_size=task.log_weight(int(count)), sync_dist=True)

    def _sort_units(self, trainer: Any, pl_module: LightningModule, batch: Any) -> None:
        """Sort the units of each layer by importance for a batch, the most important first.

        Importance is the mean over samples of the size of the first-order effect. The signed mean vanishes in trained
        weights, where the gradient does.
        """
        for callback in trainer.callbacks:
            if isinstance(callback, ParameterGrowthCallback) and callback.events and callback.steps:
                raise UserError(
                    "sort: the rows of an earlier growth are in use by ParameterGrowthCallback; set sort: false, or "
                    "list NestedSizes first"
                )
        importance: dict[str, Tensor] = {}
        training = {part: part.training for part in pl_module.modules()}
        pl_module.eval()
        try:
            with trainer.precision_plugin.train_step_context(), torch.compiler.set_stance("force_eager"):
                for one in self._sample_importance(pl_module, batch):
                    importance = {key: importance.get(key, 0) + value.abs() for key, value in one.items()}
        finally:
            for part, mode in training.items():
                part.training = mode
        flat = torch.cat(list(importance.values())).float().to(pl_module.device)
        shares = trainer.strategy.reduce(flat, reduce_op="mean").cpu().split([len(one) for one in importance.values()])
        order = {key: one.argsort(descending=True, stable=True) for key, one in zip(importance, shares, strict=True)}
        reorder_units(pl_module, order, trainer.optimizers)
        for callback in trainer.callbacks:
            if hasattr(callback, "on_unit_order"):
                callback.on_unit_order(trainer, pl_module, order)
        rank_zero_info(f"Sorted the units of {len(order)} axes by their importance for the first batch")

    def _sample_importance(self, pl_module: LightningModule, batch: Any) -> Iterator[dict[str, Tensor]]:
        """Yield the importance of the units for single samples of a batch, for each task."""
        tasks = _tasks(pl_module)
        axes = [one for task in tasks.values() for one in planned_prefix(task.backbone, self._tokens(self.sizes[0]))]
        kinds = {one.axis.kind for one in axes}
        parameters = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
        for name, task in tasks.items():
            own = batch[name] if name else batch
            samples = min(RANKED_SAMPLES, *(len(leaf) for leaf in tree_leaves(own) if isinstance(leaf, Tensor)))
            for number in range(samples):
                sample = tree_map_only(Tensor, itemgetter(slice(number, number + 1)), own)
                loss, _ = task.feature_loss(*task.batch_features(sample))
                found = torch.autograd.grad(loss, parameters, allow_unused=True)
                gradient = {one: grad for one, grad in zip(parameters, found, strict=True) if grad is not None}
                yield unit_importance(pl_module, kinds, gradient)


class _Recorded:
    """Record the features of a task's last batch, by replacing its method ``batch_features``.

    Args:
        task: The task.

    Attributes:
        last: The features, without gradient.
        compute: The method.
    """

    last: Tensor

    def __init__(self, task: LitTask) -> None:
        self._task, self.compute = task, task.batch_features
        task.batch_features = self  # type: ignore[method-assign,assignment]

    def __call__(self, batch: Any) -> tuple[Tensor, Tensor]:
        features, target = self.compute(batch)
        self.last = features.detach()
        return features, target

    def remove(self) -> None:
        """Restore the method."""
        del self._task.batch_features


def distillation_loss(task: LitTask, features: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """Compute the mean KL divergence of a model's predictions from a teacher's, in nats, ().

    Logits are computed in chunks of rows, and again in the backward pass if there are several.

    Args:
        task: Task with the output projection.
        features: Features (..., D) of the model.
        teacher: Features (..., D) of the teacher, without gradient.
        target: Targets (...), negative for rows to ignore; or class probabilities (..., C).
    """

    def divergence(own: Tensor, others: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = task.feature_logits(others).float().log_softmax(dim=-1)
        return F.kl_div(task.feature_logits(own).float().log_softmax(dim=-1), wanted, reduction="sum", log_target=True)

    own, others = features.flatten(0, -2), teacher.flatten(0, -2)  # (n, D)
    if not target.is_floating_point():
        known = target.flatten() >= 0
        own, others = own[known], others[known]
    if len(own) == 0:
        return own.sum()
    classes = task.feature_logits(others[:1]).shape[-1]
    pieces = zip(*(one.split(max(1, ROWS_BYTES // (4 * classes))) for one in (own, others)), strict=True)
    chunks = list(pieces)
    if len(chunks) == 1:
        return divergence(*chunks[0]) / len(own)
    sums = [checkpoint(divergence, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.stack(sums).sum() / len(own)


def _tasks(pl_module: LightningModule) -> dict[str, LitTask]:
    """Return the tasks of a module by name; the name is empty for one that is not nested.

    Raises:
        UserError: If a task does not separate features and loss.
    """
    tasks: dict[str, Any] = getattr(pl_module, "tasks", {"": pl_module})
    for task in tasks.values():
        if not isinstance(task, LitTask) or type(task).batch_features is LitTask.batch_features:
            raise UserError(
                "model: NestedSizes needs a task with the methods batch_features, feature_loss and feature_logits "
                f"(got {type(task).__name__})"
            )
    return tasks
