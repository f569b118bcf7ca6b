"""What a fit came to: a line for each size of the model, with what it cost and its best checkpoint."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.monitor import TrainingMonitor
from lit_tokenformer.atomic_io import atomic_write
from lit_tokenformer.models import model_size, param_tokens


class RunSummary(Callback):
    """Prints a table at the end of a fit, and writes it to ``summary.json`` in the log folder.

    Each stage of growth has a line: its parameter tokens, optimizer steps, seconds (with validation), operations of
    training, and the best checkpoint that was saved at that size, with its score. A fit that is resumed counts on; what
    was done after the checkpoint it resumes from is not counted twice.

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

    def state_dict(self) -> dict[str, Any]:
        return {"stages": [dict(stage) for stage in self.stages]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.stages = state_dict["stages"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.perf_counter()
        if not self.stages:
            self._begin(trainer, pl_module)

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
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # asks all processes
        if not trainer.is_global_zero:
            return
        for stage in self.stages:
            if stage["best"] and not Path(stage["best"]["path"]).exists():  # a full disk, or someone removed it
                stage["best"] = None
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / "summary.json") as file:
            file.write((json.dumps({"stages": self.stages}, indent=2) + "\n").encode())
        self._print()

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        flops = _training_flops(trainer)
        self.stages.append(
            {
                "tokens": param_tokens(pl_module),
                "depth": model_size(pl_module).get("depth"),
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
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_score is not None:
                score, best = float(callback.best_model_score), stage["best"]
                # a resumed fit saves in another folder, and its first checkpoint is not the best of all so far
                if best is None or (score > best["score"] if callback.mode == "max" else score < best["score"]):
                    stage["best"] = {"path": callback.best_model_path, "monitor": callback.monitor, "score": score}
                break

    def _print(self) -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table(title="What this fit came to")
        for name in ("stage", "tokens", "steps", "seconds", "training FLOPs", "score", "best checkpoint"):
            table.add_column(name, justify="left" if name == "best checkpoint" else "right", overflow="fold")
        deepened = len({stage.get("depth") for stage in self.stages}) > 1
        for number, stage in enumerate(self.stages):
            best, flops = stage["best"], stage["training_flops"]
            size = {**stage["tokens"], **({"depth": stage.get("depth")} if deepened else {})}
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
