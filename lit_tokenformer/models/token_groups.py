"""Groups of parameter tokens: one Pattention layer, several sets of tokens, and a gate.

A layer computes ``y = sum_g gate_g GELU(tau_g s_g / ||s_g||) V_g``. Every group has its own keys and values, which are
parameters of their own, its own norm and its own tau. Groups are therefore independent: they add up, one can be
switched off without a trace, and each is frozen, saved, sharded and grown like any layer. Related work: adapters (arXiv
1902.00751) and mixtures of experts (arXiv 1701.06538), which differ in their gate alone.

The layer's own tokens are the group :data:`BASE`. A further group is a Pattention layer in ``layer.groups``, whose kind
of tokens in growth schedules is ``KIND:NAME``, such as ``ffn:docs``.

Shapes: B batch, T data tokens, N parameter tokens. ``...`` is any number of leading dimensions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lit_tokenformer.errors import UserError

if TYPE_CHECKING:
    from lit_tokenformer.models.pattention import Pattention

BASE = ""
"""Name of the layer's own tokens in a gate."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


class Share(NamedTuple):
    """Use of one group.

    Args:
        places: Flat indices of the data tokens that use the group, (M,) int64; ``None`` for all. The group computes
            these data tokens only.
        weight: Factor on the group's output, broadcastable to (M, D_out), or to (..., D_out) without places; ``None``
            for 1.
    """

    places: Tensor | None = None
    weight: Tensor | None = None


class Gate(Protocol):
    """Gate of the groups of a layer: an adapter's name, a router, a modality.

    A gate with parameters, such as a router, is an ``nn.Module``, and part of its layer.
    """

    def __call__(self, x: Tensor, /) -> Mapping[str, Share]:
        """Assign data tokens to groups.

        Args:
            x: Input of the layer, (..., D_in).

        Returns:
            Use of each group by name, :data:`BASE` included. Groups that are missing, here or in the layer, are off.
        """
        ...


def gated_sum(x: Tensor, groups: Mapping[str, Callable[[Tensor], Tensor]], gate: Gate) -> Tensor:
    """Sum the outputs of groups, (..., D_in) -> (..., D_out).

    Args:
        x: Input of the layer.
        groups: Groups by name, each (..., D_in) -> (..., D_out).
        gate: Gate of the groups; at least one is on.

    Example:
        >>> def gate(x):
        ...     return {"": Share(), "double": Share(torch.tensor([1]), torch.tensor(2.0))}
        >>> gated_sum(torch.ones(2, 1), {"": torch.neg, "double": torch.clone}, gate)
        tensor([[-1.],
                [ 1.]])
    """
    total: Tensor | None = None
    for name, (places, weight) in gate(x).items():
        if name not in groups:
            continue
        part = groups[name](x if places is None else x.flatten(0, -2).index_select(0, places))
        part = part if weight is None else part * weight
        if places is not None:
            into = part.new_zeros(*x.shape[:-1], part.shape[-1]) if total is None else total
            total = into.flatten(0, -2).index_add(0, places, part.to(into.dtype)).view_as(into)
        else:
            total = part if total is None else total + part
    assert total is not None
    return total


class NamedGate:
    """Gate that adds the groups of one name to the layer's own tokens, for a whole batch or per sample.

    Attributes:
        selected: Name for the whole batch; ``None`` for the layer's own tokens alone, or for one name per sample.
        samples: Indices of the samples that use each group, (b,) int64 each, if there is one name per sample.
        batch: Number of samples, if there is one name per sample.
    """

    def __init__(self) -> None:
        self.selected: str | None = None
        self.samples: dict[str, Tensor] = {}
        self.batch: int | None = None

    def select(self, names: str | Sequence[str | None] | None, device: torch.device) -> None:
        """Select a group.

        Args:
            names: A name, ``None``, or one of them per sample of the following batches.
            device: Device of the data tokens.
        """
        alike = names is None or isinstance(names, str)
        self.selected = names if alike else None  # type: ignore[assignment]
        found: dict[str, list[int]] = {}
        for number, name in enumerate(() if alike else names):  # type: ignore[arg-type]
            if name is not None:
                found.setdefault(name, []).append(number)
        self.samples = {name: torch.tensor(numbers, device=device) for name, numbers in found.items()}
        self.batch = None if alike else len(names)  # type: ignore[arg-type]

    def __call__(self, x: Tensor) -> dict[str, Share]:
        """Assign data tokens (B, ..., D_in) to the layer's own tokens, and to the selected groups.

        Raises:
            UserError: If the batch has another number of samples than names.
        """
        shares = {BASE: Share()}
        if self.selected is not None:
            shares[self.selected] = Share()
        if self.batch is not None and x.shape[0] != self.batch:
            raise UserError(f"adapter: expected one name for each of {x.shape[0]} samples, got {self.batch}")
        inner = torch.arange(x.shape[1:-1].numel(), device=x.device)
        for name, samples in self.samples.items():
            shares[name] = Share((samples[:, None] * len(inner) + inner).flatten())
        return shares


