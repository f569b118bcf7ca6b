"""Arguments of the command line before they are parsed: plugins, shipped configs, and plain text."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lit_tokenformer.cli.parser import check_config, shipped_configs
from lit_tokenformer.errors import unknown_name

TEXTS = {
    "config": "Config with model and data: a YAML file or the name of a shipped config (repeatable; later ones "
    "override).",
    "prompt": "Prompt to continue (repeatable). Without one, a new document is generated.",
    "image": "Image file that the prompts ask about (repeatable): one for all prompts, or one per prompt in their "
    "order.",
    "stop": "String that ends a completion (repeatable). The document separator ends it too.",
    "adapter": "Adapter, NAME=FOLDER or FOLDER (repeatable): one for all prompts, or one per prompt in their order. "
    "'none' is the model alone; 'auto' picks the adapter with the least loss on the prompt, or none.",
}
"""Repeatable options whose values are plain text, such as ``[x]`` or ``a: b``, and not parsed as YAML."""


def without_plugins(args: list[str]) -> tuple[list[str], list[str]]:
    """Split the arguments into the modules of ``--plugins`` and the rest.

    Example:
        >>> without_plugins(["fit", "--plugins", "a,b", "--config", "c.yaml", "--plugins=d"])
        (['a', 'b', 'd'], ['fit', '--config', 'c.yaml'])
    """
    modules: list[str] = []
    rest: list[str] = []
    given = iter(args)
    for arg in given:
        option, _, value = arg.partition("=")
        if option == "--plugins":
            names = (value or next(given, "")).strip("[]").split(",")
            modules += [name.strip() for name in names if name.strip()]
        else:
            rest.append(arg)
    return modules, rest


def with_shipped_configs(args: list[str]) -> list[str]:
    """Replace the names of shipped configs by their paths.

    Raises:
        UserError: If a config is neither a file nor the name of a shipped config.
    """
    found = list(args)
    for i, arg in enumerate(args):
        option, _, value = arg.partition("=")
        if option not in ("--config", "-c"):
            continue
        at, value = (i, value) if value else (i + 1, args[i + 1] if i + 1 < len(args) else "")
        if not value:
            continue
        if os.path.exists(value):
            check_config(value)
            continue
        name = Path(value).stem if value.startswith("configs/") else value
        if name not in shipped_configs():
            raise unknown_name("--config", value, shipped_configs())
        path = str(shipped_configs()[name])
        found[at] = f"{option}={path}" if at == i else path
    return found


def repeatable(command: Callable[..., Any]) -> set[str]:
    """Return the options of a command that are in ``TEXTS``; an argument of the same name may be a single path."""
    parameters = inspect.signature(command).parameters
    return {name for name in TEXTS.keys() & parameters if parameters[name].annotation != "str"}


def with_texts(args: list[str], command: Callable[..., Any] | None) -> list[str]:
    """Join text options to values that begin with dashes, which argparse would read as options.

    Args:
        args: The arguments.
        command: Function of the command, if it is one without a trainer.

    Example:
        >>> with_texts(["generate", "--stop", "---", "--seed", "1"], lambda stop, seed: None)
        ['generate', '--stop=---', '--seed', '1']
    """
    found: list[str] = []
    options = {} if command is None else inspect.signature(command).parameters
    texts = set() if command is None else repeatable(command)
    for arg in args:
        is_text = bool(found) and found[-1] in {f"--{name}" for name in texts}
        if is_text and arg.startswith("-") and arg.partition("=")[0] not in {f"--{name}" for name in options}:
            found[-1] += f"={arg}"
        else:
            found.append(arg)
    return found
