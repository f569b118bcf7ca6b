"""Stems: embeddings of images and token ids."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.layers import PatchEmbed, resample_abs_pos_embed
from torch import Tensor, nn

from lit_tokenformer.errors import UserError
from lit_tokenformer.models.config import TokenformerConfig
from lit_tokenformer.models.norms import make_norm
from lit_tokenformer.models.part_cost import Cost, count_parameters
from lit_tokenformer.models.positions import token_positions
from lit_tokenformer.registry import INITS, POSITIONS, STEMS


@STEMS.register("patch", positions=("learned",))
class PatchStem(nn.Module):
    """Patch embedding with a class token and learned positions, resampled for other image sizes.

    Args:
        config: Architecture.
    """

    def __init__(self, config: TokenformerConfig) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(
            config.image_size,
            config.patch_size,
            config.in_chans,
            config.dim,
            strict_img_size=False,
            output_fmt="NHWC",
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim)) if config.class_token else None
        self.pos_embed = nn.Parameter(torch.empty(1, self.num_positions(config), config.dim))
        self.num_prefix_tokens = config.num_prefix_tokens
        self.grid_size = self.patch_embed.grid_size
        self.reset_parameters()

    @staticmethod
    def num_positions(config: TokenformerConfig) -> int:
        """Sequence length, T, of an image of ``image_size``."""
        return math.prod(config.patch_grid) + config.num_prefix_tokens

    def cost(self, length: int) -> Cost:
        """Cost per sample; patches are dropped after the stem."""
        positions, dim = self.pos_embed.shape[1:]
        patches, pixels = positions - self.num_prefix_tokens, self.patch_embed.proj.weight[0].numel()
        return Cost(count_parameters(self), 2 * patches * pixels * dim, positions * dim)

    def reset_parameters(self) -> None:
        """Reinitialize positions, class token and patch projection (truncated normal, as in timm's ViT)."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=1e-6)
        self.patch_embed.proj.reset_parameters()

    def no_weight_decay(self) -> set[str]:
        """Parameter names without weight decay."""
        return {"cls_token", "pos_embed"} if self.cls_token is not None else {"pos_embed"}

    def forward(self, image: Tensor, start: int = 0, padding: Tensor | None = None) -> Tensor:
        """(B, C, height, width) -> (B, 1 + patches, D); ``start`` and ``padding`` are ignored."""
        x = self.patch_embed(image)  # (B, height / patch, width / patch, D)
        pos_embed = self._positions(self.pos_embed, (x.shape[1], x.shape[2]))
        x = x.flatten(1, 2)  # (B, patches, D)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)  # (B, 1 + patches, D)
        return x + pos_embed

    def _positions(self, pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
        """Learned positions (1, prefix + patches, D) for a grid of (rows, columns) of patches."""
        if grid == self.grid_size:
            return pos_embed
        return resample_abs_pos_embed(
            pos_embed, new_size=list(grid), old_size=list(self.grid_size), num_prefix_tokens=self.num_prefix_tokens
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved: Any = state_dict.get(prefix + "pos_embed")
        patches = 0 if saved is None or saved.ndim != 3 else saved.shape[1] - self.num_prefix_tokens
        resized = patches > 0 and saved.shape[1] != self.pos_embed.shape[1]
        if resized and math.isqrt(patches) ** 2 == patches:  # of a square image; others have unknown rows
            state_dict[prefix + "pos_embed"] = resample_abs_pos_embed(
                saved, new_size=list(self.grid_size), num_prefix_tokens=self.num_prefix_tokens
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


@STEMS.register("token", patch_drop_rate=(0,))
class TokenStem(nn.Module):
    """Token embedding with optional learned positions, norm and dropout.

    Args:
        config: Architecture.

    Attributes:
        positions: Learned positions, (T, D); ``None`` without them.
        takes_embeddings: Whether ``forward`` takes ``position_ids`` and ``inputs_embeds``.
    """

    takes_embeddings = True
    positions: nn.Parameter | None

    def __init__(self, config: TokenformerConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        learned = POSITIONS[config.positions].learned
        positions = nn.Parameter(torch.empty(config.context_length, config.dim)) if learned else None
        self.register_parameter("positions", positions)
        self.norm = make_norm(config) if config.stem_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self._init = INITS[config.init].embedding
        self.reset_parameters()

    @staticmethod
    def num_positions(config: TokenformerConfig) -> int:
        """Sequence length, T: ``context_length``."""
        return config.context_length

    def cost(self, length: int) -> Cost:
        """Cost per sample; an embedding lookup has no FLOPs."""
        return Cost(count_parameters(self), 0, length * self.embedding.embedding_dim)

    def reset_parameters(self) -> None:
        """Reinitialize the embedding."""
        self._init(self.embedding.weight)
        if self.positions is not None:
            nn.init.normal_(self.positions, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Parameter names without weight decay: none, as published."""
        return set()

    def forward(
        self,
        tokens: Tensor | None,
        start: int = 0,
        padding: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Token ids (B, T) int64 -> (B, T, D).

        Args:
            tokens: Token ids.
            start: Data tokens of the sequence already in the decoding state.
            padding: Left padding of each sequence in data tokens, (B,) int64. Positions past the last learned one are
                clamped: a finished sequence may be longer than the ones still decoding, and its output is unused.
            position_ids: Positions, (B, T) or (1, T) int64, in place of those that follow from ``start``.
            inputs_embeds: Embeddings (B, T, D) in place of ``tokens``.

        Raises:
            UserError: If there are more data tokens than learned positions; with padding, the decoding state checks it.
        """
        x = self.embedding(tokens) if inputs_embeds is None else inputs_embeds
        if self.positions is not None:
            most = start + x.shape[1]
            if position_ids is not None:
                most = 0 if torch.compiler.is_compiling() else int(position_ids.max()) + 1
            if padding is None and most > len(self.positions):
                raise UserError(
                    f"context_length: more data tokens than learned positions (got {most}, "
                    f"expected at most {len(self.positions)})"
                )
            if position_ids is None:
                places = token_positions(start, x.shape[1], padding, x.device)
                position_ids = places.clamp_max(len(self.positions) - 1)
            x = x + self.positions[position_ids]
        return self.dropout(self.norm(x))


def make_stem(config: TokenformerConfig) -> nn.Module:
    """Create the stem that ``config.stem`` names, input -> (B, T, D)."""
    return STEMS[config.stem](config)
