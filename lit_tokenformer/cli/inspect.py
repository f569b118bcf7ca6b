"""``inspect`` and ``prune``: report on the parameter tokens of a checkpoint, and remove those that are dead."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lit_tokenformer.adapters import load_adapter, set_adapter
from lit_tokenformer.atomic_io import atomic_folder
from lit_tokenformer.checkpoints.load import read_checkpoint, state_errors, write_checkpoint
from lit_tokenformer.cli.checkpoint_data import evaluation_batches
from lit_tokenformer.cli.commands import describe_size
from lit_tokenformer.cli.generate import AdapterChoice
from lit_tokenformer.errors import UserError
from lit_tokenformer.growth.rows import record_kept
from lit_tokenformer.inference.text import find_device
from lit_tokenformer.inspection import find_dead, prune, token_report
from lit_tokenformer.inspection.record import token_layers
from lit_tokenformer.inspection.report import PAGE, Source, write_report
from lit_tokenformer.tasks.rebuild import change_checkpoint, rebuild_task


def inspect_checkpoint(
    ckpt_path: str,
    output: str,
    top: int = 20,
    ablate: int = 32,
    batches: int = 2,
    data: dict[str, Any] | None = None,
    earlier: str | None = None,
    adapter: list[str] | None = None,
    device: str = "auto",
) -> Path:
    """Report on the parameter tokens of a checkpoint: use, importance, origin, contexts, dead tokens.

    The report contains text or images of the validation data. The weights are the moving average where the fit has one.

    Args:
        ckpt_path: Path to a checkpoint of a fit of a causal or masked language model or an image classifier.
        output: New or empty folder for index.html, which needs no other file, and tokens.csv.
        top: Number of tokens per layer, the most important ones, with contexts and written outputs.
        ablate: Number of the most important tokens, and of the least influential ones, whose removal is measured.
        batches: Batches of about 2,048 data tokens, evenly spaced over the validation split.
        data: Settings of the data module that replace those of the fit, such as --data.dataset python_docs.
        earlier: Earlier checkpoint of the fit, to measure the movement of tokens from; defaults to the best checkpoint
            of the size before the last growth, if the fit has one.
        adapter: Adapter, NAME=FOLDER or FOLDER, whose groups of tokens are reported apart.
        device: Device of the model, such as "cpu" or "cuda:0"; "auto" selects the accelerator if available.

    Returns:
        Path of the page.

    Raises:
        UserError: If the checkpoint cannot be used or has no parameter tokens, if the data cannot be read, for numbers
            out of range, or if the output is not empty.
    """
    target = Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"output: {target} exists already and is not an empty folder")
    for setting, number, least in (("top", top, 0), ("ablate", ablate, 0), ("batches", batches, 1)):
        if number < least:
            raise UserError(f"{setting}: expected a whole number of at least {least}, got {number}")
    checkpoint = read_checkpoint(ckpt_path, optimizers=False)
    task = rebuild_task(ckpt_path, checkpoint)
    _check_tokens(task, ckpt_path)
    task.to(find_device(device))
    _select_adapter(task, adapter)
    found, dataset = evaluation_batches(task, checkpoint, data, batches)
    events = _events(checkpoint)
    state, growths, name = _earlier(checkpoint, earlier, len(events))
    report = token_report(task, found, top, ablate, events=events, earlier=state, earlier_growths=growths)
    source = Source(Path(ckpt_path).name, _facts(task, checkpoint, dataset), _stages(checkpoint), name)
    try:
        with atomic_folder(target) as folder:
            write_report(folder, report, source, top)
    except OSError as error:
        raise UserError(f"output: cannot write {target} ({error.strerror or error})") from None
    total, dead = sum(map(len, report.layers)), sum(len(layer.dead) for layer in report.layers)
    measured = sum(len(layer.removals) for layer in report.layers)
    print(f"{target / PAGE}: {total:,} parameter tokens, {dead} dead of {measured} measured")
    return target / PAGE


def prune_checkpoint(
    ckpt_path: str,
    output: str | None = None,
    tolerance: float = 1e-4,
    batches: int = 4,
    data: dict[str, Any] | None = None,
) -> Path:
    """Remove the dead parameter tokens of a checkpoint: those whose joint removal changes the loss by less than 1e-4.

    Weights, moving average and optimizer state lose the same rows. Layers may differ in size afterwards; the result
    works with all commands that load a checkpoint. A fit whose growth schedule has larger totals grows back to them.

    Args:
        ckpt_path: Path to a checkpoint of a fit of a causal or masked language model or an image classifier.
        output: Path of the pruned checkpoint; defaults to CKPT_PATH with "-pruned" appended to its stem.
        tolerance: Maximum change of the mean loss, in nats, measured over the batches.
        batches: Batches of about 2,048 data tokens, evenly spaced over the validation split.
        data: Settings of the data module that replace those of the fit, such as --data.dataset python_docs.

    Returns:
        Path of the pruned checkpoint.

    Raises:
        UserError: If the checkpoint cannot be used or has no parameter tokens, if no token is dead, if the data cannot
            be read, or if the output already exists.
    """
    target = Path(output) if output else Path(ckpt_path).with_name(f"{Path(ckpt_path).stem}-pruned.ckpt")
    if target.exists():
        raise UserError(f"output: {target} exists already")
    if not tolerance > 0:
        raise UserError(f"tolerance: expected above 0, got {tolerance}")
    checkpoint = read_checkpoint(ckpt_path)
    task = rebuild_task(ckpt_path, checkpoint)
    _check_tokens(task, ckpt_path)
    found, _ = evaluation_batches(task, checkpoint, data, batches)
    dead = find_dead(task, found, tolerance)
    if not len(dead):
        raise UserError(f"tolerance: no token can be removed within {tolerance:g} nats (expected a larger tolerance)")
    sizes = {name: layer.num_tokens for name, layer in token_layers(task).items()}
    parameters = sum(parameter.numel() for parameter in task.parameters())
    task = change_checkpoint(
        ckpt_path, checkpoint, task, lambda one, optimizers: prune(one, dead.tokens, dead.energy, optimizers)
    )
    removed = parameters - sum(parameter.numel() for parameter in task.parameters())
    initial = task.backbone.config
    smaller = {kind: size for kind, size in task.backbone.param_tokens.items() if size < initial.size.get(kind, 0)}
    if smaller:  # a checkpoint must not describe a larger model than its tensors
        describe_size(task, initial, smaller)
        checkpoint[task.CHECKPOINT_HYPER_PARAMS_KEY] = dict(task.hparams)
    with state_errors(ckpt_path, "callbacks"):
        _record_kept(checkpoint, dead.tokens, sizes)
    write_checkpoint(checkpoint, target)
    saved = Path(ckpt_path).stat().st_size - target.stat().st_size if Path(ckpt_path).is_file() else 0
    print(
        f"{target}: {len(dead):,} of {sum(sizes.values()):,} parameter tokens removed; {parameters:,} -> "
        f"{parameters - removed:,} parameters ({-removed / parameters:+.1%}); file {-saved / 1e6:+.1f} MB; "
        f"loss {dead.loss:.4f} -> {dead.loss + dead.change:.4f} ({dead.change:+.1e})"
    )
    return target


def _check_tokens(task: Any, ckpt_path: str) -> None:
    try:
        token_layers(task)
    except UserError:
        raise UserError(
            f"ckpt_path: {ckpt_path} has no parameter tokens to inspect (projection: linear; expected pattention)"
        ) from None


def _select_adapter(task: Any, given: list[str] | None) -> None:
    choice = AdapterChoice(given)
    if choice.auto or len(choice.folders) > 1:
        raise UserError(f"adapter: expected one NAME=FOLDER, got {', '.join(given or [])}")
    for name, folder in choice.folders.items():
        load_adapter(task.backbone, folder, name, getattr(task, "tokenizer_json", None))
        set_adapter(task.backbone, name)


def _events(checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the growths that a checkpoint records, the oldest first."""
    states = checkpoint.get("callbacks", {}).items()
    return next((state.get("events", []) for key, state in states if key.startswith("ParameterGrowthCallback")), [])