def check_group_name(name: str, setting: str = "name") -> None:
    """Reject a name that cannot name a folder, or that a module container reserves.

    Raises:
        UserError: If it is.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"{setting}: expected letters, digits, '_' and '-', without a path separator, got {name!r}")
    if hasattr(nn.ModuleDict(), name):
        raise UserError(f"{setting}: {name!r} is reserved; choose another name")


def group_layers(module: nn.Module) -> Iterator[tuple[str, Pattention]]:
    """Yield the layers that can hold groups, with their names; groups themselves cannot."""
    from lit_tokenformer.models.pattention import Pattention

    for name, layer in module.named_modules():
        if isinstance(layer, Pattention) and ":" not in layer.kind:
            yield name, layer


def add_group(layer: Pattention, name: str, num_tokens: int, gate: Gate) -> Pattention:
    """Append a group of parameter tokens with zero output: random keys, zero values.

    Args:
        layer: Layer to extend.
        name: Name of the group.
        num_tokens: Number of parameter tokens of the group.
        gate: Gate of all groups of the layer.

    Returns:
        The group, (..., D_in) -> (..., D_out).

    Raises:
        UserError: If the number of tokens is below 1, or the layer has such a group, or another gate.

    Example:
        >>> from lit_tokenformer.models import Pattention
        >>> layer, gate = Pattention(8, 8, num_tokens=4), NamedGate()
        >>> x = torch.randn(2, 8)
        >>> before = layer(x)
        >>> group = add_group(layer, "docs", 2, gate)
        >>> gate.select("docs", x.device)
        >>> torch.equal(layer(x), before)
        True
    """
    from lit_tokenformer.models.pattention import Pattention

    if layer.groups is not None and name in layer.groups:
        raise UserError(f"name: the layer has a group {name!r} already")
    if layer.gate not in (None, gate):
        raise UserError(f"gate: expected the {type(layer.gate).__name__} of the layer, got a {type(gate).__name__}")
    keys, values = layer.key_tokens, layer.value_tokens
    settings: dict[str, Any] = {key: getattr(layer, key) for key in ("score_norm", "key_std", "value_std", "series")}
    with torch.device("meta" if keys.is_meta else "cpu"):  # the same draws on every device
        group = Pattention(keys.shape[1], values.shape[1], num_tokens, kind=f"{layer.kind}:{name}", **settings)
    nn.init.zeros_(group.value_tokens)  # zero keys would never train: their norm is 0
    group.to(keys.device, keys.dtype).train(layer.training)
    layer.groups = nn.ModuleDict() if layer.groups is None else layer.groups
    layer.groups[name] = group
    layer.gate = gate
    return group


def remove_group(layer: Pattention, name: str) -> None:
    """Remove a group, if the layer has it; without groups the layer is as before."""
    if layer.groups is not None and name in layer.groups:
        del layer.groups[name]
        if not layer.groups:
            layer.groups = layer.gate = None


def group_sizes(module: nn.Module) -> dict[str, dict[str, int]]:
    """Count the parameter tokens of each group by kind of layer; the smallest number counts if layers differ.

    Example:
        >>> from lit_tokenformer.models import Pattention
        >>> layer = Pattention(8, 8, num_tokens=4, kind="ffn")
        >>> _ = add_group(layer, "docs", 2, NamedGate())
        >>> group_sizes(layer)
        {'docs': {'ffn': 2}}
    """
    found: dict[str, dict[str, int]] = {}
    group: Any
    for _, layer in group_layers(module):
        for name, group in (layer.groups or {}).items():
            sizes = found.setdefault(name, {})
            sizes[layer.kind] = min(group.num_tokens, sizes.get(layer.kind, group.num_tokens))
    return found


def is_of_group(tensor_name: str) -> bool:
    """Return whether a name in a state dict is of a tensor of a further group."""
    return ".groups." in f".{tensor_name}"
