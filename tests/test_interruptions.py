"""A fit that is asked to make room saves a checkpoint, ends, and goes on bit for bit; errors are written down."""

import contextlib
import errno
import json
import os
import pty
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks import ErrorLog, GrowingEMA, ParameterGrowthCallback, PreemptionCheckpoint
from lit_tokenformer.checkpoints.checkpoint_io import WholeCheckpointIO, last_checkpoint
from lit_tokenformer.data import ImageDataModule, Tokenizer, token_cache
from lit_tokenformer.tasks import LitImageClassifier, LRSchedule

pytestmark = pytest.mark.usefixtures("few_digits")  # 8 batches of 16

ROOT = Path(__file__).parents[1]
TINY = {"dim": 16, "depth": 1, "num_heads": 2, "patch_size": 4, "param_tokens": 4}


class Signals(Callback):
    """Sends a signal in the midst of a training step or of a validation."""

    def __init__(self, number, step=None, validation=None, batch=0):
        self.number, self.step, self.validation, self.batch = number, step, validation, batch
        self.validated = []

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if trainer.global_step == self.validation and batch_idx == self.batch:
            os.kill(os.getpid(), self.number)

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.validated.append((trainer.global_step, float(trainer.callback_metrics["val/loss"])))


class Waits(Callback):
    """In step 4, lets the test know, and waits for what it sends."""

    def __init__(self, folder, until):
        self.folder, self.until = folder, until

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_step == 4:
            (self.folder / "waiting").touch()
            while not self.until():
                time.sleep(0.01)


