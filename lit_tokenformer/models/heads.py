"""Output heads: from the residual stream to logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_tokenformer.errors import UserError, unknown_name
from lit_tokenformer.models.config import TokenformerConfig
from lit_tokenformer.models.norms import make_norm
from lit_tokenformer.models.part_cost import Cost, count_parameters, part_cost
from lit_tokenformer.registry import ACTIVATIONS, HEADS, INITS


class ImageHead(nn.Module):
    """Classifier head with global pooling.

    Args:
        dim: Width of the residual stream, D.
        num_classes: Number of classes, C; 0 returns the pooled features.
        global_pool: Type of global pooling: ``token`` (first data token), ``avg`` (mean without the prefix) or ``""``.
        num_prefix_tokens: Number of prefix tokens before the patches.

    Raises:
        UserError: If ``global_pool`` is unknown, or ``token`` without a class token.
    """

    def __init__(self, dim: int, num_classes: int, global_pool: str, num_prefix_tokens: int) -> None:
        super().__init__()
        if global_pool not in ("token", "avg", ""):
            raise unknown_name("global_pool", global_pool, ("token", "avg", ""))
        if global_pool == "token" and num_prefix_tokens == 0:
            raise UserError("global_pool: 'token' needs class_token: true; use 'avg' without a class token")
        self.global_pool = global_pool
        self.num_prefix_tokens = num_prefix_tokens
        self.dim = dim
        self.fc = nn.Linear(dim, num_classes) if num_classes > 0 else nn.Identity()
        if isinstance(self.fc, nn.Linear):
            nn.init.trunc_normal_(self.fc.weight, std=0.02)
            nn.init.zeros_(self.fc.bias)

    def cost(self, length: int) -> Cost:
        """Cost per sample."""
        fc = part_cost(self.fc, length)
        return Cost(fc.parameters, fc.flops, length * self.dim)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, 1 + T, D) -> (B, C), or the pooled features (B, D) with ``pre_logits``."""
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x[:, self.num_prefix_tokens :].mean(dim=1)
        return x if pre_logits else self.fc(x)


class LanguageHead(nn.Module):
    """Language-model head without bias, as published.

    Args:
        config: Architecture.
        embedding: Embedding to tie the weights to, (V, D); ``None`` for untied weights.
    """

    def __init__(self, config: TokenformerConfig, embedding: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.dim)) if embedding is None else embedding
        self.shared = embedding is not None
        if embedding is None:
            INITS[config.init].head(self.weight)

    def cost(self, length: int) -> Cost:
        """Cost per sample."""
        return _logits_cost(self, length)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, T, D) -> (B, T, V), or the unchanged input with ``pre_logits``."""
        return x if pre_logits else F.linear(x, self.weight)


class MaskedLanguageHead(nn.Module):
    """BERT's masked-language-model head: dense layer, activation, norm and vocabulary projection with a bias.

    Source: arXiv 1810.04805, section 3.1, as in its published code.

    Args:
        config: Architecture.
        embedding: Embedding to tie the weights to, (V, D); ``None`` for untied weights.
    """

    def __init__(self, config: TokenformerConfig, embedding: nn.Parameter | None = None) -> None:
        super().__init__()
        self.dense = nn.Linear(config.dim, config.dim)
        INITS[config.init].projection(self.dense.weight, config, False)
        nn.init.zeros_(self.dense.bias)
        self.activation = ACTIVATIONS[config.activation]
        self.norm = make_norm(config)
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.dim)) if embedding is None else embedding
        self.shared = embedding is not None
        if embedding is None:
            INITS[config.init].head(self.weight)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def cost(self, length: int) -> Cost:
        """Cost per sample, with logits of all data tokens."""
        dense, dim = part_cost(self.dense, length).flops, self.dense.in_features
        return _logits_cost(self, length) + Cost(0, dense * length, 2 * length * dim)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(..., D) -> (..., V), or the input of the vocabulary projection, (..., D), with ``pre_logits``."""
        x = self.norm(self.activation(self.dense(x)))
        return x if pre_logits else F.linear(x, self.weight, self.bias)


@HEADS.register("image", stem=("patch",))
def _image(config: TokenformerConfig, stem: nn.Module) -> nn.Module:
    return ImageHead(config.dim, config.num_classes, config.global_pool, config.num_prefix_tokens)


@HEADS.register("language", stem=("token",))
def _language(config: TokenformerConfig, stem: nn.Module) -> nn.Module:
    return LanguageHead(config, _shared(config, stem))


@HEADS.register("masked_language", stem=("token",), positions=("learned", "rotary", "alibi"), causal=(False,))
def _masked_language(config: TokenformerConfig, stem: nn.Module) -> nn.Module:
    return MaskedLanguageHead(config, _shared(config, stem))


def _logits_cost(head: LanguageHead | MaskedLanguageHead, length: int) -> Cost:
    """Cost of the vocabulary projection; tied weights count for the stem."""
    (vocabulary, dim), shared = head.weight.shape, head.weight.numel() if head.shared else 0
    return Cost(count_parameters(head) - shared, 2 * vocabulary * dim * length, length * dim)


def _shared(config: TokenformerConfig, stem: nn.Module) -> nn.Parameter | None:
    return stem.embedding.weight if config.tie_embeddings else None  # type: ignore


def make_head(config: TokenformerConfig, stem: nn.Module) -> nn.Module:
    """Create the head that ``config.head`` names, for a model with ``stem``."""
    return HEADS[config.head](config, stem)
