"""Models as folders and repositories of the Hugging Face hub."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from safetensors.torch import load_model, save_model

from lit_tokenformer.errors import UserError
from lit_tokenformer.models.config import TokenformerConfig
from lit_tokenformer.models.linear_form import LinearHalves, as_pattention


class HubMixin(
    PyTorchModelHubMixin,
    library_name="lit-tokenformer",
    paper_url="https://arxiv.org/abs/2410.23168",
    tags=["tokenformer"],
):
    """Save and load a model with its architecture at the current size and its precision.

    ``config.json`` contains the fields of :class:`~lit_tokenformer.models.TokenformerConfig` and the ``dtype`` of the
    weights. The linear form is saved as parameter tokens.
    """

    def _save_pretrained(self: Any, save_directory: Path) -> None:
        linear = any(isinstance(module, LinearHalves) for module in self.modules())
        model = as_pattention(copy.deepcopy(self)) if linear else self
        save_model(model, str(save_directory / SAFETENSORS_SINGLE_FILE))
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        settings = {"dtype": dtype, **asdict(model.config.at_size(model.size))}
        (save_directory / CONFIG_NAME).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def _from_pretrained(  # type: ignore[override]
        cls: Any, *, model_id: str, config: dict[str, Any] | None = None, map_location: str = "cpu", **download: Any
    ) -> Any:
        place = Path(model_id)
        settings = dict(config or {})
        dtype = settings.pop("dtype", "float32")
        try:
            model = cls(TokenformerConfig(**settings)).to(getattr(torch, dtype))
        except (TypeError, AttributeError) as error:
            raise UserError(f"{CONFIG_NAME}: {model_id}: not an architecture of lit-tokenformer ({error})") from None
        names = ("revision", "cache_dir", "force_download", "token", "local_files_only")
        given = {name: download[name] for name in names if name in download}
        name = SAFETENSORS_SINGLE_FILE
        file = place / name if place.is_dir() else hf_hub_download(model_id, name, **given)
        try:
            load_model(model, file)
        except RuntimeError as error:  # missing, unexpected or misshapen tensors
            raise UserError(f"{name}: {model_id}: {' '.join(str(error).split())}") from None
        return model.to(map_location).eval()
