"""What a user can give wrongly, a row each: status 2, one line that names the setting, nothing left behind.

Lightning opens the log folder before some checks can run; their rows may leave a run's folder without a checkpoint.
"""

import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from PIL import Image

from lit_tokenformer import tasks
from lit_tokenformer.checkpoints.load import write_checkpoint
from lit_tokenformer.cli.main import main
from lit_tokenformer.cli.parser import check_config
from lit_tokenformer.cli.preflight import check_environment, check_processes
from lit_tokenformer.data import Tokenizer
from lit_tokenformer.tasks.rebuild import fresh_checkpoint

TINY = {"dim": 32, "depth": 1, "num_heads": 2, "param_tokens": 8}
IMAGE_MODEL = {"preset": "tokenformer_vit_tiny_patch16_224", "overrides": {**TINY, "patch_size": 4}}
TEXT_MODEL = {"preset": "tokenformer_lm_tiny", "overrides": {**TINY, "rotary_fraction": 0.5}}


@dataclass
class Given:
    """What a row can use: files that were made for all rows, and a folder and an environment of its own."""

    made: Path
    folder: Path
    environment: dict[str, str]

    def file(self, name: str, content: str | bytes = "") -> str:
        """Writes a file; returns its path."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    def yaml(self, **sections: Any) -> list[str]:
        """Writes a config; returns the option that names it."""
        return ["--config", self.file("given.yaml", yaml.safe_dump(sections, sort_keys=False))]

    def images(self, *names: str, broken: tuple[str, ...] = ()) -> list[str]:
        """Makes a folder of images; returns the options that name it."""
        for name in names:
            (self.folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(self.folder / "images" / name)
        for name in broken:
            self.file(f"images/{name}", "no image")
        (self.folder / "images").mkdir(parents=True, exist_ok=True)
        where = ["--data.root", str(self.folder / "images"), "--data.image_size", "8"]
        return [*image_fit(self), "--data.dataset", "imagefolder", *where]

    def env(self, **values: str) -> list[str]:
        """Sets environment variables; adds nothing to the command line."""
        self.environment.update(values)
        return []


def image_fit(given: Given, command: str = "fit") -> list[str]:
    return [command, "--config", str(given.made / "image.yaml")]


def text_fit(given: Given, command: str = "fit") -> list[str]:
    return [command, "--config", str(given.made / "text.yaml")]


def image(*more: str, command: str = "fit"):
    """A fit on images with further options."""
    return lambda given: [*image_fit(given, command), *more]


def text(*more: str, command: str = "fit"):
    """A fit on text with further options."""
    return lambda given: [*text_fit(given, command), *more]


def section(**sections: Any):
    """A fit on images with a further config."""
    return lambda given: [*image_fit(given), *given.yaml(**sections)]


def growing(schedule: Any, **settings: Any):
    """A fit on images that grows."""
    growth = {"class_path": "callbacks.ParameterGrowthCallback", "init_args": {"schedule": schedule, **settings}}
    return section(trainer={"callbacks": [growth]})


def optimizer(**settings: Any):
    """A fit on images with these settings of its optimizer."""
    made = {"class_path": "torch.optim.AdamW", "init_args": settings}
    return section(model={"init_args": {"optimizer": made}})


def on(name: str, command: str, *more: str):
    """A command on one of the checkpoints that were made for all rows."""
    return lambda given: [command, "--ckpt_path", str(given.made / name), *more]


def option(name: str, file: str, content: str | bytes, make=text_fit):
    """A command (a fit on text) with an option that names a file with this content."""
    return lambda given: [*make(given), name, given.file(file, content)]


def files(name: str, content: str | bytes):
    """A fit on a text file with this content."""
    return lambda given: [*text_fit(given), "--data.dataset", "files", "--data.files", f"[{given.file(name, content)}]"]


COMMAND_LINE = [
    ("no_command", lambda given: [], "subcommand"),
    ("unknown_command", lambda given: ["fti"], "'fti'"),
    ("no_config", lambda given: ["fit"], "--config: expected a config with model and data: .*vit_small"),
    ("unknown_option", image("--trainr.max_epochs", "3"), "--trainr.max_epochs 3 .did you mean 'trainer'"),
    ("config_not_there", lambda given: ["fit", "--config", "vit_smal"], "--config: unknown value 'vit_smal', did you"),
    ("config_is_a_folder", lambda given: ["fit", "--config", str(given.folder)], "config"),
    (
        "config_empty",
        lambda given: ["fit", "--config", given.file("x.yaml")],
        "--config: expected settings by their names in .*, got an empty file",
    ),
    ("config_syntax", lambda given: ["fit", "--config", given.file("x.yaml", "trainer: {max_epochs: [1\n")], "config"),
    ("config_is_a_list", lambda given: ["fit", "--config", given.file("x.yaml", "- 1\n- 2\n")], "config"),
    ("config_binary", lambda given: ["fit", "--config", given.file("x.yaml", b"\x00\xff\xfe\x80")], "config"),
    ("unknown_section", section(trainerr={"max_epochs": 1}), "trainerr"),
    ("unknown_key_of_trainer", section(trainer={"max_epohcs": 1}), "did you mean 'max_epochs'"),
    ("unknown_key_of_model", section(model={"init_arg": {"preset": "x"}}), "init_arg"),
    ("unknown_model_setting", section(model={"init_args": {"presett": "x"}}), "did you mean 'preset'"),
    ("unknown_override", section(model={"init_args": {"overrides": {"dims": 8}}}), "did you mean 'dim'"),
    ("unknown_callback", section(trainer={"callbacks": [{"class_path": "callbacks.GrowingEAM"}]}), "GrowingEAM"),
    ("unknown_key_of_callback", growing({1: 16}, methd="split"), "did you mean 'method'"),
    ("unknown_model_class", section(model={"class_path": "LitImageClasifier"}), "model: .*mean 'LitImageClassifier'"),
    ("unknown_optimizer", section(model={"init_args": {"optimizer": {"class_path": "torch.optim.Adm"}}}), "Adm"),
    ("type_of_fraction", image("--data.batch_size", "2.5"), "batch_size: expected int or null, got 2.5"),
    ("missing_value", section(model={"init_args": {"preset": "???"}}), r"model.init_args.preset: .*got \?\?\?"),
    (
        "interpolation_of_nothing",
        section(model={"init_args": {"preset": "${nothing.here}"}}),
        "model.init_args.preset: Interpolation key 'nothing.here' not found",
    ),
    ("value_that_a_library_refuses", image("--trainer.callbacks+", "Timer", "--trainer.callbacks.interval", "x"), "x"),
    ("files_of_no_source", text("--data.files", "a.txt"), "data.files: expected data.dataset: files or huggingface"),
]

NUMBERS = [
    ("batch_size_zero", image("--data.batch_size", "0"), "data.batch_size: expected .* 1 or more, got 0"),
    ("batch_size_of_all", image("--data.batch_size", "9999"), "data.batch_size: expected at most"),
    (
        "channels",
        image("--model.overrides.in_chans", "1"),
        r"model.in_chans: does not match the data \(got 1, expected 3\)",
    ),
    ("seed_negative", image("--seed_everything", "-1"), "seed_everything"),
    ("lr_negative", optimizer(lr=-1.0), "model.optimizer: .*learning rate: -1"),
    ("lr_infinite", optimizer(lr=float("inf")), "model.optimizer: lr: expected a finite number, got inf"),
    ("epochs_negative", image("--trainer.max_epochs", "-5"), "trainer: `max_epochs` .*-5"),
    ("accumulation_zero", image("--trainer.accumulate_grad_batches", "0"), "trainer.accumulate_grad_batches"),
    ("clipping_negative", image("--trainer.gradient_clip_val", "-1"), "trainer.gradient_clip_val"),
    ("val_fraction_nan", text("--data.val_fraction", ".nan"), "data.val_fraction: expected a share"),
    ("warmup_nan", image("--model.schedule.warmup", ".nan"), "schedule.warmup: expected at least 0, got nan"),
    ("no_end", image("--trainer.max_epochs", "-1"), "schedule.name: 'cosine' needs a limit"),
]

NAMES = [
    ("unknown_preset", image("--model.preset", "vit_small_patch"), "preset: unknown value 'vit_small_patch', did you"),
    ("unknown_dataset", image("--data.dataset", "digit"), "data.dataset: unknown value 'digit', did you mean 'digits'"),
    ("preset_cut_short", image("--model.preset", "vit_smal"), "'vit_smal', did you mean 'vit_small_patch16_224'"),
    ("nothing_near", image("--version"), r"unrecognized arguments: --version$"),
    ("match_and_tokens", image("--model.match", "flops"), "model.match: conflicts with model.overrides.param_tokens"),
    ("image_model_on_text", text("--model", "LitImageClassifier"), "model|data"),
]

SCHEDULES = [
    ("not_rising", growing({2: 16, 1: 32}), r"schedule: keys must increase \(got epoch 1 after epoch 2\)"),
    ("below_birth", growing({1: 4}), "schedule: epoch 1: qkv would shrink from 8 to 4"),
    ("beyond_the_end", growing({9: 16}), r"schedule: epoch 9 is beyond the end of the fit \(trainer.max_epochs=3"),
    ("key_is_negative", growing({-1: 16}), "schedule: expected a non-negative integer as epoch, got -1"),
    ("is_a_list", growing([1, 16]), "schedule"),
    ("split_without_noise", growing({1: 16}, noise=0), "noise: 0 keeps the copies of a split identical"),
    ("noise_nan", growing({1: 16}, noise=float("nan")), "noise: expected at least 0, got nan"),
    (
        "zero_keys_with_softmax",
        lambda given: [*growing({1: 16}, method="zero_keys")(given), "--model.overrides.score_norm", "softmax"],
        "softmax",
    ),
]

DATA = [
    ("root_not_there", image("--data.dataset", "imagefolder", "--data.root", "/no/such"), "data.root: no such folder"),
    (
        "class_only_in_val",
        lambda given: given.images("train/a/1.png", "val/a/1.png", "val/b/1.png"),
        "data.root: .*different classes.*: b",
    ),
    ("no_images", lambda given: given.images(broken=("train/a/x.txt",)), "data.root: no images in"),
    (
        "only_corrupt_images",
        lambda given: [
            *given.images(
                broken=tuple(f"{split}/{i}.png" for split in ("train/a", "train/b", "val/a", "val/b") for i in range(8))
            ),
            "--data.batch_size",
            "2",
            "--data.max_corrupt_share",
            "0",
        ],
        "data.max_corrupt_share|data.root",
    ),
    (
        "hub_name_unknown",
        image("--data.dataset", "huggingface", "--data.hf_name", "no/such"),
        "data.hf_name: cannot load 'no/such'",
    ),
    ("text_empty", files("a.txt", ""), "data.files: all documents are empty"),
    ("text_not_utf8", files("a.txt", bytes([0xFF, 0xFE, 0x80]) * 99), "data.encoding_errors: .*is not UTF-8"),
    ("text_shorter_than_a_block", text("--data.block_size", "100000"), "data.block_size: .*tokens"),
    (
        "block_and_context",
        text("--model.overrides.context_length", "8"),
        "data.block_size: expected at most the model's context_length 8, got 32",
    ),
    ("tokenizer_broken", option("--data.tokenizer", "tokenizer.json", "{}"), "data.tokenizer: .* is damaged"),
    (
        "tokenizer_not_on_the_hub",
        text("--data.tokenizer", "no/such"),
        "data.tokenizer: 'no/such' is not bytes, bpe:N, a file",
    ),
    ("cache_dir_not_writable", text("--data.cache_dir", "/proc/no"), "data.cache_dir: cannot write"),
]


def damaged(kind: str, given: Given) -> str:
    """A checkpoint with which something is wrong."""
    good = given.made / "image.ckpt"
    if kind == "truncated":
        return given.file("x.ckpt", good.read_bytes()[:5000])
    checkpoint = torch.load(good, weights_only=True)
    if kind == "no_state":
        del checkpoint["state_dict"]
    elif kind == "unknown_task":
        checkpoint["task"] = "LitEverything"
    elif kind == "no_hyper_parameters":
        del checkpoint["hyper_parameters"]
    elif kind == "shapes":
        checkpoint["state_dict"]["backbone.norm.weight"] = torch.zeros(3)
    elif kind == "not_tensors":
        checkpoint["state_dict"] = dict.fromkeys(checkpoint["state_dict"], "zero")
    elif kind == "state_is_a_list":
        checkpoint["state_dict"] = [1, 2]
    elif kind == "hyper_parameters_are_wrong":
        checkpoint["hyper_parameters"]["preset"] = 7
    path = given.folder / "x.ckpt"
    torch.save(checkpoint, path)
    return str(path)


VALIDATE = image(command="validate")


def on_damaged(kind: str, make=VALIDATE):
    """A command (a validation) on a checkpoint with which something is wrong."""
    return lambda given: [*make(given), "--ckpt_path", damaged(kind, given)]


def grow(given: Given) -> list[str]:
    return ["grow", "--tokens", "16"]


CHECKPOINTS = [
    ("not_there", image("--ckpt_path", "/no/such.ckpt"), "ckpt_path: /no/such.ckpt is not a file"),
    ("last_of_none_to_validate", image("--ckpt_path", "last", command="validate"), "ckpt_path: .*last"),
    ("empty_file", option("--ckpt_path", "x.ckpt", "", image()), "ckpt_path: .* is truncated or damaged"),
    ("text_file", option("--ckpt_path", "x.ckpt", "hello\n", image()), "ckpt_path: .* is (truncated or )?damaged"),
    ("truncated", on_damaged("truncated", image()), "ckpt_path: .* is truncated or damaged"),
    (
        "pickled_code",
        option("--ckpt_path", "x.ckpt", b"cos\nmkdir\n(S'x'\ntR.", image()),
        "ckpt_path: .* holds pickled code",
    ),
    ("folder", lambda given: [*image_fit(given), "--ckpt_path", str(given.folder)], "ckpt_path: .* is not a file"),
    ("not_tensors", on_damaged("not_tensors"), "ckpt_path: "),
    ("shapes", on_damaged("shapes"), "ckpt_path: .*another architecture: backbone.norm.weight has shape"),
    ("unknown_task", on_damaged("unknown_task", grow), "ckpt_path: task: unknown value 'LitEverything'"),
    (
        "another_architecture",
        lambda given: [
            *image_fit(given),
            "--model.overrides.depth",
            "2",
            "--ckpt_path",
            str(given.made / "image.ckpt"),
        ],
        "ckpt_path: the checkpoint is of another architecture: .* is missing",
    ),
    (
        "another_task",
        lambda given: [*image_fit(given), "--ckpt_path", str(given.made / "text.ckpt")],
        "ckpt_path: .*another",
    ),
    (
        "another_vocabulary",
        lambda given: [*text_fit(given), "--data.tokenizer", "bpe:300", "--ckpt_path", str(given.made / "text.ckpt")],
        "data.tokenizer: does not match the checkpoint's tokenizer",
    ),
]

COMMANDS = [
    ("grow_without_tokens", on("image.ckpt", "grow"), "tokens"),
    ("grow_to_less", on("image.ckpt", "grow", "--tokens", "4"), "tokens: qkv would shrink from 8 to 4"),
    (
        "grow_unknown_state",
        on("image.ckpt", "grow", "--tokens", "16", "--new_state", "men"),
        "new_state: unknown value 'men'",
    ),
    (
        "grow_output_exists",
        lambda given: [*on("image.ckpt", "grow", "--tokens", "16", "--output")(given), given.file("x")],
        "output: .* exists already",
    ),
    (
        "shrink_to_more",
        on("image.ckpt", "shrink", "--tokens", "16"),
        "tokens: qkv .* would grow from 8 to 16; use grow",
    ),
    ("shrink_to_none", on("image.ckpt", "shrink", "--tokens", "0.01"), "tokens: 0.01 of 8 qkv .* leaves none"),
    ("shrink_depth", on("image.ckpt", "shrink", "--tokens", "{depth: 1}"), "tokens: depth cannot shrink"),
    ("draft_of_no_tokens", on("text.ckpt", "generate", "--draft_tokens", "0.01"), "draft_tokens: .* leaves none"),
    ("draft_length", on("text.ckpt", "generate", "--draft_tokens", "0.5", "--draft_length", "0"), "draft_length: "),
    (
        "draft_of_images",
        lambda given: [*on("text.ckpt", "generate", "--draft")(given), str(given.made / "image.ckpt")],
        "image.ckpt",
    ),
    ("export_output_not_writable", on("text.ckpt", "export", "--output", "/proc/no/x"), "output: cannot write"),
    (
        "import_empty_folder",
        lambda given: ["import", "--source", str(given.folder)],
        "source: no model.safetensors or",
    ),
    ("generate_from_images", on("image.ckpt", "generate"), "ckpt_path: .* is of a LitImageClassifier"),
    ("generate_temperature", on("text.ckpt", "generate", "--temperature", "-1"), "temperature: expected"),
    ("generate_device", on("text.ckpt", "generate", "--device", "tpu9"), "device: tpu9 cannot be used"),
    ("generate_long_prompt", on("text.ckpt", "generate", "--prompt", "x" * 99), "prompt.*99.*32"),
    ("evaluate_limit", on("text.ckpt", "evaluate", "--tasks", "[piqa]", "--limit", "-1"), "limit: expected"),
    (
        "predict_output_exists",
        lambda given: [*image_fit(given, "predict"), "--output", given.file("x.csv")],
        "output: .* exists already",
    ),
    ("plan_without_end", image("--trainer.max_epochs", "-1", command="plan"), "trainer.max_steps: the length"),
]

ENVIRONMENT = [
    (
        "variable_of_wrong_type",
        lambda given: [*image_fit(given), *given.env(LIT_TOKENFORMER_FIT__TRAINER__MAX_EPOCHS="many")],
        "trainer.max_epochs: expected int or null, got 'many'",
    ),
    (
        "default_root_dir",
        image("--trainer.default_root_dir", "/proc/no"),
        "trainer.default_root_dir: cannot write to /proc/no",
    ),
    (
        "global_seed",
        lambda given: [*image_fit(given), "--seed_everything", "true", *given.env(PL_GLOBAL_SEED="garbage")],
        "PL_GLOBAL_SEED",
    ),
    ("devices_word", image("--trainer.devices", "many"), "trainer: `devices`"),
    ("no_gpu", image("--trainer.accelerator", "gpu"), "trainer: .*trainer.accelerator: gpu"),
    (
        "unknown_precision",
        image("--trainer.precision", "8-mixed"),
        "trainer.precision: expected .*'16-mixed'.* or null, got '8-mixed'",
    ),
    ("unknown_strategy", image("--trainer.strategy", "ddpp"), "trainer: .*`strategy='ddpp'`"),
    (
        "fsdp",
        lambda given: [*growing({1: 16})(given), "--trainer.strategy", "fsdp"],
        "trainer.strategy: .*lit-tokenformer grow",
    ),
    (
        "deepspeed",
        lambda given: [*growing({1: 16})(given), "--trainer.strategy", "deepspeed"],
        "trainer.strategy: .*lit-tokenformer grow",
    ),
    (
        "xla",
        lambda given: [*growing({1: 16})(given), "--trainer.strategy", "single_xla"],
        "trainer.strategy: .*lit-tokenformer grow",
    ),
    (
        "world_without_rank",
        lambda given: [
            *image_fit(given),
            *given.env(WORLD_SIZE="2", LOCAL_RANK="0", TORCHELASTIC_RUN_ID="x", GROUP_RANK="0", LOCAL_WORLD_SIZE="2"),
        ],
        "RANK",
    ),
    (
        "ranks_that_do_not_fit",
        lambda given: [
            *image_fit(given),
            *given.env(
                WORLD_SIZE="2", RANK="5", LOCAL_RANK="0", TORCHELASTIC_RUN_ID="x", GROUP_RANK="0", LOCAL_WORLD_SIZE="2"
            ),
        ],
        "RANK",
    ),
]

TABLES = {
    "command_line": COMMAND_LINE,
    "numbers": NUMBERS,
    "names": NAMES,
    "schedules": SCHEDULES,
    "data": DATA,
    "checkpoints": CHECKPOINTS,
    "commands": COMMANDS,
    "environment": ENVIRONMENT,
}
AFTER_LOGGER = {
    "numbers-batch_size_of_all",
    "numbers-channels",
    "data-only_corrupt_images",
    "data-text_empty",
    "data-cache_dir_not_writable",
    "checkpoints-last_of_none_to_validate",
    "data-text_not_utf8",
    "data-text_shorter_than_a_block",
    "data-block_and_context",
    "checkpoints-folder",
    "checkpoints-another_task",
    "checkpoints-another_vocabulary",
}
"""Rows that are found when Lightning has opened the log folder: by hooks that see data or a checkpoint."""
ROWS = [pytest.param(make, told, id=f"{name}-{row}") for name, table in TABLES.items() for row, make, told in table]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Configs of tiny fits and checkpoints of their models."""
    return make_files(tmp_path_factory.mktemp("made"))


