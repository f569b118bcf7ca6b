"""A model that is divided among processes: FSDP2 for every parameter, a tensor-parallel group for parameter tokens.

Both divide a tensor by its rows. A tensor-parallel group comes first: each of its processes holds some of a layer's
parameter tokens, K and V alike, and computes with these alone; what is left of a parameter is divided among the
data-parallel processes by :func:`torch.distributed.fsdp.fully_shard`, which brings it together where it is needed.

Pattention in a tensor-parallel group (``y = GELU(tau s / ||s||) V`` with ``s = x K^T``): each process has the scores
of its own tokens, so the norm takes one all-reduce of a number for each data token, and the output one sum.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard

from lit_tokenformer.errors import UserError
from lit_tokenformer.growth.shards import gather, shares
from lit_tokenformer.models import Pattention, Tokenformer

DATA, TOKENS = "data_parallel", "tensor_parallel"
"""The dimensions of Lightning's mesh."""


def shard(root: nn.Module, mesh: DeviceMesh, forward_methods: tuple[str, ...]) -> None:
    """Shard a model over a device mesh, in place: block by block, and the remaining parameters at the root.

    Args:
        root: What holds the model; it may be called by other methods than ``forward``.
        mesh: Two-dimensional, ``data_parallel`` by ``tensor_parallel``.
        forward_methods: Methods of ``root`` that compute with its parameters.

    Raises:
        ValueError: If there is a tensor-parallel group, and no parameter tokens to shard.
    """
    if isinstance(root, FSDPModule):
        return
    if mesh[TOKENS].size() > 1:
        layers = [layer for layer in root.modules() if isinstance(layer, Pattention)]
        if not layers:
            raise UserError(
                "trainer.strategy.tensor_parallel_size: only parameter tokens can be divided, and this model has none; "
                "set data_parallel_size to the number of processes, and tensor_parallel_size to 1"
            )
        for layer in layers:
            _shard_tokens(layer, mesh[TOKENS])
    blocks = {block for model in root.modules() if isinstance(model, Tokenformer) for block in model.blocks}
    for block in (module for module in root.modules() if module in blocks):  # in the model's order on every process
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

    def take(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False), *inputs[1:])

    def give(_: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        assert isinstance(output, DTensor)
        return output.redistribute(placements=[Replicate()]).to_local()

    layer.register_forward_pre_hook(take)
    layer.register_forward_hook(give)


def reshard(root: nn.Module) -> None:
    """Frees what FSDP brought together, so that modules hold the parameters that optimizers hold."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales gradients down to a norm, over tensors that are divided in several ways.

    Args:
        parameters: Their gradients may be ``None``.
        max_norm: The largest norm of all gradients together that is left as it is.

    Returns:
        That norm before, ().
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    by_mesh: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        by_mesh.setdefault(gradient.device_mesh if isinstance(gradient, DTensor) else None, []).append(gradient)
    if not gradients:
        return torch.zeros(())
    norms = [gather(torch.nn.utils.get_total_norm(group)) for group in by_mesh.values()]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    for gradient in gradients:
        gradient.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
