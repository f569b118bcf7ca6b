"""Row-sharded tensors (DTensor), and replacement of FSDP2 parameters by larger ones."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from lit_tokenformer.errors import UserError

OWNERS = "expert_owners"
"""Dimension of the mesh of an expert's parameters, if it is not on all processes: those that have this expert."""


def elsewhere(reference: Tensor, owners: DeviceMesh, shape: Sequence[int]) -> DTensor:
    """Build a tensor of an expert that other processes have: shape and dtype, without rows.

    Args:
        reference: Tensor with the dtype and device.
        owners: Mesh of these processes.
        shape: Shape of the whole tensor.
    """
    whole = torch.empty(tuple(shape), device="meta")
    here = torch.empty(0, dtype=reference.dtype, device=owners.device_type)
    return DTensor.from_local(
        here, owners, [Shard(0)] * owners.ndim, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def is_elsewhere(tensor: Tensor) -> bool:
    """Check whether a tensor is of an expert that other processes have."""
    return isinstance(tensor, DTensor) and tensor.device_mesh.get_coordinate() is None


def num_owners(tensor: Tensor) -> int:
    """Return the number of processes that share a tensor of an expert; 0 for any other tensor."""
    divided = isinstance(tensor, DTensor) and OWNERS in (tensor.device_mesh.mesh_dim_names or ())
    return tensor.device_mesh.size() if divided else 0  # type: ignore[attr-defined]


def sum_over_experts(own: Tensor, owners: int) -> Tensor:
    """Sum a value over the experts of all processes, in place; all of them must call this.

    Args:
        own: Sum over the experts of this process.
        owners: Processes with this sum, those that have the same experts.
    """
    torch.distributed.all_reduce(own)
    return own.div_(owners)


def sum_over_model(values: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Sum a value of each tensor over a model; all processes must call this.

    Args:
        values: Number of owners of each tensor, see :func:`num_owners`, and the value of the whole tensor; 0 for
            experts of other processes.
    """
    found = [value for owners, value in values if not owners]
    if owners := max(owners for owners, _ in values):
        own = torch.stack([value for owners, value in values if owners])
        found.append(sum_over_experts(own.sum(dim=0), owners))
    return torch.stack(found).sum(dim=0)


def owned_rows(tensor: Tensor, total: int) -> range:
    """Compute the local rows of a tensor sharded as ``tensor``.

    Args:
        tensor: Reference tensor, replicated or sharded by rows.
        total: Rows of the whole tensor.
    """
    if is_elsewhere(tensor):
        return range(0)
    return shares(total, _divisions(tensor) if isinstance(tensor, DTensor) else [])


def moves_no_rows(tensor: Tensor, before: int, copies: int) -> bool:
    """Check whether copies next to their originals stay on the same process."""
    return isinstance(tensor, DTensor) and before % math.prod(size for size, _ in _divisions(tensor)) == 0


def _divisions(tensor: DTensor) -> list[tuple[int, int]]:
    """List successive divisions of the rows as ``(parts, index of the local part)``."""
    mesh = tensor.device_mesh
    by_rows = [i for i, placement in enumerate(tensor.placements) if getattr(placement, "dim", None) == 0]
    return [(mesh.size(i), mesh.get_local_rank(i)) for i in reversed(by_rows)]  # tensor parallel first


def shares(total: int, divisions: list[tuple[int, int]]) -> range:
    """Compute the local rows under successive divisions, split as ``torch.chunk`` does."""
    rows = range(total)
    for parts, part in divisions:
        share = -(-len(rows) // parts)
        rows = rows[part * share : (part + 1) * share]
    return rows


def local(tensor: Tensor) -> Tensor:
    """Get the local shard of a tensor, detached, in the same memory."""
    if is_elsewhere(tensor):
        return tensor.to_local().detach().view(0, *tensor.shape[1:])  # type: ignore[attr-defined]
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def gather(tensor: Tensor) -> Tensor:
    """Gather the whole tensor on every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(reference: Tensor, local: Tensor) -> Tensor:
    """Build a tensor with the shape and sharding of ``reference``.

    Args:
        reference: Replicated or sharded tensor.
        local: Local shard of the new tensor.
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


class ShardedParameters:
    """FSDP2 parameters below a root module, replaceable by larger ones.

    torch has no public API for this: the parameter is swapped inside its parameter group.

    Args:
        root: Module passed to ``fully_shard``; other modules have no FSDP2 parameters.

    Raises:
        UserError: If the FSDP2 internals of this torch version are not supported.
    """

    def __init__(self, root: nn.Module) -> None:
        self._places: dict[tuple[nn.Module, str], tuple[Any, int]] = {}
        for group in _groups(root):
            for index, kept in enumerate(getattr(group, "fsdp_params", [None])):
                _check_torch(group, kept)
                self._places[kept._module_info.module, kept._module_info.param_name] = group, index

    def replace(self, module: nn.Module, name: str, local: Tensor, shape: tuple[int, ...]) -> nn.Parameter:
        """Replace a parameter by one of another shape.

        Args:
            module: Module that owns the parameter.
            name: Attribute name.
            local: Local rows of the new parameter.
            shape: Shape of the whole new parameter.

        Returns:
            New parameter.
        """
        old = getattr(module, name)
        if is_elsewhere(old):
            new = nn.Parameter(elsewhere(old, old.device_mesh, shape), requires_grad=old.requires_grad)
            setattr(module, name, new)
            return new
        if (module, name) not in self._places:
            new = nn.Parameter(local, requires_grad=old.requires_grad)
            setattr(module, name, new)
            return new
        group, index = self._places[module, name]
        kept = group.fsdp_params[index]
        whole = torch.empty(shape, device="meta", dtype=old.dtype)
        if kept.is_dtensor:  # already sharded by tensor parallel
            tokens = kept._unsharded_dtensor_spec if hasattr(kept, "_unsharded_dtensor_spec") else kept._tp_spec
            share = shares(shape[0], [(tokens.mesh.size(), tokens.mesh.get_local_rank())])
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
        if hasattr(kept, "orig_dtype"):  # set in the first forward pass
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
        f"trainer.strategy: a model cannot grow under FSDP2 in torch {torch.__version__} ({difference}); use 'ddp', or "
        "remove the growth callback and grow a checkpoint between two runs with `lit-tokenformer grow`"
    )


def _groups(root: nn.Module) -> Iterator[Any]:
    for module in root.modules():
        if isinstance(module, FSDPModule):
            if not hasattr(module, "_get_fsdp_state"):
                raise _unknown_torch("no _get_fsdp_state")
            state: Any = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None)  # older torch: one group, None without parameters
            yield from (one for one in ([state._fsdp_param_group] if groups is None else groups) if one is not None)
