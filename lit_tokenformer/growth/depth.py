"""How a model grows in depth: blocks are inserted as identities, so the function stays the same.

Behind each block stand copies of it whose last layers are zero: what they add to the residual stream is nothing, and
the gradients of these layers are not. Relatives: Net2DeeperNet's identity layers (arXiv 1511.05641), zero outputs as in
arXiv 2308.06103; stacks of copies that are no identities are G_stack (arXiv 2405.15319). Knows no trainer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lit_tokenformer.errors import UserError
from lit_tokenformer.growth.axes import check_memory
from lit_tokenformer.models import Tokenformer


class Inserted(NamedTuple):
    """A parameter of an inserted block.

    Args:
        parameter: The parameter.
        origin: That of the block it is a copy of.
        zero: Whether it is zero instead.
    """

    parameter: nn.Parameter
    origin: nn.Parameter
    zero: bool


@torch.no_grad()
def deepen(module: nn.Module, depth: int) -> list[Inserted]:
    """Inserts blocks into every Tokenformer in ``module``, in place, spread evenly.

    Args:
        module: Anything that holds models; those that share their blocks grow once.
        depth: Total of blocks, at least those that are there.

    Returns:
        What is new, for :func:`insert_parameters`.

    Raises:
        ValueError: If a model would shrink, or if its blocks cannot be identities. The module is unchanged then.

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
            continue  # or it shares them with one that has grown already
        order: list[nn.Module] = []
        for number in model.origins(depth):
            block = blocks[number]
            order.append(_identity(block, inserted) if block in order else block)
        model.set_blocks(order)
    return inserted


def check_depth(model: Tokenformer, depth: int, setting: str = "depth") -> None:
    """Raises a ``ValueError`` if blocks cannot be inserted up to this total."""
    if depth < len(model.blocks):
        raise UserError(f"{setting}: it would shrink from {len(model.blocks)} to {depth}; blocks can only be inserted")
    if depth > len(model.blocks) and model.config.norm_position == "post":
        raise UserError(f"{setting}: blocks with norm_position 'post' cannot be identities, so none can be inserted")
    if depth > len(model.blocks):
        unit, present = model.config.pattern_length, len(model.blocks)
        if present % unit or depth % unit:
            raise UserError(
                f"{setting}: blocks that differ grow by whole repeats of their pattern of {unit} "
                f"(got {present} -> {depth})"
            )
        for block in model.blocks:
            list(block.outputs())  # type: ignore[operator]  # raises where a part does not declare its last layer
        held = sum(parameter.nbytes for parameter in model.blocks.parameters())
        device = next(model.blocks.parameters()).device
        check_memory(held * (depth - len(model.blocks)) // len(model.blocks), device, setting)


def _identity(block: nn.Module, inserted: list[Inserted]) -> nn.Module:
    """A copy of a block that adds nothing to the residual stream."""
    new = copy.deepcopy(block)
    last = set(new.outputs())  # type: ignore[operator]
    for parameter, origin in zip(new.parameters(), block.parameters(), strict=True):
        parameter.grad = None
        if parameter in last:
            parameter.zero_()
        inserted.append(Inserted(parameter, origin, parameter in last))
    return new


def insert_parameters(optimizer: torch.optim.Optimizer, module: nn.Module, inserted: Iterable[Inserted]) -> None:
    """Puts inserted parameters into the groups of their origins, where an optimizer that is made anew has them.

    Copies go on with the state of their origins; what is zero begins without any.

    Args:
        optimizer: The optimizer of the module.
        module: What was deepened.
        inserted: What :func:`deepen` gave.
    """
    place = {parameter: number for number, parameter in enumerate(module.parameters())}
    inserted = list(inserted)
    for group in optimizer.param_groups:
        own = set(group["params"])
        new = [one.parameter for one in inserted if one.origin in own]
        if new:
            group["params"] = sorted([*group["params"], *new], key=place.__getitem__)
    for one in inserted:
        if not one.zero and one.origin in optimizer.state:
            state = optimizer.state[one.origin]
            optimizer.state[one.parameter] = {
                key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()
            }
