"""``--ckpt_path last`` resumes this experiment wherever it was saved, and no other; runs in one folder stay apart."""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from torch.utils.data import DataLoader, TensorDataset

from lit_tokenformer.checkpoints.run_folder import claim_log_folder, unversioned_loggers, write_new
from lit_tokenformer.cli.main import main
from lit_tokenformer.cli.run_identity import RUN, RunIdentity
from lit_tokenformer.models import Pattention

trained = []
"""Optimizer steps that the fit under way took."""


class Toy(LightningModule):
    def __init__(self, width: int = 8, optimizer_lr: float = 0.1):
        super().__init__()
        self.save_hyperparameters()
        self.layer = Pattention(8, width, 4, kind="ffn")

    def on_fit_start(self):
        trained.clear()

    def training_step(self, batch, batch_idx):
        trained.append(self.global_step)
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", 1.0)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.optimizer_lr)


class Other(Toy):
    pass


class ToyData(LightningDataModule):
    def __init__(self, samples: int = 8, num_workers: int = 0):
        super().__init__()
        self.samples = samples

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(self.samples, 8)), 4)

    def val_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(4, 8)), 4)


class SharedFolderLogger(Logger):
    """As those of W&B and MLflow: no ``log_dir``, and a version that each run draws."""

    def __init__(self, save_dir: str):
        super().__init__()
        self._save_dir, self._version = save_dir, f"id{len(os.listdir(save_dir)) if os.path.isdir(save_dir) else 0}"

    name = property(lambda self: ".")
    version = property(lambda self: self._version)
    save_dir = property(lambda self: self._save_dir)
    experiment = None

    def log_metrics(self, metrics, step=None): ...

    def log_hyperparams(self, params, *args, **kwargs): ...


def callback(kind, **settings):
    return {"class_path": kind if "." in kind else f"lightning.pytorch.callbacks.{kind}", "init_args": settings}


def logger(kind, **settings):
    return callback(kind if "." in kind else f"lightning.pytorch.loggers.{kind}", **settings)


