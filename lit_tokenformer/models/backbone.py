"""Tokenformer: a stem, blocks, a final norm and a head, under timm's contract for backbones.

Source: arXiv 2410.23168, section 3.2; the contract is that of ``timm.models.vision_transformer``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.layers import calculate_drop_path_rates
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from lit_tokenformer.models.block import Block
from lit_tokenformer.models.config import TokenformerConfig
from lit_tokenformer.models.heads import ImageHead
from lit_tokenformer.models.pattention import Pattention
from lit_tokenformer.models.stems import PatchStem


class Tokenformer(nn.Module):
    """A vision transformer whose projections are Pattention layers.

    Args:
        config: The architecture at birth.

    Attributes:
        config: As given; a growth does not change it.
        num_classes: Outputs of the head.
        num_features: Width of what ``forward_features`` gives, D.

    Example:
        >>> import torch
        >>> config = TokenformerConfig(dim=32, depth=2, num_heads=2, param_tokens=8, image_size=8, patch_size=4)
        >>> model = Tokenformer(config)
        >>> model.forward_features(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 5, 32])
    """

    def __init__(self, config: TokenformerConfig) -> None:
        super().__init__()
        self.config = config
        self.num_classes = config.num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = config.dim
        self.num_prefix_tokens = config.num_prefix_tokens
        self.grad_checkpointing = False
        rates: Any = calculate_drop_path_rates(config.drop_path, config.depth)
        self.stem = PatchStem(config)
        self.blocks = nn.ModuleList(Block(config, drop_path=rate) for rate in rates)
        self.norm: nn.Module = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.head = ImageHead(config.dim, config.num_classes, config.global_pool, config.num_prefix_tokens)

    @property
    def param_tokens(self) -> dict[str, int]:
        """Parameter tokens that the layers hold now, for each kind that has a Pattention layer."""
        return param_tokens(self)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed, beside all that have one dimension."""
        return {f"stem.{name}" for name in self.stem.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into layers, for timm's layer-wise learning rates."""
        return {"stem": r"^stem", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks are computed again in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last linear layer of the head."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head with fresh weights.

        Args:
            num_classes: Outputs; 0 leaves the linear layer out.
            global_pool: ``token``, ``avg`` or ``""``; ``None`` keeps what it was.
        """
        pool = self.head.global_pool if global_pool is None else global_pool
        reference = self.stem.pos_embed  # the final norm may have been pruned
        self.head = ImageHead(self.num_features, num_classes, pool, self.num_prefix_tokens)
        self.head.to(device=reference.device, dtype=reference.dtype)
        self.num_classes = num_classes

    def forward_features(self, image: Tensor) -> Tensor:
        """(B, C, height, width) -> normalised data tokens (B, 1 + T, D)."""
        x = self.stem(image)
        for block in self.blocks:
            x = self._run(block, x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, 1 + T, D) -> logits (B, C), or pooled features (B, D) with ``pre_logits``."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, height, width) -> logits (B, C)."""
        return self.forward_head(self.forward_features(image))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Outputs of chosen blocks, as timm's feature extraction wants them.

        Args:
            x: Images, (B, C, height, width).
            indices: The last n blocks, these blocks, or all (``None``).
            return_prefix_tokens: Give ``(patches, prefix)`` pairs instead of patches.
            norm: Apply the final norm to each.
            stop_early: Leave after the last wanted block.
            output_fmt: ``NCHW`` (B, D, rows, columns) or ``NLC`` (B, T, D).
            intermediates_only: Give the list alone, without the final features.

        Raises:
            ValueError: For another ``output_fmt``.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt: expected 'NCHW' or 'NLC', got {output_fmt!r}")
        take, last = feature_take_indices(len(self.blocks), indices)
        height, width = x.shape[-2:]
        x = self.stem(x)
        intermediates = []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = self._run(block, x)
            if i in take:
                intermediates.append(self.norm(x) if norm else x)
        prefix = [y[:, : self.num_prefix_tokens] for y in intermediates]
        patches = [y[:, self.num_prefix_tokens :] for y in intermediates]
        if output_fmt == "NCHW":
            grid = self.stem.patch_embed.dynamic_feat_size((height, width))
            patches = [y.transpose(1, 2).unflatten(2, grid).contiguous() for y in patches]  # (B, D, rows, columns)
        found: list[Any] = list(zip(patches, prefix, strict=True)) if return_prefix_tokens else patches
        return found if intermediates_only else (self.norm(x), found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops what ``forward_intermediates`` with these ``indices`` does not need; returns the blocks' indices."""
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def _run(self, block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.grad_checkpointing and self.training:
            return checkpoint(block, x)
        return block(x)


def param_tokens(module: nn.Module) -> dict[str, int]:
    """Parameter tokens that the Pattention layers in ``module`` hold now, for each kind of projection.

    Example:
        >>> layer = Pattention(8, 8, num_tokens=4, kind="ffn")
        >>> param_tokens(layer)
        {'ffn': 4}
    """
    layers = (layer for layer in module.modules() if isinstance(layer, Pattention))
    return {layer.kind: layer.num_tokens for layer in layers if layer.kind is not None}
