"""Evaluation of language models on the tasks of EleutherAI's lm-evaluation-harness.

Requires the extra ``eval`` (``pip install 'lit-tokenformer[eval]'``). The harness downloads missing task data from the
Hugging Face hub; ``include_path`` adds custom tasks.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error
from torch import Tensor

from lit_tokenformer.errors import UserError

try:
    import lm_eval.models  # noqa: F401  # the harness registers its own models only into an empty registry
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
except ImportError as error:
    raise UserError(
        f"evaluate: the lm-evaluation-harness is not installed ({error}); pip install 'lit-tokenformer[eval]'"
    ) from None

from lit_tokenformer.inference.sampling import Sampling
from lit_tokenformer.inference.text import TextGenerator


@register_model("lit_tokenformer")
class HarnessModel(TemplateLM):
    """Harness model of a checkpoint, registered as ``lit_tokenformer`` on import of this module.

    Contexts longer than the model's are truncated on the left, as in the harness's own models.

    Args:
        ckpt_path: Checkpoint of a language model, or a generator.
        batch_size: Number of texts scored per batch; ``auto`` starts at 64 and halves it when memory runs out.
        max_batch_size: Batch size at which ``auto`` starts.
        device: Device of the model; ``auto`` selects the accelerator, if available.
        max_gen_toks: Maximum number of new tokens, for tasks without their own.
    """

    def __init__(
        self,
        ckpt_path: str | TextGenerator,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_gen_toks: int = 256,
    ) -> None:
        super().__init__()
        generator = ckpt_path
        if not isinstance(generator, TextGenerator):
            generator = TextGenerator.load(generator, device or "auto")
        self.generator = generator
        self._shrinks = str(batch_size).startswith("auto")
        self.batch_size = (max_batch_size or 64) if self._shrinks else int(batch_size)
        self.max_gen_toks = max_gen_toks
        self.max_length = self.generator.backbone.config.context_length

    @property
    def eot_token_id(self) -> int:
        """Token id prepended to a text without context."""
        return self.generator.tokenizer.separator_id

    @property
    def tokenizer_name(self) -> str:
        """Key of the tokenizer in the harness's request cache."""
        return self.generator.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Encode a text without special tokens."""
        return self.generator.tokenizer.encode(string)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Compute the log-likelihood of whole texts in nats, in disjoint windows of the context length."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.eot_token_id, self.max_length, 1):
                windows.append((("", ""), *make_disjoint_window(window)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += score
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate a continuation of each context, up to one of the task's stop strings.

        Sampling is seeded by the context and its number of previous requests. A text does not depend on its batch, and
        repeated requests return different samples.
        """
        written = [""] * len(requests)
        groups: dict[Any, list[tuple[list[int], int, int]]] = {}
        repeats: Counter[str] = Counter()
        for number, request in enumerate(requests):
            context, settings = request.args
            length = min(int(settings.get("max_gen_toks", self.max_gen_toks)), self.max_length - 1)
            until = settings.get("until") or []
            temperature = float(settings.get("temperature", 0.0)) if settings.get("do_sample") else 0.0
            sampling = Sampling(temperature, settings.get("top_k"), settings.get("top_p"))
            stop = (until,) if isinstance(until, str) else tuple(until)
            kept = self.tok_encode(context)[length - self.max_length :]
            seed = int.from_bytes(hashlib.sha256(context.encode()).digest()[:7], "big") + repeats[context]
            repeats[context] += 1
            groups.setdefault((length, sampling, stop), []).append((kept, number, seed))
        for (length, sampling, stop), group in groups.items():
            group.sort(key=lambda one: -len(one[0]))  # to reduce padding

            def complete(batch: list[Any]) -> list[Any]:
                prompts, _, seeds = zip(*batch, strict=True)
                *_, completions = self.generator.run(prompts, length, sampling, stop, seeds)  # noqa: B023
                return [completion.text for completion in completions]

            for (_, number, _), text in zip(group, self._in_batches(group, complete), strict=True):
                written[number] = text
        return written

    def _in_batches(self, items: list[Any], function: Callable[[list[Any]], list[Any]]) -> list[Any]:
        """Apply a function to batches of items; with ``auto``, halve the batch size when memory runs out."""
        found: list[Any] = []
        while len(found) < len(items):
            batch = items[len(found) : len(found) + self.batch_size]
            try:
                found += function(batch)
            except RuntimeError as error:
                if not (self._shrinks and len(batch) > 1 and is_oom_error(error)):
                    raise
                self.batch_size = len(batch) // 2
                garbage_collection_cuda()
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Compute the log-likelihood of each continuation in nats, and whether greedy decoding produces it."""
        pairs = [(context + target)[-self.max_length - 1 :] for _, context, target in requests]
        order = sorted(range(len(pairs)), key=lambda number: len(pairs[number]), reverse=True)

        def score(batch: list[int]) -> list[tuple[float, bool]]:
            targets = [requests[number][2][-self.max_length :] for number in batch]
            return self._score([pairs[number] for number in batch], targets)

        return [one for _, one in sorted(zip(order, self._in_batches(order, score), strict=True))]

    @torch.inference_mode()
    def _score(self, sequences: list[list[int]], targets: list[list[int]]) -> list[tuple[float, bool]]:
        backbone = self.generator.backbone
        device = next(backbone.parameters()).device
        rows = [torch.tensor(sequence[:-1]) for sequence in sequences]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)  # (B, T), padded on the right
        features = backbone(tokens, pre_logits=True)  # (B, T, D)
        scores = []
        for row, sequence, target in zip(features, sequences, targets, strict=True):
            end = len(sequence) - 1
            logits: Tensor = backbone.forward_head(row[end - len(target) : end]).float()  # (n, V)
            labels = torch.tensor(target, device=device)
            log_probs = logits.log_softmax(dim=-1).gather(1, labels[:, None])
            scores.append((log_probs.sum().item(), bool((logits.argmax(dim=-1) == labels).all())))
        return scores


@lru_cache(maxsize=2)
def _tasks(include_path: str | None) -> TaskManager:
    """Load the harness's tasks, which takes seconds."""
    return TaskManager(include_path=include_path)


