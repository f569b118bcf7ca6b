"""Axes: growable dimensions that the parts of a model declare.

An axis is a set of tensors indexed by the same units: parameter tokens, hidden units or attention heads. A growable
part implements ``axes()``; :mod:`lit_tokenformer.growth` depends on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

IN, OUT, OWN = "in", "out", "own"
"""Roles of a tensor: input weights, output weights, and parameters of the unit itself."""


@dataclass(frozen=True)
class AxisTensor:
    """Parameter or buffer with one slice per unit of an axis.

    Args:
        name: Name relative to the part, such as ``fc1.weight``.
        dim: Dimension of the units.
        role: ``in`` (input weights, repeated by copies), ``out`` (output weights, split among copies) or ``own``.
        std: Standard deviation of initial values.
        settle: Function applied in place to new units of role ``own`` after they are drawn, (units, ...).
        block: Entries per unit, such as the width of a head.
    """

    name: str
    dim: int = 0
    role: str = IN
    std: float = 0.02
    settle: Callable[[Tensor], object] | None = None
    block: int = 1

    def owner(self, part: nn.Module) -> tuple[nn.Module, str]:
        """Find the submodule of ``part`` that owns the tensor, and the attribute name."""
        path, _, attribute = self.name.rpartition(".")
        return part.get_submodule(path), attribute

    def of(self, part: nn.Module) -> Tensor:
        """Get the tensor from ``part``."""
        owner, attribute = self.owner(part)
        return getattr(owner, attribute)


@dataclass(frozen=True)
class Axis:
    """Tensors of a part that are indexed by the same units.

    Args:
        kind: Kind in growth schedules, such as ``qkv``, ``hidden`` or ``heads``.
        tensors: At least one tensor each of the roles ``in`` and ``out``.
        tau: Scale of a normalization over all units (Pattention); ``None`` if units are independent.
        zero_exact: Whether a unit with zero input weights does not change the others.

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
        """Current number of units of ``part``."""
        first = self.tensors[0]
        return first.of(part).shape[first.dim] // first.block


def output_units(name: str, layer: nn.Module) -> list[AxisTensor]:
    """Declare the tensors of a projection indexed by output, as input weights of the units.

    Args:
        name: Name of the layer in the part.
        layer: ``nn.Linear``, or a module with a method ``output_units(name)``.
    """
    if hasattr(layer, "base_layer"):  # under an adapter
        return output_units(f"{name}.base_layer", layer.base_layer)  # type: ignore[arg-type]
    if hasattr(layer, "output_units"):
        return layer.output_units(name)  # type: ignore[operator]
    found = [AxisTensor(f"{name}.weight", 0, IN, initial_std(layer))]
    return found if layer.bias is None else [*found, AxisTensor(f"{name}.bias", 0, IN, 0.0)]


def input_units(name: str, layer: nn.Module) -> list[AxisTensor]:
    """Declare the tensors of a projection indexed by input, as output weights of the units.

    Args:
        name: Name of the layer in the part.
        layer: ``nn.Linear``, or a module with a method ``input_units(name)``.
    """
    if hasattr(layer, "base_layer"):  # under an adapter
        return input_units(f"{name}.base_layer", layer.base_layer)  # type: ignore[arg-type]
    if hasattr(layer, "input_units"):
        return layer.input_units(name)  # type: ignore[operator]
    return [AxisTensor(f"{name}.weight", 1, OUT, initial_std(layer))]


def initial_std(layer: Any) -> float:
    """Initial standard deviation of a linear layer's weights: its ``init_std``, or torch's default."""
    return getattr(layer, "init_std", (3 * layer.weight.shape[1]) ** -0.5)


def find_axes(module: nn.Module) -> Iterator[tuple[str, nn.Module, Axis]]:
    """Yield all axes of a module with the name and module of each part; shared parts count once."""
    for name, part in module.named_modules():
        for axis in part.axes() if callable(getattr(part, "axes", None)) else ():  # type: ignore[operator]
            if isinstance(axis, Axis):
                yield name, part, axis


def axis_sizes(module: nn.Module) -> dict[str, int]:
    """Count the units of each kind of axis; the smallest number counts if parts differ."""
    found: dict[str, int] = {}
    for _, part, axis in find_axes(module):
        size = axis.size(part)
        found[axis.kind] = min(size, found.get(axis.kind, size))
    return found


def resized_shape(tensor: Tensor, dim: int, length: int) -> tuple[int, ...]:
    """Compute the shape of a tensor resized to ``length`` along ``dim``."""
    return (*tensor.shape[:dim], length, *tensor.shape[dim + 1 :])


def refresh(owner: nn.Module) -> None:
    """Update ``in_features`` and ``out_features`` of a linear layer from its weight."""
    if isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = owner.weight.shape


def follow_sizes(part: nn.Module) -> None:
    """Make a part adopt the sizes of a loaded state dict.

    Args:
        part: Module with a method ``axes``; a ``load_state_dict`` pre-hook is registered once.
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
            continue  # load_state_dict reports missing keys
        size, rest = sizes.pop()
        for tensor in axis.tensors if size and not rest else ():
            resize(part, tensor, size * tensor.block, persistent=saved[tensor] is not None)


@torch.no_grad()
def resize(part: nn.Module, tensor: AxisTensor, length: int, persistent: bool = True) -> None:
    """Resize a tensor in place, with undefined values.

    Args:
        part: Part that declares the tensor.
        tensor: Tensor to resize.
        length: New number of entries along its dimension.
        persistent: Whether a buffer becomes part of the state dict.
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
