"""Two processes under DDP, of which one gets a signal or dies; ``test_interruptions.py`` runs it.

    python fault_scenarios.py FOLDER

forks two processes for each scenario, since starting them anew costs seconds, and writes ``FOLDER/found.json``: exit
statuses, and how long each took.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks import ErrorLog, LossGuard, ParameterGrowthCallback, PreemptionCheckpoint
from lit_tokenformer.checkpoints.checkpoint_io import last_checkpoint
from lit_tokenformer.data import ImageDataModule
from lit_tokenformer.growth.shards import gather
from lit_tokenformer.tasks import LitImageClassifier, LRSchedule

TIMEOUT = 6
"""Seconds that a process waits for another one."""
STEP = 6
"""The optimizer step, of eight, in which it happens."""
TINY = {"dim": 16, "depth": 1, "num_heads": 2, "patch_size": 4, "param_tokens": 4}


class At(Callback):
    """Does something in the midst of a step, in one of the processes."""

    def __init__(self, rank: int, act: Callable[[], Any]) -> None:
        self.rank, self.act = rank, act

    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: torch.Tensor) -> None:
        if trainer.global_step == STEP and trainer.global_rank == self.rank:
            self.act()


class SavesWithin(Callback):
    """Saves between the two micro-batches of a step."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop._should_accumulate() and trainer.global_step == STEP // 2:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt")


class NotANumber(Callback):
    """Makes the loss of one process no number."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == STEP and trainer.global_rank == 1:
            batch[0].fill_(float("nan"))


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def fail() -> None:
    raise KeyError("what went wrong")


def wait() -> None:
    time.sleep(600)


RESUMES = {"goes on": "sigterm to one", "goes on within a step": "saves within a step"}
RESUMES["sharded, goes on within a step"] = "sharded, saves within a step"
"""Scenarios that resume from the checkpoint of another one."""
SCENARIOS: dict[str, list[Callback]] = {
    "whole": [],
    "sigterm to one": [At(1, send(signal.SIGTERM))],
    "goes on": [],
    "saves within a step": [SavesWithin()],
    "goes on within a step": [],
    "sharded, saves within a step": [SavesWithin()],
    "sharded, goes on within a step": [],
    "sigusr1 to the first": [At(0, send(signal.SIGUSR1))],
    "not a number": [NotANumber()],
    "killed": [At(1, send(signal.SIGKILL))],
    "the first killed": [At(0, send(signal.SIGKILL))],
    "raises": [At(1, fail)],
    "hangs": [At(1, wait)],
}


def fit(folder: Path, name: str) -> None:
    """Two epochs of four steps of a model that grows; the weights are saved at the end."""
    seed_everything(1)
    task = LitImageClassifier(
        "tokenformer_vit_tiny_patch16_224",
        num_classes=10,
        image_size=8,
        overrides=TINY,
        schedule=LRSchedule("constant"),
    )
    strategy: Strategy = DDPStrategy(process_group_backend="gloo")
    if name.startswith("sharded"):
        strategy = ModelParallelStrategy(2, 1, process_group_backend="gloo")
    place = folder / RESUMES.get(name, name)
    trainer = Trainer(
        max_epochs=2,
        limit_train_batches=4,
        accumulate_grad_batches=2 if name.endswith("within a step") else 1,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=place,
        callbacks=[
            *(ParameterGrowthCallback({1: 8}), LossGuard(), PreemptionCheckpoint(), ErrorLog()),
            *SCENARIOS[name],
        ],
    )
    data = ImageDataModule("digits", batch_size=8, seed=3, num_workers=0)
    trainer.fit(task, data, ckpt_path=last_checkpoint(place) if name in RESUMES else None, weights_only=True)
    torch.save(
        {key: gather(tensor) for key, tensor in task.state_dict().items()}, folder / f"{name}-{trainer.global_rank}.pt"
    )


def start(folder: Path, name: str, rank: int) -> int:
    """One process of a scenario."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.environ["LOCAL_RANK"] = str(rank)
        with (folder / f"{name}-{rank}.txt").open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        dist.init_process_group(  # before Lightning does, which would choose a port
            "gloo", f"file://{folder / name}.store", timedelta(seconds=TIMEOUT), world_size=2, rank=rank
        )
        fit(folder, name)
        status = 0
    except SIGTERMException:
        status = 143
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found = {}
    for name in SCENARIOS:
        children = [start(folder, name, rank) for rank in range(2)]
        begun, statuses, seconds = time.monotonic(), {}, {}
        for rank in (1, 0) if name == "the first killed" else (0, 1):
            if name == "hangs" and rank == 1:
                os.kill(children[rank], signal.SIGKILL)
            statuses[rank] = os.waitstatus_to_exitcode(os.waitpid(children[rank], 0)[1])
            seconds[rank] = time.monotonic() - begun
        found[name] = {"statuses": [statuses[0], statuses[1]], "seconds": [seconds[0], seconds[1]]}
    (folder / "found.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
