"""The moving average grows with the model, and disturbs neither training nor a resume."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from callbacks.growing_ema import GrowingEMA, _moving_average
from callbacks.parameter_growth import ParameterGrowthCallback
from lit_tokenformer.models import Pattention
from lit_tokenformer.tasks import LitImageClassifier

TINY: Any = {"dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4, "param_tokens": 8}


def build_task(**settings: Any) -> LitImageClassifier:
    seed_everything(0, verbose=False)
    return LitImageClassifier(
        "tokenformer_vit_tiny_patch16_224", num_classes=10, image_size=8, overrides=TINY, **settings
    )


def loader(samples: int = 32) -> DataLoader:
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(samples, 3, 8, 8, generator=draw)
    return DataLoader(TensorDataset(images, torch.randint(10, (samples,), generator=draw)), batch_size=8)


def build_trainer(folder: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    return Trainer(
        **{
            "default_root_dir": folder,
            "callbacks": list(callbacks),
            "max_epochs": 3,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **settings,
        }
    )


class AtGrowth(Callback):
    """Keeps the averaged model as it is right before and right after a growth; stands before the growth's callback."""

    def __init__(self, growth: ParameterGrowthCallback, ema: GrowingEMA) -> None:
        self.growth, self.ema = growth, ema
        self.live: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        assert self.ema._average_model is not None
        if not self.growth.events:
            self.before = copy.deepcopy(self.ema._average_model.module).eval()

    def on_before_zero_grad(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        assert self.ema._average_model is not None
        if self.growth.events and not self.live:
            self.after = copy.deepcopy(self.ema._average_model.module).eval()
            self.live = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize(("method", "total"), [("split", 16), ("split", 20), ("zero_keys", 12)])
def test_growth_preserves_output_of_average(tmp_path: Path, method: str, total: int) -> None:
    ema, growth = GrowingEMA(decay=0.9), ParameterGrowthCallback({1: total}, method=method, seed=3)
    kept = AtGrowth(growth, ema)
    build_trainer(tmp_path, kept, growth, ema, max_epochs=2).fit(build_task(), loader())
    image = next(iter(loader()))[0]
    before, after = kept.before(image), kept.after(image)
    assert (after - before).norm() / before.norm() < 1e-5
    sizes = {layer.kind: layer.num_tokens for layer in kept.after.modules() if isinstance(layer, Pattention)}
    assert sizes == {"qkv": total, "proj": total, "ffn": 4 * total}


@pytest.mark.parametrize("method", ["split", "zero_keys", "random"])
def test_average_gets_the_same_new_rows(tmp_path: Path, method: str) -> None:
    ema, growth = GrowingEMA(decay=0.9), ParameterGrowthCallback({1: 12}, method=method, seed=3)
    kept = AtGrowth(growth, ema)
    build_trainer(tmp_path, kept, growth, ema, max_epochs=2).fit(build_task(), loader())
    average = kept.after.state_dict()
    for name, live in kept.live.items():
        if name.endswith("proj.value_tokens"):
            assert torch.equal(live[8:], average[name][8:])  # 12 is no multiple of 8: these are new under each method
            assert not torch.equal(live[:8], average[name][:8])
        elif name.endswith("tau"):
            assert torch.equal(live, average[name])


def test_average_is_that_of_the_formula(tmp_path: Path) -> None:
    class Snapshots(Callback):
        def __init__(self) -> None:
            self.weights: list[Tensor] = []

        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            self.weights.append(pl_module.backbone.norm.weight.detach().clone())

    ema, seen, task = GrowingEMA(decay=0.5), Snapshots(), build_task()
    build_trainer(tmp_path, ema, seen, max_epochs=2).fit(task, loader())
    expected = seen.weights[0]
    for updates, weights in enumerate(seen.weights[1:], start=1):
        kept = min(0.5, (1 + updates) / (10 + updates))
        expected = kept * expected + (1 - kept) * weights
    torch.testing.assert_close(task.backbone.norm.weight.detach(), expected)


def test_average_of_equal_numbers_is_exact() -> None:
    update = partial(_moving_average, 0.9999, False)
    draw = torch.Generator().manual_seed(0)
    tau = torch.rand(1000, generator=draw) * 100
    average = [tau.clone()]
    for _ in range(100):
        update(average, [tau], 5)
    assert torch.equal(average[0], tau)
    counts = [torch.tensor([3, 5])]
    update(counts, [torch.tensor([4, 5])], 5)
    assert counts[0].tolist() == [4, 5]  # whole numbers are copied, an average would cut them off


def test_training_is_not_disturbed(tmp_path: Path) -> None:
    class Live(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
            self.weights = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}

    trained = []
    for extra in ([], [GrowingEMA()]):
        live = Live()
        growth = ParameterGrowthCallback({1: 16})
        build_trainer(tmp_path, growth, *extra, live).fit(build_task(), loader(), loader(16))
        trained.append(live.weights)
    assert_same(*trained)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resume_from_any_stage_is_exact(tmp_path: Path, stop: int) -> None:
    """Checkpoints before, between and after two growths are loaded into a model of the size at birth."""

    def fit(folder: Path, epochs: int, ckpt_path: Path | None = None) -> tuple[dict[str, Any], LitImageClassifier]:
        save = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1, save_last=True)
        growth = ParameterGrowthCallback({1: 16, 2: {"qkv": 32, "ffn": 80}}, seed=5)
        trainer = build_trainer(folder, growth, GrowingEMA(0.99), save, max_epochs=epochs, enable_checkpointing=True)
        task = build_task()
        trainer.fit(task, loader(), loader(16), ckpt_path=ckpt_path)
        return torch.load(folder / "last.ckpt", weights_only=True), task

    whole, task = fit(tmp_path / "whole", epochs=4)
    resumed, other = fit(tmp_path / "resumed", 4, ckpt_path=tmp_path / "whole" / f"epoch={stop - 1}.ckpt")
    assert_same(whole["state_dict"], resumed["state_dict"])
    assert_same(whole["current_model_state"], resumed["current_model_state"])
    assert_same(whole["averaging_state"], resumed["averaging_state"])
    assert_same(task.state_dict(), other.state_dict())
    assert_same(task.state_dict(), whole["state_dict"])  # a finished fit leaves the average
    assert not torch.equal(*(whole[key]["backbone.norm.weight"] for key in ("state_dict", "current_model_state")))


