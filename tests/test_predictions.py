"""Predictions reach their file whole, in order and without overwriting anything."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from callbacks.prediction_writer import PredictionWriter, _join
from lit_tokenformer.tasks import LitImageClassifier

TINY: Any = {"dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4, "param_tokens": 8}


class Images(LightningDataModule):
    """20 random images of 10 classes; the eighth one could not be read."""

    class_names = [f"class {number}" for number in range(10)]

    def __init__(self) -> None:
        super().__init__()
        self.images = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        self.labels = torch.full((20,), -1)
        self.labels[7] = -100

    def predict_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(self.images, self.labels), batch_size=8)

    def predict_name(self, index: int) -> str:
        return f'folder, "{index}".png'


class Shares(LightningModule):
    """Gives the first three numbers of each sample as its prediction."""

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return batch[:, :3]


def build_task() -> LitImageClassifier:
    seed_everything(0, verbose=False)
    return LitImageClassifier("tokenformer_vit_tiny_patch16_224", num_classes=10, image_size=8, overrides=TINY)


def plain(samples: Any, batch_size: int) -> DataLoader:
    return DataLoader(samples, batch_size=batch_size)


def predict(folder: Path, writer: PredictionWriter, *callbacks: Callback, model: Any = None, data: Any = None) -> Any:
    settings: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(default_root_dir=folder, callbacks=[writer, *callbacks], **settings)
    if isinstance(data, DataLoader):
        return trainer.predict(model, data)
    return trainer.predict(model or build_task(), datamodule=data or Images())


def read(file: Path) -> list[list[str]]:
    with file.open(newline="") as rows:
        return list(csv.reader(rows))


def test_rows_hold_the_best_five_classes(tmp_path: Path) -> None:
    probs = torch.cat(predict(tmp_path, PredictionWriter()))
    assert [file.name for file in tmp_path.iterdir()] == ["predictions.csv"]
    header, *rows = read(tmp_path / "predictions.csv")
    assert header == ["image", *(f"{name}{rank}" for rank in range(1, 6) for name in ("class", "prob"))]
    assert [row[0] for row in rows] == [f'folder, "{index}".png' for index in range(20)]
    for index, row in enumerate(rows):
        if index != 7:
            best = probs[index].sort(descending=True)
            assert row[1::2] == [f"class {number}" for number in best.indices[:5].tolist()]
            assert [float(cell) for cell in row[2::2]] == pytest.approx(best.values[:5].tolist(), rel=1e-5)
    assert rows[7][1:] == [""] * 10  # the unreadable image


def test_plain_loaders_and_few_classes(tmp_path: Path) -> None:
    shares = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.7, 0.2]])
    predict(tmp_path, PredictionWriter(), model=Shares(), data=plain(shares, 1))
    assert read(tmp_path / "predictions.csv") == [
        ["image", "class1", "prob1", "class2", "prob2", "class3", "prob3"],
        ["0", "0", "0.5", "2", "0.3", "1", "0.2"],
        ["1", "1", "0.7", "2", "0.2", "0", "0.1"],
    ]


def test_images_of_a_stream_are_counted(tmp_path: Path) -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(torch.eye(3))

    predict(tmp_path, PredictionWriter(), model=Shares(), data=DataLoader(Stream(), batch_size=2))
    assert [row[:2] for row in read(tmp_path / "predictions.csv")[1:]] == [["0", "0"], ["1", "1"], ["2", "2"]]


def test_existing_file_is_refused_before_any_work(tmp_path: Path) -> None:
    class Untouched(Images):
        def predict_dataloader(self) -> DataLoader:
            raise AssertionError("data were opened")

    taken = tmp_path / "mine.csv"
    taken.write_text("mine")
    with pytest.raises(ValueError, match=r"output: .*mine.csv exists already"):
        predict(tmp_path, PredictionWriter(str(taken)), data=Untouched())
    assert taken.read_text() == "mine"


def test_default_name_goes_on_counting(tmp_path: Path) -> None:
    (tmp_path / "predictions.csv").write_text("mine")
    for _ in range(2):
        predict(tmp_path, PredictionWriter())
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "predictions-1.csv",
        "predictions-2.csv",
        "predictions.csv",
    ]
    assert (tmp_path / "predictions.csv").read_text() == "mine"


def test_new_folder_is_made(tmp_path: Path) -> None:
    predict(tmp_path, PredictionWriter(str(tmp_path / "new" / "mine.csv")))
    assert len(read(tmp_path / "new" / "mine.csv")) == 21


def test_stopped_run_leaves_no_file(tmp_path: Path) -> None:
    class Stops(Callback):
        def on_predict_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        predict(tmp_path, PredictionWriter(), Stops())
    assert list(tmp_path.iterdir()) == []


def test_other_predictions_are_refused(tmp_path: Path) -> None:
    class Flat(Shares):
        def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return batch[:, 0]

    with pytest.raises(ValueError, match=r"predict_step: expected probabilities \(B, C\), got shape \(2,\)"):
        predict(tmp_path, PredictionWriter(), model=Flat(), data=plain(torch.eye(2), 2))


def test_parts_are_joined_in_order_and_once(tmp_path: Path) -> None:
    parts = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    parts[0].write_text("0,x,1,0.5\n2,y,1,0.5\n10,z,1,0.5\n")
    parts[1].write_text('1,"multi\nline",,\n3,w,1,0.5\n10,z,1,0.5\n')
    parts[2].write_text("")
    assert _join(parts, tmp_path / "whole") == 5
    header, *rows = read(tmp_path / "whole")
    assert header == ["image", "class1", "prob1"]
    assert [row[0] for row in rows] == ["x", "multi\nline", "y", "w", "z"]


@pytest.mark.slow
def test_two_processes_write_one_file(tmp_path: Path) -> None:
    shares = torch.rand(19, 3, generator=torch.Generator().manual_seed(1))
    data = plain(shares, 4)
    predict(tmp_path, PredictionWriter(str(tmp_path / "one.csv")), model=Shares(), data=data)
    writer = PredictionWriter(str(tmp_path / "two.csv"))
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp_notebook", callbacks=[writer], logger=False)
    trainer.predict(Shares(), data, return_predictions=False)
    assert (tmp_path / "two.csv").read_text() == (tmp_path / "one.csv").read_text()
    assert len(list(tmp_path.iterdir())) == 2
