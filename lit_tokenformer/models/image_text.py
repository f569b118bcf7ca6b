"""Image and text in one sequence: patches as a bidirectional prefix, text causal after it.

Sources: prefix-LM attention over patch embeddings without an image encoder of their own, as in EVE (arXiv 2406.11832,
section 3); here the question is causal too. Patches have learned positions and share rotary position 0, so that among
themselves they attend as in the image model; text has positions 1, 2, ..., which is the text model up to a shift.

Shapes: B batch, P data tokens of the image (its patches and, with a class token, one more), T data tokens of the text,
D width, S data tokens including those in the decoding state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_tokenformer.models.backbone import Tokenformer
from lit_tokenformer.models.config import TokenformerConfig
from lit_tokenformer.models.decoding import DecodingState
from lit_tokenformer.models.modalities import ModalityGate
from lit_tokenformer.models.part_cost import Cost, count_parameters
from lit_tokenformer.models.stems import PatchStem, TokenStem
from lit_tokenformer.registry import STEMS

POSITION_STD = 0.5
"""Initial standard deviation of the learned positions: about that of embedded patches, since they have no others."""


@STEMS.register("image_text", head=("language",), positions=("rotary",), patch_drop_rate=(0,), causal=(True,))
class ImageTextStem(TokenStem):
    """Token embedding for text, and a patch embedding with learned positions for the image before it.

    Args:
        config: Architecture; ``context_length`` is that of the text.

    Attributes:
        image: Patch embedding, (B, C, height, width) -> (B, P, D).
        length: Data tokens of an image, P.
        gate: Gate of groups by modality, if the model has them; it holds the data tokens of the image read next.
    """

    def __init__(self, config: TokenformerConfig) -> None:
        super().__init__(config)
        self.image = PatchStem(config)
        self.length = PatchStem.num_positions(config)
        self.gate = ModalityGate()
        nn.init.normal_(self.image.pos_embed, std=POSITION_STD)

    def forward(
        self,
        tokens: Tensor | None,
        start: int = 0,
        padding: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Token ids (B, T), or image and text together in ``inputs_embeds``, -> (B, T, D)."""
        if inputs_embeds is None:
            self.gate.prefix = 0  # text alone
        return super().forward(tokens, start, padding, position_ids, inputs_embeds)

    @staticmethod
    def num_positions(config: TokenformerConfig) -> int:
        """Sequence length of an image and a text of ``context_length``, P + T."""
        return PatchStem.num_positions(config) + config.context_length

    @staticmethod
    def length_limit(config: TokenformerConfig) -> int:
        """Maximum length of the text in data tokens, T."""
        return config.context_length

    def cost(self, length: int) -> Cost:
        """Cost per sample."""
        return Cost(count_parameters(self), self.image.cost(length).flops, length * self.embedding.embedding_dim)


def prefix_mask(
    prefix: int, start: int, length: int, padding: Tensor | None = None, device: torch.device | None = None
) -> Tensor:
    """Attention mask of a bidirectional prefix with causal text after it, (B | 1, 1, T, S) bool, true to attend.

    Args:
        prefix: Data tokens of the prefix, P.
        start: Data tokens in the decoding state.
        length: Data tokens that attend, T.
        padding: Left padding of each text, between prefix and text, in data tokens, (B,) int64.
        device: Device of the mask.

    Example:
        >>> prefix_mask(2, 0, 4).int()[0, 0]
        tensor([[1, 1, 0, 0],
                [1, 1, 0, 0],
                [1, 1, 1, 0],
                [1, 1, 1, 1]], dtype=torch.int32)
    """
    columns = torch.arange(start + length, device=device)
    rows = torch.arange(start, start + length, device=device)[:, None]
    text = ((columns <= rows) & (rows >= prefix))[None, None]  # (1, 1, T, S)
    if padding is not None:
        text = text & (columns >= prefix + padding[:, None, None, None])  # (B, 1, T, S)
    return text | (columns < prefix)


