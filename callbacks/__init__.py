"""Lightning callbacks: when a model grows, and what a run reports of it."""

from callbacks.ema import GrowingEMA
from callbacks.monitor import TrainingMonitor
from callbacks.parameter_growth import ParameterGrowthCallback
from callbacks.predictions import PredictionWriter

__all__ = ["GrowingEMA", "ParameterGrowthCallback", "PredictionWriter", "TrainingMonitor"]
