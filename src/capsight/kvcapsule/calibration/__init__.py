"""Calibration: what a model's own prompts say about its image blocks, and the capsule fitted to it."""
