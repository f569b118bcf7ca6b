"""Scores of a language model in EleutherAI's lm-evaluation-harness, by whose tasks language models are compared.

Needs the extra ``eval`` (``pip install 'lit-tokenformer[eval]'``). Tasks that are not on this machine are fetched from
the Hugging Face hub, as ever with the harness; ``include_path`` adds tasks of one's own.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lit_tokenformer.errors import UserError

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
except ImportError as error:
    raise UserError(
        f"evaluate: the lm-evaluation-harness is missing ({error}); pip install 'lit-tokenformer[eval]'"
    ) from None

from lit_tokenformer.inference.sampling import Sampling
from lit_tokenformer.inference.text import TextGenerator


@register_model("lit_tokenformer")
class HarnessModel(TemplateLM):
    """A checkpoint as the harness wants it; after ``import lit_tokenformer.inference.lm_eval`` it has the name
    ``lit_tokenformer`` there.

    Contexts that are too long lose their beginning, as with the harness's own models.

    Args:
        ckpt_path: A checkpoint of a language model, or a generator.
        batch_size: Texts that are scored at once.
        max_batch_size: Not used; the harness gives it.
        device: Where the model runs; ``auto`` takes the accelerator, if there is one.
        max_gen_toks: Tokens that are written at most where a task does not say.
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
        self.batch_size = 8 if batch_size in (None, "auto") else int(batch_size)
        self.max_gen_toks = max_gen_toks
        self.max_length = self.generator.backbone.config.context_length

    @property
    def eot_token_id(self) -> int:
        """What stands before a text without context."""
        return self.generator.tokenizer.separator_id

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's cache of requests."""
        return self.generator.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The token ids of a text, without any special ones."""
        return self.generator.tokenizer.encode(string)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts in nats, in disjoint windows as long as the context."""
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
        """What the model writes after each context, up to one of the task's stop texts.

        Draws are seeded by the context and by how often it was requested before, so that a text does not depend on its
        batch, and repeated requests get different samples.
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
            group.sort(key=lambda one: -len(one[0]))  # rows of similar length need little padding
            for start in range(0, len(group), self.batch_size):
                prompts, numbers, seeds = zip(*group[start : start + self.batch_size], strict=True)
                *_, completions = self.generator.run(prompts, length, sampling, stop, seeds)
                for number, completion in zip(numbers, completions, strict=True):
                    written[number] = completion.text
        return written

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation in nats, and whether it is what greedy decoding would write."""
        pairs = [(context + target)[-self.max_length - 1 :] for _, context, target in requests]
        order = sorted(range(len(pairs)), key=lambda number: len(pairs[number]), reverse=True)
        found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            targets = [requests[number][2][-self.max_length :] for number in batch]
            scores = self._score([pairs[number] for number in batch], targets)
            found[start : start + len(batch)] = scores
        return [score for _, score in sorted(zip(order, found, strict=True))]

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
    """The harness's tasks; reading their files takes seconds."""
    return TaskManager(include_path=include_path)


def evaluate(
    generator: TextGenerator,
    tasks: Sequence[str],
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int = 8,
    include_path: str | None = None,
) -> dict[str, Any]:
    """The harness's results for a model.

    Args:
        generator: The model with its tokenizer.
        tasks: Names of the harness's tasks, or patterns such as ``blimp_*``.
        num_fewshot: Solved examples before each question; ``None`` for what the task says.
        limit: Only so many questions of each task, or this share of them if below 1.
        batch_size: Texts that are scored at once.
        include_path: Folder with tasks of one's own.

    Returns:
        As ``lm_eval.simple_evaluate``.

    Raises:
        ValueError: For a task that the harness does not know.
    """
    manager = _tasks(include_path)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown or not tasks:
        raise UserError(f"tasks: the harness knows no task named {', '.join(unknown) or '(none given)'}")
    found = simple_evaluate(
        model=HarnessModel(generator, batch_size=batch_size),
        tasks=manager.match_tasks(list(tasks)),
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        log_samples=False,
    )
    assert found is not None  # only the first of several processes gets results, and there is one
    return dict(found)


def as_table(results: dict[str, Any]) -> str:
    """The results of :func:`evaluate` as the harness shows them."""
    return make_table(results)
