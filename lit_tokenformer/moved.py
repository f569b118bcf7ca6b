"""Aliases of the module paths of earlier releases."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "callbacks.ema": "callbacks.growing_ema",
    "callbacks.interruptions": "callbacks.preemption_checkpoint",
    "callbacks.monitor": "callbacks.training_monitor",
    "callbacks.patch_dropping": "callbacks.patch_drop_schedule",
    "callbacks.predictions": "callbacks.prediction_writer",
    "callbacks.safeguard": "callbacks.loss_guard",
    "callbacks.summary": "callbacks.run_summary",
    "lit_tokenformer.beginning": "lit_tokenformer.cli.preflight",
    "lit_tokenformer.checkpoint_io": "lit_tokenformer.checkpoints.checkpoint_io",
    "lit_tokenformer.commands": "lit_tokenformer.cli.commands",
    "lit_tokenformer.compute": "lit_tokenformer.cost",
    "lit_tokenformer.data.augmentation": "lit_tokenformer.data.images.transforms",
    "lit_tokenformer.data.image_sources": "lit_tokenformer.data.images.sources",
    "lit_tokenformer.data.loading": "lit_tokenformer.data.resumable",
    "lit_tokenformer.data.masked_text": "lit_tokenformer.data.text.masked",
    "lit_tokenformer.data.masking": "lit_tokenformer.data.text.masking",
    "lit_tokenformer.data.stream_loading": "lit_tokenformer.data.resumable",
    "lit_tokenformer.data.text_corpus": "lit_tokenformer.data.text.corpus",
    "lit_tokenformer.data.text_sources": "lit_tokenformer.data.text.sources",
    "lit_tokenformer.data.text_stream": "lit_tokenformer.data.text.streaming",
    "lit_tokenformer.data.token_cache": "lit_tokenformer.data.text.token_cache",
    "lit_tokenformer.data.tokenizers": "lit_tokenformer.data.text.tokenizer",
    "lit_tokenformer.depth_growth": "lit_tokenformer.growth.depth",
    "lit_tokenformer.evaluation": "lit_tokenformer.inference.lm_eval",
    "lit_tokenformer.initialization": "lit_tokenformer.tasks.initialization",
    "lit_tokenformer.interop.files": "lit_tokenformer.tensor_files",
    "lit_tokenformer.models.generation": "lit_tokenformer.inference.sampling",
    "lit_tokenformer.models.l2_gelu": "lit_tokenformer.models.pattention_kernels",
    "lit_tokenformer.monitored_metrics": "lit_tokenformer.cli.preflight",
    "lit_tokenformer.optimizer_growth": "lit_tokenformer.growth.optimizer",
    "lit_tokenformer.parallel": "lit_tokenformer.distributed.sharding",
    "lit_tokenformer.parsing": "lit_tokenformer.cli.parser",
    "lit_tokenformer.run_folder": "lit_tokenformer.checkpoints.run_folder",
    "lit_tokenformer.run_identity": "lit_tokenformer.cli.run_identity",
    "lit_tokenformer.safety": "lit_tokenformer.checkpoints.trust",
    "lit_tokenformer.sharded_checkpoints": "lit_tokenformer.distributed.checkpoint",
    "lit_tokenformer.tasks.schedule": "lit_tokenformer.tasks.optimization",
    "lit_tokenformer.text_generation": "lit_tokenformer.inference.text",
    "lit_tokenformer.token_growth": "lit_tokenformer.growth.axes",
}
"""Old path to new path; configs, checkpoints and user code may contain old paths."""


class _Alias(MetaPathFinder, Loader):
    """Import hook that resolves an old path to the new module object."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(MOVED[spec.name])
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state  # the import system has set the alias's spec


def install() -> None:
    """Install the import hook for old paths."""
    if not any(isinstance(finder, _Alias) for finder in sys.meta_path):
        sys.meta_path.append(_Alias())
