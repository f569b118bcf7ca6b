"""Plugin: a mixer that gives each data token the mean of all values so far."""

import torch

from lit_tokenformer.models.mixers import Context, Mixer
from lit_tokenformer.models.part_cost import part_cost
from lit_tokenformer.models.projections import make_projection
from lit_tokenformer.registry import MIXERS


class Sum:
    """Decoding state: sum of the values so far, (B, 1, D), and their number, (B, 1, 1)."""

    value = count = 0


@MIXERS.register("running_mean", causal=(True,), unpad=(False,))
class RunningMean(Mixer):
    """``proj(mean of V x)`` over a data token and those before it."""

    def __init__(self, config, layer):
        super().__init__()
        self.value = make_projection(config, "qkv", config.dim, config.dim)
        self.proj = make_projection(config, "proj", config.dim, config.dim, residual=True)

    @property
    def output_layer(self):
        return self.proj

    def cost(self, length):
        return part_cost(self.value, length) + part_cost(self.proj, length)

    def new_state(self, length):
        return Sum()

    def forward(self, x, context=Context(), state=None):  # noqa: B008
        """(B, T, D) -> (B, T, D)."""
        present = torch.ones_like(x[..., :1]) if context.present is None else context.present.to(x.dtype)
        state = Sum() if state is None else state
        total = state.value + (self.value(x) * present).cumsum(dim=1)
        count = state.count + present.cumsum(dim=1)
        state.value, state.count = total[:, -1:], count[:, -1:]
        return self.proj(total / count.clamp_min(1))
