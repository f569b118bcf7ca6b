"""Axes: the directions in which a model can grow, as its parts declare them.

An axis is a set of tensors that share one index, that of its units: parameter tokens, hidden units, attention heads. A
part that can grow has a method ``axes()`` which returns its axes; :mod:`lit_tokenformer.growth` knows nothing else of
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

IN, OUT, OWN = "in", "out", "own"
"""Roles of a tensor: what a unit reads, what it writes, and parameters of the unit itself."""


@dataclass(frozen=True)
class AxisTensor:
    """A parameter or buffer that has an index for each unit of an axis.

    Args:
        name: Its name below the part, such as ``fc1.weight``.
        dim: The dimension that the units are counted along.
        role: ``in`` (what a unit reads: copies repeat it), ``out`` (what a unit writes: copies share it) or ``own``.
        std: Standard deviation of initial values.
        settle: Applied to new units of role ``own`` after they are drawn, (units, ...).
        block: Entries for each unit, such as the width of a head.
    """

    name: str
    dim: int = 0
    role: str = IN
    std: float = 0.02
    settle: Callable[[Tensor], object] | None = None
    block: int = 1

    def owner(self, part: nn.Module) -> tuple[nn.Module, str]:
        """The module below ``part`` that holds the tensor, and its attribute there."""
        path, _, attribute = self.name.rpartition(".")
        return part.get_submodule(path), attribute

    def of(self, part: nn.Module) -> Tensor:
        """The tensor."""
        owner, attribute = self.owner(part)
        return getattr(owner, attribute)


@dataclass(frozen=True)
class Axis:
    """Tensors of a part that share the index of its units.

    Args:
        kind: Which total of a growth schedule it follows, such as ``qkv``, ``hidden`` or ``heads``.
        tensors: At least one each of the roles ``in`` and ``out``.
        tau: Scale of a normalization over all units (Pattention); ``None`` where units are independent.
        zero_exact: Whether a unit that reads zeros leaves the others as they are.

    Example:
        >>> class Hidden(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.up, self.down = nn.Linear(2, 4), nn.Linear(4, 2)
        ...
        ...     def axes(self):
        ...         return [Axis("hidden", (*output_units("up", self.up), *input_units("down", self.down)))]
        >>> [(tensor.name, tensor.dim, tensor.role) for tensor in Hidden().axes()[0].tensors]
        [('up.weight', 0, 'in'), ('up.bias', 0, 'in'), ('down.weight', 1, 'out')]
        >>> axis_sizes(Hidden())
        {'hidden': 4}
    """

    kind: str
    tensors: tuple[AxisTensor, ...]
    tau: Tensor | None = None
    zero_exact: bool = True

    def size(self, part: nn.Module) -> int:
        """Units that the part has now."""
        first = self.tensors[0]
        return first.of(part).shape[first.dim] // first.block


def output_units(name: str, layer: nn.Module) -> list[AxisTensor]:
    """The tensors of a projection that have an index for each of its outputs, as what a unit reads.

    Args:
        name: Name of the layer in the part.
        layer: ``nn.Linear``, or a module with a method ``output_units(name)``.
    """
    if hasattr(layer, "output_units"):
        return layer.output_units(name)  # type: ignore[operator]
    found = [AxisTensor(f"{name}.weight", 0, IN, initial_std(layer))]
    return found if layer.bias is None else [*found, AxisTensor(f"{name}.bias", 0, IN, 0.0)]


def input_units(name: str, layer: nn.Module) -> list[AxisTensor]:
    """The tensors of a projection that have an index for each of its inputs, as what a unit writes.

    Args:
        name: Name of the layer in the part.
        layer: ``nn.Linear``, or a module with a method ``input_units(name)``.
    """
    if hasattr(layer, "input_units"):
        return layer.input_units(name)  # type: ignore[operator]
    return [AxisTensor(f"{name}.weight", 1, OUT, initial_std(layer))]


def initial_std(layer: Any) -> float:
    """Standard deviation of a linear layer's initial weights: its ``init_std``, or that of torch's default."""
    return getattr(layer, "init_std", (3 * layer.weight.shape[1]) ** -0.5)


def find_axes(module: nn.Module) -> Iterator[tuple[str, nn.Module, Axis]]:
    """Find all axes below a module, with the name and the part that declares each; shared parts count once."""
    for name, part in module.named_modules():
        for axis in part.axes() if callable(getattr(part, "axes", None)) else ():  # type: ignore[operator]
            if isinstance(axis, Axis):
                yield name, part, axis


def axis_sizes(module: nn.Module) -> dict[str, int]:
    """Count the units of each kind of axis; of parts with different numbers the smallest counts."""
    found: dict[str, int] = {}
    for _, part, axis in find_axes(module):
        size = axis.size(part)
        found[axis.kind] = min(size, found.get(axis.kind, size))
    return found


def resized_shape(tensor: Tensor, dim: int, length: int) -> tuple[int, ...]:
    """The shape of a tensor with another length in one dimension."""
    return (*tensor.shape[:dim], length, *tensor.shape[dim + 1 :])


def refresh(owner: nn.Module) -> None:
    """Set the sizes that a linear layer shows by its weight."""
    if isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = owner.weight.shape


def follow_sizes(part: nn.Module) -> None:
    """Let a part with axes take the sizes of the tensors that it loads.

    Args:
        part: A module with a method ``axes``; it gets a pre-hook of ``load_state_dict``, once.
    """
    if not any(hook is _take_sizes for hook in _load_hooks(part)):
        part.register_load_state_dict_pre_hook(_take_sizes)


def _load_hooks(part: nn.Module) -> list[Any]:
    return [getattr(hook, "hook", hook) for hook in part._load_state_dict_pre_hooks.values()]


def _take_sizes(part: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for axis in part.axes():  # type: ignore[operator]
        saved = {tensor: state_dict.get(prefix + tensor.name) for tensor in axis.tensors}
        sizes = {divmod(one.shape[tensor.dim], tensor.block) for tensor, one in saved.items() if one is not None}
        if any(saved[tensor] is None for tensor in axis.tensors if tensor.role != OWN) or len(sizes) != 1:
            continue  # load_state_dict reports what is missing
        size, rest = sizes.pop()
        for tensor in axis.tensors if size and not rest else ():
            resize(part, tensor, size * tensor.block, persistent=saved[tensor] is not None)


@torch.no_grad()
def resize(part: nn.Module, tensor: AxisTensor, length: int, persistent: bool = True) -> None:
    """Give a tensor another length, with values that mean nothing.

    Args:
        part: The part that declares it.
        tensor: Which one.
        length: Entries in its dimension.
        persistent: Whether a buffer is part of the state dict from now on.
    """
    owner, attribute = tensor.owner(part)
    present = getattr(owner, attribute)
    if attribute in owner._buffers and persistent:
        owner._non_persistent_buffers_set.discard(attribute)
    if present.shape[tensor.dim] == length:
        return
    empty = present.data.new_zeros if attribute in owner._buffers else present.data.new_empty
    present.data = empty(resized_shape(present, tensor.dim, length))
    present.grad = None
    refresh(owner)
