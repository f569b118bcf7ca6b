"""Two-dimensional sharding: FSDP2 for all parameters, tensor parallelism for parameter tokens.

Both shard a tensor by rows. Tensor parallelism is applied first: each process of the group holds some of a layer's
parameter tokens, K and V alike, and computes with these alone. :func:`torch.distributed.fsdp.fully_shard` then shards
the local part over the data-parallel processes and gathers it on use.

Pattention in a tensor-parallel group is ``y = GELU(tau s / ||s||) V`` with ``s = x K^T``. Each process has the scores
of its own tokens, so the norm takes one all-reduce of a scalar per data token, and the output one all-reduce.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from lit_tokenformer.distributed.expert_parallel import expert_mesh, shard_experts
from lit_tokenformer.errors import UserError
from lit_tokenformer.growth.shards import gather, local, num_owners, shares, sum_over_experts
from lit_tokenformer.models import Pattention, Tokenformer
from lit_tokenformer.models.experts import Experts

DATA, TOKENS = "data_parallel", "tensor_parallel"
"""Dimensions of Lightning's device mesh."""


def shard(root: nn.Module, mesh: DeviceMesh, forward_methods: tuple[str, ...], expert_parallel: int = 1) -> None:
    """Shard a model over a device mesh in place: block by block, with the remaining parameters at the root.

    Args:
        root: Module that contains the model; methods other than ``forward`` may be called too.
        mesh: Two-dimensional device mesh, ``data_parallel`` by ``tensor_parallel``.
        forward_methods: Methods of ``root`` that compute with its parameters.
        expert_parallel: Data-parallel processes among which the experts of each layer are divided.

    Raises:
        ValueError: If tensor parallelism is requested for a model without parameter tokens, or expert parallelism for
            experts that cannot be divided.
    """
    if isinstance(root, FSDPModule):
        return
    experts = expert_mesh(root, mesh, expert_parallel) if expert_parallel > 1 else mesh
    divided = [layer for layer in root.modules() if isinstance(layer, Experts) and expert_parallel > 1]
    if mesh[TOKENS].size() > 1:
        layers = [layer for layer in root.modules() if isinstance(layer, Pattention)]
        if not layers:
            raise UserError(
                "trainer.strategy.tensor_parallel_size: only parameter tokens can be sharded, and this model has none; "
                "set data_parallel_size to the number of processes, and tensor_parallel_size to 1"
            )
        if any(isinstance(layer, Experts) and layer.router.groups > 1 for layer in root.modules()):
            raise UserError(
                "trainer.strategy.tensor_parallel_size: expert_groups divide the parameter tokens already (expected 1)"
            )
        of_experts = {part for layer in divided for part in layer.experts.modules()}
        for layer in layers:
            _shard_tokens(layer, (experts if layer in of_experts else mesh)[TOKENS])
    for one in divided:
        shard_experts(one, experts)
    blocks = {block for model in root.modules() if isinstance(model, Tokenformer) for block in model.blocks}
    for block in (module for module in root.modules() if module in blocks):  # the same order on every process
        fully_shard(block, mesh=mesh[DATA], reshard_after_forward=True)
    fully_shard(root, mesh=mesh[DATA])
    for method in forward_methods:
        register_fsdp_forward_method(root, method)


def _shard_tokens(layer: Pattention, mesh: DeviceMesh) -> None:
    for part in layer.PARTS:
        old = getattr(layer, part)
        if old is not None:
            rows = shares(len(old), [(mesh.size(), mesh.get_local_rank())])
            local = old.detach()[rows.start : rows.stop].clone()
            whole = DTensor.from_local(local, mesh, [Shard(0)], shape=old.shape, stride=old.stride())
            setattr(layer, part, nn.Parameter(whole, requires_grad=old.requires_grad))


def reshard(root: nn.Module) -> None:
    """Free the parameters that FSDP gathered, so that modules hold the shards that optimizers update."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Clip gradients by their total norm, over tensors with different shardings.

    Args:
        parameters: Parameters whose gradients are clipped; those without a gradient are skipped.
        max_norm: Maximum total norm of all gradients.

    Returns:
        Total norm before clipping, ().
    """
    parameters = list(parameters)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    owners = max(map(num_owners, parameters), default=0)
    by_mesh: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        by_mesh.setdefault(gradient.device_mesh if isinstance(gradient, DTensor) else None, []).append(gradient)
    if not (gradients or owners):
        return torch.zeros(())
    norms, of_experts = [], local(parameters[0]).new_zeros(())
    for group in by_mesh.values():
        norm = gather(torch.nn.utils.get_total_norm(group))
        if num_owners(group[0]):
            of_experts += norm.square()
        else:
            norms.append(norm)
    if owners:
        norms.append(sum_over_experts(of_experts, owners).sqrt())
    norm = torch.linalg.vector_norm(torch.stack(norms))
    for gradient in gradients:
        gradient.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
