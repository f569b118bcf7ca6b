"""LightningModules: loss, metrics, optimizer groups and schedule around one backbone."""

from lit_tokenformer.tasks.base import LitTask
from lit_tokenformer.tasks.causal_lm import LitCausalLM
from lit_tokenformer.tasks.image_classification import LitImageClassifier
from lit_tokenformer.tasks.masked_lm import LitMaskedLM
from lit_tokenformer.tasks.multitask import LitMultiTask
from lit_tokenformer.tasks.optimization import LRSchedule, LRSchedulerConfig
from lit_tokenformer.tasks.vision_language import LitVisionLanguage

__all__ = [
    "LRSchedule",
    "LRSchedulerConfig",
    "LitCausalLM",
    "LitImageClassifier",
    "LitMaskedLM",
    "LitMultiTask",
    "LitTask",
    "LitVisionLanguage",
]
