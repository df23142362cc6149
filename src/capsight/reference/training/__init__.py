"""How the reference VLM was trained: see, spell, compare (``python -m capsight.reference.training``)."""
