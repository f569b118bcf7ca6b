"""Tokenformer backbone: stem, blocks, final norm and head, with timm's backbone interface.

Source: arXiv 2410.23168, section 3.2; the interface is that of ``timm.models.vision_transformer``.

Shapes: B batch, T data tokens, D width. The input is ``image (B, C, height, width)`` or ``tokens (B, T) int64``,
depending on the stem.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from timm.layers import DropPath, PatchDropout, calculate_drop_path_rates
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from lit_tokenformer.errors import UserError
from lit_tokenformer.models.axes import axis_sizes
from lit_tokenformer.models.block import Block, State
from lit_tokenformer.models.config import TokenformerConfig
from lit_tokenformer.models.decoding import DecodingState
from lit_tokenformer.models.experts import num_experts, saved_experts
from lit_tokenformer.models.feed_forward import make_feed_forward
from lit_tokenformer.models.heads import ImageHead, make_head
from lit_tokenformer.models.hub import HubMixin
from lit_tokenformer.models.masks import check_mask, columns, make_mask, restricted
from lit_tokenformer.models.mixers import Attend, Context, Packing
from lit_tokenformer.models.norms import make_norm
from lit_tokenformer.models.pattention import Pattention
from lit_tokenformer.models.positions import token_positions
from lit_tokenformer.models.slots import SlotState
from lit_tokenformer.models.stems import make_stem
from lit_tokenformer.registry import POSITIONS


class Tokenformer(HubMixin, nn.Module):
    """Transformer for images or text with Pattention projections.

    Args:
        config: Initial architecture.

    Attributes:
        config: Initial architecture; growth does not change it.
        loss_names: Names of the auxiliary losses that the parts declare.
        aux_losses: Auxiliary losses of the last forward pass in training, by name, () each.
        num_classes: Number of classes of the head.
        num_features: Feature dimension of ``forward_features``, D.

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
        self._positions = POSITIONS[config.positions]
        self.aux_losses: dict[str, Tensor] = {}
        self.stem: Any = make_stem(config)
        self.patch_drop = PatchDropout(config.patch_drop_rate, config.num_prefix_tokens, ordered=config.causal)
        self.blocks = nn.ModuleList()
        self.set_blocks([self.new_block(number) for number in range(config.depth)])
        self.norm: nn.Module = nn.Identity() if config.norm_position == "post" else make_norm(config)
        self.head = make_head(config, self.stem)

    @property
    def param_tokens(self) -> dict[str, int]:
        """Current parameter tokens for each kind that has a Pattention layer."""
        return param_tokens(self)

    @property
    def size(self) -> dict[str, int]:
        """Current size: units of each kind of axis, ``depth`` (blocks), and ``experts`` if there are several."""
        return model_size(self)

    @property
    def grown(self) -> bool:
        """True if the current size differs from the config's, after growth or loading weights of another size."""
        initial = self.config.size
        return any(total != initial.get(name, total) for name, total in self.size.items())

    def new_block(self, number: int) -> Block:
        """Create a freshly initialized block for index ``number`` of the stack."""
        return Block(self.config, number)

    def set_blocks(self, blocks: Iterable[nn.Module]) -> None:
        """Replace the blocks; stochastic-depth rates are set to rise linearly with depth."""
        found: list[Any] = list(blocks)
        rates: Any = calculate_drop_path_rates(self.config.drop_path, len(found))
        for block, rate in zip(found, rates, strict=True):
            block.drop_path = (DropPath(rate) if rate > 0 else nn.Identity()).train(block.training)
        declared = (getattr(part, "aux_losses", ()) for block in found for part in block.modules())
        self.loss_names = sorted({name for names in declared for name in names})
        self._uses_mask = any(getattr(block.attn, "uses_mask", False) for block in found)
        del self.blocks[:]  # in place, since tasks may share them
        self.blocks.extend(found)

    def origins(self, depth: int) -> Iterator[int]:
        """Index of the source block for each position of a deeper stack.

        Copies directly follow their source; with a layer pattern, whole repeats of the pattern do.

        Args:
            depth: Total number of blocks, a multiple of the pattern length.

        Example:
            >>> list(Tokenformer(TokenformerConfig(dim=4, depth=2, num_heads=1, param_tokens=2)).origins(4))
            [0, 0, 1, 1]
        """
        unit = self.config.pattern_length
        for number in range(depth):
            yield number // unit * (len(self.blocks) // unit) // (depth // unit) * unit + number % unit

    def set_depth(self, depth: int) -> None:
        """Drop the last blocks, or append freshly initialized ones, before a checkpoint is loaded.

        Args:
            depth: Total number of blocks.
        """
        reference = next(self.blocks.parameters())
        with torch.device(reference.device), torch.random.fork_rng(devices=[]):
            fresh = [self.new_block(number).to(reference.dtype) for number in range(len(self.blocks), depth)]
        for block in fresh:
            block.train(self.training)
        self.set_blocks([*self.blocks, *fresh][:depth])

    def set_experts(self, experts: int) -> None:
        """Replace the feed-forwards by freshly initialized ones, before a checkpoint of another number is loaded.

        Args:
            experts: Number of experts, 1 for a feed-forward without a router.
        """
        reference, config = next(self.blocks.parameters()), dataclasses.replace(self.config, experts=experts)
        blocks: list[Any] = list(self.blocks)
        for number, block in enumerate(blocks):
            if num_experts(block.mlp) != experts:
                with torch.device(reference.device), torch.random.fork_rng(devices=[]):
                    block.mlp = make_feed_forward(config, number).to(reference.dtype).train(self.training)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Adopt the depth and the experts of ``state_dict`` if they are reachable by growth."""
        blocks = f"{prefix}blocks."
        numbers = {name[len(blocks) :].partition(".")[0] for name in state_dict if name.startswith(blocks)}
        depth = len(numbers)
        if self.config.depth <= depth != len(self.blocks) and numbers == set(map(str, range(depth))):
            self.set_depth(depth)
        if self.config.experts <= (experts := saved_experts(state_dict, prefix)):
            self.set_experts(experts)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def set_patch_drop_rate(self, rate: float) -> None:
        """Set the share of patches dropped in training.

        Args:
            rate: See ``patch_drop_rate`` of the architecture.

        Raises:
            ValueError: If it is outside [0, 1), or if the model is not an image model.
        """
        self.config = dataclasses.replace(self.config, patch_drop_rate=rate)
        self.patch_drop.prob = rate

    def no_weight_decay(self) -> set[str]:
        """Parameter names without weight decay, in addition to one-dimensional parameters."""
        return {f"{name}.{part}" for name, declared in self._declared("no_weight_decay") for part in declared}

    def lr_scales(self) -> dict[str, float]:
        """Learning-rate multipliers by parameter name, for architectures published with per-parameter rates.

        Example:
            >>> from lit_tokenformer.models import create_backbone
            >>> create_backbone("rwkv4_tiny").lr_scales()["blocks.0.attn.time_decay"]
            2.0
        """
        found = self._declared("lr_scales")
        return {f"{name}.{part}": scale for name, scales in found for part, scale in scales.items()}

    def _declared(self, method: str) -> Iterator[tuple[str, Any]]:
        """Yield module names with the result of ``method``, for all submodules that define it."""
        for name, module in self.named_modules():
            if module is not self and hasattr(module, method):
                yield name, getattr(module, method)()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter-name patterns of layers, for timm's layer-wise learning-rate decay."""
        return {"stem": r"^stem", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable activation checkpointing of the blocks."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Get the last linear layer of the head."""
        return getattr(self.head, "fc", self.head)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Reset the classifier head.

        Args:
            num_classes: Number of classes; 0 removes the linear layer.
            global_pool: Pooling type: ``token``, ``avg`` or ``""``; ``None`` keeps the current one.

        Raises:
            ValueError: If the model has no image head.
        """
        if not isinstance(self.head, ImageHead):
            raise UserError(f"head: no classes to reset (got {self.config.head!r}, expected 'image')")
        pool = self.head.global_pool if global_pool is None else global_pool
        reference = self.stem.pos_embed  # the final norm may have been pruned
        self.head = ImageHead(self.num_features, num_classes, pool, self.num_prefix_tokens)
        self.head.to(device=reference.device, dtype=reference.dtype)
        self.config = dataclasses.replace(self.config, num_classes=num_classes)
        self.num_classes = num_classes

    def new_state(self, length: int, padding: Tensor | None = None) -> DecodingState:
        """Create an empty decoding state.

        Args:
            length: Capacity in data tokens, including padding.
            padding: Left padding of each sequence in data tokens, (B,) int64, for batches of different lengths.
        """
        blocks: list[Any] = list(self.blocks)
        return DecodingState([block.new_state(length) for block in blocks], length, padding, self)

    def new_slots(self, slots: int, length: int) -> SlotState:
        """Create a decoding state with slots, for sequences that enter and leave one by one.

        Args:
            slots: Number of slots.
            length: Capacity of each slot in data tokens.

        Raises:
            UserError: If the state of a mixer or feed-forward has no form with slots.
        """
        return SlotState(self, slots, length)

    def forward_features(
        self,
        x: Tensor | None = None,
        documents: Tensor | None = None,
        state: DecodingState | None = None,
        lengths: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attend: Attend | None = None,
    ) -> Tensor:
        """Compute the normalized features (B, T, D) of the input.

        Args:
            x: Images (B, C, height, width) or token ids (B, T) int64.
            documents: Document index of each token, (B, T) int64; attention does not cross document boundaries.
            state: Decoding state, updated in place.
            lengths: Length of each sequence in data tokens, (B,) int64, at least 1; the rest is padding, whose outputs
                are undefined.
            attention_mask: As in transformers: (B, S), nonzero for data tokens and 0 for padding on any side, with S
                data tokens including those in the state; or (B | 1, H | 1, T, S), bool (true to attend) or additive,
                in place of the causal mask. Recurrent mixers support padding at the ends only, and left with a state.
            position_ids: Position of each data token, (B, T) or (1, T) int64. Default: its index in the sequence,
                including padding. ALiBi and recurrent mixers have none.
            inputs_embeds: Token embeddings in place of ``x``, (B, T, D), before positions and dropout.
            attend: Attention function in place of torch's; it receives ``attention_mask`` unchanged.

        Raises:
            UserError: If the state is full or was created before a growth; for an argument that the model's parts do
                not support, or one of another shape.
        """
        start, padding = (0, None) if state is None else (state.start, state.padding)
        more = {"position_ids": position_ids, "inputs_embeds": inputs_embeds}
        more = {name: value for name, value in more.items() if value is not None}
        if more or x is None:
            self._check_embeddings(x, inputs_embeds, position_ids)
        if state is not None:
            length = x.shape[1] if x is not None else inputs_embeds.shape[1]  # type: ignore[union-attr]
            state.check(length, positions=position_ids is None)
            if state.position_ids is not None:
                position_ids = state.position_ids
                more |= {"position_ids": position_ids} if self._positions.learned else {}
        x = self.patch_drop(self.stem(x, start, padding, **more))
        context = self._context(x, documents, state, lengths, attention_mask, position_ids, attend)
        if context.packing is not None:
            x = context.packing.pack(x)  # (1, n, D)
        for number, block in enumerate(self.blocks):
            x = self._run(block, x, context, (None, None) if state is None else state.blocks[number])
        if state is not None:
            state.advance(x.shape[1])
        if self.loss_names:
            self.aux_losses = context.aux_losses or {}
        x = self.norm(x)
        return x if context.packing is None else context.packing.unpack(x)

    def take_aux_losses(self) -> dict[str, Tensor]:
        """Return and clear the auxiliary losses of the last training forward pass, by name, () each."""
        found, self.aux_losses = self.aux_losses, {}
        return found

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, T, D) -> logits, (B, C) or (B, T, V); with ``pre_logits``, the input of the last linear layer."""
        return self.head(x, pre_logits=pre_logits)

    def forward(
        self,
        x: Tensor | None = None,
        documents: Tensor | None = None,
        state: DecodingState | None = None,
        pre_logits: bool = False,
        lengths: Tensor | None = None,
        places: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Images (B, C, height, width) -> logits (B, C), or token ids (B, T) -> logits (B, T, V).

        Args:
            x: Input.
            documents: See :meth:`forward_features`.
            state: See :meth:`forward_features`.
            pre_logits: Return features before the last linear layer, (B, D) or (B, T, D).
            lengths: See :meth:`forward_features`.
            places: Flat indices of the data tokens to apply the head to, (M,) int64; the output then has M in place of
                (B, T).
            attention_mask: See :meth:`forward_features`.
            position_ids: See :meth:`forward_features`.
            inputs_embeds: See :meth:`forward_features`.
        """
        features = self.forward_features(x, documents, state, lengths, attention_mask, position_ids, inputs_embeds)
        if places is not None:
            features = features.flatten(0, 1).index_select(0, places)
        return self.forward_head(features, pre_logits)

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
        """Forward features and return intermediates, for timm's feature extraction.

        Args:
            x: Images, (B, C, height, width), or token ids, (B, T).
            indices: Last n blocks if int, all if ``None``, matching indices if a sequence.
            return_prefix_tokens: Return ``(patches, prefix)`` pairs instead of patches.
            norm: Apply the final norm to all intermediates.
            stop_early: Stop after the last requested block.
            output_fmt: ``NCHW`` (B, D, rows, columns) or ``NLC`` (B, T, D).
            intermediates_only: Return only the intermediates, without the final features.

        Raises:
            ValueError: If ``output_fmt`` is unknown.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise UserError(f"output_fmt: expected 'NCHW' or 'NLC', got {output_fmt!r}")
        take, last = feature_take_indices(len(self.blocks), indices)
        size = x.shape[-2:]
        x = self.stem(x)
        context = self._context(x)
        intermediates = []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = self._run(block, x, context)
            if i in take:
                intermediates.append(self.norm(x) if norm else x)
        prefix = [y[:, : self.num_prefix_tokens] for y in intermediates]
        patches = [y[:, self.num_prefix_tokens :] for y in intermediates]
        if output_fmt == "NCHW":
            grid = self.stem.patch_embed.dynamic_feat_size(size)
            patches = [y.transpose(1, 2).unflatten(2, grid).contiguous() for y in patches]  # (B, D, rows, columns)
        found: list[Any] = list(zip(patches, prefix, strict=True)) if return_prefix_tokens else patches
        return found if intermediates_only else (self.norm(x), found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Prune layers that ``forward_intermediates`` does not need for ``indices``; return the indices kept."""
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def _context(
        self,
        x: Tensor,
        documents: Tensor | None = None,
        state: DecodingState | None = None,
        lengths: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        attend: Attend | None = None,
    ) -> Context:
        """Build the context that the blocks share, for data tokens (B, T, D)."""
        config, length, device = self.config, x.shape[1], x.device
        start, padding = (0, None) if state is None else (state.start, state.padding)
        if documents is not None and not self.keeps_documents_apart:
            raise UserError("documents: unsupported by a model with a token shift, which crosses document boundaries")
        rotary = None
        if self._positions.rotary is not None:
            places = token_positions(start, length, padding, device) if position_ids is None else position_ids
            rotary = self._positions.rotary(config, places, x.dtype)
        packing = self._packing(lengths, length) if config.unpad and lengths is not None else None
        alone = packing is not None and packing.lengths is not None  # without padding
        present = None if padding is None else columns(start, length, device)[:, None] >= padding[:, None, None]
        if attend is None and attention_mask is not None:
            present = check_mask(attention_mask, x, state, recurrent=not self.keeps_documents_apart)
        mask = attention_mask
        if attend is None:
            mask = self._mask(x, documents, state, None if alone else lengths, attention_mask)
        return Context(
            rotary,
            mask,
            config.causal and length > 1,
            start,
            present,
            packing,
            {} if self.training and self.loss_names else None,
            attend,
        )

    @property
    def keeps_documents_apart(self) -> bool:
        """True if ``documents`` is supported: data tokens interact only where the mask allows it."""
        return all(block.keeps_documents_apart for block in self.blocks)

    def _check_embeddings(self, x: Tensor | None, inputs_embeds: Tensor | None, position_ids: Tensor | None) -> None:
        """Check that the stem and the positions support the arguments."""
        if (x is None) == (inputs_embeds is None):
            raise UserError("inputs_embeds: expected either token ids or embeddings")
        if not getattr(self.stem, "takes_embeddings", False):
            name = "inputs_embeds" if position_ids is None else "position_ids"
            raise UserError(f"{name}: unsupported by stem {self.config.stem!r}")
        if position_ids is None:
            return
        if not self._positions.learned and self._positions.rotary is None:
            raise UserError(f"position_ids: unsupported by positions {self.config.positions!r}")
        batch, length = (x if inputs_embeds is None else inputs_embeds).shape[:2]  # type: ignore[union-attr]
        if position_ids.shape not in ((batch, length), (1, length)):
            raise UserError(
                f"position_ids: unexpected shape (got {tuple(position_ids.shape)}, expected {batch, length})"
            )

    def _mask(
        self,
        x: Tensor,
        documents: Tensor | None,
        state: DecodingState | None,
        lengths: Tensor | None,
        given: Tensor | None,
    ) -> Tensor | None:
        """Attention mask, bool or additive; ``None`` for full or plain causal attention."""
        if not self._uses_mask:
            return None
        config, bias = self.config, self._positions.bias
        slots = state if isinstance(state, SlotState) else None
        start, padding = (0, None) if state is None else (state.start, state.padding)
        mask = None
        if slots is None:
            mask = make_mask(x, config.causal, start, padding, documents, lengths, given, always=bias is not None)
        if bias is None:
            return mask if slots is None else slots.mask()
        mixers: Any = [block.attn for block in self.blocks]
        heads = next((mixer.slope_of_head for mixer in mixers if hasattr(mixer, "slope_of_head")), None)
        if slots is None:
            scores = bias(config.num_heads, start, x.shape[1], x, heads)  # (1, H, T, S)
            scores = scores if mask is None else restricted(scores, mask)
        else:
            scores = slots.mask(lambda length: bias(config.num_heads, 0, length, x, heads))
        autocast = torch.is_autocast_enabled(x.device.type)
        return scores.to(torch.get_autocast_dtype(x.device.type) if autocast else x.dtype)

    @staticmethod
    def _packing(lengths: Tensor, length: int) -> Packing:
        present = torch.arange(length, device=lengths.device) < lengths[:, None]  # (B, T)
        # accelerators are faster with one batched call
        alone = lengths.device.type == "cpu" and not torch.compiler.is_compiling()
        places = present.flatten().nonzero()[:, 0]
        return Packing(places, len(lengths), length, lengths.tolist() if alone else None)

    def _run(self, block: Callable[..., Any], x: Any, context: Context, state: State = (None, None)) -> Tensor:
        if self.grad_checkpointing and self.training:
            x = checkpoint(block, x, context, state)
        else:
            x = block(x, context, state)
        if context.aux_losses is None:
            return x
        x, losses = x
        for name, loss in losses.items():
            context.add_loss(name, loss)
        return x


def model_size(module: nn.Module) -> dict[str, int]:
    """Count the units of each kind of axis and, if there is a Tokenformer, its ``depth``, and ``experts`` if several.

    Args:
        module: Any module; the smallest depth counts if several models differ.
    """
    models = [model for model in module.modules() if isinstance(model, Tokenformer)]
    if not models:
        return axis_sizes(module)
    experts = min(num_experts(block.mlp) for model in models for block in model.blocks)  # type: ignore[arg-type]
    depth = min(len(model.blocks) for model in models)
    return {**axis_sizes(module), "depth": depth, **({"experts": experts} if experts > 1 else {})}


def growable_size(module: nn.Module) -> dict[str, int]:
    """Count as :func:`model_size` does, including a single expert."""
    size = model_size(module)
    return {"experts": 1, **size} if "depth" in size else size


def param_tokens(module: nn.Module) -> dict[str, int]:
    """Count the parameter tokens of the Pattention layers in ``module``, by kind of projection.

    Args:
        module: Any module; the smallest number counts if layers of one kind differ, so a partly grown model is not
            mistaken for a grown one.

    Returns:
        Totals by kind; ``other`` for layers without a kind.

    Example:
        >>> layer = Pattention(8, 8, num_tokens=4, kind="ffn")
        >>> param_tokens(layer)
        {'ffn': 4}
    """
    found: dict[str, int] = {}
    for layer in module.modules():
        if isinstance(layer, Pattention):
            found[layer.kind] = min(layer.num_tokens, found.get(layer.kind, layer.num_tokens))
    return found
