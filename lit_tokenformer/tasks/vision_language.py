"""Vision-language modeling: text about an image, in one sequence with its patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.text import CharErrorRate

from lit_tokenformer.data.text.tokenizer import Tokenizer
from lit_tokenformer.errors import UserError
from lit_tokenformer.models import BackboneOverrides, TokenformerConfig, Tokens, preset_config
from lit_tokenformer.models.heads import ImageHead
from lit_tokenformer.models.image_text import answer_scores, greedy_answers, image_text_features
from lit_tokenformer.models.modalities import add_modalities
from lit_tokenformer.registry import TASKS
from lit_tokenformer.tasks.base import LitTask
from lit_tokenformer.tasks.causal_lm import published_adamw
from lit_tokenformer.tasks.language import LitLanguageTask
from lit_tokenformer.tasks.losses import linear_cross_entropy
from lit_tokenformer.tasks.optimization import LRSchedule, LRSchedulerConfig

BLACK = -1.0
"""Value of a black pixel in a batch."""

_STEM = {"stem": "image_text"}


@TASKS.register("LitVisionLanguage")
class LitVisionLanguage(LitLanguageTask):
    """Train a backbone to answer questions about images.

    A batch is ``{"image": (B, C, H, W) float in [-1, 1], "tokens": (B, T) int64, "labels": (B, T) int64}``: question,
    separator and answer as input tokens, and the next token where it belongs to the answer or ends it, else -100. The
    patches attend to each other, the text to the patches and to the text before it. The loss is the mean over labels,
    in nats.

    The task logs ``train/loss``, ``val/loss``, ``val/exact_match`` (share of answers that are exactly right),
    ``val/char_error_rate`` (edits per character of the answer) and ``val/exact_match_blind`` (with a black image: what
    the questions alone give away); also ``test/...``. Data with groups of questions add
    ``val/exact_match/GROUP``, and data with class names ``val/acc1``, the share of images whose class name is the most
    probable answer, see :meth:`choose`. Answers are decoded greedily.

    Args:
        preset: Architecture of a causal language model with rotary positions, a name from
            ``lit_tokenformer.models.list_presets()``; in a config also ``checkpoint``.
        vocab_size: Vocabulary size V; determined by the data's tokenizer on the command line.
        context_length: Maximum length T of question and answer in tokens; determined by the data on the command line.
        image_size: Image size in pixels; determined by the data on the command line.
        separator_id: Token id between question and answer, and after the answer; determined by the data on the command
            line.
        overrides: Fields of the architecture that replace the preset's, ``patch_size`` among them.
        optimizer: Optimizer factory, called with parameter groups; one-dimensional parameters and position embeddings
            are not decayed.
        schedule: Learning rate over the fit.
        lr_scheduler: Factory of a torch scheduler that replaces ``schedule``.
        match: See :class:`LitCausalLM`.
        match_to: See :class:`LitCausalLM`.
        compile: Whether to compile the backbone with ``torch.compile``, once per size.
        grad_checkpointing: Whether to recompute blocks in the backward pass, to save memory.
        lr_scheduler_config: Timing of ``lr_scheduler``: interval, frequency, and the monitor of ReduceLROnPlateau.
        in_chans: Number of image channels; determined by the data on the command line. ``None`` for the preset's.
        image_tokens: Parameter tokens of a group for the patches in every Pattention layer, n or totals by kind, and a
            final norm of their own: the modalities share attention only. ``None`` shares all tokens.
        image_classes: Number of classes of a head for the image alone, which is not trained: that of the image model in
            ``lit-tokenformer merge``, see :meth:`classify`.

    Raises:
        ValueError: For an unknown preset, incompatible sizes, or an architecture that is not a causal language model
            with rotary positions.

    Example:
        >>> task = LitVisionLanguage("tokenformer_lm_tiny", image_size=16, overrides={"patch_size": 4})
        >>> task(torch.zeros(1, 3, 16, 16), torch.zeros(1, 8, dtype=torch.long)).shape
        torch.Size([1, 8, 257])
    """

    masked = None
    data_module = "VisionLanguageDataModule"
    scores = ("loss", "exact_match", "char_error_rate", "exact_match_blind")
    required_fields: ClassVar[Mapping[str, Any]] = {
        **_STEM,
        "head": "language",
        "positions": "rotary",
        "causal": True,
    }

    def __init__(
        self,
        preset: str = "tokenformer_lm_small",
        vocab_size: int = 257,
        context_length: int = 64,
        image_size: int | tuple[int, int] = 32,
        separator_id: int | None = None,
        overrides: BackboneOverrides = BackboneOverrides(),  # noqa: B008  (frozen)
        optimizer: OptimizerCallable = published_adamw,
        schedule: LRSchedule = LRSchedule(),  # noqa: B008  (frozen)
        lr_scheduler: LRSchedulerCallable | None = None,
        match: str | None = None,
        match_to: str | None = None,
        compile: bool = False,
        grad_checkpointing: bool = False,
        lr_scheduler_config: LRSchedulerConfig = LRSchedulerConfig(),  # noqa: B008  (frozen)
        in_chans: int | None = None,
        image_tokens: Tokens | None = None,
        image_classes: int = 0,
    ) -> None:
        sizes = {"vocab_size": vocab_size, "context_length": context_length, "image_size": image_size}
        given = {**_STEM, **sizes, **self.plain({"in_chans": in_chans}), **self.plain(overrides)}
        if preset_config(preset).head != "language" and "head" not in given:
            raise UserError(f"model.preset: {preset!r} is not a causal language model")
        backbone = self.make_backbone(preset, given, match, match_to)
        if image_tokens is not None:
            add_modalities(backbone, image_tokens)
        super().__init__(backbone, optimizer, schedule, lr_scheduler, compile, grad_checkpointing, lr_scheduler_config)
        self.remember_arguments()
        self.separator_id = separator_id
        self._image_tokens = image_tokens
        self.classifier = None
        if image_classes:
            config = backbone.config
            self.classifier = ImageHead(config.dim, image_classes, config.global_pool, config.num_prefix_tokens)
            self.classifier.requires_grad_(False)
        self._metrics = nn.ModuleDict()

    @classmethod
    def architectures(cls, arguments: Mapping[str, Any]) -> dict[str, TokenformerConfig]:
        return super().architectures({**arguments, "overrides": {**_STEM, **arguments["overrides"]}})

    def setup(self, stage: str) -> None:
        super().setup(stage)
        data, config = self.task_data, self.backbone.config
        for name in ("image_size", "in_chans"):
            own, theirs = getattr(config, name), getattr(data, name, getattr(config, name))
            if theirs != own:
                raise UserError(f"model.{name}: does not match the data (got {own}, expected {theirs})")
        for part in ("val", "test"):
            for name in ("exact_match", "exact_match_blind", *self._data_scores(data)):
                self._add_metric(f"{part}/{name}", MeanMetric())
            self._add_metric(f"{part}/char_error_rate", CharErrorRate())

    def logged_metrics(self, data: Any = None) -> set[str]:
        scores = self._data_scores(self.task_data if data is None else data)
        return super().logged_metrics(data) | {self.metric(f"val/{name}") for name in scores}

    @staticmethod
    def _data_scores(data: Any) -> list[str]:
        """Return the names of scores that depend on the data: groups of questions, and class names."""
        groups = [f"exact_match/{name}" for name in getattr(data, "group_names", ())]
        return [*groups, "acc1"] if getattr(data, "class_names", ()) else groups

    def _add_metric(self, name: str, metric: Metric) -> None:
        if name not in self._metrics:
            self._metrics[name] = metric.to(self.device)

    @property
    def _groups(self) -> tuple[str, ...]:
        """Group names of questions."""
        return tuple(getattr(self.task_data, "group_names", ()))

    @property
    def _classes(self) -> tuple[str, ...]:
        """Answers to choose from."""
        return tuple(getattr(self.task_data, "class_names", ()))

    def forward(self, image: Tensor, tokens: Tensor) -> Tensor:
        """Map images (B, C, H, W) and the texts after them (B, T) to logits (B, T, V)."""
        return self.feature_logits(image_text_features(self.backbone, tokens, image))

    def classify(self, image: Tensor) -> Tensor:
        """Map images (B, C, H, W) to the class logits (B, classes) of a merged image model.

        Raises:
            UserError: Without ``image_classes``.
        """
        if self.classifier is None:
            raise UserError("image_classes: the model has no classes (expected a checkpoint of `merge`)")
        return self.classifier(image_text_features(self.backbone, None, image))

    def choose(self, image: Tensor, question: str, answers: Sequence[str]) -> Tensor:
        """Compute the probability of each answer to a question, (B, answers): zero-shot classification.

        Args:
            image: Images, (B, C, H, W).
            question: The question.
            answers: Answers to choose from, such as class names.
        """
        tokenizer = self.tokenizer
        prompt = torch.tensor([*tokenizer.encode(question), tokenizer.separator_id], device=image.device)
        encoded = [tokenizer.encode(answer) for answer in answers]
        return answer_scores(self.backbone, image, prompt, encoded, tokenizer.separator_id).softmax(dim=-1)

    def put_within(self, task: LitTask, name: str) -> None:
        if self._image_tokens is not None:  # the blocks are shared with tasks that know of no modalities
            raise UserError(f"model.tasks.{name}.image_tokens: unsupported with several tasks (expected null)")
        super().put_within(task, name)

    def check_architecture(self, checkpoint: Mapping[str, Any]) -> None:
        if self._image_tokens is not None:
            add_modalities(self.backbone, self._image_tokens)  # to the blocks of a grown depth
        super().check_architecture(checkpoint)

    def model_output(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Compute logits of the first text of a batch, (1, T, V)."""
        return self(batch["image"][:1], batch["tokens"][:1])

    def batch_features(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Compute the input of the vocabulary projection (B, T, D), and the labels (B, T)."""
        return image_text_features(self.backbone, batch["tokens"], batch["image"]), batch["labels"]

    def feature_loss(self, features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.backbone.get_classifier().weight
        total, count = linear_cross_entropy(features, weight, target)  # type: ignore[arg-type]
        return total / count.clamp_min(1), count

    def feature_logits(self, features: Tensor) -> Tensor:
        return F.linear(features, self.backbone.get_classifier().weight)  # type: ignore[arg-type]

    def training_loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        loss, count = self.feature_loss(*self.batch_features(batch))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["tokens"]))
        return loss, count

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> list[dict[str, str]]:
        """Answer the questions of a batch: ``question``, ``answer`` and ``target`` of each sample."""
        tokenizer, starts = self.tokenizer, self._starts(batch)
        questions = [tokenizer.decode(row[:end].tolist()) for row, end in zip(batch["tokens"], starts, strict=True)]
        cells = zip(questions, self.answer_batch(batch), self.decode_labels(batch["labels"]), strict=True)
        return [{"question": one[0], "answer": one[1], "target": one[2]} for one in cells]

    def _evaluate(self, batch: Mapping[str, Tensor], stage: str) -> None:
        features, labels = self.batch_features(batch)
        loss, count = self.feature_loss(features, labels)
        self.log(f"{stage}/loss", loss, batch_size=self.log_weight(int(count)), sync_dist=True, prog_bar=True)
        right = self._right(features, labels)
        blind = {**batch, "image": torch.full_like(batch["image"], BLACK)}
        self._update(f"{stage}/exact_match", right.float())
        self._update(f"{stage}/exact_match_blind", self._right(*self.batch_features(blind)).float())
        for number, name in enumerate(self._groups):
            self._update(f"{stage}/exact_match/{name}", right[batch["group"] == number].float())
        if self._classes:
            names = {name: number for number, name in enumerate(self._classes)}
            best = self.choose(batch["image"], self.task_data.settings.question, self._classes).argmax(dim=-1)
            label = torch.tensor([names[answer] for answer in self.decode_labels(labels)], device=best.device)
            self._update(f"{stage}/acc1", (best == label).float())
        if self.device_mesh is not None:  # processes would decode different numbers of tokens
            return
        answers = self.decode_labels(labels)
        wrong = [number for number, one in enumerate(right.tolist()) if not one]
        given = dict(zip(wrong, self.answer_batch(batch, wrong), strict=True))
        self._update(f"{stage}/char_error_rate", [given.get(i, one) for i, one in enumerate(answers)], answers)

    def _update(self, name: str, *values: Any) -> None:
        metric: Any = self._metrics[name]
        metric.update(*values)
        self.log(name, metric, prog_bar=name.endswith(("exact_match", "error_rate")), batch_size=1)

    def _right(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return whether greedy decoding yields exactly the labels of each sample, (B,) bool.

        The first wrong token of an answer is the same in decoding and here, where the model reads the right ones.
        """
        return ((self.feature_logits(features).argmax(dim=-1) == labels) | (labels < 0)).all(dim=1)

    @property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the data, else that of the checkpoint."""
        found = getattr(self.task_data, "tokenizer", None)
        if found is None and self.tokenizer_json is not None:
            found = Tokenizer.from_json(self.tokenizer_json, self.separator_id, "the tokenizer in the checkpoint")
        if found is None:
            raise UserError("ckpt_path: the checkpoint has no tokenizer (expected one of a fit with text)")
        return found

    def decode_labels(self, labels: Tensor) -> list[str]:
        """Decode the answers in labels (B, T), without the separator at their end."""
        tokenizer = self.tokenizer
        rows = [[token for token in row if token >= 0] for row in labels.tolist()]
        return [tokenizer.decode(row[:-1] if row[-1:] == [tokenizer.separator_id] else row) for row in rows]

    @staticmethod
    def _starts(batch: Mapping[str, Tensor]) -> list[int]:
        """Return the index of the separator between question and answer in each text."""
        return (batch["labels"] >= 0).int().argmax(dim=1).tolist()

    def answer_batch(self, batch: Mapping[str, Tensor], rows: list[int] | None = None) -> list[str]:
        """Decode greedy answers to the questions of a batch.

        Args:
            batch: The batch; its labels mark where the answers begin.
            rows: Indices of the samples; ``None`` for all.
        """
        rows = list(range(len(batch["tokens"]))) if rows is None else rows
        if not rows:
            return []
        tokenizer, limit = self.tokenizer, self.backbone.config.context_length
        starts = self._starts(batch)
        prompts = [batch["tokens"][row, : starts[row] + 1] for row in rows]
        most = max(1, limit - max(map(len, prompts)))
        answers = greedy_answers(self.backbone, batch["image"][rows], prompts, most, tokenizer.separator_id)
        return [tokenizer.decode(answer) for answer in answers]
