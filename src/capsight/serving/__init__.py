"""Serving: checkpoints that carry their capsule and head map, and a plugin for vLLM."""
