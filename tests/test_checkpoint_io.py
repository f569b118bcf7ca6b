"""A checkpoint is there whole or not at all; a full disk stops a fit or is told; the newest whole one is found."""

import contextlib
import csv
import errno
import fcntl
import json
import math
import os
import pickle
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset

from callbacks import ParameterGrowthCallback, PreemptionCheckpoint, RunSummary
from lit_tokenformer.checkpoints.checkpoint_io import WholeCheckpointIO, last_checkpoint
from lit_tokenformer.cli.main import main
from lit_tokenformer.models import Pattention
from lit_tokenformer.tensor_files import write_tensors

STATE = {"state_dict": {"weight": torch.arange(200_000.0)}}


class Interrupted(Exception):
    pass


class Breaks:
    """A value in a checkpoint at which writing it ends."""

    def __reduce__(self):
        raise Interrupted


@pytest.fixture
def small_disk():
    """No file of this process can grow beyond 100 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def disk(tmp_path):
    """A disk of four megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a disk")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder):
    """Leaves no byte free on a disk."""
    with open(folder / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert shutil.disk_usage(folder).free == 0


class Fills(Callback):
    """Fills a disk behind a step, and makes room again behind a later one."""

    def __init__(self, folder: str, at: int, until: int | None) -> None:
        self.folder, self.at, self.until = Path(folder), at, until

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.at:
            fill(self.folder)
        elif trainer.global_step == self.until:
            (self.folder / "filler").unlink()


def same(path):
    return torch.equal(WholeCheckpointIO().load_checkpoint(path)["state_dict"]["weight"], STATE["state_dict"]["weight"])


def test_what_is_interrupted_leaves_the_checkpoint_before(tmp_path):
    path = tmp_path / "checkpoints" / "last.ckpt"
    WholeCheckpointIO().save_checkpoint(STATE, path)
    with pytest.raises(Interrupted):
        WholeCheckpointIO().save_checkpoint({**STATE, "more": Breaks()}, path)
    assert same(path)
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_what_killed_processes_left_is_removed_and_what_others_write_is_not(tmp_path):
    (tmp_path / ".lit-tokenformer-7.part").write_bytes(b"x")
    (tmp_path / ".video.mp4.part").write_bytes(b"x")  # of another program
    with (tmp_path / ".lit-tokenformer-8.part").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        WholeCheckpointIO().save_checkpoint(STATE, tmp_path / "a.ckpt")
    assert sorted(os.listdir(tmp_path)) == [".lit-tokenformer-8.part", ".video.mp4.part", "a.ckpt"]


def test_a_file_takes_the_place_of_a_sharded_checkpoint(tmp_path):
    (tmp_path / "last.ckpt").mkdir()
    (tmp_path / "last.ckpt" / "shard").write_bytes(b"x")
    with pytest.raises(Interrupted):
        WholeCheckpointIO().save_checkpoint({**STATE, "more": Breaks()}, tmp_path / "last.ckpt")
    assert os.listdir(tmp_path / "last.ckpt") == ["shard"]
    WholeCheckpointIO().save_checkpoint(STATE, tmp_path / "last.ckpt")
    assert same(tmp_path / "last.ckpt")
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_full_disk_keeps_the_checkpoint_before_and_says_so(tmp_path, small_disk):
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"before")
    io = WholeCheckpointIO()
    with pytest.warns(UserWarning, match=r"no space left to save .*last\.ckpt: about 0\.8 MiB needed, .* MiB free"):
        io.save_checkpoint(STATE, path)
    io.remove_checkpoint(path)  # as a ModelCheckpoint does with the one that was replaced
    with pytest.raises(OSError, match="no space left to save"):
        WholeCheckpointIO("stop").save_checkpoint(STATE, path)
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["last.ckpt"]
    io.save_checkpoint({"state_dict": {}}, path)
    io.remove_checkpoint(path)
    assert not path.exists()


