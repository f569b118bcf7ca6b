"""Readable traces of a parameter token: where its key fires, and what its value writes.

Shapes: B batch, T data tokens, D width, N parameter tokens, V outputs: vocabulary or classes.
"""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_tokenformer.data.text.tokenizer import Tokenizer
from lit_tokenformer.inspection.statistics import place, task_loss
from lit_tokenformer.models import Tokenformer
from lit_tokenformer.models.pattention import Pattention

LENS_BLOCKS = 2
"""Number of last blocks whose values are projected to the outputs; later blocks change what earlier ones write."""

_BEFORE, _AFTER = 24, 8
"""Data tokens of a context before and after the firing one."""

_THUMBNAIL = 96
"""Maximum side of an image in a report, in pixels."""


@dataclass(frozen=True)
class TextContext:
    """Text in which a token fires.

    Args:
        weight: Weight of the token.
        before: Text before the firing data token.
        fired: Text of the firing data token.
        after: Text after it; a causal model does not see it.
    """

    weight: float
    before: str
    fired: str
    after: str


@dataclass(frozen=True)
class ImageContext:
    """Image in which a token fires.

    Args:
        weight: Weight of the token.
        image: Key of the image in :attr:`Contexts.images`.
        label: Name of its class.
        box: Left, top, width and height of the firing patch, as shares of the image; ``None`` for the class token.
    """

    weight: float
    image: str
    label: str
    box: tuple[float, float, float, float] | None


@dataclass(frozen=True)
class Written:
    """Outputs that a value raises and lowers most, as names with the change of their logits for a weight of 1."""

    raised: list[tuple[str, float]]
    lowered: list[tuple[str, float]]


class Contexts:
    """Contexts of the largest weights of tokens, as text or images.

    Args:
        model: Task with the tokenizer or the class names.
        batches: Its batches.

    Attributes:
        images: PNG images in base64 by key.
        outputs: Names of the outputs of the model.
    """

    def __init__(self, model: Any, batches: Sequence[Any]) -> None:
        self._batches = batches
        self.images: dict[str, str] = {}
        self._data: dict[str, Any] = getattr(model, "image_data", None) or {}
        backbone = find_backbone(model)
        self._config = None if backbone is None else backbone.config
        text = getattr(model, "tokenizer_json", None)
        self._tokenizer = None if text is None else Tokenizer.from_json(text)
        names = self._tokenizer.texts() if self._tokenizer else self._data.get("class_names", [])
        self.outputs: list[str | None] = list(names)

    def name(self, output: int) -> str:
        """Return the name of an output of the model: a vocabulary entry or a class."""
        known = self.outputs[output] if output < len(self.outputs) else None
        return f"#{output}" if known is None else known

    def of(self, weights: Tensor, places: Tensor) -> list[TextContext | ImageContext]:
        """Describe the places of the largest weights of one token, (K,) each."""
        pairs = zip(weights.tolist(), places.tolist(), strict=True)
        return [self._one(weight, *place(number)) for weight, number in pairs if number >= 0]

    def _one(self, weight: float, number: int, index: int) -> TextContext | ImageContext:
        batch = self._batches[number]
        if isinstance(batch, Tensor):
            return self._text(weight, batch[:, :-1], index)
        return self._text(weight, batch[0], index) if len(batch) == 3 else self._image(weight, batch, number, index)

    def _text(self, weight: float, tokens: Tensor, index: int) -> TextContext:
        row, column = divmod(index, tokens.shape[1])
        ids = tokens[row].clamp_min(0).tolist()
        before, after = ids[max(0, column - _BEFORE) : column], ids[column + 1 : column + 1 + _AFTER]
        return TextContext(weight, self._decoded(before), self._decoded([ids[column]]), self._decoded(after))

    def _decoded(self, ids: list[int]) -> str:
        if self._tokenizer is None:
            return " ".join(map(str, ids))
        return self._tokenizer.decode(ids)

    def _image(self, weight: float, batch: Any, number: int, index: int) -> ImageContext:
        assert self._config is not None
        images, labels = batch
        height, width = images.shape[-2:]
        rows, columns = (side // self._config.patch_size for side in (height, width))
        prefix = self._config.num_prefix_tokens
        row, position = divmod(index, prefix + rows * columns)
        key = f"{number}-{row}"
        if key not in self.images:
            self.images[key] = self._png(images[row])
        label = int(labels[row] if labels.ndim == 1 else labels[row].argmax())
        y, x = divmod(position - prefix, columns)
        box = None if position < prefix else (x / columns, y / rows, 1 / columns, 1 / rows)
        return ImageContext(weight, key, self.name(label), box)

    def _png(self, image: Tensor) -> str:
        """Encode a normalized image (C, H, W)."""
        from PIL import Image

        shift, scale = (torch.tensor(self._data.get(name, [default])) for name, default in (("mean", 0), ("std", 1)))
        plain = image.detach().cpu().float() * scale[:, None, None] + shift[:, None, None]
        pixels = plain.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0)
        picture = Image.fromarray(pixels.expand(-1, -1, 3).numpy() if pixels.shape[2] == 1 else pixels.numpy())
        picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
        file = io.BytesIO()
        picture.save(file, "PNG", optimize=True)
        return base64.b64encode(file.getvalue()).decode()


