"""Asks models questions by named protocols and scores the answers, each method beside the full cache."""

from capsight.evaluation.asking import PROTOCOLS, Answers, ask_item
from capsight.evaluation.items import Ask, Item, reference_items
from capsight.evaluation.journal import Journal
from capsight.evaluation.jsonl import jsonl_items
from capsight.evaluation.metric import METRICS, exact_match
from capsight.evaluation.run import MethodResult, evaluate
from capsight.evaluation.score import Outcome
from capsight.evaluation.sharing import FULL
from capsight.evaluation.summary import paired, split_label, summary

__all__ = [
    "FULL",
    "METRICS",
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
    "paired",
    "reference_items",
    "split_label",
    "summary",
]
