"""Muon for matrices and AdamW for all other parameters, as one optimizer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer, ParamsT

from lit_tokenformer.errors import UserError, unknown_name
from lit_tokenformer.growth.shards import gather, local, owned_rows

LR_FACTORS: dict[str, Callable[[int, int], float]] = {
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "original": lambda rows, columns: math.sqrt(max(1, rows / columns)),
}
"""Factors on Muon's learning rate for a matrix (rows, columns)."""

NS_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def orthogonalize(matrix: Tensor, steps: int = 5, eps: float = 1e-8, dtype: torch.dtype | None = None) -> Tensor:
    """Orthogonalize a matrix approximately by quintic Newton-Schulz iterations.

    Singular values become about 0.7 to 1.2 (Keller Jordan, https://kellerjordan.github.io/posts/muon). In bfloat16 the
    result is that of :class:`torch.optim.Muon`, which has no other precision.

    Args:
        matrix: (rows, columns).
        steps: Number of iterations.
        eps: Least norm by which the matrix is divided.
        dtype: Of the products; None: bfloat16, and float32 on CPUs without AVX-512, where torch's products in bfloat16
            are several times slower.

    Returns:
        (rows, columns), in ``dtype``.
    """
    if dtype is None:
        slow = matrix.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() != "AVX512"
        dtype = torch.float32 if slow else torch.bfloat16
    tall = matrix.size(0) > matrix.size(1)
    found = (matrix.T if tall else matrix).to(dtype)
    found = found / found.norm().clamp(min=eps)
    for _ in range(steps):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), found, beta=3.4445)
    return found.T if tall else found


class MuonWithAuxAdam(Optimizer):
    """Optimize matrices with Muon and all other parameters with :class:`torch.optim.AdamW`.

    Muon orthogonalizes the momentum of a matrix by Newton-Schulz iterations (:func:`orthogonalize`), with the steps of
    :class:`torch.optim.Muon`. Embeddings, heads, norms and vectors are outside its assumptions. A
    group's key ``use_muon: false`` assigns all its parameters to AdamW; otherwise those with two dimensions use Muon.
    The tasks of this project set it: parameter tokens and projections of the blocks use Muon.

    Each given parameter group becomes one group per optimizer. Learning-rate schedules, checkpoints and growth see a
    single optimizer, with ``momentum_buffer`` as the state of a matrix and Adam's moments as that of other parameters.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate of both. With ``match_rms_adamw``, rates tuned for AdamW are a good start.
        weight_decay: Decoupled weight decay of both.
        momentum: Momentum of Muon, an exponential moving average of the gradient.
        nesterov: Whether Muon uses Nesterov momentum.
        ns_steps: Newton-Schulz iterations.
        adjust_lr_fn: Factor on Muon's learning rate for a matrix (A, B): ``match_rms_adamw`` is 0.2 sqrt(max(A, B)),
            which matches the size of AdamW's updates (arXiv 2502.16982); ``original`` is sqrt(max(1, A / B)) for
            weights (out, in), but value tokens are (in, out).
        betas: Adam's betas.
        eps: Epsilon of both.
        aux_lr_scale: Factor on the learning rate of parameters that use AdamW.
        ns_dtype: Precision of the Newton-Schulz iterations, ``bfloat16`` or ``float32``; None: by the device, see
            :func:`orthogonalize`.

    Raises:
        UserError: If a setting of Muon is out of range.
        ValueError: If ``torch.optim.AdamW`` rejects a setting.

    Example:
        >>> weight, bias = torch.nn.Linear(3, 2).parameters()
        >>> optimizer = MuonWithAuxAdam([weight, bias], lr=1e-2)
        >>> [(group["use_muon"], len(group["params"])) for group in optimizer.param_groups]
        [(True, 1), (False, 1)]
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        aux_lr_scale: float = 1.0,
        ns_dtype: str | None = None,
    ) -> None:
        if not aux_lr_scale >= 0:
            raise UserError(f"aux_lr_scale: expected at least 0, got {aux_lr_scale}")
        if not 0 <= momentum < 1:
            raise UserError(f"momentum: expected at least 0 and less than 1, got {momentum}")
        if not ns_steps >= 1:
            raise UserError(f"ns_steps: expected at least 1, got {ns_steps}")
        if adjust_lr_fn not in LR_FACTORS:
            raise unknown_name("adjust_lr_fn", adjust_lr_fn, LR_FACTORS)
        if ns_dtype is not None and ns_dtype not in NS_DTYPES:
            raise unknown_name("ns_dtype", ns_dtype, NS_DTYPES)
        self._make_inner()
        muon: Any = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
        muon |= {"ns_dtype": ns_dtype}
        adam: Any = {"betas": tuple(betas)}
        shared: Any = {"lr": lr, "weight_decay": weight_decay, "eps": eps}
        type(self._adam)([torch.zeros(1)], **shared, **adam)  # validates
        super().__init__(params, {**shared, **muon, **adam, "aux_lr_scale": aux_lr_scale})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, divided into one per optimizer.

        Args:
            param_group: Parameters and settings; ``use_muon: false`` assigns matrices to AdamW as well.
        """
        settings = dict(param_group)
        params = settings.pop("params")
        params = [params] if isinstance(params, Tensor) else list(params)
        for use_muon in (True, False):
            part = [one for one in params if (settings.get("use_muon", True) and one.ndim == 2) is use_muon]
            if part:
                given = {**({} if use_muon else self._adam.defaults), **self.defaults, **settings}
                super().add_param_group({**given, "use_muon": use_muon, "params": part})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step of both optimizers.

        Args:
            closure: Computes the gradients and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if not group["use_muon"]:
                self._step_adam({**group, "lr": group["lr"] * group["aux_lr_scale"]})
                continue
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(parameter)
                    self._step_muon(parameter, parameter.grad, state["momentum_buffer"], group)
        return loss

    def _step_adam(self, group: dict[str, Any]) -> None:
        """Take a step of the inner optimizer, which keeps no reference to the parameters."""
        self._adam.param_groups, self._adam.state = [group], self.state
        self._adam.step()
        self._adam.param_groups, self._adam.state = [], defaultdict(dict)

    def _step_muon(self, parameter: Tensor, gradient: Tensor, momentum: Tensor, group: dict[str, Any]) -> None:
        """Take a step of Muon for a matrix. A sharded one is gathered, since its update depends on all rows."""
        if isinstance(parameter, DTensor):
            matrix, buffer = gather(parameter), gather(momentum)
            self._step_muon(matrix, gather(gradient), buffer, group)  # type: ignore[arg-type]
            own = owned_rows(parameter, len(matrix))
            local(parameter).copy_(matrix[own.start : own.stop])
            local(momentum).copy_(buffer[own.start : own.stop])
            return
        momentum.lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        dtype = NS_DTYPES.get(group["ns_dtype"])
        update = orthogonalize(update, group["ns_steps"], group["eps"], dtype)
        lr = float(group["lr"])
        parameter.mul_(1 - lr * group["weight_decay"])
        parameter.add_(update, alpha=-lr * LR_FACTORS[group["adjust_lr_fn"]](*parameter.shape))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("ns_dtype", None)  # of a checkpoint before this setting
        self._make_inner()

    def _make_inner(self) -> None:
        """Create the inner optimizer, whose groups and state are set in each step."""
        self._adam: Optimizer = torch.optim.AdamW([torch.zeros(1)])