def test_validation_and_test_use_the_average(tmp_path: Path) -> None:
    class Seen(Callback):
        def on_validation_batch_start(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            self.validated = pl_module.backbone.norm.weight.clone()

        def on_test_batch_start(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            self.tested = pl_module.backbone.norm.weight.clone()

    save = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    seen, growth = Seen(), ParameterGrowthCallback({1: 16})
    trainer = build_trainer(tmp_path, growth, GrowingEMA(0.9), seen, save, enable_checkpointing=True)
    trainer.fit(task := build_task(), loader(), loader(16))
    average = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]["backbone.norm.weight"]
    assert torch.equal(seen.validated, average)
    trainer.test(task, loader(16), ckpt_path=str(tmp_path / "last.ckpt"), verbose=False)
    assert torch.equal(seen.tested, average)
    trainer.validate(task, loader(16), ckpt_path=str(tmp_path / "last.ckpt"), verbose=False)
    assert torch.equal(seen.validated, average)


def test_checkpoint_of_a_stopped_validation_is_not_mixed_up(tmp_path: Path) -> None:
    class Stops(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            self.live = pl_module.backbone.norm.weight.clone()

        def on_validation_batch_start(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            assert not torch.equal(pl_module.backbone.norm.weight, self.live)
            raise RuntimeError("stopped")

    stops, ema = Stops(), GrowingEMA(0.9)
    task = build_task()
    with pytest.raises(RuntimeError, match="stopped"):
        build_trainer(tmp_path, ema, stops, num_sanity_val_steps=0).fit(task, loader(), loader(16))
    assert torch.equal(task.backbone.norm.weight, stops.live)


def test_compiled_backbone_is_averaged(tmp_path: Path) -> None:
    compiled, plain = build_task(), build_task()
    compiled.backbone.compile(dynamic=False, backend="eager")
    for task in (compiled, plain):
        growth = ParameterGrowthCallback({1: 16})
        build_trainer(tmp_path, growth, GrowingEMA(0.9), max_epochs=2).fit(task, loader(16), loader(8))
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": 1.0}, "decay: expected at least 0 and less than 1, got 1.0"),
        ({"update_every_n_steps": -1}, "update_every_n_steps: expected at least 0, got -1"),
        ({"update_every_n_steps": 0}, "update_every_n_steps: 0 needs update_starting_at_epoch"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GrowingEMA(**settings)
