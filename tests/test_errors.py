"""Errors on the command line, by where they are raised: in a check of settings, or in somebody's code."""

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, TensorDataset

from lit_tokenformer.cli.main import main
from lit_tokenformer.errors import UserError, nearest_name
from lit_tokenformer.version import __version__


class Model(LightningModule):
    """A user's own task."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(width, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.layer(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(LightningDataModule):
    """A user's own data."""

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(8, 8)), 4)

    def val_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(8, 8)), 4)


class BrokenSetup(Model):
    def setup(self, stage):
        raise ValueError("what went wrong")


class BrokenLoss(Model):
    def training_step(self, batch, batch_idx):
        raise OSError("what went wrong")


class BrokenValidation(Model):
    def validation_step(self, batch, batch_idx):
        if batch_idx == 1:
            raise ValueError("what went wrong")


class BrokenInit(Model):
    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        raise ValueError("what went wrong")


class BrokenLayer(Model):
    """Uses a library wrongly."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        torch.nn.Linear("what went wrong", 1)


class BrokenOptimizer(Model):
    def configure_optimizers(self):
        raise ValueError("what went wrong")


class BrokenSetupData(Data):
    def setup(self, stage):
        raise FileNotFoundError("what went wrong")


class BrokenInitData(Data):
    def __init__(self) -> None:
        raise OSError("what went wrong")


class BrokenHook(Callback):
    def on_train_start(self, trainer, pl_module):
        raise KeyError("what went wrong")


class BrokenCallback(Callback):
    def __init__(self) -> None:
        raise ValueError("what went wrong")


class Raises(Callback):
    """Raises an error of a check, in the second step."""

    def __init__(self, late: bool = True, kind: str = "UserError") -> None:
        self.late, self.kind = late, kind

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == int(self.late):
            kind = {"UserError": UserError, "MisconfigurationException": MisconfigurationException}[self.kind]
            raise kind("data.share: what went wrong")


def run(folder, *args, command="fit", model="Model", data="Data"):
    """The status, for two training steps or a validation."""
    where = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.default_root_dir", str(folder)]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    steps = ["--trainer.max_epochs", "1", "--trainer.log_every_n_steps", "1"] if command == "fit" else []
    parts = ["--model", f"{__name__}.{model}", "--data", f"{__name__}.{data}"]
    try:
        return main([command, *parts, *where, *quiet, *steps, *args])
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize(
    ("kind", "args"),
    [
        ("ValueError", {"model": "BrokenSetup"}),
        ("OSError", {"model": "BrokenLoss"}),
        ("ValueError", {"model": "BrokenValidation"}),
        ("ValueError", {"model": "BrokenValidation", "command": "validate"}),
        ("ValueError", {"model": "BrokenOptimizer"}),
        ("FileNotFoundError", {"data": "BrokenSetupData"}),
        ("KeyError", {"callback": "BrokenHook"}),
    ],
)
def test_error_in_own_code_keeps_its_traceback_and_its_log(kind, args, tmp_path, capsys):
    callback = args.pop("callback", None)
    more = ["--trainer.callbacks+", f"{__name__}.{callback}"] if callback else []
    assert run(tmp_path, *more, **args) == 1
    shown = capsys.readouterr().err
    log = tmp_path / "lightning_logs" / "version_0" / "errors" / "rank_0.log"
    assert shown.splitlines()[-1] == f"error log: {log}"
    for text in (shown, log.read_text()):
        assert "Traceback" in text and f'File "{__file__}"' in text and f"{kind}: " in text and "went wrong" in text


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "own"), [("ddp_fork", False), ("ddp_spawn", False), ("ddp_fork", True)])
def test_error_in_a_process_that_lightning_starts_is_told_as_in_this_one(strategy, own, tmp_path, capfd):
    callback = f"{__name__}.BrokenHook" if own else f"{__name__}.Raises"
    more = ["--trainer.strategy", strategy, "--trainer.devices", "2", "--trainer.callbacks+", callback]
    status = run(tmp_path, *more, *([] if own else ["--trainer.callbacks.late", "false"]))
    shown = capfd.readouterr().err
    assert status == (1 if own else 2)
    assert ("Traceback" in shown) == own
    assert shown.count("error: data.share: what went wrong\n") == (0 if own else 1)
    assert list(tmp_path.rglob("errors")) == [tmp_path / "errors"] * own


@pytest.mark.parametrize(
    ("kind", "args"),
    [
        ("ValueError", {"model": "BrokenInit"}),
        ("TypeError", {"model": "BrokenLayer"}),
        ("OSError", {"data": "BrokenInitData"}),
        ("ValueError", {"callback": "BrokenCallback"}),
    ],
)
def test_error_in_own_constructor_keeps_its_traceback(kind, args, tmp_path, capsys):
    callback = args.pop("callback", None)
    more = ["--trainer.callbacks+", f"{__name__}.{callback}"] if callback else []
    assert run(tmp_path, *more, **args) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown and f'File "{__file__}"' in shown and shown.splitlines()[-1].startswith(f"{kind}: ")
    assert "Given value" not in shown  # jsonargparse reports the whole configuration


def test_error_while_own_module_is_imported_keeps_its_traceback(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken_module.py").write_text("raise ValueError('what went wrong')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["fit", "--model", "broken_module.Model", "--data", f"{__name__}.Data"]) == 1
    shown = capsys.readouterr().err
    assert "broken_module.py" in shown and shown.splitlines()[-1] == "ValueError: what went wrong"


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["EarlyStopping", "--trainer.callbacks.monitor", "x", "--trainer.callbacks.mode", "y"], "got y"),
        (["ModelCheckpoint", "--trainer.callbacks.save_top_k", "-7"], "save_top_k=-7"),
        ([f"{__name__}.Raises", "--trainer.callbacks.late", "false"], "data.share: what went wrong"),
    ],
)
def test_value_that_is_refused_before_training_is_told_in_one_line(args, told, tmp_path, capsys):
    assert run(tmp_path, "--trainer.callbacks+", *args) == 2
    shown = capsys.readouterr().err
    assert shown.splitlines()[-1].startswith("error: ") and told in shown and "Traceback" not in shown
    assert not list(tmp_path.rglob("rank_0.log"))


@pytest.mark.parametrize(("kind", "status"), [("UserError", 2), ("MisconfigurationException", 1)])
def test_check_that_fails_during_training_is_logged(kind, status, tmp_path, capsys):
    assert run(tmp_path, "--trainer.callbacks+", f"{__name__}.Raises", "--trainer.callbacks.kind", kind) == status
    lines = capsys.readouterr().err.splitlines()
    (log,) = tmp_path.rglob("rank_0.log")
    assert lines[-1] == f"error log: {log}" and "Traceback" in log.read_text()
    assert (lines[-2] == "error: data.share: what went wrong") == (status == 2)


def test_error_of_a_loading_process_is_its_last_line():
    worker = "Caught UserError in DataLoader worker process 0.\nTraceback ...\nerrors.UserError: data.root: gone\n"
    assert str(UserError(worker)) == "data.root: gone"


@pytest.mark.parametrize(
    ("name", "choices", "near"),
    [
        ("vit_smal", ["gpt2_small", "vit_small_patch16_224"], "vit_small_patch16_224"),
        ("vit_smal", ["vit_small", "causal_lm_small"], "vit_small"),
        ("version", ["precision"], None),
        ("ckpt_path", ["drop_path"], None),
        ("max_epohcs", ["max_epochs", "max_steps"], "max_epochs"),
        ("fnn", ["qkv", "proj", "ffn"], "ffn"),
        ("", ["digits", "a"], None),
    ],
)
def test_only_a_near_name_is_suggested(name, choices, near):
    assert nearest_name(name, choices) == near


def test_version_is_shown(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out.split()[-1] == __version__
