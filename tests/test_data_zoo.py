"""A zoo of odd files, folders and tables: each gives the right values, or one line that names file and reason."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_tokenformer.data import TextDataModule
from lit_tokenformer.errors import UserError

# --- Text ------------------------------------------------------------------------------------------------------------

Make = Callable[[Path], Any]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
CHATML = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
ROWS = '{"text": "one"}\n{"text": "two"}\n'


def put(name: str, content: str | bytes) -> Make:
    """Write one file."""
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def table(name: str, **columns: Any) -> Make:
    """Write a Parquet file."""

    def make(folder: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table(columns), folder / name)

    return make


def typed(values: list[Any], *kind: str) -> Any:
    """Return an Arrow array of a type, such as ``large_string`` or ``dictionary int8 string``."""
    import pyarrow as pa

    outer, *inner = [getattr(pa, name) for name in kind]
    return pa.array(values, outer(*(one() for one in inner)))


def links(folder: Path) -> None:
    """Make a loop, a link to a folder outside, two links to one file, and a broken link."""
    outside = folder.parent / f"{folder.name}_outside"
    for place, text in ((folder / "a.txt", "one"), (outside / "c.txt", "three"), (folder / "b" / "b.txt", "two")):
        place.parent.mkdir(exist_ok=True)
        place.write_text(text)
    (folder / "b" / "loop").symlink_to("..")
    (folder / "b" / "again").symlink_to("../b")
    (folder / "outside").symlink_to(outside)
    (folder / "same.txt").symlink_to("a.txt")
    (folder / "broken.txt").symlink_to("nowhere")


def hidden(folder: Path) -> None:
    for name in (".git/a.txt", ".b.txt", "c/.d/e.txt", "c/f.txt", "g.PNG", "c/h", "._i.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("one" if name == "c/f.txt" else "not read")


def both(*parts: Make) -> Make:
    return lambda folder: [part(folder) for part in parts]


TEXT_ZOO: dict[str, tuple[Make, dict[str, Any], list[str] | str]] = {
    # name: (files, settings, documents | message after "data.")
    "plain": (put("a.txt", "one\ntwo\n"), {}, ["one\ntwo\n"]),
    "line ends, NUL and spaces are text": (put("a.txt", "one\r\ntwo\x00\rend \n\n"), {}, ["one\r\ntwo\x00\rend \n\n"]),
    "white space only": (put("a.md", " \n\t"), {}, [" \n\t"]),
    "upper-case extension": (put("A.TXT", "one"), {}, ["one"]),
    "two extensions": (put("a.jsonl.txt", ROWS), {}, [ROWS]),
    "UTF-8 with a byte order mark": (put("a.txt", b"\xef\xbb\xbfone"), {}, ["one"]),
    "latin-1, unnamed": (
        put("a.txt", b"caf\xe9"),
        {},
        r"encoding_errors: .*a.txt is not UTF-8 \(.* byte 0xe9 in position 3.*\); set data.encoding, such as latin-1",
    ),
    "latin-1": (put("a.txt", b"caf\xe9"), {"encoding": "latin-1"}, ["café"]),
    "latin-1, replaced": (put("a.txt", b"caf\xe9"), {"encoding_errors": "replace"}, ["caf\ufffd"]),
    "UTF-16, unnamed": (put("a.txt", "one".encode("utf-16")), {}, r"encoding_errors: .*a.txt is not UTF-8 \(.* 0xff"),
    "UTF-16": (put("a.txt", "one\r\né".encode("utf-16")), {"encoding": "utf-16"}, ["one\r\né"]),
    "empty": (put("a.txt", ""), {}, []),
    "one huge line": (put("a.txt", "x" * 3_000_000), {}, ["x" * 3_000_000]),
    "gzip": (put("a.txt.gz", gzip.compress(b"one")), {}, ["one"]),
    "upper-case gzip": (put("A.TXT.GZ", gzip.compress(b"one")), {}, ["one"]),
    "bzip2": (put("a.jsonl.bz2", bz2.compress(ROWS.encode())), {}, ["one", "two"]),
    "xz": (put("a.csv.xz", lzma.compress(b"text,n\none,1\n")), {}, ["one"]),
    "zstd without its library": (put("a.jsonl.zst", b"(\xb5/\xfd"), {}, "files: cannot read .*a.jsonl.zst: "),
    "truncated gzip": (
        put("a.jsonl.gz", gzip.compress(ROWS.encode())[:-9]),
        {},
        "files: cannot read .*a.jsonl.gz.*: Compressed file ended before",
    ),
    "gzip that is none": (put("a.txt.gz", "one"), {}, "files: cannot read .*a.txt.gz: Not a gzipped file"),
    "JSON Lines": (put("a.jsonl", ROWS), {}, ["one", "two"]),
    "JSON Lines with blank lines, CRLF and no last line end": (
        put("a.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n\r\n  \n{"text": "two"}'),
        {},
        ["one", "two"],
    ),
    "JSON Lines in UTF-16": (put("a.jsonl", ROWS.encode("utf-16")), {"encoding": "utf-16"}, ["one", "two"]),
    "nulls and empty texts": (put("a.jsonl", '{"text": null}\n{"text": ""}\n' + ROWS), {}, ["one", "two"]),
    "strings like dates and numbers": (
        put("a.jsonl", '{"text": "2026-01-01"}\n{"text": "007"}\n'),
        {},
        ["2026-01-01", "007"],
    ),
    "bad line": (
        put("a.jsonl", ROWS + '{"text": "thr\n'),
        {},
        "files: .*a.jsonl:3 is not JSON: Invalid control .*column 14",
    ),
    "text in another encoding": (
        put("a.jsonl", ROWS.encode() + b'{"text": "caf\xe9"}\n'),
        {},
        "encoding_errors: .*a.jsonl:3 is not UTF-8",
    ),
    "another column in another encoding": (put("a.jsonl", b'{"text": "one", "n": "\xe9"}\n'), {}, ["one"]),
    "number as text": (put("a.jsonl", '{"text": 7}'), {}, "text_column: .*a.jsonl:1: expected text in 'text', got int"),
    "nested object": (
        put("a.jsonl", '{"text": {"en": "one"}}'),
        {},
        "text_column: .*a.jsonl:1: expected text in 'text', got dict",
    ),
    "wrong column": (
        put("a.jsonl", '{"body": "x", "n": 1}'),
        {},
        "text_column: .*a.jsonl:1 has no 'text'; it has body, n",
    ),
    "a list in a line": (put("a.jsonl", '["one"]'), {}, "text_column: .*a.jsonl:1 has no 'text'; it is not an object"),
    "JSON with a list": (put("a.json", '[{"text": "one"},\n {"text": "two"}]'), {}, ["one", "two"]),
    "JSON with a list inside": (put("a.json", '{"version": 1, "data": [{"text": "one"}]}'), {}, ["one"]),
    "JSON with one object": (put("a.json", '{"text": "one"}'), {}, ["one"]),
    "JSON that is JSON Lines": (put("a.json", ROWS), {}, ["one", "two"]),
    "JSON that ends early": (
        put("a.json", '[{"text": "one"},\n'),
        {},
        "files: .*a.json:2 is not JSON: Expecting value",
    ),
    "JSON that nests too deeply": (
        put("a.json", "[" * 100_000),
        {},
        "files: .*a.json:1 is not JSON: maximum recursion",
    ),
    "CSV with quoted line breaks": (put("a.csv", 'n,text\n1,"o""n\r\ne"\r\n2,two\n'), {}, ['o"n\r\ne', "two"]),
    "CSV with words of nothing": (put("a.csv", "text\nNA\n007\nnull\n\n1.50\n"), {}, ["NA", "007", "null", "1.50"]),
    "CSV with a huge field": (put("a.csv", 'text\n"' + "x\n" * 200_000 + '"\n'), {}, ["x\n" * 200_000]),
    "ragged CSV": (put("a.csv", "text,n\none,1\ntwo\n"), {}, r"files: .*a.csv:3 has 1 fields \(expected 2\)"),
    "CSV with an open quote": (put("a.csv", 'text\n"one\n'), {}, "files: .*a.csv:2 is not CSV: unexpected end of data"),
    "CSV with a column twice": (put("a.csv", "text,text\na,b\n"), {}, "files: .*a.csv:1 has 2 columns 'text'"),
    "CSV without the column": (
        put("a.csv", "a;text\n1;one\n"),
        {},
        "text_column: .*a.csv:2 has no 'text'; it has a;text",
    ),
    "CSV without rows": (put("a.csv", "text\n"), {}, []),
    "CSV that begins with blank lines": (put("a.csv", "\n\ntext\none\n"), {}, ["one"]),
    "CSV without a header": (put("a.csv", ""), {}, []),
    "Parquet": (table("a.parquet", text=["one", None, "", "two"], n=[1, 2, 3, 4]), {}, ["one", "two"]),
    "Parquet of large strings": (table("a.parquet", text=typed(["one"], "large_string")), {}, ["one"]),
    "Parquet of a dictionary": (
        table("a.parquet", text=typed(["one", "two", "one"], "dictionary", "int8", "string")),
        {},
        ["one", "two", "one"],
    ),
    "Parquet of bytes": (
        table("a.parquet", text=typed([b"one"], "binary")),
        {},
        "text_column: .*a.parquet:1: expected text in 'text', got bytes",
    ),
    "Parquet without the column": (table("a.parquet", n=[1]), {}, "text_column: .*a.parquet has no 'text'; it has n"),
    "Parquet without rows": (table("a.parquet", text=typed([], "string")), {}, []),
    "Parquet that is none": (put("a.parquet", "one"), {}, "files: cannot read .*a.parquet: "),
    "Parquet that is empty": (put("a.parquet", ""), {}, "files: cannot read .*a.parquet: "),
    "chat": (put("a.jsonl", json.dumps({"messages": CHAT})), {"text_column": "messages"}, [CHATML]),
    "chat in Parquet": (table("a.parquet", messages=[CHAT]), {"text_column": "messages"}, [CHATML]),
    "chat with a template": (
        put("a.json", json.dumps([{"messages": CHAT}])),
        {
            "text_column": "messages",
            "chat_template": "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}; {% endfor %}",
        },
        ["u: Hi; a: Hello; "],
    ),
    "chat about templates": (
        put("a.jsonl", '{"messages": [{"role": "a", "content": "{{ 7 * 7 }}"}]}'),
        {"text_column": "messages"},
        ["<|im_start|>a\n{{ 7 * 7 }}<|im_end|>\n"],
    ),
    "chat without content": (
        put("a.jsonl", '{"messages": [{"role": "user"}]}'),
        {"text_column": "messages"},
        "chat_template: .*a.jsonl:1: expected text in content of each message",
    ),
    "chat without role": (
        put("a.jsonl", '{"messages": [{"content": "Hi"}]}'),
        {"text_column": "messages"},
        "chat_template: .*a.jsonl:1: 'dict object' has no attribute 'role'",
    ),
    "template that breaks out": (
        put("a.jsonl", json.dumps({"messages": CHAT})),
        {"text_column": "messages", "chat_template": "{{ messages.__class__.__mro__ }}"},
        "chat_template: .*a.jsonl:1: access to attribute '__class__'",
    ),
    "list of texts": (
        put("a.jsonl", '{"text": ["one"]}'),
        {},
        "text_column: .*a.jsonl:1: expected text in 'text', got list",
    ),
    "hidden and other files": (hidden, {}, ["one"]),
    "links": (links, {}, ["one", "two", "three"]),
    "folder with the name of a file": (
        lambda folder: [(folder / "a.txt").mkdir(), (folder / "a.txt" / "b.txt").write_text("one")],
        {},
        ["one"],
    ),
    "names with brackets and a colon": (both(put("a[1].txt", "one"), put("b::c.txt", "two")), {}, ["one", "two"]),
    "only pictures": (put("a.png", "x"), {}, "files: .* matches 1 files, but none with extension .txt, .md"),
    "nothing": (lambda folder: None, {}, "files: .* matches no file"),
}


@pytest.mark.parametrize("name", TEXT_ZOO)
def test_text_is_right_or_refused_by_name(tmp_path: Path, name: str):
    make, settings, expected = TEXT_ZOO[name]
    folder = tmp_path / "zoo"
    folder.mkdir()
    make(folder)
    data = TextDataModule("files", files=str(folder), cache_dir=str(tmp_path / "cache"), **settings)
    if isinstance(expected, list):
        assert list(data.corpus.splits.train) == expected
        return
    with pytest.raises(UserError, match=f"^data.{expected}[^\n]*$"):
        data.prepare_data()
    assert not list((tmp_path / "cache").rglob("*.bin"))


def test_text_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.txt").write_text("one")

    def denied(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "a.txt"))

    data = TextDataModule("files", files=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(UserError, match="^data.files: cannot read .*a.txt: Permission denied$"):
        data.corpus.splits  # noqa: B018
    monkeypatch.undo()
    monkeypatch.setattr(Path, "open", denied)
    for use in (lambda: data.corpus.splits.train.fingerprint, lambda: list(data.corpus.splits.train)):
        with pytest.raises(UserError, match="^data.files: cannot read .*a.txt: .*Permission denied"):
            use()


def test_skipped_text_files_are_counted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for name, make in (("hidden", hidden), ("links", links)):
        (tmp_path / name).mkdir()
        make(tmp_path / name)
        data = TextDataModule("files", files=str(tmp_path / name), cache_dir=str(tmp_path / "cache"))
        with caplog.at_level("INFO"):
            data.corpus.splits, data.corpus.splits  # noqa: B018
    found = [record.message for record in caplog.records if "skipped" in record.message]
    assert found == [
        "data.files: 1 files found, skipped: 1 .PNG, 4 hidden, 1 without extension",
        "data.files: 3 files found, skipped: 1 broken link",
    ]
