"""Growth of a whole model: axes, depth and optimizer state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from lit_tokenformer.errors import UserError
from lit_tokenformer.growth.axes import GrownParameter, grow_one_by_one, quantized_parameters, target_sizes
from lit_tokenformer.growth.depth import check_depth, deepen, insert_parameters
from lit_tokenformer.growth.experts import add_experts
from lit_tokenformer.growth.methods import growth_method
from lit_tokenformer.growth.optimizer import check_noise, grow_optimizer, watch_optimizers
from lit_tokenformer.models import Tokenformer, Tokens
from lit_tokenformer.models.backbone import growable_size


def grow(
    module: nn.Module,
    tokens: Tokens,
    method: str = "split",
    generator: torch.Generator | None = None,
    noise: float = 1.0,
    seed: int = 0,
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
    new_state: str = "mean",
) -> list[GrownParameter]:
    """Append units to the axes of a module (parameter tokens, hidden units, heads), and insert blocks and experts.

    Args:
        module: Module with Pattention layers, or with parts that declare :class:`~lit_tokenformer.models.Axis`.
        tokens: Totals, not increments: n (qkv n, proj n, ffn 4n; Pattention layers without a kind n) or totals by kind,
            ``{qkv: n, proj: n, ffn: m, other: k, hidden: h, heads: H, depth: L, experts: E}``; ``kv_heads`` in place
            of ``heads`` with grouped queries. Missing kinds are unchanged. Any ``method`` copies experts.
        method: ``split``, ``zero`` or ``random``; see :mod:`~lit_tokenformer.growth.methods`.
        generator: Random generator for all new units, in module order. ``None`` uses one generator per part, seeded by
            ``seed``, the part's name and its new size, so that the draws depend on nothing else.
        noise: Size of the differences between the copies of a split, in standard deviations of initial values.
        seed: See ``generator``.
        optimizer: Optimizer of the module, or all of them. New parameters replace the old ones in its groups, and their
            state is carried over. Without it, the next step of an optimizer with replaced parameters raises a
            ``RuntimeError``.
        new_state: Optimizer state of new rows; see
            :func:`~lit_tokenformer.growth.optimizer.grow_optimizer`.

    Returns:
        Replaced parameters; empty if every layer already has its size.

    Raises:
        UserError: If the totals do not fit the module or the memory, if the method cannot preserve the function of a
            layer, if the copies of a split would be identical under Muon, if a parameter is quantized or has hooks or
            parametrizations that would be lost, or if it is tied to a parameter that grows differently. The module is
            unchanged then.

    Example:
        >>> from lit_tokenformer.models import Pattention
        >>> layer = Pattention(8, 8, num_tokens=4)
        >>> optimizer = torch.optim.AdamW(layer.parameters())
        >>> x = torch.randn(2, 8)
        >>> before = layer(x)
        >>> grown = grow(layer, 8, optimizer=optimizer)
        >>> layer.num_tokens, torch.allclose(layer(x), before, atol=1e-6)
        (8, True)
        >>> optimizer.param_groups[0]["params"][0] is layer.key_tokens
        True
    """
    optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer or [])
    return list(grow_with_optimizers(module, tokens, optimizers, method, generator, noise, seed, new_state))


def grow_with_optimizers(
    module: nn.Module,
    tokens: Tokens,
    optimizers: Iterable[torch.optim.Optimizer],
    method: str = "split",
    generator: torch.Generator | None = None,
    noise: float = 1.0,
    seed: int = 0,
    new_state: str = "mean",
) -> Iterator[GrownParameter]:
    """Grow a module as :func:`grow` does, yielding one parameter at a time.

    At most one parameter is in memory twice, if the caller releases each item.
    """
    optimizers = list(optimizers)
    for optimizer in optimizers:
        check_noise(optimizer, growth_method(method), noise)
    targets = target_sizes(tokens, growable_size(module))
    for name in quantized_parameters(module):
        raise UserError(f"tokens: {name} is quantized (expected growth before quantization)")
    depth, experts = targets.pop("depth", None), targets.pop("experts", None)
    named = tokens if isinstance(tokens, Mapping) else {}
    grow_one_by_one(module, targets, method, generator, noise, seed)  # raises before anything changes
    for model in module.modules():
        if isinstance(model, Tokenformer) and depth is not None and "depth" in named:
            check_depth(model, depth)
    if experts is not None and "experts" in named:
        inserted, replaced = add_experts(module, experts, generator, seed)
        for optimizer in optimizers:
            grow_optimizer(optimizer, replaced, new_state)
            insert_parameters(optimizer, module, inserted, new_state)
        watch_optimizers([one.old for one in replaced], ((one.origin, one.parameter) for one in inserted))
        yield from replaced
        del replaced, inserted
    if depth is not None and "depth" in named:
        inserted = deepen(module, depth)
        for optimizer in optimizers:
            insert_parameters(optimizer, module, inserted, new_state)
        watch_optimizers(inserted=((one.origin, one.parameter) for one in inserted))
    for one in grow_one_by_one(module, targets, method, generator, noise, seed):
        for optimizer in optimizers:
            grow_optimizer(optimizer, [one], new_state)
        watch_optimizers(replaced=[one.old])
        yield one
        del one
