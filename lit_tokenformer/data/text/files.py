"""Documents in files: plain text, JSON, JSON Lines, CSV and Parquet, each also compressed.

Readers of the standard library, pyarrow and fsspec, since the builders of ``datasets`` turn JSON strings such
as "2026-01-01" into dates and "NA" in CSV into null, translate line ends, and name no line in an error.
"""

from __future__ import annotations

import codecs
import csv
import glob
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO, Literal

import fsspec.compression
import numpy as np
from fsspec.utils import glob_translate
from lightning.pytorch.utilities import rank_zero_info

from lit_tokenformer.data.hub import first_line
from lit_tokenformer.errors import UserError

EncodingErrors = Literal["strict", "replace"]

_COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
_FULL_DIGEST = 1 << 26  # maximum file size in bytes for a digest of all of it: 64 MB take 50 ms
_SAMPLES, _SAMPLE = 64, 1 << 20  # chunks of a larger file, and bytes per chunk


class BadText(UserError):
    """Unreadable text."""


@dataclass(frozen=True)
class TextFormat:
    """Form of the texts in files and rows; see ``TextDataModule`` for each setting."""

    text_column: str = "text"
    chat_template: str | None = None
    encoding: str = "utf-8"
    encoding_errors: EncodingErrors | Literal["skip"] = "strict"
    """``skip`` skips a text file with undecodable bytes."""

    @property
    def codec(self) -> str:
        """Name of the codec; for UTF-8, the one that removes a byte order mark."""
        return "utf-8-sig" if codecs.lookup(self.encoding).name == "utf-8" else self.encoding

    def text(self, row: Any, where: str) -> str:
        """Return the text of a row, named ``where`` in errors, with chat messages rendered; null is an empty text."""
        column = self.text_column
        if not isinstance(row, Mapping) or column not in row:
            has = f"it has {', '.join(map(str, row))}" if isinstance(row, Mapping) else "it is not an object"
            has = has.encode(errors="replace").decode()
            raise BadText(f"data.text_column: {where} has no {column!r}; {has}")
        text = row[column]
        if text is None:
            return ""
        if isinstance(text, list) and all(isinstance(message, Mapping) for message in text):
            try:
                text = compile_template(self.chat_template).render(messages=text, add_generation_prompt=False)
            except Exception as error:  # any exception of the template's own expressions
                raise BadText(f"data.chat_template: {where}: {first_line(error)}") from error
        if not isinstance(text, str):
            raise BadText(f"data.text_column: {where}: expected text in {column!r}, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # a lone surrogate: valid in JSON, and a byte that cannot be decoded
            if self.encoding_errors == "strict":
                raise self.not_decoded(where, error) from None
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text

    def not_decoded(self, where: str, error: UnicodeError) -> BadText:
        """Build the error for text in another encoding."""
        cure = "set data.encoding, such as latin-1, or replace, which inserts U+FFFD for such bytes"
        return BadText(f"data.encoding_errors: {where} is not {self.encoding.upper()} ({error}); {cure}")


_CHATML = (
    "{% for message in messages %}{% if message.content is not string %}"
    "{{ raise_exception('expected text in content of each message') }}{% endif %}"
    "{{ '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>\n' }}{% endfor %}"
)


@lru_cache
def compile_template(source: str | None) -> Any:
    """Compile a chat template, by default ChatML, in a sandbox with the environment of ``transformers``."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols"],
        undefined=jinja2.StrictUndefined if source is None else jinja2.Undefined,
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(source or _CHATML)


def load_template(name: str | None) -> str | None:
    """Return the text of a template that is given as text or as the name of a file, if it compiles."""
    try:
        text = name if name is None or "{" in name else Path(name).expanduser().read_text(encoding="utf-8")
        compile_template(text)
    except Exception as error:  # of the file, or of jinja2
        raise UserError(f"data.chat_template: expected a Jinja template or its file ({first_line(error)})") from error
    return text


# --- Readers: (line or row, the text | a mapping with it | what is wrong with it) -------------------------------------

Records = Iterator[tuple[int, Any]]


def _whole(file: BinaryIO, form: TextFormat) -> Records:
    yield 1, file.read().decode(form.codec, "replace" if form.encoding_errors == "replace" else "strict")


def _json_lines(file: Iterable[str], form: TextFormat) -> Records:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, _not("JSON", error)


def _json(file: Any, form: TextFormat) -> Records:
    text = file.read()
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data":  # JSON Lines under another name
            yield from _json_lines(io.StringIO(text), form)
        else:
            yield getattr(error, "lineno", 1), _not("JSON", error)
        return
    if isinstance(whole, dict) and form.text_column not in whole:
        whole = next((value for value in whole.values() if isinstance(value, list)), whole)
    yield from enumerate(whole if isinstance(whole, list) else [whole], start=1)


def _csv(file: Any, form: TextFormat) -> Records:
    csv.field_size_limit((1 << 31) - 1)
    rows = csv.reader(file, strict=True)
    names: list[str] = []
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield rows.line_num, _not("CSV", error)
            continue
        if row is None:
            return
        if not names:
            names = row
            if (count := names.count(form.text_column)) > 1:
                yield rows.line_num, ValueError(f"has {count} columns {form.text_column!r}")
                return
        elif row:  # no blank line
            bad = ValueError(f"has {len(row)} fields (expected {len(names)})")
            yield rows.line_num, dict(zip(names, row, strict=True)) if len(row) == len(names) else bad


def _parquet(file: BinaryIO, form: TextFormat) -> Records:
    import pyarrow.parquet as pq

    column = form.text_column
    with pq.ParquetFile(file) as table:
        if column not in table.schema_arrow.names:
            yield 0, dict.fromkeys(table.schema_arrow.names)
            return
        values = (value for batch in table.iter_batches(batch_size=1000, columns=[column]) for value in batch.column(0))
        for number, value in enumerate(values, start=1):
            try:
                yield number, {column: value.as_py()}
            except UnicodeDecodeError as error:
                yield number, _not("UTF-8", error)


def _not(kind: str, error: Exception) -> ValueError:
    column = f" (column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
    return ValueError(f"is not {kind}: {getattr(error, 'msg', error)}{column}")


_READERS: dict[str, Callable[[Any, TextFormat], Records]] = {".txt": _whole, ".md": _whole, ".jsonl": _json_lines}
_READERS |= {".json": _json, ".csv": _csv, ".parquet": _parquet}
ENDINGS = ", ".join(_READERS)


def kind_of(path: Path) -> str:
    """Return the extension that names the format, in lower case: ``.jsonl`` of ``a.jsonl.gz``."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in _COMPRESSIONS else suffix


def read_documents(path: Path, form: TextFormat) -> Iterator[str | BadText]:
    """Yield the documents of a file, and an error in place of each one that is unreadable; empty texts are skipped."""
    reader, number = _READERS.get(kind_of(path), _whole), 0
    try:
        name = _COMPRESSIONS.get(path.suffix.lower())
        if name not in fsspec.compression.compr:
            raise ValueError(f"no library for {name} is installed")
        with path.open("rb") as raw, fsspec.compression.compr[name](raw, mode="rb") as file:
            if reader not in (_whole, _parquet):  # a byte that cannot be decoded is found in the text of its row
                errors = "replace" if form.encoding_errors == "replace" else "surrogateescape"
                file = io.TextIOWrapper(file, form.codec, errors, newline="\n")
            for number, row in reader(file, form):
                where = f"{path}:{number}" if number else str(path)
                try:
                    if isinstance(row, Exception):
                        raise BadText(f"data.files: {where} {row}")
                    text: str | BadText = row if isinstance(row, str) else form.text(row, where)
                except BadText as error:
                    text = error
                if text:
                    yield text
    except UnicodeDecodeError as error:
        if form.encoding_errors != "skip":
            yield form.not_decoded(str(path), error)
    except Exception as error:  # each library of a format or compression has its own
        after = f" after row {number}" if number else ""
        yield BadText(f"data.files: cannot read {path}{after}: {first_line(error)}")


@dataclass
class TextFiles:
    """Documents in files, in order."""

    paths: list[Path]
    form: TextFormat

    @property
    def fingerprint(self) -> str:
        """Hash that changes with the texts, much faster than reading a large corpus."""
        parts = [repr(self.form)]
        for path in self.paths:
            try:
                facts = path.stat()
                parts.append(f"{kind_of(path)}{path.suffix.lower()} {file_digest(path)}")
            except OSError as error:
                raise BadText(f"data.files: cannot read {path}: {error.strerror}") from None
            if facts.st_size > _FULL_DIGEST:  # samples alone would overlook an edit
                parts.append(str(facts.st_mtime_ns))
        return hash_of(*parts)

    @property
    def size(self) -> int | None:
        """Approximate size in bytes; None for compressed files."""
        known = not any(path.suffix.lower() in _COMPRESSIONS for path in self.paths)
        return sum(path.stat().st_size for path in self.paths) if known else None

    def read(self) -> Iterator[str | BadText]:
        """Yield the documents, and an error in place of each unreadable one."""
        for path in self.paths:
            yield from read_documents(path, self.form)

    def __iter__(self) -> Iterator[str]:
        for text in self.read():
            if isinstance(text, BadText):
                raise text
            yield text


def hash_of(*parts: Any) -> str:
    """Compute the SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Compute the SHA-256 of a file; for a large file, of its size and 64 chunks."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _FULL_DIGEST:
            while data := file.read(_SAMPLE):
                digest.update(data)
        else:
            for place in np.linspace(0, size - _SAMPLE, _SAMPLES).astype(np.int64).tolist():
                file.seek(place)
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def find_files(setting: str, wanted: Iterable[str]) -> list[Path]:
    """Find the text files of paths, folders and glob patterns, without duplicates, in order, sorted per argument.

    Files of other formats, broken links, and hidden files and folders are skipped and reported in a log line.

    Folders are read recursively, each one once if links lead to it again; a pattern is that of ``glob``, such as
    ``books/**/*.txt``.

    Raises:
        UserError: If an argument matches no text file, or a folder cannot be read.
    """
    found: dict[Path, Path] = {}
    skipped: Counter[str] = Counter()
    for name in wanted:
        path = Path(name).expanduser()
        if path.is_file():
            if kind_of(path) not in _READERS:
                raise UserError(f"{setting}: expected a file with extension {ENDINGS}, got {name}")
            paths = [path]
        elif path.is_dir():
            paths = sorted(_walk(setting, path, skipped))
        elif glob.has_magic(name):
            paths = sorted(_matching(setting, path))
        else:
            raise UserError(f"{setting}: no such file or folder: {name}")
        kept = [inner for inner in paths if kind_of(inner) in _READERS]
        if not kept:
            what = f"{len(paths)} files, but none with extension {ENDINGS}" if paths else "no file"
            raise UserError(f"{setting}: {name} matches {what}")
        skipped.update(inner.suffix or "without extension" for inner in paths if kind_of(inner) not in _READERS)
        found.update((inner.resolve(), inner) for inner in kept if inner.resolve() not in found)
    if skipped := +skipped:
        parts = ", ".join(f"{count} {what}" for what, count in sorted(skipped.items()))
        rank_zero_info(f"{setting}: {len(found)} files found, skipped: {parts}")
    return list(found.values())


def _walk(setting: str, root: Path, skipped: Counter[str]) -> Iterator[Path]:
    """Yield the visible files below a folder; linked folders are read after the others, and none twice."""

    def fail(error: OSError) -> None:
        raise UserError(f"{setting}: cannot read {error.filename}: {error.strerror}")

    starts, seen = [str(root)], set()
    for start in starts:
        for folder, folders, files in os.walk(start, onerror=fail):
            real = os.path.realpath(folder)
            hidden = [name for name in (*folders, *files) if name.startswith(".")]
            folders[:] = sorted({*folders} - {*hidden}) if real not in seen else []
            if real in seen:
                continue
            seen.add(real)
            skipped["hidden"] += len(hidden)
            starts += [place for name in folders if os.path.islink(place := os.path.join(folder, name))]
            for path in (Path(folder, name) for name in files if not name.startswith(".")):
                if path.is_file():
                    yield path
                elif path.is_symlink():
                    skipped["broken link"] += 1


def _matching(setting: str, pattern: Path) -> Iterator[Path]:
    if "**" not in pattern.parts:  # does not read the folders below
        return (path for path in map(Path, glob.glob(str(pattern))) if path.is_file())
    root = Path(*takewhile(lambda part: not glob.has_magic(part), pattern.parts))
    try:
        match = re.compile(glob_translate(str(pattern))).match  # glob itself loops through links
    except ValueError as error:
        raise UserError(f"{setting}: {pattern}: {first_line(error)}") from None
    return (path for path in _walk(setting, root, Counter()) if match(str(path)))
