"""A model that is divided among processes: FSDP2 for every parameter, a tensor-parallel group for parameter tokens.

Both divide a tensor by its rows. A tensor-parallel group comes first: each of its processes holds some of a layer's
parameter tokens, K and V alike, and computes with these alone; what is left of a parameter is divided among the
data-parallel processes by :func:`torch.distributed.fsdp.fully_shard`, which brings it together where it is needed.

Pattention in a tensor-parallel group (``y = GELU(tau s / ||s||) V`` with ``s = x K^T``): each process has the scores
of its own tokens, so the norm takes one all-reduce of a number for each data token, and the output one sum.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard

from lit_tokenformer.errors import UserError
from lit_tokenformer.models import Pattention, Tokenformer

DATA, TOKENS = "data_parallel", "tensor_parallel"
"""The dimensions of Lightning's mesh."""


def divide(root: nn.Module, mesh: DeviceMesh, forward_methods: tuple[str, ...]) -> None:
    """Divides a model among the processes of a mesh, in place: block by block, and what is no block at the root.

    Args:
        root: What holds the model; it may be called by other methods than ``forward``.
        mesh: Two-dimensional, ``data_parallel`` by ``tensor_parallel``.
        forward_methods: Methods of ``root`` that compute with its parameters.

    Raises:
        ValueError: If there is a tensor-parallel group, and no parameter tokens to divide.
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
            _divide_tokens(layer, mesh[TOKENS])
    blocks = {block for model in root.modules() if isinstance(model, Tokenformer) for block in model.blocks}
    for block in (module for module in root.modules() if module in blocks):  # in the model's order on every process
        fully_shard(block, mesh=mesh[DATA], reshard_after_forward=True)
    fully_shard(root, mesh=mesh[DATA])
    for method in forward_methods:
        register_fsdp_forward_method(root, method)


def _divide_tokens(layer: Pattention, mesh: DeviceMesh) -> None:
    for part in layer.PARTS:
        old = getattr(layer, part)
        if old is not None:
            rows = _shares(len(old), [(mesh.size(), mesh.get_local_rank())])
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


def owned_rows(tensor: Tensor, total: int) -> range:
    """The rows that this process would hold of a tensor that is divided as ``tensor`` is.

    Args:
        tensor: Whole, or divided by rows.
        total: Rows of the whole.
    """
    return _shares(total, _divisions(tensor) if isinstance(tensor, DTensor) else [])


def moves_no_rows(tensor: Tensor, before: int, copies: int) -> bool:
    """Whether copies that lie beside their originals stay in the processes where these are."""
    return isinstance(tensor, DTensor) and before % math.prod(size for size, _ in _divisions(tensor)) == 0


def _divisions(tensor: DTensor) -> list[tuple[int, int]]:
    """Into how many parts rows are divided, one division after the other, and which part is this process's."""
    mesh = tensor.device_mesh
    by_rows = [i for i, placement in enumerate(tensor.placements) if getattr(placement, "dim", None) == 0]
    return [(mesh.size(i), mesh.get_local_rank(i)) for i in reversed(by_rows)]  # the tensor-parallel one first


