"""Run summary: cost and best checkpoint for each size of the model."""

from __future__ import annotations

import json
import shlex
import time
import uuid
from typing import Any

from fsspec.core import url_to_fs
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from rich import get_console

from callbacks.throughput import Counts, peak_memory
from callbacks.training_monitor import TrainingMonitor
from lit_tokenformer.adapters import list_adapters
from lit_tokenformer.checkpoints.run_folder import run_folder, write_new
from lit_tokenformer.models import model_size, param_tokens
from lit_tokenformer.tasks import LitCausalLM, LitImageClassifier, LitMaskedLM

INSPECTED = (LitCausalLM, LitImageClassifier, LitMaskedLM)
"""Tasks that the command ``inspect`` supports; a checkpoint of an adapter has no model to inspect."""


class RunSummary(Callback):
    """Print a table at the end of a fit, and write it to ``summary.json`` in the run folder.

    Models with experts have a further column: parameters in total, and active ones, which each data token uses.

    Each stage of growth has one row: parameter tokens, optimizer steps, seconds (including validation), training FLOPs,
    and the best checkpoint saved at that size with its score. A second table has throughput, MFU and the share of time
    spent waiting for data, all without validation, and the peak memory until the end of the stage. A resumed fit
    continues the counts; steps after its checkpoint are not counted twice. A summary of another run in the same folder
    is kept, and the new one is named ``summary-v1.json``.

    Note:
        FLOPs and throughput come from :class:`~callbacks.TrainingMonitor` and are omitted without it. Best checkpoints
        come from a ``ModelCheckpoint`` with ``monitor``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from callbacks import TrainingMonitor
        >>> trainer = Trainer(callbacks=[TrainingMonitor(), RunSummary()], logger=False)
    """

    def __init__(self) -> None:
        self.stages: list[dict[str, Any]] = []
        """One entry per size so far; the last one is current."""
        self._since = 0.0
        self._counted = Counts()
        self._run = uuid.uuid4().hex
        self._resumed_at = -1
        self._best_before: tuple[str, float] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"run": self._run, "stages": [dict(stage) for stage in self.stages]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._run = state_dict.get("run", self._run)
        self.stages = state_dict["stages"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since, self._counted = time.perf_counter(), Counts()
        self._resumed_at = trainer.global_step
        size = self._size(pl_module)
        if not self.stages or any(self.stages[-1].get(name, now) != now for name, now in size.items()):
            self._begin(trainer, pl_module)  # also after a growth between two fits

    def on_parameter_growth(self, trainer: Trainer, pl_module: LightningModule, event: dict[str, Any]) -> None:
        """Close the current stage and start the next one.

        Args:
            trainer: The trainer.
            pl_module: The grown model.
            event: The growth.
        """
        self._count(trainer)
        self._begin(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # not later: a growth resets the ModelCheckpoint, which already has the path it is about to save
        self._count(trainer)
        checkpoint["callbacks"][self.state_key] = self.state_dict()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._count(trainer)
        folder = run_folder(trainer)  # collective
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        for stage in self.stages:
            if stage["best"] and not _exists(stage["best"]["path"]):  # not written to a full disk, or removed
                stage["best"] = None
        try:
            write_new(folder, "summary.json", json.dumps(self.state_dict(), indent=2) + "\n", self._continues)
        except OSError as error:
            rank_zero_warn(f"cannot write summary.json to {folder}: {error.strerror or error}")
        self._print()
        path = _latest_checkpoint(trainer)
        inspects = isinstance(pl_module, INSPECTED) and param_tokens(pl_module) and not list_adapters(pl_module)
        if path and inspects:
            text = f"Inspect its tokens: lit-tokenformer inspect --ckpt_path {shlex.quote(path)} --output report"
            get_console().print(text, soft_wrap=True, highlight=False, markup=False)

    def _continues(self, summary: str) -> bool:
        """Return whether this fit continues the one of a summary; a second fit from its checkpoint does not."""
        try:
            found = json.loads(summary)
            last = found["stages"][-1]
            return found["run"] == self._run and last["begins_at_step"] + last["steps"] <= self._resumed_at
        except (ValueError, KeyError, IndexError, TypeError):
            return False

    @staticmethod
    def _size(pl_module: LightningModule) -> dict[str, Any]:
        tokens, size = param_tokens(pl_module), model_size(pl_module)
        return {"tokens": tokens, "depth": size.pop("depth", None), "units": {k: size[k] for k in size.keys() - tokens}}

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        flops = _training_flops(trainer)
        self._best_before = next(((one.best_model_path, float(one.best_model_score)) for one in _best(trainer)), None)
        self.stages.append(
            {
                **self._size(pl_module),
                **_parameters(pl_module),
                "begins_at_step": trainer.global_step,
                "steps": 0,
                "seconds": 0.0,
                "flops_before": flops,
                "training_flops": None if flops is None else 0,
                "throughput": None,
                "best": None,
            }
        )

    def _count(self, trainer: Trainer) -> None:
        """Update the current stage."""
        if not self.stages:
            return
        stage, now = self.stages[-1], time.perf_counter()
        stage["seconds"] += now - self._since
        self._since = now
        stage["steps"] = trainer.global_step - stage["begins_at_step"]
        flops = _training_flops(trainer)
        if flops is not None and stage["flops_before"] is not None:
            stage["training_flops"] = flops - stage["flops_before"]
        self._count_throughput(trainer, stage)
        for callback in _best(trainer):
            path, score, best = callback.best_model_path, float(callback.best_model_score), stage["best"]
            # a resumed fit saves to another folder, where its first checkpoint may not be the best so far
            better = best is None or (score > best["score"] if callback.mode == "max" else score < best["score"])
            if better and (path, score) != self._best_before:
                stage["best"] = {"path": path, "monitor": callback.monitor, "score": score}

    def _count_throughput(self, trainer: Trainer, stage: dict[str, Any]) -> None:
        """Add the steps since the last count to the throughput of a stage, which a resumed fit continues."""
        monitor = _monitor(trainer)
        if monitor is None or monitor.throughput is None:
            return
        counts = monitor.throughput.counts()
        before = stage.get("throughput") or {}
        sums = {name: before.get(name, 0) + value for name, value in counts.since(self._counted)._asdict().items()}
        memory = max(before.get("peak_memory", 0), peak_memory(trainer.strategy.root_device))
        stage["throughput"] = {**sums, **monitor.rates(Counts(**sums)), "peak_memory": memory}
        self._counted = counts

    def _print(self) -> None:
        score = next((stage["best"]["monitor"] for stage in self.stages if stage["best"]), "score")
        table = _table("Run summary")
        sparse = any(stage.get("active_parameters") for stage in self.stages)
        for name in ("stage", "size", *(["parameters"] if sparse else []), "steps", "seconds", "FLOPs", score):
            is_size = name == "size"
            header, width = name.replace("/", "/\n") if sparse else name, 12 if is_size else None
            table.add_column(header, justify="left" if is_size else "right", overflow="fold", min_width=width)
        sizes = [{**stage["tokens"], **stage.get("units", {}), "depth": stage.get("depth")} for stage in self.stages]
        constant = {kind for kind in sizes[-1] if len({size.get(kind) for size in sizes}) == 1} if sizes else set()
        for number, stage in enumerate(self.stages):
            best, flops = stage["best"], stage["training_flops"]
            size = {k: n for k, n in sizes[number].items() if k in stage["tokens"] or k not in constant}
            table.add_row(
                str(number),
                ", ".join(f"{kind} {total}" for kind, total in size.items()) or "-",
                *([_total_and_active(stage)] if sparse else []),
                str(stage["steps"]),
                f"{stage['seconds']:.0f}",
                "-" if flops is None else f"{flops:.3g}",
                f"{best['score']:.4g}" if best else "-",
            )
        console = get_console()
        console.print(table)
        speeds = _table("Throughput, without validation")
        for name in ("stage", "samples/s", "data tokens/s", "MFU", "waiting for data", "peak memory"):
            speeds.add_column(name, justify="right")
        for number, stage in enumerate(self.stages):
            if found := stage.get("throughput"):
                speeds.add_row(
                    str(number),
                    f"{found['samples_per_second']:,.4g}",
                    f"{found['data_tokens_per_second']:,.0f}" if "data_tokens_per_second" in found else "-",
                    f"{found['mfu']:.1%}" if "mfu" in found else "-",
                    f"{found['data_wait']:.1%}",
                    f"{found['peak_memory'] / 1e9:.3g} GB",
                )
        if speeds.rows:
            console.print(speeds)
        for number, stage in enumerate(self.stages):
            if stage["best"]:
                path = f"best checkpoint of stage {number}: {stage['best']['path']}"
                console.print(path, soft_wrap=True, highlight=False, markup=False)


def _table(title: str) -> Any:
    from rich.table import Table

    return Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))