def make_files(folder: Path) -> Path:
    trainer = {
        "max_epochs": 3,
        "log_every_n_steps": 1,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "callbacks": [],
    }
    data = {"class_path": "ImageDataModule", "init_args": {"dataset": "digits", "batch_size": 512}}
    model = {"class_path": "LitImageClassifier", "init_args": IMAGE_MODEL}
    (folder / "image.yaml").write_text(yaml.safe_dump({"trainer": trainer, "model": model, "data": data}))
    data = {
        "class_path": "TextDataModule",
        "init_args": {"block_size": 32, "batch_size": 4, "cache_dir": str(folder / "cache")},
    }
    model = {"class_path": "LitCausalLM", "init_args": TEXT_MODEL}
    (folder / "text.yaml").write_text(yaml.safe_dump({"trainer": trainer, "model": model, "data": data}))
    images = tasks.LitImageClassifier(num_classes=10, image_size=8, **IMAGE_MODEL)
    texts = tasks.LitCausalLM(vocab_size=257, context_length=32, **TEXT_MODEL)
    texts.tokenizer_json = Tokenizer.bytes().to_json()
    for name, task in (("image", images), ("text", texts)):
        write_checkpoint(fresh_checkpoint(task, task.state_dict()), folder / f"{name}.ckpt")
    Tokenizer.bytes().save(folder / "tokenizer.json")
    return folder


