"""Exports to inference engines: ONNX, torch.export and AOTInductor.

Each is one entry of ``ENGINES``: a function that writes a traced graph, and one that loads it. After an export the
engine runs the file once, at other sizes than traced, and the outputs are compared with the model's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_tokenformer.errors import UserError
from lit_tokenformer.interop.graphs import Graph, make_graph
from lit_tokenformer.interop.weight_format import CONFIG_FILE, cast, check_export, read_json, write_json
from lit_tokenformer.models import Tokenformer
from lit_tokenformer.models.hub import describe
from lit_tokenformer.registry import ENGINES

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest accepted difference of an output of an engine, relative to the largest value, by precision of the model."""

_FILE_LIMIT = 2**31 - 2**20
"""Bytes of weights that fit in one ONNX file (protobuf's limit)."""

Run = Callable[..., list[Tensor]]
"""Loaded export: inputs in the order of ``config.json`` -> outputs in its order."""


class Engine(NamedTuple):
    """Inference engine.

    Args:
        write: ``(folder, graph)``: traces the graph and writes the file of the engine.
        load: ``(folder, names of the outputs) -> run``: loads it on a CPU.
    """

    write: Callable[[Path, Graph], Any]
    load: Callable[[Path, list[str]], Run]


def export_engine(
    folder: str | os.PathLike[str],
    model: Tokenformer,
    format: str,
    dtype: str | None = None,
    cache: bool | None = None,
) -> float:
    """Export a model for an inference engine, with a ``config.json`` that lists inputs and outputs.

    Args:
        folder: Empty output folder.
        model: Model of any size, on a CPU; left in evaluation mode.
        format: Name in ``ENGINES``.
        dtype: Precision of the parameters, converted in place: float32, float16 or bfloat16; ``None`` for the model's.
        cache: See :func:`~lit_tokenformer.interop.graphs.make_graph`.

    Returns:
        Largest difference between an output of the engine and the model's, relative to the largest value.

    Raises:
        UserError: If the model, the precision or the cache is unsupported, a package or a compiler is missing, or the
            outputs of the engine differ.
    """
    engine: Engine = ENGINES[format]
    if (experts := model.size.get("experts", 1)) > 1:
        raise UserError(f"format: a graph has no experts, which compute other data tokens in each call (got {experts})")
    check_export("safetensors", dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        parameter.data = cast(parameter.data, name, dtype)
    graph = make_graph(model, cache)
    engine.write(Path(folder), graph)
    kinds = [str(one.dtype).removeprefix("torch.") for one in graph.example(1, 1, 1)]
    inputs = {
        name: {"shape": list(shape), "dtype": kind}
        for (name, shape), kind in zip(graph.inputs.items(), kinds, strict=True)
    }
    about = {"format": format, **describe(model.config, model.size), "inputs": inputs, "outputs": graph.outputs}
    write_json(Path(folder) / CONFIG_FILE, about)
    return _check(load_engine(folder), graph, format)


def load_engine(folder: str | os.PathLike[str]) -> Run:
    """Load an export on a CPU.

    Args:
        folder: Folder of an export to one of ``ENGINES``.

    Returns:
        Function of the inputs in the order of ``config.json``; returns the list of outputs.

    Raises:
        UserError: If the folder is not such an export, or a package is missing.
    """
    settings = read_json(Path(folder) / CONFIG_FILE)
    engine: Engine = ENGINES[str(settings.get("format"))]
    return engine.load(Path(folder), settings["outputs"])


def _check(run: Run, graph: Graph, format: str) -> float:
    """Compare the outputs of the engine with the model's at two sizes that were not traced."""
    worst = 0.0
    for sizes in ((3, 2, 5), (1, 1, 1)):
        inputs = graph.example(*sizes)
        with torch.no_grad():
            expected = graph(*inputs)
        for name, ours, theirs in zip(graph.outputs, expected, run(*inputs), strict=True):
            worst = max(worst, _difference(ours, theirs, name))
    dtype = next(graph.model.parameters()).dtype
    limit = TOLERANCE.get(dtype, 1e-4)
    if not worst <= limit:
        problem = f"the outputs of {format!r} differ from the model's"
        raise UserError(f"format: {problem} (got a relative difference of {worst:.1e}, expected at most {limit:.0e})")
    return worst


def _difference(ours: Tensor, theirs: Tensor, name: str) -> float:
    if ours.shape != theirs.shape:
        raise UserError(f"format: {name} has shape {tuple(theirs.shape)} (expected {tuple(ours.shape)})")
    ours, theirs = ours.double(), theirs.double()
    return float((ours - theirs).abs().max() / ours.abs().max().clamp_min(1e-6))


def _onnx() -> Any:
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        problem = "missing package (pip install 'lit-tokenformer[onnx]')"
        raise UserError(f"format: 'onnx': {problem}: {error}") from None
    return onnxruntime


def _write_onnx(folder: Path, graph: Graph) -> None:
    _onnx()
    program = graph.trace()
    built: Any = torch.onnx.export(
        program, dynamo=True, input_names=list(graph.inputs), output_names=graph.outputs, verbose=False
    )
    values = [node.meta["val"] for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    names = {
        str(size): axis
        for value, shape in zip(values, graph.inputs.values(), strict=True)
        for size, axis in zip(value.shape, shape, strict=True)
        if isinstance(axis, str)
    }
    if hasattr(built, "rename_axes"):  # not in the oldest supported torch, whose axes have other names
        built.rename_axes(names)
    size = sum(one.nbytes for one in program.state_dict.values())
    built.save(folder / "model.onnx", external_data=size > _FILE_LIMIT)


def _load_onnx(folder: Path, outputs: list[str]) -> Run:
    runtime = _onnx()
    try:
        session = runtime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    except Exception as error:  # of a class of the runtime
        reason = str(error).splitlines()[0]
        raise UserError(f"format: onnxruntime cannot load the model on a CPU ({reason})") from None
    names = [one.name for one in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        found = session.run(outputs, {name: one.numpy() for name, one in zip(names, inputs, strict=True)})
        return [torch.from_numpy(one) for one in found]

    return run


def _write_program(folder: Path, graph: Graph) -> None:
    torch.export.save(graph.trace(), folder / "model.pt2")


def _load_program(folder: Path, outputs: list[str]) -> Run:
    module = torch.export.load(folder / "model.pt2").module()
    return lambda *inputs: list(module(*inputs))


def _write_package(folder: Path, graph: Graph) -> None:
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        aoti_compile_and_package(graph.trace(), package_path=str(folder / "model.pt2"))
    except InvalidCxxCompiler as error:
        raise UserError(f"format: 'aoti' needs a C++ compiler ({str(error).splitlines()[0]})") from None


def _load_package(folder: Path, outputs: list[str]) -> Run:
    from torch._inductor import aoti_load_package

    package = aoti_load_package(str(folder / "model.pt2"))
    return lambda *inputs: list(package(*(one.contiguous() for one in inputs)))  # it reads the strides of the trace


ENGINES.register("onnx")(Engine(_write_onnx, _load_onnx))
ENGINES.register("torch_export")(Engine(_write_program, _load_program))
ENGINES.register("aoti")(Engine(_write_package, _load_package))
