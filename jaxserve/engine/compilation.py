"""What is compiled, where and when: a shelf of programs on disk, and counts that prove claims about it."""

import contextlib
import hashlib
import logging
import os
import pickle
import tempfile
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import flax
import jax
import jax.monitoring
import jax.numpy as jnp
import jaxlib.version
from jax.experimental import serialize_executable

import jaxserve
from jaxserve import processor
from jaxserve.home import home
from jaxserve.pallas_kernels import native

log = logging.getLogger(__name__)

PACKAGE = Path(jaxserve.__file__).parent
TRACED = (
    "models/**/*.py",
    "pallas_kernels/**/*.*",
    "engine/batch.py",
    "engine/compilation.py",
    "engine/kernels.py",
    "engine/model.py",
    "engine/programs.py",
    "engine/sampling.py",
    "engine/step.py",
    "sampling_params.py",
)
"""The sources that decide what a program is."""
LARGEST_SHELF = 2**30
"""Bytes that are kept, of all versions and machines together."""

_here = threading.local()
_lock = threading.Lock()
_listening = False


class Counts:
    """What one engine compiles."""

    def __init__(self) -> None:
        self.cache_hits = 0
        """Programs that were on the shelf."""
        self.cache_misses = 0
        """Programs that were compiled."""
        self.on_request_path = 0
        """Compilations of anything, inside `request_path`: a request waited for them."""
        _listen()

    @contextlib.contextmanager
    def request_path(self) -> Iterator[None]:
        """What this thread compiles, a request waits for."""
        outer = getattr(_here, "serving", None)
        _here.serving = self
        try:
            yield
        finally:
            _here.serving = outer

    def add(self, name: str) -> None:
        with _lock:
            setattr(self, name, getattr(self, name) + 1)


class Shelf:
    """Compiled programs on disk. Each stands under a digest of all that it is made from, so that nothing is
    traced to find it. One that cannot be read, for whatever reason, is not there."""

    def __init__(self, devices: Sequence[jax.Device], *facts: object):
        """`facts`: what the programs of one engine share."""
        self._devices = list(devices)
        platform = devices[0].client.platform_version
        kinds = [device.device_kind for device in devices]
        facts = (_sources(), *_versions(), platform, self._devices, kinds, *facts)
        self._facts = "\n".join(map(str, facts))
        self._folder = cache_dir()
        self.bytes = 0
        """Of all programs that were read or written."""

    def get(self, name: str) -> Any | None:
        """The program of that name."""
        path = self._path(name)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        try:
            body = content[32:]
            if hashlib.sha256(body).digest() != content[:32]:
                raise ValueError("it is not what was written")
            targets, payload, trees = pickle.loads(body)
            for source, number, symbol in targets:
                native.target(native.Kernel(PACKAGE / source, number), symbol)
            program = serialize_executable.deserialize_and_load(
                payload, trees[0], trees[1], self._devices[0].client, self._devices
            )
        except Exception as error:  # of many kinds, and all mean that it is to be compiled
            log.warning("%s is made anew: %s", path, error)
            return None
        self._add(content)
        with contextlib.suppress(OSError):
            os.utime(path)  # used last
        return program

    def put(self, name: str, program: Any, text: str) -> None:
        """Keep a program that was compiled just now, from `text`."""
        path = self._path(name)
        try:
            payload, *trees = serialize_executable.serialize(program)
            # installed elsewhere, the same sources make the same programs
            targets = [
                (os.path.relpath(kernel.source, PACKAGE), kernel.number, symbol)
                for kernel, symbol in native.targets_in(text)
            ]
            body = pickle.dumps((targets, payload, trees))
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
                made = Path(scratch) / path.name
                content = hashlib.sha256(body).digest() + body
                made.write_bytes(content)
                os.replace(made, path)
            self._add(content)
        except Exception as error:  # the disk's, or of what cannot be serialised
            log.warning("a compiled program cannot be kept, and the next start compiles it again: %s", error)

    def _add(self, content: bytes) -> None:
        with _lock:
            self.bytes += len(content)

    def _path(self, name: str) -> Path:
        digest = hashlib.sha256(f"{self._facts}\n{name}".encode()).hexdigest()
        return self._folder / f"{digest[:32]}.program"


def prune(limit: int = LARGEST_SHELF) -> None:
    """Of all programs on disk, for any version and machine, forget those that were used least recently."""
    with contextlib.suppress(OSError):
        files = [(path.stat(), path) for path in (home() / "compiled").rglob("*") if path.is_file()]
        files.sort(key=lambda file: file[0].st_mtime, reverse=True)
        size = 0
        for stat, path in files:
            size += stat.st_size
            if size > limit:
                path.unlink()


def cache_dir() -> Path:
    """Where this machine's compiled programs are: programs hold machine code for one kind of processor."""
    facts = [jax.__version__, processor.identity(), os.environ.get("XLA_FLAGS", "")]
    return home() / "compiled" / hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


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


@cache
def _sources() -> str:
    """A digest of the code that is traced."""
    digest = hashlib.sha256()
    for pattern in TRACED:
        for path in sorted(PACKAGE.glob(pattern)):
            if path.suffix in (".py", ".cc", ".h", ".json"):
                digest.update(f"{path.relative_to(PACKAGE)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _versions() -> list[str]:
    settings = {name: value for name, value in jax.config.values.items() if "cache" not in name}
    found = (jax.__version__, jaxlib.version.__version__, flax.__version__, processor.identity())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    named = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "PJRT_NPROC")
    # the compiler cuts loops into as many parts as there are cores
    environment = [os.environ.get(name, "") for name in named]
    return [*map(str, (*found, sorted(settings.items()), cores)), *environment]


def _listen() -> None:
    global _listening
    with _lock:
        if not _listening:
            jax.monitoring.register_event_duration_secs_listener(_on_duration)
            _listening = True


def _on_duration(event: str, duration_secs: float, **_: object) -> None:
    if event == "/jax/core/compile/backend_compile_duration" and (counts := getattr(_here, "serving", None)):
        counts.add("on_request_path")
