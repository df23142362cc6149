"""Asks models questions by named protocols and scores the answers, each method beside the full cache."""

from capsight.evaluation.asking import PROTOCOLS, Answers, ask_item
from capsight.evaluation.items import Ask, Item, jsonl_items, open_image, reference_items
from capsight.evaluation.journal import Journal
from capsight.evaluation.run import MethodResult, evaluate
from capsight.evaluation.score import Outcome, exact_match
from capsight.evaluation.sharing import FULL
from capsight.evaluation.summary import paired, split_label, summary

__all__ = [
    "FULL",
    "PROTOCOLS",
    "Answers",
    "Ask",
    "Item",
    "Journal",
    "MethodResult",
    "Outcome",
    "ask_item",
    "evaluate",
    "exact_match",
    "jsonl_items",
    "open_image",
    "paired",
    "reference_items",
    "split_label",
    "summary",
]
