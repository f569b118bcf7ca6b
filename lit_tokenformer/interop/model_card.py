"""Model card of an exported model: what a Hugging Face repository shows, without a license."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from lit_tokenformer.models import Tokenformer
from lit_tokenformer.version import __version__

CARD_FILE = "README.md"

_TASKS = {
    "language": ("text-generation", "AutoModelForCausalLM"),
    "masked_language": ("fill-mask", "AutoModelForMaskedLM"),
    "image": ("image-classification", "AutoModelForImageClassification"),
}
"""By head: the task on the Hugging Face Hub, and the Auto class of transformers."""


def write_card(folder: Path, model: Tokenformer, checkpoint: Mapping[str, Any]) -> None:
    """Write the model card of an exported folder.

    Args:
        folder: Folder with the weights.
        model: Exported model, at its current size; on any device.
        checkpoint: Checkpoint of the model, with its training steps, growths and monitored metrics; may be empty.
    """
    task, auto = _TASKS[model.config.head]
    preset = checkpoint.get("hyper_parameters", {}).get("preset", "TokenFormer")
    data = ModelCardData(library_name="transformers", pipeline_tag=task, tags=["lit-tokenformer"])
    remote = ", trust_remote_code=True" if any(folder.glob("modeling_*.py")) else ""
    callbacks = checkpoint.get("callbacks", {}).values()
    text = "\n".join(
        [
            f"---\n{data.to_yaml().strip()}\n---",
            "<!-- The license of the weights is up to you: add `license: NAME` to the lines above. -->\n",
            f"# {preset}\n",
            f"Trained with lit-tokenformer {__version__}.\n",
            f'```python\nmodel = transformers.{auto}.from_pretrained("FOLDER_OR_REPOSITORY"{remote})\n```\n',
            *_table("Architecture", ("setting", "value"), _architecture(model)),
            *_table("Training", ("quantity", "value"), _training(checkpoint)),
            *_table("Growth", ("step", "epoch", "method", "size", "parameters"), _growths(callbacks)),
            *_table("Metrics", ("metric", "this checkpoint", "best"), _metrics(callbacks)),
        ]
    )
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def _table(title: str, columns: tuple[str, ...], rows: Iterator[tuple[Any, ...]]) -> list[str]:
    """Format a section with a table; nothing without rows."""
    lines = ["| " + " | ".join(str(one) for one in row) + " |" for row in dict.fromkeys(rows)]
    return [f"## {title}\n", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *lines, ""] if lines else []


def _architecture(model: Tokenformer) -> Iterator[tuple[str, Any]]:
    config, size = model.config, model.size
    yield "parameters", f"{sum(parameter.numel() for parameter in model.parameters()):,}"
    yield "width", config.dim
    yield from size.items()
    if config.stem == "patch":
        yield "image size", config.image_size
        yield "patch size", config.patch_size
        yield "classes", config.num_classes
    else:
        yield "vocabulary", config.vocab_size
        yield "context length", config.context_length
    yield "mixer, feed-forward", " and ".join(config.parts_of(0))


def _training(checkpoint: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    if checkpoint.get("global_step"):
        yield "optimizer steps", f"{checkpoint['global_step']:,}"
        yield "epoch, from 0", checkpoint["epoch"]
    for state in checkpoint.get("callbacks", {}).values():
        for name in ("data_tokens", "training_flops"):
            if state.get(name):
                yield name.replace("_", " "), f"{state[name]:.4g}"


def _growths(callbacks: Any) -> Iterator[tuple[Any, ...]]:
    for state in callbacks:
        for event in state.get("events", ()) if isinstance(state, Mapping) else ():
            before, after = event["before"], event["after"]
            grown = [f"{kind} {before[kind]} to {total}" for kind, total in after.items() if total != before[kind]]
            yield event["step"], event["epoch"], event["method"], ", ".join(grown), f"{event['parameters']:,}"


def _metrics(callbacks: Any) -> Iterator[tuple[Any, ...]]:
    for state in callbacks:
        name, current, best = (state.get(key) for key in ("monitor", "current_score", "best_model_score"))
        if name is not None and current is not None:
            yield name, f"{float(current):.5g}", "" if best is None else f"{float(best):.5g}"
