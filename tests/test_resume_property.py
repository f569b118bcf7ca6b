"""Any run that is stopped anywhere and resumed, once or twice, equals the run that never stopped, bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint, GradientAccumulationScheduler, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from callbacks import GrowingEMA, ParameterGrowthCallback, PreemptionCheckpoint
from lit_tokenformer.data.resumable import EpochSampler, ResumableDataModule, ResumableLoader
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
    """Five batches in an epoch, and two of validation."""

    def __init__(self) -> None:
        super().__init__(seed=0, num_workers=0)

    def train_dataloader(self) -> DataLoader:
        noise = Noise()
        return self._resumed(ResumableLoader(noise, sampler=EpochSampler(noise, 0), batch_size=BATCH, drop_last=True))

    def val_dataloader(self) -> DataLoader:
        noise = Noise()
        return DataLoader([noise[0, 0, index] for index in range(4)], batch_size=BATCH)


class Keeper(Checkpoint):
    """Saves behind each batch, also where a gradient is pending, each validation and each end of an epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved = 0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        self.saved += 1
        trainer.save_checkpoint(self.folder / f"{self.saved}.ckpt")


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
        "new_state": draw(st.sampled_from(["mean", "zeros", "reset", "reset_copies"])),
        "new_updates": draw(st.sampled_from([1.0, 1.3])),
        "ramp_steps": draw(steps),
        "rewarm_steps": draw(steps),
        "tau_steps": draw(steps),
        "freeze_old_steps": draw(st.integers(-1, 3)),
    }


def fit(
    folder: Path,
    growth: dict[str, Any],
    accumulate: int,
    ema: bool,
    ckpt_path: Path | None,
    validate_every: int | float = 1.0,
    savers: Sequence[Callback] = (),
) -> dict[str, Any]:
    """Fits, keeps checkpoints, and tells how it ended."""
    seed_everything(0 if ckpt_path is None else 99)  # what is not in the checkpoint must not matter
    task = LitImageClassifier(
        "tokenformer_vit_tiny_patch16_224",
        num_classes=3,
        image_size=4,
        overrides={"dim": 4, "depth": 1, "num_heads": 1, "patch_size": 4, "param_tokens": TOKENS, "drop_path": 0.3},
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.01),
        schedule=LRSchedule("constant") if savers else LRSchedule("cosine", warmup=2, min_factor=0.1, unit="step"),
    )
    callbacks: list[Callback] = [
        growing := ParameterGrowthCallback(**growth),
        *([GrowingEMA(decay=0.8)] if ema else []),
        *(savers or [Keeper(folder)]),
        PreemptionCheckpoint(),
    ]
    trainer = Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        accumulate_grad_batches=accumulate,
        val_check_interval=validate_every,
        check_val_every_n_epoch=None if isinstance(validate_every, int) else 1,
        num_sanity_val_steps=0,
        default_root_dir=folder,
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
        "checkpoints": sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns),
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
    validate_every=st.sampled_from([1.0, 2, 3]),
    ema=st.booleans(),
    stops=st.lists(st.integers(0, 99), min_size=1, max_size=2),
)
def test_stopping_anywhere_changes_nothing(tmp_path_factory, growth, accumulate, validate_every, ema, stops):
    folder = tmp_path_factory.mktemp("runs")
    run = whole = fit(folder / "whole", growth, accumulate, ema, None, validate_every)
    event(f"{len(whole['growths'])} growths, {len(stops)} stops")
    for number, stop in enumerate(stops):
        left = run["checkpoints"][:-1]  # the last one is of the end of the fit
        if left:
            run = fit(folder / str(number), growth, accumulate, ema, left[stop % len(left)], validate_every)
            assert_equal(run, whole)
    shutil.rmtree(folder)


class AnyTime(ModelCheckpoint):
    """Saves by the clock, behind every micro-batch: an interval of no length, and no step at which it rests."""

    def on_train_batch_end(self, *args: Any) -> None:
        self._last_global_step_saved = -1
        super().on_train_batch_end(*args)


class OneBatchOn(ModelCheckpoint):
    """Saves every optimizer step, as after a resume also behind the first micro-batch."""

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_idx == 2:  # the first of two
            self._last_global_step_saved = 0  # as of a new process
        super().on_train_batch_end(trainer, *args)


TRIGGERS: dict[str, tuple[int | float, int, Callable[[Path], list[Callback]]]] = {
    "a validation within a step": (3, 2, lambda folder: [ModelCheckpoint(folder, save_top_k=-1)]),
    "the clock": (1.0, 2, lambda folder: [AnyTime(folder, save_top_k=-1, train_time_interval=timedelta(0))]),
    "behind a resume": (1.0, 2, lambda folder: [OneBatchOn(folder, save_top_k=-1, every_n_train_steps=1)]),
    "another factor in each epoch": (
        1.0,
        1,
        lambda folder: [
            GradientAccumulationScheduler({0: 2, 1: 3}),
            AnyTime(folder, save_top_k=-1, every_n_train_steps=1),
        ],
    ),
}


@pytest.mark.parametrize("trigger", TRIGGERS)
def test_a_checkpoint_with_a_gradient_pending_resumes_exactly(tmp_path, trigger):
    validate_every, accumulate, savers = TRIGGERS[trigger]
    growth = {"schedule": {1: 8}}
    whole = fit(tmp_path, growth, accumulate, True, None, validate_every, savers(tmp_path))
    pending = [path for path in whole["checkpoints"] if "pending_gradients" in torch.load(path, weights_only=True)]
    assert pending
    for number, path in enumerate([pending[0], pending[-1]]):
        folder = tmp_path / str(number)
        assert_equal(fit(folder, growth, accumulate, True, path, validate_every, savers(folder)), whole)
