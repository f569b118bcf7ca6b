"""Function-preserving growth into experts: a feed-forward becomes E copies behind a router, E experts become m E.

The copies compute what their original does and the gates sum to 1, so the output is unchanged whichever copy is chosen.
When E experts become m E, each copy has its original's routing weights, so that probabilities and biases are divided by
m, and a routing bias so low that only originals are chosen; balancing raises it within about E / (2 balance)
optimizer steps. Shared experts start with zero output layers. Related work: sparse upcycling (arXiv 2212.05055).
Independent of the trainer.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from lit_tokenformer.errors import UserError
from lit_tokenformer.growth.axes import GrownParameter, check_memory, part_generator
from lit_tokenformer.growth.depth import Inserted
from lit_tokenformer.growth.rows import GrownTensor, Rows
from lit_tokenformer.models import Tokenformer, TokenformerConfig
from lit_tokenformer.models.block import Block
from lit_tokenformer.models.experts import ROUTER_STD, ExpertList, Experts, num_experts, output_parameters
from lit_tokenformer.models.feed_forward import check_experts, with_experts


@torch.no_grad()
def add_experts(
    module: nn.Module, experts: int, generator: torch.Generator | None = None, seed: int = 0
) -> tuple[list[Inserted], list[GrownParameter]]:
    """Copy the feed-forwards of every Tokenformer of ``module`` to a number of experts, in place.

    Args:
        module: Module with one or more models; blocks that models share grow once.
        experts: Total number of experts, a multiple of the current one.
        generator: Random generator of all routers, in module order. ``None`` uses one per router, seeded by ``seed``,
            its name and its number of experts.
        seed: See ``generator``.

    Returns:
        Inserted parameters, for :func:`~lit_tokenformer.growth.depth.insert_parameters`, and routers that were replaced
        by larger ones.

    Raises:
        UserError: If a feed-forward has no experts, or the number is unsuitable. The module is unchanged then.

    Example:
        >>> from lit_tokenformer.models import create_backbone
        >>> model = create_backbone("tokenformer_lm_tiny", dim=8, depth=2, num_heads=1, param_tokens=4, vocab_size=5)
        >>> tokens = torch.tensor([[1, 2, 3]])
        >>> before = model(tokens)
        >>> _ = add_experts(model, 4)
        >>> len(model.blocks[0].mlp.experts), torch.allclose(model(tokens), before, atol=1e-6)
        (4, True)
    """
    models = [model for model in module.modules() if isinstance(model, Tokenformer)]
    for model in models:
        check_expert_growth(model, experts)
    config = {block: model.config for model in models for block in model.blocks}
    inserted: list[Inserted] = []
    replaced: list[GrownParameter] = []
    for name, block in module.named_modules():
        if isinstance(block, Block) and block in config and num_experts(block.mlp) != experts:
            draw = generator or part_generator(seed, f"{name}.mlp.router", experts)
            if isinstance(block.mlp, Experts):
                replaced.append(_copy_again(block.mlp, experts, f"{name}.mlp", inserted))
            else:
                block.mlp = _copy(block.mlp, experts, config[block], draw, inserted)
    return inserted, replaced


def check_expert_growth(model: Tokenformer, experts: int, setting: str = "experts") -> None:
    """Check that the feed-forwards of a model can become ``experts`` experts.

    Raises:
        UserError: If they cannot.
    """
    for block in model.blocks:
        layer: nn.Module = block.mlp  # type: ignore[assignment]
        present = num_experts(layer)
        if experts < present:
            raise UserError(f"{setting}: would shrink from {present} to {experts}; experts can only be added")
        if experts == present:
            continue
        if experts % present:
            raise UserError(f"{setting}: expected a multiple of {present}, the present number, got {experts}")
        check_experts(layer.experts[0] if isinstance(layer, Experts) else layer, experts, model.config, setting)
    held = sum(parameter.nbytes for block in model.blocks for parameter in block.mlp.parameters())  # type: ignore[union-attr, misc]
    present = min(num_experts(block.mlp) for block in model.blocks)  # type: ignore[arg-type]
    check_memory(held * (experts - present) // present, next(model.parameters()).device, setting)


def _copy(
    dense: nn.Module, experts: int, config: TokenformerConfig, draw: torch.Generator, inserted: list[Inserted]
) -> Experts:
    """Put copies of a feed-forward behind a new router."""

    def shared() -> nn.Module:
        return _twin(dense, inserted, zero=set(output_parameters(dense)))

    share = 1 / experts  # of the data tokens, and thus of the gradient, in the mean
    inserted += [Inserted(one, one, False, share) for one in dense.parameters()]
    copies = [dense, *(_twin(dense, inserted, share=share) for _ in range(experts - 1))]
    with torch.random.fork_rng(devices=[]):  # its router is drawn below
        layer = with_experts(copies, config, shared).train(dense.training)
    origin = next(one for one in dense.parameters() if one.ndim > 1)
    weight = layer.router.weight
    drawn = torch.empty(weight.shape).normal_(0, ROUTER_STD, generator=draw)
    layer.router.weight = nn.Parameter(drawn.to(origin), requires_grad=origin.requires_grad)
    layer.router.bias = layer.router.bias.to(origin.device)
    inserted.append(Inserted(layer.router.weight, origin, True))
    return layer


def _copy_again(layer: Experts, experts: int, name: str, inserted: list[Inserted]) -> GrownParameter:
    """Follow each expert by copies of itself."""
    router, before = layer.router, len(layer.experts)
    copies = experts // before
    order = [expert if number == 0 else _twin(expert, inserted) for expert in layer.experts for number in range(copies)]
    layer.experts = ExpertList(order)
    old = router.weight
    router.weight = nn.Parameter(old.detach().repeat_interleave(copies, dim=0), requires_grad=old.requires_grad)
    rows = Rows(router.groups * before, router.groups * experts, copies)
    bias = router.bias.repeat_interleave(copies) / copies  # as the probabilities
    router.bias = torch.where(rows.new(bias.device), bias.min() - 1 / copies, bias)  # below all originals
    router.load = router.last_load = torch.empty(0)
    return GrownParameter(f"{name}.router.weight", old, router.weight, GrownTensor(rows), 1.0)


def _twin(
    original: nn.Module, inserted: list[Inserted], share: float = 1.0, zero: set[nn.Parameter] | None = None
) -> nn.Module:
    """Copy a feed-forward; parameters in ``zero`` are zero in the copy."""
    twin = copy.deepcopy(original)
    for new, old in zip(twin.parameters(), original.parameters(), strict=True):
        new.grad = None
        if zero is not None and old in zero:
            new.zero_()
        inserted.append(Inserted(new, old, zero is not None and old in zero, share))
    return twin
