"""Products of a single row in compiled decoding steps on CPUs: one pass over the weight, at the speed of the memory.

The matrix products of BLAS libraries reach about half of the memory bandwidth for one row. A sum over each row of the
weight, which Inductor turns into a vectorized loop, reads it once and converts it on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lit_tokenformer.models.pattention import Pattention


def row_product(x: Tensor, weight: Tensor) -> Tensor:
    """(1, D_in), (D_in, D_out) -> (1, D_out), accumulated in float32 or wider; fast where compiled for a CPU."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (weight.t().to(wide) * x.to(wide)).sum(dim=-1).to(x.dtype)[None]


def store_by_rows(model: nn.Module) -> None:
    """Store the weights of a model so that each output is a sum over contiguous numbers: value tokens by columns."""
    for layer in model.modules():
        if isinstance(layer, Pattention) and "value_tokens" in layer._parameters:
            layer.value_tokens.data = layer.value_tokens.data.t().contiguous().t()
        elif isinstance(layer, nn.Linear) and type(layer.weight.data) is Tensor:  # quantized ones are stored so
            layer.weight.data = layer.weight.data.contiguous()


def cpu_options() -> dict[str, Any]:
    """Build the options of Inductor for a decoding step on a CPU."""
    options: dict[str, Any] = {
        "post_grad_custom_pre_pass": _replace_products(),
        # compute the row once, not again for each output
        "realize_opcount_threshold": 0,
        "realize_reads_threshold": 0,
    }
    if hasattr(torch.compiler, "skip_guard_on_all_nn_modules_unsafe"):  # torch >= 2.8
        options["guard_filter_fn"] = _guards
    return options


def _guards(entries: Sequence[Any]) -> list[bool]:
    """Keep the guards that notice a growth, and those outside the model; checking all of them takes milliseconds."""
    sources = [one.orig_guard.source for one in entries]
    return [
        one.guard_type == "TENSOR_MATCH" or not source.is_unspecialized_nn_module()
        for one, source in zip(entries, sources, strict=True)
    ]


@cache
def _replace_products() -> Any:
    """Create a pass of Inductor that replaces products of one row with a weight whose rows are contiguous."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
    from torch._inductor.pattern_matcher import Arg, CallFunction, PatternMatcherPass, register_graph_pattern

    patterns, aten = PatternMatcherPass(), torch.ops.aten

    def is_row(match: Any) -> bool:
        x, weight = (node.meta["val"] for node in match.args[-2:])  # (1, D_in), (D_in, D_out)
        return bool(x.device.type == "cpu" and x.is_floating_point() and x.shape[0] == 1 and weight.stride(0) == 1)

    @register_graph_pattern(CallFunction(aten.mm.default, Arg(), Arg()), extra_check=is_row, pass_dict=patterns)
    def _mm(match: Any, x: Any, weight: Any) -> None:
        match.replace_by_example(row_product, [x, weight])

    @register_graph_pattern(
        CallFunction(aten.addmm.default, Arg(), Arg(), Arg()), extra_check=is_row, pass_dict=patterns
    )
    def _addmm(match: Any, bias: Any, x: Any, weight: Any) -> None:
        match.replace_by_example(lambda bias, x, weight: row_product(x, weight) + bias, [bias, x, weight])

    class RowProducts(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            patterns.apply(graph)

        def uuid(self) -> Any:  # key in the cache of compiled graphs
            return get_hash_for_files((__file__,))

    return RowProducts()
