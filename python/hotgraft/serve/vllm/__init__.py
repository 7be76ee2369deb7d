"""Skills inside vLLM 0.32: a scheduler that gives each step to one skill, and its workers."""
