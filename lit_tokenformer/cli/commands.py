"""Commands that change checkpoints: grow, shrink and split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from callbacks.growth_steps import row_map
from lit_tokenformer import tasks
from lit_tokenformer.checkpoints.load import read_checkpoint, state_errors, write_checkpoint
from lit_tokenformer.cli.weights import export_weights, import_weights, new_folder  # noqa: F401  (commands too)
from lit_tokenformer.errors import UserError, unknown_name
from lit_tokenformer.growth import grow_with_optimizers, shrink
from lit_tokenformer.growth.axes import describe_sizes, grown_sizes
from lit_tokenformer.growth.optimizer import NEW_STATES
from lit_tokenformer.models import TokenformerConfig, Tokens
from lit_tokenformer.models.axes import axis_sizes
from lit_tokenformer.models.config import KINDS
from lit_tokenformer.registry import POSITIONS
from lit_tokenformer.tasks.language import LitLanguageTask
from lit_tokenformer.tasks.rebuild import change_checkpoint, fresh_checkpoint, rebuild_task


def grow_checkpoint(
    ckpt_path: str,
    tokens: Tokens,
    output: str | None = None,
    method: str = "split",
    noise: float = 1.0,
    new_state: str = "mean",
    seed: int = 0,
) -> Path:
    """Grow a checkpoint between two runs, optimizer state and moving averages included.

    Args:
        ckpt_path: Path to a checkpoint of a fit.
        tokens: Total size after growth: a number n of parameter tokens (qkv n, proj n, ffn 4n), or totals by kind,
            {qkv: n, proj: n, ffn: m, hidden: h, heads: H, depth: L, experts: E}.
        output: Path of the grown checkpoint; defaults to CKPT_PATH with "-grown" appended to its stem.
        method: Growth method: "split", "zero" or "random".
        noise: Noise scale between the copies of a split, in standard deviations of the weight initialization.
        new_state: Second moments of new units that are not copies: "mean" or "zeros"; "reset" drops the optimizer
            state; "reset_copies" that of all new units.
        seed: Random seed for the new units.

    Returns:
        Path of the grown checkpoint.

    Raises:
        UserError: If the checkpoint cannot be read, the totals do not fit it, or the output already exists.
    """
    target = Path(output) if output else Path(ckpt_path).with_name(f"{Path(ckpt_path).stem}-grown.ckpt")
    if target.exists():
        raise UserError(f"output: {target} exists already")
    if new_state not in NEW_STATES:
        raise unknown_name("new_state", new_state, NEW_STATES)
    checkpoint = read_checkpoint(ckpt_path)
    task = rebuild_task(ckpt_path, checkpoint)
    settings: dict[str, Any] = {"method": method, "noise": noise, "seed": seed}
    before = grown_sizes(task, tokens)
    rows: dict[str, list[int]] = {}

    def change(task: tasks.LitTask, optimizers: Sequence[Any]) -> None:
        for grown in grow_with_optimizers(task, tokens, optimizers, new_state=new_state, **settings):
            rows.update(row_map(grown.name, grown.grown))

    task = change_checkpoint(ckpt_path, checkpoint, task, change)
    after = grown_sizes(task, tokens)
    event = {"step": checkpoint.get("global_step", 0), "epoch": checkpoint.get("epoch", 0), "before": before}
    event |= {**settings, "after": after, "rows": rows}
    with state_errors(ckpt_path, "callbacks"):
        for key, state in checkpoint.get("callbacks", {}).items():
            if key.startswith("ParameterGrowthCallback"):
                state["events"].append(event)
            elif key.startswith("TrainingMonitor"):
                state["growth"] = {name: event[name] for name in ("before", "after", "method", "rows")}

    write_checkpoint(checkpoint, target)
    pairs = {kind: f"{before[kind]} -> {now}" for kind, now in after.items()}
    changed = {kind: pair for kind, pair in pairs.items() if before[kind] != after[kind]}
    print(f"{target}: {describe_sizes(changed or pairs)}")
    return target


def shrink_checkpoint(ckpt_path: str, tokens: Tokens | float, output: str | None = None) -> Path:
    """Shrink a checkpoint to its first units, the inverse of "grow"; for models trained with callbacks.NestedSizes.

    The result works with generate, evaluate, export, grow and fit --init_from; a fit from it starts at epoch 0 with a
    fresh optimizer. The weights are the moving average where the fit has one.

    Args:
        ckpt_path: Path to a checkpoint of a fit.
        tokens: Total size that remains: a number n of parameter tokens (qkv n, proj n, ffn 4n), totals by kind,
            {qkv: n, proj: n, ffn: m, hidden: h, heads: H}, or a share such as 0.25.
        output: Path of the smaller checkpoint; defaults to CKPT_PATH with "-shrunk" appended to its stem.

    Returns:
        Path of the smaller checkpoint.

    Raises:
        UserError: If the checkpoint cannot be read, if no unit or more than the present ones would remain, or if the
            output already exists.
    """
    target = Path(output) if output else Path(ckpt_path).with_name(f"{Path(ckpt_path).stem}-shrunk.ckpt")
    if target.exists():
        raise UserError(f"output: {target} exists already")
    checkpoint = read_checkpoint(ckpt_path, optimizers=False)
    task = rebuild_task(ckpt_path, checkpoint)
    before = axis_sizes(task)
    shrink(task, tokens)
    after = axis_sizes(task)
    changed = {kind: size for kind, size in after.items() if size < before[kind] or kind in KINDS}
    describe_size(task, next(iter(task.backbones.values())).config, changed)
    write_checkpoint(fresh_checkpoint(task, task.state_dict()), target)
    pairs = {kind: f"{before[kind]} -> {now}" for kind, now in after.items() if now < before[kind]}
    print(f"{target}: {describe_sizes(pairs)}")
    return target


def describe_size(task: tasks.LitTask, config: TokenformerConfig, size: dict[str, int]) -> None:
    """Set a task's arguments to a smaller size than that of its config.

    Raises:
        UserError: If the config cannot describe it.
    """
    if "heads" in size and POSITIONS[config.positions].bias is not None:
        raise UserError("tokens: heads cannot shrink with positions 'alibi', whose slopes depend on their number")
    given, smaller = asdict(config), asdict(config.at_size(size))
    changed = {name: value for name, value in smaller.items() if value != given[name]}
    task.hparams["overrides"] = {**task.hparams["overrides"], **changed}
    own = [task.hparams.get(name) or {} for name in ("image", "text")]  # of LitMultiTask
    own += [spec["init_args"].get("overrides", {}) for spec in (task.hparams.get("tasks") or {}).values()]
    for overrides in own:
        for name in changed.keys() & overrides.keys():
            del overrides[name]
    task.hparams.update({name: None for name in ("match", "match_to") if name in task.hparams})


def split_checkpoint(ckpt_path: str, output: str) -> Path:
    """Split a multi-task checkpoint into one checkpoint per task with the same outputs.

    The results serve as checkpoints of a fit of the single task, for example for predict, export and grow. A fit from
    one starts at epoch 0 with a fresh optimizer. The weights are the moving average where the fit has one.

    Args:
        ckpt_path: Path to a checkpoint of LitMultiTask.
        output: New folder for NAME.ckpt of each task and, if a task has a tokenizer, tokenizer.json
            (NAME.tokenizer.json if several tasks have one).

    Returns:
        Path of the folder.

    Raises:
        UserError: If the checkpoint cannot be read or is of a single task, or if the output already exists.
    """
    with new_folder(output) as folder:
        checkpoint = read_checkpoint(ckpt_path)
        task = rebuild_task(ckpt_path, checkpoint, device="meta")
        if not isinstance(task, tasks.LitMultiTask):
            raise UserError(
                f"ckpt_path: expected a checkpoint of LitMultiTask, got {type(task).__name__} in {ckpt_path}"
            )
        weights = checkpoint["state_dict"]
        for name, part in task.tasks.items():
            state = {key.removeprefix(f"{name}."): weights[key] for key in weights if key.startswith(f"{name}.")}
            write_checkpoint(fresh_checkpoint(part, state), folder / f"{name}.ckpt")
            if isinstance(part, LitLanguageTask):
                _write_tokenizer(folder / part.tokenizer_file, part.tokenizer_json)
    return Path(output)


def _write_tokenizer(path: Path, text: str | None) -> None:
    if text is not None:
        path.write_text(text, encoding="utf-8")
