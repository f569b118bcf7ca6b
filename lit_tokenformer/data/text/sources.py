"""Registry of text data sets.

Sources: Python's own documentation (``pydoc_data.topics``) and standard library, part of every Python installation;
files (``files.py``); any data set of the Hugging Face ``datasets`` library.
"""

from __future__ import annotations

import os
import platform
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal, Protocol

from lit_tokenformer.data.corrupt import check_share
from lit_tokenformer.data.hub import first_line, load_hub_data, named_splits
from lit_tokenformer.data.text.files import BadText, TextFiles, TextFormat, find_files, hash_of
from lit_tokenformer.errors import UserError
from lit_tokenformer.registry import TEXT_SOURCES

Split = Literal["train", "val", "test"]
SPLIT_NAMES: dict[Split, str] = {"train": "training", "val": "validation", "test": "test"}

_PYTHON = f"Python {platform.python_version()}"
_NOT_SOURCE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class TextSettings(TextFormat):
    """Location and splits of the text; see ``TextDataModule`` for each setting."""

    files: tuple[str, ...] = ()
    val_files: tuple[str, ...] = ()
    val_fraction: float = 0.1
    test_fraction: float = 0.0
    hf_name: str | None = None
    hf_config: str | None = None
    hf_train_split: str = "train"
    hf_val_split: str | None = None
    streaming: bool = False
    max_corrupt_share: float = 0.001
    cache_dir: Path = Path()

    @property
    def form(self) -> TextFormat:
        """Form of the texts."""
        return TextFormat(self.text_column, self.chat_template, self.encoding, self.encoding_errors)


class Documents(Protocol):
    """Reiterable texts in a fixed order; empty texts are skipped."""

    @property
    def fingerprint(self) -> str:
        """Hash that changes with the texts, much faster than reading a large corpus."""

    @property
    def size(self) -> int | None:
        """Approximate size in bytes, for a progress bar."""

    def __iter__(self) -> Iterator[str]: ...


@dataclass
class HubStream:
    """Streamed split of a Hugging Face data set, or of files.

    A row without readable text is reported in a warning and skipped; the share is counted per process and worker.
    """

    rows: Any
    """``datasets.IterableDataset`` of the split; the key ``""`` of a row is the reason why it is unreadable."""
    form: TextFormat = field(default_factory=TextFormat)
    max_corrupt_share: float = 0.001
    """Tolerated share of rows without readable text."""
    keep: tuple[Any, Split] | None = None
    """Filter: a ``HashSplit`` and the split to keep. None: all documents."""

    def __iter__(self) -> Iterator[str]:
        corrupt: list[str] = []
        rows = iter(self.rows)
        for number in count(1):
            try:
                row = next(rows, None)
            except Exception as error:  # of the library, which cannot continue after it
                reason = f"cannot read after {number - 1} rows: {first_line(error)}"
                raise BadText(f"data.streaming: {reason}") from error
            if row is None:
                return
            try:
                if reason := row.get(""):
                    raise BadText(reason)
                text = self.form.text(row, f"row {number} read from the stream")
            except BadText as error:
                warnings.warn(f"unreadable row skipped: {error}", stacklevel=2)
                corrupt.append(str(error))
                check_share(len(corrupt), number, self.max_corrupt_share, corrupt[:3], unit="rows of the stream")
                continue
            if text and (self.keep is None or self.keep[0](text) == self.keep[1]):
                yield text


@dataclass
class TextSplits:
    """Document splits of a source. A split that is None is held out of the training documents by their hashes."""

    train: Documents | HubStream
    val: Documents | HubStream | None = None
    test: Documents | HubStream | None = None
    note: str = ""
    """Further identification of the text, such as a version."""


