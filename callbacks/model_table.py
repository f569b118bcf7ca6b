"""Table of a model's parts, and its cost."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities.rank_zero import rank_zero_info


class ModelTable(ModelSummary):
    """Print the parts of a model with their parameters at the start of a fit, and the FLOPs of a sample.

    FLOPs are those of the module's ``cost()`` or ``costs()``, and omitted without it. The command line uses this table
    unless another ``ModelSummary`` is configured.

    Args:
        max_depth: Levels of parts to list; 0 disables the table.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ModelTable(max_depth=3)], enable_model_summary=False, logger=False)
    """

    def __init__(self, max_depth: int = 2) -> None:
        super().__init__(max_depth=max_depth)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        cost, costs = getattr(pl_module, "cost", None), getattr(pl_module, "costs", None)
        found = costs() if callable(costs) else {"": cost()} if callable(cost) else {}
        for name, one in found.items() if self._max_depth else ():
            forward, training = one.flops / 1e9, one.training_flops / 1e9
            rank_zero_info(f"{name or 'Model'}: {forward:.3g} GFLOPs per sample, {training:.3g} in training")

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        *_: Any,
        **__: Any,
    ) -> None:
        """Print the table, without parts that have no parameters."""
        from rich import get_console
        from rich.table import Table

        columns = {name: values for name, values in summary_data if name.strip() and name not in ("Mode", "FLOPs")}
        table = Table(box=None, padding=(0, 2, 0, 0))
        for name in columns:
            table.add_column(name, justify="left" if name in ("Name", "Type") else "right", overflow="fold")
        for row in zip(*columns.values(), strict=True):
            if dict(zip(columns, row, strict=True))["Params"].strip() != "0":
                table.add_row(*row)
        console = get_console()
        console.print(table)
        total = f"{total_parameters:,} parameters, {trainable_parameters:,} trainable, {model_size:,.1f} MB"
        console.print(total, highlight=False)
