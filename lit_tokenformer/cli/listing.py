"""Command that lists presets, configs and data sets."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from itertools import takewhile
from typing import Literal

from lit_tokenformer import data  # noqa: F401  (registers data sets)
from lit_tokenformer.cli.parser import shipped_configs
from lit_tokenformer.cost import model_cost
from lit_tokenformer.models.presets import list_presets, preset_config
from lit_tokenformer.registry import IMAGE_SOURCES, TEXT_SOURCES

_TASKS = {"language": "language", "masked_language": "masked language", "image": "images"}


def list_names(what: Literal["presets", "configs", "datasets"]) -> None:
    """List the names of presets (with parameters, depth x width and task), shipped configs or data sets.

    Args:
        what: Names to list.
    """
    rows = {"presets": _presets, "configs": _configs, "datasets": _datasets}[what]()
    width = max(len(name) for name, _ in rows)
    columns = shutil.get_terminal_size().columns - width - 2 if sys.stdout.isatty() else sys.maxsize
    for name, text in rows:
        first, *rest = textwrap.wrap(text, max(columns, 20))
        print(f"{name:{width}}  {first}")
        for line in rest:
            print(f"{'':{width}}  {line}")


def _presets() -> list[tuple[str, str]]:
    rows = []
    for name in list_presets():
        config = preset_config(name)
        size = f"{model_cost(config).parameters / 1e6:8,.1f} M, {config.depth} x {config.dim}"
        rows.append((name, f"{size}, {_TASKS.get(config.head, config.head)}"))
    return rows


def _configs() -> list[tuple[str, str]]:
    rows = []
    for name, path in shipped_configs().items():
        lines = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
        rows.append((name, re.split(r"[.:;] |\.$", " ".join(line.strip("# ") for line in lines))[0]))
    return rows


def _datasets() -> list[tuple[str, str]]:
    images = [(name, "images") for name in IMAGE_SOURCES.names()]
    return [*images, *((name, "text") for name in TEXT_SOURCES.names())]
