"""Linear form of Pattention: both halves of a layer as ``nn.Linear``, in memory and back.

Tools that look for ``nn.Linear`` (PEFT's ``all-linear``, torchao, bitsandbytes, float8 training) find no layer in a
model of parameter tokens. In the linear form, a layer is ``keys`` (N, D_in), the score normalization, and ``values``
(D_out, N), which is a transposed view of the value tokens: no memory is copied, and the products are the same.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from lit_tokenformer.errors import UserError
from lit_tokenformer.models.axes import Axis, AxisTensor
from lit_tokenformer.models.pattention import SCORE_NORMS, Pattention
from lit_tokenformer.models.pattention_kernels import is_one_row, l2_gelu, one_row_weights

Model = TypeVar("Model", bound=nn.Module)


class LinearHalves:
    """Pattention whose key and value tokens are the weights of two ``nn.Linear``.

    Attributes:
        keys: Keys K, ``nn.Linear`` with a weight (N, D_in).
        values: Values V, ``nn.Linear`` with a weight (D_out, N).
    """

    keys: Any
    values: Any

    @property
    def key_tokens(self) -> Tensor:
        """Key parameter tokens, (N, D_in)."""
        return self.keys.weight

    @property
    def value_tokens(self) -> Tensor:
        """Value parameter tokens, (N, D_out), a view."""
        return self.values.weight.T

    def axes(self) -> list[Axis]:
        """Declare the axis of parameter tokens."""
        (axis,) = super().axes()  # type: ignore[misc]
        return [replace(axis, tensors=tuple(map(_linear_tensor, axis.tensors)))]

    def output_units(self, name: str) -> list[AxisTensor]:
        """Declare the tensor indexed by output: the rows of the values' weight."""
        return [_linear_tensor(tensor) for tensor in super().output_units(name)]  # type: ignore[misc]

    def input_units(self, name: str) -> list[AxisTensor]:
        """Declare the tensor indexed by input: the columns of the keys' weight."""
        return [_linear_tensor(tensor) for tensor in super().input_units(name)]  # type: ignore[misc]

    def outputs(self) -> list[nn.Parameter]:
        """Parameters that scale the output: the values' weight."""
        return [one.values.weight for one in (self, *(self.groups or {}).values())]  # type: ignore[attr-defined]

    def attend(self, x: Tensor) -> Tensor:
        """Attend to the layer's own tokens, (..., D_in) -> (..., D_out)."""
        norm = SCORE_NORMS[self.score_norm]  # type: ignore[attr-defined]
        if norm.whole is l2_gelu and self.activation is F.gelu and is_one_row(x):  # type: ignore[attr-defined]
            return self.values(one_row_weights(self.keys(x), self.tau))  # type: ignore[attr-defined]
        return self.values(norm.function(self.keys(x), self.tau, self.activation))  # type: ignore[attr-defined]


def _linear_tensor(tensor: AxisTensor) -> AxisTensor:
    """Declare a tensor of Pattention under its name in the linear form."""
    name, dim = tensor.name, tensor.dim
    if name.endswith("key_tokens"):
        return replace(tensor, name=name.removesuffix("key_tokens") + "keys.weight")
    if name.endswith("value_tokens"):
        return replace(tensor, name=name.removesuffix("value_tokens") + "values.weight", dim=1 - dim)
    return tensor


@cache
def _linear_class(kind: type[Pattention]) -> type[Pattention]:
    return type(f"Linear{kind.__name__}", (LinearHalves, kind), {"__module__": kind.__module__})


def as_linear(model: Model) -> Model:
    """Convert every Pattention layer of a model to its linear form, in place.

    The outputs do not change. Growth, decoding and state dicts work as before, under the names ``keys.weight`` and
    ``values.weight``; a state dict of another depth needs the original form. Convert before the optimizer is created:
    the values are new parameters.

    Args:
        model: Any module; one without Pattention layers is unchanged.

    Returns:
        ``model``.

    Raises:
        UserError: If tokens are sharded, quantized or adapted. The model is unchanged then.

    Example:
        >>> import torch
        >>> layer, x = Pattention(2, 3, num_tokens=4), torch.ones(1, 2)
        >>> before = layer(x)
        >>> [name for name, module in as_linear(layer).named_modules() if isinstance(module, nn.Linear)]
        ['keys', 'values']
        >>> torch.allclose(layer(x), before), sorted(as_pattention(layer).state_dict())
        (True, ['key_tokens', 'tau', 'value_tokens'])
    """
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, Pattention) and not isinstance(m, LinearHalves)]
    for name, layer in layers:
        for part in ("key_tokens", "value_tokens"):
            _check_plain("as_linear", f"{name}.{part}".lstrip("."), layer._parameters.get(part))
    for _, layer in layers:
        parameters: dict[str, Any] = layer._parameters
        keys, values = parameters.pop("key_tokens"), parameters.pop("value_tokens")
        layer.__class__ = _linear_class(type(layer))  # type: ignore[arg-type]
        layer.keys = _linear(keys)
        layer.values = _linear(nn.Parameter(values.data.T, values.requires_grad))
    return model


def as_pattention(model: Model) -> Model:
    """Convert the linear form back to parameter tokens, in place; the inverse of :func:`as_linear`, to the bit.

    Args:
        model: Any module; one without the linear form is unchanged.

    Returns:
        ``model``.

    Raises:
        UserError: If a half is sharded, quantized or adapted. The model is unchanged then.
    """
    layers: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if isinstance(m, LinearHalves)]
    for name, layer in layers:
        for half in ("keys", "values"):
            linear = getattr(layer, half)
            where = f"{name}.{half}".lstrip(".")
            if type(linear) is not nn.Linear or linear.bias is not None:
                raise UserError(f"as_pattention: {where}: unsupported layer (got {linear}, expected a plain nn.Linear)")
            _check_plain("as_pattention", f"{where}.weight", linear.weight)
    for _, layer in layers:
        keys, values = layer._modules.pop("keys").weight, layer._modules.pop("values").weight
        layer.__class__ = type(layer).__mro__[2]
        parts = {"key_tokens": keys, "value_tokens": nn.Parameter(values.data.T.contiguous(), values.requires_grad)}
        layer._parameters = {**parts, **layer._parameters}
    return model


def _linear(weight: nn.Parameter) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = weight
    return linear


def _check_plain(function: str, name: str, weight: Any) -> None:
    if not isinstance(weight, nn.Parameter) or type(weight.data) is not Tensor or not weight.is_floating_point():
        kind = type(getattr(weight, "data", weight)).__name__
        raise UserError(f"{function}: {name}: unsupported tensor (got {kind}, expected a floating-point parameter)")
