"""What a block does to each data token by itself."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lit_tokenformer.models.config import TokenformerConfig
from lit_tokenformer.models.projections import make_projection


class MLP(nn.Module):
    """Two projections with a GELU between them.

    Args:
        config: Sizes and the kind of projection.
    """

    def __init__(self, config: TokenformerConfig) -> None:
        super().__init__()
        self.fc1 = make_projection(config.projection, config, "ffn", config.dim, config.mlp_hidden)
        self.fc2 = make_projection(config.projection, config, "ffn", config.mlp_hidden, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.fc2(F.gelu(self.fc1(x)))


def _pattention(config: TokenformerConfig) -> nn.Module:
    return make_projection("pattention", config, "ffn", config.dim, config.dim)


FEED_FORWARDS = {"pattention": _pattention, "mlp": MLP}


def make_feed_forward(config: TokenformerConfig) -> nn.Module:
    """The feed-forward layer that ``config.feed_forward`` names, (B, T, D) -> (B, T, D)."""
    return FEED_FORWARDS[config.feed_forward](config)