def _stages(checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the sizes of the model that RunSummary records, the oldest first."""
    states = checkpoint.get("callbacks", {}).items()
    return next((state.get("stages", []) for key, state in states if key.startswith("RunSummary")), [])


def _earlier(
    checkpoint: Mapping[str, Any], given: str | None, growths: int
) -> tuple[dict[str, torch.Tensor] | None, int, str]:
    """Read the checkpoint that movement is measured from: its weights, its number of growths, and its name."""
    path = given
    if given is None and growths:
        best = [(stage.get("best") or {}).get("path") for stage in _stages(checkpoint)[:-1]]
        path = best[-1] if best and best[-1] and Path(best[-1]).exists() else None
    if path is None:
        return None, 0, ""
    try:
        found = read_checkpoint(path, optimizers=False)
    except UserError as error:
        if given is None:
            return None, 0, ""
        raise UserError(str(error).replace("ckpt_path", "earlier", 1)) from None
    before = len(_events(found))
    if before > growths:
        raise UserError(f"earlier: {path} has {before} growths (expected at most {growths}, those of the checkpoint)")
    return found["state_dict"], before, Path(path).name


def _facts(task: Any, checkpoint: Mapping[str, Any], dataset: str) -> list[tuple[str, str]]:
    parameters = sum(parameter.numel() for parameter in task.parameters())
    facts = [("task", type(task).__name__), ("preset", str(task.hparams.get("preset")))]
    facts += [("step", f"{checkpoint.get('global_step', 0):,}"), ("parameters", f"{parameters:,}")]
    return [*facts, ("validation data of", dataset)]


def _record_kept(checkpoint: dict[str, Any], dead: Mapping[str, list[int]], sizes: Mapping[str, int]) -> None:
    """Record which rows remain in the last growth, whose row map refers to the size before the removal."""
    events = _events(checkpoint)
    for name, removed in dead.items() if events else ():
        gone = {*removed}
        record_kept(events[-1], f"{name}.key_tokens", [row for row in range(sizes[name]) if row not in gone])
