"""Growth of a module along its axes: checked as a whole, then applied one parameter at a time."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from lit_tokenformer.errors import UserError, unknown_name
from lit_tokenformer.growth.methods import GrowthMethod, check_rows, growth_method
from lit_tokenformer.growth.rows import GrownTensor, Rows, regrown
from lit_tokenformer.growth.shards import ShardedParameters, local
from lit_tokenformer.models import ParamTokens, Tokens, param_tokens
from lit_tokenformer.models.axes import Axis, axis_sizes, find_axes, refresh, resized_shape
from lit_tokenformer.models.backbone import growable_size
from lit_tokenformer.models.config import KINDS, OTHER

UNITS = {
    **{
        "depth": "blocks",
        "experts": "experts",
        "hidden": "hidden units",
        "heads": "heads",
        "kv_heads": "key and value heads",
    },
    **dict.fromkeys((*KINDS, OTHER), "tokens"),
}
"""Names of the units of each kind; units of other kinds are named by the kind."""


@dataclass(frozen=True)
class GrownParameter:
    """Replaced parameter, with the information that its optimizer needs.

    Args:
        name: Name in the grown module.
        old: Old parameter, removed from the module.
        new: New parameter.
        grown: Growth of the tensor: origin of its rows, and dimension.
        gradient_scale: Factor on the gradient of an old row: 1/r for tensors of role ``in`` or ``own`` under a split,
            else 1.
    """

    name: str
    old: nn.Parameter
    new: nn.Parameter
    grown: GrownTensor
    gradient_scale: float


@dataclass(frozen=True)
class PlannedGrowth:
    """Planned growth of one axis.

    Args:
        name: Name of the part in the module.
        part: Part that declares the axis.
        axis: Growing axis.
        rows: Origin of its units.
    """

    name: str
    part: nn.Module
    axis: Axis
    rows: Rows


def target_sizes(tokens: Tokens, current: Mapping[str, int], setting: str = "tokens") -> dict[str, int]:
    """Resolve the target size of each kind of axis.

    Args:
        tokens: A single n (qkv n, proj n, ffn 4n and other n, for the kinds of the model) or totals by kind: parameter
            tokens, ``hidden`` units, ``heads``, units of a part's own kind, ``depth`` (blocks) and ``experts``.
        current: Current size, from :func:`~lit_tokenformer.models.param_tokens` or, to grow more than parameter tokens,
            :func:`~lit_tokenformer.models.backbone.growable_size`.
        setting: Name of the setting in errors.

    Returns:
        Total of each kind in ``current``; kinds missing from ``tokens`` are unchanged.

    Raises:
        UserError: If the model does not have a kind, or a total is not an integer >= 1 or would shrink.

    Example:
        >>> target_sizes(192, {"qkv": 96, "proj": 96, "ffn": 384})
        {'qkv': 192, 'proj': 192, 'ffn': 768}
    """
    if isinstance(tokens, Mapping):
        for kind in tokens:
            if kind not in current:
                raise unknown_name(setting, kind, current)
    wanted = dict(current)
    if isinstance(tokens, Mapping):
        for kind in tokens.keys() - set(KINDS):
            wanted[kind] = total = tokens[kind]
            if isinstance(total, bool) or not isinstance(total, int):
                units = UNITS.get(kind, kind)
                raise UserError(f"{setting}: {kind}: expected a whole number of {units}, got {total!r}")
        tokens = {kind: total for kind, total in tokens.items() if kind in KINDS}
    elif OTHER in current:
        wanted[OTHER] = tokens
    kinds = {kind: current.get(kind, 1) for kind in KINDS}
    try:
        wanted |= ParamTokens.parse(tokens, base=ParamTokens(**kinds)).items()
    except ValueError as error:
        raise UserError(f"{setting}: {str(error).removeprefix('param_tokens: ')}") from None
    for kind, now in current.items():
        if wanted[kind] < now:
            units, verb = UNITS.get(kind, kind), "inserted" if kind == "depth" else "appended"
            raise UserError(f"{setting}: {kind} would shrink from {now} to {wanted[kind]}; {units} can only be {verb}")
    return {kind: wanted[kind] for kind in current}


def grown_sizes(module: nn.Module, tokens: Tokens) -> dict[str, int]:
    """Current size in the kinds affected by a growth: parameter tokens, and the other kinds named in ``tokens``."""
    named = tokens if isinstance(tokens, Mapping) else {}
    more = {kind: total for kind, total in growable_size(module).items() if kind in named}
    return {**param_tokens(module), **more}


def describe_sizes(sizes: Mapping[str, object]) -> str:
    """Format totals by kind for a log line: parameter tokens first, then other units.

    Example:
        >>> describe_sizes({"qkv": "8 -> 16", "ffn": "32 -> 64", "heads": "2 -> 4"})
        'qkv 8 -> 16, ffn 32 -> 64 tokens, 2 -> 4 heads'
    """
    tokens = [f"{kind} {size}" for kind, size in sizes.items() if UNITS.get(kind) == "tokens"]
    more = [f"{size} {UNITS.get(kind, kind)}" for kind, size in sizes.items() if UNITS.get(kind) != "tokens"]
    return ", ".join([*([f"{', '.join(tokens)} tokens"] if tokens else []), *more])


def planned_rows(
    module: nn.Module, targets: Mapping[str, int], method: str, setting: str = "tokens"
) -> list[PlannedGrowth]:
    """Plan the growth of all axes of a module, in module order.

    Args:
        module: Module to grow.
        targets: Totals by kind; missing kinds are unchanged.
        method: Name of the growth method.
        setting: Name of the setting in errors.

    Raises:
        UserError: If an axis would shrink, or the method cannot preserve the function of its part.
    """
    makes = growth_method(method)
    found = []
    for name, part, axis in find_axes(module):
        before = axis.size(part)
        after = targets.get(axis.kind, before)
        if after < before:
            unit = UNITS.get(axis.kind, axis.kind)
            raise UserError(
                f"{setting}: layer {name!r} would shrink from {before} to {after}; {unit} can only be appended"
            )
        if after > before:
            rows = makes.rows(before, after)
            check_rows(axis, rows, makes, name)
            found.append(PlannedGrowth(name, part, axis, rows))
    return found


def grow_one_by_one(
    module: nn.Module,
    sizes: Tokens,
    method: str = "split",
    generator: torch.Generator | None = None,
    noise: float = 1.0,
    seed: int = 0,
) -> Iterator[GrownParameter]:
    """Append units as :func:`~lit_tokenformer.growth.grow` does, yielding one parameter at a time.

    The caller can release each parameter before the next is created, so at most one is in memory twice. In a sharded
    model every process creates its local rows: without communication if copies stay on the process of their originals,
    else by gathering the old parameter, one at a time.
    """
    makes = growth_method(method)
    if not 0 <= noise < math.inf:
        raise UserError(f"noise: expected a number of at least 0, got {noise}")
    targets = target_sizes(sizes, axis_sizes(module))
    plan = planned_rows(module, targets, method)
    for one in plan:
        _check_replaceable(one)
    check_shared(module, plan)
    tensors = [(one, tensor.of(one.part)) for one in plan for tensor in one.axis.tensors]
    for device in {tensor.device for _, tensor in tensors}:
        needed = sum(_added(tensor, one.rows) for one, tensor in tensors if tensor.device == device)
        check_memory(needed, device, "tokens")
    del tensors
    return _replace(module, plan, makes, generator, noise, seed)


def _replace(
    module: nn.Module,
    plan: list[PlannedGrowth],
    makes: GrowthMethod,
    generator: torch.Generator | None,
    noise: float,
    seed: int,
) -> Iterator[GrownParameter]:
    sharded = ShardedParameters(module)
    uses = Counter((tensor.dim, tensor.of(one.part)) for one in plan for tensor in one.axis.tensors)
    tied = {key for key, count in uses.items() if count > 1}
    del uses  # would keep every old parameter alive
    done: dict[tuple[int, Tensor], Tensor] = {}  # tied parameters only
    for one in plan:
        name = one.name if one.axis.tau is not None else f"{one.name}.{one.axis.kind}"
        draw = generator or part_generator(seed, name, one.rows.after)
        for tensor in one.axis.tensors:
            owner, attribute = tensor.owner(one.part)
            old = getattr(owner, attribute)
            key = tensor.dim, old
            if key in done:
                setattr(owner, attribute, done[key])
            elif not any(dim == tensor.dim and old is new for (dim, _), new in done.items()):  # replaced in both places
                grown = GrownTensor(one.rows, tensor.dim, tensor.block)
                rows = regrown(old, grown, makes.fill(one.axis, tensor, one.rows, noise, draw))
                if attribute in owner._buffers:
                    owner._non_persistent_buffers_set.discard(attribute)
                    setattr(owner, attribute, rows)
                    continue
                shape = resized_shape(old, tensor.dim, one.rows.after * tensor.block)
                new = sharded.replace(owner, attribute, rows, shape)
                if key in tied:
                    done[key] = new
                scale = makes.gradient_scale(tensor, one.rows)
                yield GrownParameter(f"{one.name}.{tensor.name}".lstrip("."), old, new, grown, scale)
                del new
            refresh(owner)
            del old, key
        if one.axis.tau is not None:
            with torch.no_grad():  # tau may be a parameter
                one.axis.tau.copy_(makes.tau(one.axis.tau, one.rows))


def quantized_parameters(module: nn.Module) -> Iterator[str]:
    """Yield the names of parameters with quantized values, which can neither be trained nor grown."""
    for name, parameter in module.named_parameters():
        plain = type(parameter.data) is Tensor or isinstance(parameter.data, DTensor)
        if not plain or parameter.dtype in (torch.int8, torch.uint8):
            yield name


def _check_replaceable(one: PlannedGrowth) -> None:
    """Reject parameters with hooks or parametrizations that a growth would lose."""
    for tensor in one.axis.tensors:
        owner, attribute = tensor.owner(one.part)
        name = f"{one.name}.{tensor.name}".lstrip(".")
        if attribute in owner._buffers:
            continue
        parameter = owner._parameters.get(attribute)
        if parametrize.is_parametrized(owner, attribute) or parameter is None:
            raise UserError(f"tokens: {name} is parametrized; remove the parametrization before growth")
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise UserError(f"tokens: {name} has hooks that growth would lose; remove them first")


def check_shared(module: nn.Module, plan: Iterable[PlannedGrowth]) -> None:
    """Reject a resized parameter that is tied to one that is not resized in the same way."""
    ways: dict[tuple[nn.Module, str], set[tuple[int, str, int, Rows]]] = {}
    for one in plan:
        for tensor in one.axis.tensors:
            ways.setdefault(tensor.owner(one.part), set()).add((tensor.dim, tensor.role, tensor.block, one.rows))
    grown = {
        owner._parameters[attribute]: way for (owner, attribute), way in ways.items() if attribute in owner._parameters
    }
    for name, owner in module.named_modules():
        for attribute, parameter in owner._parameters.items():
            if parameter in grown and ways.get((owner, attribute)) != grown[parameter]:
                raise UserError(
                    f"tokens: {f'{name}.{attribute}'.lstrip('.')} is tied to a parameter that grows differently"
                )


def added_bytes(module: nn.Module, targets: Mapping[str, int]) -> int:
    """Bytes that the growth of a module to ``targets`` adds on this process."""
    return sum(
        _added(tensor.of(part), Rows(axis.size(part), targets[axis.kind]))
        for _, part, axis in find_axes(module)
        for tensor in axis.tensors
        if axis.kind in targets
    )


def _added(tensor: Tensor, rows: Rows) -> int:
    return local(tensor).nbytes * (rows.after - rows.before) // rows.before


def check_memory(needed: int, device: torch.device, setting: str) -> None:
    """Reject a growth whose new parameters alone exceed the available memory.

    Args:
        needed: Memory of the new parameters, in bytes.
        device: Device of the parameters.
        setting: Name of the setting in errors.

    Raises:
        UserError: If less memory is available.
    """
    available = _available_memory(device)
    if available is not None and needed > available:
        raise UserError(
            f"{setting}: not enough memory for the new parameters alone (got {available / 2**30:,.1f} GiB available on "
            f"{device}, expected at least {needed / 2**30:,.1f} GiB)"
        )


def _available_memory(device: torch.device) -> int | None:
    """Available memory in bytes; ``None`` if unknown."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    table = Path("/proc/meminfo")
    if device.type != "cpu" or not table.is_file():
        return None
    fields = dict(line.split(":", 1) for line in table.read_text().splitlines())
    return 1024 * int(fields["MemAvailable"].split()[0])


def part_generator(seed: int, name: str, total: int) -> torch.Generator:
    """Create the random generator of a part that grows to a total."""
    digest = hashlib.sha256(f"{seed}/{name}/{total}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
