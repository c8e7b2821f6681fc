"""Compare our models with recorded tensors of the reference implementations."""

from omega_qvla_core.parity.check import check_parity
from omega_qvla_core.parity.result import CaseResult, ParityReport, TensorResult

__all__ = ["CaseResult", "ParityReport", "TensorResult", "check_parity"]
