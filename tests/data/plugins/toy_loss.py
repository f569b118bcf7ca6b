"""Plugin: an MLP that keeps its hidden units small by an auxiliary loss."""

from lit_tokenformer.models.feed_forward import MLP
from lit_tokenformer.models.mixers import Context
from lit_tokenformer.registry import FEED_FORWARDS


@FEED_FORWARDS.register("small_mlp")
class SmallMLP(MLP):
    """An MLP with the loss ``0.1 * mean(hidden^2)``."""

    aux_losses = ("hidden_size",)

    def forward(self, x, context=Context(), state=None):  # noqa: B008
        """(B, T, D) -> (B, T, D)."""
        hidden = self.activation(self.fc1(x))
        context.add_loss("hidden_size", 0.1 * hidden.square().mean())
        return self.dropout(self.fc2(hidden))
