"""Command ``merge``: an image model and a text model in one checkpoint."""

from __future__ import annotations

from pathlib import Path

from lit_tokenformer import tasks
from lit_tokenformer.checkpoints.load import read_checkpoint, write_checkpoint
from lit_tokenformer.errors import UserError
from lit_tokenformer.tasks.merge import merge_tasks
from lit_tokenformer.tasks.rebuild import fresh_checkpoint, rebuild_task


def merge_checkpoints(image: str, text: str, output: str) -> Path:
    """Merge checkpoints of an image classifier and a language model into one of LitVisionLanguage, exactly.

    Each data token uses the parameter tokens of its modality, so the merged model classifies images as the one and
    continues text as the other. A fit from it starts at epoch 0 with a fresh optimizer. The weights are the moving
    averages where the fits have one.

    Args:
        image: Path to a checkpoint of LitImageClassifier.
        text: Path to a checkpoint of LitCausalLM with the same width, depth and heads.
        output: Path of the merged checkpoint.

    Returns:
        Path of the merged checkpoint.

    Raises:
        UserError: If a checkpoint cannot be read or is of another task, if the models do not fit, or if the output
            already exists.
    """
    if Path(output).exists():
        raise UserError(f"output: {output} exists already")
    parts = {}
    for name, path, kind in (("image", image, tasks.LitImageClassifier), ("text", text, tasks.LitCausalLM)):
        parts[name] = rebuild_task(path, read_checkpoint(path, "meta", optimizers=False))
        if not isinstance(parts[name], kind):
            raise UserError(
                f"{name}: expected a checkpoint of {kind.__name__}, got {type(parts[name]).__name__} in {path}"
            )
    merged = merge_tasks(**parts)  # type: ignore[arg-type]
    write_checkpoint(fresh_checkpoint(merged, merged.state_dict()), Path(output))
    count = sum(parameter.numel() for parameter in merged.parameters())
    print(f"{output}: {count:,} parameters, tokens by modality")
    return Path(output)
