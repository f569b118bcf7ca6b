"""The command line, as its user calls it."""

import csv
import importlib
import json
import os
import pickle
import re
import signal
import sys

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from PIL import Image

from callbacks import PatchDropSchedule
from lit_tokenformer.cli.commands import grow_checkpoint, read_checkpoint
from lit_tokenformer.cli.main import main
from lit_tokenformer.cli.parser import shipped_configs
from lit_tokenformer.cli.preflight import replace_repeated
from lit_tokenformer.models import param_tokens
from lit_tokenformer.tasks import LitImageClassifier

pytestmark = pytest.mark.usefixtures("few_digits")
TINY = [
    *("--config", "vit_small"),
    *("--model.overrides.dim", "32", "--model.overrides.depth", "2", "--model.overrides.num_heads", "2"),
    *("--model.overrides.param_tokens", "8"),
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
]


def growth(folder, schedule, **settings):
    """A config that replaces the callbacks of a shipped one."""
    callbacks = [
        {"class_path": "callbacks.ParameterGrowthCallback", "init_args": {"schedule": schedule, **settings}},
        {"class_path": "callbacks.GrowingEMA"},
        {"class_path": "callbacks.TrainingMonitor"},
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}},
    ]
    path = folder / "growth.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}, sort_keys=False))
    return ["--config", str(path)]


def run(command, folder, *args):
    """Runs a command in this process; returns its exit status."""
    where = ["--trainer.default_root_dir", str(folder)] if command not in ("grow",) else []
    config = TINY if command not in ("grow",) else []
    try:
        return main([command, *config, *where, *map(str, args)])
    except SystemExit as stop:
        return stop.code


@pytest.fixture(scope="module")
def fitted(few_digits, tmp_path_factory):
    """A folder with a fit of three epochs that grew twice."""
    folder = tmp_path_factory.mktemp("fitted")
    schedule = growth(folder, {1: 16, 2: 32})
    assert run("fit", folder, *schedule, "--trainer.max_epochs", 3, "--data.batch_size", 28) == 0
    return folder


def last(folder):
    (path,) = folder.glob("lightning_logs/version_0/checkpoints/last.ckpt")
    return path


def test_fit_writes_checkpoints_logs_and_the_config(fitted):
    assert torch.load(last(fitted), weights_only=True)["param_tokens"] == {"qkv": 32, "proj": 32, "ffn": 128}
    version = fitted / "lightning_logs" / "version_0"
    assert list(version.glob("events.out.tfevents.*"))
    saved = yaml.safe_load((version / "config.yaml").read_text())
    assert saved["trainer"]["callbacks"][0]["init_args"]["schedule"] == {1: 16, 2: 32}
    assert saved["model"]["init_args"]["overrides"]["dim"] == 32


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_notebook", "ddp_spawn"])
def test_fit_in_processes_that_lightning_starts_ends_well_and_keeps_its_files(strategy, tmp_path):
    steps = ["--trainer.max_epochs", 2, "--trainer.limit_train_batches", 2, "--trainer.limit_val_batches", 1]
    processes = ["--trainer.strategy", strategy, "--trainer.devices", 2, "--data.batch_size", 16]
    grows = growth(tmp_path, {2: 16}, unit="step", trigger="plateau", window=1, patience=1, cooldown=0, min_delta=9.0)
    assert run("fit", tmp_path, *grows, *steps, *processes) == 0
    checkpoint = torch.load(last(tmp_path), weights_only=True)
    assert checkpoint["global_step"] == 4 and checkpoint["param_tokens"]["qkv"] == 16
    assert (tmp_path / "lightning_logs" / "version_0" / "config.yaml").is_file()


def test_single_callback_needs_no_list(few_digits, tmp_path):
    config = tmp_path / "one.yaml"
    config.write_text("trainer: {callbacks: {class_path: callbacks.TrainingMonitor}}\n")
    assert run("fit", tmp_path, "--config", config, "--trainer.max_epochs", 1, "--trainer.limit_train_batches", 1) == 0


