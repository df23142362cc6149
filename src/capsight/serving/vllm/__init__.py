"""capsight inside vLLM: a plugin, without a fork."""
