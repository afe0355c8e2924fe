"""What is compiled, where and when: a persistent cache, and counts that prove claims about it."""

import contextlib
import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.monitoring
import jax.numpy as jnp

from jaxserve import processor
from jaxserve.home import home

_here = threading.local()
_lock = threading.Lock()
_EVENTS = {
    "/jax/compilation_cache/cache_hits": "cache_hits",
    "/jax/compilation_cache/cache_misses": "cache_misses",
}
_listening = False


class Counts:
    """What one engine compiles: in its threads, inside `counted` or `request_path`."""

    def __init__(self) -> None:
        self.cache_hits = 0
        self.cache_misses = 0
        self.on_request_path = 0
        """Compilations that a request waited for, cached or not."""

    @contextlib.contextmanager
    def counted(self, serving: bool = False) -> Iterator[None]:
        """This thread's compilations count here."""
        outer = getattr(_here, "counts", None), getattr(_here, "serving", False)
        _here.counts, _here.serving = self, serving
        try:
            yield
        finally:
            _here.counts, _here.serving = outer

    def request_path(self) -> contextlib.AbstractContextManager[None]:
        """This thread's compilations count here, as ones that a request waits for."""
        return self.counted(serving=True)

    def _add(self, name: str) -> None:
        with _lock:
            setattr(self, name, getattr(self, name) + 1)


def enable_cache() -> None:
    """Keep every compiled program on disk, apart for each machine and version, unless the user chose a
    place; and start counting."""
    global _listening
    with _lock:
        if not _listening:
            jax.monitoring.register_event_listener(_on_event)
            jax.monitoring.register_event_duration_secs_listener(_on_duration)
            _listening = True
    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(cache_dir()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def compiler_options(platform: str, dtype: jnp.dtype, deterministic: bool = False) -> dict[str, str | bool]:
    """Options of all programs of a model of this type.

    float32 is asked for where exactness counts. On a CPU, XLA's fast products add up a whole row in one
    running sum; without them logits come three times closer to float64 (docs/performance.md). Its fast
    reductions, which it takes from some number of rows on, add up in another order than its own.
    """
    if platform == "gpu":
        return {"xla_gpu_exclude_nondeterministic_ops": True} if deterministic else {}
    if platform == "cpu" and dtype == jnp.float32:
        return {YNN: ""}
    return {YNN: YNN_PRODUCTS} if platform == "cpu" and deterministic else {}


YNN = "xla_cpu_experimental_ynn_fusion_type"
"""Which operations XLA leaves to its library of fast kernels."""
YNN_PRODUCTS = "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"


def cache_dir() -> Path:
    """Where this machine's compiled programs are: programs hold machine code for one kind of processor."""
    facts = [jax.__version__, processor.identity(), os.environ.get("XLA_FLAGS", "")]
    return home() / "compiled" / hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def _on_event(event: str, **_: object) -> None:
    if (counts := getattr(_here, "counts", None)) and event in _EVENTS:
        counts._add(_EVENTS[event])


def _on_duration(event: str, duration_secs: float, **_: object) -> None:
    if event == "/jax/core/compile/backend_compile_duration" and getattr(_here, "serving", False):
        _here.counts._add("on_request_path")
