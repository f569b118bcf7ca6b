"""Transformer block: mixer and feed-forward with residual connections, pre-norm, post-norm or parallel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lit_tokenformer.errors import UserError
from lit_tokenformer.models.config import TokenformerConfig
from lit_tokenformer.models.experts import output_parameters
from lit_tokenformer.models.feed_forward import make_feed_forward
from lit_tokenformer.models.mixers import Context, make_mixer
from lit_tokenformer.models.norms import make_norm
from lit_tokenformer.models.part_cost import Cost, part_cost

State = tuple[Any, Any]
"""Decoding states of a block's mixer and feed-forward."""


class AugmentedShortcut(nn.Module):
    """Bottleneck branch around the mixer, ``up(GELU(down x))``.

    Source: PanGu-pi, arXiv 2312.17276, eq. 4 and the text below it. Both maps are linear for every ``projection``,
    since the branch is a bottleneck already.

    Args:
        config: Architecture; the width is ``dim / shortcut_reduction``.
    """

    def __init__(self, config: TokenformerConfig) -> None:
        super().__init__()
        self.down = nn.Linear(config.dim, config.shortcut_dim, bias=False)
        self.up = nn.Linear(config.shortcut_dim, config.dim, bias=False)
        for layer in (self.down, self.up):
            nn.init.normal_(layer.weight, std=0.02)

    @property
    def output_layer(self) -> nn.Module:
        """Layer that writes to the residual stream."""
        return self.up

    def cost(self, length: int) -> Cost:
        """Cost per data token; the input is shared with the mixer."""
        parameters, inner = self.down.weight.numel() + self.up.weight.numel(), self.down.out_features
        return Cost(parameters, 2 * parameters, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.up(F.gelu(self.down(x)))


class Block(nn.Module):
    """Transformer block (arXiv 2410.23168, eq. 5-10); the published one is pre-norm with parameter-free norms.

    Args:
        config: Architecture.
        layer: Index of the block, from 0.

    Attributes:
        drop_path: Stochastic depth, set by the model.
    """

    drop_path: nn.Module

    def __init__(self, config: TokenformerConfig, layer: int = 0) -> None:
        super().__init__()
        self.norm1 = make_norm(config, config.norm_affine)
        self.attn = make_mixer(config, layer)
        self.shortcut = AugmentedShortcut(config) if config.shortcut_dim else None
        self.norm2 = make_norm(config, config.norm_affine)
        self.mlp = make_feed_forward(config, layer)
        self.drop_path = nn.Identity()
        self._order = _ORDERS[config.norm_position]

    @property
    def keeps_documents_apart(self) -> bool:
        """True if data tokens interact only where the mask allows it."""
        return getattr(self.attn, "uses_mask", False) and getattr(self.mlp, "pointwise", False)

    def cost(self, length: int) -> Cost:
        """Cost per data token of a sequence of ``length`` T."""
        parts = (self.norm1, self.attn, self.shortcut or nn.Identity(), self.norm2, self.mlp)
        total = sum((part_cost(part, length) for part in parts), start=Cost())
        return replace(total, spared=0) if self._order is _post else total  # the norm after it needs the last product

    def new_state(self, length: int) -> State:
        """Create the decoding states of both parts, for at most ``length`` data tokens."""
        return self.attn.new_state(length), self.mlp.new_state(length)  # type: ignore[operator]

    def forward(self, x: Tensor, context: Context = Context(), state: State = (None, None)) -> Any:  # noqa: B008
        """(B, T, D) -> (B, T, D); with a state, continues from it.

        If the context collects auxiliary losses, returns a pair of the output and this block's losses by name. As
        outputs, they are computed once under activation checkpointing and FSDP2 registers their gradients.
        """
        if context.aux_losses is None:
            return self._order(self, x, context, state)
        own: dict[str, Tensor] = {}
        x = self._order(self, x, context._replace(aux_losses=own), state)
        return x, own

    def outputs(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of the output layers; with all of them zero, the block is an identity."""
        for part in filter(None, (self.attn, self.mlp, self.shortcut)):
            layer: Any = getattr(part, "output_layer", None)
            if layer is None:
                raise UserError(
                    f"depth: {type(part).__name__} declares no output_layer, so no identity block can be inserted"
                )
            yield from output_parameters(part)

    def mix(self, x: Tensor, context: Context, state: State) -> Tensor:
        """Residual branch of the mixer, with the augmented shortcut."""
        out = self.attn(x, context, state[0])
        return self.drop_path(out if self.shortcut is None else out + self.shortcut(x))

    def feed_forward(self, x: Tensor, context: Context, state: State) -> Tensor:
        """Residual branch of the feed-forward."""
        return self.drop_path(self.mlp(x, context, state[1]))


def _pre(block: Block, x: Tensor, context: Context, state: State) -> Tensor:
    x = x + block.mix(block.norm1(x), context, state)
    return x + block.feed_forward(block.norm2(x), context, state)


def _post(block: Block, x: Tensor, context: Context, state: State) -> Tensor:
    x = block.norm1(x + block.mix(x, context, state))
    return block.norm2(x + block.feed_forward(x, context, state))


def _parallel(block: Block, x: Tensor, context: Context, state: State) -> Tensor:
    return x + block.mix(block.norm1(x), context, state) + block.feed_forward(block.norm2(x), context, state)


_ORDERS = {"pre": _pre, "post": _post, "parallel": _parallel}
