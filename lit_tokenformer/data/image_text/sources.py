"""Registry of data sets of images with questions and answers.

Two are made of what the installed packages contain, with held-out digits and words: grids of scikit-learn's digits, and
words of Python's standard library in Pillow's own font. The others read files or a Hugging Face data set.
"""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lit_tokenformer.data.hub import first_line, load_hub_data, named_splits, own_folders
from lit_tokenformer.data.images.folders import SPLITS
from lit_tokenformer.data.images.samples import Samples, decode_hub_image
from lit_tokenformer.data.images.sources import ImageSource, SourceSettings, is_unlabeled
from lit_tokenformer.errors import UserError
from lit_tokenformer.registry import IMAGE_SOURCES, IMAGE_TEXT_SOURCES

_SPLIT_SEED = 0  # the same held-out samples for every seed of a run
CORNERS = ("top left", "top right", "bottom left", "bottom right")
"""Cells of a grid in the order of the answer to ``all?``."""
_CELL = 8  # pixels of a digit
_FONT_SIZE, _LINE, _WIDTH = 13, 16, 80
_PLACE = (2, -1)  # left and top edge of the font's line in pixels, so that a word is centered vertically
_WORD = re.compile(r"(?<![A-Za-z])[a-z]{3,9}(?![A-Za-z])")


class Pair(NamedTuple):
    """Image with a question and its answer.

    Args:
        image: RGB or gray image.
        question: Question; may be empty.
        answer: Answer.
        group: Index of the group of questions, see :class:`PairSplits`.
    """

    image: Image.Image
    question: str
    answer: str
    group: int = 0


class Pairs(Protocol):
    """Pairs with random access."""

    def __len__(self) -> int: ...

    def read(self, index: int, rng: np.random.Generator, training: bool) -> Pair:
        """Return a pair.

        Args:
            index: Index of the pair.
            rng: Source of all random choices, seeded by run, epoch and index; in evaluation by the index alone.
            training: Whether to augment the image.
        """
        ...

    def name(self, index: int) -> str:
        """Return the file's path if there is one, else the index as text."""
        return str(index)


@dataclass(frozen=True)
class PairSettings:
    """Location and sizes of the data; see ``VisionLanguageDataModule`` for each setting."""

    root: str | None = None
    train_samples: int = 20_000
    val_samples: int = 1_000
    val_fraction: float = 0.1
    hf_name: str | None = None
    hf_config: str | None = None
    hf_image_column: str | None = None
    hf_label_column: str | None = None
    question: str = "class?"
    text_column: str = "text"
    question_column: str = "question"
    hf_train_split: str = "train"
    hf_val_split: str | None = None


@dataclass
class PairSplits:
    """Training, validation and test pairs of a data set.

    Args:
        train: Training pairs.
        val: Validation pairs.
        test: Test pairs, or ``None``.
        group_names: Names of the groups of questions that evaluation reports separately.
        class_names: Answers to choose from, if all samples have the same ones.
    """

    train: Pairs
    val: Pairs
    test: Pairs | None = None
    group_names: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageTextSource:
    """Entry of the registry of data sets.

    Args:
        open: Function from settings to splits.
        image_size: Default image size in pixels, (height, width).
        block_size: Default maximum length of question, answer and two separators, in tokens.
    """

    open: Callable[[PairSettings], PairSplits]
    image_size: tuple[int, int]
    block_size: int
    tiny: bool = False
    """Small images, for which worker processes cost more than they save."""


# --- Grids of digits --------------------------------------------------------------------------------------------------


@dataclass
class DigitGrids(Pairs):
    """Grids of 2 x 2 digits with the question ``all?``, in every second grid, or for one cell.

    Args:
        images: Digits, (N, 8, 8) uint8.
        labels: Their classes, (N,).
        size: Number of grids.
    """

    images: np.ndarray
    labels: np.ndarray
    size: int

    def __len__(self) -> int:
        return self.size

    def read(self, index: int, rng: np.random.Generator, training: bool) -> Pair:
        chosen = rng.integers(len(self.images), size=4)
        canvas = np.zeros((2 * _CELL, 2 * _CELL), dtype=np.uint8)
        for place, digit in enumerate(self.images[chosen]):
            down, right = rng.integers(-1, 2, size=2) if training else (0, 0)
            padded = np.zeros((_CELL + 2, _CELL + 2), dtype=np.uint8)
            padded[1:-1, 1:-1] = digit
            row, column = place // 2 * _CELL, place % 2 * _CELL
            shifted = padded[1 + down : 1 + down + _CELL, 1 + right : 1 + right + _CELL]
            canvas[row : row + _CELL, column : column + _CELL] = shifted
        digits = "".join(str(label) for label in self.labels[chosen])
        image = Image.fromarray(canvas)
        if rng.integers(2):
            return Pair(image, "all?", digits, 1)
        cell = int(rng.integers(4))
        return Pair(image, f"{CORNERS[cell]}?", digits[cell], 0)


