"""Products with quantized weights on CPUs, by kernels of torch that torchao 0.18 does not call.

torchao converts an int8 weight to the dtype of the activations for every product, and has no int4 weight for CPUs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.utils import TorchAOBaseTensor

from lit_tokenformer.inference.row_products import row_product

_FEW_ROWS = 12
"""Rows from which converting an int8 weight once is faster than the kernel, which reads it for each row."""

GROUPS = (64, 32)
"""Weights that share a scale and a zero point in int4; the first that divides a row counts."""


class Int8Linear(nn.Linear):
    """Linear layer with an int8 weight of torchao, one scale per row."""

    weight: Any  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """(..., D_in) -> (..., D_out)."""
        weight, size = self.weight, x.shape[-1]
        fast = x.device.type == "cpu" and 0 < x.numel() <= _FEW_ROWS * size and not torch.is_autocast_enabled("cpu")
        scale = weight.scale.flatten().to(x.dtype)
        if fast and not torch.compiler.is_compiling():
            out = torch._weight_int8pack_mm(x.reshape(-1, size), weight.qdata, scale)
        elif fast and x.numel() == size:
            out = row_product(x.reshape(1, size), weight.qdata.t()) * scale
        else:  # Inductor finds the kernel itself
            return super().forward(x)
        out = out.view(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias


class Int4Tensor(TorchAOBaseTensor):
    """Int4 weight (D_out, D_in) for CPUs: ``(q - 8) * scale + zero`` with q of 0 to 15, per group of inputs.

    Args:
        qdata: Packed q, of torch's kernel.
        scale_and_zero: Scales and zeros, (D_in / group, D_out, 2) bfloat16.
        group: Weights of a row that share a scale and a zero.
        shape: Shape of the weight.
        dtype: Dtype of the weight before.
    """

    tensor_data_names = ["qdata", "scale_and_zero"]
    tensor_attribute_names = ["group", "shape", "dtype"]

    def __new__(cls, qdata: Tensor, scale_and_zero: Tensor, group: int, shape: Any, dtype: torch.dtype) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, shape, device=qdata.device, dtype=dtype, requires_grad=False)

    def __init__(self, qdata: Tensor, scale_and_zero: Tensor, group: int, shape: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.qdata, self.scale_and_zero, self.group = qdata, scale_and_zero, group

    @classmethod
    def of(cls, weight: Tensor, group: int) -> Int4Tensor:
        """Quantize a weight (D_out, D_in): the extremes of a group are 0 and 15."""
        groups = weight.float().unflatten(1, (-1, group))  # (D_out, D_in / group, group)
        low, high = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
        scale = ((high - low) / 15).clamp_min(1e-8).bfloat16().float()
        zero = (low + 8 * scale).bfloat16().float()
        values = ((groups - zero) / scale + 8).round().clamp(0, 15).int().flatten(1)
        qdata = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)
        pairs = torch.cat([scale, zero], dim=-1).transpose(0, 1).bfloat16().contiguous()
        return cls(qdata, pairs, group, weight.shape, weight.dtype)


@Int4Tensor.implements([torch.ops.aten.linear.default])
@Int4Tensor.implements_torch_function([F.linear])
def _int4_linear(function: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    """Compute a linear layer in bfloat16, (..., D_in) -> (..., D_out)."""
    x, weight, *more = args
    bias = more[0] if more else kwargs.get("bias")
    rows = x.reshape(-1, x.shape[-1]).bfloat16().contiguous()
    out = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, weight.qdata, weight.group, weight.scale_and_zero)
    out = out.to(x.dtype).view(*x.shape[:-1], -1)
    return out if bias is None else out + bias
