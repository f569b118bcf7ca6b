"""Figures of a benchmark and their table; loads without PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Line:
    """One figure.

    Args:
        what: Quantity that is measured.
        against: Baseline.
        ours: Our figure.
        theirs: Figure of the baseline.
        unit: Unit of both, such as ``ms`` or ``images/s``.
        ratio: Figure that the goal refers to.
        goal: Such as ``<= 1.05``; empty without one.
    """

    what: str
    against: str
    ours: float
    theirs: float
    unit: str
    ratio: float
    goal: str = ""

    @property
    def reached(self) -> bool | None:
        """Comparison of the ratio with the goal; ``None`` without a goal."""
        if not self.goal:
            return None
        sign, bound = self.goal.split()
        return self.ratio <= float(bound) if sign == "<=" else self.ratio >= float(bound)

    def as_dict(self) -> dict[str, Any]:
        """Fields and ``reached``, for JSON."""
        return {**asdict(self), "reached": self.reached}


def table(head: str, lines: Sequence[dict[str, Any]]) -> str:
    """Format lines, as :meth:`Line.as_dict` returns them, as a Markdown table."""
    mark = {None: "", True: " reached", False: " **missed**"}
    rows = [
        f"| {one['what']} | {one['against']} | {one['ours']:,.4g} {one['unit']} | {one['theirs']:,.4g} {one['unit']} "
        f"| {one['ratio']:.3f} | {one['goal']}{mark[one['reached']]} |"
        for one in lines
    ]
    return "\n".join([f"| {head} | against | ours | theirs | ratio | goal |\n|---|---|---:|---:|---:|---|", *rows])