def _open_digits_grid(settings: PairSettings) -> PairSplits:
    digits: Any = IMAGE_SOURCES["digits"].open(SourceSettings())  # the splits of the image task
    train = DigitGrids(digits.train.images, digits.train.labels, settings.train_samples)
    val = DigitGrids(digits.val.images, digits.val.labels, settings.val_samples)
    return PairSplits(train, val, group_names=("one", "all"))


# --- Rendered words ---------------------------------------------------------------------------------------------------


@dataclass
class RenderedWords(Pairs):
    """Words in Pillow's own font; in training at a random offset.

    Args:
        words: The words.
        size: Number of samples in training, which draw their word; evaluation reads each word once.
    """

    words: Sequence[str]
    size: int

    def __len__(self) -> int:
        return self.size

    def read(self, index: int, rng: np.random.Generator, training: bool) -> Pair:
        word = self.words[int(rng.integers(len(self.words))) if training else index]
        down, right = rng.integers(-1, 2, size=2) if training else (0, 0)
        return Pair(render(word, (_PLACE[0] + int(right), _PLACE[1] + int(down))), "", word)


def render(text: str, place: tuple[int, int] = _PLACE) -> Image.Image:
    """Draw a text in white on black, 16 x 80 pixels.

    Args:
        text: Text of up to 9 characters; the rest is outside of the image.
        place: Left and top edge in pixels.
    """
    image = Image.new("L", (_WIDTH, _LINE))
    ImageDraw.Draw(image).text(place, text, fill=255, font=_font())
    return image


@cache
def _font() -> Any:
    try:
        return ImageFont.load_default(size=_FONT_SIZE)
    except (TypeError, ImportError, OSError) as error:  # Pillow without FreeType
        raise UserError(f"data.dataset: rendered_text needs Pillow with FreeType ({first_line(error)})") from None


@cache
def _words() -> tuple[str, ...]:
    """Return the words of the sources of Python's standard library, sorted."""
    found: set[str] = set()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        found |= {*_WORD.findall(path.read_text(encoding="utf-8", errors="ignore"))}
    return tuple(sorted(found))


