"""Training metrics for loggers and progress bar: compute, size, throughput, norms by row age, predictions, config.

A growth changes the cost of an optimizer step. Compare runs over ``compute/training_flops``, not over steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchmetrics.classification import MulticlassConfusionMatrix

from callbacks.growth_steps import latest_rows
from callbacks.log_media import hyper_parameters, log_hyper_parameters, log_picture, log_text, table_settings
from callbacks.pictures import confusion_picture, predict_examples, prediction_picture
from callbacks.run_report import (
    MAX_CLASSES,
    add_layout,
    log_growth,
    log_scores,
    log_training,
    sample_text,
)
from callbacks.throughput import Counts, Throughput, peak_flops, peak_memory
from lit_tokenformer.checkpoints.run_folder import run_folder
from lit_tokenformer.cost import ModelCost
from lit_tokenformer.errors import UserError
from lit_tokenformer.growth import GrownTensor, Rows
from lit_tokenformer.growth.shards import gather, is_elsewhere, like, local, num_owners, sum_over_model
from lit_tokenformer.models import Pattention, model_size, param_tokens
from lit_tokenformer.models.experts import expert_metrics
from lit_tokenformer.tasks import LitImageClassifier


class TrainingMonitor(Callback):
    """Log compute, model size, throughput and row norms at the trainer's log steps.

    ``train/mfu``
        Model FLOPs utilization since the last report: FLOPs per second without recomputed activations, relative to the
        peak of all devices.
    ``compute/training_flops``
        FLOPs of all training steps so far, summed over all processes. The count continues when a fit is resumed.
    ``compute/data_tokens``
        Data tokens (text) or patches (images) trained on so far. The count continues when a fit is resumed.
    ``compute/samples_per_second``, ``compute/data_tokens_per_second``
        Training throughput over all processes since the last report, without validation time. Samples of several tasks
        are added up. With several devices, ``compute/device/...`` is the share of one.
    ``compute/data_wait``
        Share of that time in which the process waited for its next batch.
    ``compute/peak_memory_gb``
        Peak memory so far, in 10^9 bytes: allocated on a CUDA device, otherwise resident in the process.
    ``size/parameters``, ``size/tokens_qkv``, ...
        Number of parameters, and parameter tokens of each kind of projection.
    ``experts/load_max``, ``experts/router_entropy``, ``experts/load/LAYER/EXPERT``, ``size/active_parameters``
        With experts: the largest load relative to the mean, the entropy of the routers in nats, the share of each
        expert in the data tokens of the last optimizer step, and the parameters that a data token uses.
    ``rows/grad_norm_old``, ``rows/update_norm_old``, ``rows/grad_norm_new``, ``rows/update_norm_new``
        Norms of gradient (before clipping) and optimizer update over all parameter tokens. After a growth, appended
        tokens (``new``) and all others (``old``) are reported separately.
    ``best/...``
        Best score of each ``ModelCheckpoint`` since the last growth, logged at the end of the fit.

    The progress bar shows the latest ``mfu``, throughput, ``data_wait`` and memory. One log line at the end of the fit
    reports them over the whole fit. The device is not synchronized between log steps.

    Every logger also receives the settings of trainer, data and growth as hyper-parameters, and after each validation
    a grid of validation images with their predictions (``val/predictions``: green if correct, red if wrong; a PNG file
    in the run folder for loggers without pictures), a confusion matrix of up to 100 classes, and for causal language
    models a sample of text that continues the first validation block (``val/sample``). Each growth is a text with
    sizes, cost and output difference. TensorBoard, W&B, MLflow and Comet receive the run's ``config.yaml`` as text.

    TensorBoard also has a first group ``Overview`` with loss, scores and size, the validation loss over the compute
    (x axis in MFLOPs), marks of the growths (``growth/at_STEP``), charts in CUSTOM SCALARS, and in HPARAMS the current
    validation metrics, size and FLOPs.

    Args:
        log_images: Number of images in the grid, evenly spaced over the validation set; 0 disables it.
        row_norms: Whether to measure norms of gradients and updates.
        peak_flops: Peak FLOPs per second of one device, for ``train/mfu``; by default that of its data sheet (NVIDIA,
            dense bf16) or of a short matrix product, timed at the start of the fit.
        log_text: Number of tokens of the text sample; 0 disables it.

    Raises:
        ValueError: If ``log_images`` or ``log_text`` is negative, or ``peak_flops`` is not positive.

    Note:
        The command line adds this callback, without images and row norms, to every fit without one. FLOPs and data
        tokens require a module method ``cost()``, whose result has ``training_flops`` and ``data_tokens`` of one
        sample. If batches are mappings, the module defines ``costs()`` instead, with one such result per key. The image
        grid requires batches ``(image (B, C, H, W), label)`` and a ``forward`` that returns logits (B, classes).
        ``class_names``, ``mean`` and ``std`` of the data module are used if present.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[TrainingMonitor(log_images=8)], logger=False)
    """

    def __init__(
        self, log_images: int = 16, row_norms: bool = True, peak_flops: float | None = None, log_text: int = 64
    ) -> None:
        for name, number in (("log_images", log_images), ("log_text", log_text)):
            if number < 0:
                raise UserError(f"{name}: expected at least 0, got {number}")
        if peak_flops is not None and not 0 < peak_flops < math.inf:
            raise UserError(f"peak_flops: expected a positive number of FLOPs per second, got {peak_flops}")
        self.log_images = log_images
        self.log_text = log_text
        self.row_norms = row_norms
        self.training_flops = 0
        """FLOPs of all training steps so far, as an exact integer."""
        self.data_tokens = 0
        """Data tokens of all training steps so far."""
        self._growth: dict[str, Any] | None = None
        self._costs: dict[str, ModelCost] = {}
        self._sizes: dict[str, int] = {}
        self.peak_flops = peak_flops
        self.throughput: Throughput | None = None
        """Counts of the current fit, or of the last one."""
        self._peak, self._peak_source, self._devices = 0.0, "", 1
        self._reported = Counts()
        self._held: list[tuple[Tensor, AgedRows]] = []  # local shards before the step
        self._row_norms: dict[str, Tensor] = {}
        self._examples: list[tuple[Tensor, int, int]] = []
        self._confusion: MulticlassConfusionMatrix | None = None
        self._text: str | None = None
        self._hparams_logged = False
        self._folder = ""

    def state_dict(self) -> dict[str, Any]:
        return {"training_flops": self.training_flops, "data_tokens": self.data_tokens, "growth": self._growth}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.training_flops = state_dict["training_flops"]
        self.data_tokens = state_dict["data_tokens"]
        self._growth = state_dict["growth"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._hparams_logged = False
        for logger in trainer.loggers if stage == "fit" else []:
            if isinstance(logger, TensorBoardLogger):  # its initial record would fix the tab's columns
                logger._default_hp_metric = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._folder = run_folder(trainer)  # collective
        if not trainer.is_global_zero:
            return
        log_hyper_parameters(trainer, hyper_parameters(trainer))
        files = sorted(Path(self._folder).glob("config*.yaml"), key=lambda path: path.stat().st_mtime)
        for file in files[-1:]:  # a folder may contain configs of several runs
            log_text(trainer, "config", file.read_text(encoding="utf-8"), file.name, language="yaml")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._devices = trainer.world_size
        self._peak, self._peak_source = float(self.peak_flops or 0), "peak_flops"
        if not self._peak and trainer.is_global_zero:
            self._peak, self._peak_source = peak_flops(trainer.strategy.root_device, str(trainer.precision))
        self.throughput = Throughput(trainer)
        self._measure(pl_module)
        _log(trainer, self._totals())
        add_layout(trainer)

    def on_parameter_growth(self, trainer: Trainer, pl_module: LightningModule, event: dict[str, Any]) -> None:
        """Measure the model at its new size.

        Args:
            trainer: The trainer.
            pl_module: The grown model.
            event: The growth; see :func:`~callbacks.growth_steps.latest_rows`.
        """
        self._growth = {key: event[key] for key in ("before", "after", "rows", "method") if key in event}
        before = {"parameters": self._sizes["size/parameters"], "flops": getattr(self._costs.get(""), "flops", None)}
        self._measure(pl_module)
        _log(trainer, self._totals())
        log_growth(trainer, event, before, self._folder, _log_step(trainer))

    def on_cost_change(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Update the cost of a sample after a change without growth."""
        self._measure(pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if not (self.row_norms and trainer.loggers and _is_log_step(trainer)):
            return
        rows = [
            one
            for one in rows_by_age(pl_module, self._growth)
            if one.tensor.grad is not None or is_elsewhere(one.tensor)
        ]
        self._held = [(local(one.tensor).to("cpu", copy=True), one) for one in rows]
        gradients: Any = (one if one.tensor.grad is None else one._replace(tensor=one.tensor.grad) for one in rows)
        self._row_norms = self._norms("grad", gradients) if rows else {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        replicas = (trainer.distributed_sampler_kwargs or {"num_replicas": 1})["num_replicas"]
        for task in self._costs or [""]:
            samples, tokens, flops = num_samples(batch[task] if task else batch) * replicas, 0, 0
            if (cost := self._costs.get(task)) is not None:
                self.training_flops += cost.training_flops * samples
                tokens = cost.data_tokens * samples
                flops = (cost.training_flops - getattr(cost, "recomputed", 0)) * samples
                self.data_tokens += tokens
            if self.throughput is not None:
                self.throughput.count(samples, tokens, flops)
        if not _is_log_step(trainer) or trainer.fit_loop._should_accumulate():
            return
        changes = (  # a generator avoids a second copy of all parameter tokens on the device
            one._replace(tensor=like(one.tensor.detach(), before.to(one.tensor.device).sub_(local(one.tensor))))
            for before, one in self._held
        )
        found = {**self._row_norms, **(self._norms("update", changes) if self._held else {})}
        norms = dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True)) if found else {}
        self._held, self._row_norms = [], {}
        rates = self._rates(trainer)
        _log(trainer, {**self._totals(), **rates, **norms, **expert_metrics(pl_module)})
        log_training(trainer, self._sizes["size/parameters"], _log_step(trainer))
        if trainer.progress_bar_callback is not None:
            trainer.progress_bar_metrics.update(_short(rates))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.throughput is not None and _is_fit(trainer):
            self.throughput.pause()
        self._examples, self._text, self._confusion = [], None, None
        classes = pl_module.backbone.num_classes if isinstance(pl_module, LitImageClassifier) else 0
        if self.log_images and trainer.loggers and _is_fit(trainer) and 0 < classes <= MAX_CLASSES:
            self._confusion = MulticlassConfusionMatrix(classes, validate_args=False).to(pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        # not in on_validation_end: averaged weights are swapped out before it
        if self.log_images and _is_fit(trainer) and dataloader_idx == 0 and trainer.loggers:
            self._examples += predict_examples(trainer, pl_module, batch, batch_idx, self.log_images)
            if self._confusion is not None and isinstance(outputs, Mapping):  # a subclass may return none
                label, predicted, classes = outputs["label"], outputs["predicted"], self._confusion.num_classes
                known = (label >= 0) & (label < classes) & (predicted < classes)
                self._confusion.update(predicted[known], label[known])
        if self.log_text and _is_fit(trainer) and batch_idx == dataloader_idx == 0 and trainer.loggers:
            self._text = sample_text(pl_module, getattr(trainer, "datamodule", None), batch, self.log_text)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not _is_fit(trainer):
            return
        if self.throughput is not None:
            self.throughput.resume()
        if self._examples and trainer.is_global_zero:
            picture = prediction_picture(self._examples, getattr(trainer, "datamodule", None))
            log_picture(trainer, "val/predictions", picture, _log_step(trainer), self._folder)
        if self._confusion is not None and self._confusion.update_called:
            counts = self._confusion.compute()  # of all processes
            names = (getattr(pl_module, "image_data", None) or {}).get("class_names", ())
            if trainer.is_global_zero:
                picture = confusion_picture(counts.cpu(), names)
                log_picture(trainer, "val/confusion_matrix", picture, _log_step(trainer), self._folder)
        if self._text is not None and trainer.is_global_zero:
            name = f"sample-step={_log_step(trainer)}.txt"
            log_text(trainer, "val/sample", self._text, name, _log_step(trainer), self._folder, "text")
        self._examples, self._text, self._confusion = [], None, None
        log_scores(trainer, list(_monitored(trainer)), self.training_flops, _log_step(trainer))
        self._log_hparams(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _log(trainer, {**self._totals(), **_best_scores(trainer)})
        self._log_hparams(trainer)
        self._report(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.throughput is not None:
            self.throughput.close()

    def rates(self, counts: Counts) -> dict[str, float]:
        """Compute throughput, ``mfu`` and ``data_wait`` of counts; those without a count are omitted.

        Args:
            counts: Counts of a part of the current fit.
        """
        seconds = max(counts.seconds, 1e-9)
        rates = {"samples_per_second": counts.samples / seconds, "data_wait": counts.waiting / seconds}
        if counts.data_tokens:
            rates["data_tokens_per_second"] = counts.data_tokens / seconds
        if counts.flops and self._peak:
            rates["mfu"] = counts.flops / seconds / self._devices / self._peak
        return rates

    def _measure(self, pl_module: LightningModule) -> None:
        """Measure the current size and cost of the model, and reset the throughput."""
        cost, costs = getattr(pl_module, "cost", None), getattr(pl_module, "costs", None)
        self._costs = costs() if callable(costs) else {"": cost()} if callable(cost) else {}
        self._sizes = {"size/parameters": sum(parameter.numel() for parameter in pl_module.parameters())}
        if inactive := max((cost.inactive for cost in self._costs.values()), default=0):
            self._sizes["size/active_parameters"] = self._sizes["size/parameters"] - inactive
        tokens = param_tokens(pl_module)
        for kind, total in model_size(pl_module).items():
            self._sizes[f"size/tokens_{kind}" if kind in tokens else f"size/{kind}"] = total
        if self.throughput is not None:
            self._reported = self.throughput.counts()

    def _totals(self) -> dict[str, float]:
        if not self._costs:
            return {**self._sizes}
        flops, tokens = float(self.training_flops), float(self.data_tokens)
        return {"compute/training_flops": flops, "compute/data_tokens": tokens, **self._sizes}

    def _rates(self, trainer: Trainer) -> dict[str, float]:
        """Compute the throughput since the last report."""
        if self.throughput is None:
            return {}
        counts = self.throughput.counts()
        rates = self.rates(counts.since(self._reported))
        self._reported = counts
        metrics = {"train/mfu": rates.pop("mfu")} if "mfu" in rates else {}
        metrics |= {f"compute/{name}": rate for name, rate in rates.items()}
        if self._devices > 1:
            per_device = {name: rate for name, rate in rates.items() if name.endswith("per_second")}
            metrics |= {f"compute/device/{name}": rate / self._devices for name, rate in per_device.items()}
        return metrics | {"compute/peak_memory_gb": peak_memory(trainer.strategy.root_device) / 1e9}

    def _report(self, trainer: Trainer) -> None:
        """Report the throughput of the whole fit."""
        if self.throughput is None:
            return
        self.throughput.pause()
        self.throughput.close()
        counts = self.throughput.counts()
        if not counts.data_tokens:
            return
        rates = self.rates(counts)
        peak = f"{self._peak / 1e12:,.3g} TFLOP/s ({self._peak_source})"
        rank_zero_info(
            f"Training throughput: {rates['data_tokens_per_second']:,.0f} data tokens per second "
            f"({counts.data_tokens:,} data tokens in {counts.seconds:.0f} s without validation), MFU "
            f"{rates.get('mfu', 0):.1%} of {peak}, {rates['data_wait']:.1%} of the time waiting for data, peak memory "
            f"{peak_memory(trainer.strategy.root_device) / 1e9:.3g} GB; {self.training_flops:.3g} FLOPs so far"
        )

    def _norms(self, name: str, tensors: Iterable[AgedRows]) -> dict[str, Tensor]:
        old, appended = norms_by_age(tensors)
        norms = {f"rows/{name}_norm_old": old}
        return norms if self._growth is None else {**norms, f"rows/{name}_norm_new": appended}

    def _log_hparams(self, trainer: Trainer) -> None:
        """Register the metrics of TensorBoard's HPARAMS tab, which then follows their values."""
        if self._hparams_logged:
            return
        self._hparams_logged = True
        scores = {
            name: float(value) for name, value in trainer.callback_metrics.items() if not name.startswith("train/")
        }
        best = {f"best/{name}": scores[name] for name in _monitored(trainer) if name in scores}  # first, thus best
        metrics = {**scores, **best, **self._totals(), **_best_scores(trainer)}
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                found = dict(logger.hparams)
                logger.hparams.clear()
                logger.log_hyperparams(table_settings(found, trainer.optimizers), metrics, step=_log_step(trainer))
                logger.hparams.clear()
                logger.hparams.update(found)  # for hparams.yaml


class AgedRows(NamedTuple):
    """Units of a tensor, split into old ones and those appended by the latest growth.

    Args:
        tensor: A parameter, or a tensor of its shape.
        dim: Dimension of the units.
        new: Mask of the new entries along that dimension, (entries,) bool.
    """

    tensor: Tensor
    dim: int
    new: Tensor


def rows_by_age(pl_module: nn.Module, growth: Mapping[str, Any] | None) -> Iterator[AgedRows]:
    """Yield keys and values of all parameter tokens, and all other parameters enlarged by the latest growth.

    Args:
        pl_module: The model.
        growth: The latest growth, see :func:`~callbacks.growth_steps.latest_rows`; ``None`` without one.
    """
    grown: dict[nn.Parameter, GrownTensor] = {}
    for _, parameter, one in latest_rows(pl_module, growth) if growth is not None else ():
        if parameter not in grown or one.dim == 0:  # tokens take precedence over heads that grew with them
            grown[parameter] = one
    layers = [layer for layer in pl_module.modules() if isinstance(layer, Pattention)]
    for layer in layers:
        for parameter in (layer.key_tokens, layer.value_tokens):
            one = grown.get(parameter, GrownTensor(Rows(layer.num_tokens, layer.num_tokens)))
            yield AgedRows(parameter, one.dim, one.mask(parameter.device))
    tokens = {parameter for layer in layers for parameter in layer.parameters()}
    for parameter, one in grown.items():
        if parameter not in tokens:
            yield AgedRows(parameter, one.dim, one.mask(parameter.device))


def norms_by_age(tensors: Iterable[AgedRows]) -> tuple[Tensor, Tensor]:
    """Compute the L2 norms over all old units and over all new ones."""
    found = []
    for tensor, dim, new in tensors:
        wide = torch.promote_types(tensor.dtype, torch.float32)
        if is_elsewhere(tensor):
            found.append((num_owners(tensor), torch.zeros(2, dtype=wide, device=tensor.device)))
            continue
        others = [other for other in range(tensor.ndim) if other != dim]
        norms = torch.linalg.vector_norm(tensor, dim=others, dtype=wide) if others else tensor.to(wide)
        entries = gather(norms).square()
        squares = torch.stack([entries.masked_fill(new, 0).sum(), entries.masked_fill(~new, 0).sum()])
        found.append((num_owners(tensor), squares))
    old, appended = sum_over_model(found).sqrt().unbind()
    return old, appended


def _short(rates: Mapping[str, float]) -> dict[str, float]:
    """Shorten the throughput for the progress bar."""
    tokens = "compute/data_tokens_per_second" in rates
    shown = {
        "mfu": "train/mfu",
        "tokens/s" if tokens else "samples/s": f"compute/{'data_tokens' if tokens else 'samples'}_per_second",
        "data_wait": "compute/data_wait",
        "memory_gb": "compute/peak_memory_gb",
    }
    return {short: rates[name] for short, name in shown.items() if name in rates}


def _is_fit(trainer: Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def _is_log_step(trainer: Trainer) -> bool:
    return trainer._logger_connector.should_update_logs


def _log_step(trainer: Trainer) -> int:
    """Return Lightning's current position on the x axis of the loggers, in optimizer steps."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def _log(trainer: Trainer, metrics: dict[str, float]) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=_log_step(trainer))


def num_samples(batch: Any) -> int:
    """Return the length of the first tensor in a batch."""
    return next((len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), 0)


def _monitored(trainer: Trainer) -> dict[str, Tensor | None]:
    """Map each metric monitored by a checkpoint callback to its best score so far."""
    found = [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
    return {one.monitor: one.best_model_score for one in found if one.monitor is not None}


def _best_scores(trainer: Trainer) -> dict[str, float]:
    return {f"best/{name}": float(score) for name, score in _monitored(trainer).items() if score is not None}
