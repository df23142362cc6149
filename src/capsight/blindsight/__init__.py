"""temporary"""
from capsight.blindsight.attention import sparse_attention
from capsight.blindsight.categories import Category, MaskOptions
from capsight.blindsight.head_map import HeadMap
from capsight.blindsight.masks import reference_mask
from capsight.blindsight.rule import BaseRule
