"""Models as folders and repositories of the Hugging Face hub."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_tokenformer.errors import UserError
from lit_tokenformer.models.config import TokenformerConfig
from lit_tokenformer.models.linear_form import LinearHalves, as_pattention
from lit_tokenformer.version import __version__

FORMAT = "lit_tokenformer"
"""Value of ``format`` in the ``config.json`` of a model."""

HEAD, EMBEDDING = "head.weight", "stem.embedding.weight"
"""Names of tied embeddings; only the second is in a file."""


def describe(config: TokenformerConfig, size: Mapping[str, int]) -> dict[str, Any]:
    """Return the content of a ``config.json``: version, architecture and current size."""
    return {"version": __version__, "config": asdict(config), "size": dict(size)}


def without_tie(config: TokenformerConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the head from a state dict if it is the embedding; see :func:`with_tie`."""
    tied = config.tie_embeddings and EMBEDDING in state
    return {name: tensor for name, tensor in state.items() if not (tied and name == HEAD)}


def with_tie(config: TokenformerConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the head to a state dict if it is the embedding."""
    return {**state, HEAD: state[EMBEDDING]} if config.tie_embeddings and EMBEDDING in state else dict(state)


class HubMixin(
    PyTorchModelHubMixin,
    library_name="lit-tokenformer",
    paper_url="https://arxiv.org/abs/2410.23168",
    tags=["tokenformer"],
):
    """Save and load a model with its architecture at the current size and its precision.

    Files are those of ``export --format lit_tokenformer``, and can be imported. The linear form is saved as parameter
    tokens.
    """

    def _save_pretrained(self: Any, save_directory: Path) -> None:
        linear = any(isinstance(module, LinearHalves) for module in self.modules())
        model = as_pattention(copy.deepcopy(self)) if linear else self
        state = without_tie(model.config, model.state_dict())
        tensors = {name: tensor.contiguous() for name, tensor in state.items()}
        save_file(tensors, save_directory / SAFETENSORS_SINGLE_FILE, metadata={"format": "pt"})
        settings = {"format": FORMAT, **describe(model.config.at_size(model.size), model.size)}
        (save_directory / CONFIG_NAME).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def _from_pretrained(  # type: ignore[override]
        cls: Any, *, model_id: str, config: dict[str, Any] | None = None, map_location: str = "cpu", **download: Any
    ) -> Any:
        try:  # the mixin passes the entry named as the argument of the constructor
            model = cls(TokenformerConfig(**(config or {"config": None})))
        except TypeError as error:
            raise UserError(f"{CONFIG_NAME}: {model_id}: not an architecture of lit-tokenformer ({error})") from None
        names = ("revision", "cache_dir", "force_download", "token", "local_files_only")
        given = {name: download[name] for name in names if name in download}
        place, name = Path(model_id), SAFETENSORS_SINGLE_FILE
        file = place / name if place.is_dir() else hf_hub_download(model_id, name, **given)
        try:
            state = with_tie(model.config, load_file(file))
            first = next(key for key, _ in model.named_parameters())
            model.to(state[first].dtype).load_state_dict(state)
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:  # missing, unexpected or misshapen tensors
            raise UserError(f"{name}: {model_id}: {' '.join(str(error).split())}") from None
        return model.to(map_location).eval()
