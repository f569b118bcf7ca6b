"""In an ordinary training step the host reads nothing from the device."""

from __future__ import annotations

import traceback
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from callbacks import (
    GrowingEMA,
    LossGuard,
    ParameterGrowthCallback,
    PreemptionCheckpoint,
    RunSummary,
    TrainingMonitor,
)
from lit_tokenformer.tasks import LitCausalLM, LitImageClassifier, LitMaskedLM

TINY: Any = {"dim": 16, "depth": 1, "num_heads": 2, "param_tokens": 4}
STEPS, EVERY = 12, 6
READS = {
    *(Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.nonzero, Tensor.equal, Tensor.is_nonzero),
    *(Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.__array__, Tensor.__contains__),
    *(torch.equal, torch.nonzero, torch.is_nonzero, torch.allclose, torch.unique, Tensor.unique),
    *(torch.masked_select, Tensor.masked_select, Tensor.__format__, Tensor.__repr__),
}
"""Functions that read values of a tensor from its device."""
KNOWN = " batch_features < "
OPERATIONS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2"}
"""The same, called within another function."""


def to_host(*args: Any) -> bool:
    """``torch.device("cpu")`` is the device of this fit, the text is the host wherever it runs."""
    return any(isinstance(one, str) and one == "cpu" for one in args)


class Reads:
    """Where values were read in each step, by the line of this project or of Lightning that asked for them.

    A CPU stands for the device: reading a tensor there is what would wait for a GPU.
    """

    def __init__(self) -> None:
        self.step = 0
        self.found: dict[int, set[str]] = {}
        reads = self

        class Calls(TorchFunctionMode):
            def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                given = kwargs or {}
                if function in READS or (function is Tensor.to and to_host(*args[1:], *given.values())):
                    reads.note()
                return function(*args, **given)

        class Kernels(TorchDispatchMode):
            def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if function.overloadpacket.__name__ in OPERATIONS:
                    reads.note()
                return function(*args, **(kwargs or {}))

        self.modes = Calls(), Kernels()

    def note(self) -> None:
        stack = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_stack()[:-2]]
        host = ("fetchers.py", "swa_utils.py")  # batches, and the number of averages, are in the host's memory
        if not any(name in frame for frame in stack for name in host):
            own = [frame for frame in stack if "/torch/" not in frame]
            self.found.setdefault(self.step, set()).add(" < ".join(own[:-7:-1]))


class Watch(Callback):
    """Counts from the first batch to the end of training; stands first."""

    def __init__(self) -> None:
        self.reads = Reads()

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        for mode in self.reads.modes:
            mode.__enter__()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.reads.step = trainer.global_step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        for mode in self.reads.modes[::-1]:
            mode.__exit__(None, None, None)


def text(draw: torch.Generator) -> tuple[Any, ...]:
    return (torch.randint(9, (STEPS * 4, 17), generator=draw),)


def masked(draw: torch.Generator) -> tuple[Any, ...]:
    tokens = torch.randint(9, (STEPS * 4, 16), generator=draw)
    labels = torch.where(torch.rand(tokens.shape, generator=draw) < 0.3, tokens, -100)
    return tokens, labels, torch.full((STEPS * 4,), 16)


def images(draw: torch.Generator) -> tuple[Any, ...]:
    return torch.randn(STEPS * 4, 3, 8, 8, generator=draw), torch.randint(10, (STEPS * 4,), generator=draw)


def collate(rows: list[Any]) -> Any:
    columns = [torch.stack(column) for column in zip(*rows, strict=True)]
    return columns[0] if len(columns) == 1 else tuple(columns)


ADAMW = partial(torch.optim.AdamW, lr=1e-3, fused=True)
TASKS = {
    "text": (text, partial(LitCausalLM, "tokenformer_lm_tiny", 9, 16)),
    "masked text": (masked, partial(LitMaskedLM, "tokenformer_mlm_tiny", 9, 16)),
    "images": (images, partial(LitImageClassifier, "tokenformer_vit_tiny_patch16_224", num_classes=10, image_size=8)),
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", TASKS)
def test_nothing_is_read_from_the_device_in_an_ordinary_step(
    name: str, accumulate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the callbacks of the shipped configs and the command line's. The first batch and log steps may read.

    A batch of masked text has as many targets as were masked, which the host has to know.
    """
    monkeypatch.setattr("callbacks.loss_guard._lags", lambda tensor: True)
    seed_everything(0, verbose=False)
    data, build = TASKS[name]
    overrides = {**TINY, **({"patch_size": 4} if name == "images" else {})}
    task: Any = build(overrides=overrides, optimizer=ADAMW)
    watch = Watch()
    trainer = Trainer(
        max_epochs=2,
        max_steps=STEPS // accumulate,
        accelerator="cpu",
        logger=TensorBoardLogger(tmp_path, name="", version="run"),
        log_every_n_steps=EVERY // accumulate,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[
            watch,
            ParameterGrowthCallback({1: 16}),
            GrowingEMA(0.9),
            TrainingMonitor(),
            LossGuard("rollback"),
            RunSummary(),
            LearningRateMonitor(logging_interval="step"),
            PreemptionCheckpoint(),
            ModelCheckpoint(tmp_path, monitor="train/loss", every_n_train_steps=1000),
        ],
    )
    rows = TensorDataset(*data(torch.Generator().manual_seed(0)))
    trainer.fit(task, DataLoader(rows, 4, collate_fn=collate))
    steps = STEPS // accumulate
    log_steps = {step for step in range(steps) if (step + 1) % (EVERY // accumulate) == 0}
    ordinary = {step: lines for step, lines in watch.reads.found.items() if step not in {0, *log_steps}}
    ordinary = {step: left for step, lines in ordinary.items() if (left := {x for x in lines if KNOWN not in x})}
    assert not ordinary, "\n".join(sorted({line for lines in ordinary.values() for line in lines}))
    assert log_steps & watch.reads.found.keys()  # what is counted is found there
    assert {"train/loss", "mfu"} <= trainer.progress_bar_metrics.keys()


def test_the_average_counts_its_updates_on_the_host(tmp_path: Path) -> None:
    """torch's ``AveragedModel`` looks at the count three times in each update."""
    average = GrowingEMA(0.9)
    task = TASKS["images"][1](overrides={**TINY, "patch_size": 4})
    average.setup(Trainer(logger=False, enable_checkpointing=False, accelerator="cpu"), task, "fit")
    assert isinstance(average._average_model, AveragedModel)
    average._average_model.to("meta")  # as a device whose values cannot be read
    average._average_model.n_averaged = torch.tensor(3)
    average._average_model.update_parameters(task.to("meta"))
    assert int(average._average_model.n_averaged) == 4