def test_errors_other_than_a_full_disk_stop(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"cannot save .*a\.ckpt: (Not a directory|File exists)"):
        WholeCheckpointIO().save_checkpoint(STATE, tmp_path / "file" / "a.ckpt")


def test_pickled_code_is_never_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="ckpt_path: .*evil.ckpt holds pickled code"):
        WholeCheckpointIO().load_checkpoint(tmp_path / "evil.ckpt", weights_only=False)
    assert not (tmp_path / "executed").exists()


def test_the_newest_checkpoint_by_step_of_all_runs_is_found(tmp_path):
    assert last_checkpoint(tmp_path) is None
    places = [
        "lightning_logs/version_0/checkpoints/last.ckpt",
        "hpc_ckpt_1.ckpt",
        "version_1/checkpoints/epoch=3-step=12.ckpt",
        "lightning_logs/version_2/checkpoints/last-v1.ckpt",
    ]
    for step, place in enumerate(places, start=1):
        WholeCheckpointIO().save_checkpoint({**STATE, "global_step": step, "optimizer_states": []}, tmp_path / place)
        os.utime(tmp_path / place, (1000 - step, 1000 - step))
        assert last_checkpoint(tmp_path) == tmp_path / place
    WholeCheckpointIO().save_checkpoint({**STATE, "global_step": 9}, tmp_path / "checkpoints" / "weights.ckpt")
    os.symlink("removed.ckpt", tmp_path / "checkpoints" / "last.ckpt")
    assert last_checkpoint(tmp_path) == tmp_path / places[3]
    for place in (places[3], places[2]):
        data = (tmp_path / place).read_bytes()
        (tmp_path / place).write_bytes(data[: len(data) // 2])
    with pytest.warns(UserWarning, match=r"last-v1\.ckpt is truncated or damaged .*; skipped"):
        assert last_checkpoint(tmp_path) == tmp_path / places[1]


def test_of_checkpoints_saved_in_one_instant_last_is_the_newest(tmp_path):
    for name in ("last", "step=2", "epoch=0"):
        path = tmp_path / "checkpoints" / f"{name}.ckpt"
        WholeCheckpointIO().save_checkpoint({**STATE, "global_step": 2, "optimizer_states": []}, path)
        os.utime(path, (1000, 1000))
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoints" / "last.ckpt"


def test_a_word_that_is_not_known_is_told():
    with pytest.raises(ValueError, match="on_full_disk: unknown value 'wern', did you mean 'warn'"):
        WholeCheckpointIO("wern")


class Scored(LightningModule):
    """A score that rises with each epoch, and a Pattention layer that grows."""

    def __init__(self):
        super().__init__()
        self.layer = Pattention(4, 4, num_tokens=4, kind="qkv")

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).sum()

    def validation_step(self, batch, batch_idx):
        self.log("score", float(self.current_epoch), batch_size=1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class FullAt(WholeCheckpointIO):
    """A disk that is full at some epochs."""

    def __init__(self, *epochs):
        super().__init__()
        self.epochs = epochs

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with pytest.MonkeyPatch.context() as patch:
            if checkpoint["epoch"] in self.epochs:
                patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(full))
            super().save_checkpoint(checkpoint, path, storage_options)


def fit(folder, io, *callbacks, **growth):
    data = DataLoader(TensorDataset(torch.randn(4, 2, 4)), batch_size=2)
    best = ModelCheckpoint(folder, "{epoch}", monitor="score", mode="max", save_last=True)
    summary = RunSummary()
    grows = [ParameterGrowthCallback(**growth)] if growth else []
    trainer = Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        plugins=[io],
        callbacks=[best, summary, *callbacks, PreemptionCheckpoint(), *grows],
    )
    trainer.fit(Scored(), data, data)
    return summary


