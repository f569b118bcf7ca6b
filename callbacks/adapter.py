"""Training of an adapter on a frozen base."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from callbacks.parameter_growth import ParameterGrowthCallback
from lit_tokenformer.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    adapter_names,
    add_adapter,
    base_hash,
    check_adapter_name,
    list_adapters,
    save_adapter,
    train_adapter,
)
from lit_tokenformer.checkpoints.load import ADAPTER, read_checkpoint
from lit_tokenformer.checkpoints.run_folder import run_folder
from lit_tokenformer.distributed.sharding import reshard
from lit_tokenformer.errors import UserError
from lit_tokenformer.models import Tokens
from lit_tokenformer.tasks.base import resizable_dims
from lit_tokenformer.tasks.initialization import initialize_from


class AdapterCallback(Callback):
    """Train an adapter: freeze a base, append a group of parameter tokens with zero output, and train that alone.

    Checkpoints of the fit contain the adapter, its optimizer state and the path of the base. When training ends, the
    adapter is written to a folder, for ``generate --adapter`` and :func:`~lit_tokenformer.adapters.load_adapter`.

    Args:
        base: Checkpoint of the base, whose moving average is used where it has one; needed to resume too. ``None``
            keeps the weights of the module. On the command line, ``--ckpt_path`` sets it.
        name: Name of the adapter: letters, digits, ``_`` and ``-``.
        tokens: Parameter tokens to append: n (qkv n, proj n, ffn 4n) or a number by kind, ``{qkv: n, proj: n,
            ffn: m}``; kinds that are missing get none.
        also_train: Parts of the model that the adapter replaces by trained copies, such as ``head`` for other classes.
        lora: Settings of peft's ``LoraConfig``, such as ``{r: 8}``, in place of ``tokens``: for linear projections.
        output: Folder of the adapter; ``null`` for ``adapters/NAME`` in the folder of the run.
        seed: Seed of the random keys.

    Raises:
        UserError: For an invalid name, or neither or both of ``tokens`` and ``lora``. When a fit starts, if the base is
            of another architecture, if the model has no layer for the tokens, or if the folder exists.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> adapter = AdapterCallback("base.ckpt", "docs", {"qkv": 8, "proj": 8, "ffn": 32})
        >>> trainer = Trainer(callbacks=[adapter], logger=False)
    """

    def __init__(
        self,
        base: str | None = None,
        name: str = "adapter",
        tokens: Tokens | None = None,
        also_train: Sequence[str] = (),
        lora: dict[str, Any] | None = None,
        output: str | None = None,
        seed: int = 0,
    ) -> None:
        check_adapter_name(name)
        if (tokens is None) == (lora is None):
            raise UserError("tokens: expected either tokens, such as {qkv: 8, proj: 8, ffn: 32}, or lora")
        self.base = base
        self.name = name
        self.tokens = tokens
        self.also_train = tuple(also_train)
        self.lora = lora
        self.output = output
        self.seed = seed
        self._facts: dict[str, Any] = {}  # of the adapter and its base, for checkpoints
        self._tokenizer: str | None = None  # of the base
        self._kept: set[str] = set()  # names of the adapter's tensors
        self._hooks: list[Any] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        added = self.name in list_adapters(pl_module)  # in an earlier stage, or by the user
        if stage != "fit" and self.base is None and not added:
            return  # the base alone is evaluated
        if stage == "fit":
            self._check_callbacks(trainer)
        if added:
            train_adapter(pl_module, self.name)
        else:
            if self.base is not None:
                self._tokenizer = self._load_base(trainer, pl_module, self.base)
            add_adapter(pl_module, self.name, self.tokens, self.also_train, self.lora, self.seed)
        if not self._facts:
            self._facts = {"name": self.name, "base": self.base, "base_hash": base_hash(pl_module, self.also_train)}
        self._kept = adapter_names(pl_module, self.name)
        self._hooks = [
            pl_module.register_state_dict_post_hook(partial(_keep, self._kept)),  # type: ignore[no-untyped-call]
            pl_module.register_load_state_dict_post_hook(partial(_allow_missing, self._kept)),
        ]
        total = sum(parameter.numel() for parameter in pl_module.parameters())
        trained = sum(parameter.numel() for parameter in pl_module.parameters() if parameter.requires_grad)
        kinds = ", ".join(f"{kind} {number}" for kind, number in list_adapters(pl_module)[self.name].items())
        rank_zero_info(
            f"Adapter {self.name!r} ({kinds}) on {self.base or 'the given weights'}: {trained:,} of {total:,} "
            f"parameters trained ({trained / total:.1%})"
        )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.output is not None and trainer.ckpt_path is None and (Path(self.output) / CONFIG_FILE).exists():
            raise UserError(f"output: {self.output} exists already")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get(ADAPTER, {})
        if self._facts and saved.get("base_hash") != self._facts["base_hash"]:
            raise UserError(
                f"base: {self.base or 'the weights of the module'} is not the base of the adapter in "
                f"{trainer.ckpt_path} (expected {saved.get('base')})"
            )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[ADAPTER] = dict(self._facts)
        _keep(self._kept, pl_module, checkpoint["state_dict"], "", None)  # after the fit, the whole model's

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._save(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and _averages(trainer) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._save(trainer, pl_module)  # the moving average, which the module has now
        self._remove_hooks()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _check_callbacks(self, trainer: Trainer) -> None:
        callbacks: list[Any] = list(trainer.callbacks)  # type: ignore[attr-defined]
        if any(isinstance(callback, ParameterGrowthCallback) for callback in callbacks):
            raise UserError("trainer.callbacks: ParameterGrowthCallback cannot grow the frozen base of an adapter")
        if any(isinstance(callback, WeightAveraging) for callback in callbacks[: callbacks.index(self)]):
            raise UserError("trainer.callbacks: expected AdapterCallback before the average of the weights")

    def _load_base(self, trainer: Trainer, pl_module: LightningModule, base: str) -> str | None:
        """Load the weights of the base, and return its tokenizer."""
        try:
            checkpoint = read_checkpoint(base, map_location="meta", optimizers=False)
            if ADAPTER in checkpoint:
                raise UserError(f"{base} is the checkpoint of an adapter; expected its base")
            averaged = "current_model_state" in checkpoint
            initialize_from(pl_module, base, getattr(trainer, "datamodule", None), ema=averaged)
        except UserError as error:
            problem = str(error).removeprefix("init_from: ").removeprefix("ckpt_path: ")
            raise UserError(f"base: {problem}") from None
        weights, free = checkpoint["state_dict"], resizable_dims(pl_module)
        for key, tensor in pl_module.state_dict().items():
            fits = key in weights and (key in free or weights[key].shape == tensor.shape)
            if not fits and not any(f".{part}." in f".{key}" for part in self.also_train):
                raise UserError(f"also_train: {key} is not in {base} in this shape, expected its part in also_train")
        tokenizer = checkpoint.get("tokenizer")
        return tokenizer if isinstance(tokenizer, str) else None

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(self.output or Path(run_folder(trainer)) / "adapters" / self.name)
        reshard(pl_module)
        base, hashed = self._facts.get("base"), self._facts.get("base_hash")
        save_adapter(pl_module, folder, self.name, base, self._tokenizer, hashed, write=trainer.is_global_zero)
        if trainer.is_global_zero:
            size = (folder / WEIGHTS_FILE).stat().st_size
            rank_zero_info(f"Adapter {self.name!r} saved to {folder} ({size / 1e6:.2f} MB)")


def _averages(trainer: Any) -> bool:
    return any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)


def _keep(kept: set[str], module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Keep the tensors of the adapter in a state dict."""
    for key in [key for key in state_dict if key.startswith(prefix) and key[len(prefix) :] not in kept]:
        del state_dict[key]


def _allow_missing(kept: set[str], module: nn.Module, keys: Any) -> None:
    """Accept a state dict without the tensors of the base."""
    keys.missing_keys[:] = [key for key in keys.missing_keys if key in kept]
