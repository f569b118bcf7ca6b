"""Image classification: cross-entropy with hard or soft targets, top-1 and top-5 accuracy."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from lit_tokenformer.data.images.datasets import UNREADABLE, prediction_loader
from lit_tokenformer.data.images.folders import few
from lit_tokenformer.errors import UserError
from lit_tokenformer.models import BackboneOverrides
from lit_tokenformer.registry import TASKS
from lit_tokenformer.tasks.base import LitTask
from lit_tokenformer.tasks.optimization import LRSchedule, LRSchedulerConfig


class ImagePrediction(NamedTuple):
    """Prediction for one image.

    Attributes:
        image: Path of the image.
        probabilities: Probability by class name, the most probable first; empty for an unreadable image.
    """

    image: str
    probabilities: dict[str, float]


@TASKS.register("LitImageClassifier")
class LitImageClassifier(LitTask):
    """Train a backbone to classify images.

    A batch is ``(image (B, 3, H, W) float, label (B,) int64 or (B, C) float)``. The task logs ``train/loss``,
    ``val/loss``, ``val/acc1`` and ``val/acc5`` (also ``test/...``): accuracies in [0, 1], losses in nats.

    Checkpoints contain the class names and the evaluation transform of the training data: :meth:`predict_images` needs
    no data module, and labels of evaluation data with the same classes in another order are mapped by name.

    Args:
        preset: Architecture, a name from ``lit_tokenformer.models.list_presets()``; in a config also ``checkpoint``:
            the architecture of ``init_from`` or ``ckpt_path``.
        num_classes: Number of classes C; determined by the data set on the command line.
        image_size: Image size in pixels; determined by the data set on the command line.
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
        in_chans: Number of image channels; determined by the data set on the command line. ``None`` for the preset's.

    Raises:
        ValueError: For an unknown preset or incompatible sizes.

    Example:
        >>> task = LitImageClassifier("tokenformer_vit_tiny_patch16_224", num_classes=10, image_size=32)
        >>> task(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """

    image_data: dict[str, Any] | None = None
    """Class names and evaluation transform of the training data (``ImageDataModule.image_data``), where known."""
    _class_map: Tensor | None = None
    """Class of the model for each label of the data, (C,); None for the same order."""
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
        image_size: int | tuple[int, int] = 224,
        overrides: BackboneOverrides = BackboneOverrides(),  # noqa: B008  (frozen)
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=3e-4, weight_decay=0.05),
        schedule: LRSchedule = LRSchedule(),  # noqa: B008  (frozen)
        lr_scheduler: LRSchedulerCallable | None = None,
        match: str | None = None,
        match_to: str | None = None,
        compile: bool = False,
        grad_checkpointing: bool = False,
        lr_scheduler_config: LRSchedulerConfig = LRSchedulerConfig(),  # noqa: B008  (frozen)
        in_chans: int | None = None,
    ) -> None:
        sizes = self.plain({"num_classes": num_classes, "image_size": image_size, "in_chans": in_chans})
        given = {**sizes, **self.plain(overrides)}
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
        if stage == "fit":
            self.image_data = getattr(data, "image_data", None)
        self._match_data(self.image_data)

    def save_extras(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["image_data"] = self.image_data

    def load_extras(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("image_data")  # older checkpoints have none
        self._match_data(saved)
        if getattr(self.task_data, "image_data", None) is None or self.trainer.state.fn != TrainerFn.FITTING:
            self.image_data = saved

    def check_data(self, checkpoint: Mapping[str, Any], data: Any) -> None:
        """Raise a ``UserError`` if the data have other classes than a checkpoint, in any order."""
        present, saved = getattr(data, "image_data", None), checkpoint.get("image_data")
        ours, theirs = (list((one or {}).get("class_names", ())) for one in (present, saved))
        if ours and theirs and (odd := sorted({*ours} ^ {*theirs})):
            raise UserError(
                f"data: the classes are not those of the checkpoint (got {few(ours)}; expected {few(theirs)}); "
                f"{len(odd)} are in one of them only: {few(odd)}"
            )

    def _match_data(self, saved: Mapping[str, Any] | None) -> None:
        """Map the labels of the data to the classes of the model by name; warn about another transform.

        Raises:
            UserError: If the data have other classes, or a fit has them in another order.
        """
        self._class_map = None
        data = getattr(self.task_data, "image_data", None)
        if saved is None or data is None:
            return
        ours, theirs, stage = data["class_names"], saved["class_names"], self.trainer.state.fn
        if ours != theirs and stage != TrainerFn.PREDICTING:  # which uses no label
            self.check_data({"image_data": saved}, self.task_data)
            if stage == TrainerFn.FITTING or len({*ours}) < len(ours):
                raise UserError(
                    f"data: the classes are in another order than in the checkpoint (got {few(ours)}; expected "
                    f"{few(theirs)})"
                )
            rank_zero_info("Labels are mapped to the classes of the checkpoint by name: the data have another order")
            self._class_map = torch.tensor([theirs.index(name) for name in ours])
        changed = [name for name in saved if name != "class_names" and saved[name] != data.get(name)]
        if changed:
            values = ", ".join(f"{name} {saved[name]} -> {data.get(name)}" for name in changed)
            rank_zero_warn(f"data: images are transformed differently than in training: {values}")

    def training_loss(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        loss, count = self.feature_loss(*self.batch_features(batch))
        self.log("train/loss", loss, batch_size=count)
        return loss, count

    def batch_features(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Compute logits (B, C), and the labels (B,) or (B, C)."""
        image, label = batch
        if self._class_map is not None:
            label = self._class_map.to(label.device)[label]
        return self(image), label

    def feature_loss(self, features: Tensor, target: Tensor) -> tuple[Tensor, int]:
        return F.cross_entropy(features, target), len(features)

    def feature_logits(self, features: Tensor) -> Tensor:
        return features

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Evaluate a batch, and return its labels (B,) and predicted classes (B,)."""
        return self._evaluate(batch, "val", self.val_acc1, self.val_acc5)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Evaluate a batch, and return its labels (B,) and predicted classes (B,)."""
        return self._evaluate(batch, "test", self.test_acc1, self.test_acc5)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Compute class probabilities (B, C)."""
        return self(batch[0]).float().softmax(dim=-1)

    def predict_images(
        self,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        batch_size: int = 32,
        num_workers: int = 0,
        top: int | None = None,
    ) -> list[ImagePrediction]:
        """Classify images with the evaluation transform of the training data.

        Args:
            paths: Images, folders (all images below, sorted by path) or tar files; one or several.
            batch_size: Images per batch.
            num_workers: Number of worker processes.
            top: Number of the most probable classes to return; ``None`` for all.

        Returns:
            One ``(image, probabilities)`` per image; ``probabilities`` maps class names to floats, most probable first.

        Raises:
            UserError: If the checkpoint has no class names, or a path has no readable image.

        Example:
            ::

                task = LitImageClassifier.load_from_checkpoint("last.ckpt")
                for image, probabilities in task.predict_images("photos"):
                    print(image, *probabilities.items())
        """
        return list(self._predictions(paths, batch_size, num_workers, top))

    @torch.inference_mode()
    def _predictions(self, paths: Any, batch_size: int, num_workers: int, top: int | None) -> Iterator[ImagePrediction]:
        names = (self.image_data or {}).get("class_names", ())
        if self.image_data is None or len(names) != self.backbone.num_classes:
            raise UserError(
                "ckpt_path: the checkpoint has no class names and no image transform, since it was saved by an earlier "
                "version or without ImageDataModule; predict with its config and --data.predict_root"
            )
        loader, samples = prediction_loader(paths, self.image_data, batch_size, num_workers)
        training, number = self.training, 0
        self.eval()
        for image, label in loader:
            found = self.predict_step((image.to(self.device), label), 0).cpu()  # (B, C)
            shares, classes = found.topk(min(top or len(names), len(names)), dim=1)
            for one, best, probs in zip(label.tolist(), classes.tolist(), shares.tolist(), strict=True):
                known = {} if one == UNREADABLE else {names[i]: share for i, share in zip(best, probs, strict=True)}
                yield ImagePrediction(samples.name(number), known)
                number += 1
        self.train(training)

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str, acc1: Metric, acc5: Metric) -> dict[str, Tensor]:
        logits, label = self.batch_features(batch)
        acc1.update(logits, label)
        acc5.update(logits, label)
        loss, count = self.feature_loss(logits, label)
        self.log(f"{stage}/loss", loss, sync_dist=True, batch_size=self.log_weight(count))
        self.log(f"{stage}/acc1", acc1, prog_bar=True, batch_size=count)
        self.log(f"{stage}/acc5", acc5, batch_size=count)
        return {"label": label, "predicted": logits.argmax(dim=1)}


# a lambda, so that the command line shows its body; named, so that `ddp_spawn` can pickle it
default_adamw = inspect.signature(LitImageClassifier).parameters["optimizer"].default
default_adamw.__qualname__ = "default_adamw"
