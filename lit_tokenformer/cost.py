"""Parameters and FLOPs of a model in closed form.

The cost of a model is the sum over its parts, which declare it (:mod:`lit_tokenformer.models.part_cost`). Parts are
created on the meta device at the requested size. The numbers agree with arXiv 2410.23168, Table 3 (camera-ready).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn

from lit_tokenformer.errors import UserError, unknown_name
from lit_tokenformer.models import Tokenformer, TokenformerConfig
from lit_tokenformer.models.config import KINDS
from lit_tokenformer.models.part_cost import Cost, part_cost
from lit_tokenformer.models.token_groups import NamedGate, add_group, group_layers

Totals = Mapping[str, int]
Groups = tuple[tuple[str, int], ...]
"""Kinds of groups of further tokens, such as ``ffn:docs``, with their sizes."""


class _Parts(NamedTuple):
    """Costs of the parts of a model.

    Args:
        stem: Cost of the stem, per sample.
        blocks: Cost of each block of the pattern, per data token.
        norm: Cost of the final norm.
        head: Cost of the head, per sample.
        kinds: Cost of the projections of each kind, for each block of the pattern.
    """

    stem: Cost
    blocks: list[Cost]
    norm: Cost
    head: Cost
    kinds: list[dict[str, Cost]]


def _parts(config: TokenformerConfig, length: int, groups: Groups = ()) -> _Parts:
    """Compute the costs at the size of the config, for sequences of ``length``, with groups of further tokens."""
    fields = asdict(replace(config, depth=config.pattern_length, patch_drop_rate=0.0, drop_path=0.0, param_tokens=1))
    return _measured((*fields.items(), ("param_tokens", tuple(config.tokens.items()))), length, groups)


@lru_cache(maxsize=1024)
def _measured(fields: tuple[tuple[str, Any], ...], length: int, groups: Groups) -> _Parts:
    given = dict(fields)
    given["param_tokens"] = dict(given["param_tokens"])
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = Tokenformer(TokenformerConfig(**given))
    for name, total in groups:
        kind, _, group = name.partition(":")
        for layer in [layer for _, layer in group_layers(model) if layer.kind == kind]:
            add_group(layer, group, total, layer.gate or NamedGate())
    blocks = [part_cost(block, length) for block in model.blocks]
    kinds = [{kind: _projections(block, kind, length) for kind in KINDS} for block in model.blocks]
    stem, head = _for_sample(model.stem, length), _for_sample(model.head, length)
    return _Parts(stem, blocks, part_cost(model.norm, length), head, kinds)


def _sum(blocks: Sequence[Any], depth: int, field: str) -> int:
    """Sum a field over ``depth`` blocks with a repeating pattern."""
    repeats, rest = divmod(depth, len(blocks))
    return sum((repeats + (place < rest)) * getattr(block, field) for place, block in enumerate(blocks))


def _for_sample(part: nn.Module, length: int) -> Cost:
    """Cost of a stem or head per sample; estimated per data token if the part declares no cost."""
    cost = part_cost(part, length)
    return cost if hasattr(part, "cost") else Cost(cost.parameters, length * cost.flops, length * cost.kept)


def _projections(block: nn.Module, kind: str, length: int) -> Cost:
    layers = [layer for layer in block.modules() if getattr(layer, "kind", None) == kind]
    return sum((part_cost(layer, length) for layer in layers), start=Cost())


@dataclass(frozen=True)
class ModelCost:
    """Cost of a whole model; a sample is an image, or a text of ``context_length``.

    Args:
        parameters: Trainable parameters.
        data_tokens: Data tokens of each training sample, T.
        flops: FLOPs of one forward pass, per sample.
        training_flops: FLOPs of one forward and backward pass, per sample.
        kept: Activations saved for backward, in elements per sample (an estimate, without dropout masks).
        inactive: Parameters that a data token does not use: those of experts other than its own.
        recomputed: Part of ``training_flops`` that recomputes activations, which MFU does not count.
    """

    parameters: int
    data_tokens: int
    flops: int
    training_flops: int
    kept: int
    inactive: int = 0
    recomputed: int = 0

    @property
    def active_parameters(self) -> int:
        """Parameters that each data token uses."""
        return self.parameters - self.inactive

    def training_memory(self, batch_size: int, bytes_per_number: int = 4, states: int = 2) -> int:
        """Estimate the training memory in bytes: weights, gradients, optimizer states and activations.

        Args:
            batch_size: Samples in one forward pass.
            bytes_per_number: Bytes per element: 4 in float32, 2 in half precision.
            states: Optimizer states per parameter; 2 for Adam.
        """
        return bytes_per_number * (self.parameters * (2 + states) + self.kept * batch_size)


def model_cost(config: TokenformerConfig, tokens: Totals | None = None, checkpointing: bool = False) -> ModelCost:
    """Compute parameters and FLOPs of a model.

    Args:
        config: Architecture.
        tokens: Size, see :meth:`TokenformerConfig.at_size`; ``None`` for the initial size. Groups of further tokens,
            such as ``ffn:docs``, count as used by every data token.
        checkpointing: Whether activation checkpointing recomputes the blocks in the backward pass.

    Example:
        >>> from lit_tokenformer.models import preset_config
        >>> model_cost(preset_config("tokenformer_vit_base_matched_patch16_224")).parameters
        86447848
    """
    config = config.at_size(tokens or {})
    groups = tuple((kind, total) for kind, total in (tokens or {}).items() if ":" in kind)
    dim, depth, length, full = config.dim, config.depth, config.num_data_tokens, config.num_positions
    parts, whole = (
        _parts(config, length, groups),
        _parts(config, full, groups),
    )  # no patches are dropped outside training
    stem, norm, head = parts.stem, parts.norm, parts.head
    parameters, flops = _sum(parts.blocks, depth, "parameters"), _sum(parts.blocks, depth, "flops")
    kept, again = _sum(parts.blocks, depth, "kept"), 0
    if checkpointing:
        # stochastic depth, whose rate is 0 in the first block, multiplies the last product of a block
        spared = parts.blocks[0].spared if config.drop_path > 0 else _sum(parts.blocks, depth, "spared")
        again = (flops - spared) * length
        kept = depth * dim + max(block.kept for block in parts.blocks)
    forward = _sum(whole.blocks, depth, "flops") * full
    return ModelCost(
        parameters=stem.parameters + parameters + norm.parameters + head.parameters,
        data_tokens=length,
        flops=stem.flops + forward + whole.head.flops,
        # the stem's input needs no gradient, so its backward pass is one product instead of two
        training_flops=2 * stem.flops + 3 * flops * length + again + 3 * head.flops,
        kept=stem.kept + head.kept + length * kept,
        inactive=_sum(parts.blocks, depth, "inactive"),
        recomputed=again,
    )


def match_tokens(config: TokenformerConfig, reference: TokenformerConfig, by: str = "parameters") -> dict[str, int]:
    """Find the parameter tokens that match the cost of a model's blocks to another model's.

    Projections are matched kind by kind; the feed-forward absorbs the difference. Embedding and head are not counted.

    Args:
        config: Architecture to choose parameter tokens for.
        reference: Architecture to match, at its initial size.
        by: ``parameters``, or ``flops`` (FLOPs per data token).

    Returns:
        Total of each kind; kinds without a Pattention layer are unchanged.

    Raises:
        UserError: If the feed-forward has no Pattention layer, if the rest of the model alone costs more than the
            reference, or if ``by`` is unknown.

    Example:
        >>> from lit_tokenformer.models import preset_config
        >>> match_tokens(preset_config("tokenformer_150m"), preset_config("transformer_124m"))
        {'qkv': 384, 'proj': 384, 'ffn': 3072}
    """
    if by not in ("parameters", "flops"):
        raise unknown_name("match", by, ("parameters", "flops"))
    if config.experts > 1:
        raise UserError(f"match: parameter tokens cannot be matched with experts (got {config.experts}, expected 1)")

    def kinds(config: TokenformerConfig, tokens: Totals) -> dict[str, int]:
        """Cost of all blocks by kind of projection; ``rest`` is everything else."""
        config = config.at_size(tokens)
        parts = _parts(config, config.num_data_tokens)
        found = {kind: _sum([kinds[kind] for kinds in parts.kinds], config.depth, by) for kind in KINDS}
        return {**found, "rest": _sum(parts.blocks, config.depth, by) - sum(found.values())}

    def cost(config: TokenformerConfig, tokens: Totals) -> int:
        return sum(kinds(config, tokens).values())

    wanted = kinds(reference, {})
    tokens = dict(config.tokens.items())
    ones, twos = (dict.fromkeys(tokens, n) for n in (1, 2))
    step = {kind: kinds(config, twos)[kind] - kinds(config, ones)[kind] for kind in tokens}
    if not step["ffn"]:
        raise UserError("match: the feed-forward has no Pattention layer")
    for kind in ("qkv", "proj"):
        if step[kind]:
            tokens[kind] = max(1, round(wanted[kind] / step[kind]))
    left = sum(wanted.values()) - cost(config, {**tokens, "ffn": 1})
    tokens["ffn"] = 1 + round(left / step["ffn"])
    if tokens["ffn"] < 1:
        raise UserError(f"match: the model without its feed-forward has more {by} than the reference")
    return tokens
