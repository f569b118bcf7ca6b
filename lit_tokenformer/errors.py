"""Errors in what a user gave: settings, files, checkpoints."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class UserError(ValueError):
    """An invalid setting or input, found by a check of this project.

    The command line reports it in one line and exits with status 2. Any other exception is a fault in somebody's
    code and keeps its traceback.

    Args:
        message: One line. Control characters, which a terminal would obey, are escaped: names in the message may come
            from a file.

    Example:
        >>> raise UserError("param_tokens: expected at least 1, got 0")
        Traceback (most recent call last):
        ...
        lit_tokenformer.errors.UserError: param_tokens: expected at least 1, got 0
    """

    def __init__(self, message: str) -> None:
        super().__init__(_CONTROL.sub(lambda found: repr(found[0])[1:-1], message))


def unknown_name(setting: str, name: object, choices: Iterable[str]) -> UserError:
    """Build the error for a name that is not registered, with the nearest registered one.

    Args:
        setting: The setting that holds the name, as the user writes it (``data.dataset``).
        name: The name given.
        choices: The registered names.

    Returns:
        An exception to raise; its message is one line.

    Example:
        >>> print(unknown_name("data.dataset", "digit", ["digits", "cifar10"]))
        data.dataset: unknown value 'digit', did you mean 'digits'? Known: cifar10, digits
    """
    known = sorted(choices)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
    hint = f", did you mean {near[0]!r}?" if near else "."
    return UserError(f"{setting}: unknown value {name!r}{hint} Known: {', '.join(known)}")
