"""Normalization layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_tokenformer.models.config import TokenformerConfig
from lit_tokenformer.registry import NORMS


class LowPrecisionLayerNorm(nn.LayerNorm):
    """Layer norm in autocast's precision; a regular layer norm without autocast.

    Autocast computes norms in float32. Half precision is faster on memory-bound hardware at the cost of some accuracy
    (MosaicBERT, arXiv 2312.17482, section 3.1.5).
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
    """Create the norm that ``config.norm`` names, (..., D) -> (..., D).

    Args:
        config: Architecture.
        affine: Enable the weight, and the bias of a layer norm.
    """
    return NORMS[config.norm](config, affine)
