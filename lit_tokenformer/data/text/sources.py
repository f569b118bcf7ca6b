"""Registry of text data sets.

Sources: Python's own documentation (``pydoc_data.topics``) and standard library, part of every Python installation;
text, Markdown, JSON Lines and Parquet files; any data set of the Hugging Face ``datasets`` library.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import sysconfig
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from filelock import FileLock

from lit_tokenformer.atomic_io import atomic_write
from lit_tokenformer.data.corrupt import check_share
from lit_tokenformer.data.hub import load_hub_data
from lit_tokenformer.errors import UserError
from lit_tokenformer.registry import TEXT_SOURCES

EncodingErrors = Literal["strict", "replace"]
Split = Literal["train", "val", "test"]

TEXT_ENDINGS = (".txt", ".md")
ENDINGS = (*TEXT_ENDINGS, ".jsonl", ".parquet")

_NOT_SOURCE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data"}
_WORTH_REMEMBERING = 1 << 24  # minimum file size in bytes to cache its hash: 16 MB take 20 ms
_SETTLED = 10.0  # minimum age in seconds of a file to cache its hash: file system clocks are coarse


@dataclass(frozen=True)
class TextSettings:
    """Location and splits of the text; see ``TextDataModule`` for each setting."""

    files: tuple[str, ...] = ()
    val_files: tuple[str, ...] = ()
    text_column: str = "text"
    encoding_errors: EncodingErrors = "strict"
    val_fraction: float = 0.1
    test_fraction: float = 0.0
    hf_name: str | None = None
    hf_config: str | None = None
    hf_train_split: str = "train"
    hf_val_split: str | None = None
    streaming: bool = False
    max_corrupt_share: float = 0.001
    cache_dir: Path = Path()


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
    """Streamed split of a Hugging Face data set.

    A row without readable text is reported in a warning and skipped; the share is counted per process and worker.
    """

    rows: Any
    """``datasets.IterableDataset`` of the split."""
    column: str
    encoding_errors: EncodingErrors = "strict"
    max_corrupt_share: float = 0.001
    """Tolerated share of rows without readable text."""

    def __iter__(self) -> Iterator[str]:
        corrupt: list[str] = []
        for number, row in enumerate(self.rows, start=1):
            try:
                text = row_text(row, self.column, self.encoding_errors, f"row {number} read from the stream")
            except BadText as error:
                warnings.warn(f"unreadable row skipped: {error}", stacklevel=2)
                corrupt.append(str(error))
                check_share(len(corrupt), number, self.max_corrupt_share, corrupt[:3], unit="rows of the stream")
                continue
            if text:
                yield text


@dataclass
class TextSplits:
    """Document splits of a source. A split that is None is held out of the training documents by their hashes."""

    train: Documents | HubStream
    val: Documents | HubStream | None = None
    test: Documents | HubStream | None = None
    note: str = ""
    """Further identification of the text, such as a version."""


class BadText(UserError):
    """Unreadable text."""


class TextList:
    """Documents in memory."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = [text for text in texts if text]

    @property
    def fingerprint(self) -> str:
        return _hash_of(*self.texts)

    @property
    def size(self) -> int:
        return sum(map(len, self.texts))

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)


class TextFiles:
    """Documents in files: a text file, a line of a JSON Lines file or a row of a Parquet file is one document.

    Args:
        paths: Files to read.
        column: Name of the text in a line or row.
        encoding_errors: Handling of bytes that are not UTF-8: ``strict`` raises an error, ``replace`` inserts U+FFFD,
            ``skip`` skips the text file.
        memory: Cache file for hashes of large files, by path, size and modification time. None: no cache.
    """

    def __init__(
        self, paths: list[Path], column: str, encoding_errors: EncodingErrors | Literal["skip"], memory: Path | None
    ) -> None:
        self.paths = paths
        self.column = column
        self.encoding_errors = encoding_errors
        self.memory = memory

    @property
    def fingerprint(self) -> str:
        hashes = _file_hashes(self.paths, self.memory)
        parts = [f"{path.suffix.lower()} {digest}" for path, digest in zip(self.paths, hashes, strict=True)]
        return _hash_of(self.column, self.encoding_errors, *parts)

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for path in self.paths)

    def __iter__(self) -> Iterator[str]:
        for path in self.paths:
            kind = path.suffix.lower()
            read = {".jsonl": self._json_lines, ".parquet": self._parquet_rows}.get(kind, self._whole)
            yield from filter(None, read(path))

    def _whole(self, path: Path) -> Iterator[str]:
        data = path.read_bytes()
        try:
            yield data.decode("utf-8-sig", "replace" if self.encoding_errors == "replace" else "strict")
        except UnicodeDecodeError as error:
            if self.encoding_errors == "strict":
                raise _not_utf8(str(path), error) from None

    def _json_lines(self, path: Path) -> Iterator[str]:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8", self.encoding_errors))
                except UnicodeDecodeError as error:
                    raise _not_utf8(where, error) from None
                except (ValueError, RecursionError) as error:
                    raise BadText(f"data.files: {where} is not JSON: {getattr(error, 'msg', error)}") from None
                yield row_text(row, self.column, self.encoding_errors, where)

    def _parquet_rows(self, path: Path) -> Iterator[str]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(path) as file:
                if self.column not in file.schema_arrow.names:
                    raise _no_column(str(path), self.column, file.schema_arrow.names)
                number = 0
                for batch in file.iter_batches(batch_size=1000, columns=[self.column]):
                    for text in batch.column(0).to_pylist():
                        number += 1
                        yield row_text({self.column: text}, self.column, self.encoding_errors, f"{path}:{number}")
        except pa.ArrowException as error:
            raise BadText(f"data.files: cannot read {path}: {str(error).splitlines()[0]}") from error


