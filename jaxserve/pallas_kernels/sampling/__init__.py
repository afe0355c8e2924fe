"""Choosing tokens from logits in C++ (cpu.cc); `engine/sampling.py` says which, and does it in XLA."""

from typing import Literal

Implementation = Literal["xla", "cpu"]
