"""Inspection of parameter tokens: recorded weights, statistics, reports, and removal of dead tokens."""

from lit_tokenformer.inspection.prune import DeadTokens, find_dead, prune, without
from lit_tokenformer.inspection.record import record
from lit_tokenformer.inspection.tokens import LayerReport, TokenReport, token_report

__all__ = ["DeadTokens", "LayerReport", "TokenReport", "find_dead", "prune", "record", "token_report", "without"]
