"""Calibration: which head of a model can do with less than all keys."""

from capsight.blindsight.calibrate.criteria import CRITERIA
from capsight.blindsight.calibrate.held_out import HeldOut
from capsight.blindsight.calibrate.run import CriterionName, calibrate
from capsight.blindsight.calibrate.samples import Prompt, Sample, prompts
from capsight.blindsight.calibrate.votes import Thresholds

__all__ = ["CRITERIA", "CriterionName", "HeldOut", "Prompt", "Sample", "Thresholds", "calibrate", "prompts"]
