"""Parts, data and tasks from outside the package, through the command line."""

import csv
import sys
from pathlib import Path

import pytest
import torch

from lit_tokenformer import registry
from lit_tokenformer.checkpoints.load import read_checkpoint
from lit_tokenformer.cli.main import main
from lit_tokenformer.cost import model_cost
from lit_tokenformer.errors import UserError
from lit_tokenformer.inference.sampling import Sampling, generate_tokens
from lit_tokenformer.models import Tokenformer, create_backbone, preset_config
from lit_tokenformer.models.mixers import Attention
from lit_tokenformer.models.positions import Positions
from lit_tokenformer.registry import MIXERS, NORMS, POSITIONS, Registry
from lit_tokenformer.tasks import LitCausalLM
from lit_tokenformer.tasks.rebuild import rebuild_task

TOYS = Path(__file__).parent / "data" / "plugins"
SIZES = {"dim": 16, "depth": 2, "num_heads": 2, "param_tokens": 8}
pytestmark = pytest.mark.usefixtures("text_cache")


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """The current folder is that of the toys."""
    monkeypatch.chdir(TOYS)
    monkeypatch.setattr(sys, "path", [*sys.path])


def run(*args):
    """Run a command in this process; return its exit status."""
    try:
        return main([str(arg) for arg in args])
    except SystemExit as stop:
        return stop.code


def load(name):
    sys.path.append(str(TOYS))
    registry.import_plugins([name])


def fit(folder, *args, config="causal_lm_small", method_of_growth=None):
    overrides = [f"--model.overrides.{name}={value}" for name, value in SIZES.items()]
    trainer = {"max_steps": 2, "limit_val_batches": 1, "accelerator": "cpu", "enable_progress_bar": "false"}
    trainer = [f"--trainer.{name}={value}" for name, value in trainer.items()]
    grows = GROWS if method_of_growth is None else [*GROWS[:3], method_of_growth, *GROWS[3:]]
    return run("fit", "--config", config, *overrides, *trainer, *grows, f"--trainer.default_root_dir={folder}", *args)


TEXT = ["--data.tokenizer=bytes", "--data.block_size=16", "--data.batch_size=4", "--trainer.val_check_interval=1"]
GROWS = ["--trainer.callbacks+=ParameterGrowthCallback", "--trainer.callbacks.schedule={1: 16}"]
GROWS += ["--trainer.callbacks.unit=step", "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint"]
GROWS += ["--trainer.callbacks.save_last=true"]


def last(folder):
    return next(folder.rglob("last.ckpt"))


def test_mixer_trains_grows_generates_and_is_costed(tmp_path, capfd):
    given = ["--plugins", "toy_mixer", "--model.overrides.mixer=running_mean", "--model.overrides.positions=none"]
    assert fit(tmp_path, *given, "--data.dataset=python_docs", *TEXT) == 0
    capfd.readouterr()
    checkpoint = last(tmp_path)
    text = ["--prompt", "import", "--max_new_tokens", 4, "--temperature", 0]
    assert run("generate", "--plugins", "toy_mixer", "--ckpt_path", checkpoint, *text) == 0
    assert capfd.readouterr().out.startswith("import")
    model = rebuild_task(checkpoint, read_checkpoint(checkpoint)).backbone.eval()
    assert model.param_tokens["qkv"] == 16
    assert model_cost(model.config, model.size).parameters == sum(one.numel() for one in model.parameters())
    written = [
        torch.stack(list(generate_tokens(model, [[1, 2, 3], [5]], 5, Sampling(temperature=0), cache=cache)))
        for cache in (True, False)
    ]
    assert torch.equal(*written)


