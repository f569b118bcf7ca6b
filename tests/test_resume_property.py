"""Any run that is stopped anywhere and resumed, once or twice, equals the run that never stopped, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from callbacks import GrowingEMA, ParameterGrowthCallback
from lit_tokenformer.data.loading import EpochSampler, ResumableLoader
from lit_tokenformer.data.resumable import ResumableDataModule
from lit_tokenformer.tasks import LitImageClassifier, LRSchedule

EPOCHS, BATCHES, BATCH, TOKENS = 3, 5, 2, 4


class Noise(Dataset):
    """Images of noise, under the keys of ``EpochSampler``."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(BATCHES * BATCH + 1, 3, 4, 4, generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[Tensor, int]:
        return self.images[key[2]], key[2] % 3


class NoiseData(ResumableDataModule):
    """Five batches in an epoch."""

    def __init__(self) -> None:
        super().__init__(seed=0, num_workers=0)

    def train_dataloader(self) -> DataLoader:
        noise = Noise()
        return self._resumed(ResumableLoader(noise, sampler=EpochSampler(noise, 0), batch_size=BATCH, drop_last=True))


class Keeper(Checkpoint):
    """Saves behind each optimizer step and at each end of an epoch.

    ``ModelCheckpoint`` also does so behind the first batch after a resume, where half of an accumulation may be lost.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kept: list[Path] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step != self.step:
            self.step = trainer.global_step
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        self.kept.append(self.folder / f"{len(self.kept)}.ckpt")
        trainer.save_checkpoint(self.kept[-1])


@st.composite
def growths(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of the callback that are in range."""
    unit, method = draw(st.sampled_from(["epoch", "step"])), draw(st.sampled_from(["split", "zero_keys", "random"]))
    last = EPOCHS - 1 if unit == "epoch" else 5  # three accumulated batches leave six steps
    tokens, schedule = TOKENS, {}
    for key in sorted(draw(st.sets(st.integers(0, last), min_size=1, max_size=2))):
        tokens = tokens * 2 if method == "split" else tokens + draw(st.integers(1, 5))
        schedule[key] = tokens if draw(st.booleans()) else {"ffn": 4 * tokens}
    steps = st.integers(0, 4)
    return {
        "schedule": schedule,
        "unit": unit,
        "method": method,
        "new_state": draw(st.sampled_from(["mean", "zeros", "reset"])),
        "ramp_steps": draw(steps),
        "rewarm_steps": draw(steps),
        "tau_steps": draw(steps),
        "freeze_old_steps": draw(st.integers(-1, 3)),
    }


def fit(folder: Path, growth: dict[str, Any], accumulate: int, ema: bool, ckpt_path: Path | None) -> dict[str, Any]:
    """Fits, keeps checkpoints, and tells how it ended."""
    seed_everything(0 if ckpt_path is None else 99)  # what is not in the checkpoint must not matter
    task = LitImageClassifier(
        "tokenformer_vit_tiny_patch16_224",
        num_classes=3,
        image_size=4,
        overrides={"dim": 4, "depth": 1, "num_heads": 1, "patch_size": 4, "param_tokens": TOKENS, "drop_path": 0.3},
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.01),
        schedule=LRSchedule("cosine", warmup=2, min_factor=0.1, unit="step"),
    )
    callbacks: list[Callback] = [
        growing := ParameterGrowthCallback(**growth),
        *([GrowingEMA(decay=0.8)] if ema else []),
        keeper := Keeper(folder),
    ]
    trainer = Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        accumulate_grad_batches=accumulate,
    )
    trainer.fit(task, NoiseData(), ckpt_path=ckpt_path, weights_only=True)
    optimizer = trainer.optimizers[0]
    states = {name: optimizer.state[parameter] for name, parameter in task.named_parameters()}
    return {
        "weights": dict(task.state_dict()),
        "moments": {f"{name} {part}": value for name, state in states.items() for part, value in state.items()},
        "rates": [group["lr"] for group in optimizer.param_groups],
        "step": trainer.global_step,
        "growths": [(event["step"], event["after"]) for event in growing.events],
        "checkpoints": keeper.kept,
    }


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for part in ("step", "growths", "rates"):
        assert found[part] == expected[part], part
    for part in ("weights", "moments"):
        assert found[part].keys() == expected[part].keys()
        for name, tensor in found[part].items():
            assert torch.equal(tensor, expected[part][name]), name


@pytest.mark.slow
@settings(
    max_examples=12,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],  # a smaller example is not worth minutes
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    growth=growths(),
    accumulate=st.integers(1, 3),
    ema=st.booleans(),
    stops=st.lists(st.integers(0, 99), min_size=1, max_size=2),
)
def test_stopping_anywhere_changes_nothing(tmp_path_factory, growth, accumulate, ema, stops):
    folder = tmp_path_factory.mktemp("runs")
    run = whole = fit(folder / "whole", growth, accumulate, ema, None)
    event(f"{len(whole['growths'])} growths, {len(stops)} stops")
    for number, stop in enumerate(stops):
        left = run["checkpoints"][:-1]  # the last one is of the end of the fit
        if left:
            run = fit(folder / str(number), growth, accumulate, ema, left[stop % len(left)])
            assert_equal(run, whole)
    shutil.rmtree(folder)
