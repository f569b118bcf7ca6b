"""Function-preserving growth in depth: blocks are inserted as identities.

Each block is followed by copies of itself with zero output layers: they add nothing to the residual stream, but their
output layers receive gradients. Related work: Net2DeeperNet's identity layers (arXiv 1511.05641), zero outputs as in
arXiv 2308.06103; G_stack (arXiv 2405.15319) stacks copies that are not identities. Independent of the trainer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from lit_tokenformer.errors import UserError
from lit_tokenformer.growth.axes import check_memory
from lit_tokenformer.growth.optimizer import copied_state
from lit_tokenformer.models import Tokenformer
from lit_tokenformer.models.token_groups import group_layers


class Inserted(NamedTuple):
    """Parameter of an inserted block.

    Args:
        parameter: New parameter.
        origin: Parameter of the copied block.
        zero: Whether the new parameter is zero or random instead of a copy.
        share: Gradient of the copy relative to that of its origin before; for the optimizer state.
    """

    parameter: nn.Parameter
    origin: nn.Parameter
    zero: bool
    share: float = 1.0


@torch.no_grad()
def deepen(module: nn.Module, depth: int) -> list[Inserted]:
    """Insert blocks into every Tokenformer of ``module``, in place and evenly spaced.

    Args:
        module: Module with one or more models; models that share their blocks grow once.
        depth: Total number of blocks, at least the current one.

    Returns:
        Inserted parameters, for :func:`insert_parameters`.

    Raises:
        UserError: If a model would shrink, or its blocks cannot be identities. The module is unchanged then.

    Example:
        >>> from lit_tokenformer.models import create_backbone
        >>> model = create_backbone("tokenformer_lm_tiny", dim=8, depth=2, num_heads=1, param_tokens=4, vocab_size=5)
        >>> tokens = torch.tensor([[1, 2, 3]])
        >>> before = model(tokens)
        >>> new = deepen(model, 4)
        >>> len(model.blocks), torch.equal(model(tokens), before)
        (4, True)
    """
    models = [model for model in module.modules() if isinstance(model, Tokenformer)]
    for model in models:
        check_depth(model, depth)
    inserted: list[Inserted] = []
    for model in models:
        blocks = list(model.blocks)
        if len(blocks) == depth:
            continue  # or the blocks are shared with a model that has grown already
        order: list[nn.Module] = []
        for number in model.origins(depth):
            block = blocks[number]
            order.append(_identity(block, inserted) if block in order else block)
        model.set_blocks(order)
    return inserted


def check_depth(model: Tokenformer, depth: int, setting: str = "depth") -> None:
    """Check that blocks can be inserted up to ``depth``.

    Raises:
        UserError: If they cannot.
    """
    if depth < len(model.blocks):
        raise UserError(f"{setting}: would shrink from {len(model.blocks)} to {depth}; blocks can only be inserted")
    if depth > len(model.blocks) and model.config.norm_position == "post":
        raise UserError(f"{setting}: blocks with norm_position 'post' cannot be inserted as identities")
    if depth > len(model.blocks):
        unit, present = model.config.pattern_length, len(model.blocks)
        if present % unit or depth % unit:
            raise UserError(
                f"{setting}: not a whole number of repeats of the pattern of {unit} blocks (got {present} -> {depth})"
            )
        for block in model.blocks:
            list(block.outputs())  # type: ignore[operator]  # raises if a part declares no output layer
        held = sum(parameter.nbytes for parameter in model.blocks.parameters())
        device = next(model.blocks.parameters()).device
        check_memory(held * (depth - len(model.blocks)) // len(model.blocks), device, setting)


def _identity(block: nn.Module, inserted: list[Inserted]) -> nn.Module:
    """Copy a block, with zero output layers."""
    new = copy.deepcopy(block)
    layers = [layer for _, layer in group_layers(new)]
    last = {*new.outputs(), *(group.value_tokens for layer in layers for group in (layer.groups or {}).values())}  # type: ignore[operator]
    for parameter, origin in zip(new.parameters(), block.parameters(), strict=True):
        parameter.grad = None
        if parameter in last:
            parameter.zero_()
        inserted.append(Inserted(parameter, origin, parameter in last))
    return new


def insert_parameters(
    optimizer: torch.optim.Optimizer, module: nn.Module, inserted: Iterable[Inserted], new_state: str = "mean"
) -> None:
    """Add inserted parameters to the groups of their origins, in the order of a newly built optimizer.

    Copies inherit the state of their origins, scaled as their gradients; zero parameters start without state. An origin
    that is listed as a copy of itself is scaled as well.

    Args:
        optimizer: Optimizer of the module.
        module: Module that has grown.
        inserted: Inserted parameters, as returned by :func:`deepen`.
        new_state: ``reset`` and ``reset_copies`` drop the state of copies, ``reset`` also that of origins whose
            gradient changes; see :func:`grow_optimizer`.
    """
    place = {parameter: number for number, parameter in enumerate(module.parameters())}
    inserted = list(inserted)
    for group in optimizer.param_groups:
        own = set(group["params"])
        new = [one.parameter for one in inserted if one.origin in own and one.parameter not in own]
        if new:
            group["params"] = sorted([*group["params"], *new], key=place.__getitem__)
    before = {one.origin: optimizer.state[one.origin] for one in inserted if one.origin in optimizer.state}
    for one in inserted:
        copy = one.parameter is not one.origin
        if (copy and new_state.startswith("reset")) or (one.share != 1 and new_state == "reset"):
            optimizer.state.pop(one.parameter, None)
        elif not one.zero and one.origin in before:
            optimizer.state[one.parameter] = copied_state(before[one.origin], one.share)
