"""The command line for language models, as its user calls it."""

import json
import logging
import re

import pytest
import torch
import yaml

from lit_tokenformer.cli.main import main
from lit_tokenformer.cli.preflight import use_saved_tokenizer
from lit_tokenformer.data import ImageDataModule, MaskedTextDataModule, MultiTaskDataModule, TextDataModule, Tokenizer
from lit_tokenformer.growth import shrink
from lit_tokenformer.models import param_tokens
from lit_tokenformer.tasks import LitCausalLM

pytestmark = pytest.mark.usefixtures("text_cache")


def run(*args):
    """Runs a command in this process; returns its exit status."""
    try:
        return main([str(arg) for arg in args])
    except SystemExit as stop:
        return stop.code


def config(folder):
    """A tiny model on Python's documentation, with growth by step and all that has a default left out."""
    growth = {"class_path": "callbacks.ParameterGrowthCallback", "init_args": {"schedule": {2: 16}, "unit": "step"}}
    checkpoint = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}}
    sizes = {"dim": 32, "depth": 1, "num_heads": 2, "rotary_fraction": 0.5, "param_tokens": 8}
    given = {
        "trainer": {
            "max_steps": 4,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "limit_val_batches": 2,
            "limit_test_batches": 2,
            "val_check_interval": 2,
            "default_root_dir": str(folder),
            "callbacks": [growth, {"class_path": "callbacks.TrainingMonitor"}, checkpoint],
        },
        "model": {
            "class_path": "LitCausalLM",
            "init_args": {"preset": "tokenformer_lm_tiny", "overrides": sizes, "schedule": {"unit": "step"}},
        },
        "data": {
            "class_path": "TextDataModule",
            "init_args": {"block_size": 32, "batch_size": 4},
        },
    }
    path = folder / "given.yaml"
    path.write_text(yaml.safe_dump(given, sort_keys=False))
    return path


def test_an_annealed_branch_equals_its_schedule_in_one_piece_and_the_stable_phase_grows_on(tmp_path, capsys):
    """The last checkpoint of a constant rate is annealed on a branch, and is what the next size grows from."""
    given = config(tmp_path)

    def fit(name, *settings):
        assert run("fit", "--config", given, "--trainer.default_root_dir", tmp_path / name, *settings) == 0
        assert "the learning-rate schedule changed" not in capsys.readouterr().err
        return tmp_path / name / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt"

    constant = ("--model.schedule.name", "constant", "--model.schedule.warmup", "1")
    annealed = ("--model.schedule.name", "wsd", "--model.schedule.warmup", "1", "--model.schedule.decay", "2")
    stable = fit("stable", *constant)
    branch = fit("branch", *annealed, "--trainer.max_steps", "6", "--ckpt_path", stable)
    whole = fit("whole", *annealed, "--trainer.max_steps", "6")
    ours, theirs = (torch.load(path, weights_only=True) for path in (branch, whole))
    assert all(torch.equal(ours["state_dict"][name], tensor) for name, tensor in theirs["state_dict"].items())
    assert ours["lr_schedulers"] == theirs["lr_schedulers"] and ours["lr_schedulers"][0]["_last_lr"] == [0.0] * 2
    content = yaml.safe_load(given.read_text())
    content["trainer"]["callbacks"][0]["init_args"]["schedule"][4] = 32
    given.write_text(yaml.safe_dump(content))
    larger = torch.load(fit("larger", *constant, "--trainer.max_steps", "6", "--ckpt_path", stable), weights_only=True)
    assert larger["param_tokens"]["qkv"] == 32 and larger["lr_schedulers"][0]["_last_lr"] == [6e-4] * 2


@pytest.fixture(scope="module")
def fitted(text_cache, tmp_path_factory):
    """A folder with a fit that grew."""
    folder = tmp_path_factory.mktemp("text")
    assert run("fit", "--config", config(folder)) == 0
    return folder


def last(folder):
    return folder / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt"


def test_sizes_reach_the_model_from_the_data_and_it_grows(fitted):
    task = LitCausalLM.load_from_checkpoint(last(fitted), weights_only=True)
    assert task.backbone.config.vocab_size == 257 and task.backbone.config.context_length == 32
    assert task.separator_id == 256 and param_tokens(task)["qkv"] == 16
    assert (last(fitted).parent / "tokenizer.json").is_file()


