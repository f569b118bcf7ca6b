"""Joint training of several tasks whose backbones share their blocks.

Causality, positions and input come from the config of each backbone, not from its blocks. All backbones therefore share
blocks and final norm, and have their own stem and head.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lit_tokenformer.checkpoints.trust import MADE
from lit_tokenformer.cost import ModelCost
from lit_tokenformer.errors import UserError, unknown_name
from lit_tokenformer.growth.shards import like
from lit_tokenformer.models import BackboneOverrides, Tokenformer, TokenformerConfig, preset_config
from lit_tokenformer.registry import TASKS
from lit_tokenformer.tasks.base import LitTask
from lit_tokenformer.tasks.causal_lm import LitCausalLM, published_adamw
from lit_tokenformer.tasks.image_classification import LitImageClassifier
from lit_tokenformer.tasks.optimization import LRSchedule, LRSchedulerConfig, scale_

OWN_FIELDS = {
    *("stem", "head", "positions", "causal", "rotary_fraction", "rotary_base", "stem_norm", "tie_embeddings", "unpad"),
    *("image_size", "patch_size", "in_chans", "num_classes", "global_pool", "class_token"),
    *("vocab_size", "context_length"),
}
"""Fields of the architecture in which tasks may differ; none of them affects the blocks."""

SHARED = (
    *("preset", "optimizer", "schedule", "lr_scheduler", "lr_scheduler_config", "match", "match_to", "layerwise_lr"),
    *("compile", "grad_checkpointing"),
)
"""Arguments that :class:`LitMultiTask` passes to all tasks."""

_OF_IMAGE = ("num_classes", "image_size")
_OF_TEXT = ("vocab_size", "context_length", "separator_id", "z_loss", "cross_documents")


@TASKS.register("LitMultiTask")
class LitMultiTask(LitTask):
    """Train one set of blocks on several tasks at once.

    A training batch is ``{task name: batch of that task}``. For evaluation the data provide one loader per task, in the
    same order. The loss is the weighted sum of the tasks' losses. The metrics of each task are logged under its name
    (``train/digits/loss``, ``val/digits/acc1``); ``train/loss``, ``val/loss`` and ``test/loss`` are the weighted sums.

    The tasks are submodules under their names; ``lit-tokenformer split`` writes one checkpoint per task. Stem and head
    are not shared. These hooks of a task are called: ``setup``, ``on_train_start``, ``training_loss``,
    ``validation_step``, ``test_step``, ``log_scores``, ``save_extras`` and ``load_extras``.

    Without ``tasks`` there are two, ``image`` (:class:`LitImageClassifier`) and ``text`` (:class:`LitCausalLM`), with
    the arguments of these names.

    Args:
        preset: Architecture, a name from ``lit_tokenformer.models.list_presets()``; stem, head, positions and causality
            are adapted to each task.
        num_classes: Number of classes C of ``image``; determined by the data set on the command line.
        image_size: Image side of ``image`` in pixels; determined by the data set on the command line.
        vocab_size: Vocabulary size V of ``text``; determined by the data's tokenizer on the command line.
        context_length: Maximum sequence length T of ``text`` in tokens; determined by the data's block size on the
            command line.
        separator_id: Token id that ends a document of ``text``; determined by the data on the command line.
        overrides: Fields of the architecture that replace the preset's, for all tasks.
        image: Fields of the architecture that replace the preset's, for ``image`` only; fields of the shared blocks are
            rejected.
        text: Fields of the architecture that replace the preset's, for ``text`` only; fields of the shared blocks are
            rejected.
        loss_weights: Weight of each task, 1 by default; or ``uncertainty``: the loss is the sum of ``exp(-s) L + s``
            over the tasks with trainable s (Kendall et al., arXiv 1705.07115, eq. 10, which has s / 2; here a weight
            converges to the inverse of its loss), logged as ``train/NAME/weight``.
        optimizer: Optimizer factory, called with parameter groups; one-dimensional parameters are not decayed.
        schedule: Learning rate over the fit.
        lr_scheduler: Factory of a torch scheduler that replaces ``schedule``.
        z_loss: See :class:`LitCausalLM`, for ``text``.
        cross_documents: See :class:`LitCausalLM`, for ``text``.
        compile: Whether to compile the backbones with ``torch.compile``, once per size.
        grad_checkpointing: Whether to recompute blocks in the backward pass, to save memory.
        lr_scheduler_config: Timing of ``lr_scheduler``: interval, frequency, and the monitor of ReduceLROnPlateau.
        tasks: Task classes by name, with their own arguments: :class:`LitImageClassifier`, :class:`LitCausalLM`,
            :class:`LitMaskedLM` or another :class:`LitTask` with ``preset`` and ``overrides``; in Python a class or a
            ``functools.partial`` of one. A task's ``overrides`` take precedence over the common ones. Preset,
            optimizer, learning rate, ``match`` and compilation are set for all tasks, and ignored or rejected in a
            task.
        sizes: Data sizes by task name, such as ``num_classes`` or ``vocab_size``, which replace the task's own
            arguments; set from the data on the command line.
        match: See :class:`LitCausalLM`; applies to the first task, whose blocks are shared.
        match_to: See :class:`LitCausalLM`.
        layerwise_lr: See :class:`LitCausalLM`.

    Raises:
        ValueError: For an unknown preset, incompatible sizes, an invalid task name, blocks that cannot be shared, or
            weights that name no task, are negative or all zero.

    Example:
        >>> from functools import partial
        >>> sizes = {"depth": 2, "patch_size": 4}
        >>> digits = partial(LitImageClassifier, num_classes=10, image_size=8)
        >>> prose = partial(LitCausalLM, vocab_size=257, context_length=32)
        >>> task = LitMultiTask("tokenformer_lm_tiny", overrides=sizes, tasks={"digits": digits, "prose": prose})
        >>> task(torch.zeros(1, 3, 8, 8)).shape, task(torch.zeros(1, 32, dtype=torch.long), "prose").shape
        (torch.Size([1, 10]), torch.Size([1, 32, 257]))
        >>> task.digits.backbone.blocks is task.prose.backbone.blocks
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
        tasks: dict[str, Callable[[], LitTask]] | None = None,
        sizes: dict[str, dict[str, Any]] | None = None,
        match: str | None = None,
        match_to: str | None = None,
        layerwise_lr: bool = False,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        kinds = _kinds(given)
        fixed = _checked_weights(loss_weights, kinds)
        super().__init__(None, optimizer, schedule, lr_scheduler, compile, grad_checkpointing, lr_scheduler_config)
        _check_names(kinds, {*dir(self), *dir(nn.ParameterDict), "longest"})
        _check_sizes(sizes, kinds)
        self.layerwise_lr = layerwise_lr
        for name, (kind, own) in kinds.items():
            task = kind(**_arguments(name, kind, own, given))
            self.add_module(name, task)
            if given["match"] is not None:  # all tasks use the first one's tokens
                tokens = {**self.plain(overrides), "param_tokens": task.backbone.config.param_tokens}
                given = {**given, "overrides": tokens, "match": None, "match_to": None}
        self._names = tuple(kinds)
        first = next(iter(self.backbones.values()))
        for name, model in self.backbones.items():
            _check_blocks(self._names[0], first.config, name, model.config, "tasks." if tasks else "")
            model.blocks, model.norm = first.blocks, first.norm
        self.fixed_weights = fixed
        self.log_variances = nn.ParameterDict({} if fixed else {name: nn.Parameter(torch.zeros(1)) for name in kinds})
        """s of each task, (1,), if weights are trainable."""

        self._terms: dict[str, Sequence[Tensor]] = {}
        self._gradients: dict[str, dict[nn.Parameter, Tensor]] = {}
        self._completes_step = False

        self.remember_arguments(("overrides", "image", "text"))
        self._remember_tasks(kinds, given)

    def _remember_tasks(self, kinds: Mapping[str, tuple[type[LitTask], Any]], given: Mapping[str, Any]) -> None:
        """Save plain arguments in the checkpoints, for each task and for all of them."""
        kept = dict(self.hparams)
        made = {key: kept[key] for key in ("optimizer", "lr_scheduler", "_instantiator") if key in kept}
        from_config = {name: one for name, one in (kept.get("tasks") or {}).items() if isinstance(one, Mapping)}
        specs = {}
        for name, (kind, own) in kinds.items():
            plain = _plain({**own, **from_config.get(name, {}).get("init_args", {})})
            chosen = plain.keys() - {*SHARED, *(given["sizes"] or {}).get(name, ())}
            specs[name] = {"class_path": _class_path(kind), "init_args": {key: plain[key] for key in sorted(chosen)}}
            arguments = _plain(_arguments(name, kind, plain, given))
            task = self.tasks[name]
            task.put_within(self, name)
            task.hparams.clear()  # drop the values of this task's config
            task.save_hyperparameters({**{key: arguments[key] for key in arguments if key not in MADE}, **made})
        unused = ("tasks", "sizes") if given["tasks"] is None else ("image", "text", *_OF_IMAGE, *_OF_TEXT)
        kept = {key: value for key, value in kept.items() if key not in unused}
        self.hparams.clear()
        self.save_hyperparameters(kept if given["tasks"] is None else {**kept, "tasks": specs})

    @property
    def tasks(self) -> dict[str, LitTask]:
        """Tasks by name, in the order of the data's loaders."""
        return {name: self._modules[name] for name in self._names}  # type: ignore[misc]

    @property
    def backbones(self) -> dict[str, Tokenformer]:
        return {name: task.backbone for name, task in self.tasks.items()}

    @property
    def backbone(self) -> Tokenformer:  # type: ignore[override]
        """Raise a ``ValueError``, because each task has its own backbone."""
        raise UserError("each task has its own backbone; split the checkpoint with `lit-tokenformer split`")

    @classmethod
    def architectures(cls, arguments: Mapping[str, Any]) -> dict[str, TokenformerConfig]:
        return {
            name: kind.architectures(_arguments(name, kind, own, arguments))[""]
            for name, (kind, own) in _kinds(arguments).items()
        }

    def weights(self) -> dict[str, float | Tensor]:
        """Return the current weight of each task's loss."""
        return {**self.fixed_weights, **{name: (-s).exp().squeeze() for name, s in self.log_variances.items()}}

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Compute the weighted sum of the tasks' losses, ()."""
        return _sum_of({name: self.terms(name, losses[name]) for name in self.tasks})

    def terms(self, name: str, loss: Tensor) -> list[Tensor]:
        """Compute a task's terms of the total, (): its weighted loss, and s if weights are trainable."""
        weighted = [self.weights()[name] * loss]
        return [*weighted, self.log_variances[name].squeeze()] if self.log_variances else weighted

    def forward(self, x: Tensor, task: str | None = None) -> Tensor:
        """Compute logits of one task, by default the first, from images (B, C, H, W) or token ids (B, T)."""
        return self.tasks[self._names[0] if task is None else task](x)

    def model_output(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return {name: task.model_output(batch[name]) for name, task in self.tasks.items()}

    def cost(self) -> ModelCost:
        """Return parameters, and FLOPs for one sample of each task."""
        return joint_cost(self.costs().values(), sum(parameter.numel() for parameter in self.parameters()))

    def costs(self) -> dict[str, ModelCost]:
        """Return the cost of one sample of each task on its own."""
        return {name: task.cost() for name, task in self.tasks.items()}

    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        for name, task in self.tasks.items():
            if data is not None and not hasattr(data, name):
                raise UserError(f"data.{name}: not in {type(data).__name__}; use MultiTaskDataModule")
            task.setup(stage)

    def on_train_start(self) -> None:
        super().on_train_start()
        for task in self.tasks.values():
            task.on_train_start()

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Any:
        terms: dict[str, Sequence[Tensor]] = {}
        losses: dict[str, Tensor] = {}
        for name, task in self.tasks.items():
            losses[name], count = task.total_loss(batch[name])
            share = task.share_of_step(count, batch_idx, losses[name])
            terms[name] = [term if share is None else term * share for term in self.terms(name, losses[name])]
        loss = _sum_of(terms)
        self.log("train/loss", self.total(losses).detach())
        if self.log_variances:
            self.log_dict({f"train/{name}/weight": weight for name, weight in self.weights().items()})
        self._terms = terms if self._trainer and self.trainer.accumulate_grad_batches > 1 else {}
        if self._terms and batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._gradients = {}
        # FSDP2 gathers parameters for each backward pass from an output
        return {"loss": loss, "terms": list(terms.values())} if self._terms else loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Accumulate the gradients of micro-batches separately by task, until each task's items are counted."""
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
        # from the optimizer: a sharded module has unsharded ones between forward and backward pass
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
        """Set each parameter's gradient to the sum of its tasks' gradients so far, scaled by the task's factor."""
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

    def logged_metrics(self, data: Any = None) -> set[str]:
        weights = {f"train/{name}/weight" for name in self.log_variances}
        parts = (task.logged_metrics(getattr(data, name, None)) for name, task in self.tasks.items())
        return super().logged_metrics(data).union(weights, *parts)

    def log_scores(self, stage: str) -> None:
        if self.trainer.sanity_checking:
            return  # Lightning discards its scores
        for task in self.tasks.values():
            task.log_scores(stage)
        scores = self.trainer.callback_metrics
        losses = {name: scores[task.metric(f"{stage}/loss")] for name, task in self.tasks.items()}
        self.log(f"{stage}/loss", self.total(losses), prog_bar=True, sync_dist=True)

    def save_extras(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["extras"] = {}
        for name, task in self.tasks.items():
            task.save_extras(checkpoint["extras"].setdefault(name, {}))

    def load_extras(self, checkpoint: dict[str, Any]) -> None:
        for name, task in self.tasks.items():
            task.load_extras(checkpoint.get("extras", {}).get(name, checkpoint))  # not separated in older checkpoints

    @contextmanager
    def _prevent_trainer_and_dataloaders_deepcopy(self) -> Iterator[None]:
        """Detach the trainers of nested tasks too, when Lightning copies the module."""
        whole: Any = super()
        with ExitStack() as stack:
            for task in (whole, *self.tasks.values()):
                stack.enter_context(task._prevent_trainer_and_dataloaders_deepcopy())
            yield


def _sum_of(terms: Mapping[str, Sequence[Tensor]]) -> Tensor:
    """Sum all terms, (); losses before s."""
    return torch.stack([own[place] for place in range(2) for own in terms.values() if place < len(own)]).sum()


def joint_cost(costs: Iterable[ModelCost], parameters: int) -> ModelCost:
    """Sum the cost of models with shared parameters.

    Args:
        costs: Cost of each model on its own.
        parameters: Number of distinct parameters.
    """
    every = list(costs)
    sums = {field.name: sum(getattr(cost, field.name) for cost in every) for field in dataclasses.fields(ModelCost)}
    inactive = max((cost.inactive for cost in every), default=0)  # of shared blocks
    return ModelCost(**{**sums, "parameters": parameters, "inactive": inactive})


def _kinds(given: Mapping[str, Any]) -> dict[str, tuple[type[LitTask], dict[str, Any]]]:
    """Return class and own arguments of each task, from the arguments of a :class:`LitMultiTask`.

    Raises:
        UserError: Without tasks, for a class that is not a task, and if arguments of both forms are mixed.
    """
    tasks = given.get("tasks")
    if tasks is None:
        image = {key: given[key] for key in _OF_IMAGE}
        text = {key: given[key] for key in _OF_TEXT if key in given}
        return {
            "image": (LitImageClassifier, {**image, "overrides": given["image"]}),
            "text": (LitCausalLM, {**text, "overrides": given["text"]}),
        }
    if not tasks:
        raise UserError("model.tasks: expected at least one task")
    of_two: dict[str, Any] = {name: LitTask.plain(given.get(name, {})) for name in ("image", "text")}
    of_two |= {"z_loss": given.get("z_loss"), "cross_documents": not given.get("cross_documents", True)}
    for name in of_two:
        if of_two[name]:
            raise UserError(f"model.{name}: conflicts with model.tasks; set it there")
    return {name: _class_and_arguments(name, task) for name, task in tasks.items()}


def _class_and_arguments(name: str, task: Any) -> tuple[type[LitTask], dict[str, Any]]:
    """Return class and own arguments of a task, from a class, a partial of one, or a checkpoint's mapping."""
    setting = f"model.tasks.{name}"
    if isinstance(task, Mapping):  # a checkpoint imports nothing
        known = {_class_path(kind): kind for kind in _subclasses(LitTask)}
        kind, own = known.get(str(task.get("class_path"))), task.get("init_args", {})
    else:  # jsonargparse builds a partial with the class among its arguments
        parts = (*getattr(task, "args", ()), getattr(task, "func", task))
        kind, own = next((part for part in parts if isinstance(part, type)), None), getattr(task, "keywords", {})
    if kind is None or not issubclass(kind, LitTask) or issubclass(kind, LitMultiTask):
        got = getattr(kind, "__qualname__", task)
        raise UserError(f"{setting}: expected a task class such as LitImageClassifier, got {got!r}")
    parameters = _parameters(kind)
    for key, value in own.items():
        if key not in parameters:
            raise unknown_name(setting, key, parameters)
        if key in SHARED and key != "optimizer" and value != parameters[key].default:  # the default may be a copy
            raise UserError(f"{setting}.{key}: shared by all tasks; set model.{key}")
    return kind, dict(own)


def _parameters(kind: type) -> dict[str, inspect.Parameter]:
    """Return the parameters of a class by name, with ``**kwargs`` expanded to those of its base class."""
    found: dict[str, inspect.Parameter] = {}
    for one in (one for one in kind.__mro__ if "__init__" in vars(one)):
        own = inspect.signature(one.__init__).parameters  # type: ignore[misc]
        found = {**{name: parameter for name, parameter in own.items() if name != "self"}, **found}
        variable = [name for name in found if found[name].kind is inspect.Parameter.VAR_KEYWORD]
        for name in variable:
            del found[name]
        if not variable:
            break
    return found


def _subclasses(kind: type[Any]) -> Iterator[type[Any]]:
    for one in kind.__subclasses__():
        yield one
        yield from _subclasses(one)


def _class_path(kind: type) -> str:
    module = "lit_tokenformer.tasks" if kind.__module__.startswith("lit_tokenformer.tasks.") else kind.__module__
    return f"{module}.{kind.__qualname__}"


def _arguments(name: str, kind: type[LitTask], own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Merge a task's own arguments, the shared ones, and the sizes of its data."""
    replaced = kind.required_fields if preset_config(given["preset"]).head != kind.required_fields.get("head") else {}
    overrides = {**replaced, **LitTask.plain(given["overrides"]), **LitTask.plain(own.get("overrides", {}))}
    shared = {key: given[key] for key in SHARED if key in given}
    sizes = (given.get("sizes") or {}).get(name, {})
    every = {**own, **shared, **sizes, "overrides": overrides}
    return {key: every[key] for key in every if key in _parameters(kind)}


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Convert arguments to plain values, with the set fields of an architecture only."""
    plain = {
        key: dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
        for key, value in arguments.items()
    }
    return {**plain, "overrides": LitTask.plain(plain.get("overrides", {}))}


def _check_names(names: Iterable[str], taken: Iterable[str]) -> None:
    """Raise a ``UserError`` for an invalid submodule name."""
    for name in names:
        if not name.isidentifier() or name in taken:
            reason = "it is in use" if name.isidentifier() else "expected letters, digits and underscores"
            raise UserError(f"model.tasks: invalid task name {name!r}: {reason}")


def _check_sizes(sizes: Mapping[str, Any] | None, names: Iterable[str]) -> None:
    """Raise a ``UserError`` if the data belong to other tasks."""
    if sizes is not None and {*sizes} != {*names}:
        raise UserError(f"data.tasks: expected data for {', '.join(names)}, got {', '.join(sizes)}")


def _checked_weights(weights: dict[str, float] | str | None, names: Iterable[str]) -> dict[str, float]:
    """Validate the weight of each task; empty if weights are trainable."""
    if isinstance(weights, str):
        if weights != "uncertainty":
            raise unknown_name("model.loss_weights", weights, ("uncertainty",))
        return {}
    given = {**dict.fromkeys(names, 1.0), **(weights or {})}
    for name, weight in given.items():
        if name not in names:
            raise unknown_name("model.loss_weights", name, names)
        if not 0 <= weight < math.inf:
            raise UserError(f"model.loss_weights.{name}: expected a number of at least 0, got {weight}")
    if not any(given.values()):
        raise UserError("model.loss_weights: all are 0 (expected at least one above 0)")
    return given


def _check_blocks(first: str, ours: Any, name: str, theirs: Any, where: str) -> None:
    """Raise a ``UserError`` if the blocks of two tasks' architectures differ."""
    for field in (one.name for one in dataclasses.fields(ours) if one.name not in OWN_FIELDS):
        if getattr(ours, field) != getattr(theirs, field):
            raise UserError(
                f"model.{where}{first}.{field}: {getattr(ours, field)} for {first} and {getattr(theirs, field)} for "
                f"{name}; the blocks are shared, set model.overrides.{field} for all tasks"
            )
