"""How the reference VLM was trained: see, read, compare. Run it with ``python -m capsight.reference.training``."""
