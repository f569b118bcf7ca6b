"""What a user who reads TensorBoard alone is told of a run that grows."""

from __future__ import annotations

import re
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG as LAYOUT_TAG
from tensorboard.plugins.hparams.metadata import EXPERIMENT_TAG, parse_experiment_plugin_data
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from callbacks.growing_ema import GrowingEMA
from callbacks.parameter_growth import ParameterGrowthCallback
from callbacks.pictures import confusion_picture, prediction_picture
from callbacks.run_summary import RunSummary
from callbacks.throughput import peak_flops
from callbacks.training_monitor import TrainingMonitor
from lit_tokenformer.checkpoints.run_folder import run_folder
from lit_tokenformer.data.text.tokenizer import Tokenizer
from lit_tokenformer.growth import Rows, grow
from lit_tokenformer.growth.shards import like
from lit_tokenformer.models import Pattention
from lit_tokenformer.tasks import LitCausalLM, LitImageClassifier

TINY: Any = {"dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4, "param_tokens": 8}
SCALARS = {
    "compute/training_flops",
    "compute/samples_per_second",
    "size/parameters",
    "size/tokens_qkv",
    "size/tokens_proj",
    "size/tokens_ffn",
    "rows/grad_norm_old",
    "rows/grad_norm_new",
    "rows/update_norm_old",
    "rows/update_norm_new",
}


class Images(LightningDataModule):
    """32 random images for training and 24 for validation."""

    class_names = [f"class {number}" for number in range(10)]
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def _loader(self, samples: int) -> DataLoader:
        draw = torch.Generator().manual_seed(1)
        images = torch.randn(samples, 3, 8, 8, generator=draw)
        return DataLoader(TensorDataset(images, torch.randint(10, (samples,), generator=draw)), batch_size=8)

    def train_dataloader(self) -> DataLoader:
        return self._loader(32)

    def val_dataloader(self) -> DataLoader:
        return self._loader(24)


def build_task() -> LitImageClassifier:
    seed_everything(0, verbose=False)
    return LitImageClassifier("tokenformer_vit_tiny_patch16_224", num_classes=10, image_size=8, overrides=TINY)


def build_trainer(folder: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    return Trainer(
        **{
            "default_root_dir": folder,
            "callbacks": list(callbacks),
            "max_epochs": 2,
            "accelerator": "cpu",
            "logger": TensorBoardLogger(folder, name="", version="run"),
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **settings,
        }
    )


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "run"), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


def test_events_across_a_growth(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed_everything: 7\n")
    save = ModelCheckpoint(dirpath=tmp_path, monitor="val/acc1", mode="max")
    growth, task = ParameterGrowthCallback({1: 16}), build_task()
    trainer = build_trainer(tmp_path, growth, TrainingMonitor(), save, enable_checkpointing=True)
    trainer.fit(task, datamodule=Images())
    found = events(tmp_path)

    assert set(found.Tags()["scalars"]) >= SCALARS | {"val/acc1", "val/loss", "best/val/acc1"}
    assert "hp_metric" not in found.Tags()["scalars"]
    assert [event.step for event in found.Scalars("train/loss")] == list(range(8))
    tokens = {event.step: event.value for event in found.Scalars("size/tokens_ffn")}
    assert tokens == {0: 32, 1: 32, 2: 32, 3: 32, 4: 64, 5: 64, 6: 64, 7: 64, 8: 64}
    assert found.Scalars("size/parameters")[-1].value == sum(parameter.numel() for parameter in task.parameters())
    assert {event.step for event in found.Scalars("rows/grad_norm_new")} == {4, 5, 6, 7}
    assert all(event.value > 0 for event in found.Scalars("rows/update_norm_new"))
    assert all(event.value > 0 for event in found.Scalars("compute/samples_per_second"))

    assert {event.value for event in found.Scalars("size/depth")} == {2}
    for name, first in {"1_val_loss": "val/loss", "2_val_acc1": "val/acc1", "3_train_loss": "train/loss"}.items():
        shown, known = ({one.step: one.value for one in found.Scalars(tag)} for tag in (f"Overview/{name}", first))
        assert shown == known
    costs = [event.step for event in found.Scalars("Overview/5_val_loss_by_MFLOPs")]
    totals = {event.step: event.value for event in found.Scalars("compute/training_flops")}
    assert costs == [int(totals[step] // 1e6) for step in (3, 7)]
    assert sorted(found.Tags()["scalars"])[0].startswith("Overview/")  # the order of TensorBoard
    (low, high) = found.Scalars("growth/at_4")
    assert (low.step, high.step) == (3, 4) and 0 < low.value < high.value
    sizes = [(event.step, event.value) for event in found.Scalars("Overview/4_parameters")]
    before, after = sizes[0][1], sizes[-1][1]
    assert (3, before) in sizes and (4, after) in sizes and before < after  # a vertical jump
    layout = layout_pb2.Layout.FromString(found.Tensors(LAYOUT_TAG)[0].tensor_proto.string_val[0])
    charts = [chart for category in layout.category for chart in category.chart]
    patterns = [pattern for chart in charts for pattern in chart.multiline.tag]
    assert all(any(re.search(pattern, tag) for tag in found.Tags()["scalars"]) for pattern in patterns)
    text = found.Tensors("growth/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| ffn | 32 | 64 |" in text and "relative output difference" in text and "GFLOPs per sample" in text

    assert [event.step for event in found.Images("val/confusion_matrix")] == [3, 7]
    pictures = found.Images("val/predictions")
    assert [event.step for event in pictures] == [3, 7]
    assert pictures[0].width > 4 * 96
    text = found.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text == "```yaml\nseed_everything: 7\n\n```"


def test_hparams_tab_has_hyperparameters_and_metrics(tmp_path: Path) -> None:
    save = ModelCheckpoint(dirpath=tmp_path, monitor="val/acc1", mode="max")
    growth = ParameterGrowthCallback({1: 16})
    trainer = build_trainer(tmp_path, growth, TrainingMonitor(), save, enable_checkpointing=True)
    trainer.fit(build_task(), datamodule=Images())
    content = events(tmp_path).SummaryMetadata(EXPERIMENT_TAG).plugin_data.content
    experiment = parse_experiment_plugin_data(content)
    names = {info.name for info in experiment.hparam_infos}
    assert {"preset", "num_classes", "overrides/dim", "max_epochs", "lr", "growth/schedule", "growth/method"} <= names
    assert not [name for name in names if name.startswith("_") or "Callback" in name or "compile" in name]
    kept = yaml.unsafe_load((tmp_path / "run" / "hparams.yaml").read_text())
    assert kept["trainer"]["max_epochs"] == 2 and "growth/method" not in kept
    metrics = {info.name.tag for info in experiment.metric_infos}
    assert {"val/acc1", "val/loss", "best/val/acc1", "size/parameters", "compute/training_flops"} <= metrics


def test_flops_are_exact_across_growth_and_resume(tmp_path: Path) -> None:
    def fit(folder: Path, epochs: int, ckpt_path: Path | None = None) -> int:
        monitor, save = TrainingMonitor(), ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
        growth = ParameterGrowthCallback({1: 16})
        settings = {"max_epochs": epochs, "enable_checkpointing": True, "log_every_n_steps": 3}
        trainer = build_trainer(folder, growth, monitor, save, accumulate_grad_batches=2, **settings)
        trainer.fit(build_task(), datamodule=Images(), ckpt_path=ckpt_path)
        return monitor.training_flops

    task = build_task()
    small = task.cost().training_flops
    grow(task, 16)
    large = task.cost().training_flops
    assert fit(tmp_path / "whole", 3) == 32 * small + 64 * large
    assert fit(tmp_path / "resumed", 3, tmp_path / "whole" / "epoch=0.ckpt") == 32 * small + 64 * large
    assert fit(tmp_path / "again", 3, tmp_path / "whole" / "epoch=1.ckpt") == 32 * small + 64 * large


def test_flops_count_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = property(lambda trainer: {"num_replicas": 4, "rank": 0})
    monkeypatch.setattr(Trainer, "distributed_sampler_kwargs", place)
    monitor, task = TrainingMonitor(), build_task()
    build_trainer(tmp_path, monitor, max_epochs=1).fit(task, datamodule=Images())
    assert monitor.training_flops == 4 * 32 * task.cost().training_flops


def test_training_is_not_disturbed(tmp_path: Path) -> None:
    trained = []
    for number, extra in enumerate(([], [TrainingMonitor()])):
        task = build_task()
        growth = ParameterGrowthCallback({1: 16})
        build_trainer(tmp_path / str(number), growth, GrowingEMA(0.9), *extra).fit(task, datamodule=Images())
        trained.append(task.state_dict())
    for name in trained[0]:
        assert torch.equal(trained[0][name], trained[1][name]), name


def test_row_norms_are_those_of_gradient_and_change(tmp_path: Path) -> None:
    """Against plain loops over the parameters; the monitor stands first, so nothing depends on the order."""

    class Measures(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            self.before = [one.detach().clone() for one in tokens(pl_module)]
            self.gradients = [one.grad.clone() for one in tokens(pl_module) if one.grad is not None]

        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            self.changes = [now - then for now, then in zip(tokens(pl_module), self.before, strict=True)]

    def tokens(module: LightningModule) -> list[Tensor]:
        layers = [layer for layer in module.modules() if isinstance(layer, Pattention)]
        return [token for layer in layers for token in (layer.key_tokens, layer.value_tokens)]

    def norm(tensors: list[Tensor], new: bool) -> float:
        total = 0.0
        for tensor in tensors:
            # 8 tokens (ffn: 32) became 20 (80): each was copied once, the rest were appended
            rows = Rows(len(tensor) * 8 // 20, len(tensor), copies=2).new()
            total += float(tensor.detach()[rows == new].double().square().sum())
        return total**0.5

    measures = Measures()
    growth = ParameterGrowthCallback({1: 20}, ramp_steps=50)
    build_trainer(tmp_path, TrainingMonitor(), growth, measures, gradient_clip_val=0.1).fit(
        build_task(), datamodule=Images()
    )
    found = events(tmp_path)
    for measure, tensors in (("grad", measures.gradients), ("update", measures.changes)):
        for part, new in (("old", False), ("new", True)):
            value = found.Scalars(f"rows/{measure}_norm_{part}")[-1].value
            assert value == pytest.approx(norm(tensors, new), rel=1e-4)


def test_changes_are_measured_one_parameter_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the tokens before a step wait in the host's memory, and come back one by one."""
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = []

    class Change:  # tensors cannot be put into a set by identity
        pass

    def counted(reference: Tensor, change: Tensor) -> Tensor:
        found = like(reference, change).clone()  # on a CPU it is what waits itself
        found.mark = Change()  # type: ignore[attr-defined]
        alive.add(found.mark)  # type: ignore[attr-defined]
        most.append(len(alive))
        return found

    monkeypatch.setattr("callbacks.training_monitor.like", counted)
    build_trainer(tmp_path, TrainingMonitor()).fit(build_task(), datamodule=Images())
    assert most and max(most) <= 2


def test_nothing_is_measured_between_log_steps(tmp_path: Path) -> None:
    class Watches(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            assert not monitor._held

        def on_before_zero_grad(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            assert not monitor._held

    monitor = TrainingMonitor()
    build_trainer(tmp_path, monitor, Watches(), log_every_n_steps=4).fit(build_task(), datamodule=Images())
    found = events(tmp_path)
    assert [event.step for event in found.Scalars("rows/grad_norm_old")] == [3, 7]
    assert "rows/grad_norm_new" not in found.Tags()["scalars"]


class Operations(TorchDispatchMode):
    """Counts what is done to tensors."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_where_nothing_is_due_no_tensor_is_touched(tmp_path: Path) -> None:
    """So nothing waits for the device. Of four steps the last is a log step."""
    counted: dict[str, list[int]] = {}

    def count(callback: Callback, hook: str) -> None:
        function, counts = getattr(callback, hook), counted.setdefault(f"{type(callback).__name__}.{hook}", [])

        def counting(*args: Any) -> None:
            with Operations() as operations:
                function(*args)
            counts.append(operations.count)

        setattr(callback, hook, counting)

    monitor, growth = TrainingMonitor(), ParameterGrowthCallback({1: 16})
    count(growth, "on_train_batch_start")
    count(monitor, "on_before_optimizer_step")
    count(monitor, "on_train_batch_end")
    settings = {"max_steps": 4, "log_every_n_steps": 4}
    build_trainer(tmp_path, growth, monitor, **settings).fit(build_task(), datamodule=Images())
    assert counted["ParameterGrowthCallback.on_train_batch_start"] == [0, 0, 0, 0]
    for hook in ("on_before_optimizer_step", "on_train_batch_end"):
        counts = counted[f"TrainingMonitor.{hook}"]
        assert counts[:3] == [0, 0, 0] and counts[3] > 0


def test_picture_shows_the_averaged_model_and_spreads_over_the_set(tmp_path: Path) -> None:
    class Keeps(TrainingMonitor):
        def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
            self.kept = list(self._examples)
            super().on_validation_end(trainer, pl_module)

    monitor, task, data = Keeps(log_images=6), build_task(), Images()
    build_trainer(tmp_path, GrowingEMA(0.5, warmup=False), monitor, max_epochs=3).fit(task, datamodule=data)
    images, labels = next(iter(DataLoader(data.val_dataloader().dataset, batch_size=24)))
    with torch.no_grad():  # a finished fit leaves the average
        guesses = task.eval()(images).argmax(dim=1)
    places = [0, 4, 8, 12, 16, 20]
    assert [label for _, label, _ in monitor.kept] == labels[places].tolist()
    assert [guess for _, _, guess in monitor.kept] == guesses[places].tolist()
    assert all(torch.equal(image, images[place]) for (image, _, _), place in zip(monitor.kept, places, strict=True))


def test_picture_marks_right_and_wrong(tmp_path: Path) -> None:
    image = torch.full((3, 8, 8), 2.0)
    picture = prediction_picture([(image, 1, 1), (image, 1, 2)], Images())
    assert picture.dtype == torch.uint8
    pixels = np.asarray(Image.fromarray(picture.permute(1, 2, 0).numpy()))
    frame_right, frame_wrong = pixels[5, 10], pixels[5, pixels.shape[1] // 2 + 10]
    assert frame_right.tolist() == [0, 128, 0]
    assert frame_wrong.tolist() == [200, 0, 0]
    assert pixels[50, 50].tolist() == [255] * 3  # 2 x 0.25 + 0.5
    plain = prediction_picture([(image * torch.rand(1, 8, 8), 11, 2)], None)  # no names, no mean, one image
    assert plain.shape[0] == 3


def test_other_loggers_and_modules_without_cost(tmp_path: Path) -> None:
    class Plain(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3 * 8 * 8, 10)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return torch.nn.functional.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    logger = CSVLogger(tmp_path, name="", version="run")
    build_trainer(tmp_path, TrainingMonitor(), logger=logger).fit(Plain(), datamodule=Images())
    header = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"size/parameters", "compute/samples_per_second"} <= set(header)
    assert "compute/training_flops" not in header
    build_trainer(tmp_path, TrainingMonitor(), logger=False).fit(Plain(), datamodule=Images())


class CometExperiment:
    """The part of ``comet_ml.Experiment`` that is used."""

    def __init__(self) -> None:
        self.pictures: list[tuple[str, int, Any]] = []
        self.files: dict[str, str] = {}

    def log_image(self, image_data: Any, name: str, step: int) -> None:
        self.pictures.append((name, step, image_data.size))

    def log_asset_data(self, data: str, name: str) -> None:
        self.files[name] = data


class Settings(Logger):
    """Logger with no more than Lightning requires; Comet's, given its experiment."""

    name = version = "run"
    save_dir = None

    def __init__(self, experiment: Any = None) -> None:
        super().__init__()
        self.experiment, self.settings = experiment, {}

    def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...

    def log_hyperparams(self, params: Any) -> None:
        self.settings |= params


def fit_with(logger: Any, folder: Path, growth: Any = None) -> Trainer:
    class Data(Images):
        data_settings = {"batch_size": 8, "dataset": "random"}

    growth = growth or ParameterGrowthCallback({1: 16}, ramp_steps=3)
    trainer = build_trainer(folder, growth, TrainingMonitor(), logger=logger)
    _ = getattr(logger, "experiment", None)  # its version is known from here on
    run = Path(run_folder(trainer))
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text("seed_everything: 7\n")
    trainer.fit(build_task(), datamodule=Data())
    return trainer


@pytest.mark.parametrize("kind", ["csv", "least", "comet"])
def test_every_logger_receives_settings_and_pictures(kind: str, tmp_path: Path) -> None:
    experiment = CometExperiment() if kind == "comet" else None
    logger = CSVLogger(tmp_path, name="", version="run") if kind == "csv" else Settings(experiment)
    trainer = fit_with(logger, tmp_path)
    settings = yaml.unsafe_load((tmp_path / "run" / "hparams.yaml").read_text()) if kind == "csv" else logger.settings
    assert settings["data"] == {"batch_size": 8, "dataset": "random"}
    assert settings["trainer"]["max_epochs"] == 2 and settings["trainer"]["precision"] == "32-true"
    assert settings["trainer"]["strategy"] == "SingleDeviceStrategy"
    growth = settings["ParameterGrowthCallback"]
    assert (growth["schedule"], growth["ramp_steps"], growth["method"]) == ({"1": 16}, 3, "split")
    assert settings["preset"] == "tokenformer_vit_tiny_patch16_224"  # the model's, by Lightning
    if experiment is not None:
        names = ("val/predictions", "val/confusion_matrix")
        assert [picture[:2] for picture in experiment.pictures] == [(name, step) for step in (3, 7) for name in names]
        assert experiment.files.keys() == {"config.yaml", "growth-step=4.md"}
        assert experiment.files["config.yaml"] == "seed_everything: 7\n"
        return
    files = sorted((Path(run_folder(trainer)) / "pictures").iterdir())
    names = ("val_confusion_matrix", "val_predictions")
    assert [file.name for file in files] == [f"{name}-step={step}.png" for name in names for step in (3, 7)]
    assert Image.open(files[2]).width > 4 * 96
    assert "| ffn | 32 | 64 |" in (Path(run_folder(trainer)) / "texts" / "growth-step=4.md").read_text()


def test_weights_and_biases_receives_settings_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    trainer = fit_with(WandbLogger(offline=True, save_dir=tmp_path, project="test"), tmp_path)
    config, folder = dict(wandb.run.config), Path(wandb.run.dir)
    wandb.finish()
    assert config["data"]["batch_size"] == 8 and config["trainer"]["max_epochs"] == 2
    assert config["ParameterGrowthCallback"]["schedule"] == {"1": 16}
    assert len([*(folder / "media" / "images" / "val").iterdir()]) == 4
    assert [*(folder / "media" / "table").rglob("growth*.json")]
    assert [*(folder / "media" / "table").rglob("config*.json")]
    assert not (Path(run_folder(trainer)) / "pictures").exists()


def test_mlflow_receives_settings_and_pictures_and_a_changed_setting_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    place = f"file:{tmp_path / 'mlruns'}"
    logger = MLFlowLogger(tracking_uri=place)
    fit_with(logger, tmp_path)
    params = logger.experiment.get_run(logger.run_id).data.params
    assert params["data/batch_size"] == "8" and params["trainer/max_epochs"] == "2"
    assert params["ParameterGrowthCallback/schedule/1"] == "16"
    artifacts = Path(logger.experiment.get_run(logger.run_id).info.artifact_uri.removeprefix("file://"))
    assert len([*(artifacts / "images").glob("*.png")]) == 4
    assert "| ffn | 32 | 64 |" in (artifacts / "growth-step=4.md").read_text()
    assert (artifacts / "config.yaml").read_text() == "seed_everything: 7\n"
    with pytest.warns(UserWarning, match="MLFlowLogger: hyper-parameters not logged"):
        again = MLFlowLogger(tracking_uri=place, run_id=logger.run_id)
        fit_with(again, tmp_path, ParameterGrowthCallback({1: 16}, ramp_steps=4))


def test_confusion_matrix_counts_known_labels_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Task(LitImageClassifier):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            return {"label": torch.tensor([0, 0, 2, -100]), "predicted": torch.tensor([0, 1, 2, 1])}

    drawn: list[torch.Tensor] = []

    def draw(counts: torch.Tensor, names: Any) -> torch.Tensor:
        drawn.append(counts)
        return confusion_picture(counts, ["zero", "one"])

    monkeypatch.setattr("callbacks.training_monitor.confusion_picture", draw)
    task = Task("tokenformer_vit_tiny_patch16_224", num_classes=10, image_size=8, overrides=TINY)
    build_trainer(tmp_path, TrainingMonitor(), limit_val_batches=1, max_epochs=1).fit(task, datamodule=Images())
    (counts,) = drawn
    assert counts.sum() == 3 and counts[:3, :3].tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    picture = draw(counts[:3, :3], ())
    pixels = np.asarray(Image.fromarray(picture.permute(1, 2, 0).numpy()))
    left = pixels.shape[0] - 8 - 3 * 38
    assert pixels[left + 2, left + 2].tolist() == [128, 192, 128]  # half of the zeros
    assert pixels[left + 2, left + 40].tolist() == [228, 128, 128]
    assert pixels[left + 78, left + 78].tolist() == [0, 128, 0]


def test_text_samples_do_not_disturb_training(tmp_path: Path) -> None:
    class Bytes(LightningDataModule):
        tokenizer = Tokenizer.bytes()

        def train_dataloader(self) -> DataLoader:
            return DataLoader(torch.arange(4 * 17).reshape(4, 17) % 100, batch_size=2)

        val_dataloader = train_dataloader

    trained = []
    for length in (0, 8):
        seed_everything(0, verbose=False)
        task = LitCausalLM("tokenformer_lm_tiny", vocab_size=Bytes.tokenizer.size, context_length=16)
        folder = tmp_path / str(length)
        build_trainer(folder, TrainingMonitor(log_text=length), max_epochs=1).fit(task, datamodule=Bytes())
        trained.append(task.state_dict())
        assert ("val/sample/text_summary" in events(folder).Tags()["tensors"]) is bool(length)
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())
    text = events(folder).Tensors("val/sample/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "[...]" in text


def test_wrong_setting_is_named() -> None:
    with pytest.raises(ValueError, match="log_images: expected at least 0, got -1"):
        TrainingMonitor(log_images=-1)
    with pytest.raises(ValueError, match="peak_flops: expected a positive number of FLOPs per second, got 0"):
        TrainingMonitor(peak_flops=0)


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("callbacks.throughput.time", SimpleNamespace(perf_counter=lambda: self.now))

    def wait(self, seconds: float) -> Callback:
        clock = self

        class Waits(Callback):
            def on_before_backward(self, *args: Any) -> None:
                clock.now += seconds

            def on_validation_batch_end(self, *args: Any) -> None:
                clock.now += 1000

        return Waits()


class SlowImages(Images):
    """A batch takes a second to load; validation takes long."""

    clock: Clock

    def _loader(self, samples: int) -> DataLoader:
        clock, loader = self.clock, super()._loader(samples)

        class Slow(DataLoader):
            def __iter__(self) -> Any:
                for batch in super().__iter__():
                    clock.now += 1
                    yield batch

        return Slow(loader.dataset, batch_size=8)


def test_throughput_mfu_and_waiting_across_growth_accumulation_and_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each batch of 8 loads for one second and computes for three: two of them are a step of 8 s."""
    clock = Clock(monkeypatch)
    data = SlowImages()
    data.clock = clock
    monitor, summary, growth = TrainingMonitor(peak_flops=1e6), RunSummary(), ParameterGrowthCallback({1: 16})
    trainer = build_trainer(
        tmp_path, growth, monitor, summary, clock.wait(3), accumulate_grad_batches=2,
        enable_progress_bar=True,
    )  # fmt: skip
    task = build_task()
    small = task.cost().training_flops
    trainer.fit(task, datamodule=data)
    large = task.cost().training_flops
    found = events(tmp_path)

    def logged(tag: str) -> list[float]:
        return [event.value for event in found.Scalars(tag)]

    seconds = [8, 8, 7, 8]  # the model grows after the first batch of its epoch is loaded
    assert logged("train/mfu") == pytest.approx(
        [flops * 16 / time / 1e6 for flops, time in zip((small, small, large, large), seconds, strict=True)]
    )
    assert logged("compute/samples_per_second") == pytest.approx([16 / time for time in seconds])
    tokens = task.cost().data_tokens
    assert logged("compute/data_tokens_per_second") == pytest.approx([16 * tokens / time for time in seconds])
    assert logged("compute/data_wait") == pytest.approx([0.25, 0.25, 1 / 7, 0.25])
    assert not any(tag.startswith("compute/device") for tag in found.Tags()["scalars"])
    assert {"mfu", "tokens/s", "data_wait", "memory_gb"} <= trainer.progress_bar_metrics.keys()

    for stage, flops, time, waiting in zip(summary.stages, (small, large), (17, 15), (5, 3), strict=True):
        rates = stage["throughput"]
        assert (rates["samples"], rates["seconds"], rates["waiting"]) == (32, time, waiting)
        assert rates["mfu"] == pytest.approx(flops * 32 / time / 1e6) and rates["data_wait"] == waiting / time
    assert "29.4%" in capsys.readouterr().out
    assert not {"start", "stop"} & vars(trainer.profiler).keys()


def test_throughput_of_several_processes_is_also_told_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "distributed_sampler_kwargs", property(lambda trainer: {"num_replicas": 4, "rank": 0}))
    clock, data = Clock(monkeypatch), SlowImages()
    data.clock = clock

    class Eight(Callback):  # of which two at a time share a sample, as with tensor parallelism
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            monitor._devices = 8

    monitor, task = TrainingMonitor(peak_flops=1e6), build_task()
    build_trainer(tmp_path, monitor, Eight(), clock.wait(3), max_epochs=1).fit(task, datamodule=data)
    found = events(tmp_path)
    assert found.Scalars("compute/samples_per_second")[-1].value == 8.0
    assert found.Scalars("compute/device/samples_per_second")[-1].value == 1.0
    assert found.Scalars("train/mfu")[-1].value == pytest.approx(task.cost().training_flops / 1e6)


def test_recomputed_activations_do_not_count_for_mfu() -> None:
    task = build_task()
    plain = task.cost()
    task.backbone.set_grad_checkpointing(True)
    again = task.cost()
    assert plain.recomputed == 0 and again.recomputed > 0
    assert again.training_flops - again.recomputed == plain.training_flops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_peak_of_a_device(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: name)
    monkeypatch.setattr("callbacks.throughput._measured", lambda *_: 1e12)
    assert peak_flops(torch.device("cuda"), "bf16-mixed")[0] == (peak or 1e12)


def test_peak_of_a_cpu_is_measured_once_and_draws_no_random_number() -> None:
    state = torch.get_rng_state()
    found = [peak_flops(torch.device("cpu"), precision) for precision in ("32-true", "32-true", "bf16-mixed")]
    assert found[0] == found[1] and found[0][0] > 1e8 and found[0][1] == "measured matmul, float32"
    assert found[2][1] == "measured matmul, bfloat16"
    assert torch.equal(state, torch.get_rng_state())
