"""Lightning callbacks for growth, monitoring, checkpoints and error handling."""

from callbacks.adapter import AdapterCallback
from callbacks.error_log import ErrorLog
from callbacks.growing_ema import GrowingEMA
from callbacks.loss_guard import LossGuard
from callbacks.model_table import ModelTable
from callbacks.nested_sizes import NestedSizes
from callbacks.parameter_growth import ParameterGrowthCallback
from callbacks.patch_drop_schedule import PatchDropSchedule
from callbacks.prediction_writer import PredictionWriter
from callbacks.preemption_checkpoint import PreemptionCheckpoint
from callbacks.run_summary import RunSummary
from callbacks.terminal_progress import TerminalProgress
from callbacks.training_monitor import TrainingMonitor

__all__ = [
    "AdapterCallback",
    "ErrorLog",
    "GrowingEMA",
    "LossGuard",
    "ModelTable",
    "NestedSizes",
    "ParameterGrowthCallback",
    "PatchDropSchedule",
    "PredictionWriter",
    "PreemptionCheckpoint",
    "RunSummary",
    "TerminalProgress",
    "TrainingMonitor",
]