def evaluate(
    generator: TextGenerator,
    tasks: Sequence[str],
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int | str = 8,
    include_path: str | None = None,
    log_samples: bool = False,
) -> dict[str, Any]:
    """Evaluate a model on tasks of the harness.

    Args:
        generator: Model with its tokenizer.
        tasks: Names of the harness's tasks, or patterns such as ``blimp_*``.
        num_fewshot: Number of few-shot examples; ``None`` for the task's default.
        limit: Maximum number of questions per task, or a fraction of them if below 1.
        batch_size: Number of texts scored per batch, or ``auto``.
        include_path: Folder of custom tasks.
        log_samples: Keep each document with the model's responses, under ``samples``.

    Returns:
        Results of ``lm_eval.simple_evaluate``.

    Raises:
        ValueError: For an unknown task.
    """
    manager = _tasks(include_path)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown or not tasks:
        raise UserError(f"tasks: unknown to the harness (got {', '.join(unknown) or 'none'})")
    model = HarnessModel(generator, batch_size=batch_size)
    found = simple_evaluate(
        model=model,
        tasks=manager.match_tasks(list(tasks)),
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        log_samples=log_samples,
    )
    assert found is not None  # results are returned on rank zero only, and this is a single process
    device = next(generator.backbone.parameters()).device
    found["config"] |= {"model": "lit_tokenformer", "batch_size": model.batch_size, "device": str(device)}
    return dict(found)


def task_list(include_path: str | None = None) -> str:
    """List the names of the harness's tasks, as ``lm_eval --tasks list`` does.

    Args:
        include_path: Folder of custom tasks.
    """
    return str(_tasks(include_path).list_all_tasks())


def as_table(results: dict[str, Any]) -> str:
    """Format the results of :func:`evaluate` as the harness's table."""
    return make_table(results)
