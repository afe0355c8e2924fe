"""The processor this machine has: what machine code made here may be kept for, and what it can do."""

import contextlib
import platform
from functools import cache

FACTS = ("model name", "flags", "CPU implementer", "CPU part", "Features")


@cache
def identity() -> str:
    """The same on two machines only where one runs the other's machine code."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as info:
        for line in info:
            name, _, value = line.partition(":")
            if name.strip() in FACTS:
                found.setdefault(name.strip(), value.strip())
    return "\n".join([platform.machine(), platform.processor(), *found.values()])


def has(feature: str) -> bool:
    """Whether it has a feature, in the kernel's words: avx2, amx_bf16."""
    return feature in identity().split()
