"""Argument parser: one-line errors, and YAML with interpolations."""

from __future__ import annotations

import ast
import inspect
import io
import itertools
import operator
import re
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from functools import reduce
from pathlib import Path
from typing import Any, NoReturn, get_args

import yaml
from jsonargparse import get_loader, set_loader
from lightning.pytorch.cli import LightningArgumentParser
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError, MissingMandatoryValue, OmegaConfBaseException

import callbacks
from lit_tokenformer import data, models, tasks
from lit_tokenformer.cli.brief_help import BriefHelpParser
from lit_tokenformer.data.settings import FlatNameParser
from lit_tokenformer.errors import UserError, nearest_name, raised_by_user_code, unwrap

MODE = "interpolated"
"""Name of the parser mode that reads settings with :func:`load_settings`."""

_INTERPOLATES = ContextVar("interpolates", default=True)
_PACKAGES = (tasks, data, models, callbacks)


class Parser(BriefHelpParser, FlatNameParser, LightningArgumentParser):
    """Report errors in one line, with the nearest known name for a typo."""

    def dump(self, *args: Any, **kwargs: Any) -> str:
        """Dump settings without interpolation, which has been resolved already."""
        token = _INTERPOLATES.set(False)
        try:
            return super().dump(*args, **kwargs)
        finally:
            _INTERPOLATES.reset(token)

    def add_lightning_class_args(self, *args: Any, **kwargs: Any) -> list[str]:
        """Add the arguments of a class, where a union of int and float tries int first: 1 batch is not 100 % of them.

        ``typing`` caches unions regardless of order, so ``int | float`` can become ``float | int``.
        """
        added = super().add_lightning_class_args(*args, **kwargs)
        actions: list[Any] = self._actions
        for action in actions:
            kinds = get_args(getattr(action, "_typehint", None))
            if int in kinds and float in kinds:
                action._typehint = reduce(operator.or_, (int, *(kind for kind in kinds if kind is not int)))
        return added

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        cause = None if ex is None else unwrap(ex)
        if cause is not None and raised_by_user_code(cause):
            raise cause from cause.__cause__
        message = re.sub(r"<class '([\w.]+)'>", r"\1", " ".join(message.split()))
        setting = re.match(r'Parser key "([\w.]+)": ', message)
        if isinstance(cause, UserError):
            message = str(cause)
        elif setting and cause is not None and "Got value" not in str(cause):
            message = f"{setting[1]}: {' '.join(str(cause).split())}"
        elif setting:
            message = f"{setting[1]}: {_type_problem(message.removeprefix(setting[0]))}"
        elif "arguments are required" in message and "model" in message:
            shipped = ", ".join(shipped_configs())
            message = f"--config: expected a config with model and data: a YAML file, or a shipped config: {shipped}"
        elif "arguments are required: " in message:
            message = f"missing: {', '.join(map(self._option, message.partition('required: ')[2].split(', ')))}"
        elif message.startswith("Key must be a string"):  # of a mapping for an option that does not exist
            message = (
                "unknown option with a mapping of integer keys; --trainer.callbacks.schedule sets the last callback, "
                "so put --trainer.callbacks+=ParameterGrowthCallback before it"
            )
        known = self._names()
        for path in re.findall(r"(?:[Oo]ption '|arguments: --|import path string: )([\w.]+)", message):
            near = [nearest_name(name, known) for name in path.split(".") if name not in known]
            message += "".join(f" (did you mean {name!r}?)" for name in near if name)
        print(f"error: {message}", file=sys.stderr)
        self.exit(2)

    def _option(self, key: str) -> str:
        """Return the option of a key, which begins with a command, as it is written on the command line."""
        commands: Any = self._subcommands_action._name_parser_map if self._subcommands_action is not None else {}
        command, _, name = key.partition(".")
        actions = commands[command]._actions if command in commands else self._actions
        dest = name if command in commands else key
        return next((one.option_strings[0] for one in actions if one.dest == dest and one.option_strings), dest)

    def _names(self) -> set[str]:
        """Collect the names of all options, and of public classes and their arguments."""
        parsers: list[Any] = [self]
        if self._subcommands_action is not None:
            parsers += self._subcommands_action._name_parser_map.values()
        names = {part for parser in parsers for action in parser._actions for part in action.dest.split(".")}
        classes = [part for home in _PACKAGES for name in home.__all__ if isinstance(part := getattr(home, name), type)]
        for part in classes:
            names |= {part.__name__, *inspect.signature(part).parameters}
        return names


