"""Growth of a model along its axes and in depth, with its optimizer state. Pure torch: no trainer, no schedule.

:mod:`~lit_tokenformer.growth.axes` checks and replaces tensors, :mod:`~lit_tokenformer.growth.methods` initializes new
units, :mod:`~lit_tokenformer.growth.depth` inserts blocks, and :mod:`~lit_tokenformer.growth.optimizer` carries
optimizer state over. :mod:`~lit_tokenformer.growth.shrink` is the inverse of growth.
"""

from lit_tokenformer.growth.axes import GrownParameter, grow_one_by_one, planned_rows, target_sizes
from lit_tokenformer.growth.grow import grow, grow_with_optimizers
from lit_tokenformer.growth.methods import GrowthMethod, Split, growth_method
from lit_tokenformer.growth.rows import GrownTensor, Rows, regrown
from lit_tokenformer.growth.shrink import prefix, shrink
from lit_tokenformer.models.axes import Axis, AxisTensor, input_units, output_units

__all__ = [
    "Axis",
    "AxisTensor",
    "GrownParameter",
    "GrownTensor",
    "GrowthMethod",
    "Rows",
    "Split",
    "grow",
    "grow_one_by_one",
    "grow_with_optimizers",
    "growth_method",
    "input_units",
    "output_units",
    "planned_rows",
    "prefix",
    "regrown",
    "shrink",
    "target_sizes",
]
