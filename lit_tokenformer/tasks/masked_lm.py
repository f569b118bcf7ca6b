"""Masked language modelling: cross-entropy and accuracy of the tokens that were masked."""

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
from lit_tokenformer.tasks.schedule import LRSchedule, LRSchedulerConfig

Batch = tuple[Tensor, Tensor, Tensor]

_ROWS = 2048  # of logits that are held at once when the best token is looked for


def mosaic_adamw(params: Any) -> torch.optim.Optimizer:
    """AdamW as MosaicBERT was trained with it (arXiv 2312.17482; the decay there is not multiplied by the rate)."""
    return torch.optim.AdamW(params, lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.02)


@TASKS.register("LitMaskedLM")
class LitMaskedLM(LitLanguageTask):
    """Trains a backbone to tell the tokens that were masked (BERT, arXiv 1810.04805, section 3.1).

    A batch is ``(tokens (B, T) int64, labels (B, T) int64, lengths (B,) int64)``: labels are -100 but where a token is
    to be told; what stands after ``lengths`` is padding. It logs ``train/loss``, ``val/loss``, ``val/perplexity`` and
    ``val/accuracy`` (``test/...`` likewise): means over the masked tokens, losses in nats. The head is computed for
    those tokens alone; ``cost()`` counts it for all, and padding as if it were text. Losses under different shares of
    masked tokens are not comparable. The gradient is that of the mean over all masked tokens of an optimizer step,
    whatever batches and processes they are in.

    Args:
        preset: Architecture, a name from ``lit_tokenformer.models.list_presets()``.
        vocab_size: Token ids, V; on the command line the data decide, unless ``overrides`` has it.
        context_length: Longest text in tokens, T; on the command line the data's block size decides.
        overrides: Fields of the architecture that replace the preset's.
        optimizer: Makes the optimizer from parameter groups; decay spares one-dimensional parameters.
        schedule: Learning rate over the fit.
        lr_scheduler: A torch scheduler that takes the place of ``schedule``.
        match: Choose the parameter tokens at birth so that the blocks have as many ``parameters``, or take as many
            ``flops`` for each data token, as those of ``match_to``; ``None`` takes those of preset and overrides.
        match_to: A preset, with the overridden sizes of this model; ``None`` for this model with linear projections.
        compile: Whether the backbone is compiled with ``torch.compile``, for each size with shapes that may change;
            without padding (``unpad``) in several graphs.
        grad_checkpointing: Whether blocks are computed again in the backward pass, to save memory.
        lr_scheduler_config: When ``lr_scheduler`` steps: interval, frequency, and the monitor of ReduceLROnPlateau.

    Raises:
        ValueError: For an unknown preset, sizes that do not fit each other, or an architecture without the right head.

    Example:
        >>> task = LitMaskedLM("bert_tiny", vocab_size=320, context_length=16)
        >>> task(torch.zeros(2, 16, dtype=torch.long), torch.tensor([16, 9])).shape
        torch.Size([2, 16, 320])
    """

    masked = True
    dynamic_shapes = None  # the number of masked tokens is another one in each batch
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
                f"model.preset: {preset!r} does not tell masked tokens; its head is {backbone.config.head!r}"
            )
        super().__init__(backbone, optimizer, schedule, lr_scheduler, compile, grad_checkpointing, lr_scheduler_config)
        self.remember_arguments()

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Token ids (B, T), of which ``lengths`` (B,) are no padding -> logits (B, T, V)."""
        return self.backbone(tokens, lengths=lengths)

    def model_output(self, batch: Batch) -> Tensor:
        """Logits (1, T, V) of the first example of a batch."""
        tokens, _, lengths = batch
        return self(tokens[:1], lengths[:1])

    def training_loss(self, batch: Batch) -> tuple[Tensor, int]:
        features, labels = self._masked(batch)
        loss = self._loss(features, labels) / max(len(labels), 1)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch[0]))
        return loss, len(labels)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def log_scores(self, stage: str) -> None:
        loss = self.trainer.callback_metrics[self.metric(f"{stage}/loss")]
        self.log(f"{stage}/perplexity", loss.exp(), prog_bar=True)

    def _masked(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the logits of the masked tokens are made from, (M, D), and which tokens they were, (M,)."""
        tokens, labels, lengths = batch
        places = labels.flatten().ge(0).nonzero()[:, 0]
        features = self.backbone(tokens, lengths=lengths, places=places, pre_logits=True)
        return features, labels.flatten()[places]

    def _loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Sum of the cross-entropy over masked tokens."""
        head: Any = self.backbone.head
        total, _ = linear_cross_entropy(features, head.weight, labels, bias=head.bias)
        return total

    def _evaluate(self, batch: Batch, stage: str) -> None:
        features, labels = self._masked(batch)
        head: Any = self.backbone.head
        loss = hits = torch.zeros((), device=labels.device)
        for piece, label in zip(features.split(_ROWS), labels.split(_ROWS), strict=True):
            logits = F.linear(piece, head.weight, head.bias).float()  # (rows, V)
            loss = loss + F.cross_entropy(logits, label, reduction="sum")
            hits = hits + (logits.argmax(dim=-1) == label).sum()
        count = max(len(labels), 1)
        loss, accuracy = loss / count, hits / count
        weight = self.log_weight(len(labels))  # means over tokens, whatever batches they are in
        self.log(f"{stage}/loss", loss, batch_size=weight, sync_dist=True, prog_bar=True)
        self.log(f"{stage}/accuracy", accuracy, batch_size=weight, sync_dist=True, prog_bar=True)
