"""Output check of a growth: what a module computes for the same batch before and after it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import tree_leaves


class OutputCheck:
    """Compare the outputs of a module for a batch, in evaluation mode and without autocast.

    It calls ``model_output(batch)`` where the module has it, and else its ``forward`` with the batch, or with the first
    item of a batch that is a tuple or list. Where neither works it warns once, and reports NaN from then on.

    Args:
        pl_module: The module.
        batch: The batch.
        enabled: Whether anything is computed.
    """

    _warned: ClassVar[set[type]] = set()  # a warning for each class of modules is enough

    def __init__(self, pl_module: LightningModule, batch: Any, enabled: bool = True) -> None:
        self._module, self._batch = pl_module, batch
        self._before = self._checked_outputs() if enabled else []

    def difference(self) -> float:
        """Relative difference of the outputs to those at the start, in the L2 norm; NaN without outputs."""
        if not self._before:
            return float("nan")
        return max(map(_relative_difference, self._before, self._outputs()))

    def _checked_outputs(self) -> list[Tensor]:
        kind = type(self._module)
        if hasattr(self._module, "model_output"):
            return self._outputs()
        try:
            return self._outputs()
        except Exception as error:  # whatever a user's forward raises for an input that it was not written for
            if kind not in self._warned:
                self._warned.add(kind)
                problem = "has no forward" if kind.forward is LightningModule.forward else f"forward raised {error!r}"
                rank_zero_warn(
                    f"check: the outputs before and after a growth are not compared ({kind.__name__} {problem}); "
                    "define model_output(batch), which returns the model's outputs for a batch, or set check: false"
                )
            return []

    def _outputs(self) -> list[Tensor]:
        module: Any = self._module
        compute, batch = getattr(module, "model_output", None), self._batch
        if compute is None:
            compute, batch = module, batch[0] if isinstance(batch, (tuple, list)) else batch
        training = {part: part.training for part in module.modules()}
        module.eval()
        try:
            plain = torch.autocast(module.device.type, enabled=False)
            with torch.no_grad(), plain, torch.compiler.set_stance("force_eager"), isolate_rng():
                found = tree_leaves(compute(batch))
        finally:
            for part, mode in training.items():
                part.training = mode
        return [one for one in found if isinstance(one, Tensor) and one.is_floating_point()]


def _relative_difference(before: Tensor, after: Tensor) -> float:
    """In the L2 norm; ``after`` is used up."""
    wide = torch.promote_types(before.dtype, torch.float32)
    norm = torch.linalg.vector_norm(before, dtype=wide).clamp_min(torch.finfo(wide).tiny)
    return float(torch.linalg.vector_norm(after.sub_(before), dtype=wide) / norm)
