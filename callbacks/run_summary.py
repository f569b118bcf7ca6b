"""Run summary: cost and best checkpoint for each size of the model."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from fsspec.core import url_to_fs
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from callbacks.training_monitor import TrainingMonitor
from lit_tokenformer.checkpoints.run_folder import run_folder, write_new
from lit_tokenformer.models import model_size, param_tokens


class RunSummary(Callback):
    """Print a table at the end of a fit, and write it to ``summary.json`` in the run folder.

    Each stage of growth has one row: parameter tokens, optimizer steps, seconds (including validation), training FLOPs,
    and the best checkpoint saved at that size with its score. A resumed fit continues the counts; steps after its
    checkpoint are not counted twice. A summary of another run in the same folder is kept, and the new one is named
    ``summary-v1.json``.

    Note:
        FLOPs come from :class:`~callbacks.TrainingMonitor` and are omitted without it. Best checkpoints come from a
        ``ModelCheckpoint`` with ``monitor``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from callbacks import TrainingMonitor
        >>> trainer = Trainer(callbacks=[TrainingMonitor(), RunSummary()], logger=False)
    """

    def __init__(self) -> None:
        self.stages: list[dict[str, Any]] = []
        """One entry per size so far; the last one is current."""
        self._since = 0.0
        self._run = uuid.uuid4().hex
        self._resumed_at = -1
        self._best_before: tuple[str, float] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"run": self._run, "stages": [dict(stage) for stage in self.stages]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._run = state_dict.get("run", self._run)
        self.stages = state_dict["stages"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.perf_counter()
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
                "begins_at_step": trainer.global_step,
                "steps": 0,
                "seconds": 0.0,
                "flops_before": flops,
                "training_flops": None if flops is None else 0,
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
        for callback in _best(trainer):
            path, score, best = callback.best_model_path, float(callback.best_model_score), stage["best"]
            # a resumed fit saves to another folder, where its first checkpoint may not be the best so far
            better = best is None or (score > best["score"] if callback.mode == "max" else score < best["score"])
            if better and (path, score) != self._best_before:
                stage["best"] = {"path": path, "monitor": callback.monitor, "score": score}

    def _print(self) -> None:
        from rich import get_console
        from rich.table import Table

        score = next((stage["best"]["monitor"] for stage in self.stages if stage["best"]), "score")
        table = Table(title="Run summary", title_justify="left", box=None, padding=(0, 2, 0, 0))
        for name in ("stage", "size", "steps", "seconds", "FLOPs", score):
            table.add_column(name, justify="left" if name == "size" else "right", overflow="fold")
        sizes = [{**stage["tokens"], **stage.get("units", {}), "depth": stage.get("depth")} for stage in self.stages]
        constant = {kind for kind in sizes[-1] if len({size.get(kind) for size in sizes}) == 1} if sizes else set()
        for number, stage in enumerate(self.stages):
            best, flops = stage["best"], stage["training_flops"]
            size = {k: n for k, n in sizes[number].items() if k in stage["tokens"] or k not in constant}
            table.add_row(
                str(number),
                ", ".join(f"{kind} {total}" for kind, total in size.items()) or "-",
                str(stage["steps"]),
                f"{stage['seconds']:.0f}",
                "-" if flops is None else f"{flops:.3g}",
                f"{best['score']:.4g}" if best else "-",
            )
        console = get_console()
        console.print(table)
        for number, stage in enumerate(self.stages):
            if stage["best"]:
                path = f"best checkpoint of stage {number}: {stage['best']['path']}"
                console.print(path, soft_wrap=True, highlight=False, markup=False)


def _training_flops(trainer: Trainer) -> int | None:
    """Return the FLOPs of all training steps so far, or ``None`` without a monitor."""
    return next((one.training_flops for one in trainer.callbacks if isinstance(one, TrainingMonitor)), None)  # type: ignore


def _best(trainer: Trainer) -> list[Any]:
    """Return the first ``ModelCheckpoint`` with a best score, as a list of at most one."""
    callbacks = [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint) and one.monitor]
    return [one for one in callbacks if one.best_model_score is not None][:1]


def _exists(path: str) -> bool:
    fs, plain = url_to_fs(path)
    return fs.exists(plain)
