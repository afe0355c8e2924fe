"""Kernels in C++ for the CPU: compiled on first use for the machine they run on, called through jax.ffi.

A library is kept under `$JAXSERVE_HOME` by a digest of its sources and of the machine. The digest is part of
the names that compiled programs call it by, so that a program from the cache never meets another version.
"""

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib

from jaxserve import processor
from jaxserve.home import home

log = logging.getLogger(__name__)

HEADERS = Path(__file__).parent
FLAGS = (
    *("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC"),
    *("-fno-math-errno", "-ffp-contract=fast"),
)
COMPILERS = ("c++", "g++", "clang++")
NUMBERS = {"float32": "float", "bfloat16": "BFloat16", "float16": "Float16"}
"""What vector.h calls the types."""
LONGEST_COMPILE = 300
"""Seconds."""


class NativeError(Exception):
    """There is no library, and why."""


class Kernel(NamedTuple):
    """A C++ file and the type of numbers that it is compiled for, its macro NUMBER."""

    source: Path
    number: str = "float"

    @classmethod
    def of(cls, source: Path, dtype: Any) -> "Kernel":
        """Raises TypeError for a type that vector.h cannot read."""
        if (name := jnp.dtype(dtype).name) not in NUMBERS:
            raise TypeError(f"C++ kernels read {', '.join(NUMBERS)}, not {name}")
        return cls(source, NUMBERS[name])

    @property
    def name(self) -> str:
        return f"{self.source.parent.name}-{self.number}"


def target(kernel: Kernel, symbol: str) -> str:
    """The name under which `jax.ffi.ffi_call` finds a kernel's handler. Raises NativeError."""
    library = _library(kernel)
    name = f"jaxserve_{symbol}_{library.digest}"
    with library.lock:
        if name not in library.registered:
            try:
                handler = jax.ffi.pycapsule(getattr(library.handle, symbol))
            except AttributeError:
                raise NativeError(f"{kernel.source} has no handler {symbol}") from None
            jax.ffi.register_ffi_target(name, handler, platform="cpu")
            library.registered.add(name)
    _targets[name] = kernel, symbol
    return name


def targets_in(program: str) -> list[tuple[Kernel, str]]:
    """What `target` was asked for and the text of a program calls."""
    return [asked for name, asked in _targets.copy().items() if name in program]


def why_not(*kernels: Kernel) -> str:
    """Why these kernels cannot be used here; empty when they can. Compiles them if needed."""
    try:
        for kernel in kernels:
            _library(kernel)
    except NativeError as error:
        return str(error)
    return ""


def prepare(*kernels: Kernel) -> None:
    """Begin to compile these, each in a thread; whoever needs one waits for it."""
    for kernel in kernels:
        threading.Thread(target=why_not, args=(kernel,), name=f"compile {kernel.name}", daemon=True).start()


def find(kernel: Kernel) -> Path | None:
    """A kernel's library, if it has been compiled here and is whole. Raises NativeError."""
    try:
        for path in shelf().glob(f"{kernel.name}-{_digest(kernel)}-*.so"):
            if path.stem.endswith(f"-{_hash(path.read_bytes())}"):
                return path
            log.warning("%s is damaged: it is made anew", path)
            path.unlink(missing_ok=True)  # by another process, perhaps
    except OSError as error:
        raise NativeError(f"no C++ kernels: {error}") from None
    return None


def compiler() -> list[str]:
    """The command of a C++ compiler. Raises NativeError when there is none."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    for command in [wanted] if wanted else [[name] for name in COMPILERS]:
        if shutil.which(command[0]):
            return command
    reason = f"CXX={shlex.join(wanted)} is not here" if wanted else "install g++ or clang++"
    raise NativeError(f"there is no C++ compiler: {reason}")


def build(kernel: Kernel, folder: Path, *more: str) -> Path:
    """Compile a kernel into a folder, whole or not at all. Raises NativeError, with the compiler's words."""
    command = [*compiler(), *FLAGS, *more, f"-DNUMBER={kernel.number}"]
    command += ["-isystem", jax.ffi.include_dir(), f"-I{HEADERS}", str(kernel.source), "-o"]
    log.info("compiling the C++ kernel %s, once for this machine", kernel.name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / "library.so"
            done = subprocess.run(
                [*command, str(made)],
                capture_output=True,
                text=True,
                errors="replace",
                env=os.environ | {"LC_ALL": "C"},
                timeout=LONGEST_COMPILE,
            )
            if done.returncode != 0:
                problem = _first_error(done.stderr)
                raise NativeError(f"{command[0]} could not compile {kernel.source}: {problem}")
            path = folder / f"{kernel.name}-{_digest(kernel)}-{_hash(made.read_bytes())}.so"
            os.replace(made, path)
            return path
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeError(f"{kernel.source} could not be compiled: {error}") from None


class _Library:
    def __init__(self, path: Path, digest: str):
        self.digest = digest
        self.handle = ctypes.CDLL(str(path))
        self.registered: set[str] = set()
        self.lock = threading.Lock()


_targets: dict[str, tuple[Kernel, str]] = {}
_known: dict[Kernel, _Library | NativeError] = {}
_compiling: dict[Kernel, threading.Lock] = defaultdict(threading.Lock)
_lock = threading.Lock()


def _library(kernel: Kernel) -> _Library:
    """A kernel's library; a failure is remembered."""
    with _lock:
        compiling = _compiling[kernel]
    with compiling:
        if kernel not in _known:
            try:
                path = find(kernel) or build(kernel, shelf())
                _known[kernel] = _Library(path, _digest(kernel))
            except NativeError as error:
                _known[kernel] = error
            except OSError as error:
                _known[kernel] = NativeError(f"{kernel.name} cannot be loaded: {error}")
    found = _known[kernel]
    if isinstance(found, NativeError):
        raise found
    return found


def shelf() -> Path:
    """Where the libraries are."""
    return home() / "native"


def _digest(kernel: Kernel) -> str:
    """Of all that a library is made from, and of the processor it is made for."""
    parts = [*FLAGS, kernel.number, jaxlib.__version__, processor.identity()]
    headers = [*HEADERS.glob("*.h"), *kernel.source.parent.glob("*.h")]
    sources = (kernel.source, *sorted(headers))
    return _hash("\n".join(parts).encode(), *(file.read_bytes() for file in sources))


def _hash(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _first_error(text: str) -> str:
    lines = text.strip().splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else "no explanation")
