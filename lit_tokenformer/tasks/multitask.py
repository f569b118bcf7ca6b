"""Images and text in the same training step: two tasks whose backbones hold the same blocks.

A block knows nothing of causality, positions or input: those come from each backbone's own config. So both backbones
can hold the same blocks and the same final norm, and only stem and head are their own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lit_tokenformer.cost import ModelCost, model_cost
from lit_tokenformer.errors import UserError, unknown_name
from lit_tokenformer.growth.shards import like
from lit_tokenformer.models import BackboneOverrides, Tokenformer, TokenformerConfig, preset_config
from lit_tokenformer.tasks.base import LitTask
from lit_tokenformer.tasks.causal_lm import LitCausalLM, published_adamw
from lit_tokenformer.tasks.image_classification import LitImageClassifier
from lit_tokenformer.tasks.optimization import scale_
from lit_tokenformer.tasks.schedule import LRSchedule, LRSchedulerConfig

PARTS: dict[str, dict[str, Any]] = {
    "image": {"stem": "patch", "head": "image", "positions": "learned", "causal": False},
    "text": {"stem": "token", "head": "language", "positions": "rotary", "causal": True},
}
"""What each task needs of an architecture that was made for another one."""

OWN_FIELDS = {
    *("stem", "head", "positions", "causal", "rotary_fraction", "rotary_base", "stem_norm", "tie_embeddings", "unpad"),
    *("image_size", "patch_size", "in_chans", "num_classes", "global_pool", "class_token"),
    *("vocab_size", "context_length"),
}
"""Fields of the architecture in which the tasks may differ: none of what the blocks are made of."""


class LitMultiTask(LitTask):
    """Trains one set of parameter tokens to classify images and to predict the next token of a text.

    A training batch is ``{"image": (image (B, 3, H, W), label), "text": tokens (B', T + 1)}``; for evaluation the data
    give one loader for each task, in this order. The loss is the sum of the tasks' losses, each with its weight. What
    each task logs by itself it logs here under its name (``val/image/acc1``, ``val/text/bits_per_byte``);
    ``train/loss``, ``val/loss`` and ``test/loss`` are the weighted sums.

    ``image`` and ``text`` are a :class:`LitImageClassifier` and a :class:`LitCausalLM`; ``lit-tokenformer split`` makes
    a checkpoint of each.

    Args:
        preset: Architecture, a name from ``lit_tokenformer.models.list_presets()``, of images or of text; for the other
            task stem, head, positions and causality change.
        num_classes: Classes, C; on the command line the data set decides.
        image_size: Side of the images in pixels; on the command line the data set decides.
        vocab_size: Token ids, V; on the command line the data's tokenizer decides.
        context_length: Longest text in tokens, T; on the command line the data's block size decides.
        separator_id: Token id that ends a document; on the command line the data decide.
        overrides: Fields of the architecture that replace the preset's, for both tasks.
        image: The same for images alone; fields of the blocks, which are shared, cannot stand here.
        text: The same for text alone.
        loss_weights: A weight for each task, 1 where none is given; or ``uncertainty``: the loss is the sum of
            ``exp(-s) L + s`` over the tasks with learned s (Kendall et al., arXiv 1705.07115, eq. 10, which has s / 2;
            here a weight comes to rest where weight times loss is 1). ``train/NAME/weight`` tells them.
        optimizer: Makes the optimizer from parameter groups; decay spares one-dimensional parameters.
        schedule: Learning rate over the fit.
        lr_scheduler: A torch scheduler that takes the place of ``schedule``.
        z_loss: As of :class:`LitCausalLM`.
        cross_documents: As of :class:`LitCausalLM`.
        compile: Whether the backbones are compiled with ``torch.compile``, once for each size.
        grad_checkpointing: Whether blocks are computed again in the backward pass, to save memory.
        lr_scheduler_config: When ``lr_scheduler`` steps: interval, frequency, and the monitor of ReduceLROnPlateau.

    Raises:
        ValueError: For an unknown preset, sizes that do not fit each other, blocks that could not be shared, or weights
            that name no task, are negative or all zero.

    Example:
        >>> sizes = {"depth": 2, "patch_size": 4}
        >>> task = LitMultiTask("tokenformer_lm_tiny", 10, 8, vocab_size=257, context_length=32, overrides=sizes)
        >>> task(torch.zeros(1, 3, 8, 8)).shape, task(torch.zeros(1, 32, dtype=torch.long), "text").shape
        (torch.Size([1, 10]), torch.Size([1, 32, 257]))
        >>> task.image.backbone.blocks is task.text.backbone.blocks
        True
    """

    def __init__(
        self,
        preset: str = "tokenformer_lm_small",
        num_classes: int = 1000,
        image_size: int = 224,
        vocab_size: int = 50304,
        context_length: int = 1024,
        separator_id: int | None = None,
        overrides: BackboneOverrides = BackboneOverrides(),  # noqa: B008  (frozen)
        image: BackboneOverrides = BackboneOverrides(),  # noqa: B008
        text: BackboneOverrides = BackboneOverrides(),  # noqa: B008
        loss_weights: dict[str, float] | str | None = None,
        optimizer: OptimizerCallable = published_adamw,
        schedule: LRSchedule = LRSchedule(),  # noqa: B008  (frozen)
        lr_scheduler: LRSchedulerCallable | None = None,
        z_loss: float = 0.0,
        cross_documents: bool = True,
        compile: bool = False,
        grad_checkpointing: bool = False,
        lr_scheduler_config: LRSchedulerConfig = LRSchedulerConfig(),  # noqa: B008  (frozen)
    ) -> None:
        fixed = _checked_weights(loss_weights)
        super().__init__(None, optimizer, schedule, lr_scheduler, compile, grad_checkpointing, lr_scheduler_config)
        shared = {
            "preset": preset,
            "schedule": dataclasses.asdict(self.schedule),
            "lr_scheduler_config": dataclasses.asdict(self.lr_scheduler_config),
            "compile": compile,
            "grad_checkpointing": grad_checkpointing,
        }
        fields = {name: self._fields(preset, name, overrides, own) for name, own in (("image", image), ("text", text))}
        data: dict[str, dict[str, Any]] = {
            "image": {"num_classes": num_classes, "image_size": image_size},
            "text": {"vocab_size": vocab_size, "context_length": context_length},
        }
        _check_blocks(*(preset_config(preset, **{**data[name], **fields[name]}) for name in PARTS))
        data["text"] |= {"separator_id": separator_id, "z_loss": z_loss, "cross_documents": cross_documents}
        arguments = {name: {**shared, **data[name], "overrides": fields[name]} for name in PARTS}
        made: dict[str, Any] = {"optimizer": optimizer, "lr_scheduler": lr_scheduler}
        self.image = LitImageClassifier(**arguments["image"], **made)
        self.text = LitCausalLM(**arguments["text"], **made)
        self.text.backbone.blocks = self.image.backbone.blocks
        self.text.backbone.norm = self.image.backbone.norm
        self.fixed_weights = fixed
        self.log_variances = nn.ParameterDict({} if fixed else {name: nn.Parameter(torch.zeros(1)) for name in PARTS})
        """s of each task, (1,), where weights are learned."""

        self._terms: dict[str, Sequence[Tensor]] = {}
        self._gradients: dict[str, dict[nn.Parameter, Tensor]] = {}
        self._completes_step = False

        self.remember_arguments(("overrides", "image", "text"))
        made = {key: self.hparams[key] for key in ("optimizer", "lr_scheduler", "_instantiator") if key in self.hparams}
        for name, task in self.tasks.items():
            task.put_within(self, name)
            task.hparams.clear()  # else what a config gave for this task
            task.save_hyperparameters({**made, **arguments[name]})

    @property
    def tasks(self) -> dict[str, LitTask]:
        """The tasks by name, in the order of the data's loaders."""
        return {"image": self.image, "text": self.text}

    @property
    def backbones(self) -> dict[str, Tokenformer]:
        return {name: task.backbone for name, task in self.tasks.items()}

    @property
    def backbone(self) -> Tokenformer:  # type: ignore[override]
        """Refused with a ``ValueError``, for there is one for each task."""
        raise UserError("several tasks have several backbones; take them apart with `lit-tokenformer split`")

    @classmethod
    def architectures(cls, arguments: Mapping[str, Any]) -> dict[str, TokenformerConfig]:
        sizes = {"image": ("num_classes", "image_size"), "text": ("vocab_size", "context_length")}
        found = {}
        for name in PARTS:
            fields = cls._fields(arguments["preset"], name, arguments["overrides"], arguments[name])
            found[name] = preset_config(
                arguments["preset"], **{**{size: arguments[size] for size in sizes[name]}, **fields}
            )
        return found

    def weights(self) -> dict[str, float | Tensor]:
        """The present weight of each task's loss."""
        return {**self.fixed_weights, **{name: (-s).exp().squeeze() for name, s in self.log_variances.items()}}

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the tasks' losses, ()."""
        return _sum_of({name: self.terms(name, losses[name]) for name in self.tasks})

    def terms(self, name: str, loss: Tensor) -> list[Tensor]:
        """What a task adds to the total, (): its weighted loss, and s where weights are learned."""
        weighted = [self.weights()[name] * loss]
        return [*weighted, self.log_variances[name].squeeze()] if self.log_variances else weighted

    def forward(self, x: Tensor, task: str = "image") -> Tensor:
        """Logits of one of the tasks: for images (B, C, H, W), or for token ids (B, T)."""
        return self.tasks[task](x)

    def model_output(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return {name: task.model_output(batch[name]) for name, task in self.tasks.items()}

    def cost(self) -> ModelCost:
        """Parameters, and operations for one sample of each task."""
        return joint_cost(self.costs().values(), sum(parameter.numel() for parameter in self.parameters()))

    def costs(self) -> dict[str, ModelCost]:
        """What each task would cost by itself, for one of its samples."""
        return {
            name: model_cost(backbone.config, backbone.size, backbone.grad_checkpointing)
            for name, backbone in self.backbones.items()
        }

    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        for name, task in self.tasks.items():
            if data is not None and not hasattr(data, name):
                raise UserError(f"data.{name}: {type(data).__name__} has none; use MultiTaskDataModule")
            task.setup(stage)

    def on_train_start(self) -> None:
        super().on_train_start()
        for task in self.tasks.values():
            task.on_train_start()

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Any:
        terms: dict[str, Sequence[Tensor]] = {}
        losses: dict[str, Tensor] = {}
        for name, task in self.tasks.items():
            losses[name], count = task.training_loss(batch[name])
            share = task.share_of_step(count, batch_idx, losses[name])
            terms[name] = [term if share is None else term * share for term in self.terms(name, losses[name])]
        loss = _sum_of(terms)
        self.log("train/loss", self.total(losses).detach(), prog_bar=True)
        if self.log_variances:
            self.log_dict({f"train/{name}/weight": weight for name, weight in self.weights().items()})
        self._terms = terms if self._trainer and self.trainer.accumulate_grad_batches > 1 else {}
        if self._terms and batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._gradients = {}
        # FSDP2 gathers the parameters for each backward pass that begins at an output
        return {"loss": loss, "terms": list(terms.values())} if self._terms else loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Keep the gradients of accumulated micro-batches apart by task, until each task's items are counted."""
        if not self._terms:
            super().backward(loss, *args, **kwargs)
            return
        terms, self._terms = self._terms, {}
        roots = [term for own in terms.values() for term in own]
        weights = dict(zip(roots, torch.autograd.grad(loss, roots, retain_graph=True), strict=True))
        if self._completes_step:
            factors = {name: task.step_factor() for name, task in self.tasks.items()}
            self._merge_gradients(factors)
            scaled = [weights[term] * factors[name] for name, own in terms.items() for term in own]
            torch.autograd.backward(roots, scaled)
            return
        # those of the optimizer: a sharded module has others between its forward and its backward pass
        groups = [group for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
        parameters = [parameter for group in groups for parameter in group["params"]]
        for name, own in terms.items():
            kept = self._gradients.setdefault(name, {})
            for parameter in parameters:
                parameter.grad = kept.pop(parameter, None)
            torch.autograd.backward(own, [weights[term] for term in own])
            for parameter in parameters:
                if parameter.grad is not None:
                    kept[parameter], parameter.grad = parameter.grad, None

    def _merge_gradients(self, factors: Mapping[str, Tensor | float]) -> None:
        """Give each parameter the sum of its tasks' gradients so far, each times the task's factor."""
        for name, kept in self._gradients.items():
            for parameter, gradient in kept.items():
                scale_(gradient, factors[name])
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        self._gradients = {}

    def pending_state(self) -> dict[str, Tensor | None]:
        found: dict[str, Tensor | None] = {}
        for name, task in self.tasks.items():
            kept = self._gradients.get(name, {})
            found |= {f"{name}.{key}": value for key, value in task.pending_state().items()}
            found |= {f"{name}.gradients.{key}": kept.get(parameter) for key, parameter in self.named_parameters()}
        return found

    def load_pending_state(self, state: Mapping[str, Tensor]) -> None:
        for name, task in self.tasks.items():
            own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
            task.load_pending_state(own)
            self._gradients[name] = {
                parameter: like(parameter.detach(), own[f"gradients.{key}"].to(parameter.device))
                for key, parameter in self.named_parameters()
                if f"gradients.{key}" in own
            }

    def run_last_micro_batch(self, closure: Callable[[], Any]) -> Any:
        self._completes_step = True
        try:
            return closure()
        finally:
            self._completes_step = False

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        list(self.tasks.values())[dataloader_idx].validation_step(batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        list(self.tasks.values())[dataloader_idx].test_step(batch, batch_idx)

    def logged_metrics(self) -> set[str]:
        weights = {f"train/{name}/weight" for name in self.log_variances}
        return super().logged_metrics().union(weights, *(task.logged_metrics() for task in self.tasks.values()))

    def log_scores(self, stage: str) -> None:
        if self.trainer.sanity_checking:
            return  # Lightning keeps no scores of it
        for task in self.tasks.values():
            task.log_scores(stage)
        scores = self.trainer.callback_metrics
        losses = {name: scores[task.metric(f"{stage}/loss")] for name, task in self.tasks.items()}
        self.log(f"{stage}/loss", self.total(losses), prog_bar=True, sync_dist=True)

    def save_extras(self, checkpoint: dict[str, Any]) -> None:
        for task in self.tasks.values():
            task.save_extras(checkpoint)

    def load_extras(self, checkpoint: dict[str, Any]) -> None:
        for task in self.tasks.values():
            task.load_extras(checkpoint)

    @staticmethod
    def _fields(preset: str, name: str, overrides: Any, own: Any) -> dict[str, Any]:
        """What replaces a preset's fields for one of the tasks."""
        parts = PARTS[name] if preset_config(preset).head != PARTS[name]["head"] else {}
        return {**parts, **LitTask.plain(overrides), **LitTask.plain(own)}

    @contextmanager
    def _prevent_trainer_and_dataloaders_deepcopy(self) -> Iterator[None]:
        """Lightning asks for this where it copies a task; it does not look for the trainers of tasks inside."""
        whole: Any = super()
        with ExitStack() as stack:
            for task in (whole, *self.tasks.values()):
                stack.enter_context(task._prevent_trainer_and_dataloaders_deepcopy())
            yield


def _sum_of(terms: Mapping[str, Sequence[Tensor]]) -> Tensor:
    """The sum of all terms, (); losses before s."""
    return torch.stack([own[place] for place in range(2) for own in terms.values() if place < len(own)]).sum()


def joint_cost(costs: Iterable[ModelCost], parameters: int) -> ModelCost:
    """What models cost together that share parameters.

    Args:
        costs: Of each model by itself.
        parameters: Numbers that are learned, each counted once.
    """
    every = list(costs)
    sums = {field.name: sum(getattr(cost, field.name) for cost in every) for field in dataclasses.fields(ModelCost)}
    return ModelCost(**{**sums, "parameters": parameters})


def _checked_weights(weights: dict[str, float] | str | None) -> dict[str, float]:
    """A weight for each task; none at all where they are learned."""
    if isinstance(weights, str):
        if weights != "uncertainty":
            raise unknown_name("model.loss_weights", weights, ("uncertainty",))
        return {}
    given = {**dict.fromkeys(PARTS, 1.0), **(weights or {})}
    for name, weight in given.items():
        if name not in PARTS:
            raise unknown_name("model.loss_weights", name, PARTS)
        if not 0 <= weight < math.inf:
            raise UserError(f"model.loss_weights.{name}: expected a number of at least 0, got {weight}")
    if not any(given.values()):
        raise UserError("model.loss_weights: all are 0, so nothing would be learned")
    return given


def _check_blocks(image: Any, text: Any) -> None:
    """Raises a ``ValueError`` if the blocks of two configs are not the same."""
    for field in dataclasses.fields(image):
        ours, theirs = getattr(image, field.name), getattr(text, field.name)
        if ours != theirs and field.name not in OWN_FIELDS:
            raise UserError(
                f"model.image.{field.name}: {ours} for images and {theirs} for text; the blocks are shared, "
                f"set model.overrides.{field.name} for both"
            )
