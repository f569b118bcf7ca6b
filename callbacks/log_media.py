"""Hyper-parameters, pictures and text for every logger, through the interface that it offers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import fsspec
from lightning.pytorch import Trainer
from lightning.pytorch.core.mixins import HyperparametersMixin
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torchvision.transforms.functional import to_pil_image

from lit_tokenformer.checkpoints.run_folder import write_if_space

_TRAINER = (
    *("max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"),
    *("precision", "limit_train_batches", "overfit_batches", "num_devices", "num_nodes"),
)
"""Settings of the trainer that are logged as hyper-parameters."""

_LENGTH = ("max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "precision", "num_devices")
_DATA = ("batch_size", "tokenizer", "block_size")


def hyper_parameters(trainer: Trainer) -> dict[str, Any]:
    """Collect the hyper-parameters of a fit other than the model's, which Lightning logs.

    Args:
        trainer: Trainer of the fit.

    Returns:
        Settings in the groups ``trainer``, ``data`` (those of a data module with ``data_settings``), and by class name
        for each callback that saved its hyper-parameters, such as the growth schedule.
    """
    found = {"trainer": {name: getattr(trainer, name) for name in _TRAINER}}
    found["trainer"]["strategy"] = type(trainer.strategy).__name__
    if settings := getattr(getattr(trainer, "datamodule", None), "data_settings", None):
        found["data"] = settings
    for callback in getattr(trainer, "callbacks", ()):
        if isinstance(callback, HyperparametersMixin):
            found[type(callback).__name__] = dict(callback.hparams)
    return _with_text_keys(found)


def table_settings(found: Mapping[str, Any], optimizers: Sequence[Optimizer] = ()) -> dict[str, Any]:
    """Select the settings that TensorBoard's tab HPARAMS compares runs by.

    Args:
        found: All hyper-parameters: those of the module, and the groups of :func:`hyper_parameters`.
        optimizers: Optimizers of the fit.

    Returns:
        Data, batch size, sizes, optimizer, length and growth by short names, and other plain values of the module.

    Example:
        >>> table_settings({"trainer": {"max_steps": 9}, "ParameterGrowthCallback": {"schedule": {"3": 96}}, "_a": 1})
        {'max_steps': 9, 'growth/schedule': '3: 96'}
    """

    def group(name: str) -> Mapping[str, Any]:
        value = found.get(name)
        return value if isinstance(value, Mapping) else {}

    plain = (str, int, float)
    data, growth = group("data"), group("ParameterGrowthCallback")
    table: dict[str, Any] = {
        name: value for name, value in found.items() if isinstance(value, plain) and value is not False
    }
    table |= {"data": data.get("dataset"), **{name: data.get(name) for name in _DATA}}
    table |= {f"overrides/{name}": value for name, value in group("overrides").items() if isinstance(value, plain)}
    for optimizer in optimizers[:1]:
        first = optimizer.param_groups[0]
        table |= {"optimizer": type(optimizer).__name__, "lr": first.get("initial_lr", first["lr"])}
    table |= {f"schedule/{name}": group("schedule").get(name) for name in ("name", "warmup")}
    table |= {name: group("trainer").get(name) for name in _LENGTH}
    table |= {f"growth/{name}": growth.get(name) for name in ("unit", "method", "trigger")}
    if "schedule" in growth:
        table["growth/schedule"] = ", ".join(f"{key}: {size}" for key, size in growth["schedule"].items())
    return {name: value for name, value in table.items() if value is not None and not name.startswith("_")}


def log_hyper_parameters(trainer: Trainer, values: Mapping[str, Any]) -> None:
    """Log hyper-parameters to every logger; a logger that rejects them is reported in a warning.

    Args:
        trainer: Trainer of the fit.
        values: Nested settings by name.
    """
    for logger in trainer.loggers:
        try:
            logger.log_hyperparams(dict(values))
        except Exception as error:  # MLflow rejects a changed value, for example in a resumed run
            reason = (str(error) or type(error).__name__).splitlines()[0]
            rank_zero_warn(f"{type(logger).__name__}: hyper-parameters not logged ({reason})")


def log_picture(trainer: Trainer, name: str, picture: Tensor, step: int, folder: str) -> None:
    """Log a picture to every logger; a logger without pictures gets a PNG file in the run folder.

    Args:
        trainer: Trainer of the fit; call on rank zero only.
        name: Name of the picture, such as ``val/predictions``.
        picture: RGB picture, (3, height, width) uint8.
        step: Optimizer step.
        folder: Folder of the run.
    """
    image: Any = to_pil_image(picture)
    for logger in trainer.loggers:
        client: Any = getattr(logger, "experiment", None)
        if hasattr(client, "add_image"):  # TensorBoard
            write_if_space(logger, client.add_image, name, picture, step)
        elif hasattr(logger, "log_image"):  # W&B
            logger.log_image(name, [image], step=step)
        elif hasattr(client, "log_image") and hasattr(logger, "run_id"):  # MLflow
            client.log_image(logger.run_id, image, key=name, step=step)
        elif hasattr(client, "log_image"):  # Comet
            client.log_image(image, name=name, step=step)
        else:
            path = f"{folder}/pictures/{name.replace('/', '_')}-step={step}.png"
            write_if_space(logger, _write_png, path, image)


def log_text(
    trainer: Trainer,
    name: str,
    text: str,
    file_name: str,
    step: int = 0,
    folder: str | None = None,
    language: str | None = None,
) -> None:
    """Log a text to every logger that takes texts or files; others get a file in the run folder.

    Args:
        trainer: Trainer of the fit; call on rank zero only.
        name: Name of the text.
        text: Content, in Markdown or in ``language``.
        file_name: File name of the text, for loggers with files.
        step: Optimizer step.
        folder: Folder of the run; ``None`` if loggers without texts get none.
        language: Language of the content, such as ``yaml``.
    """
    for logger in trainer.loggers:
        client: Any = getattr(logger, "experiment", None)
        if hasattr(client, "add_text"):  # TensorBoard
            shown = f"```{language}\n{text}\n```" if language else text
            write_if_space(logger, client.add_text, name, shown, step)
        elif hasattr(logger, "log_text"):  # W&B
            logger.log_text(name, columns=[file_name], data=[[text]], step=step)
        elif hasattr(client, "log_text") and hasattr(logger, "run_id"):  # MLflow
            client.log_text(logger.run_id, text, file_name)
        elif hasattr(client, "log_asset_data"):  # Comet
            client.log_asset_data(text, name=file_name)
        elif folder is not None:
            write_if_space(logger, _write, f"{folder}/texts/{file_name}", text.encode())


def _with_text_keys(value: Any) -> Any:
    """Replace the keys of nested mappings by text, as loggers require: those of a growth schedule are numbers."""
    if isinstance(value, Mapping):
        return {str(key): _with_text_keys(one) for key, one in value.items()}
    return value


def _write_png(path: str, image: Any) -> None:
    data = BytesIO()
    image.save(data, format="PNG")
    _write(path, data.getvalue())


def _write(path: str, data: bytes) -> None:
    with fsspec.open(path, "wb", auto_mkdir=True) as file:
        file.write(data)
