"""Expert parallelism: each process has some experts of every layer, and data tokens travel to them and back.

Data-parallel processes form groups of P, in which each process has E / P consecutive experts. Rows sorted by expert are
sent to the processes of their experts by an all-to-all with unequal parts, after one of their numbers, and the outputs
return by a second one; the backward pass sends gradients the opposite ways. Processes with the same experts, one of
each group, shard them with FSDP2. Source: GShard (arXiv 2006.16668); the order of operations is that of torchtitan's
``AllToAllTokenDispatcher``. No data token is dropped.

An expert of other processes is a DTensor on their mesh: its name and shape are known here, and its rows are not.

Shapes: M rows of this process (data tokens times experts of each), R received rows, D width, E experts.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from lit_tokenformer.errors import UserError
from lit_tokenformer.growth.shards import OWNERS, elsewhere
from lit_tokenformer.models.experts import ExpertList, Experts, Grouped

SETTING = "trainer.strategy.expert_parallel_size"
EXPERTS = "expert_parallel"
"""Dimension of the mesh along which experts differ."""


def shard_experts(root: nn.Module, data: DeviceMesh, processes: int) -> None:
    """Divide the experts of a model among groups of data-parallel processes, in place.

    Args:
        root: Module that contains the model.
        data: Mesh of all data-parallel processes.
        processes: Processes of a group, P.

    Raises:
        UserError: If the model has no experts, or a number that cannot be divided.
    """
    layers = [layer for layer in root.modules() if isinstance(layer, Experts)]
    if not layers:
        raise UserError(
            f"{SETTING}: the model has no experts (got {processes}, expected 1, or model.overrides.experts)"
        )
    for layer in layers:
        if len(layer.experts) % processes:
            raise UserError(f"{SETTING}: expected a divisor of {len(layer.experts)} experts, got {processes}")
        if layer.router.groups > 1:
            raise UserError(f"{SETTING}: expert_groups share a norm over their experts (got {processes}, expected 1)")
    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise UserError(f"{SETTING}: torch {torch.__version__} cannot shard a part of a module (expected 2.8 or newer)")
    mesh = init_device_mesh(data.device_type, (data.size() // processes, processes), mesh_dim_names=(OWNERS, EXPERTS))
    for layer in layers:
        _shard_layer(layer, mesh)


def _shard_layer(layer: Experts, mesh: DeviceMesh) -> None:
    dispatch = AllToAll(mesh[EXPERTS], len(layer.experts))
    absent: set[nn.Parameter] = set()
    for number, expert in enumerate(layer.experts):
        if (owner := number // dispatch.experts) == mesh.get_local_rank(EXPERTS):
            continue
        # of other processes: torch needs no process group for a mesh without this one
        owners = DeviceMesh(mesh.device_type, mesh.mesh[:, owner], mesh_dim_names=(OWNERS,), _init_backend=False)
        for module in expert.modules():
            for name, old in module._parameters.items():
                if old is not None:
                    new = nn.Parameter(elsewhere(old, owners, old.shape), requires_grad=old.requires_grad)
                    setattr(module, name, new)
                    absent.add(new)
    fully_shard(layer.experts, mesh=mesh[OWNERS], ignored_params=absent)
    layer.dispatch = dispatch


class AllToAll:
    """Apply the experts of all processes of a group to rows by expert; all of them must call it.

    Args:
        mesh: Processes of the group, P.
        experts: Experts of the layer, E.

    Attributes:
        experts: Experts of each process, E / P.
    """

    def __init__(self, mesh: DeviceMesh, experts: int) -> None:
        self.group, self.processes = mesh.get_group(), mesh.size()
        self.experts = experts // self.processes
        self.first = mesh.get_local_rank() * self.experts

    def __call__(self, experts: ExpertList, rows: Tensor, groups: Grouped) -> Tensor:
        """(M, D) -> (M, D)."""
        sizes = groups.sizes.view(self.processes, -1)  # (P, E / P), of this process's rows
        theirs = torch.empty_like(sizes)  # (P, E / P), of each process's rows for the experts here
        dist.all_to_all_single(theirs, sizes, group=self.group)
        sent, received = torch.stack([sizes.sum(dim=1), theirs.sum(dim=1)]).tolist()
        # FSDP averages gradients over the owners of an expert, which receive those of P processes each
        rows = _Exchange.apply(rows, sent, received, self.group, self.processes)  # (R, D), by process
        numbers = torch.arange(self.experts, device=rows.device).repeat(self.processes)
        order = numbers.repeat_interleave(theirs.flatten(), output_size=len(rows)).argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=rows.device))
        out = experts(rows.index_select(0, order), Grouped(theirs.sum(dim=0)), self.first)
        return _Exchange.apply(out.index_select(0, place), received, sent, self.group, 1 / self.processes)


class _Exchange(torch.autograd.Function):
    """All-to-all of rows; the backward pass returns the gradients, times a factor."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: Any, factor: float) -> Tensor:
        ctx.sent, ctx.received, ctx.group, ctx.factor = sent, received, group, factor
        return _exchange(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _exchange(gradient, ctx.received, ctx.sent, ctx.group).mul_(ctx.factor), None, None, None, None


def _exchange(rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    """Send consecutive rows to the processes of a group, and return those received, (sum of received, D)."""
    found = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(found, rows.contiguous(), received, sent, group=group)
    return found
