"""Masked language modeling: cross-entropy and accuracy of the masked tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lit_tokenformer.errors import UserError
from lit_tokenformer.models import BackboneOverrides
from lit_tokenformer.registry import TASKS
from lit_tokenformer.tasks.language import LitLanguageTask
from lit_tokenformer.tasks.losses import linear_cross_entropy
from lit_tokenformer.tasks.optimization import LRSchedule, LRSchedulerConfig

Batch = tuple[Tensor, Tensor, Tensor]

_ROWS = 2048  # maximum number of logit rows in memory during evaluation


def mosaic_adamw(params: Any) -> torch.optim.Optimizer:
    """Build AdamW with MosaicBERT's settings (arXiv 2312.17482, where decay is not multiplied by the learning rate)."""
    return torch.optim.AdamW(params, lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.02)


@TASKS.register("LitMaskedLM")
class LitMaskedLM(LitLanguageTask):
    """Train a backbone to predict masked tokens (BERT, arXiv 1810.04805, section 3.1).

    A batch is ``(tokens (B, T) int64, labels (B, T) int64, lengths (B,) int64)``. Labels are -100 except at tokens to
    predict. Positions from ``lengths`` on are padding. The task logs ``train/loss``, ``val/loss``, ``val/perplexity``
    and ``val/accuracy`` (also ``test/...``): means over the masked tokens, losses in nats. The head is computed for
    those tokens only; ``cost()`` counts it for all tokens, and padding as text. Losses at different masking rates are
    not comparable. The gradient is that of the mean over all masked tokens of an optimizer step, regardless of their
    batch and process.

    Args:
        preset: Architecture, a name from ``lit_tokenformer.models.list_presets()``; in a config also ``checkpoint``:
            the architecture of ``init_from`` or ``ckpt_path``, with the tokenizer of that checkpoint.
        vocab_size: Vocabulary size V; determined by the data on the command line, unless ``overrides`` sets it.
        context_length: Maximum sequence length T in tokens; determined by the data's block size on the command line.
        overrides: Fields of the architecture that replace the preset's.
        optimizer: Optimizer factory, called with parameter groups; one-dimensional parameters are not decayed.
        schedule: Learning rate over the fit.
        lr_scheduler: Factory of a torch scheduler that replaces ``schedule``.
        match: Pick the initial number of parameter tokens so that the blocks match those of ``match_to`` in
            ``parameters``, or in ``flops`` per data token; ``None`` uses the number of preset and overrides.
        match_to: Reference preset, with the overridden sizes of this model; ``None`` for this model with linear
            projections.
        compile: Whether to compile the backbone with ``torch.compile``, once per size with dynamic shapes; without
            padding (``unpad``), in several graphs.
        grad_checkpointing: Whether to recompute blocks in the backward pass, to save memory.
        lr_scheduler_config: Timing of ``lr_scheduler``: interval, frequency, and the monitor of ReduceLROnPlateau.

    Raises:
        ValueError: For an unknown preset, incompatible sizes, or an architecture without a masked-language head.

    Example:
        >>> task = LitMaskedLM("bert_tiny", vocab_size=320, context_length=16)
        >>> task(torch.zeros(2, 16, dtype=torch.long), torch.tensor([16, 9])).shape
        torch.Size([2, 16, 320])
    """

    data_module = "MaskedTextDataModule"
    masked = True
    dynamic_shapes = None  # the number of masked tokens varies by batch
    scores = ("loss", "perplexity", "accuracy")
    required_fields: ClassVar[Mapping[str, Any]] = {
        "stem": "token",
        "head": "masked_language",
        "positions": "rotary",
        "causal": False,
    }

    def __init__(
        self,
        preset: str = "mosaic_bert_small",
        vocab_size: int = 30528,
        context_length: int = 512,
        overrides: BackboneOverrides = BackboneOverrides(),  # noqa: B008  (frozen)
        optimizer: OptimizerCallable = mosaic_adamw,
        schedule: LRSchedule = LRSchedule(),  # noqa: B008  (frozen)
        lr_scheduler: LRSchedulerCallable | None = None,
        match: str | None = None,
        match_to: str | None = None,
        compile: bool = False,
        grad_checkpointing: bool = False,
        lr_scheduler_config: LRSchedulerConfig = LRSchedulerConfig(),  # noqa: B008  (frozen)
    ) -> None:
        given = {"vocab_size": vocab_size, "context_length": context_length, **self.plain(overrides)}
        backbone = self.make_backbone(preset, given, match, match_to)
        if backbone.config.head != "masked_language":
            raise UserError(
                f"model.preset: {preset!r} is not a masked language model (got head {backbone.config.head!r}, expected "
                "'masked_language')"
            )
        super().__init__(backbone, optimizer, schedule, lr_scheduler, compile, grad_checkpointing, lr_scheduler_config)
        self.remember_arguments()

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Map token ids (B, T) with ``lengths`` (B,), excluding padding, to logits (B, T, V)."""
        return self.backbone(tokens, lengths=lengths)

    def model_output(self, batch: Batch) -> Tensor:
        """Compute logits (1, T, V) of the first example of a batch."""
        tokens, _, lengths = batch
        return self(tokens[:1], lengths[:1])

    def training_loss(self, batch: Batch) -> tuple[Tensor, int]:
        features, labels = self.batch_features(batch)
        loss, _ = self.feature_loss(features, labels)
        self.log("train/loss", loss, batch_size=len(batch[0]))
        return loss, len(labels)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def log_scores(self, stage: str) -> None:
        loss = self.trainer.callback_metrics[self.metric(f"{stage}/loss")]
        self.log(f"{stage}/perplexity", loss.exp(), prog_bar=True)

    def batch_features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Compute the input of the vocabulary projection (M, D), and the labels (M,) of the masked tokens."""
        tokens, labels, lengths = batch
        places = labels.flatten().ge(0).nonzero()[:, 0]
        features = self.backbone(tokens, lengths=lengths, places=places, pre_logits=True)
        return features, labels.flatten()[places]

    def feature_loss(self, features: Tensor, target: Tensor) -> tuple[Tensor, int]:
        head: Any = self.backbone.head
        total, _ = linear_cross_entropy(features, head.weight, target, bias=head.bias)
        return total / max(len(target), 1), len(target)

    def feature_logits(self, features: Tensor) -> Tensor:
        head: Any = self.backbone.head
        return F.linear(features, head.weight, head.bias)

    def _evaluate(self, batch: Batch, stage: str) -> None:
        features, labels = self.batch_features(batch)
        loss = hits = torch.zeros((), device=labels.device)
        for piece, label in zip(features.split(_ROWS), labels.split(_ROWS), strict=True):
            logits = self.feature_logits(piece).float()  # (rows, V)
            loss = loss + F.cross_entropy(logits, label, reduction="sum")
            hits = hits + (logits.argmax(dim=-1) == label).sum()
        count = max(len(labels), 1)
        loss, accuracy = loss / count, hits / count
        weight = self.log_weight(len(labels))  # token means, independent of batches
        self.log(f"{stage}/loss", loss, batch_size=weight, sync_dist=True, prog_bar=True)
        self.log(f"{stage}/accuracy", accuracy, batch_size=weight, sync_dist=True, prog_bar=True)