class TextList:
    """Documents in memory."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = [text for text in texts if text]

    @property
    def fingerprint(self) -> str:
        return hash_of(*self.texts)

    @property
    def size(self) -> int:
        return sum(map(len, self.texts))

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)


class HubTexts:
    """Stored split of a Hugging Face data set."""

    def __init__(self, rows: Any, form: TextFormat) -> None:
        self.rows = rows.select_columns([form.text_column])
        self.form = form
        self.fingerprint = hash_of(rows._fingerprint, repr(form))

    @property
    def size(self) -> int | None:
        return self.rows.info.dataset_size

    def __iter__(self) -> Iterator[str]:
        return filter(None, (self.form.text(row, f"row {number}") for number, row in enumerate(self.rows)))


@TEXT_SOURCES.register("python_docs")
def _open_python_docs(settings: TextSettings) -> TextSplits:
    from pydoc_data.topics import topics

    return TextSplits(TextList(topics[name] for name in sorted(topics)), note=_PYTHON)


@TEXT_SOURCES.register("python_stdlib")
def _open_python_stdlib(settings: TextSettings) -> TextSplits:
    root = sysconfig.get_path("stdlib")
    paths = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - _NOT_SOURCE)
        paths += [Path(folder, name) for name in files if name.endswith(".py")]
    paths.sort(key=lambda path: path.relative_to(root).as_posix())
    return TextSplits(TextFiles(paths, TextFormat(encoding_errors="skip")), note=_PYTHON)


@TEXT_SOURCES.register("files")
def _open_files(settings: TextSettings) -> TextSplits:
    if not settings.files and (not settings.val_files or settings.streaming):
        raise UserError("data.files: expected files, folders or patterns, got none")
    val = find_files("data.val_files", settings.val_files)
    train = find_files("data.files", settings.files)
    held_out = {path.resolve() for path in val}
    own = [path for path in train if path.resolve() not in held_out]
    if train and not own:
        raise UserError("data.val_files: includes all of data.files, with no file left for training")

    def documents(paths: list[Path]) -> TextFiles | HubStream:
        if not settings.streaming:
            return TextFiles(paths, settings.form)
        import datasets

        parts = {"paths": paths, "form": settings.form}  # a list is divided among workers and processes
        rows = datasets.IterableDataset.from_generator(_rows_of_files, gen_kwargs=parts)
        return HubStream(rows, settings.form, settings.max_corrupt_share)

    return TextSplits(documents(own) if own else TextList([]), documents(val) if val else None)


def _rows_of_files(paths: list[Path], form: TextFormat) -> Iterator[dict[str, str]]:
    for text in TextFiles(paths, form).read():
        yield {"": str(text)} if isinstance(text, BadText) else {form.text_column: text}


@TEXT_SOURCES.register("huggingface")
def _open_hugging_face(settings: TextSettings) -> TextSplits:
    import datasets  # takes a second, and only this entry needs it

    name, column = settings.hf_name, settings.text_column
    if not name:
        raise UserError("data.hf_name: expected the name of a Hugging Face data set, got none")
    data_files = {settings.hf_train_split: list(settings.files)} if settings.files else None
    if data_files and settings.val_files:
        data_files[settings.hf_val_split or "validation"] = list(settings.val_files)
    try:
        loaded = load_hub_data(name, settings.hf_config, data_files=data_files, streaming=settings.streaming)
        columns = {part: rows.features or dict.fromkeys(next(iter(rows), {})) for part, rows in loaded.items()}
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # Not found, offline, wrong config, damaged file: the first line is specific.
        raise UserError(f"data.hf_name: cannot load {name!r}: {first_line(error)}") from error

    def documents(part: str) -> Documents | HubStream:
        rows, kinds = loaded[part], columns[part]
        if column not in kinds:
            raise UserError(f"data.text_column: no column {column!r}; {name} has {', '.join(kinds)}")
        kind = kinds[column]
        if isinstance(kind, datasets.Value) and kind.dtype not in ("string", "large_string", "string_view", "null"):
            expected = "expected text or chat messages"
            raise UserError(f"data.text_column: {expected} in {column!r} of {name}, got {kind.dtype}")
        if settings.streaming:
            return HubStream(rows.select_columns([column]), settings.form, settings.max_corrupt_share)
        return HubTexts(rows, settings.form)

    names = named_splits(loaded, settings, ("validation", "valid", "val", "dev"))
    found = {split: documents(part) for split, part in names.items()}
    return TextSplits(found["train"], found.get("val"), found.get("test"))