def files_below(*folders: Path) -> set[Path]:
    return {path for folder in folders for path in folder.rglob("*") if "cache" not in path.parts}


@pytest.mark.parametrize(("make", "told"), ROWS)
def test_bad_input_is_refused_in_one_line_and_leaves_nothing(make, told, made, tmp_path, monkeypatch, capfd, request):
    environment: dict[str, str] = {}
    args = make(Given(made, tmp_path, environment))
    for name, value in {**environment, "XDG_CACHE_HOME": str(made / "cache")}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    before = files_below(tmp_path, made)
    with warnings.catch_warnings(record=True) as warned:
        try:
            status = main(args)
        except SystemExit as stop:
            status = stop.code
    shown = capfd.readouterr()
    assert status == 2
    lines = shown.err.splitlines()
    assert [line for line in lines if line.startswith(("error", "Traceback"))] == lines[-1:], shown.err
    assert re.match(f"error: .*({told})", lines[-1]), shown.err
    assert not [str(one.message) for one in warned if not issubclass(one.category, DeprecationWarning)]  # not shown
    left = files_below(tmp_path, made) - before
    if request.node.callspec.id in AFTER_LOGGER:
        run = tmp_path / "work" / "lightning_logs" / "version_0"
        left -= {run.parent, run, run / "config.yaml", run / "hparams.yaml", *run.glob("events.out.tfevents.*")}
    assert not left


