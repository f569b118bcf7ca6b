"""Predictions as a CSV file, one row per image."""

from __future__ import annotations

import csv
import heapq
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lit_tokenformer.errors import UserError

TOP = 5
"""Number of classes written per image."""
UNREADABLE = -100
"""Label of a black image that replaces an unreadable one."""


class PredictionWriter(BasePredictionWriter):
    """Write the results of ``Trainer.predict`` as ``image,class1,prob1,...,class5,prob5``, in the order of the images.

    A task that predicts texts, a mapping of columns to cells for each image, has these columns instead.

    ``image`` comes from the data module (``predict_name(index)``), and the class names from the checkpoint
    (``image_data`` of the task), else from the data module (``class_names``); otherwise they are numbers. The row of an
    unreadable image (label -100) has empty cells. With fewer than five classes there are fewer columns. An apostrophe
    precedes names that a spreadsheet would evaluate as a formula.

    The file appears under its name when it is complete. Each process writes a hidden part file in the same folder, and
    rank 0 merges them, so multiple machines need a shared folder.

    Args:
        path: Output file. By default ``predictions.csv`` in the trainer's log folder, or ``predictions-1.csv`` and so
            on if it exists.

    Raises:
        ValueError: When a prediction starts, if ``path`` exists: files are not overwritten. During prediction, if
            ``predict_step`` returns neither probabilities (B, C) nor a list of mappings, or for several data loaders.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[PredictionWriter("flowers.csv")], logger=False)
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__("batch")
        self.path = path
        self._target = Path()
        self._part = Path()
        self._file: TextIO | None = None
        self._token = ""
        self._written = 0
        self._columns: list[str] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "predict":
            return
        if pl_module.device_mesh is not None and (trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1) > 1:
            raise UserError(
                "trainer.strategy: cannot predict with a sharded model, because processes have different numbers of "
                "batches; use one process, or ddp"
            )
        folder = trainer.log_dir or trainer.default_root_dir  # collective
        target = Path(self.path) if self.path else free_path(Path(folder) / "predictions.csv")
        # all processes follow rank 0, so that they stop together or not at all
        self._target, exists, self._token = trainer.strategy.broadcast((target, target.exists(), uuid.uuid4().hex[:8]))
        if exists:
            raise UserError(f"output: {self._target} exists already")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._part, self._written = self._part_of(trainer.global_rank), 0
        self._file = self._part.open("x", encoding="utf-8", errors="surrogateescape", newline="")

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        texts = isinstance(prediction, list) and all(isinstance(one, Mapping) for one in prediction)
        if not texts and (not isinstance(prediction, Tensor) or prediction.ndim != 2):
            raise UserError(f"predict_step: expected probabilities (B, C), got {_describe(prediction)}")
        if dataloader_idx > 0:
            raise UserError("predict_dataloader: expected one data loader, got several")
        if not batch_indices:  # a stream; process r of W gets every W-th sample from r on
            first, step = trainer.global_rank, trainer.world_size
            batch_indices = range(first + self._written * step, first + (self._written + len(prediction)) * step, step)
        self._written += len(prediction)
        datamodule = getattr(trainer, "datamodule", None)
        name = getattr(datamodule, "predict_name", str)
        if texts:
            self._columns = ["image", *prediction[0]]
            cells = [
                [index, _text(name(index)), *map(_text, one.values())]
                for index, one in zip(batch_indices, prediction, strict=True)
            ]
            self._write(cells)
            return
        names = (getattr(pl_module, "image_data", None) or {}).get("class_names")
        names = names or getattr(datamodule, "class_names", None) or list(map(str, range(prediction.shape[1])))
        self._write(_rows(prediction, batch_indices, _labels(batch), names, name))

    def _write(self, rows: Iterable[Sequence[Any]]) -> None:
        assert self._file is not None
        csv.writer(self._file, lineterminator="\n").writerows(rows)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._file is not None
        self._file.close()
        self._file = None
        trainer.strategy.barrier("predictions are written")
        if trainer.is_global_zero:
            parts = [self._part_of(rank) for rank in range(trainer.world_size)]
            whole = self._part.with_name(f"{self._part.name}.whole")
            images = _join(parts, whole, self._columns)
            target = free_path(self._target)  # another run may have created it meanwhile
            whole.rename(target)
            for part in parts:
                part.unlink()
            rank_zero_info(f"Wrote predictions for {images} images to {target}")
        trainer.strategy.barrier("predictions are joined")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self._part.unlink(missing_ok=True)

    def _part_of(self, rank: int) -> Path:
        return self._target.with_name(f".{self._target.name}.{self._token}.{rank}")


def free_path(path: Path) -> Path:
    """Return ``path``, or the first of ``NAME-1``, ``NAME-2``, ... that does not exist."""
    found, number = path, 0
    while found.exists():
        number += 1
        found = path.with_stem(f"{path.stem}-{number}")
    return found


def _describe(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _labels(batch: Any) -> list[Any] | None:
    """Return the labels (B,) of a batch ``(image, label)``."""
    if isinstance(batch, (tuple, list)) and len(batch) > 1 and isinstance(batch[1], Tensor) and batch[1].ndim == 1:
        return batch[1].tolist()
    return None


def _rows(
    prediction: Tensor,
    indices: Sequence[int],
    labels: list[Any] | None,
    names: Sequence[object],
    name: Callable[[int], object],
) -> Iterator[list[str | int]]:
    """Yield index, name, and classes with probabilities in decreasing order, for each image of a batch."""
    probs, classes = prediction.float().topk(min(TOP, prediction.shape[1]), dim=1)  # (B, up to 5)
    labels = labels or [None] * len(indices)
    for index, label, best, shares in zip(indices, labels, classes.tolist(), probs.tolist(), strict=True):
        pairs = [(names[one], share) for one, share in zip(best, shares, strict=True)]
        cells = prediction_row(name(index), pairs)
        yield [index, cells[0], *([""] * len(cells[1:]) if label == UNREADABLE else cells[1:])]


def prediction_header(classes: int) -> list[str]:
    """Return the names of the columns for up to that many classes per image."""
    return ["image", *(f"{name}{rank}" for rank in range(1, classes + 1) for name in ("class", "prob"))]


def prediction_row(image: object, pairs: Iterable[tuple[object, float]]) -> list[str]:
    """Return the cells of an image and its classes with probabilities."""
    return [_text(image), *(cell for name, share in pairs for cell in (_text(name), f"{share:.6g}"))]


def _text(name: object) -> str:
    """Escape a name for spreadsheets, which evaluate formulas; numbers such as -1 are unchanged."""
    text = str(name)
    with suppress(ValueError):
        float(text)
        return text
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _join(parts: Iterable[Path], whole: Path, columns: Sequence[str] = ()) -> int:
    """Merge the sorted rows of all parts into a file with a header; return the number of images."""
    files = [part.open(encoding="utf-8", errors="surrogateescape", newline="") for part in parts]
    images, last = 0, None
    try:
        with whole.open("x", encoding="utf-8", errors="surrogateescape", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            for index, *row in heapq.merge(*map(csv.reader, files), key=lambda row: int(row[0])):
                if last is None:
                    writer.writerow(columns or prediction_header(len(row) // 2))
                if index != last:  # samplers may assign an image to two processes
                    writer.writerow(row)
                    images += 1
                last = index
    finally:
        for file in files:
            file.close()
    return images
