"""Processors of checkpoints, with torchvision or without, and of one's own."""

from capsight.processors.load import load_processor
from capsight.processors.own import AnyProcessor, Processor, check_processor, own_processor

__all__ = ["AnyProcessor", "Processor", "check_processor", "load_processor", "own_processor"]
