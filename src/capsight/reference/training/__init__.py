"""How the reference VLM was trained: see, spell, index, compare."""