def test_it_is_told_what_was_trained_on_and_how_fast(tmp_path, caplog):
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).addHandler(caplog.handler)
    assert run("fit", "--config", config(tmp_path), "--trainer.max_steps", 3) == 0
    told = caplog.text
    assert "python_docs: 7" in told and "sha256" in told
    assert "data tokens in" in told and "per second" in told and "Growth at epoch 0, step 2" in told


def test_a_saved_config_with_the_default_optimizer_can_be_run_again(fitted, tmp_path):
    saved = fitted / "lightning_logs" / "version_0" / "config.yaml"
    assert run("fit", "--config", saved, "--trainer.default_root_dir", tmp_path) == 0
    ours, theirs = (torch.load(last(folder), weights_only=True)["state_dict"] for folder in (fitted, tmp_path))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_was_trained_writes_grows_and_is_exported_and_imported(fitted, tmp_path, capsys):
    args = ["--prompt", "The import", "--max_new_tokens", 8, "--temperature", 0, "--format", "json"]
    assert run("generate", "--ckpt_path", last(fitted), *args) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["tokens"] <= 8 and written["prompt"] == "The import"
    assert run("grow", "--ckpt_path", last(fitted), "--tokens", 32, "--output", tmp_path / "new/grown.ckpt") == 0
    assert run("export", "--ckpt_path", tmp_path / "new/grown.ckpt", "--output", tmp_path / "published") == 0
    assert run("import", "--source", tmp_path / "published", "--output", tmp_path / "again.ckpt") == 0
    capsys.readouterr()
    for path in (tmp_path / "new/grown.ckpt", tmp_path / "again.ckpt"):
        assert run("generate", "--ckpt_path", path, *args) == 0
        assert json.loads(capsys.readouterr().out)["completion"] == written["completion"]


def test_a_shrunk_checkpoint_is_an_ordinary_one(fitted, tmp_path, capsys):
    small = tmp_path / "device.ckpt"
    assert run("shrink", "--ckpt_path", last(fitted), "--tokens", 4, "--output", small) == 0
    assert "qkv 16 -> 4, proj 16 -> 4, ffn 64 -> 16 tokens" in capsys.readouterr().out
    assert run("shrink", "--ckpt_path", last(fitted), "--tokens", 0.25, "--output", tmp_path / "share.ckpt") == 0
    task = LitCausalLM.load_from_checkpoint(last(fitted), weights_only=True)
    shrink(task, 4)
    for path in (small, tmp_path / "share.ckpt"):
        state = torch.load(path, weights_only=True)["state_dict"]
        assert all(torch.equal(value, state[name]) for name, value in task.state_dict().items())
    assert run("export", "--ckpt_path", small, "--output", tmp_path / "published") == 0
    assert run("import", "--source", tmp_path / "published", "--output", tmp_path / "again.ckpt") == 0
    assert run("grow", "--ckpt_path", small, "--tokens", 8, "--output", tmp_path / "grown.ckpt") == 0
    texts = set()
    args = ["--prompt", "The import", "--max_new_tokens", 8, "--temperature", 0, "--format", "json"]
    for path in (small, tmp_path / "again.ckpt", tmp_path / "grown.ckpt"):
        capsys.readouterr()
        assert run("generate", "--ckpt_path", path, *args) == 0
        texts.add(json.loads(capsys.readouterr().out)["completion"])
    assert len(texts) == 1
    assert run("generate", "--ckpt_path", last(fitted), *args) == 0
    alone = json.loads(capsys.readouterr().out)["completion"]
    for draft in (["--draft", small], ["--draft_tokens", 0.25, "--draft_length", 2]):
        assert run("generate", "--ckpt_path", last(fitted), *args, *draft) == 0
        shown = capsys.readouterr()
        assert json.loads(shown.out)["completion"] == alone
        assert re.search(r"note: [\d.]+ calls of the model per 100 tokens \(\d+ for 8\)", shown.err)
    assert run("generate", "--ckpt_path", last(fitted), *args, "--draft", small, "--draft_tokens", 4) == 2
    assert "draft_tokens: conflicts with draft" in capsys.readouterr().err
    where = ["--trainer.default_root_dir", tmp_path, "--model.overrides.param_tokens", 4, "--trainer.max_steps", 3]
    assert run("fit", "--config", config(tmp_path), *where, "--init_from", small) == 0
    for tokens, problem in (
        (32, "tokens: qkv of layer 'backbone.blocks.0.attn.query' would grow"),
        (0.01, "leaves none"),
    ):
        assert run("shrink", "--ckpt_path", last(fitted), "--tokens", tokens, "--output", tmp_path / "no.ckpt") == 2
        assert problem in capsys.readouterr().err.splitlines()[-1]
    assert run("shrink", "--ckpt_path", last(fitted), "--tokens", 4, "--output", small) == 2