def test_growth_method_grows_a_running_fit_and_a_checkpoint(tmp_path, capfd):
    method = "--trainer.callbacks.method=split_or_initialize"
    grows = ["--plugins", "toy_growth", "--data.dataset=python_docs", *TEXT]
    assert fit(tmp_path, *grows, method_of_growth=method) == 0
    checkpoint = last(tmp_path)
    (events,) = (state["events"] for key, state in read_checkpoint(checkpoint)["callbacks"].items() if "Growth" in key)
    assert [event["method"] for event in events] == ["split_or_initialize"]
    assert events[0]["rows"]["backbone.blocks.0.attn.query.key_tokens"] == [8, 16, 2, 0, 1]
    grown = tmp_path / "grown.ckpt"
    command = ["grow", "--plugins", "toy_growth", "--ckpt_path", checkpoint, "--tokens", "{qkv: 40, heads: 4}"]
    assert run(*command, "--method", "split_or_initialize", "--output", grown) == 0
    model = rebuild_task(grown, read_checkpoint(grown)).backbone
    assert model.size["qkv"] == 40 and model.size["heads"] == 4
    assert run(*command, "--method", "split_or_initialise", "--output", tmp_path / "x.ckpt") == 2
    assert "method: unknown value 'split_or_initialise', did you mean 'split_or_initialize'?" in capfd.readouterr().err


def test_combinations_of_a_plugin_are_checked():
    load("toy_mixer")
    with pytest.raises(UserError, match="mixer: unsupported combination: 'running_mean' needs causal: true, got false"):
        preset_config("tokenformer_lm_tiny", mixer="running_mean", causal=False)


@pytest.mark.parametrize("needs", [{}, {"stem": ("patch",)}], ids=str)
def test_new_part_can_declare_that_it_goes_with_one_that_does_not_know_it(needs, monkeypatch):
    """The patch stem supports learned positions alone."""
    monkeypatch.setattr(POSITIONS, "entries", {**POSITIONS.entries})
    POSITIONS.register("toy", **needs)(Positions(learned=True, limited=True))
    if needs:
        assert preset_config("vit_tiny_patch16_224", positions="toy").length_limit == 197
    else:
        with pytest.raises(UserError, match="stem: unsupported combination: 'patch' needs positions: learned, got toy"):
            preset_config("vit_tiny_patch16_224", positions="toy")


def losses(**settings):
    """Gradients of a model whose parts add auxiliary losses, from the sum of them and its output, and the losses."""
    torch.manual_seed(0)
    model = create_backbone("gpt2_tiny", **SIZES, feed_forward="small_mlp", vocab_size=11, context_length=8).double()
    model.set_grad_checkpointing(settings.get("checkpointing", False))
    if settings.get("compile"):
        model.compile(backend="aot_eager", dynamic=False)
    tokens = torch.arange(16).view(2, 8) % 11
    output = model.train()(tokens)
    found = model.take_aux_losses()
    (output.square().mean() + sum(found.values())).backward()
    assert not model.aux_losses
    model.eval()(tokens)
    assert not model.aux_losses
    return {name: parameter.grad for name, parameter in model.named_parameters()}, found


@pytest.mark.parametrize(
    "settings", [{"checkpointing": True}, {"compile": True}, {"checkpointing": True, "compile": True}], ids=str
)
def test_auxiliary_losses_count_once(settings):
    load("toy_loss")
    seen = []
    gradients, found = losses()
    for name, gradient in losses(**settings)[0].items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-12, atol=1e-14)
    model = create_backbone("gpt2_tiny", **SIZES, feed_forward="small_mlp", vocab_size=11, context_length=8)
    for block in model.blocks:
        block.mlp.activation.register_forward_hook(lambda *call: seen.append(0.1 * call[-1].square().mean()))
    model(torch.arange(16).view(2, 8) % 11)
    torch.testing.assert_close(model.take_aux_losses()["hidden_size"], sum(seen))
    assert found.keys() == {"hidden_size"}


def test_auxiliary_losses_are_trained_and_logged(tmp_path):
    given = ["--plugins", "toy_loss", "--model.overrides.feed_forward=small_mlp", "--data.dataset=python_docs"]
    logs = ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path}", "--trainer.log_every_n_steps=1"]
    assert fit(tmp_path, *given, *TEXT, *logs) == 0
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/aux/hidden_size"]]
    assert len(rows) == 2 and all(float(row["train/aux/hidden_size"]) > 0 for row in rows)
    task = LitCausalLM("gpt2_tiny", 11, 8, overrides={**SIZES, "feed_forward": "small_mlp"})
    task.log = lambda *args, **kwargs: None
    batch = torch.arange(18).view(2, 9) % 11
    loss, _ = task.total_loss(batch)
    plain, _ = task.training_loss(batch)
    torch.testing.assert_close(loss, plain + task.backbone.take_aux_losses()["hidden_size"])


