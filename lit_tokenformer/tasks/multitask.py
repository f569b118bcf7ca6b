"""Several tasks in the same training step, whose backbones share their blocks.

A block knows nothing of causality, positions or input: those come from each backbone's own config. So all backbones
can have the same blocks and the same final norm, and only stem and head are their own.
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
from lit_tokenformer.tasks.optimization import scale_
from lit_tokenformer.tasks.schedule import LRSchedule, LRSchedulerConfig

OWN_FIELDS = {
    *("stem", "head", "positions", "causal", "rotary_fraction", "rotary_base", "stem_norm", "tie_embeddings", "unpad"),
    *("image_size", "patch_size", "in_chans", "num_classes", "global_pool", "class_token"),
    *("vocab_size", "context_length"),
}
"""Fields of the architecture in which the tasks may differ: none of what the blocks are made of."""

SHARED = (
    *("preset", "optimizer", "schedule", "lr_scheduler", "lr_scheduler_config", "match", "match_to", "layerwise_lr"),
    *("compile", "grad_checkpointing"),
)
"""Arguments that all tasks get from :class:`LitMultiTask`."""

_OF_IMAGE = ("num_classes", "image_size")
_OF_TEXT = ("vocab_size", "context_length", "separator_id", "z_loss", "cross_documents")


@TASKS.register("LitMultiTask")
class LitMultiTask(LitTask):
    """Train one set of blocks on any number of tasks at once.

    A training batch is ``{task name: that task's batch}``; for evaluation the data give one loader for each task, in
    the same order. The loss is the sum of the tasks' losses, each with its weight. What each task logs by itself is
    logged here under its name (``train/digits/loss``, ``val/digits/acc1``); ``train/loss``, ``val/loss`` and
    ``test/loss`` are the weighted sums.

    The tasks are submodules under their names; ``lit-tokenformer split`` makes a checkpoint of each. Their stems and
    heads are their own. Of a task's hooks these are called: ``setup``, ``on_train_start``, ``training_loss``,
    ``validation_step``, ``test_step``, ``log_scores``, ``save_extras`` and ``load_extras``.

    Without ``tasks`` there are two, ``image`` (:class:`LitImageClassifier`) and ``text`` (:class:`LitCausalLM`), with
    the arguments of these names.

    Args:
        preset: Architecture, a name from ``lit_tokenformer.models.list_presets()``; stem, head, positions and causality
            change for tasks that need others.
        num_classes: Classes of ``image``, C; on the command line the data set decides.
        image_size: Side of the images of ``image`` in pixels; on the command line the data set decides.
        vocab_size: Token ids of ``text``, V; on the command line the data's tokenizer decides.
        context_length: Longest ``text`` in tokens, T; on the command line the data's block size decides.
        separator_id: Token id that ends a document of ``text``; on the command line the data decide.
        overrides: Fields of the architecture that replace the preset's, for all tasks.
        image: The same for ``image`` alone; fields of the blocks, which are shared, are rejected.
        text: The same for ``text`` alone.
        loss_weights: A weight for each task, 1 where none is given; or ``uncertainty``: the loss is the sum of
            ``exp(-s) L + s`` over the tasks with learned s (Kendall et al., arXiv 1705.07115, eq. 10, which has s / 2;
            here a weight comes to rest where weight times loss is 1), logged as ``train/NAME/weight``.
        optimizer: Makes the optimizer from parameter groups; decay spares one-dimensional parameters.
        schedule: Learning rate over the fit.
        lr_scheduler: A torch scheduler that takes the place of ``schedule``.
        z_loss: As of :class:`LitCausalLM`, for ``text``.
        cross_documents: As of :class:`LitCausalLM`, for ``text``.
        compile: Whether the backbones are compiled with ``torch.compile``, once for each size.
        grad_checkpointing: Whether blocks are computed again in the backward pass, to save memory.
        lr_scheduler_config: When ``lr_scheduler`` steps: interval, frequency, and the monitor of ReduceLROnPlateau.
        tasks: Task classes by name, with arguments of their own: :class:`LitImageClassifier`, :class:`LitCausalLM`,
            :class:`LitMaskedLM` or another :class:`LitTask` with ``preset`` and ``overrides``; in Python a class or a
            ``functools.partial`` of one. A task's ``overrides`` replace those of all. Preset, optimizer, learning
            rate, ``match`` and compilation are set for all tasks, and ignored or rejected in a task.
        sizes: Sizes of each task's data by task name, such as ``num_classes`` or ``vocab_size``, in place of the task's
            own arguments; set from the data on the command line.
        match: As of :class:`LitCausalLM`, for the first task; all have the same blocks.
        match_to: As of :class:`LitCausalLM`.
        layerwise_lr: As of :class:`LitCausalLM`.

    Raises:
        ValueError: For an unknown preset, sizes that do not fit each other, a name that cannot be a task's, blocks that
            could not be shared, or weights that name no task, are negative or all zero.

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
            if given["match"] is not None:  # the first task's tokens are those of all
                tokens = {**self.plain(overrides), "param_tokens": task.backbone.config.param_tokens}
                given = {**given, "overrides": tokens, "match": None, "match_to": None}
        self._names = tuple(kinds)
        first = next(iter(self.backbones.values()))
        for name, model in self.backbones.items():
            _check_blocks(self._names[0], first.config, name, model.config, "tasks." if tasks else "")
            model.blocks, model.norm = first.blocks, first.norm
        self.fixed_weights = fixed
        self.log_variances = nn.ParameterDict({} if fixed else {name: nn.Parameter(torch.zeros(1)) for name in kinds})
        """s of each task, (1,), where weights are learned."""

        self._terms: dict[str, Sequence[Tensor]] = {}
        self._gradients: dict[str, dict[nn.Parameter, Tensor]] = {}
        self._completes_step = False

        self.remember_arguments(("overrides", "image", "text"))
        self._remember_tasks(kinds, given)

    def _remember_tasks(self, kinds: Mapping[str, tuple[type[LitTask], Any]], given: Mapping[str, Any]) -> None:
        """Keep plain arguments in the checkpoints, for each task and for all of them."""
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
            task.hparams.clear()  # else what a config gave for this task
            task.save_hyperparameters({**{key: arguments[key] for key in arguments if key not in MADE}, **made})
        unused = ("tasks", "sizes") if given["tasks"] is None else ("image", "text", *_OF_IMAGE, *_OF_TEXT)
        kept = {key: value for key, value in kept.items() if key not in unused}
        self.hparams.clear()
        self.save_hyperparameters(kept if given["tasks"] is None else {**kept, "tasks": specs})

    @property
    def tasks(self) -> dict[str, LitTask]:
        """The tasks by name, in the order of the data's loaders."""
        return {name: self._modules[name] for name in self._names}  # type: ignore[misc]

    @property
    def backbones(self) -> dict[str, Tokenformer]:
        return {name: task.backbone for name, task in self.tasks.items()}

    @property
    def backbone(self) -> Tokenformer:  # type: ignore[override]
        """Refused with a ``ValueError``, for there is one for each task."""
        raise UserError("several tasks have several backbones; take them apart with `lit-tokenformer split`")

    @classmethod
    def architectures(cls, arguments: Mapping[str, Any]) -> dict[str, TokenformerConfig]:
        return {
            name: kind.architectures(_arguments(name, kind, own, arguments))[""]
            for name, (kind, own) in _kinds(arguments).items()
        }

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

    def forward(self, x: Tensor, task: str | None = None) -> Tensor:
        """Logits of one of the tasks, by default the first: for images (B, C, H, W), or for token ids (B, T)."""
        return self.tasks[self._names[0] if task is None else task](x)

    def model_output(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return {name: task.model_output(batch[name]) for name, task in self.tasks.items()}

    def cost(self) -> ModelCost:
        """Parameters, and operations for one sample of each task."""
        return joint_cost(self.costs().values(), sum(parameter.numel() for parameter in self.parameters()))

    def costs(self) -> dict[str, ModelCost]:
        """What each task would cost by itself, for one of its samples."""
        return {name: task.cost() for name, task in self.tasks.items()}

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
            losses[name], count = task.total_loss(batch[name])
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
        checkpoint["extras"] = {}
        for name, task in self.tasks.items():
            task.save_extras(checkpoint["extras"].setdefault(name, {}))

    def load_extras(self, checkpoint: dict[str, Any]) -> None:
        for name, task in self.tasks.items():
            task.load_extras(checkpoint.get("extras", {}).get(name, checkpoint))  # which older checkpoints mix

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


def _kinds(given: Mapping[str, Any]) -> dict[str, tuple[type[LitTask], dict[str, Any]]]:
    """Class and own arguments of each task, from the arguments of a :class:`LitMultiTask`.

    Raises:
        UserError: If there is no task, one is not of a task's class, or arguments of two forms are mixed.
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
            raise UserError(f"model.{name}: set it in model.tasks, which replaces it")
    return {name: _class_and_arguments(name, task) for name, task in tasks.items()}


def _class_and_arguments(name: str, task: Any) -> tuple[type[LitTask], dict[str, Any]]:
    """Class and own arguments of a task: of a class, of a partial of one, or of what a checkpoint has of it."""
    setting = f"model.tasks.{name}"
    if isinstance(task, Mapping):  # nothing is imported for a checkpoint
        known = {_class_path(kind): kind for kind in _subclasses(LitTask)}
        kind, own = known.get(str(task.get("class_path"))), task.get("init_args", {})
    else:  # jsonargparse makes a partial with the class among its arguments
        parts = (*getattr(task, "args", ()), getattr(task, "func", task))
        kind, own = next((part for part in parts if isinstance(part, type)), None), getattr(task, "keywords", {})
    if kind is None or not issubclass(kind, LitTask) or issubclass(kind, LitMultiTask):
        got = getattr(kind, "__qualname__", task)
        raise UserError(f"{setting}: expected a task class such as LitImageClassifier, got {got!r}")
    parameters = _parameters(kind)
    for key, value in own.items():
        if key not in parameters:
            raise unknown_name(setting, key, parameters)
        if key in SHARED and key != "optimizer" and value != parameters[key].default:  # its default may be a copy
            raise UserError(f"{setting}.{key}: all tasks share it; set model.{key}")
    return kind, dict(own)


def _parameters(kind: type) -> dict[str, inspect.Parameter]:
    """Parameters of a class by name; ``**kwargs`` stand for those of the class that it inherits from."""
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
    """Arguments of a task: its own, the shared ones, and the sizes of its data."""
    replaced = kind.required_fields if preset_config(given["preset"]).head != kind.required_fields.get("head") else {}
    overrides = {**replaced, **LitTask.plain(given["overrides"]), **LitTask.plain(own.get("overrides", {}))}
    shared = {key: given[key] for key in SHARED if key in given}
    sizes = (given.get("sizes") or {}).get(name, {})
    every = {**own, **shared, **sizes, "overrides": overrides}
    return {key: every[key] for key in every if key in _parameters(kind)}


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as plain values; fields of an architecture only where they are set."""
    plain = {
        key: dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
        for key, value in arguments.items()
    }
    return {**plain, "overrides": LitTask.plain(plain.get("overrides", {}))}


def _check_names(names: Iterable[str], taken: Iterable[str]) -> None:
    """Raise a ``UserError`` for a name that cannot be that of a submodule."""
    for name in names:
        if not name.isidentifier() or name in taken:
            reason = "it is in use" if name.isidentifier() else "expected letters, digits and underscores"
            raise UserError(f"model.tasks: {name!r} cannot be the name of a task: {reason}")


def _check_sizes(sizes: Mapping[str, Any] | None, names: Iterable[str]) -> None:
    """Raise a ``UserError`` if data are of other tasks."""
    if sizes is not None and {*sizes} != {*names}:
        raise UserError(f"data.tasks: expected data for {', '.join(names)}, got {', '.join(sizes)}")


def _checked_weights(weights: dict[str, float] | str | None, names: Iterable[str]) -> dict[str, float]:
    """A weight for each task; none at all where they are learned."""
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
        raise UserError("model.loss_weights: all are 0, so nothing would be learned")
    return given


def _check_blocks(first: str, ours: Any, name: str, theirs: Any, where: str) -> None:
    """Raise a ``UserError`` if the blocks of two tasks' architectures are not the same."""
    for field in (one.name for one in dataclasses.fields(ours) if one.name not in OWN_FIELDS):
        if getattr(ours, field) != getattr(theirs, field):
            raise UserError(
                f"model.{where}{first}.{field}: {getattr(ours, field)} for {first} and {getattr(theirs, field)} for "
                f"{name}; the blocks are shared, set model.overrides.{field} for all tasks"
            )