def test_any_text_is_validated_on_but_not_with_another_tokenizer(fitted, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("A text that nobody trained on. " * 20)
    where = ["--ckpt_path", last(fitted), "--trainer.default_root_dir", tmp_path, "--data.dataset", "files"]
    where += ["--data.val_files", f"[{tmp_path / 'a.txt'}]"]
    assert run("validate", "--config", config(tmp_path), *where) == 0
    assert "val/bits_per_byte" in capsys.readouterr().out
    own = str(last(fitted).parent / "tokenizer.json")
    assert run("validate", "--config", config(tmp_path), *where, "--data.tokenizer", own) == 0
    other = json.loads((last(fitted).parent / "tokenizer.json").read_text())
    vocabulary = other["model"]["vocab"]
    other["model"]["vocab"] = {piece: 255 - number if number < 256 else number for piece, number in vocabulary.items()}
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    capsys.readouterr()
    assert run("validate", "--config", config(tmp_path), *where, "--data.tokenizer", tmp_path / "tokenizer.json") == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("error: data.tokenizer: does not match the checkpoint's tokenizer")


def test_one_text_file_is_a_corpus(tmp_path, capsys, caplog):
    (tmp_path / "one.txt").write_text("\n".join(f"Line {number} of a text file." for number in range(100)))
    where = ["--trainer.default_root_dir", tmp_path, "--data.dataset", "files", "--data.files", tmp_path / "one.txt"]
    with caplog.at_level(logging.INFO):
        assert run("fit", "--config", config(tmp_path), *where) == 0
    assert "Corpus of one document: split by position (bytes: train 2150, val 239)" in caplog.text
    alone = [*where, "--data.val_fraction", 0]
    assert run("fit", "--config", config(tmp_path), *alone) == 0  # without validation
    for more, stage in ((["--trainer.callbacks.monitor", "val/loss"], "fit"), ([], "validate")):
        capsys.readouterr()
        assert run(stage, "--config", config(tmp_path), *alone, *more) == 2
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith("error: data.val_fraction: 0 leaves no validation data"), message


def test_a_tokenizer_of_another_size_is_told_as_such(fitted, tmp_path, capsys):
    args = ["--ckpt_path", last(fitted), "--data.tokenizer", "bpe:300"]
    assert run("validate", "--config", config(tmp_path), *args) == 2
    assert "data.tokenizer: does not match" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("padded", [{}, {"pad_vocab_to": 64}])
def test_the_tokenizer_of_the_checkpoint_is_taken(padded, tmp_path, capsys, monkeypatch):
    """Neither ``bpe:N`` of the config, trained on other documents, nor the default."""
    task, data = ("LitMaskedLM", "MaskedTextDataModule") if padded else ("LitCausalLM", "TextDataModule")
    given = yaml.safe_load(config(tmp_path).read_text())
    given["trainer"]["callbacks"] = given["trainer"]["callbacks"][2:]
    if padded:
        given["model"]["init_args"] = {"preset": "bert_tiny", "overrides": {"dim": 32, "depth": 1, "num_heads": 2}}
    given["model"]["class_path"] = task
    given["data"] = {"class_path": data, "init_args": {"block_size": 32, "batch_size": 4, **padded}}
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(given))
    (tmp_path / "a.txt").write_text("Another text, zebras and all: nobody trained on it. " * 20)
    fit = ["fit", "--config", tmp_path / "given.yaml", "--data.tokenizer", "bpe:300", "--trainer.max_steps", 2]
    fit += ["--run_name", "own"]
    assert run(*fit) == 0
    monkeypatch.setattr("lit_tokenformer.data.text.tokenizer.Tokenizer.train_bpe", lambda *_: pytest.fail("trained"))
    where = ["--config", tmp_path / "given.yaml", "--ckpt_path", last(tmp_path)]
    others = ["--data.dataset", "files", "--data.val_files", f"[{tmp_path / 'a.txt'}]"]
    scores = []
    for asked in (["--data.tokenizer", "bpe:300"], []):
        assert run("validate", *where, *others, *asked) == 0
        scores.append(re.search(r"val/loss\W+([\d.]+)", capsys.readouterr().out)[1])
    assert scores[0] == scores[1]
    assert run("test", *where, "--data.test_fraction", 0.1) == 0
    monkeypatch.setattr(TextDataModule, "prepare_data", lambda _: pytest.fail("prepared"))
    newest = [*where[:-1], "last", "--run_name", "own"]
    for given in (where, newest):
        assert run("validate", *given, *others, "--data.tokenizer", "bytes") == 2
        assert "data.tokenizer: does not match" in capsys.readouterr().err.strip().splitlines()[-1]
    assert run("validate", *newest[:-1], "other") == 2
    assert "ckpt_path: no last checkpoint (none of " in capsys.readouterr().err.strip().splitlines()[-1]