def _open_rendered_text(settings: PairSettings) -> PairSplits:
    words = _words()
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(words))
    held_out = min(settings.val_samples, len(words) // 5)
    val = [words[i] for i in sorted(order[:held_out])]
    train = [words[i] for i in sorted(order[held_out:])]
    return PairSplits(RenderedWords(train, settings.train_samples), RenderedWords(val, len(val)))


# --- Classes of images ------------------------------------------------------------------------------------------------


@dataclass
class ClassPairs(Pairs):
    """Labeled images with one question, answered by the class name.

    Args:
        samples: The images.
        class_names: Class names, indexed by label.
        question: The question.
        shift: Largest random translation in training, as a share of the image.
    """

    samples: Samples
    class_names: Sequence[str]
    question: str
    shift: float

    def __len__(self) -> int:
        return len(self.samples.labels)

    def read(self, index: int, rng: np.random.Generator, training: bool) -> Pair:
        try:
            image = self.samples.read(index)
        except Exception as error:  # damaged bytes raise any exception in a decoder
            raise UserError(f"data.root: cannot read image {self.name(index)} ({first_line(error)})") from None
        if training and self.shift:
            most = [round(side * self.shift) for side in image.size]
            right, down = (int(rng.integers(-one, one + 1)) for one in most)
            image = image.transform(image.size, Image.Transform.AFFINE, (1, 0, right, 0, 1, down))
        return Pair(image, self.question, self.class_names[int(self.samples.labels[index])])

    def name(self, index: int) -> str:
        return self.samples.name(index)


def _open_classes(settings: PairSettings, source: ImageSource) -> PairSplits:
    names = ("root", "val_fraction", "hf_name", "hf_config", "hf_image_column", "hf_label_column")
    given = {name: getattr(settings, name) for name in (*names, "hf_train_split", "hf_val_split")}
    found: Any = source.open(SourceSettings(**given))
    shift = source.augmentation.shift or 0.0

    def pairs(samples: Samples) -> ClassPairs:
        return ClassPairs(samples, found.class_names, settings.question, shift)

    test = None if found.test is found.val or is_unlabeled(found.test) else pairs(found.test)
    return PairSplits(pairs(found.train), pairs(found.val), test, class_names=tuple(found.class_names))


# --- Files and Hugging Face data sets ---------------------------------------------------------------------------------


@dataclass
class RowPairs(Pairs):
    """Rows of a Hugging Face data set.

    Args:
        rows: Data set with undecoded images.
        columns: Names of the columns of images, answers and, if present, questions.
        folders: Allowed folders of the files that it references.
        indices: Rows to read; ``None`` for all.
    """

    rows: Any
    columns: tuple[str, str, str | None]
    folders: tuple[str, ...]
    indices: np.ndarray | None = field(default=None)

    def __len__(self) -> int:
        return len(self.rows) if self.indices is None else len(self.indices)

    def _row(self, index: int) -> Mapping[str, Any]:
        return self.rows[int(index if self.indices is None else self.indices[index])]

    def read(self, index: int, rng: np.random.Generator, training: bool) -> Pair:
        row, (image, text, question) = self._row(index), self.columns
        asked, answer = "" if question is None else row[question] or "", row[text]
        if not isinstance(answer, str):
            raise UserError(f"data.text_column: {self.name(index)}: expected text, got {answer!r}")
        if not isinstance(asked, str):
            raise UserError(f"data.question_column: {self.name(index)}: expected text, got {asked!r}")
        try:
            return Pair(decode_hub_image(row[image], self.folders), asked, answer)
        except Exception as error:  # damaged bytes raise any exception in a decoder
            raise UserError(f"data.root: cannot read image {self.name(index)} ({first_line(error)})") from None

    def name(self, index: int) -> str:
        return (self._row(index)[self.columns[0]] or {}).get("path") or str(index)


def _open_huggingface(settings: PairSettings) -> PairSplits:
    if not settings.hf_name:
        raise UserError("data.hf_name: expected the name of a Hugging Face data set, got none")
    try:
        loaded = load_hub_data(settings.hf_name, settings.hf_config, settings.root)
    except (OSError, ValueError, RuntimeError) as error:  # not found, offline, wrong config
        where = (
            f"data.root: {settings.root}" if settings.hf_name == "imagefolder" else f"data.hf_name: {settings.hf_name}"
        )
        raise UserError(f"{where}: cannot load ({first_line(error)})") from error
    names = named_splits(loaded, settings, SPLITS["val"])
    folders = own_folders(settings.hf_name, settings.root)
    found = {split: _rows(loaded[name], settings, folders) for split, name in names.items()}
    train, val, test = found["train"], found.get("val"), found.get("test")
    if val is None:
        held_out = round(len(train) * settings.val_fraction)
        if not 0 < held_out < len(train):
            raise UserError(f"data.val_fraction: {settings.val_fraction} of {len(train)} images leaves an empty split")
        order = np.random.default_rng(_SPLIT_SEED).permutation(len(train))
        train, val = (replace(train, indices=np.sort(part)) for part in (order[held_out:], order[:held_out]))
    return PairSplits(train, val, test)


def _rows(rows: Any, settings: PairSettings, folders: tuple[str, ...]) -> RowPairs:
    import datasets  # takes a second

    images = [name for name, feature in rows.features.items() if type(feature).__name__ == "Image"]
    wanted = settings.hf_image_column
    if (wanted is None and len(images) != 1) or (wanted is not None and wanted not in images):
        raise UserError(f"data.hf_image_column: expected one column of images ({', '.join(images)}), got {wanted!r}")
    image = images[0] if wanted is None else wanted
    if settings.text_column not in rows.column_names:
        columns = ", ".join(rows.column_names)
        raise UserError(f"data.text_column: no column {settings.text_column!r}; the columns are {columns}")
    question = settings.question_column if settings.question_column in rows.column_names else None
    return RowPairs(
        rows.cast_column(image, datasets.Image(decode=False)), (image, settings.text_column, question), folders
    )


def _open_files(settings: PairSettings) -> PairSplits:
    if not settings.root or not Path(settings.root).is_dir():
        raise UserError(f"data.root: expected a folder of images with metadata.jsonl, got {settings.root!r}")
    tables = [path for name in ("metadata.jsonl", "metadata.csv") for path in Path(settings.root).rglob(name)]
    if not tables:
        raise UserError(f"data.root: no metadata.jsonl in {settings.root} (expected file_name and text for each image)")
    return _open_huggingface(replace(settings, hf_name="imagefolder"))


IMAGE_TEXT_SOURCES.register("digits_grid")(ImageTextSource(_open_digits_grid, (2 * _CELL, 2 * _CELL), 20, tiny=True))
IMAGE_TEXT_SOURCES.register("rendered_text")(ImageTextSource(_open_rendered_text, (_LINE, _WIDTH), 14, tiny=True))
IMAGE_TEXT_SOURCES.register("files")(ImageTextSource(_open_files, (224, 224), 64))
IMAGE_TEXT_SOURCES.register("huggingface")(ImageTextSource(_open_huggingface, (224, 224), 64))
for _name in ("digits", "mnist", "kmnist", "fashion_mnist", "cifar10", "cifar100", "imagefolder", "huggingface"):
    _source: ImageSource = IMAGE_SOURCES[_name]
    _side = _source.image_size
    IMAGE_TEXT_SOURCES.register(f"images/{_name}")(
        ImageTextSource(partial(_open_classes, source=_source), (_side, _side), 32, tiny=_source.tiny)
    )
