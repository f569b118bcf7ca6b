"""Growth of optimizers: parameter groups and optimizer state."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from lit_tokenformer.errors import UserError, unknown_name
from lit_tokenformer.growth.axes import GrownParameter
from lit_tokenformer.growth.methods import GrowthMethod
from lit_tokenformer.growth.rows import regrown
from lit_tokenformer.growth.shards import like

NEW_STATES = ("mean", "zeros", "reset", "reset_copies")

_MOMENTS = {
    "exp_avg": 1,
    "momentum_buffer": 1,
    "grad_avg": 1,
    "exp_avg_sq": 2,
    "square_avg": 2,
    "sum": 2,
    "max_exp_avg_sq": 2,
    "row_var": 2,
    "col_var": 2,
    "variance": 2,
}
"""Optimizer state that can be carried over, and its degree in the gradient (2: average or sum of squares)."""


def grow_optimizer(optimizer: torch.optim.Optimizer, grown: Iterable[GrownParameter], new_state: str = "mean") -> None:
    """Replace grown parameters in an optimizer, and carry their state over.

    Copies of a split inherit the state of their original, scaled as their gradients (for keys, first moment / r, second
    moment / r^2). Other new rows start with a first moment of zero.

    Args:
        optimizer: Any optimizer; parameters of other optimizers are ignored.
        grown: Replaced parameters, as returned by :func:`grow`.
        new_state: Second moment of the other new rows: ``mean`` (mean of the old rows) or ``zeros`` (with an old step
            count, the first updates are 3 to 6 times the learning rate at beta2 = 0.999). ``reset`` drops the whole
            state of each grown parameter, as the published code does. ``reset_copies`` starts all new rows, including
            the copies of a split, at zero moments; originals keep their state (asymmetric reset, SPARKLING).

    Warns:
        UserWarning: If optimizer state cannot be carried over; the state of that parameter is reset.
    """
    if new_state not in NEW_STATES:
        raise unknown_name("new_state", new_state, NEW_STATES)
    places = {
        parameter: (group["params"], index)
        for group in optimizer.param_groups
        for index, parameter in enumerate(group["params"])
    }
    not_carried: set[str] = set()
    for one in grown:
        if one.old not in places:
            continue
        parameters, index = places[one.old]
        parameters[index] = one.new
        state = optimizer.state.pop(one.old, None)
        if not state:
            continue
        if new_state == "reset":
            _reset_state(optimizer, one.new)
            continue
        unknown = {key for key, value in state.items() if not _can_carry(key, value, one)}
        if unknown:
            not_carried |= unknown
            _reset_state(optimizer, one.new)
        else:
            optimizer.state[one.new] = {  # releases each old tensor before creating the next
                key: _grow_state(key, state.pop(key), one, new_state) for key in list(state)
            }
    if not_carried:
        warnings.warn(
            f"{type(optimizer).__name__} keeps {', '.join(sorted(not_carried))}, which cannot be carried over a "
            "growth: the optimizer state of the grown parameters was reset.",
            stacklevel=2,
        )


def copied_state(state: Mapping[str, Any], share: float = 1.0) -> dict[str, Any]:
    """Copy the optimizer state of a parameter for another one of its shape.

    Args:
        state: State of the parameter.
        share: Gradient of the other parameter, relative to that of the first.
    """
    copied = {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
    for key in copied.keys() & _MOMENTS.keys():
        if isinstance(copied[key], Tensor):
            copied[key].mul_(share ** _MOMENTS[key])
    return copied


def check_noise(optimizer: torch.optim.Optimizer, method: GrowthMethod, noise: float) -> None:
    """Reject identical copies under Muon, whose Newton-Schulz iterations give identical rows identical updates.

    Args:
        optimizer: Any optimizer; those with ``ns_steps`` orthogonalize.
        method: Growth method.
        noise: Size of the differences between the copies.

    Raises:
        UserError: If the copies would be identical.
    """
    if noise == 0 and method.rows(1, 2).copies > 1 and any("ns_steps" in one for one in optimizer.param_groups):
        raise UserError(
            f"noise: 0 keeps the copies of a split identical under {type(optimizer).__name__}, which gives identical "
            "rows identical updates (expected more than 0)"
        )


class _StaleOptimizers:
    """Guard against stale optimizers, which would silently not train the new parameters.

    Checks every optimizer of the process before each step while replaced parameters are alive.
    """

    def __init__(self) -> None:
        self._replaced: weakref.WeakValueDictionary[int, nn.Parameter] = weakref.WeakValueDictionary()
        self._inserted: list[tuple[weakref.ref[nn.Parameter], weakref.ref[nn.Parameter]]] = []
        self._hook: RemovableHandle | None = None

    def watch(
        self, replaced: Iterable[nn.Parameter] = (), inserted: Iterable[tuple[nn.Parameter, nn.Parameter]] = ()
    ) -> None:
        """Reject the next step of an optimizer that has replaced parameters or lacks inserted ones.

        Args:
            replaced: Parameters that a growth has removed from a model.
            inserted: Pairs ``(origin, new)``: an optimizer with ``origin`` must also have ``new``.
        """
        self._replaced.update((id(one), one) for one in replaced)
        self._inserted += [(weakref.ref(origin), weakref.ref(new)) for origin, new in inserted if new.requires_grad]
        if self._hook is None and (self._replaced or self._inserted):
            self._hook = register_optimizer_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        old = len(held.intersection(self._replaced.keys()))
        waiting, missing = [], 0
        for pair in self._inserted:
            origin, new = (reference() for reference in pair)
            if origin is not None and new is not None and id(new) not in held:
                waiting.append(pair)
                missing += id(origin) in held
        if old or missing:
            raise RuntimeError(
                f"{type(optimizer).__name__}: stale after a growth (got {old} replaced parameters, {missing} inserted "
                "parameters missing), so the grown model would not train: pass it to grow(..., optimizer=optimizer), "
                "or create a new optimizer after the growth"
            )
        self._inserted = waiting
        if self._hook is not None and not self._replaced and not waiting:
            self._hook.remove()
            self._hook = None


watch_optimizers = _StaleOptimizers().watch


def check_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Check that optimizer state has the shape of its parameters.

    ``Optimizer.load_state_dict`` compares counts only; a wrong shape would fail in the first step.

    Raises:
        UserError: If a state is not a tensor or has another shape.
    """
    for number, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            for key, value in optimizer.state.get(parameter, {}).items():
                if key not in _MOMENTS or value is None:
                    continue
                if not isinstance(value, Tensor):
                    raise UserError(
                        f"optimizer state: {key} of parameter {index} in group {number} is not a tensor "
                        f"(got {type(value).__name__})"
                    )
                if value.ndim != parameter.ndim:
                    continue
                pairs = zip(value.shape, parameter.shape, strict=True)
                if any(have not in (want, 1) for have, want in pairs):
                    raise UserError(
                        f"optimizer state: {key} of parameter {index} in group {number} has the wrong shape "
                        f"(got {tuple(value.shape)}, expected {tuple(parameter.shape)}); "
                        "the checkpoint's weights and optimizer state do not match"
                    )


