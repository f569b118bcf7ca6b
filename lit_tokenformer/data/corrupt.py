"""Limit on unreadable samples."""

from __future__ import annotations

from lit_tokenformer.errors import UserError

ALLOWED_CORRUPT = 3
"""Number of unreadable samples that is always tolerated, regardless of the size (unless the allowed share is 0)."""


class TooManyCorruptSamples(UserError):
    """Number of unreadable samples above the setting ``data.max_corrupt_share``."""


def check_share(corrupt: int, size: int, max_share: float, names: list[str], unit: str = "images") -> None:
    """Raise an error if more than ``max_share`` of the samples and more than ``ALLOWED_CORRUPT`` are unreadable.

    The error names the setting ``data.max_corrupt_share`` and the given ``names`` of the first unreadable samples.
    """
    allowed = max(ALLOWED_CORRUPT, max_share * size) if max_share > 0 else 0
    if corrupt > allowed:
        raise TooManyCorruptSamples(
            f"data.max_corrupt_share: {corrupt} of {size} {unit} cannot be read (expected a share of at most "
            f"{max_share:g}); the first: {', '.join(names)}"
        )
