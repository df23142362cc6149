"""Asks models questions by named protocols and scores the answers, each method beside the full cache."""

from capsight.evaluation.asking import PROTOCOLS, Answers, ask_item
from capsight.evaluation.items import Ask, Item, jsonl_items, open_image, reference_items
from capsight.evaluation.run import FULL, MethodResult, evaluate, summary
from capsight.evaluation.score import Outcome, exact_match

__all__ = [
    "FULL",
    "PROTOCOLS",
    "Answers",
    "Ask",
    "Item",
    "MethodResult",
    "Outcome",
    "ask_item",
    "evaluate",
    "exact_match",
    "jsonl_items",
    "open_image",
    "reference_items",
    "summary",
]