def test_sources_of_text_and_images_feed_a_fit(tmp_path):
    assert fit(tmp_path / "text", "--plugins=toy_data", "--data.dataset=counting", *TEXT) == 0
    images = ["--plugins=toy_data", "--data.dataset=sides", "--data.batch_size=16", "--model.overrides.patch_size=4"]
    assert fit(tmp_path / "images", *images, config="vit_small") == 0


def test_task_is_fitted_by_class_path_and_rebuilt_from_its_checkpoint(tmp_path, capfd):
    given = ["--plugins", "toy_task", "--model=toy_task.LitSkipLM", "--model.preset=tokenformer_lm_tiny"]
    given += ["--model.weight=0.25", "--data=TextDataModule", "--data.dataset=python_docs"]
    assert fit(tmp_path, *given, *TEXT) == 0
    capfd.readouterr()
    checkpoint = last(tmp_path)
    task = rebuild_task(checkpoint, read_checkpoint(checkpoint))
    assert type(task).__name__ == "LitSkipLM" and task.weight == 0.25 and task.backbone.param_tokens["qkv"] == 16
    text = ["--prompt", "import", "--max_new_tokens", 4]
    assert run("generate", "--plugins", "toy_task", "--ckpt_path", checkpoint, *text) == 0
    assert capfd.readouterr().out.startswith("import")


def test_missing_module_is_reported_in_one_line(capfd):
    assert run("fit", "--plugins", "no_such_toy", "--config", "vit_small") == 2
    assert "error: --plugins: no module named 'no_such_toy'" in capfd.readouterr().err


def test_error_inside_a_module_keeps_its_traceback(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_toy.py").write_text("import a_module_that_is_not_there")
    assert run("fit", "--plugins", "broken_toy", "--config", "vit_small") == 1
    assert "broken_toy.py" in capfd.readouterr().err


def test_installed_plugins_load_once_and_a_broken_one_stops_nothing(tmp_path, monkeypatch):
    """Entry points of a package, of which one cannot be imported."""
    info = tmp_path / "toys-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
    points = f"[{registry.PLUGIN_GROUP}]\nbroken = broken_norm\nnorm = toy_norm\n"
    (info / "entry_points.txt").write_text(points)
    (tmp_path / "broken_norm.py").write_text("raise OSError('no such device')")
    norm = "from torch import nn\nfrom lit_tokenformer.registry import NORMS\n"
    norm += "NORMS.register('toy_norm')(lambda config, affine: nn.LayerNorm(config.dim, elementwise_affine=affine))"
    (tmp_path / "toy_norm.py").write_text(norm)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_loaded", False)
    with pytest.warns(UserWarning, match=r"plugin 'broken' \(broken_norm\) skipped: OSError: no such device"):
        model = create_backbone("gpt2_tiny", **SIZES, norm="toy_norm", vocab_size=11)
    assert "toy_norm" in NORMS.names() and model(torch.tensor([[1, 2]])).isfinite().all()
    del NORMS.entries["toy_norm"]


def test_part_without_cost_is_estimated_with_one_warning(monkeypatch):
    class Uncounted(Attention):
        cost = None

    monkeypatch.setitem(MIXERS.entries, "uncounted", Uncounted)
    config = preset_config("gpt2_tiny", **SIZES, vocab_size=11, mixer="uncounted")
    with pytest.warns(UserWarning, match="Uncounted declares no cost") as warned:
        for depth in (1, 2):
            found = model_cost(config, {"depth": depth})
    assert len(warned) == 1
    assert found.parameters == sum(parameter.numel() for parameter in Tokenformer(config).parameters())


def test_names_are_unique():
    shapes = Registry("shape")
    shapes.register("round")(1)
    with pytest.raises(UserError, match="shape: 'round' is already registered"):
        shapes.register("round")(2)
