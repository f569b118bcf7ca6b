"""Plugin: a causal language model that predicts the token after the next."""

import torch.nn.functional as F

from lit_tokenformer.registry import TASKS
from lit_tokenformer.tasks import LitCausalLM


@TASKS.register("LitSkipLM")
class LitSkipLM(LitCausalLM):
    """Next-token loss plus ``weight`` times the loss of the token after it, from the same logits.

    Args:
        weight: Weight of the second loss.
    """

    def __init__(self, weight: float = 0.5, **settings) -> None:
        super().__init__(**settings)
        self.weight = weight

    def training_loss(self, batch):
        loss, count = super().training_loss(batch)
        logits = self(batch[:, :-2]).flatten(0, 1)  # (B (T - 1), V)
        skip = F.cross_entropy(logits, batch[:, 2:].flatten())
        self.log("train/skip_loss", skip)
        return loss + self.weight * skip, count
