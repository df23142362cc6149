"""How the reference VLM was trained: see, read, compare, finish."""