def test_each_task_takes_its_own_tokenizer(tmp_path):
    """Also an unusual separator; a file that is named is kept, and compared when the checkpoint is loaded."""
    own, masked = Tokenizer.train_bpe(["a b c d"] * 9, 260, "<stop>"), Tokenizer.bytes().with_mask()
    own.save(tmp_path / "tokenizer.json")
    saved = {
        "extras": {
            "a": {"tokenizer": own.to_json()},
            "b": {"tokenizer": masked.to_json()},
            "c": {"tokenizer": own.to_json()},
        },
        "hyper_parameters": {"sizes": {"a": {"vocab_size": 300, "separator_id": own.separator_id}, "b": {}}},
        "state_dict": {"a.weight": torch.zeros(300, 2, device="meta")},
    }
    named = str(tmp_path / "tokenizer.json")
    parts = {
        "a": TextDataModule(tokenizer="bpe:270"),
        "b": MaskedTextDataModule(),
        "c": TextDataModule(tokenizer=named, separator="<stop>"),
        "image": ImageDataModule("digits"),
    }
    data = MultiTaskDataModule(tasks=parts, epoch="a")
    use_saved_tokenizer(data, saved, asked=False)
    assert (data.a.vocab_size, data.a.separator_id) == (300, own.separator_id)
    assert (data.b.mask_id, data.b.vocab_size, data.c.vocab_size) == (257, 258, own.size)
    for setting, asked in (("bpe:258", False), ("bytes", True)):
        data = TextDataModule(tokenizer=setting, separator="<stop>")
        use_saved_tokenizer(data, {"tokenizer": own.to_json(), "state_dict": {}}, asked)
        assert "tokenizer" not in vars(data.corpus)
    for damaged in (
        {"extras": {"a": 3}},
        {"tokenizer": 3},
        {"tokenizer": own.to_json(), "hyper_parameters": {"sizes": 3}},
    ):
        use_saved_tokenizer(TextDataModule(separator="<stop>"), {"state_dict": {}, **damaged}, asked=False)


def test_nothing_is_overwritten_without_a_logger(fitted, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("mine")
    args = ["--ckpt_path", last(fitted), "--trainer.logger", "false"]
    assert run("validate", "--config", config(tmp_path), *args) == 0
    assert run("test", "--config", config(tmp_path), *args, "--data.test_fraction", "0.1") == 0
    assert (tmp_path / "config.yaml").read_text() == "mine"


def test_prediction_points_to_generate(fitted, tmp_path, capsys):
    assert run("predict", "--config", config(tmp_path), "--ckpt_path", last(fitted)) == 2
    assert "generate" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data.dataset", "python_doc"], "did you mean 'python_docs'?"),
        (["--data.val_fraction", "1e-9"], "data.val_fraction: empty validation split"),
    ],
)
def test_bad_input_is_told_in_one_line_before_any_work(args, message, tmp_path, capsys):
    assert run("fit", "--config", config(tmp_path), *args) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("error: ") and message in told


def test_an_imported_model_is_fitted_further(fitted, tmp_path):
    assert run("export", "--ckpt_path", last(fitted), "--output", tmp_path / "published") == 0
    assert run("import", "--source", tmp_path / "published", "--output", tmp_path / "start.ckpt") == 0
    args = ["--ckpt_path", tmp_path / "start.ckpt", "--trainer.default_root_dir", tmp_path]
    assert run("fit", "--config", config(tmp_path), *args) == 0
    saved = torch.load(last(tmp_path), weights_only=True)
    assert saved["global_step"] == 4 and saved["param_tokens"]["qkv"] == 16
