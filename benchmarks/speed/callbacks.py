"""Cost of the callbacks in an epoch of a fit: the time in their hooks, against the epoch without that time.

    python -m benchmarks.speed.callbacks [--steps 100]

The fit is that of ``configs/causal_lm_small.yaml`` on random tokens, with TensorBoard's logger and Lightning's default
of 50 steps between reports. Two equal fits differ by more than 1 %, so the figure with the goal is a sum: every hook of
a callback is timed, in the second of two epochs, validation included; what a callback makes the logger do counts. On
CUDA the device is synchronized before and after each hook. Work at the start and the end of a fit does not count.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from benchmarks.speed.lines import Line
from benchmarks.speed.timing import arguments, main, seconds
from callbacks import ErrorLog, LossGuard, ParameterGrowthCallback, PreemptionCheckpoint, RunSummary, TrainingMonitor
from lit_tokenformer.tasks import LitCausalLM

BATCH_SIZE, LENGTH, VOCAB_SIZE = 8, 256, 4096
EPOCHS = 1000  # of the schedule; a fit ends long before


def measure(args: argparse.Namespace) -> tuple[list[Line], list[str]]:
    """Sum the seconds of the hooks."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
    clock = Clock(args.device)
    fit([clock.wrap(callback) for callback in make_callbacks()] + [clock], 2, args)
    without = clock.epoch - sum(clock.seconds.values())
    lines = []
    for name in dict.fromkeys(hook.split(".")[0] for hook in clock.seconds):
        spent = sum(passed for hook, passed in clock.seconds.items() if hook.startswith(f"{name}."))
        share = spent / without
        lines.append(Line(f"{name}, its hooks in an epoch", "the rest of it", spent, without, "s", share, "<= 0.01"))
    most = sorted(clock.seconds.items(), key=lambda item: -item[1])[:5]
    slowest = ", ".join(f"{name} {1e6 * passed / args.steps:,.0f}" for name, passed in most)
    return lines, [f"The slowest hooks, microseconds for each step: {slowest}."]


def make_callbacks(growth: int = EPOCHS - 1, unit: str = "epoch") -> list[Callback]:
    """Build the callbacks of the config, with one growth, and those of every fit from the command line."""
    return [
        ParameterGrowthCallback({growth: 64}, unit),
        TrainingMonitor(),
        LossGuard(),
        RunSummary(),
        PreemptionCheckpoint(),
        ErrorLog(),
    ]


def fit(
    callbacks: list[Callback], epochs: int, args: argparse.Namespace, precision: Any = "32-true", length: int = LENGTH
) -> None:
    """Train a new model for some epochs of ``args.steps`` steps, with a validation after each."""
    adamw = partial(torch.optim.AdamW, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    torch.manual_seed(0)
    overrides: Any = {"param_tokens": 32}
    task = LitCausalLM("tokenformer_lm_small", VOCAB_SIZE, length, overrides=overrides, optimizer=adamw)
    blocks: Any = torch.randint(VOCAB_SIZE, (BATCH_SIZE * args.steps, length + 1))
    pinned = args.device.startswith("cuda")
    training: DataLoader = DataLoader(blocks, batch_size=BATCH_SIZE, pin_memory=pinned)
    validation: DataLoader = DataLoader(blocks[: 5 * BATCH_SIZE], batch_size=BATCH_SIZE, pin_memory=pinned)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator=args.device.split(":")[0],
            devices=1,
            precision=precision,
            max_epochs=EPOCHS,
            max_steps=epochs * args.steps,
            gradient_clip_val=1.0,
            callbacks=callbacks,
            logger=TensorBoardLogger(folder),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        with contextlib.redirect_stdout(io.StringIO()):  # the table of RunSummary
            trainer.fit(task, training, validation)


class Clock(Callback):
    """Time the hooks of callbacks in the second epoch, and the epoch; it is the last callback."""

    def __init__(self, device: str) -> None:
        self.seconds: dict[str, float] = {}  # of each hook, "callback.hook"
        self.epoch = 0.0
        self._device = device
        self._measures = False
        self._since = 0.0

    def wrap(self, callback: Callback) -> Callback:
        """Wrap the hooks of a callback with a clock."""
        for hook in vars(Callback):
            if hook.startswith("on_") and getattr(type(callback), hook) is not getattr(Callback, hook):
                name = f"{type(callback).__name__}.{hook}"
                self.seconds[name] = 0.0
                setattr(callback, hook, self._measured(name, getattr(callback, hook)))
        return callback

    def _measured(self, name: str, function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def measured(*args: Any) -> None:
            if not self._measures:
                return function(*args)
            self._wait()
            self.seconds[name] += seconds(lambda: function(*args), self._device)

        return measured

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measures = trainer.current_epoch == 1
        self._wait()
        self._since = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._wait()
        self.epoch = time.perf_counter() - self._since
        self._measures = False

    def _wait(self) -> None:
        if self._device.startswith("cuda"):
            torch.cuda.synchronize(self._device)


if __name__ == "__main__":
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of an epoch")
    main("callbacks", parser, measure)
