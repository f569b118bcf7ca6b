"""Expert parallelism: each process has some experts of every layer, and data tokens travel to them and back.

Data-parallel processes form groups of P, in which each process has E / P consecutive experts. Rows sorted by expert are
sent to the processes of their experts by an all-to-all with unequal parts, after one of their numbers, and the outputs
return by a second one; the backward pass sends gradients the opposite ways. Processes with the same experts, one of
each group, shard them with FSDP2, and processes of a tensor-parallel group their parameter tokens. No data token is
dropped. Source: GShard (arXiv 2006.16668); the order of operations is that of torchtitan's ``AllToAllTokenDispatcher``.

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
from torch.distributed.tensor import DTensor

from lit_tokenformer.errors import UserError
from lit_tokenformer.growth.shards import OWNERS, elsewhere
from lit_tokenformer.models.experts import ExpertList, Experts, Grouped

SETTING = "trainer.strategy.expert_parallel_size"
EXPERTS = "expert_parallel"
"""Dimension of the mesh along which experts differ."""


def expert_mesh(root: nn.Module, mesh: DeviceMesh, processes: int) -> DeviceMesh:
    """Create the mesh of the experts of a model: Lightning's, with data-parallel processes in groups.

    Args:
        root: Module that contains the model.
        mesh: Two-dimensional device mesh, data-parallel by tensor-parallel.
        processes: Data-parallel processes of a group, P.

    Returns:
        Three-dimensional device mesh, ``OWNERS`` by ``EXPERTS`` by the tensor-parallel dimension.

    Raises:
        UserError: If the model has no experts, or experts that cannot be divided.
    """
    layers = [layer for layer in root.modules() if isinstance(layer, Experts)]
    if not layers:
        raise UserError(f"{SETTING}: the model has no experts (got {processes}, expected 1)")
    for layer in layers:
        if len(layer.experts) % processes:
            raise UserError(f"{SETTING}: expected a divisor of {len(layer.experts)} experts, got {processes}")
        if layer.router.groups > 1:
            raise UserError(f"{SETTING}: expert_groups share a norm over their experts (got {processes}, expected 1)")
    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise UserError(
            f"{SETTING}: fully_shard of torch {torch.__version__} lacks ignored_params (expected a later one)"
        )
    data, tokens = mesh.mesh.shape
    names = (OWNERS, EXPERTS, (mesh.mesh_dim_names or ())[1])
    return init_device_mesh(mesh.device_type, (data // processes, processes, tokens), mesh_dim_names=names)


def shard_experts(layer: Experts, mesh: DeviceMesh) -> None:
    """Divide the experts of a layer among groups of data-parallel processes, in place.

    Args:
        layer: The layer; its parameter tokens may be sharded over the tensor-parallel dimension of ``mesh``.
        mesh: Result of :func:`expert_mesh`.

    Raises:
        UserError: With tensor parallelism, if an expert has other parameters than tokens.
    """
    names: Any = mesh.mesh_dim_names
    dispatch = AllToAll(mesh[EXPERTS], len(layer.experts))
    if mesh.size(2) > 1 and not all(isinstance(one, DTensor) for one in layer.experts.parameters()):
        raise UserError(f"{SETTING}: expected experts of parameter tokens with tensor_parallel_size {mesh.size(2)}")
    absent: set[nn.Parameter] = set()
    for number, expert in enumerate(layer.experts):
        if (owner := number // dispatch.experts) == mesh.get_local_rank(EXPERTS):
            continue
        # of other processes: torch needs no process group for a mesh without this one
        owners = DeviceMesh(mesh.device_type, mesh.mesh[:, owner], mesh_dim_names=names[::2], _init_backend=False)
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