class Ends(Callback):
    """Ends the fit after five steps, as early stopping does."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step == 5


class Breaks(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 3:
            raise KeyError("what went wrong")


def fit(folder, *callbacks, ckpt_path=None, **trainer):
    """Two epochs of eight steps with a growth and a moving average; a checkpoint of every second step."""
    seed_everything(1 if ckpt_path is None else 99)
    task = LitImageClassifier(
        "tokenformer_vit_tiny_patch16_224",
        num_classes=10,
        image_size=8,
        overrides={**TINY, "drop_path": 0.1},
        schedule=LRSchedule("cosine", warmup=1),
    )
    settings = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "default_root_dir": folder}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False}
    growing = [ParameterGrowthCallback({1: 8}), GrowingEMA(decay=0.9)]
    fit = Trainer(**{**settings, **trainer}, callbacks=[*growing, *callbacks])
    data = ImageDataModule("digits", batch_size=16, eval_batch_size=12, seed=3, num_workers=0)
    try:
        fit.fit(task, data, ckpt_path=ckpt_path, weights_only=True)
    except SIGTERMException:
        fit.interrupted_at = fit.global_step
    moments = [tensor for state in fit.optimizers[0].state.values() for tensor in state.values()]
    fit.found = [*task.state_dict().values(), *moments]
    return fit


@pytest.fixture(scope="module")
def whole(few_digits, tmp_path_factory):
    """The fit that is not interrupted, and its validations."""
    validated = Signals(signal.SIGTERM)
    return fit(tmp_path_factory.mktemp("whole"), validated, enable_checkpointing=False), validated.validated


CASES = {
    "mid-epoch": {"step": 4},
    "last batch of an epoch": {"step": 7},
    "first batch after a growth": {"step": 8},
    "validation": {"validation": 8},
    "last batch of a validation": {"validation": 8, "batch": 2},
    "last batch": {"step": 15},
}


@pytest.mark.parametrize("case", CASES)
def test_sigterm_saves_and_the_fit_goes_on_bit_for_bit(tmp_path, whole, case):
    before, after = Signals(signal.SIGTERM, **CASES[case]), Signals(signal.SIGTERM)
    stopped = fit(tmp_path, before, PreemptionCheckpoint(), enable_checkpointing=False)
    assert stopped.interrupted_at == CASES[case].get("validation", CASES[case].get("step", 0) + 1)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    path = last_checkpoint(tmp_path)
    resumed = fit(tmp_path, after, PreemptionCheckpoint(), ckpt_path=path, enable_checkpointing=False)
    assert resumed.global_step == 16
    assert len(resumed.found) == len(whole[0].found)
    assert all(map(torch.equal, resumed.found, whole[0].found))
    assert before.validated + after.validated == whole[1]


def test_sigusr1_without_slurm_does_the_same_beside_other_checkpoints(tmp_path, whole):
    def saves():
        return ModelCheckpoint(tmp_path / "kept", "{step}", every_n_train_steps=2, save_last=True)

    fit(tmp_path, Signals(signal.SIGUSR1, step=4), PreemptionCheckpoint(), saves())
    path = tmp_path / "kept" / "last.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == 5
    assert sorted(os.listdir(tmp_path / "kept")) == ["last.ckpt", "step=4.ckpt"]
    resumed = fit(tmp_path, PreemptionCheckpoint(), saves(), ckpt_path=path)
    assert all(map(torch.equal, resumed.found, whole[0].found))


def test_a_normal_end_saves_the_last_steps(tmp_path, whole):
    every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=6, save_last=True)
    fit(tmp_path, PreemptionCheckpoint(), every)
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "step=12.ckpt"]
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert last["global_step"] == 16
    expected = whole[0].lightning_module.state_dict()
    assert all(torch.equal(last["state_dict"][name], tensor) for name, tensor in expected.items())
    assert fit(tmp_path, PreemptionCheckpoint(), ckpt_path=tmp_path / "last.ckpt").global_step == 16


def test_a_fit_that_ends_before_its_first_validation_saves_and_goes_on_bit_for_bit(tmp_path, whole):
    best = ModelCheckpoint(tmp_path, monitor="val/loss")
    fit(tmp_path, Ends(), PreemptionCheckpoint(), best, limit_val_batches=0)
    assert os.listdir(tmp_path) == ["last.ckpt"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 5
    resumed = fit(tmp_path, PreemptionCheckpoint(), ckpt_path=tmp_path / "last.ckpt", enable_checkpointing=False)
    assert resumed.global_step == 16
    assert all(map(torch.equal, resumed.found, whole[0].found))


@pytest.mark.parametrize("settings", [{"fast_dev_run": 3}, {"enable_checkpointing": False, "max_steps": 3}])
def test_a_fit_that_is_to_save_nothing_writes_nothing(tmp_path, settings):
    fit(tmp_path, PreemptionCheckpoint(), **settings)
    assert os.listdir(tmp_path) == []
    fit(tmp_path, Signals(signal.SIGTERM, step=1), PreemptionCheckpoint(), fast_dev_run=3)
    assert os.listdir(tmp_path) == []


def test_checkpoints_of_improved_scores_alone_are_warned_of(tmp_path):
    best = {"dirpath": tmp_path, "monitor": "val/loss", "save_last": True}
    with pytest.warns(UserWarning, match="trainer.callbacks: checkpoints are saved only when 'val/loss' improves"):
        fit(tmp_path, PreemptionCheckpoint(), ModelCheckpoint(**best), max_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "trainer.callbacks")
        last = ModelCheckpoint(tmp_path, "last", enable_version_counter=False)
        fit(tmp_path, PreemptionCheckpoint(), ModelCheckpoint(**best), last, max_steps=1)


def in_child(work, *args, fork=os.fork):
    """Starts some work in another process, which ends with the status that it returns."""
    child = fork()
    pid, terminal = child if isinstance(child, tuple) else (child, None)
    if not pid:
        status = 1
        try:
            status = work(*args)
        finally:
            os._exit(status)
    return pid if terminal is None else (pid, terminal)


def status_of(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_until(condition, seconds=600):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def fit_that_waits(folder, **settings):
    preemption = PreemptionCheckpoint()
    waits = Waits(folder, lambda: preemption._asked)
    stopped = fit(folder, waits, preemption, enable_checkpointing=False, **settings)
    return preemption.status if stopped.interrupted_at == 5 else 1


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGHUP", 129), ("SIGTERM", 143), ("SIGUSR1", 143)])
def test_a_signal_from_outside_saves_once_and_the_fit_goes_on_bit_for_bit(tmp_path, whole, name, status):
    pid = in_child(fit_that_waits, tmp_path)
    wait_until((tmp_path / "waiting").exists)
    os.kill(pid, getattr(signal, name))
    assert status_of(pid) == status
    assert os.listdir(tmp_path / "checkpoints") == ["last.ckpt"]
    resumed = fit(tmp_path, ckpt_path=last_checkpoint(tmp_path), enable_checkpointing=False)
    assert all(map(torch.equal, resumed.found, whole[0].found))


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    def catches(number):
        (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
        return int(line.split()[1], 16) >> (number - 1) & 1

    pid = in_child(lambda: fit(tmp_path, Waits(tmp_path, lambda: False), PreemptionCheckpoint()) and 0)
    wait_until((tmp_path / "waiting").exists)
    assert catches(signal.SIGINT)
    os.kill(pid, signal.SIGINT)
    wait_until(lambda: not catches(signal.SIGINT))  # the first one is taken, and the step waits for something
    os.kill(pid, signal.SIGINT)
    assert status_of(pid) == -signal.SIGINT


def test_a_terminal_that_is_closed_ends_with_a_checkpoint(tmp_path):
    pid, terminal = in_child(lambda: fit_that_waits(tmp_path, enable_progress_bar=True), fork=pty.fork)
    os.set_blocking(terminal, False)

    def waits():
        with contextlib.suppress(BlockingIOError):
            os.read(terminal, 2**16)  # else the process waits for a reader
        return (tmp_path / "waiting").exists()

    wait_until(waits)
    os.close(terminal)
    assert status_of(pid) == 129
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 5


def test_what_is_ignored_or_handled_by_the_user_stays_so(tmp_path):
    seen = []
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGINT)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
        signal.signal(signal.SIGINT, lambda *_: seen.append(1))
        for number in before:
            assert fit(tmp_path, Signals(number, step=2), PreemptionCheckpoint()).global_step == 16
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert seen == [1]


def test_a_checkpoint_that_found_no_place_is_not_said_to_be_saved(tmp_path, monkeypatch, caplog):
    def full_disk(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    io = WholeCheckpointIO()
    monkeypatch.setattr(torch, "save", full_disk)
    with caplog.at_level("INFO"), pytest.warns(UserWarning, match="no space left"):
        fit(tmp_path, Signals(signal.SIGTERM, step=4), PreemptionCheckpoint(), plugins=[io], enable_checkpointing=False)
    assert "Interrupted at epoch 0, step 5: no checkpoint saved" in caplog.text


def test_slurm_requeues_and_the_job_goes_on_by_itself(tmp_path, whole, monkeypatch):
    names = {"NTASKS": 1, "JOB_ID": 17, "PROCID": 0, "LOCALID": 0, "NODEID": 0, "JOB_NAME": "job"}
    for name, value in names.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    runs = tmp_path / "runs"

    def start(*callbacks):
        return fit(runs, *callbacks, PreemptionCheckpoint(), plugins=[SLURMEnvironment()], enable_checkpointing=False)

    assert start(Signals(signal.SIGUSR1, step=9)).interrupted_at == 10
    assert (tmp_path / "asked").read_text() == "requeue 17\n"
    assert last_checkpoint(runs) == runs / "hpc_ckpt_1.ckpt"
    resumed = start()  # Lightning finds its checkpoint without being told
    assert resumed.global_step == 16
    assert all(map(torch.equal, resumed.found, whole[0].found))


def test_the_error_of_a_process_is_written_down(tmp_path):
    with pytest.raises(KeyError):
        fit(tmp_path, Breaks(), ErrorLog(), enable_checkpointing=False)
    text = (tmp_path / "errors" / "rank_0.log").read_text()
    assert "process 0 of 1 on " in text and ", epoch 0, step 4\n" in text
    assert text.rstrip().endswith("KeyError: 'what went wrong'")
    assert Path(__file__).name in text


def test_a_cache_whose_process_was_killed_is_made_anew(tmp_path):
    def documents():
        yield from [("train", "one"), ("val", "two"), ("test", "three")] * 50

    def make():
        return token_cache.open_or_build(tmp_path, "corpus", documents, Tokenizer.bytes(), None)

    child = os.fork()
    if not child:
        written = []
        write = token_cache._write

        def counted(file, ids):
            written.append(ids)
            if len(written) == 100:
                os.kill(os.getpid(), signal.SIGKILL)
            write(file, ids)

        token_cache._write = counted
        make()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert token_cache.open_cache(tmp_path / "tokens" / "corpus") is None
    assert make().total.documents == 150
    assert {path.name for path in (tmp_path / "tokens").iterdir()} == {"corpus", "corpus.lock"}


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory):
    """What became of two processes under DDP: exit statuses and seconds of each scenario, and their folder."""
    folder = tmp_path_factory.mktemp("scenarios")
    run_script("tests/fault_scenarios.py", folder)
    return json.loads((folder / "found.json").read_text()), folder


def run_script(*args):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_a_signal_to_one_process_ends_both_and_they_go_on_bit_for_bit(scenarios):
    found, folder = scenarios
    assert found["sigterm to one"]["statuses"] == found["sigusr1 to the first"]["statuses"] == [143, 143]
    for name in ("sigterm to one", "sigusr1 to the first"):
        checkpoint = torch.load(folder / name / "checkpoints" / "last.ckpt", weights_only=True)
        assert checkpoint["global_step"] == 7
        assert not (folder / name / "errors").exists()
    for rank in range(2):
        weights, expected = (
            torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for name in ("goes on", "whole")
        )
        assert all(torch.equal(weights[key], value) for key, value in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["", "sharded, "])
def test_processes_with_a_gradient_pending_go_on_bit_for_bit(scenarios, kind):
    found, folder = scenarios
    saves, goes_on = f"{kind}saves within a step", f"{kind}goes on within a step"
    assert found[saves]["statuses"] == found[goes_on]["statuses"] == [0, 0]
    checkpoint = folder / saves / "checkpoints" / "last.ckpt"
    saved = torch.load(checkpoint / "meta.pt" if kind else checkpoint, weights_only=True)
    assert [len(gradients) for gradients in saved["pending_gradients"]] == [len(saved["pending_gradients"][0])] * 2
    for rank in range(2):
        weights, expected = (torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for name in (goes_on, saves))
        assert all(torch.equal(weights[key], value) for key, value in expected.items())


@pytest.mark.slow
def test_a_loss_that_is_no_number_in_one_process_stops_both(scenarios):
    found, folder = scenarios
    assert found["not a number"]["statuses"] == [1, 1]
    first, second = ((folder / "not a number" / "errors" / f"rank_{rank}.log").read_text() for rank in range(2))
    told = [line for line in first.splitlines() if "NonFiniteLoss: " in line]
    assert "at epoch 1, step 6 (process 1: loss nan in batch 2 of samples" in told[0]
    assert told[0] in second


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "statuses"),
    [("killed", [1, -9]), ("the first killed", [-9, 1]), ("raises", [1, 1]), ("hangs", [1, -9])],
)
def test_a_process_does_not_wait_for_a_dead_one_longer_than_its_timeout(scenarios, name, statuses):
    found, folder = scenarios
    assert found[name]["statuses"] == statuses
    assert max(found[name]["seconds"]) < 300  # 600, or half an hour, without it
    for rank, status in enumerate(statuses):
        log = folder / name / "errors" / f"rank_{rank}.log"
        assert log.exists() == (status == 1)
        assert status != 1 or ", epoch 1, step 6\n" in log.read_text()


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_and_ends_bit_equal(tmp_path):
    options = ("--trainer.limit_train_batches", 5, "--logs", tmp_path / "runs", "--output", tmp_path / "found.json")
    run_script("tests/kill_loop.py", "--runs", 3, *options)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["equal"] == len(found["runs"]) == 3
    kills = [kill for run in found["runs"] for kill in run["kills"]]
    assert {"growing", "writing"} <= {*kills}
