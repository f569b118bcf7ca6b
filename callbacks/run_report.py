"""Overview, growths, text samples and confusion matrix of a run, for its loggers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from callbacks.log_media import log_text
from lit_tokenformer.checkpoints.run_folder import write_if_space
from lit_tokenformer.tasks import LitCausalLM

MAX_CLASSES = 100
"""Largest number of classes in a confusion matrix."""

_PROMPT = 16
"""Data tokens of validation text that a sample continues."""

_LAYOUT: dict[str, dict[str, list[Any]]] = {
    "Run": {
        "Loss, and when the model grew": ["Multiline", [r"^val/(.*/)?loss$", r"^train/loss$", r"^growth/at_\d+$"]],
        "Scores": ["Multiline", [r"^val/(.*/)?(acc1|accuracy|bits_per_byte)$"]],
        "Validation loss by MFLOPs of training": ["Multiline", [r"^Overview/.*_by_MFLOPs$"]],
        "Parameters": ["Multiline", [r"^Overview/4_parameters$"]],
    },
    "Growth": {
        "Size by kind": ["Multiline", [r"^size/(?!parameters)"]],
        "Relative output difference of each growth": ["Multiline", [r"^growth/output_difference$"]],
        "Gradient norm of old and new rows": ["Multiline", [r"^rows/grad_norm"]],
        "Update norm of old and new rows": ["Multiline", [r"^rows/update_norm"]],
    },
    "Speed": {"Samples per second": ["Multiline", [r"^compute/samples_per_second$"]]},
}
"""Charts of TensorBoard's tab CUSTOM SCALARS."""


def add_layout(trainer: Trainer) -> None:
    """Add the charts of TensorBoard's tab CUSTOM SCALARS."""
    for logger in _tensorboards(trainer):
        write_if_space(logger, logger.experiment.add_custom_scalars, _LAYOUT)


def _log_overview(trainer: Trainer, values: Mapping[str, float], step: int) -> None:
    """Log values under ``Overview``, the first group of TensorBoard."""
    for logger in _tensorboards(trainer):
        logger.log_metrics({f"Overview/{name}": value for name, value in values.items()}, step=step)


def log_training(trainer: Trainer, parameters: int, step: int) -> None:
    """Log training loss and number of parameters to the overview."""
    loss = trainer.callback_metrics.get("train/loss")
    known = {} if loss is None else {"3_train_loss": float(loss)}
    _log_overview(trainer, {**known, "4_parameters": parameters}, step)


def log_scores(trainer: Trainer, monitored: Sequence[str], flops: int, step: int) -> None:
    """Log validation loss and monitored scores to the overview, the loss over the compute too."""
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    loss = {"val/loss": found["val/loss"]} if "val/loss" in found else {}
    scores = {name: found[name] for name in monitored if name in found and name != "val/loss"}
    _log_overview(trainer, {f"1_{_flat(name)}": value for name, value in loss.items()}, step)
    _log_overview(trainer, {f"2_{_flat(name)}": value for name, value in scores.items()}, step)
    if flops:
        _log_overview(trainer, {f"5_{_flat(name)}_by_MFLOPs": one for name, one in loss.items()}, int(flops // 1e6))


def log_growth(trainer: Trainer, event: Mapping[str, Any], before: Mapping[str, Any], folder: str, step: int) -> None:
    """Log a growth: a text with its facts, and a mark at the training loss for TensorBoard.

    Args:
        trainer: Trainer of the fit.
        event: The growth, see :class:`~callbacks.ParameterGrowthCallback`.
        before: ``parameters`` and ``flops`` of a sample (``None`` if unknown) before the growth.
        folder: Folder of the run.
        step: Optimizer step.
    """
    rows = [(kind, event["before"].get(kind, "-"), size) for kind, size in event["after"].items()]
    rows = [(kind, f"{old:,}" if isinstance(old, int) else old, f"{new:,}") for kind, old, new in rows]
    if "parameters" in event:
        rows.append(("parameters", f"{before['parameters']:,}", f"{event['parameters']:,}"))
    if before["flops"] and "flops_per_sample" in event:
        rows.append(("GFLOPs per sample", f"{before['flops'] / 1e9:.3g}", f"{event['flops_per_sample'] / 1e9:.3g}"))
    table = "".join(f"| {name} | {old} | {new} |\n" for name, old, new in rows)
    facts = {
        "method": event.get("method"),
        "relative output difference": _number(event.get("output_difference")),
        "seconds": _number(event.get("seconds")),
    }
    listed = ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
    title = f"Growth at epoch {trainer.current_epoch}, step {trainer.global_step}"
    if trainer.is_global_zero:
        text = f"**{title}**: {listed}\n\n| | before | after |\n|---|---:|---:|\n{table}"
        log_text(trainer, "growth", text, f"growth-step={step}.md", step, folder)
    loss = trainer.callback_metrics.get("train/loss")
    # vertical lines: a point on each side of the growth, as TensorBoard keeps one point of a step
    for side, height, size in ((step - 1, 0.5, before["parameters"]), (step, 1.5, event.get("parameters"))):
        mark = {} if loss is None else {f"growth/at_{trainer.global_step}": height * float(loss)}
        jump = {} if size is None else {"Overview/4_parameters": size}
        for logger in _tensorboards(trainer):
            logger.log_metrics(mark | jump, step=max(side, 0))


@torch.no_grad()
def sample_text(pl_module: LightningModule, datamodule: Any, batch: Any, length: int) -> str | None:
    """Continue the beginning of the first text of a batch; sampling has its own generator.

    Args:
        pl_module: A causal language model; the result of others is None.
        datamodule: Its data, with the tokenizer.
        batch: Validation batch of tokens (B, T + 1).
        length: Number of tokens to sample.

    Returns:
        Prompt and continuation, or ``None``.
    """
    tokenizer: Any = getattr(datamodule, "tokenizer", None)
    if not callable(getattr(tokenizer, "decode", None)) or not isinstance(pl_module, LitCausalLM):
        return None
    if not isinstance(batch, Tensor):
        return None
    window = batch.shape[1] - 1
    prompt = batch[:1, : min(_PROMPT, window)].clamp_min(0)
    tokens, draw = prompt, torch.Generator().manual_seed(0)
    with torch.compiler.set_stance("force_eager"):
        for _ in range(length):
            logits = pl_module(tokens[:, -window:])[:, -1].float().cpu()
            if not logits.isfinite().all():  # a diverged model; not this callback's to report
                return None
            chosen = torch.multinomial((logits / 0.8).softmax(dim=-1), 1, generator=draw)
            tokens = torch.cat([tokens, chosen.to(tokens.device)], dim=1)
    start, rest = tokenizer.decode(prompt[0].tolist()), tokenizer.decode(tokens[0, prompt.shape[1] :].tolist())
    return f"{start}[...]{rest}"


def _tensorboards(trainer: Trainer) -> list[Any]:
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def _flat(name: str) -> str:
    return name.replace("/", "_")


def _number(value: float | None) -> str | None:
    return None if value is None or value != value else f"{value:.2g}"