def image_text_features(
    model: Tokenformer,
    tokens: Tensor | None,
    image: Tensor | None = None,
    state: DecodingState | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """Compute the normalized features (B, T, D) of a text after an image, or those of the image, (B, P, D).

    Args:
        model: Backbone with the stem ``image_text``.
        tokens: Token ids, (B, T) int64; ``None`` for the image alone.
        image: Images, (B, C, height, width); ``None`` if the state has read them.
        state: Decoding state, updated in place.
        padding: Left padding of each text in data tokens, (B,) int64.
    """
    stem: ImageTextStem = model.stem
    prefix, start = stem.length, 0 if state is None else state.start
    parts = ([] if image is None else [stem.image(image)]) + ([] if tokens is None else [stem.embedding(tokens)])
    x = torch.cat(parts, dim=1)  # (B, P + T, D)
    length = x.shape[1]
    places = torch.arange(start, start + length, device=x.device)[None] - (prefix - 1)  # 1 for the first of the text
    if padding is not None:
        places = torch.where(places > 0, (places - padding[:, None]).clamp_min(1), places)
    stem.gate.prefix = 0 if image is None else prefix
    mask = None if length == 1 and padding is None else prefix_mask(prefix, start, length, padding, x.device)
    given: dict[str, Any] = {"inputs_embeds": x, "attention_mask": mask, "position_ids": places.clamp_min(0)}
    # not model(...) with a state: a compiled model would be recompiled for each length
    features = model(**given, pre_logits=True) if state is None else model.forward_features(**given, state=state)
    return features if image is None or tokens is None else features[:, prefix:]


class ImageTextReader:
    """Incremental decoder of texts after images, prompts of different lengths included.

    Args:
        model: Backbone with the stem ``image_text``.
        image: Images, (B, C, height, width).
        prompts: Token ids of each prompt, (T,) int64 each, at least one.
        length: Capacity in data tokens of prompt and continuation.
        cache: Whether to use the decoding state; without it, every token recomputes image and text.
    """

    def __init__(
        self, model: Tokenformer, image: Tensor, prompts: Sequence[Tensor], length: int, cache: bool = True
    ) -> None:
        longest = max(len(row) for row in prompts)
        self.model, self.image = model, image
        self.tokens = torch.stack([torch.cat([row.new_zeros(longest - len(row)), row]) for row in prompts])
        self.tokens = self.tokens.to(image.device)
        padding = torch.tensor([longest - len(row) for row in prompts], device=image.device)
        self.padding = padding if len({len(row) for row in prompts}) > 1 else None
        self.state = model.new_state(model.stem.length + length) if cache else None

    def __call__(self, tokens: Tensor | None) -> Tensor:
        """Read images and prompts (``None``), or the last tokens (B, 1), and return the next logits (B, V)."""
        if self.state is None:
            self.tokens = self.tokens if tokens is None else torch.cat([self.tokens, tokens], dim=1)
            features = image_text_features(self.model, self.tokens, self.image, None, self.padding)
        elif tokens is None:
            features = image_text_features(self.model, self.tokens, self.image, self.state, self.padding)
        else:
            features = image_text_features(self.model, tokens, None, self.state, self.padding)
        return self.model.forward_head(features[:, -1:])[:, 0]


@torch.no_grad()
def greedy_answers(
    model: Tokenformer, image: Tensor, prompts: Sequence[Tensor], max_new_tokens: int, stop: int
) -> list[list[int]]:
    """Decode the most probable answer to each prompt, token by token.

    Args:
        model: Backbone with the stem ``image_text``.
        image: Images, (B, C, height, width).
        prompts: Token ids of each prompt, (T,) int64 each.
        max_new_tokens: Maximum number of tokens of an answer.
        stop: Token id that ends an answer; it is not part of it.
    """
    read = ImageTextReader(model, image, prompts, max(map(len, prompts)) + max_new_tokens)
    tokens, found, ended = None, [], torch.zeros(len(prompts), dtype=torch.bool, device=image.device)
    for _ in range(max_new_tokens):
        tokens = read(tokens).argmax(dim=-1, keepdim=True)  # (B, 1)
        found.append(tokens[:, 0])
        ended |= tokens[:, 0] == stop
        if ended.all():
            break
    rows = torch.stack(found, dim=1).tolist()
    return [row[: row.index(stop)] if stop in row else row for row in rows]


@torch.no_grad()
def answer_scores(
    model: Tokenformer, image: Tensor, prompt: Tensor, answers: Sequence[Sequence[int]], stop: int
) -> Tensor:
    """Compute the log-probability of each answer to one question, (B, A); image and question are read once.

    Args:
        model: Backbone with the stem ``image_text``.
        image: Images, (B, C, height, width).
        prompt: Token ids of the question, (T,) int64.
        answers: Token ids of each answer, A sequences.
        stop: Token id that ends an answer, which counts too.
    """
    rows = [torch.tensor([*answer, stop], device=image.device) for answer in answers]
    read = ImageTextReader(model, image, [prompt] * len(image), len(prompt) + max(map(len, rows)))
    first, state = read(None).float().log_softmax(dim=-1), read.state  # (B, V)
    assert state is not None
    kept, scores = state.start, []
    for row in rows:
        score = first[:, row[0]]
        if len(row) > 1:
            features = image_text_features(model, row[:-1].expand(len(image), -1), None, state)
            later = model.forward_head(features).float().log_softmax(dim=-1)  # (B, T - 1, V)
            score = score + later.gather(2, row[1:].expand(len(image), -1)[..., None]).sum(dim=(1, 2))
            state.crop(kept)
        scores.append(score)
    return torch.stack(scores, dim=1)
