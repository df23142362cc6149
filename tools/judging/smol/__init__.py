"""capsight-smol: a judge made of SmolLM2-135M-Instruct, a small vision tower and pictures from packages."""
