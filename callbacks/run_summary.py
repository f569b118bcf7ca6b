"""What a fit came to: a line for each size of the model, with what it cost and its best checkpoint."""

from __future__ import annotations

import json
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from callbacks.training_monitor import TrainingMonitor
from lit_tokenformer.checkpoints.run_folder import run_folder, write_new
from lit_tokenformer.models import model_size, param_tokens


class RunSummary(Callback):
    """Prints a table at the end of a fit, and writes it to ``summary.json`` in the folder of the run.

    Each stage of growth has a line: its parameter tokens, optimizer steps, seconds (with validation), operations of
    training, and the best checkpoint that was saved at that size, with its score. A fit that is resumed counts on; what
    was done after the checkpoint it resumes from is not counted twice. The summary of another run in the same folder is
    kept; the new one is ``summary-v1.json`` then.

    Note:
        Operations are those of :class:`~callbacks.TrainingMonitor`, and left out without it; best checkpoints are those
        of a ``ModelCheckpoint`` with ``monitor``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from callbacks import TrainingMonitor
        >>> trainer = Trainer(callbacks=[TrainingMonitor(), RunSummary()], logger=False)
    """

    def __init__(self) -> None:
        self.stages: list[dict[str, Any]] = []
        """One entry for each size so far; the last one is under way."""
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
            self._begin(trainer, pl_module)  # also where the model was grown between two fits

    def on_parameter_growth(self, trainer: Trainer, pl_module: LightningModule, event: dict[str, Any]) -> None:
        """Ends a stage and begins the next.

        Args:
            trainer: The trainer.
            pl_module: The model, grown already.
            event: What was done.
        """
        self._count(trainer)
        self._begin(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # here and not later: a ModelCheckpoint knows already what it is about to save, and a growth makes it forget
        self._count(trainer)
        checkpoint["callbacks"][self.state_key] = self.state_dict()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._count(trainer)
        folder = run_folder(trainer)  # asks all processes
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        for stage in self.stages:
            if stage["best"] and not _exists(stage["best"]["path"]):  # a full disk, or someone removed it
                stage["best"] = None
        try:
            write_new(folder, "summary.json", json.dumps(self.state_dict(), indent=2) + "\n", self._continues)
        except OSError as error:
            rank_zero_warn(f"cannot write summary.json in {folder}: {error.strerror or error}")
        self._print()

    def _continues(self, summary: str) -> bool:
        """Whether this fit continues the one that wrote a summary; a second fit from its checkpoint does not."""
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
        """Brings the stage under way up to date."""
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
            # a resumed fit saves in another folder, and its first checkpoint is not the best of all so far
            better = best is None or (score > best["score"] if callback.mode == "max" else score < best["score"])
            if better and (path, score) != self._best_before:
                stage["best"] = {"path": path, "monitor": callback.monitor, "score": score}

    def _print(self) -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table(title="What this fit came to")
        for name in ("stage", "tokens", "steps", "seconds", "training FLOPs", "score", "best checkpoint"):
            table.add_column(name, justify="left" if name == "best checkpoint" else "right", overflow="fold")
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
                f"{best['monitor']} {best['score']:.4g}" if best else "-",
                Path(best["path"]).name if best else "-",
            )
        Console(width=None if sys.stdout.isatty() else 150).print(table)


def _training_flops(trainer: Trainer) -> int | None:
    """Operations of all training steps so far, if a monitor counts them."""
    return next((one.training_flops for one in trainer.callbacks if isinstance(one, TrainingMonitor)), None)  # type: ignore


def _best(trainer: Trainer) -> list[Any]:
    """The first ``ModelCheckpoint`` that has a best score, if there is one."""
    callbacks = [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint) and one.monitor]
    return [one for one in callbacks if one.best_model_score is not None][:1]


def _exists(path: str) -> bool:
    fs, plain = url_to_fs(path)
    return fs.exists(plain)
