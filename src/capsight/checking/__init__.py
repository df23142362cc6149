"""The family kit: what works for a model class, found out on a tiny copy of it with random weights."""

from capsight.checking.case import Case
from capsight.checking.checks import CHECKS, Result, run_checks
from capsight.checking.shrink import tiny_model

__all__ = ["CHECKS", "Case", "Result", "run_checks", "tiny_model"]
