"""Capsules at rest: joint latents in uniform steps, entropy coded, for files and stores."""

from capsight.kvcapsule.rest.cache_file import RestFile, is_rest_file, load_rest, read_rest_file
from capsight.kvcapsule.rest.latents import DEFAULT_QUALITY, check_quality
from capsight.kvcapsule.rest.parts import for_rest
from capsight.kvcapsule.rest.saving import save_rest
from capsight.kvcapsule.rest.store import CapsuleStore, ImageKey

__all__ = [
    "DEFAULT_QUALITY",
    "CapsuleStore",
    "ImageKey",
    "RestFile",
    "check_quality",
    "for_rest",
    "is_rest_file",
    "load_rest",
    "read_rest_file",
    "save_rest",
]
