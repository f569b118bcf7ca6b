"""Lightning callbacks: when a model grows, what a run reports of it, and what happens when something goes wrong."""

from callbacks.ema import GrowingEMA
from callbacks.error_log import ErrorLog
from callbacks.interruptions import PreemptionCheckpoint
from callbacks.monitor import TrainingMonitor
from callbacks.parameter_growth import ParameterGrowthCallback
from callbacks.patch_dropping import PatchDropSchedule
from callbacks.predictions import PredictionWriter
from callbacks.safeguard import LossGuard
from callbacks.summary import RunSummary

__all__ = [
    "ErrorLog",
    "GrowingEMA",
    "LossGuard",
    "ParameterGrowthCallback",
    "PatchDropSchedule",
    "PredictionWriter",
    "PreemptionCheckpoint",
    "RunSummary",
    "TrainingMonitor",
]