@pytest.mark.filterwarnings("ignore:no space left")
def test_a_full_disk_removes_no_checkpoint_and_the_fit_saves_again(tmp_path):
    full, _ = tmp_path / "full", fit(tmp_path / "full", FullAt(2, 3))
    assert sorted(os.listdir(full)) == ["epoch=1.ckpt", "last.ckpt", "summary.json"]
    assert torch.load(full / "last.ckpt", weights_only=True)["epoch"] == 1
    again, summary = tmp_path / "again", fit(tmp_path / "again", FullAt(2), schedule={2: {"qkv": 8}})
    assert sorted(os.listdir(again)) == ["epoch=1.ckpt", "epoch=3.ckpt", "last.ckpt", "summary.json"]
    assert torch.load(again / "last.ckpt", weights_only=True)["epoch"] == 3
    assert [os.path.basename(stage["best"]["path"]) for stage in summary.stages] == ["epoch=1.ckpt", "epoch=3.ckpt"]


TINY = [
    *("fit", "--config", "vit_small", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    *("--model.overrides.dim", "16", "--model.overrides.depth", "1", "--model.overrides.num_heads", "2"),
    *("--model.overrides.param_tokens", "4", "--data.num_workers", "0", "--trainer.log_every_n_steps", "1"),
    *("--trainer.limit_train_batches", "4", "--trainer.limit_val_batches", "1", "--trainer.max_epochs", "5"),
]


def fit_that_fills(tmp_path, disk, until, logger):
    fills = {"class_path": "test_checkpoint_io.Fills", "init_args": {"folder": str(disk), "at": 6, "until": until}}
    grows = {"class_path": "callbacks.ParameterGrowthCallback", "init_args": {"schedule": {1: 8}}}
    saved = ("callbacks.TrainingMonitor", "callbacks.RunSummary")
    last = {"filename": "last", "enable_version_counter": False, "every_n_train_steps": 2}
    saves = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": last}
    callbacks = [grows, *({"class_path": name} for name in saved), fills, saves]
    logs = {"class_path": f"lightning.pytorch.loggers.{logger}", "init_args": {"save_dir": str(disk)}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks, "logger": logs}}))
    return main([*TINY, "--config", str(path), "--trainer.default_root_dir", str(disk)])


@pytest.mark.parametrize("logger", ["TensorBoardLogger", "CSVLogger"])
def test_a_disk_without_a_byte_free_does_not_end_a_fit(tmp_path, disk, logger):
    with pytest.warns(UserWarning, match="no space left for the log in .*; the fit continues"):
        assert fit_that_fills(tmp_path, disk, 15, logger) == 0
    run = disk / "lightning_logs" / "version_0"
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 20
    assert json.loads((run / "summary.json").read_text())["stages"][-1]["steps"] == 16
    if logger == "CSVLogger":
        logged = {int(row["step"]) for row in csv.DictReader((run / "metrics.csv").open()) if row["train/loss"]}
        assert logged == {*range(20)}  # nothing is lost
    else:
        events = EventAccumulator(str(run)).Reload().Scalars("train/loss")
        assert {event.step for event in events} >= {0, 1, 2, 3, 18, 19}


def test_a_disk_that_stays_full_leaves_the_checkpoint_before_and_prints_the_summary(tmp_path, disk, capsys):
    with pytest.warns(UserWarning, match=r"cannot write summary\.json"):
        assert fit_that_fills(tmp_path, disk, None, "CSVLogger") == 0
    assert "Run summary" in capsys.readouterr().out
    run = disk / "lightning_logs" / "version_0"
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4
    assert not list(run.glob("**/*.part"))


