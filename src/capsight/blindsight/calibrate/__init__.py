"""Calibration: which head of a model can do with less than all keys."""

from capsight.blindsight.calibrate.budget import at_cost, cheapest_within
from capsight.blindsight.calibrate.criteria import CRITERIA
from capsight.blindsight.calibrate.held_out import HeldOut
from capsight.blindsight.calibrate.losses import Losses
from capsight.blindsight.calibrate.questions import Questions
from capsight.blindsight.calibrate.run import CriterionName, Unit, calibrate
from capsight.blindsight.calibrate.samples import Prompt, Sample, prompts
from capsight.blindsight.calibrate.votes import Thresholds

__all__ = [
    "CRITERIA",
    "CriterionName",
    "HeldOut",
    "Losses",
    "Prompt",
    "Questions",
    "Sample",
    "Thresholds",
    "Unit",
    "at_cost",
    "calibrate",
    "cheapest_within",
    "prompts",
]
