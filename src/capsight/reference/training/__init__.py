"""How the reference VLM was trained: see, read, compare (``python -m capsight.reference.training``)."""
