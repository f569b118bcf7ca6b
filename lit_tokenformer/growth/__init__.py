"""Growth of a model: parameter tokens, depth, and the optimizer that trains it. Pure torch: no trainer, no schedule."""

from lit_tokenformer.growth.grow import grow, grow_with_optimizers
from lit_tokenformer.growth.tokens import (
    METHODS,
    GrownParameter,
    Rows,
    grow_one_by_one,
    plan_rows,
    regrown,
    target_tokens,
)

__all__ = [
    "METHODS",
    "GrownParameter",
    "Rows",
    "grow",
    "grow_one_by_one",
    "grow_with_optimizers",
    "plan_rows",
    "regrown",
    "target_tokens",
]
