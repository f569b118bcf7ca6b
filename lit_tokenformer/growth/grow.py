"""Growth of a whole model: its axes, its depth, and the optimizer that trains it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from lit_tokenformer.growth.axes import GrownParameter, grow_one_by_one, target_sizes
from lit_tokenformer.growth.depth import deepen, insert_parameters
from lit_tokenformer.growth.optimizer import grow_optimizer, watch_optimizers
from lit_tokenformer.models import Tokens, model_size


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
    """Append units to the axes of a module (parameter tokens, hidden units, heads), and insert blocks, in place.

    Args:
        module: Any module with Pattention layers, or with parts that declare :class:`~lit_tokenformer.models.Axis`.
        tokens: Totals, never increments: a number n (qkv n, proj n, ffn 4n; Pattention layers without a kind n) or
            totals by kind, ``{qkv: n, proj: n, ffn: m, other: k, hidden: h, heads: H, depth: L}``. Kinds that are left
            out keep theirs.
        method: ``split``, ``zero`` or ``random``; see :mod:`~lit_tokenformer.growth.methods`.
        generator: Draws all new units, part after part. Without it each part has a generator of its own, seeded by
            ``seed``, its name and its new size, so that nothing else decides what is drawn.
        noise: Size of the differences between the copies of a split, in standard deviations of initial values.
        seed: See ``generator``.
        optimizer: The optimizer of the module, or all of them. It gets the new parameters in the places of the old
            ones, and their state is carried over. Without it, the next step of an optimizer that still holds replaced
            parameters raises a ``RuntimeError``.
        new_state: Second moments of rows that are not copies; see
            :func:`~lit_tokenformer.growth.optimizer.grow_optimizer`.

    Returns:
        The parameters that were replaced. Empty if every layer already had its size.

    Raises:
        UserError: If the totals do not fit the module or the memory, if the method cannot keep the function of a layer,
            if a parameter carries hooks or parametrizations that would be lost, or if it is tied to one that does not
            grow in the same way. The module is unchanged then.

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
    """Grow a module as :func:`grow` does, one parameter for each item.

    No more than one parameter is twice in memory, if the caller lets go of each item.
    """
    optimizers = list(optimizers)
    targets = target_sizes(tokens, model_size(module))
    depth = targets.pop("depth", None)
    grow_one_by_one(module, targets, method, generator, noise, seed)  # raises before anything changes
    if depth is not None and isinstance(tokens, Mapping) and "depth" in tokens:
        inserted = deepen(module, depth)
        for optimizer in optimizers:
            insert_parameters(optimizer, module, inserted)
        watch_optimizers(inserted=((one.origin, one.parameter) for one in inserted))
    for one in grow_one_by_one(module, targets, method, generator, noise, seed):
        for optimizer in optimizers:
            grow_optimizer(optimizer, [one], new_state)
        watch_optimizers(replaced=[one.old])
        yield one
        del one
