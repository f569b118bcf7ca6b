"""Image classification: cross-entropy with hard or soft targets, top-1 and top-5 accuracy."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from lit_tokenformer.errors import UserError
from lit_tokenformer.models import BackboneOverrides
from lit_tokenformer.registry import TASKS
from lit_tokenformer.tasks.base import LitTask
from lit_tokenformer.tasks.optimization import LRSchedule, LRSchedulerConfig


@TASKS.register("LitImageClassifier")
class LitImageClassifier(LitTask):
    """Train a backbone to classify images.

    A batch is ``(image (B, 3, H, W) float, label (B,) int64 or (B, C) float)``. The task logs ``train/loss``,
    ``val/loss``, ``val/acc1`` and ``val/acc5`` (also ``test/...``): accuracies in [0, 1], losses in nats.

    Args:
        preset: Architecture, a name from ``lit_tokenformer.models.list_presets()``.
        num_classes: Number of classes C; determined by the data set on the command line.
        image_size: Image side in pixels; determined by the data set on the command line.
        overrides: Fields of the architecture that replace the preset's.
        optimizer: Optimizer factory, called with parameter groups; one-dimensional parameters, class token and position
            embeddings are not decayed.
        schedule: Learning rate over the fit.
        lr_scheduler: Factory of a torch scheduler that replaces ``schedule``.
        match: Pick the initial number of parameter tokens so that the blocks match those of ``match_to`` in
            ``parameters``, or in ``flops`` per data token; ``None`` uses the number of preset and overrides.
        match_to: Reference preset, with the overridden sizes of this model; ``None`` for this model with linear
            projections.
        compile: Whether to compile the backbone with ``torch.compile``, once per size.
        grad_checkpointing: Whether to recompute blocks in the backward pass, to save memory.
        lr_scheduler_config: Timing of ``lr_scheduler``: interval, frequency, and the monitor of ReduceLROnPlateau.

    Raises:
        ValueError: For an unknown preset or incompatible sizes.

    Example:
        >>> task = LitImageClassifier("tokenformer_vit_tiny_patch16_224", num_classes=10, image_size=32)
        >>> task(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """

    scores = ("loss", "acc1", "acc5")
    required_fields: ClassVar[Mapping[str, Any]] = {
        "stem": "patch",
        "head": "image",
        "positions": "learned",
        "causal": False,
    }

    def __init__(
        self,
        preset: str = "tokenformer_vit_small_patch16_224",
        num_classes: int = 1000,
        image_size: int = 224,
        overrides: BackboneOverrides = BackboneOverrides(),  # noqa: B008  (frozen)
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=3e-4, weight_decay=0.05),
        schedule: LRSchedule = LRSchedule(),  # noqa: B008  (frozen)
        lr_scheduler: LRSchedulerCallable | None = None,
        match: str | None = None,
        match_to: str | None = None,
        compile: bool = False,
        grad_checkpointing: bool = False,
        lr_scheduler_config: LRSchedulerConfig = LRSchedulerConfig(),  # noqa: B008  (frozen)
    ) -> None:
        given = {"num_classes": num_classes, "image_size": image_size, **self.plain(overrides)}
        backbone = self.make_backbone(preset, given, match, match_to)
        super().__init__(backbone, optimizer, schedule, lr_scheduler, compile, grad_checkpointing, lr_scheduler_config)
        self.remember_arguments()
        self._make_metrics()

    def _make_metrics(self) -> None:
        classes = self.backbone.num_classes
        self.val_acc1 = MulticlassAccuracy(classes, top_k=1, average="micro")
        self.val_acc5 = MulticlassAccuracy(classes, top_k=min(5, classes), average="micro")
        self.test_acc1, self.test_acc5 = self.val_acc1.clone(), self.val_acc5.clone()

    def forward(self, image: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, classes)."""
        return self.backbone(image)

    def model_output(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.backbone(batch[0])

    def setup(self, stage: str) -> None:
        data = self.task_data
        sizes = {name: getattr(self.backbone.config, name) for name in ("image_size", "in_chans")}
        for name, own in {"num_classes": self.backbone.num_classes, **sizes}.items():
            theirs = getattr(data, name, own)
            if theirs != own:
                raise UserError(f"model.{name}: does not match the data (got {own}, expected {theirs})")
        classes = self.backbone.num_classes
        if classes != self.val_acc1.num_classes:  # ``backbone.reset_classifier`` was called
            self._make_metrics()
            self.hparams["overrides"].pop("num_classes", None)
            self.hparams["num_classes"] = classes

    def training_loss(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        image, label = batch
        loss = F.cross_entropy(self(image), label)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(image))
        return loss, len(image)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_acc1, self.val_acc5)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_acc1, self.test_acc5)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Compute class probabilities (B, C)."""
        return self(batch[0]).float().softmax(dim=-1)

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str, acc1: Metric, acc5: Metric) -> None:
        image, label = batch
        logits = self(image)
        acc1.update(logits, label)
        acc5.update(logits, label)
        loss = F.cross_entropy(logits, label)
        self.log(f"{stage}/loss", loss, sync_dist=True, batch_size=self.log_weight(len(image)))
        self.log(f"{stage}/acc1", acc1, prog_bar=True, batch_size=len(image))
        self.log(f"{stage}/acc5", acc5, batch_size=len(image))


# a lambda, so that the command line shows its body; named, so that `ddp_spawn` can pickle it
default_adamw = inspect.signature(LitImageClassifier).parameters["optimizer"].default
default_adamw.__qualname__ = "default_adamw"