def _reset_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    """Reset the state of a parameter to that of a new optimizer: none, unless set at construction (Adagrad)."""
    with contextlib.suppress(TypeError):  # defaults differ from arguments: state is set in the first step
        fresh = type(optimizer)([parameter], **optimizer.defaults).state
        optimizer.state.update({key: state for key, state in fresh.items() if state})


def _can_carry(key: str, value: Any, grown: GrownParameter) -> bool:
    if not isinstance(value, Tensor):
        return value is None or isinstance(value, (int, float, str))  # a step count or a flag
    if value.numel() == 1 and key not in _MOMENTS:
        return True
    units = grown.grown.rows.before * grown.grown.block
    return key in _MOMENTS and value.ndim == grown.old.ndim and value.shape[grown.grown.dim] in (1, units)


@torch.no_grad()
def _grow_state(key: str, value: Any, grown: GrownParameter, new_state: str) -> Any:
    if not isinstance(value, Tensor) or (value.numel() == 1 and key not in _MOMENTS):
        return value
    degree, rows = _MOMENTS[key], grown.grown.rows
    if value.shape[grown.grown.dim] != rows.before * grown.grown.block:
        return value * grown.gradient_scale**degree  # a factor without rows

    def fill(copies: Tensor, appended: Tensor, old: Tensor, place: slice) -> None:
        torch.mul(old[:, None].expand_as(copies), grown.gradient_scale**degree, out=copies)
        if new_state == "reset_copies":
            copies[:, 1:].zero_()
        if degree == 2 and new_state == "mean" and len(appended):
            appended.copy_(copies[:, 0].mean(dim=0))
        else:
            appended.zero_()

    local = regrown(value, grown.grown, fill)
    return like(grown.new, local) if isinstance(value, DTensor) else local