def run(folder, *args, command="fit", callbacks=(), last=True, logger=False, model="Toy", **trainer):
    """Runs a command of 2 steps an epoch in this process; returns its exit status."""
    config = {
        "trainer": {
            **{"accelerator": "cpu", "devices": 1, "max_epochs": 1, "default_root_dir": str(folder), "logger": logger},
            **{"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0},
            "callbacks": [*(callbacks or [callback("ModelCheckpoint", save_last=True)])],
            **trainer,
        }
    }
    path = Path(os.environ["TOY_CONFIG"])
    path.write_text(yaml.safe_dump(config))
    parts = ["--model", f"test_run_identity.{model}", "--data", "test_run_identity.ToyData"]
    given = ["--config", path, *parts, *(["--ckpt_path", "last"] if last else []), *args]
    return main([command, *map(str, given)])


@pytest.fixture(autouse=True)
def toy(tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_CONFIG", str(tmp_path / "toy.yaml"))
    return tmp_path


@pytest.fixture
def runs(tmp_path, caplog):
    """A folder with a run of one epoch."""
    caplog.set_level("INFO")
    assert run(tmp_path / "runs") == 0
    assert trained == [0, 1]
    assert "Starting fresh: no checkpoint in" in caplog.text
    caplog.clear()
    return tmp_path / "runs"


OTHERS = {
    "seed": (["--seed_everything", 1], {}, r"seed_everything \(0 there, 1 here\)"),
    "model": ([], {"model": "Other"}, r"model \('test_run_identity.Toy' there, 'test_run_identity.Other' here\)"),
    "width": (["--model.width", 4], {}, r"model.width \(8 there, 4 here\)"),
    "data": (["--data.samples", 12], {}, r"data.samples \(8 there, 12 here\)"),
    "accumulation": ([], {"accumulate_grad_batches": 2}, r"trainer.accumulate_grad_batches \(1 there, 2 here\)"),
    "growth": (
        *([], {"callbacks": [callback("callbacks.ParameterGrowthCallback", schedule={})]}),
        r"trainer.callbacks \(\[\] there, \['ParameterGrowthCallback'\] here\)",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_experiment_starts_fresh_and_is_told_what_differs(case, runs, caplog):
    args, settings, differs = OTHERS[case]
    assert run(runs, *args, **settings) == 0
    assert trained[0] == 0
    (told,) = [line for line in caplog.messages if line.startswith("Starting fresh: none of ")]
    assert os.path.join(runs, "checkpoints") in told
    assert re.search(differs, told)


def test_what_a_requeue_changes_is_the_same_experiment(runs, caplog):
    kept = callback("ModelCheckpoint", save_last=True, dirpath=str(runs / "elsewhere"))
    more = [kept, callback("callbacks.RunSummary"), callback("EarlyStopping", monitor="val/loss", patience=9)]
    settings = {"strategy": "ddp", "detect_anomaly": True, "max_epochs": 2, "max_time": "00:01:00:00"}
    assert run(runs, "--data.num_workers", 1, callbacks=more, **settings) == 0
    assert trained == [2, 3]
    (told,) = [line for line in caplog.messages if line.startswith("Resuming from ")]
    assert told == f"Resuming from {runs / 'checkpoints' / 'last.ckpt'} (epoch 0, step 2)"


def test_a_run_name_takes_the_place_of_the_settings(tmp_path, caplog):
    caplog.set_level("INFO")
    assert run(tmp_path, "--run_name", "a") == 0
    assert run(tmp_path, "--run_name", "b", max_epochs=2) == 0
    assert trained == [0, 1, 2, 3]
    assert "run_name ('a' there, 'b' here)" in caplog.text
    assert run(tmp_path, max_epochs=3) == 0
    assert trained[0] == 0  # without a name it is another run
    assert run(tmp_path, "--run_name", "a", "--seed_everything", 5, max_epochs=4) == 0
    assert trained == [2, 3, 4, 5, 6, 7]
    assert "changed since: seed_everything (0 there, 5 here)" in caplog.text


PLACES = {
    "csv": lambda folder: {"logger": logger("CSVLogger", save_dir=f"{folder}/csv")},
    "csv_one_folder_off": lambda folder: {"logger": logger("CSVLogger", save_dir=f"{folder}/logs/csv", name="a/b")},
    "tensorboard_without_name": lambda folder: {"logger": logger("TensorBoardLogger", save_dir=folder, name="")},
    "tensorboard_version": lambda folder: {"logger": logger("TensorBoardLogger", save_dir=folder, version="one")},
    "wandb": lambda folder: {"logger": logger("test_run_identity.SharedFolderLogger", save_dir=f"{folder}/shared")},
    "dirpath": lambda folder: {"callbacks": [callback("ModelCheckpoint", dirpath=f"{folder}/kept", save_last=True)]},
    "no_save_last": lambda folder: {"callbacks": [callback("ModelCheckpoint")]},
    "home": lambda folder: {"default_root_dir": "~/runs"},
    "url": lambda folder: {"default_root_dir": f"memory://{folder}"},
}


@pytest.mark.parametrize("place", PLACES)
def test_last_is_found_where_the_run_saves(place, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    caplog.set_level("INFO")
    for epochs in (1, 2):
        settings = PLACES[place](str(tmp_path / "place"))
        assert run(tmp_path / "runs", max_epochs=epochs, **settings) == 0
        assert trained == [2 * epochs - 2, 2 * epochs - 1], caplog.text
    assert "(epoch 0, step 2)" in caplog.text


def test_an_explicit_url_is_resumed(tmp_path):
    folder = f"memory://{tmp_path}/explicit"
    assert run(folder) == 0
    assert run(folder, "--ckpt_path", f"{folder}/checkpoints/last.ckpt", last=False, max_epochs=2) == 0
    assert trained == [2, 3]


def without_identity(path):
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint.pop(RUN)["settings"]["data.samples"] == 8
    torch.save(checkpoint, path)


def test_checkpoints_saved_before_there_were_identities_resume_where_the_model_agrees(runs, caplog):
    for path in sorted((runs / "checkpoints").iterdir()):  # last.ckpt is the newest, as a run leaves it
        without_identity(path)
    assert run(runs, "--model.width", 4) == 0
    assert trained == [0, 1] and "model.width (8 there, 4 here)" in caplog.text
    for path in (runs / "checkpoints").glob("*v1.ckpt"):  # of the run with the other width, which has one
        path.unlink()
    assert run(runs, max_epochs=2) == 0
    assert trained == [2, 3]
    assert "step 2, saved without a run identity: hyper-parameters and tensor shapes agree)" in caplog.text
    (runs / "checkpoints" / "old.ckpt").write_bytes((runs / "checkpoints" / "last.ckpt").read_bytes())
    without_identity(runs / "checkpoints" / "old.ckpt")
    assert run(runs, "--seed_everything", 2) == 0
    assert trained == [0, 1]  # they count only where no checkpoint has an identity


def test_validate_takes_the_last_checkpoint_of_this_experiment(runs, caplog, capsys):
    assert run(runs, command="validate") == 0
    assert f"Loading {runs / 'checkpoints' / 'last.ckpt'} (epoch 0, step 2)" in caplog.text
    assert run(runs, "--seed_everything", 1, command="validate") == 2
    assert "error: ckpt_path: no last checkpoint (none of " in capsys.readouterr().err


def test_slurm_resumes_by_itself_only_what_is_of_this_experiment(runs, monkeypatch):
    os.rename(runs / "checkpoints" / "last.ckpt", runs / "hpc_ckpt_1.ckpt")
    names = {"NTASKS": 1, "JOB_ID": 17, "PROCID": 0, "LOCALID": 0, "NODEID": 0, "JOB_NAME": "job"}
    for name, value in names.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    assert run(runs, "--seed_everything", 1, last=False, max_epochs=2) == 0
    assert trained == [0, 1, 2, 3]
    assert run(runs, last=False, max_epochs=2) == 0
    assert trained == [2, 3]


def test_the_first_process_chooses_for_all():
    class Identity(RunIdentity):
        def _find(self, trainer, pl_module):
            raise AssertionError("another process looked for itself")

    strategy = SimpleNamespace(broadcast=lambda mine: ("chosen.ckpt", "step 3") if mine == (None, "") else None)
    state = SimpleNamespace(fn="fit")
    trainer = SimpleNamespace(is_global_zero=False, strategy=strategy, state=state, fast_dev_run=False)
    assert Identity({})._choose(trainer, None) == "chosen.ckpt"


def test_other_processes_may_share_the_batch_of_a_step_differently():
    identity = RunIdentity({"trainer.accumulate_grad_batches": 2, "data.image.batch_size": 4, "data.seed": 0})
    saved = {"trainer.accumulate_grad_batches": 1, "data.image.batch_size": 2, "data.seed": 0}
    assert identity.differences({"settings": saved, "world_size": 4}) == []
    assert len(identity.differences({"settings": saved, "world_size": 1})) == 2
    assert len(identity.differences({"settings": {**saved, "data.seed": 1}, "world_size": 4})) == 1


def test_settings_of_another_version_do_not_make_another_experiment():
    identity = RunIdentity({"model": "A", "model.new": 1, "model.dim": 8})
    assert identity.differences({"settings": {"model": "A", "model.dim": 8, "model.old": 2}}) == []
    assert identity.differences({"settings": {"model": "A", "model.dim": 9}}) == ["model.dim (9 there, 8 here)"]
    assert identity.differences({"settings": None}) == ["its settings are damaged"]


def test_fast_dev_run_reads_and_writes_nothing(runs, caplog):
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    callbacks = [callback("ModelCheckpoint", save_last=True), callback("callbacks.RunSummary")]
    assert run(runs, callbacks=callbacks, fast_dev_run=True) == 0
    assert trained == [0]
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == before


def test_max_time_is_that_of_each_job(tmp_path):
    assert run(tmp_path, max_time="00:01:00:00") == 0
    for path in (tmp_path / "checkpoints").iterdir():
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["callbacks"]["Timer"]["time_elapsed"]["train"] = 7200.0
        torch.save(checkpoint, path)
    assert run(tmp_path, max_time="00:01:00:00", max_epochs=2) == 0
    assert trained == [2, 3]


def test_a_fit_that_early_stopping_ended_is_not_trained_further(tmp_path, caplog):
    def start(patience):
        stopping = callback("EarlyStopping", monitor="val/loss", patience=patience)
        return run(tmp_path, callbacks=[stopping, callback("ModelCheckpoint", save_last=True)], max_epochs=9)

    assert start(2) == 0
    assert trained[-1] == 5
    for _ in range(2):
        assert start(2) == 0
        assert trained == []
        told = [line for line in caplog.messages if line.startswith("Nothing left to train after step 6 of ")][-1]
        assert "EarlyStopping of val/loss ended it" in told and told.endswith("; raise its patience to continue")
        caplog.clear()
    assert start(4) == 0
    assert trained == [6, 7, 8, 9]


def test_a_fit_at_its_end_says_what_to_raise(runs, caplog, capsys):
    assert run(runs) == 0
    assert trained == [] and "trainer.max_epochs: 1 reached; raise it to continue" in caplog.text
    assert run(runs, max_epochs=-1, max_steps=2) == 0
    assert trained == [] and "trainer.max_steps: 2 reached; raise it to continue" in caplog.text
    assert run(runs, max_epochs=0) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: trainer.max_epochs: ")


def test_runs_in_one_folder_keep_each_others_config_and_summary(tmp_path):
    callbacks = [callback("callbacks.RunSummary"), callback("ModelCheckpoint", save_last=True)]
    settings = {"callbacks": callbacks, "logger": logger("CSVLogger", save_dir=str(tmp_path), name="", version=0)}
    for seed in (0, 1):
        assert run(tmp_path, "--seed_everything", seed, last=False, **settings) == 0
    folder = tmp_path / "version_0"
    seeds = [
        yaml.safe_load((folder / name).read_text())["seed_everything"] for name in ("config.yaml", "config-v1.yaml")
    ]
    assert seeds == [0, 1]
    found = [json.loads((folder / name).read_text()) for name in ("summary.json", "summary-v1.json")]
    assert found[0]["run"] != found[1]["run"]
    forked = tmp_path / "forked.ckpt"
    forked.write_bytes((folder / "checkpoints" / "last.ckpt").read_bytes())
    for epochs in (2, 3):  # the first run counts on, so its summary is replaced
        assert run(tmp_path, max_epochs=epochs, **settings) == 0
        assert json.loads((folder / "summary.json").read_text())["stages"][0]["steps"] == 2 * epochs
    assert sorted(path.name for path in folder.glob("summary*")) == ["summary-v1.json", "summary.json"]
    assert run(tmp_path, "--ckpt_path", forked, last=False, max_epochs=2, **settings) == 0
    assert json.loads((folder / "summary.json").read_text())["stages"][0]["steps"] == 6  # another way from step 2
    assert (folder / "summary-v2.json").exists()


def test_loggers_without_a_folder_of_their_own_keep_runs_apart(tmp_path):
    for seed in (0, 1):
        settings = {"callbacks": [callback("callbacks.RunSummary"), callback("ModelCheckpoint")]}
        shared = logger("test_run_identity.SharedFolderLogger", save_dir=str(tmp_path / "shared"))
        assert run(tmp_path, "--seed_everything", seed, logger=shared, **settings) == 0
    for name in ("id0", "id1"):
        assert {"config.yaml", "summary.json", "checkpoints"} <= {*os.listdir(tmp_path / "shared" / name)}


class FailsLate(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        raise RuntimeError(f"what went wrong at {batch_idx}")


def test_the_error_of_a_run_is_logged_in_its_own_folder(tmp_path):
    shared = logger("test_run_identity.SharedFolderLogger", save_dir=str(tmp_path / "shared"))
    assert run(tmp_path, logger=shared, callbacks=[callback("test_run_identity.FailsLate")]) == 1
    assert [*tmp_path.rglob("rank_0.log")] == [tmp_path / "shared" / "id0" / "errors" / "rank_0.log"]


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_runs_that_start_at_once_take_different_folders(kind, tmp_path):
    trainers = [Trainer(logger=kind(tmp_path), accelerator="cpu", default_root_dir=tmp_path) for _ in range(3)]
    loggers = [unversioned_loggers(trainer) for trainer in trainers]
    assert {one.version for (one,) in loggers} == {0}  # each saw that no folder is there
    for trainer, own in zip(trainers, loggers, strict=True):
        claim_log_folder(trainer, own)
    assert [trainer.logger.version for trainer in trainers] == [0, 1, 2]
    fixed = Trainer(logger=kind(tmp_path, version=1), accelerator="cpu", default_root_dir=tmp_path)
    assert unversioned_loggers(fixed) == []


def test_a_new_file_never_takes_the_place_of_another(tmp_path):
    for text in ("a", "b", "b"):
        write_new(str(tmp_path), "x.yaml", text)
    write_new(str(tmp_path), "x.yaml", "c", replaces="b".__eq__)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"x.yaml": "a", "x-v1.yaml": "c"}
