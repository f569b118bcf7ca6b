"""Nothing that is read is executed, and a checkpoint makes no class but those that are trusted."""

import ast
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lit_tokenformer import tasks
from lit_tokenformer.checkpoints.load import read_checkpoint, write_checkpoint
from lit_tokenformer.checkpoints.trust import check_class_paths, is_trusted_class
from lit_tokenformer.cli.commands import export_weights, grow_checkpoint
from lit_tokenformer.cli.main import main
from lit_tokenformer.data import TextDataModule, Tokenizer
from lit_tokenformer.data.images.sources import decode_hub_image
from lit_tokenformer.inference.text import TextGenerator
from lit_tokenformer.tasks.rebuild import fresh_checkpoint, rebuild_task

ROOT = Path(__file__).parents[1]
TINY = {"dim": 32, "depth": 1, "num_heads": 2, "param_tokens": 8, "rotary_fraction": 0.5}
BY_NAME = {
    "_instantiator": "lightning.pytorch.cli.instantiate_module",
    "_class_path": "lit_tokenformer.tasks.LitCausalLM",
}


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.mkdir, (Path(self.marker),)


@pytest.fixture
def marker(tmp_path):
    """What is there once a payload has run."""
    yield tmp_path / "executed"
    assert not (tmp_path / "executed").exists()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A checkpoint of a tiny language model."""
    task = tasks.LitCausalLM("tokenformer_lm_tiny", 257, 32, overrides=TINY)
    task.tokenizer_json = Tokenizer.bytes().to_json()
    path = tmp_path_factory.mktemp("good") / "good.ckpt"
    write_checkpoint(fresh_checkpoint(task, task.state_dict()), path)
    return path


def refused(capfd, *args):
    """Runs a command that is to be refused; returns what it tells."""
    try:
        status = main([str(arg) for arg in args])
    except SystemExit as stop:
        status = stop.code
    told = capfd.readouterr().err.splitlines()
    assert status == 2 and len(told) == 1
    return told[0]


def test_the_payload_works(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "executed")))
    assert (tmp_path / "executed").is_dir()


COMMANDS = {
    "grow": ["grow", "--tokens", "16"],
    "shrink": ["shrink", "--tokens", "4"],
    "split": ["split", "--output", "out"],
    "export": ["export", "--output", "out"],
    "generate": ["generate"],
    "fit": ["fit", "--config", "causal_lm_small"],
    "validate": ["validate", "--config", "causal_lm_small"],
}


@pytest.mark.parametrize(
    ("command", "place"),
    [*((command, "whole") for command in COMMANDS), *(("generate", place) for place in ("state", "tokenizer", "data"))],
)
def test_pickled_code_in_a_checkpoint_never_runs(command, place, good, marker, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    path, payload = tmp_path / "evil.ckpt", Payload(marker)
    checkpoint = torch.load(good, weights_only=True)
    places = {
        "whole": payload,
        "state": {**checkpoint, "state_dict": {"weight": payload}},
        "tokenizer": {**checkpoint, "tokenizer": payload},
        "data": {**checkpoint, "TextDataModule": {"loader": payload}},
    }
    path.write_bytes(pickle.dumps(payload)) if place == "whole" else torch.save(places[place], path)
    assert "ckpt_path: " in refused(capfd, *COMMANDS[command], "--ckpt_path", path)


def test_pickled_code_in_a_checkpoint_never_runs_when_it_is_scored(good, marker, tmp_path):
    torch.save({**torch.load(good, weights_only=True), "callbacks": Payload(marker)}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="ckpt_path: .* holds pickled code"):
        TextGenerator.load(tmp_path / "evil.ckpt")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_pickled_code_in_published_weights_never_runs(name, good, marker, tmp_path, capfd):
    folder = export_weights(str(good), str(tmp_path / "published"))
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Payload(marker)}, folder / name)
    assert "source: " in refused(capfd, "import", "--source", folder)
    (folder / name).write_bytes(pickle.dumps(Payload(marker)))
    assert "source: " in refused(capfd, "import", "--source", folder)


def test_an_index_of_weights_is_not_followed(tmp_path, capfd):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret.safetensors"}}')
    assert "source: no model.safetensors" in refused(capfd, "import", "--source", tmp_path)


def test_a_data_set_opens_no_file_outside_of_its_folders(tmp_path):
    for name in ("own/image.png", "secret.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    own = str(tmp_path / "own")
    assert decode_hub_image({"bytes": None, "path": f"{own}/image.png"}, (own,)).size == (8, 8)
    for path in (f"{own}/../secret.png", str(tmp_path / "secret.png"), "secret.png"):
        with pytest.raises(ValueError, match="data.hf_name: the data set references .* outside of its folders"):
            decode_hub_image({"bytes": None, "path": path}, (own,))


def test_pickled_code_in_a_tokenizer_never_runs(marker, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(ValueError, match="data.tokenizer: "):
        Tokenizer.load(str(path))


def test_pickled_code_in_the_cache_never_runs_and_the_cache_is_made_anew(marker, tmp_path):
    def data():
        return TextDataModule("python_docs", tokenizer="bpe:300", cache_dir=str(tmp_path / "cache"))

    before = data()
    before.prepare_data()
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    for path in files:
        path.write_bytes(pickle.dumps(Payload(marker)))
    after = data()
    after.prepare_data()
    assert after.corpus.tokens.sha256 == before.corpus.tokens.sha256
    for path in [path for path in files if path.suffix == ".bin"]:
        np.array([Payload(marker)], dtype=object).dump(path)  # as NumPy pickles it
    assert data().corpus.tokens.sha256 == before.corpus.tokens.sha256


EXECUTE = {
    *(f"{module}.{name}" for module in ("pickle", "dill", "joblib", "marshal") for name in ("load", "loads")),
    *("shelve.open", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "pickle.Unpickler"),
    *("eval", "exec", "os.system", "os.popen"),
}
"""Functions that can run what they read."""


def calls():
    """Every call in the sources: the file, the line, what is called, and its keywords."""
    for path in [
        path for room in ("lit_tokenformer", "callbacks", "benchmarks") for path in (ROOT / room).rglob("*.py")
    ]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                yield f"{path.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.func), keywords


def test_no_call_can_run_what_it_reads():
    seen = 0
    for place, name, keywords in calls():
        seen += 1
        assert name not in EXECUTE, place
        assert keywords.get("trust_remote_code", "False") == "False", place
        assert keywords.get("allow_pickle", "False") == "False", place
        if name in ("torch.load", "load_from_checkpoint") or name.endswith(
            (".load_from_checkpoint", ".load_checkpoint")
        ):
            assert name != "torch.load" or keywords.get("weights_only") == "True", place
            assert keywords.get("weights_only") != "False", place
    assert seen > 1000


@pytest.fixture
def strange_module(tmp_path, monkeypatch):
    """The name of an importable module that leaves a mark when it is imported, and whose class does when it is made."""
    code = (
        "import pathlib, torch\n"
        "pathlib.Path(__file__).with_name('executed').mkdir(exist_ok=True)\n"
        "class Payload(torch.optim.SGD):\n    pass\n"
    )
    (tmp_path / "strange_module.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "strange_module"
    sys.modules.pop("strange_module", None)


ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}
STRANGE = {
    "class": {"optimizer": {"class_path": "strange_module.Payload"}},
    "name_alone": {"optimizer": "strange_module.Payload"},
    "scheduler": {"lr_scheduler": {"class_path": "strange_module.Payload"}},
    "nested": {"optimizer": {**ADAMW, "init_args": {"lr": {"class_path": "strange_module.Payload"}}}},
    "in_a_list": {"optimizer": {**ADAMW, "init_args": {"betas": ["strange_module.Payload", 0.9]}}},
    "function": {
        "lr_scheduler": {
            "class_path": "torch.optim.lr_scheduler.LambdaLR",
            "init_args": {"lr_lambda": "strange_module.Payload"},
        }
    },
    "process": {"optimizer": {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "executed"]}}},
    "through_a_module": {"optimizer": {"class_path": "lit_tokenformer.cli.main.os.system"}},
    "a_task_of_another": {"_class_path": "strange_module.Payload"},
    "overrides": {"overrides": {"class_path": "strange_module.Payload"}},
}


def naming(kind, good, tmp_path):
    """A checkpoint that names a stranger's class, with the state of an optimizer."""
    checkpoint = torch.load(good, weights_only=True)
    checkpoint["hyper_parameters"] |= {**BY_NAME, "optimizer": ADAMW, **STRANGE[kind]}
    checkpoint["optimizer_states"] = [{"state": {}, "param_groups": []}]
    path = tmp_path / "evil.ckpt"
    torch.save(checkpoint, path)
    return path


