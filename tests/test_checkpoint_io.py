"""A checkpoint is there whole or not at all; a full disk stops a fit or is told; the newest whole one is found."""

import errno
import fcntl
import os
import pickle
import resource

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from callbacks import ParameterGrowthCallback, RunSummary
from lit_tokenformer.checkpoint_io import WholeCheckpointIO, last_checkpoint
from lit_tokenformer.cli import main
from lit_tokenformer.models import Pattention
from lit_tokenformer.trainer import CheckpointingTrainer

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
        return torch.optim.SGD(self.parameters(), lr=0.1)


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


def fit(folder, io, **growth):
    data = DataLoader(TensorDataset(torch.randn(4, 2, 4)), batch_size=2)
    best = ModelCheckpoint(folder, "{epoch}", monitor="score", mode="max", save_last=True)
    summary = RunSummary()
    trainer = CheckpointingTrainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        plugins=[io],
        callbacks=[best, summary, *([ParameterGrowthCallback(**growth)] if growth else [])],
    )
    trainer.fit(Scored(), data, data)
    return best, summary


@pytest.mark.filterwarnings("ignore:no space left")
def test_a_fit_knows_the_best_checkpoint_that_is_on_the_disk(tmp_path):
    best, _ = fit(tmp_path / "a", FullAt(2, 3))
    assert sorted(os.listdir(tmp_path / "a")) == ["epoch=1.ckpt", "last.ckpt", "summary.json"]
    assert (best.best_model_path, float(best.best_model_score)) == (str(tmp_path / "a" / "epoch=1.ckpt"), 1)
    assert torch.load(best.last_model_path, weights_only=True)["epoch"] == 1
    best, _ = fit(tmp_path / "b", FullAt(2))
    assert best.best_model_path == str(tmp_path / "b" / "epoch=3.ckpt")
    assert sorted(os.listdir(tmp_path / "b")) == ["epoch=3.ckpt", "last.ckpt", "summary.json"]


@pytest.mark.filterwarnings("ignore:no space left")
def test_full_disk_after_a_growth_does_not_bring_back_scores_of_the_size_before(tmp_path):
    best, summary = fit(tmp_path, FullAt(2), schedule={2: {"qkv": 8}})
    assert float(best.best_model_score) == 3
    assert [os.path.basename(stage["best"]["path"]) for stage in summary.stages] == ["epoch=1.ckpt", "epoch=3.ckpt"]
    assert sorted(os.listdir(tmp_path)) == ["epoch=1.ckpt", "epoch=3.ckpt", "last.ckpt", "summary.json"]


def test_the_command_line_writes_whole_checkpoints_and_takes_the_setting(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(CheckpointingTrainer, "fit", lambda self, *_, **__: seen.append(self.strategy.checkpoint_io))
    fit = ["fit", "--config", "vit_small", "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path)]
    assert main(fit) == 0
    plugin = tmp_path / "plugin.yaml"
    name = "lit_tokenformer.checkpoint_io.WholeCheckpointIO"
    plugin.write_text(f"trainer: {{plugins: [{{class_path: {name}, init_args: {{on_full_disk: stop}}}}]}}")
    assert main([*fit, "--config", str(plugin)]) == 0
    assert [io.on_full_disk for io in seen] == ["warn", "stop"]