def test_a_start_on_a_full_disk_is_refused_in_one_line(tmp_path, disk, capsys):
    fill(disk)
    start = [*TINY, "--trainer.max_epochs", "30"]  # its schedule ends before
    assert main([*start, "--trainer.default_root_dir", str(disk)]) == 2
    logger = ("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(disk))
    assert main([*start, "--trainer.default_root_dir", str(tmp_path), *logger]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"error: trainer.default_root_dir: cannot write to {disk} (No space left on device)"
    assert second == f"error: trainer.logger: save_dir: cannot write to {disk} (No space left on device)"
    assert os.listdir(disk) == ["filler"]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_find_no_place_are_an_error_of_the_disk(disk, name):
    fill(disk)
    with pytest.raises(OSError, match="No space left on device"):  # which a command reports in one line
        write_tensors(STATE["state_dict"], disk / name)


class NotFinite(Callback):
    """Makes a weight, or a number in the optimizer's state, not finite at an epoch."""

    def __init__(self, epoch, of):
        self.epoch, self.of = epoch, of

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            weight = pl_module.layer.key_tokens
            tensor = weight if self.of == "weights" else trainer.optimizers[0].state[weight]["momentum_buffer"]
            tensor.data[0, 0] = math.inf if self.of == "weights" else math.nan


@pytest.mark.parametrize("of", ["weights", "optimizer"])
def test_a_state_that_is_not_finite_never_becomes_a_checkpoint(tmp_path, of):
    last = ModelCheckpoint(tmp_path, "last", enable_version_counter=False)
    with pytest.warns(
        UserWarning, match=r"non-finite layer\.key_tokens at step 6: .*last\.ckpt is not saved, and earlier check"
    ):
        fit(tmp_path, WholeCheckpointIO(), NotFinite(2, of), last)
    assert sorted(os.listdir(tmp_path)) == ["epoch=1.ckpt", "last.ckpt", "summary.json"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4


def test_a_buffer_may_be_infinite(tmp_path):
    class Masked(Callback):
        def setup(self, trainer, pl_module, stage):
            pl_module.register_buffer("mask", torch.full((2,), -math.inf))

    fit(tmp_path, WholeCheckpointIO(), Masked())
    assert "epoch=3.ckpt" in os.listdir(tmp_path)


def test_a_state_that_is_not_finite_ends_the_fit_with_another_checkpoint_io(tmp_path):
    with pytest.raises(FloatingPointError, match="non-finite layer.key_tokens at step 6"):
        fit(tmp_path, TorchCheckpointIO(), NotFinite(2, "weights"))


def test_a_start_clears_what_killed_processes_left(tmp_path, few_digits):
    places = [tmp_path, tmp_path / "checkpoints", tmp_path / "lightning_logs" / "version_0" / "checkpoints"]
    for place in places:
        (place / "last.ckpt.part").mkdir(parents=True)
        (place / "last.ckpt.part" / "__0_0.distcp").write_bytes(b"x")
        (place / ".lit-tokenformer-7.part").write_bytes(b"x")
        (place / ".video.mp4.part").write_bytes(b"x")  # of another program
    with (places[2] / ".lit-tokenformer-8.part").open("wb") as other:  # of a run that is saving
        fcntl.flock(other, fcntl.LOCK_EX)
        assert (
            main(
                [
                    *TINY,
                    "--trainer.default_root_dir",
                    str(tmp_path),
                    "--trainer.max_steps",
                    "1",
                    "--trainer.callbacks",
                    "null",
                ]
            )
            == 0
        )
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.part")}
    assert left == {
        *(f"{place.relative_to(tmp_path).as_posix()}/.video.mp4.part".removeprefix("./") for place in places),
        "lightning_logs/version_0/checkpoints/.lit-tokenformer-8.part",
    }


def test_the_command_line_writes_whole_checkpoints_and_takes_the_setting(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Trainer, "fit", lambda self, *_, **__: seen.append(self.strategy.checkpoint_io))
    fit = ["fit", "--config", "vit_small", "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path)]
    assert main(fit) == 0
    plugin = tmp_path / "plugin.yaml"
    name = "lit_tokenformer.checkpoints.checkpoint_io.WholeCheckpointIO"
    plugin.write_text(f"trainer: {{plugins: [{{class_path: {name}, init_args: {{on_full_disk: stop}}}}]}}")
    assert main([*fit, "--config", str(plugin)]) == 0
    assert [io.on_full_disk for io in seen] == ["warn", "stop"]