def _monitor(trainer: Trainer) -> TrainingMonitor | None:
    return next((one for one in trainer.callbacks if isinstance(one, TrainingMonitor)), None)  # type: ignore


def _parameters(pl_module: Any) -> dict[str, int]:
    """Return the parameters of a model with experts, in total and those that a data token uses; none without."""
    costs = getattr(pl_module, "costs", None)
    inactive = max((cost.inactive for cost in costs().values()), default=0) if callable(costs) else 0
    if not callable(costs) and callable(getattr(pl_module, "cost", None)):
        inactive = pl_module.cost().inactive
    total = sum(parameter.numel() for parameter in pl_module.parameters())
    return {"parameters": total, "active_parameters": total - inactive} if inactive else {}


def _total_and_active(stage: dict[str, Any]) -> str:
    total, active = stage.get("parameters"), stage.get("active_parameters")
    return "-" if total is None or active is None else f"{total / 1e6:,.4g} M\n({active / 1e6:,.4g} M active)"


def _training_flops(trainer: Trainer) -> int | None:
    """Return the FLOPs of all training steps so far, or ``None`` without a monitor."""
    monitor = _monitor(trainer)
    return None if monitor is None else monitor.training_flops


def _best(trainer: Trainer) -> list[Any]:
    """Return the first ``ModelCheckpoint`` with a best score, as a list of at most one."""
    callbacks = [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint) and one.monitor]
    return [one for one in callbacks if one.best_model_score is not None][:1]


def _latest_checkpoint(trainer: Trainer) -> str | None:
    """Return the path of the newest checkpoint, preferably that of the newest state."""
    callbacks = [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
    paths = [one.last_model_path or one.best_model_path for one in sorted(callbacks, key=lambda one: bool(one.monitor))]
    return next((path for path in paths if path and _exists(path)), None)


def _exists(path: str) -> bool:
    fs, plain = url_to_fs(path)
    return fs.exists(plain)