class HubTexts:
    """Stored split of a Hugging Face data set."""

    def __init__(self, rows: Any, column: str, encoding_errors: EncodingErrors) -> None:
        self.rows = rows.select_columns([column])
        self.column = column
        self.encoding_errors = encoding_errors
        self.fingerprint = _hash_of(rows._fingerprint, column, encoding_errors)

    @property
    def size(self) -> int | None:
        return self.rows.info.dataset_size

    def __iter__(self) -> Iterator[str]:
        for number, row in enumerate(self.rows):
            if text := row_text(row, self.column, self.encoding_errors, f"row {number}"):
                yield text


def row_text(row: Any, column: str, encoding_errors: str, where: str) -> str:
    """Return the text of a line or row; null is an empty text.

    Args:
        row: Mapping with the text.
        column: Key of the text.
        encoding_errors: Handling of lone surrogates, which are valid in JSON but not in UTF-8.
        where: Name of the row, for errors.

    Raises:
        ValueError: If the row has no text.
    """
    if not isinstance(row, dict) or column not in row:
        raise _no_column(where, column, list(row) if isinstance(row, dict) else None)
    text = row[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise BadText(f"data.text_column: {where}: expected text in {column!r}, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if encoding_errors == "strict":
            raise _not_utf8(where, error) from None
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _no_column(where: str, column: str, columns: list[str] | None) -> BadText:
    has = f"it has {', '.join(map(str, columns))}" if columns is not None else "it is not an object"
    return BadText(f"data.text_column: {where} has no {column!r}; {has}")


def _not_utf8(where: str, error: UnicodeError) -> BadText:
    return BadText(f"data.encoding_errors: {where} is not UTF-8 ({error}); replace inserts U+FFFD for such bytes")


def _hash_of(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _file_hashes(paths: list[Path], memory: Path | None) -> list[str]:
    """Compute the SHA-256 of each file; hashes of large files are cached."""
    known: dict[str, list[Any]] = {}
    if memory is not None:
        with suppress(OSError, ValueError):
            known = json.loads(memory.read_text())
    fresh: dict[str, list[Any]] = {}
    hashes = []
    for path in paths:
        facts = path.stat()
        place, state = str(path.resolve()), [facts.st_size, facts.st_mtime_ns]
        kept = known.get(place)
        if isinstance(kept, list) and kept[:2] == state:
            hashes.append(str(kept[2]))
            continue
        with path.open("rb") as file:
            hashes.append(_file_digest(file))
        if facts.st_size >= _WORTH_REMEMBERING and time.time() - facts.st_mtime > _SETTLED:
            fresh[place] = [*state, hashes[-1]]
    if fresh and memory is not None:
        with suppress(OSError):  # the cache only saves time
            memory.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{memory}.lock"), atomic_write(memory) as file:
                file.write(json.dumps({**known, **fresh}).encode())
    return hashes


def _file_digest(file: Any) -> str:
    digest = hashlib.sha256()
    while data := file.read(1 << 20):
        digest.update(data)
    return digest.hexdigest()


def find_files(setting: str, wanted: Iterable[str]) -> list[Path]:
    """Find the text files of paths, folders and glob patterns, without duplicates, in order, sorted per argument.

    Args:
        setting: Setting name, for errors.
        wanted: Files, folders (recursive), or glob patterns such as ``books/**/*.txt``.

    Raises:
        ValueError: If an argument matches no text file.
    """
    found: dict[Path, Path] = {}
    for name in wanted:
        path = Path(name).expanduser()
        if path.is_file():
            if path.suffix.lower() not in ENDINGS:
                raise UserError(f"{setting}: expected a file with extension {', '.join(ENDINGS)}, got {name}")
            paths = [path]
        elif path.is_dir():
            paths = sorted(inner for inner in path.rglob("*") if inner.is_file())
        elif glob.has_magic(name):
            paths = sorted(inner for inner in map(Path, glob.glob(str(path), recursive=True)) if inner.is_file())
        else:
            raise UserError(f"{setting}: no such file or folder: {name}")
        kept = [inner for inner in paths if inner.suffix.lower() in ENDINGS]
        if not kept:
            what = f"{len(paths)} files, but none with extension {', '.join(ENDINGS)}" if paths else "no file"
            raise UserError(f"{setting}: {name} matches {what}")
        found.update((inner.resolve(), inner) for inner in kept if inner.resolve() not in found)
    return list(found.values())


def _python_version() -> str:
    return f"Python {platform.python_version()}"


@TEXT_SOURCES.register("python_docs")
def _open_python_docs(settings: TextSettings) -> TextSplits:
    from pydoc_data.topics import topics

    return TextSplits(TextList(topics[name] for name in sorted(topics)), note=_python_version())


@TEXT_SOURCES.register("python_stdlib")
def _open_python_stdlib(settings: TextSettings) -> TextSplits:
    root = sysconfig.get_path("stdlib")
    paths = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - _NOT_SOURCE)
        paths += [Path(folder, name) for name in files if name.endswith(".py")]
    paths.sort(key=lambda path: path.relative_to(root).as_posix())
    return TextSplits(TextFiles(paths, "", "skip", None), note=_python_version())


@TEXT_SOURCES.register("files")
def _open_files(settings: TextSettings) -> TextSplits:
    if not settings.files and not settings.val_files:
        raise UserError("data.files: expected files, folders or patterns, got none")
    memory = settings.cache_dir / "file_hashes.json"

    def documents(paths: list[Path]) -> TextFiles:
        return TextFiles(paths, settings.text_column, settings.encoding_errors, memory)

    if not settings.files:
        return TextSplits(TextList([]), documents(find_files("data.val_files", settings.val_files)))
    train = find_files("data.files", settings.files)
    if not settings.val_files:
        return TextSplits(documents(train))
    val = find_files("data.val_files", settings.val_files)
    held_out = {path.resolve() for path in val}
    train = [path for path in train if path.resolve() not in held_out]
    if not train:
        raise UserError("data.val_files: includes all of data.files, with no file left for training")
    return TextSplits(documents(train), documents(val))


@TEXT_SOURCES.register("huggingface")
def _open_hugging_face(settings: TextSettings) -> TextSplits:
    import datasets  # takes a second, and only this entry needs it

    if not settings.hf_name:
        raise UserError("data.hf_name: expected the name of a Hugging Face data set, got none")
    data_files: dict[str, list[str]] | None = None
    if settings.files:
        data_files = {settings.hf_train_split: list(settings.files)}
        if settings.val_files:
            data_files[settings.hf_val_split or "validation"] = list(settings.val_files)
    try:
        loaded = load_hub_data(
            settings.hf_name, settings.hf_config, data_files=data_files, streaming=settings.streaming
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # Not found, offline, wrong config, damaged file: the first line is specific.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"data.hf_name: cannot load {settings.hf_name!r}: {reason}") from error

    def split(setting: str, name: str | None) -> Documents | HubStream | None:
        if name is None:
            return None
        if name not in loaded:
            raise UserError(f"data.{setting}: no split {name!r} in {settings.hf_name}; it has {', '.join(loaded)}")
        rows, column = loaded[name], settings.text_column
        columns = list(rows.features or next(iter(rows), {}))
        if column not in columns:
            raise UserError(f"data.text_column: no column {column!r}; {settings.hf_name} has {', '.join(columns)}")
        if settings.streaming:
            rows = rows.select_columns([column])
            return HubStream(rows, column, settings.encoding_errors, settings.max_corrupt_share)
        return HubTexts(rows, column, settings.encoding_errors)

    usual = next((name for name in ("validation", "valid", "val", "dev") if name in loaded), None)
    train = split("hf_train_split", settings.hf_train_split)
    assert train is not None
    val = split("hf_val_split", settings.hf_val_split or usual)
    return TextSplits(train, val, split("hf_train_split", "test" if "test" in loaded else None))