@pytest.mark.parametrize("kind", STRANGE)
def test_a_checkpoint_names_no_class_of_a_stranger(kind, good, strange_module, marker, tmp_path):
    path = naming(kind, good, tmp_path)
    if "lr_scheduler" in STRANGE[kind]:  # which nothing here makes
        rebuild_task(path, read_checkpoint(path)).build_optimizer()
    else:
        with pytest.raises(ValueError, match="ckpt_path: .* names '.*', which was not imported|names None"):
            rebuild_task(path, read_checkpoint(path)).build_optimizer()
    assert strange_module not in sys.modules


def test_only_what_needs_an_optimizer_refuses_one_of_a_stranger(good, strange_module, marker, tmp_path, capfd):
    path = naming("class", good, tmp_path)
    assert "names 'strange_module.Payload'" in refused(capfd, *COMMANDS["grow"], "--ckpt_path", path)
    export_weights(str(path), str(tmp_path / "out"))
    TextGenerator.load(path).generate("a", 2)
    assert strange_module not in sys.modules


@pytest.mark.parametrize(
    "arguments",
    [
        {"optimizer": ADAMW, "lr_scheduler": None},
        {"optimizer": {"class_path": "timm.optim.Lion", "init_args": {"lr": 1e-4}}},
        {"lr_scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1}}},
        {
            "lr_scheduler": {
                "class_path": "lightning.pytorch.cli.ReduceLROnPlateau",
                "init_args": {"monitor": "val/loss"},
            }
        },
        {"preset": "vit_small_patch16_224", "schedule": {"name": "cosine", "warmup": 0.5}},
    ],
)
def test_what_fits_are_made_of_is_trusted(arguments):
    check_class_paths({**BY_NAME, **arguments}, "some.ckpt")


def test_a_checkpoint_with_an_optimizer_by_name_is_made_again(good, tmp_path):
    checkpoint = torch.load(good, weights_only=True)
    checkpoint["hyper_parameters"] |= {**BY_NAME, "optimizer": ADAMW}
    torch.save(checkpoint, tmp_path / "own.ckpt")
    assert grow_checkpoint(str(tmp_path / "own.ckpt"), 16).is_file()


def test_only_classes_that_trusted_packages_define_are_trusted():
    assert is_trusted_class("lit_tokenformer.tasks.LitCausalLM") and is_trusted_class("torch.optim.adamw.AdamW")
    for name in (
        "torch.nn.Linear",
        "torch.optim.adamw.Tensor",
        "lit_tokenformer.cli.commands.grow_checkpoint",
        "",
        "torch",
    ):
        assert not is_trusted_class(name)
    assert not is_trusted_class("lit_tokenformer.cli.commands.shutil.rmtree")


@pytest.mark.parametrize("below", ["init_args", "dict_kwargs"])
def test_a_text_that_looks_like_a_config_makes_nothing(tmp_path, marker, good, below):
    """jsonargparse reads a text given for an untyped argument as YAML, and makes the class that it finds there."""
    hidden = f"{{class_path: subprocess.Popen, init_args: {{args: mkdir {marker}, shell: true}}}}"
    checkpoint = read_checkpoint(good)
    optimizer = {"class_path": "timm.optim.SGDP", below: {"lr": hidden}}
    checkpoint["hyper_parameters"] |= {**BY_NAME, "optimizer": optimizer}
    path = tmp_path / "stranger.ckpt"
    write_checkpoint(checkpoint, path)
    rebuild_task(path, checkpoint)
    export_weights(str(path), str(tmp_path / "out"))