def test_text_with_the_marks_of_interpolations_is_text(tmp_path, capsys):
    config = tmp_path / "text.yaml"
    names = ["costs ${ 5", "??? what", r"\${data}", "${data.init_args.hf_name}"]
    config.write_text(yaml.safe_dump({"data": {"init_args": {"hf_name": "x", "root": ", ".join(names[:2])}}}))
    shown = yaml.safe_load(shown_help(capsys, "fit", *TINY, "--config", str(config), "--print_config"))
    assert shown["data"]["init_args"]["root"] == "costs ${ 5, ??? what"
    config.write_text(yaml.safe_dump({"data": {"init_args": {"hf_name": "x", "root": ", ".join(names[2:])}}}))
    shown = yaml.safe_load(shown_help(capsys, "fit", *TINY, "--config", str(config), "--print_config"))
    assert shown["data"]["init_args"]["root"] == "${data}, x"


class Interrupts(Callback):
    """Sends a signal to this process."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_step == 1:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGTERM, 143)])
def test_the_exit_status_names_the_signal_that_ended_a_fit(tmp_path, number, status):
    path = tmp_path / "config.yaml"
    callback = {"class_path": "test_cli.Interrupts", "init_args": {"number": int(number)}}
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    before = signal.getsignal(number)
    assert run("fit", tmp_path, "--config", path, "--trainer.max_epochs", 1) == status
    assert torch.load(last(tmp_path), weights_only=True)["global_step"] == 2
    assert signal.getsignal(number) == before


def test_a_saved_config_can_be_run_again(fitted, tmp_path):
    config = fitted / "lightning_logs" / "version_0" / "config.yaml"
    args = ["--config", config, "--trainer.default_root_dir", tmp_path, "--trainer.limit_train_batches", 1]
    assert main(["fit", *map(str, args)]) == 0
    assert torch.load(last(tmp_path), weights_only=True)["param_tokens"]["qkv"] == 32


def test_sizes_reach_the_model_from_the_data(fitted):
    task = LitImageClassifier.load_from_checkpoint(last(fitted), weights_only=True)
    assert task.build_optimizer().param_groups[0]["lr"] == 2e-4 and task.schedule.warmup == 2
    assert task.backbone.num_classes == 10 and task.backbone.config.image_size == 8
    assert param_tokens(task)["qkv"] == 32


def test_a_grown_checkpoint_is_evaluated_with_the_ungrown_config(fitted, capsys):
    assert run("validate", fitted, "--ckpt_path", last(fitted)) == 0
    assert "acc1" in capsys.readouterr().out


def test_data_without_a_test_split_are_not_tested(fitted, capsys):
    assert run("test", fitted, "--ckpt_path", last(fitted)) == 2
    assert "error: test: the data have no test split" in capsys.readouterr().err


def test_predict_writes_a_row_for_each_image(fitted, tmp_path):
    output = tmp_path / "predictions.csv"
    assert run("predict", fitted, "--ckpt_path", last(fitted), "--output", output) == 0
    rows = list(csv.reader(output.open()))
    assert rows[0] == ["image", *(f"{part}{i}" for i in range(1, 6) for part in ("class", "prob"))]
    assert [row[0] for row in rows[1:]] == [str(index) for index in range(36)]
    assert 0 < float(rows[1][4]) <= float(rows[1][2]) <= 1
    assert run("predict", fitted, "--ckpt_path", last(fitted), "--output", output) == 2


def test_predict_needs_a_checkpoint_and_images_only(fitted, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.new("RGB", (20, 30 + number), "white").save(tmp_path / "photos" / f"{number}.jpg")
    (tmp_path / "photos" / "1.jpg").write_bytes(b"")
    given = ["predict", "--ckpt_path", str(last(fitted))]
    with pytest.warns(UserWarning, match="skipped: photos/1.jpg"), pytest.raises(SystemExit, match="^0$"):
        main([*given, "--images", "photos"])
    header, *rows = csv.reader((tmp_path / "predictions.csv").open())
    assert header[:3] == ["image", "class1", "prob1"] and [row[0] for row in rows] == [
        f"photos/{i}.jpg" for i in range(3)
    ]
    assert rows[1][1:] == [""] * 10 and {*rows[0][1::2]} <= {*"0123456789"} and rows[0][1:] == rows[2][1:]
    with pytest.raises(SystemExit, match="^0$"):
        main([*given, "--images=photos/2.jpg", "--output=one.csv"])
    assert [*csv.reader((tmp_path / "one.csv").open())][1] == rows[2]
    assert main([*given, "--images=photos", "--output=one.csv"]) == 2
    assert "error: output: one.csv exists already" in capsys.readouterr().err


def test_other_classes_are_refused_before_work(fitted, tmp_path, capsys):
    for split in ("train", "val"):
        for number in range(10):
            (tmp_path / "images" / split / f"class_{number}").mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "images" / split / f"class_{number}" / "0.png")
    data = ["--data.dataset", "imagefolder", "--data.root", tmp_path / "images", "--data.image_size", 8]
    assert run("validate", tmp_path, "--ckpt_path", last(fitted), *data) == 2
    found = capsys.readouterr().err
    assert (
        "error: data: the classes are not those of the checkpoint" in found
        and not (tmp_path / "lightning_logs").exists()
    )


def test_optimizer_and_schedule_are_replaced_by_class_path(tmp_path):
    config = tmp_path / "lion.yaml"
    optimizer = {"class_path": "timm.optim.Lion", "init_args": {"lr": 1e-4}}
    scheduler = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1, "gamma": 0.5}}
    config.write_text(yaml.safe_dump({"model": {"init_args": {"optimizer": optimizer, "lr_scheduler": scheduler}}}))
    more = ["--config", config, *growth(tmp_path, {1: 16}), "--trainer.max_epochs", 2, "--data.batch_size", 64]
    assert run("fit", tmp_path, *more) == 0
    checkpoint = torch.load(last(tmp_path), weights_only=True)
    assert set(checkpoint["optimizer_states"][0]["state"][0]) == {"exp_avg"}
    assert checkpoint["lr_schedulers"][0]["gamma"] == 0.5
    assert LitImageClassifier.load_from_checkpoint(last(tmp_path), weights_only=True).backbone.num_classes == 10


def test_fit_goes_on_from_a_checkpoint(fitted, tmp_path):
    schedule = growth(tmp_path, {1: 16, 2: 32})
    more = ["--trainer.max_epochs", 4, "--data.batch_size", 28, "--ckpt_path", last(fitted)]
    assert run("fit", tmp_path, *schedule, *more) == 0
    assert torch.load(last(tmp_path), weights_only=True)["epoch"] == 3


def test_fit_goes_on_from_the_last_checkpoint_of_the_last_run(tmp_path):
    schedule = [*growth(tmp_path, {1: 16}), "--data.batch_size", 64, "--ckpt_path", "last"]
    for version, epochs in enumerate((2, 3, 4)):  # the first finds none, and begins anew
        assert run("fit", tmp_path, *schedule, "--trainer.max_epochs", epochs) == 0
        (path,) = tmp_path.glob(f"lightning_logs/version_{version}/checkpoints/last.ckpt")
        checkpoint = torch.load(path, weights_only=True)
        assert (checkpoint["epoch"], checkpoint["global_step"]) == (epochs - 1, 2 * epochs)
        assert len(checkpoint["callbacks"]["ParameterGrowthCallback"]["events"]) == 1


def test_a_checkpoint_grown_offline_gives_the_same_outputs_and_goes_on(fitted, tmp_path, capsys):
    output = tmp_path / "grown.ckpt"
    assert run("grow", tmp_path, "--ckpt_path", last(fitted), "--tokens", 64, "--output", output) == 0
    assert "qkv 32 -> 64" in capsys.readouterr().out
    before = LitImageClassifier.load_from_checkpoint(last(fitted), weights_only=True).eval()
    after = LitImageClassifier.load_from_checkpoint(output, weights_only=True).eval()
    image = torch.randn(4, 3, 8, 8)
    assert param_tokens(after) == {"qkv": 64, "proj": 64, "ffn": 256}
    torch.testing.assert_close(after(image), before(image), rtol=1e-5, atol=1e-6)
    schedule = growth(tmp_path, {1: 16, 2: 32, 3: 64})
    more = ["--trainer.max_epochs", 5, "--data.batch_size", 28, "--ckpt_path", output]
    assert run("fit", tmp_path, *schedule, *more) == 0
    assert run("grow", tmp_path, "--ckpt_path", last(fitted), "--tokens", 64, "--output", output) == 2


def test_plan_takes_the_config_of_a_run(fitted, tmp_path, capsys):
    (saved,) = fitted.glob("lightning_logs/version_0/config.yaml")
    assert main(["plan", "--config", str(saved)]) == 0
    assert "optimizer steps of 28 samples" in capsys.readouterr().out


def test_plan_shows_what_each_stage_costs(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    assert run("plan", tmp_path, *growth(tmp_path, {1: 16, 2: 32}), "--trainer.max_epochs", 4) == 0
    shown = capsys.readouterr().out
    assert "16 optimizer steps of 32 samples" in shown
    assert "qkv 32, proj 32, ffn 128" in shown and "of scratch" in shown
    monkeypatch.setenv("COLUMNS", "80")
    assert run("plan", tmp_path, *growth(tmp_path, {1: 16, 2: 32}), "--trainer.max_epochs", 4) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)


def test_plan_counts_the_patches_that_are_left_out(tmp_path, capsys):
    def plan(callbacks, *args):
        config = tmp_path / "plan.yaml"
        config.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
        return run("plan", tmp_path, "--config", config, "--trainer.max_epochs", 4, *args)

    def sums(callbacks, *args):
        assert plan(callbacks, *args) == 0
        shown = capsys.readouterr().out
        lines = {line.split()[0]: re.findall(r"[\d.]+e\+\d+", line) for line in shown.splitlines() if line.strip()}
        return [float(lines[row][-1]) for row in ("all", "scratch")]

    schedule = [{"class_path": "callbacks.PatchDropSchedule", "init_args": {"schedule": {2: 0.0}}}]
    half = ["--model.overrides.patch_drop_rate", 0.5]
    (whole, scratch), (cheap, _) = sums([]), sums([], *half)
    assert cheap < 0.7 * whole == 0.7 * scratch
    assert sums(schedule, *half) == pytest.approx([(whole + cheap) / 2, whole], rel=0.01)
    assert plan(schedule, *half, "--budget", 1e12) == 0
    shown = capsys.readouterr().out
    assert "class_path: callbacks.PatchDropSchedule" in shown and "ParameterGrowthCallback" not in shown


def shown_help(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    assert stop.value.code == 0
    return capsys.readouterr().out


def main_status(*args):
    try:
        return main(list(args))
    except SystemExit as stop:
        return stop.code


def test_help_names_every_command(capsys):
    shown = shown_help(capsys, "--help")
    assert all(f"\n    {name} " in shown for name in ("fit", "validate", "test", "predict", "plan", "grow"))


@pytest.mark.parametrize("command", ["fit", "predict", "plan", "generate", "evaluate", "compare", "grow", "list"])
def test_help_of_a_command_fits_two_screens(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = shown_help(capsys, command, "--help").splitlines()
    assert len(lines) <= 90 and max(map(len, lines)) <= 80
    assert "--help-all" in "".join(lines) and "ENV:" not in "".join(lines)


def test_help_shows_common_options_and_their_choices(capsys):
    shown = shown_help(capsys, "fit", "--help")
    assert all(option in shown for option in ("--trainer.max_epochs", "--growth.schedule", "LitCausalLM", "fsdp2"))
    assert "--trainer.barebones" not in shown
    assert "--trainer.barebones" in shown_help(capsys, "fit", "--help-all")


def test_names_are_listed(capsys, monkeypatch):
    listed = {what: shown_help(capsys, "list", what) for what in ("presets", "configs", "datasets")}
    assert re.search(r"^gpt2_124m +124.4 M, 12 x 768, language$", listed["presets"], re.M)
    assert [line.split()[0] for line in listed["configs"].splitlines()] == list(shipped_configs())
    assert re.search(r"^digits +images$", listed["datasets"], re.M)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main_status("list", "configs") == main_status("list", "presets") == 0
    assert all(len(line) <= 80 for line in capsys.readouterr().out.splitlines())
    assert main_status("list", "preset") == 2 and "expected 'presets', 'configs' or" in capsys.readouterr().err


def test_missing_options_are_named_as_they_are_written(capsys):
    assert main_status("shrink") == 2
    assert capsys.readouterr().err == "error: missing: --ckpt_path, --tokens\n"
    assert main_status("list") == 2
    assert capsys.readouterr().err == "error: missing: what\n"


CALLBACKS = ("ParameterGrowthCallback", "GrowingEMA", "TrainingMonitor")


@pytest.mark.parametrize(
    "args",
    [
        ["grow", "--help-all"],
        ["fit", "--help-all"],
        ["predict", "--help-all"],
        ["fit", "--data.help", "ImageDataModule"],
        ["fit", "--model.help", "LitImageClassifier"],
        *(["fit", "--trainer.callbacks.help", f"callbacks.{name}"] for name in CALLBACKS),
    ],
    ids=lambda args: " ".join(args),
)
def test_every_option_is_documented(args, capsys):
    blocks = re.split(r"\n  (?:ARG:   )?--", shown_help(capsys, *args))[1:]
    options = [" ".join(block.split()) for block in blocks if "(type:" in block]
    assert options
    for option in options:
        name, told = option.split("(type:")[0].split(" ", 1)
        assert len(re.findall(r"[a-z]{2,}", told.replace("ENV: LIT_TOKENFORMER", ""))) > 1, name


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def bad_checkpoint(kind, folder, good):
    path = folder / f"{kind}.ckpt"
    if kind == "truncated":
        path.write_bytes(good.read_bytes()[:5000])
    elif kind == "pickled":
        checkpoint = torch.load(good, weights_only=True)
        torch.save({**checkpoint, "hyper_parameters": Malicious(folder / "executed")}, path)
    elif kind == "raw_pickle":
        path.write_bytes(pickle.dumps(Malicious(folder / "executed")))
    elif kind == "empty":
        path.touch()
    elif kind == "no_fit":
        torch.save({"weights": torch.zeros(1)}, path)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "is not a file"),
        ("truncated", "truncated or damaged"),
        ("pickled", "holds pickled code or is damaged"),
        ("raw_pickle", "holds pickled code or is damaged"),
        ("empty", "truncated or damaged"),
        ("no_fit", "is not a checkpoint of a fit"),
    ],
)
def test_bad_checkpoints_are_refused_and_never_executed(kind, message, fitted, tmp_path, capsys):
    path = bad_checkpoint(kind, tmp_path, last(fitted))
    for command in ("fit", "validate", "grow") if "pickle" in kind else ("fit", "grow"):
        tokens = ["--tokens", 64] if command == "grow" else []
        assert run(command, tmp_path, "--ckpt_path", path, *tokens) == 2
        told = capsys.readouterr().err.strip().splitlines()[-1]
        assert told.startswith(f"error: ckpt_path: {path}") and message in told
    assert not (tmp_path / "executed").exists() and not (tmp_path / "lightning_logs").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.presett", "x"], "did you mean 'preset'?"),
        (["--data.batch_sise", "3"], "did you mean 'batch_size'?"),
        (["--model.overrides.dims", "3"], "did you mean 'dim'?"),
        (["--trainer.max_epohcs", "3"], "did you mean 'max_epochs'?"),
        (["--model.overrides.param_tokens", "0"], "param_tokens.qkv: expected a whole number of at least 1, got 0"),
    ],
)
def test_bad_input_is_told_in_one_line_before_any_work(args, message, tmp_path, capsys):
    assert run("fit", tmp_path, *args) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(told) == 1 and message in told[0]
    assert not list(tmp_path.glob("lightning_logs/*/checkpoints"))


@pytest.mark.parametrize(
    ("name", "monitor", "nearest"),
    [
        ("EarlyStopping", "val_loss", "val/loss"),
        ("ModelCheckpoint", "val_acc1", "val/acc1"),
        ("ModelCheckpoint", "vall/loss", "val/loss"),
    ],
)
def test_a_monitor_that_no_task_logs_is_found_before_the_first_epoch(name, monitor, nearest, tmp_path, capsys):
    callbacks = [{"class_path": f"lightning.pytorch.callbacks.{name}", "init_args": {"monitor": monitor}}]
    config = tmp_path / "monitor.yaml"
    config.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    assert run("fit", tmp_path / "runs", "--config", config) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    expected = f"error: trainer.callbacks: {name}.monitor: unknown value {monitor!r}, did you mean {nearest!r}?"
    assert told.startswith(expected)
    assert not (tmp_path / "runs").exists()


def test_summary_books_steps_to_the_size_that_took_them_where_a_checkpoint_was_grown(tmp_path):
    best = {"monitor": "val/acc1", "mode": "max", "save_last": True, "save_top_k": -1}
    best["dirpath"] = str(tmp_path / "kept")
    callbacks = [
        {"class_path": "callbacks.RunSummary"},
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": best},
    ]
    config = tmp_path / "summary.yaml"
    config.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    small = ["--config", config, "--data.batch_size", 64]
    assert run("fit", tmp_path, *small, "--trainer.max_epochs", 1) == 0
    grown = tmp_path / "kept" / "grown.ckpt"
    assert run("grow", tmp_path, "--ckpt_path", tmp_path / "kept" / "last.ckpt", "--tokens", 16, "--output", grown) == 0
    assert run("fit", tmp_path, *small, "--trainer.max_epochs", 2, "--ckpt_path", grown) == 0
    (path,) = tmp_path.glob("lightning_logs/version_1/summary.json")
    stages = json.loads(path.read_text())["stages"]
    assert [(stage["tokens"]["qkv"], stage["steps"]) for stage in stages] == [(8, 2), (16, 2)]
    assert stages[0]["best"]["path"].endswith("epoch=0-step=2.ckpt")
    assert (stages[1]["best"] or {}).get("path") != stages[0]["best"]["path"]


def test_environment_variables_and_interpolation_set_options(tmp_path, monkeypatch, capsys):
    config = tmp_path / "more.yaml"
    size = "${data.init_args.batch_size}"
    overrides = {"model": {"init_args": {"overrides": {"image_size": size}}}, "data": {"init_args": {"batch_size": 16}}}
    config.write_text(yaml.safe_dump(overrides))
    monkeypatch.setenv("LIT_TOKENFORMER_FIT__TRAINER__MAX_STEPS", "77")
    shown = yaml.safe_load(shown_help(capsys, "fit", *TINY, "--config", str(config), "--print_config"))
    assert shown["model"]["init_args"]["overrides"]["image_size"] == 16
    assert shown["trainer"]["max_steps"] == 77


def test_the_environment_overrides_configs_and_the_command_line_overrides_both(tmp_path, monkeypatch, capsys):
    config = tmp_path / "more.yaml"
    given = {"trainer": {"max_epochs": 3, "max_steps": 3, "min_steps": 3}, "model": {"init_args": {"compile": False}}}
    config.write_text(yaml.safe_dump(given))
    for name, value in {"TRAINER__MAX_EPOCHS": 5, "TRAINER__MAX_STEPS": 5, "MODEL__INIT_ARGS__COMPILE": True}.items():
        monkeypatch.setenv(f"LIT_TOKENFORMER_FIT__{name}", str(value).lower())
    args = ("--trainer.max_steps", "7", *TINY, "--config", str(config), "--print_config")
    shown = yaml.safe_load(shown_help(capsys, "fit", *args))
    assert [shown["trainer"][name] for name in ("min_steps", "max_epochs", "max_steps")] == [3, 5, 7]
    assert shown["model"]["init_args"]["compile"] is True


def test_a_growth_schedule_of_the_command_line_replaces_that_of_the_config(tmp_path, few_digits):
    schedule = growth(tmp_path, {1: 16})
    args = ["--trainer.callbacks+=ParameterGrowthCallback", "--trainer.callbacks.schedule", "{1: 24}"]
    assert run("fit", tmp_path, *schedule, *args, "--trainer.max_epochs", 2, "--trainer.limit_train_batches", 1) == 0
    assert torch.load(last(tmp_path), weights_only=True)["param_tokens"] == {"qkv": 24, "proj": 24, "ffn": 96}


def test_growth_options_change_the_callback_of_the_config(tmp_path, few_digits):
    """Its other settings remain, here the unit."""
    schedule = growth(tmp_path, {1: 16}, unit="step")
    steps = ["--trainer.max_epochs", 2, "--trainer.limit_train_batches", 1]
    assert run("fit", tmp_path, *schedule, "--growth.schedule", "{0: 24}", "--growth.method", "zero", *steps) == 0
    assert torch.load(last(tmp_path), weights_only=True)["param_tokens"] == {"qkv": 24, "proj": 24, "ffn": 96}
    saved = yaml.safe_load((last(tmp_path).parents[1] / "config.yaml").read_text())
    settings = saved["trainer"]["callbacks"][0]["init_args"]
    assert [settings[name] for name in ("schedule", "unit", "method")] == [{0: 24}, "step", "zero"]
    assert "growth" not in saved


def test_growth_options_add_a_callback(tmp_path, few_digits, capsys):
    config = tmp_path / "none.yaml"
    config.write_text("trainer: {callbacks: null}\n")
    args = ["--config", config, "--trainer.max_epochs", 1, "--trainer.limit_train_batches", 1]
    assert run("fit", tmp_path, *args, "--growth.unit", "step") == 2
    assert "growth.schedule: expected a value" in capsys.readouterr().err
    assert run("fit", tmp_path, *args, "--growth.schedule", "{0: 24}") == 0
    path = next(tmp_path.glob("lightning_logs/version_0/checkpoints/*.ckpt"))
    assert torch.load(path, weights_only=True)["param_tokens"]["qkv"] == 24


def test_a_later_callback_of_the_project_replaces_an_earlier_one():
    first, other, later = PatchDropSchedule({5: 0.0}), LearningRateMonitor(), PatchDropSchedule({1: 0.0})
    assert replace_repeated([first, other, LearningRateMonitor(), later])[:2] == [later, other]
    assert len(replace_repeated([first, other, LearningRateMonitor(), later])) == 3
    assert replace_repeated(True) is True


def test_a_schedule_for_another_callback_names_what_is_missing(tmp_path, capsys):
    """A dotted option belongs to the last callback of the list."""
    args = ["--trainer.callbacks+=RunSummary", "--trainer.callbacks.schedule", "{1: 24}"]
    assert run("fit", tmp_path, *growth(tmp_path, {1: 16}), *args) == 2
    assert "put --trainer.callbacks+=ParameterGrowthCallback before it" in capsys.readouterr().err


def test_a_whole_number_stays_one_whatever_was_imported_first(tmp_path, capsys, monkeypatch):
    hints = dict(Trainer.__init__.__annotations__)
    swapped = dict.fromkeys(("limit_train_batches", "val_check_interval"), float | int | None)
    monkeypatch.setattr(Trainer.__init__, "__annotations__", {**hints, **swapped})
    args = ("--trainer.limit_train_batches", "1", "--trainer.val_check_interval", "0.5", "--print_config")
    shown = shown_help(capsys, "fit", *TINY, *args)
    assert "limit_train_batches: 1\n" in shown and "val_check_interval: 0.5\n" in shown


def test_another_callbacks_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "callbacks").mkdir()
    (tmp_path / "callbacks" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if f"{name}.".startswith(("callbacks.", "lit_tokenformer.cli."))]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match="callbacks: shadowed by another package") as caught:
        importlib.import_module("lit_tokenformer.cli.main")
    assert str(tmp_path) in str(caught.value)
    monkeypatch.delitem(sys.modules, "callbacks")


def test_shipped_configs_are_found_from_any_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("plan", tmp_path, "--config", "configs/vit_small.yaml") == 0
    assert set(shipped_configs()) >= {"vit_small", "tokenformer_vit_base_imagenet"}


def test_growing_offline_without_an_output_never_overwrites(fitted, tmp_path):
    source = tmp_path / "one.ckpt"
    source.write_bytes(last(fitted).read_bytes())
    assert grow_checkpoint(str(source), 64).name == "one-grown.ckpt"
    with pytest.raises(ValueError, match="output: .*one-grown.ckpt exists already"):
        grow_checkpoint(str(source), 64)
    assert read_checkpoint(tmp_path / "one-grown.ckpt", "meta")["param_tokens"]["ffn"] == 256