def _type_problem(message: str) -> str:
    """Reword a type error of jsonargparse, without the report of each type of a union.

    Example:
        >>> _type_problem("Expected a typing.Literal['a', 'b']. Got value: c")
        "expected 'a' or 'b', got 'c'"
    """
    union = re.search(r" Subtypes: \[(.*)\] Errors: .* Given value: ?(.*)", message)
    found = union or re.fullmatch(r"Expected an? (.*)\. Got value: ?(.*)", message)
    if found is None:
        return message
    kinds = re.sub(r"\w*\.?Literal\[([^]]*)\]", r"\1", found[1]).replace("NoneType", "null")
    kinds = re.sub(r", ([\w.]+(\[[^][]*\])?|'[^']*')$", r" or \1", kinds)
    try:
        value = "null" if ast.literal_eval(found[2]) is None else found[2]
    except (SyntaxError, TypeError, ValueError):  # a string
        value = repr(found[2])
    return f"expected {kinds}, got {value}"


def load_settings(text: str) -> Any:
    """Load YAML with OmegaConf interpolations.

    Text with ``${`` that does not parse as an interpolation is unchanged.

    Args:
        text: YAML.

    Returns:
        A value, or a dict or list with all interpolations resolved.

    Raises:
        UserError: If an interpolation cannot be resolved, or a value is missing (``???``).

    Example:
        >>> load_settings("{size: 8, width: '${size}', prompt: 'costs ${ 5'}")
        {'size': 8, 'width': 8, 'prompt': 'costs ${ 5'}
    """
    found = get_loader("yaml")(text)
    if not isinstance(found, (dict, list)) or not _INTERPOLATES.get():
        return found
    try:
        settings = OmegaConf.load(io.StringIO(text))
    except GrammarParseError:
        settings = OmegaConf.create(_escaped(found))
    try:
        resolved = OmegaConf.to_object(settings)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key}: expected a value, got ??? (missing)") from None
    except OmegaConfBaseException as error:
        cause = str(error.msg).splitlines()[0]
        raise UserError(f"{error.full_key}: {cause} (write \\${{...}} for literal text)") from None
    return found if resolved == {text: None} else resolved


def _escaped(value: Any) -> Any:
    """Escape each ``${`` that does not begin an interpolation."""
    if isinstance(value, dict):
        return {key: _escaped(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_escaped(part) for part in value]
    if isinstance(value, str):
        try:
            OmegaConf.create([value])
        except GrammarParseError:
            return value.replace("${", r"\${")
    return value


def shipped_configs() -> dict[str, Path]:
    """Find the configs shipped with the package, by name."""
    package = Path(__file__).parents[1]
    folder = next(path for path in (package / "configs", package.parent / "configs") if path.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def with_environment(args: list[str], environment: Mapping[str, str], prefix: str) -> list[str]:
    """Insert options from environment variables: they override configs, and other options override them.

    The parser itself reads them before configs.

    Args:
        args: A command with its options.
        environment: Variables; ``PREFIX_FIT__TRAINER__MAX_EPOCHS`` is ``--trainer.max_epochs`` of ``fit``.
        prefix: Prefix of their names.

    Returns:
        The command with all options.

    Example:
        >>> given = ["fit", "--trainer.max_epochs", "3", "--config", "a.yaml"]
        >>> with_environment(given, {"X_FIT__TRAINER__DEVICES": "2"}, "X")
        ['fit', '--config', 'a.yaml', '--trainer.devices=2', '--trainer.max_epochs', '3']
    """
    start = f"{prefix}_{args[0].upper()}__" if args else prefix
    names = sorted(name for name in environment if name.startswith(start) and name != f"{start}CONFIG")
    if not names:
        return args
    given = iter(args[1:])
    configs: list[str] = []
    rest: list[str] = []
    for arg in given:
        if arg in ("--config", "-c"):
            configs += [arg, *itertools.islice(given, 1)]
        else:
            (configs if arg.startswith(("--config=", "-c=")) else rest).append(arg)
    options = {name: name.removeprefix(start).lower().replace("__", ".") for name in names}
    return [args[0], *configs, *(f"--{options[name]}={environment[name]}" for name in names), *rest]


def check_config(path: str) -> None:
    """Reject a config that is not a YAML mapping of settings.

    Args:
        path: Path of the config; a pipe, which can be read only once, is skipped.

    Raises:
        UserError: If it cannot be read, is not valid YAML, or is not a mapping.
    """
    if not (Path(path).is_file() or Path(path).is_dir()):
        return
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config: cannot read {path} ({error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"--config: {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        got = "an empty file" if found is None else f"a {type(found).__name__}"
        raise UserError(f"--config: expected settings by their names in {path}, got {got}")


set_loader(MODE, load_settings, exceptions=(yaml.YAMLError,))
