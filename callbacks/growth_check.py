"""Output check of a growth: model outputs for the same batch before and after it."""

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

    The check calls ``model_output(batch)`` if the module defines it. Otherwise it calls ``forward`` with the batch, or
    with the first item of a tuple or list. If neither works, it warns once and reports NaN from then on.

    Args:
        pl_module: The module.
        batch: The batch.
        enabled: Whether to compute outputs.
    """

    _warned: ClassVar[set[type]] = set()  # one warning per module class

    def __init__(self, pl_module: LightningModule, batch: Any, enabled: bool = True) -> None:
        self._module, self._batch = pl_module, batch
        self._before = self._checked_outputs() if enabled else []

    def difference(self) -> float:
        """Compute the relative L2 difference of the outputs to the initial ones; NaN without outputs."""
        if not self._before:
            return float("nan")
        return max(map(_relative_difference, self._before, self._outputs()))

    def _checked_outputs(self) -> list[Tensor]:
        kind = type(self._module)
        if hasattr(self._module, "model_output"):
            return self._outputs()
        try:
            return self._outputs()
        except Exception as error:  # a user's forward may raise anything for an unsupported input
            if kind not in self._warned:
                self._warned.add(kind)
                problem = "has no forward" if kind.forward is LightningModule.forward else f"forward raised {error!r}"
                rank_zero_warn(
                    f"check: cannot compare the outputs before and after a growth ({kind.__name__} {problem}); "
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
    """Compute the relative L2 difference; overwrites ``after``."""
    wide = torch.promote_types(before.dtype, torch.float32)
    norm = torch.linalg.vector_norm(before, dtype=wide).clamp_min(torch.finfo(wide).tiny)
    return float(torch.linalg.vector_norm(after.sub_(before), dtype=wide) / norm)
