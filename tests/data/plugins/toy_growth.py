"""Plugin: a growth method that splits units without noise, and fills a remainder with units as initialized."""

from lit_tokenformer.growth import Split
from lit_tokenformer.registry import GROWTH_METHODS


class SplitOrInitialize(Split):
    """Copies as by ``split``; what a whole factor leaves over is random, so the function changes there."""

    exact = False

    def std(self, axis, tensor):
        return tensor.std


GROWTH_METHODS.register("split_or_initialize")(SplitOrInitialize())
