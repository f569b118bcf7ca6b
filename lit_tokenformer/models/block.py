"""One block: norm, token-token interaction, norm, feed-forward, each added to the residual stream."""

from __future__ import annotations

from timm.layers import DropPath
from torch import Tensor, nn

from lit_tokenformer.models.config import TokenformerConfig
from lit_tokenformer.models.feed_forward import make_feed_forward
from lit_tokenformer.models.mixers import Attention, Context, KeyValueCache


class Block(nn.Module):
    """A pre-norm block (arXiv 2410.23168, eq. 5-10); as published its norms have no parameters.

    Args:
        config: The architecture.
        drop_path: Stochastic depth rate of this block.
    """

    def __init__(self, config: TokenformerConfig, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=config.norm_eps, elementwise_affine=config.norm_affine)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.norm_eps, elementwise_affine=config.norm_affine)
        self.mlp = make_feed_forward(config)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, context: Context = Context(), cache: KeyValueCache | None = None) -> Tensor:  # noqa: B008
        """(B, T, D) -> (B, T, D); with a cache, data tokens attend to those in it too."""
        x = x + self.drop_path(self.attn(self.norm1(x), context, cache))
        return x + self.drop_path(self.mlp(self.norm2(x)))
