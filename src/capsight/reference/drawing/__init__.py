"""Draws the images of the reference task: documents, tables, charts, shapes, clutter."""

from capsight.reference.drawing.canvas import Canvas, Glyph, Mark, Word
from capsight.reference.drawing.scene import KINDS, Scene, draw_scene

__all__ = ["KINDS", "Canvas", "Glyph", "Mark", "Scene", "Word", "draw_scene"]
