"""Choosing tokens from logits in kernels; `engine/sampling.py` says which tokens, and does it in XLA."""

from typing import Literal

Implementation = Literal["xla", "cpu", "gpu"]
