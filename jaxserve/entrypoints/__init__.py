"""Module names that scripts written for vLLM start."""
