"""Build steps of the documentation: linked files of the repository, the command-line reference, roles of docstrings."""

from __future__ import annotations

import contextlib
import io
import os
import posixpath
import re
from pathlib import Path
from typing import Any

from griffe import Extension
from mkdocs.structure.files import File, Files

DOCS = Path(__file__).parent
ROOT = DOCS.parent
OUTSIDE = re.compile(r"(\]\(|src=\")((?:\.\./)+[^)#\"\s]+)")
"""Link that leaves the folder of its page."""

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`(?:~(?:\w+\.)*)?(\w[\w.]*)`")
"""Role of Sphinx in a docstring; with ``~`` its last part only."""

HELP = re.compile(r"<!-- help: ([\w -]+) -->")
"""Place of the help of a command in a page."""


class Docstrings(Extension):
    """Translate docstrings: examples as code, Sphinx roles as plain code."""

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value.replace("\nExample:\n", "\nExamples:\n"))


def _target(page: str, link: str) -> str | None:
    """Path of a linked file outside ``docs/``, relative to the repository; ``None`` for a page."""
    path = (DOCS / page).parent.joinpath(link).resolve()
    return None if path.is_relative_to(DOCS) else path.relative_to(ROOT).as_posix()


def on_files(files: Files, config: Any) -> Files:
    """Add the files of the repository that pages link to, so that a link works here and on a code host."""
    for page in list(files.documentation_pages()):
        for _, link in OUTSIDE.findall(page.content_string):
            target = _target(page.src_uri, link)
            if target is not None and (ROOT / target).is_file() and files.get_file_from_path(target) is None:
                files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Point links to the added files, and insert the help of commands."""

    def rewrite(match: re.Match[str]) -> str:
        target = _target(page.file.src_uri, match[2])
        here = posixpath.dirname(page.file.src_uri)
        return match[0] if target is None else match[1] + posixpath.relpath(target, here or ".")

    return HELP.sub(lambda match: _help(match[1]), OUTSIDE.sub(rewrite, markdown))


def _help(command: str) -> str:
    """Help of a command as a block of text, without the environment variables, whose names follow from the options."""
    from lit_tokenformer.cli import main

    output = io.StringIO()
    os.environ["COLUMNS"] = "100"
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        main([*command.split(), "--help-all"])
    text = ROLE.sub(r"\1", output.getvalue())
    lines = [line for line in text.splitlines() if not line.startswith("  ENV: ")]
    return "```text\n" + "\n".join(lines).replace("  ARG:   ", "  ").strip() + "\n```"
