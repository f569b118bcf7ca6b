"""Norms of the residual stream."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_tokenformer.models.config import TokenformerConfig
from lit_tokenformer.registry import NORMS


class LowPrecisionLayerNorm(nn.LayerNorm):
    """A layer norm that computes in autocast's precision; without autocast it is an ordinary one.

    Autocast computes norms in float32. In half precision they are faster on memory-bound hardware, at the cost of
    some accuracy (MosaicBERT, arXiv 2312.17482, section 3.1.5).
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return super().forward(x)
        dtype = torch.get_autocast_dtype(device)
        weight, bias = (None if one is None else one.to(dtype) for one in (self.weight, self.bias))
        with torch.autocast(device, enabled=False):
            return F.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps)


@NORMS.register("layer_norm")
def _layer_norm(config: TokenformerConfig, affine: bool) -> nn.Module:
    kind = LowPrecisionLayerNorm if config.low_precision_norm else nn.LayerNorm
    return kind(config.dim, eps=config.norm_eps, elementwise_affine=affine)


@NORMS.register("rms_norm", low_precision_norm=(False,))
def _rms_norm(config: TokenformerConfig, affine: bool) -> nn.Module:
    return nn.RMSNorm(config.dim, eps=config.norm_eps, elementwise_affine=affine)


def make_norm(config: TokenformerConfig, affine: bool = True) -> nn.Module:
    """The norm that ``config.norm`` names, (..., D) -> (..., D).

    Args:
        config: The architecture.
        affine: Whether it has a weight, and a layer norm a bias.
    """
    return NORMS[config.norm](config, affine)