def test_a_config_that_can_be_read_once_is_left_to_the_parser(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    check_config(str(tmp_path / "pipe"))  # to read it would wait for who writes


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "4", "SLURM_PROCID": "1"}, {"RANK": "0"}, {"RANK": "node7"}])
def test_variables_of_other_launchers_are_left_alone(environment):
    check_environment(environment)
    check_processes(environment, Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False))


def test_the_table_has_what_was_promised():
    assert len(ROWS) >= 70 and len({row.id for row in ROWS}) == len(ROWS)


@pytest.mark.slow
def test_a_process_ends_as_the_command_does(made, tmp_path):
    commands = [
        ["fit", "--config", "vit_smal"],
        ["fit", "--config", str(made / "image.yaml"), "--data.batch_size", "0"],
        ["generate", "--ckpt_path", str(made / "image.ckpt")],
    ]
    code = (
        "import json, runpy, sys\n"
        "for command in json.loads(sys.argv.pop()):\n"
        "    sys.argv[1:] = command\n"
        "    try:\n"
        "        runpy.run_module('lit_tokenformer', run_name='__main__', alter_sys=True)\n"
        "    except SystemExit as stop:\n"
        "        print('status', stop.code, flush=True)\n"
    )
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root, "XDG_CACHE_HOME": str(tmp_path.parent / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.stdout.count("status 2") == len(commands) and "Traceback" not in done.stderr
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == len(commands), done.stderr
    assert not list(tmp_path.iterdir())
