"""Causal language modeling: cross-entropy of the next token, perplexity and bits per byte."""

from __future__ import annotations

import math
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


def published_adamw(params: Any) -> torch.optim.Optimizer:
    """Build AdamW with the settings of all published language models (arXiv 2410.23168, appendix F)."""
    return torch.optim.AdamW(params, lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1)


@TASKS.register("LitCausalLM")
class LitCausalLM(LitLanguageTask):
    """Train a backbone to predict the next token.

    A batch is ``tokens (B, T + 1) int64``; negative tokens are ignored as inputs and as targets. The task logs
    ``train/loss``, ``val/loss``, ``val/perplexity`` and, if the data report the bytes of the original text,
    ``val/bits_per_byte`` (also ``test/...``); losses are in nats per token.

    The checkpoint contains the tokenizer of the data, and its folder a ``tokenizer.json``, so text generation does not
    need the data.

    Args:
        preset: Architecture, a name from ``lit_tokenformer.models.list_presets()``; in a config also ``checkpoint``:
            the architecture of ``init_from`` or ``ckpt_path``, with the tokenizer of that checkpoint.
        vocab_size: Vocabulary size V; determined by the data's tokenizer on the command line, unless ``overrides`` sets
            it.
        context_length: Maximum sequence length T in tokens; determined by the data's block size on the command line.
        separator_id: Token id that ends a document; determined by the data on the command line.
        overrides: Fields of the architecture that replace the preset's.
        optimizer: Optimizer factory, called with parameter groups; one-dimensional parameters are not decayed.
        schedule: Learning rate over the fit.
        lr_scheduler: Factory of a torch scheduler that replaces ``schedule``.
        z_loss: Weight of the squared log-partition in the training loss; ``val/loss`` excludes it.
        cross_documents: Whether tokens attend to earlier documents in the same block; ``false`` requires
            ``separator_id``.
        match: Pick the initial number of parameter tokens so that the blocks match those of ``match_to`` in
            ``parameters``, or in ``flops`` per data token; ``None`` uses the number of preset and overrides.
        match_to: Reference preset, with the overridden sizes of this model; ``None`` for this model with linear
            projections.
        layerwise_lr: Whether to apply the learning-rate multiples declared by the architecture (RWKV: 2 for decays, 3
            for bonuses).
        compile: Whether to compile the backbone with ``torch.compile``, once per size.
        grad_checkpointing: Whether to recompute blocks in the backward pass, to save memory.
        lr_scheduler_config: Timing of ``lr_scheduler``: interval, frequency, and the monitor of ReduceLROnPlateau.

    Raises:
        ValueError: For an unknown preset, incompatible sizes, or an architecture that is not causal.

    Example:
        >>> task = LitCausalLM("tokenformer_lm_tiny", vocab_size=257, context_length=32)
        >>> task(torch.zeros(1, 32, dtype=torch.long)).shape
        torch.Size([1, 32, 257])
    """

    scores = ("loss", "perplexity", "bits_per_byte")
    required_fields: ClassVar[Mapping[str, Any]] = {
        "stem": "token",
        "head": "language",
        "positions": "rotary",
        "causal": True,
    }

    def __init__(
        self,
        preset: str = "tokenformer_lm_small",
        vocab_size: int = 50304,
        context_length: int = 1024,
        separator_id: int | None = None,
        overrides: BackboneOverrides = BackboneOverrides(),  # noqa: B008  (frozen)
        optimizer: OptimizerCallable = published_adamw,
        schedule: LRSchedule = LRSchedule(),  # noqa: B008  (frozen)
        lr_scheduler: LRSchedulerCallable | None = None,
        z_loss: float = 0.0,
        cross_documents: bool = True,
        match: str | None = None,
        match_to: str | None = None,
        layerwise_lr: bool = False,
        compile: bool = False,
        grad_checkpointing: bool = False,
        lr_scheduler_config: LRSchedulerConfig = LRSchedulerConfig(),  # noqa: B008  (frozen)
    ) -> None:
        given = {"vocab_size": vocab_size, "context_length": context_length, **self.plain(overrides)}
        backbone = self.make_backbone(preset, given, match, match_to)
        if not backbone.config.causal or backbone.config.head != "language":
            raise UserError(f"model.preset: {preset!r} is not a causal language model")
        if z_loss < 0:
            raise UserError(f"model.z_loss: expected at least 0, got {z_loss}")
        if not cross_documents and separator_id is None:
            raise UserError("model.cross_documents: false needs separator_id, the token that ends a document")
        if not cross_documents and not backbone.keeps_documents_apart:
            raise UserError("model.cross_documents: false needs a model that mixes data tokens in attention only")
        super().__init__(backbone, optimizer, schedule, lr_scheduler, compile, grad_checkpointing, lr_scheduler_config)
        self.remember_arguments()
        self.layerwise_lr = layerwise_lr
        self.separator_id = separator_id
        self.z_loss = z_loss
        self.cross_documents = cross_documents

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token ids (B, T) to logits (B, T, V)."""
        return self.backbone(tokens)

    def model_output(self, batch: Tensor) -> Tensor:
        """Compute logits (1, T, V) of the first block of a batch, limited to 256 data tokens to save memory."""
        first = batch[:1, :257]
        return self.backbone(first[:, :-1].clamp_min(0), self._documents(first))

    def training_loss(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        total, count = self._loss(batch, self.z_loss)
        loss = total / count.clamp_min(1)
        self.log("train/loss", loss, batch_size=len(batch))
        return loss, count

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def log_scores(self, stage: str) -> None:
        loss = self.trainer.callback_metrics[self.metric(f"{stage}/loss")]
        scores = {f"{stage}/perplexity": loss.exp()}
        bytes_per_token = getattr(self.task_data, "bytes_per_token", None)
        if bytes_per_token is not None:
            scores[f"{stage}/bits_per_byte"] = loss / (math.log(2) * bytes_per_token(stage))
        self.log_dict(scores, prog_bar=True, sync_dist=True)

    def _documents(self, batch: Tensor) -> Tensor | None:
        """Number the document of each token, (B, T); a separator belongs to the document that it ends."""
        if self.cross_documents or self.separator_id is None:
            return None
        ends = torch.eq(batch[:, :-1], self.separator_id)
        return ends.cumsum(dim=1) - ends.long()

    def batch_features(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the input of the vocabulary projection (B, T, D), and the next tokens (B, T)."""
        features = self.backbone(batch[:, :-1].clamp_min(0), self._documents(batch), pre_logits=True)
        return features, batch[:, 1:]

    def feature_loss(self, features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        total, count = self._summed(features, target)
        return total / count.clamp_min(1), count

    def feature_logits(self, features: Tensor) -> Tensor:
        return F.linear(features, self.backbone.get_classifier().weight)  # type: ignore[arg-type]

    def _loss(self, batch: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
        """Sum the loss over the predicted tokens of a batch (B, T + 1), and count them."""
        return self._summed(*self.batch_features(batch), z_loss)

    def _summed(self, features: Tensor, target: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
        weight = self.backbone.get_classifier().weight
        return linear_cross_entropy(features, weight, target, z_loss)  # type: ignore[arg-type]

    def _evaluate(self, batch: Tensor, stage: str) -> None:
        mean, count = self.feature_loss(*self.batch_features(batch))
        weight = self.log_weight(int(count))  # token means, independent of batches
        self.log(f"{stage}/loss", mean, batch_size=weight, sync_dist=True, prog_bar=True)
