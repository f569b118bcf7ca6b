"""Muon for matrices and AdamW for all other parameters, as one optimizer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer, ParamsT

from lit_tokenformer.errors import UserError
from lit_tokenformer.growth.shards import gather, local, owned_rows


class MuonWithAuxAdam(Optimizer):
    """Optimize matrices with :class:`torch.optim.Muon` and all other parameters with :class:`torch.optim.AdamW`.

    Muon orthogonalizes the momentum of a matrix by Newton-Schulz iterations (Keller Jordan,
    https://kellerjordan.github.io/posts/muon). Embeddings, heads, norms and vectors are outside its assumptions. A
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

    Raises:
        UserError: If this version of torch has no ``torch.optim.Muon``.
        ValueError: If torch rejects a setting.

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
    ) -> None:
        if not aux_lr_scale >= 0:
            raise UserError(f"aux_lr_scale: expected at least 0, got {aux_lr_scale}")
        self._make_inner()
        muon: Any = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
        adam: Any = {"betas": tuple(betas)}
        shared: Any = {"lr": lr, "weight_decay": weight_decay, "eps": eps}
        type(self._muon)([torch.zeros(1, 1)], **shared, **muon)  # validates
        type(self._adam)([torch.zeros(1)], **shared, **adam)
        super().__init__(params, {**shared, **muon, **adam, "aux_lr_scale": aux_lr_scale})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, divided into one per optimizer.

        Args:
            param_group: Parameters and settings; ``use_muon: false`` assigns matrices to AdamW as well.
        """
        settings = dict(param_group)
        params = settings.pop("params")
        params = [params] if isinstance(params, torch.Tensor) else list(params)
        for use_muon, inner in ((True, self._muon), (False, self._adam)):
            part = [one for one in params if (settings.get("use_muon", True) and one.ndim == 2) is use_muon]
            if part:
                given = {**inner.defaults, **self.defaults, **settings}
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
                self._step(self._adam, {**group, "lr": group["lr"] * group["aux_lr_scale"]}, self.state)
                continue
            whole = [one for one in group["params"] if not isinstance(one, DTensor)]
            self._step(self._muon, {**group, "params": whole}, self.state)
            for sharded in (one for one in group["params"] if isinstance(one, DTensor) and one.grad is not None):
                self._step_sharded(sharded, group)
        return loss

    @staticmethod
    def _step(inner: Optimizer, group: dict[str, Any], state: Any) -> None:
        """Take a step of one of the two optimizers, which keeps no reference to the parameters."""
        inner.param_groups, inner.state = [group], state
        inner.step()
        inner.param_groups, inner.state = [], defaultdict(dict)

    def _step_sharded(self, parameter: DTensor, group: dict[str, Any]) -> None:
        """Take a step of Muon for one sharded matrix. It is gathered, since its update depends on all rows."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        matrix, buffer = gather(parameter), gather(state["momentum_buffer"])
        matrix.grad = gather(parameter.grad)  # type: ignore[arg-type]
        gathered = defaultdict(dict, {matrix: {"momentum_buffer": buffer}})
        self._step(self._muon, {**group, "params": [matrix]}, gathered)
        own = owned_rows(parameter, len(matrix))
        local(parameter).copy_(matrix[own.start : own.stop])
        local(state["momentum_buffer"]).copy_(buffer[own.start : own.stop])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._make_inner()

    def _make_inner(self) -> None:
        """Create the two optimizers, whose groups and state are set in each step."""
        if not hasattr(torch.optim, "Muon"):
            raise UserError(
                f"model.optimizer: MuonWithAuxAdam needs torch >= 2.9 (got {torch.__version__}); upgrade torch, or use "
                "torch.optim.AdamW"
            )
        self._muon: Optimizer = torch.optim.Muon([torch.zeros(1, 1)])
        self._adam: Optimizer = torch.optim.AdamW([torch.zeros(1)])
