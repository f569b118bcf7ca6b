"""Groups of parameter tokens by modality: patches and text share a sequence, and attention, but no parameter tokens.

In every Pattention layer, data tokens of the image use the group :data:`IMAGE`, those of the text the layer's own.
Related work: modality-wise weights in EVEv2 (arXiv 2502.06788, section 3.2) and Mixture-of-Transformers (arXiv
2411.04996, section 3). Groups have their own norms, so an image model and a text model merge exactly: each alone
computes what it computed before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_tokenformer.errors import UserError
from lit_tokenformer.models.backbone import Tokenformer
from lit_tokenformer.models.config import ParamTokens, Tokens
from lit_tokenformer.models.norms import make_norm
from lit_tokenformer.models.token_groups import BASE, Share, add_group, group_layers

IMAGE = "image"
"""Name of the groups for data tokens of the image."""


class ModalityGate:
    """Gate that assigns the first data tokens of each sequence to the group :data:`IMAGE`, the rest to the layer's own.

    Attributes:
        prefix: Number of data tokens of the image in the sequences that follow.
    """

    def __init__(self) -> None:
        self.prefix = 0

    def __deepcopy__(self, memo: Any) -> ModalityGate:
        return self  # the prefix is set before each forward pass, for all copies of a layer

    def __call__(self, x: Tensor) -> dict[str, Share]:
        """Assign data tokens (B, T, D_in)."""
        if self.prefix == 0:
            return {BASE: Share()}
        if self.prefix >= x.shape[1]:
            return {IMAGE: Share()}
        places = torch.arange(x.shape[0] * x.shape[1], device=x.device).view(x.shape[:2])
        image, text = places[:, : self.prefix].flatten(), places[:, self.prefix :].flatten()
        return {IMAGE: Share(image), BASE: Share(text)}


class ModalityNorm(nn.Module):
    """Final norm by modality, (B, T, D) -> (B, T, D).

    Args:
        text: Norm of the text.
        image: Norm of the image.
        gate: Gate of the model.
    """

    def __init__(self, text: nn.Module, image: nn.Module, gate: ModalityGate) -> None:
        super().__init__()
        self.text, self.image, self.gate = text, image, gate

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        image, text = x[:, : self.gate.prefix], x[:, self.gate.prefix :]
        parts = ([self.image(image)] if image.shape[1] else []) + ([self.text(text)] if text.shape[1] else [])
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def add_modalities(model: Tokenformer, tokens: Tokens) -> None:
    """Add a group for the image to every Pattention layer that has none, and a final norm; random tokens.

    Args:
        model: Backbone with the stem ``image_text``, changed in place.
        tokens: Parameter tokens of the group: n (qkv n, proj n, ffn 4n), or totals by kind.

    Raises:
        UserError: If blocks have other layers with parameters, which both modalities would share.
    """
    config = model.config
    gate: ModalityGate = model.stem.gate
    shared = [name for name, _ in model.blocks.named_parameters() if not name.endswith(("_tokens",))]
    if shared or config.norm_position == "post":
        found = f"block.{shared[0]}" if shared else "norm_position: post"
        raise UserError(f"image_tokens: expected blocks with no parameters but parameter tokens, got {found}")
    totals = dict(ParamTokens.parse(tokens).items())
    for _, layer in group_layers(model.blocks):
        if layer.groups is None or IMAGE not in layer.groups:
            add_group(layer, IMAGE, totals[layer.kind], gate).reset_parameters()
    if not isinstance(model.norm, ModalityNorm):
        image = make_norm(config).to(next(model.parameters()).device)
        model.norm = ModalityNorm(model.norm, image, gate)
