"""User errors, separated from faults in code by the packages on the traceback."""

from __future__ import annotations

import difflib
import re
import sys
import traceback
from collections.abc import Iterable
from typing import TypeVar

from torch.multiprocessing import ProcessRaisedException

ErrorT = TypeVar("ErrorT", bound=BaseException)

_OURS = ("callbacks", "lit_tokenformer")
_CHECKED = frozenset(
    {*sys.stdlib_module_names, *_OURS}
    | {"jsonargparse", "lightning", "numpy", "omegaconf", "tensorboard", "timm", "torch", "torchmetrics", "yaml"}
)
"""Packages whose constructors validate their arguments; an error from any other package keeps its traceback."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class UserError(ValueError):
    """Invalid setting or input, found by a check of this project.

    The command line reports it in one line and exits with status 2. Any other exception is a fault in code and keeps
    its traceback.

    Args:
        message: One line. Control characters are escaped: a terminal would execute them, and names in the message may
            come from a file.

    Example:
        >>> raise UserError("param_tokens: expected at least 1, got 0")
        Traceback (most recent call last):
        ...
        lit_tokenformer.errors.UserError: param_tokens: expected at least 1, got 0
    """

    def __init__(self, message: str) -> None:
        # A DataLoader worker reraises with the whole traceback as the message
        message = message.rsplit(f"{type(self).__name__}: ", 1)[-1].strip()
        super().__init__(_CONTROL.sub(lambda found: repr(found[0])[1:-1], message))


def unknown_name(setting: str, name: object, choices: Iterable[str]) -> UserError:
    """Build the error for an unregistered name, with the nearest registered one as a hint.

    Args:
        setting: Setting that holds the name, as the user writes it (``data.dataset``).
        name: Name given.
        choices: Registered names.

    Returns:
        Exception to raise, with a one-line message.

    Example:
        >>> print(unknown_name("data.dataset", "digit", ["digits", "cifar10"]))
        data.dataset: unknown value 'digit', did you mean 'digits'? Known: cifar10, digits
    """
    known = sorted(choices)
    near = nearest_name(str(name), known)
    hint = f", did you mean {near!r}?" if near else "."
    return UserError(f"{setting}: unknown value {name!r}{hint} Known: {', '.join(known)}")


def nearest_name(name: str, choices: Iterable[str]) -> str | None:
    """Find the closest match for a misspelled name.

    Args:
        name: Name that is not among the choices.
        choices: Existing names.

    Returns:
        The choice that differs by a typo, else the shortest one with the name as a prefix; None without a match.

    Example:
        >>> nearest_name("epcohs", ["epochs", "steps"]), nearest_name("vit_smal", ["gpt2_small", "vit_small_patch16"])
        ('epochs', 'vit_small_patch16')
        >>> nearest_name("version", ["precision"]) is None
        True
    """
    known = sorted(set(choices), key=lambda one: (len(one), one))
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)  # ckpt_path and drop_path have 0.67
    near += [one for one in known if len(one) == len(name) and sum(map(str.__ne__, one, name)) == 1]
    near += [one for one in known if len(name) >= 3 and one.lower().startswith(name.lower())]
    return near[0] if near else None


def unwrap(error: BaseException) -> BaseException:
    """Return the exception that jsonargparse wrapped in a report of types and the whole configuration."""
    while error.__cause__ is not None and _packages(error)[-1:] == ["jsonargparse"]:
        error = error.__cause__
    return error


def from_process(error: ErrorT) -> ErrorT | UserError:
    """Return the ``UserError`` that ended another process, else the error unchanged.

    Processes that Lightning forks or spawns pass on the text of their traceback.
    """
    own = f"{UserError.__module__}.{UserError.__qualname__}: "
    if isinstance(error, ProcessRaisedException) and str(error).strip().splitlines()[-1].startswith(own):
        return UserError(str(error))
    return error


def raised_by_user_code(error: BaseException) -> bool:
    """Return whether the traceback contains a package other than this project and its checked libraries."""
    return not _CHECKED.issuperset(_packages(error))


def is_user_code(value: object) -> bool:
    """Return whether the class of a value is defined outside this project and its checked libraries."""
    return type(value).__module__.partition(".")[0] not in _CHECKED


def raised_by_library(error: BaseException) -> bool:
    """Return whether a checked library raised the error, with no other package on the traceback."""
    packages = _packages(error)
    return not raised_by_user_code(error) and packages[-1:] != [] and packages[-1] not in _OURS


def _packages(error: BaseException) -> list[str]:
    """Return the top-level package of each frame, the raising one last."""
    return [
        frame.f_globals.get("__name__", "").partition(".")[0] for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