def find_backbone(model: nn.Module) -> Tokenformer | None:
    """Return the only Tokenformer of a module, or ``None``."""
    found = [part for part in model.modules() if isinstance(part, Tokenformer)]
    return found[0] if len(found) == 1 else None


def writing_layers(model: nn.Module) -> dict[str, Pattention]:
    """Find the layers of the last blocks that write to the residual stream, by name, with their groups."""
    backbone = find_backbone(model)
    blocks: list[Any] = [] if backbone is None else list(backbone.blocks)[-LENS_BLOCKS:]
    writers = [getattr(part, "output_layer", None) for block in blocks for part in (block.attn, block.mlp)]
    found = [one for one in writers if isinstance(one, Pattention)]
    inside = {id(group) for one in found for group in (one.groups.values() if one.groups is not None else ())}
    inside |= {id(one) for one in found}
    return {name: part for name, part in model.named_modules() if id(part) in inside}  # type: ignore[misc]


class Lens:
    """Effect of values on the outputs: the derivative of final norm and head at the mean of the residual stream.

    A logit lens (nostalgebraist 2020), linearized. It ignores all later layers, so it describes the last blocks only.

    Args:
        model: Task, with one :class:`~lit_tokenformer.models.Tokenformer`.
        batch: Batch over which the residual stream is averaged.
    """

    @torch.no_grad()
    def __init__(self, model: Any, batch: Any) -> None:
        backbone = find_backbone(model)
        assert backbone is not None
        self._backbone: Any = backbone
        seen: list[Tensor] = []
        hook = backbone.norm.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            with torch.compiler.set_stance("force_eager"):
                task_loss(model, batch)
        finally:
            hook.remove()
        self._state = seen[0].flatten(0, -2).mean(dim=0)  # (D,)

    @torch.no_grad()
    def effects(self, values: Tensor) -> Tensor:
        """Compute the change of the logits by values of weight 1, less its mean, (n, D) -> (n, V)."""
        length = 1 + self._backbone.num_prefix_tokens

        def logits(state: Tensor) -> Tensor:
            out = self._backbone.forward_head(self._backbone.norm(state.expand(1, length, -1)))
            return out.flatten(0, -2)[-1]

        with warnings.catch_warnings():
            # of torch's own scripts, which it loads at the first jvp
            warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", FutureWarning)
            found = torch.stack([torch.func.jvp(logits, (self._state,), (value,))[1] for value in values])
        return found - found.mean(dim=-1, keepdim=True)

    def written(self, layer: Pattention, tokens: Sequence[int], contexts: Contexts) -> Mapping[int, Written]:
        """Describe the values of some tokens of a layer, by token."""
        if not len(tokens):
            return {}
        effects = self.effects(layer.value_tokens.detach()[list(tokens)])
        count = min(5, effects.shape[1])
        high, low = effects.topk(count, dim=1), effects.topk(count, dim=1, largest=False)

        def named(found: Any, row: int) -> list[tuple[str, float]]:
            pairs = zip(found.indices[row].tolist(), found.values[row].tolist(), strict=True)
            return [(contexts.name(index), value) for index, value in pairs]

        return {token: Written(named(high, row), named(low, row)) for row, token in enumerate(tokens)}