def _shares(total: int, divisions: list[tuple[int, int]]) -> range:
    """As ``torch.chunk`` divides: all parts but the last ones are of equal size."""
    rows = range(total)
    for parts, part in divisions:
        share = -(-len(rows) // parts)
        rows = rows[part * share : (part + 1) * share]
    return rows


def local(tensor: Tensor) -> Tensor:
    """Get what this process holds of a tensor, without gradient, in the same memory."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def gather(tensor: Tensor) -> Tensor:
    """The whole tensor, on every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(reference: Tensor, local: Tensor) -> Tensor:
    """A tensor of the shape of ``reference``, divided as it is.

    Args:
        reference: Whole or divided.
        local: What this process holds of the new tensor.
    """
    if not isinstance(reference, DTensor):
        return local
    return DTensor.from_local(
        local,
        reference.device_mesh,
        reference.placements,
        run_check=False,
        shape=reference.shape,
        stride=reference.stride(),
    )


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


class ShardedParameters:
    """The parameters that FSDP2 keeps for the modules below a root, each of which can be replaced by a larger one.

    torch has no public way to do this: a parameter is taken out of its group, and one of the new size put in its place.

    Args:
        root: A module that was given to ``fully_shard``; of any other, nothing is found.

    Raises:
        UserError: If this torch keeps them in another way than the one this was written for.
    """

    def __init__(self, root: nn.Module) -> None:
        self._places: dict[tuple[nn.Module, str], tuple[Any, int]] = {}
        for group in _groups(root):
            for index, kept in enumerate(getattr(group, "fsdp_params", [None])):
                _check_torch(group, kept)
                self._places[kept._module_info.module, kept._module_info.param_name] = group, index

    def replace(self, module: nn.Module, name: str, local: Tensor, total: int) -> nn.Parameter:
        """Puts a parameter with another number of rows in the place of one.

        Args:
            module: What holds it.
            name: Its name there.
            local: The rows of the new one that this process holds.
            total: Rows of the new one.

        Returns:
            The new parameter.
        """
        old = getattr(module, name)
        if (module, name) not in self._places:
            new = nn.Parameter(local, requires_grad=old.requires_grad)
            setattr(module, name, new)
            return new
        group, index = self._places[module, name]
        kept = group.fsdp_params[index]
        whole = torch.empty((total, *old.shape[1:]), device="meta", dtype=old.dtype)
        if kept.is_dtensor:  # divided by tokens before FSDP came
            tokens = kept._unsharded_dtensor_spec if hasattr(kept, "_unsharded_dtensor_spec") else kept._tp_spec
            share = _shares(total, [(tokens.mesh.size(), tokens.mesh.get_local_rank())])
            part = whole[share.start : share.stop]
            whole = DTensor.from_local(part, tokens.mesh, tokens.placements, shape=whole.shape, stride=whole.stride())
        place = kept.fsdp_placement
        made = type(kept)(
            nn.Parameter(whole, requires_grad=old.requires_grad),
            kept._module_info,
            kept.mesh_info,
            group.post_forward_mesh_info,
            group.device,
            lambda _: place,
            group.mp_policy,
            group.offload_policy,
        )
        new = nn.Parameter(made.to_sharded_dtensor(local), requires_grad=old.requires_grad)
        made._setattr_on_modules(new)
        made.reset_sharded_param()
        made._param_fqn = kept._param_fqn
        if hasattr(kept, "orig_dtype"):  # set when the group was first used
            made.init_dtype_attrs(group.mp_policy)
        kept._post_load_hook_handle.remove()
        group.fsdp_params[index] = made
        return getattr(module, name)


_GROUP = ("fsdp_params", "post_forward_mesh_info", "device", "mp_policy", "offload_policy")
_KEPT = (
    *("_module_info", "mesh_info", "is_dtensor", "fsdp_placement", "_param_fqn", "_post_load_hook_handle"),
    *("to_sharded_dtensor", "_setattr_on_modules", "reset_sharded_param", "init_dtype_attrs"),
)
_MADE_OF = (
    *("self", "param", "module_info", "mesh_info", "post_forward_mesh_info", "device", "shard_placement_fn"),
    *("mp_policy", "offload_policy"),
)


def _check_torch(group: Any, kept: Any) -> None:
    missing = [name for owner, names in ((group, _GROUP), (kept, _KEPT)) for name in names if not hasattr(owner, name)]
    if missing:
        raise _unknown_torch(f"no {', '.join(missing)}")
    made_of = tuple(inspect.signature(type(kept).__init__).parameters)
    if made_of != _MADE_OF:
        raise _unknown_torch(f"{type(kept).__name__} takes {', '.join(made_of[1:])}")


def _unknown_torch(difference: str) -> UserError:
    return UserError(
        f"trainer.strategy: a model cannot grow under FSDP2 in torch {torch.__version__} ({difference}); leave the "
        "growth callback out and grow a checkpoint between two runs with `lit-tokenformer grow`, or use 'ddp'"
    )


def _groups(root: nn.Module) -> Iterator[Any]:
    for module in root.modules():
        if isinstance(module, FSDPModule):
            if not hasattr(module, "_get_fsdp_state"):
                raise _unknown_torch("no _get_fsdp_state")
            state: Any = module._get_fsdp_state()
            groups = getattr(
                state, "_fsdp_param_groups", None
            )  # older torch has one, or None where there are no parameters
            yield from (one for one in ([state._fsdp_param_group] if groups is None else groups) if one is not None)
