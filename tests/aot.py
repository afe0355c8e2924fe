"""What programs become on devices that are not here.

    python -m tests.aot attention|experts|steps [NAME ...]      compiles, and prints a table
    python -m tests.aot packages                        what that needs, for pip: compilers alone

`make test-aot` does both, and tests what comes of it.
"""

import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any, NamedTuple

MODULES = {
    "attention": "tests.pallas_kernels.paged_attention.aot_report",
    "experts": "tests.pallas_kernels.grouped_matmul.aot_report",
    "steps": "tests.engine.aot_report",
}
"""Each has NAMES, and `reports(name, dump)`."""
COMPILERS = {"gpu": "jax_cuda13_plugin", "tpu": "libtpu"}
"""What each is imported from."""
H200_SHARED_MEMORY = 232448
"""Bytes that one block of an H200 can have."""
NO_WORK = {"kSequential", "kAsyncStart", "kAsyncDone", "kCommandBuffer", "kWhile", "kConditional"}
"""Thunks that run others, or wait for them."""
MADE: list[dict[str, Any]] = []
"""All reports of this session."""


def missing(platform: str) -> str:
    """Why nothing can be compiled for a platform; empty when it can."""
    if importlib.util.find_spec(COMPILERS[platform]) is None:
        return f"needs {COMPILERS[platform]}: make test-aot"
    return "" if platform == "tpu" or shutil.which("ptxas") else "needs ptxas: make test-aot"


def packages() -> list[str]:
    jaxlib = version("jaxlib")
    tpu = next(line for line in requires("jax") or [] if line.startswith("libtpu"))
    found = [f"jax-cuda13-pjrt=={jaxlib}", f"jax-cuda13-plugin=={jaxlib}", tpu.partition(";")[0].strip()]
    return found if shutil.which("ptxas") else [*found, "nvidia-cuda-nvcc"]


def run(kind: str, *names: str) -> list[dict[str, Any]]:
    """Reports, made in a process of their own: XLA is told once where to write what it makes."""
    command = [sys.executable, "-m", "tests.aot", kind, *names, "--json"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    MADE.extend(reports)
    return reports


class Kernel(NamedTuple):
    """What ptxas makes of one function of a GPU."""

    name: str
    registers: int
    spilled: int
    """Bytes."""
    products: str
    """The instructions that multiply matrices."""


class Thunks(NamedTuple):
    """What a GPU is asked to do in one run of a program, by kind."""

    captured: Counter[str]
    """In command buffers: the host launches each as one."""
    alone: Counter[str]
    """By the host, one after another."""


class Dump:
    """Where XLA writes what it makes of one program. To be made before jax is imported."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        os.environ |= {
            "JAX_PLATFORMS": "cpu",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "MOSAIC_GPU_DUMP_TO": str(self.folder),
            "XLA_FLAGS": f"--xla_dump_to={self.folder} --xla_dump_hlo_as_text --xla_dump_emitter_re=ptx",
        }

    def clear(self) -> None:
        shutil.rmtree(self.folder)
        self.folder.mkdir()

    def kernels(self) -> list[Kernel]:
        found = []
        for path in self.folder.glob("*.ptx"):
            bodies = _functions(path.read_text())
            if not bodies:
                continue
            command = ["ptxas", "-v", "-arch=sm_90a", str(path), "-o", "/dev/null"]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            pattern = r"function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
            for name, spilled, registers in re.findall(pattern, said, re.S):
                products = sorted(set(re.findall(r"wgmma\.mma_async|mma\.sync", bodies[name]))) or ["fma"]
                found.append(Kernel(name, int(registers), int(spilled), ", ".join(products)))
        return found

    def figures(self, prefix: str) -> list[dict[str, Any]]:
        """What a report says of each kernel whose name begins so."""
        shared = self.shared_memory()
        return [
            {
                "kernel": kernel.name.removeprefix(prefix).removesuffix("_mosaic_gpu_kernel"),
                "registers": kernel.registers,
                "spilled": kernel.spilled,
                "shared": shared.get(kernel.name, "unknown"),
                "products": kernel.products,
            }
            for kernel in self.kernels()
            if kernel.name.startswith(prefix)
        ]

    def shared_memory(self) -> dict[str, int]:
        """Bytes, by kernel."""
        found = re.findall(r"(\w+) grid: .*shared_memory: (\d+)", self._read("*thunk_sequence.txt"))
        for path in self.folder.glob("*.resources.txt"):  # of Mosaic's kernels, where jax writes it
            name = re.sub(r"_\d+\.resources\.txt", "_mosaic_gpu_kernel", path.name)
            found += re.findall(r"(\w+) .*smem_scratch_bytes=(\d+)", f"{name} {path.read_text()}")
        return {name: int(size) for name, size in found}

    def thunks(self) -> Thunks:
        passed = self._read("*thunk_sequence_after_thunk_passes.txt")
        return thunks(passed or self._read("*thunk_sequence.txt"))  # too few for a command buffer

    def _read(self, pattern: str) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob(pattern)))


def _functions(ptx: str) -> dict[str, str]:
    """The text of each kernel."""
    parts = re.split(r"\.entry (\w+)", ptx)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def thunks(text: str) -> Thunks:
    """Of what XLA writes: a line each, and those that a thunk runs are indented below it."""
    found, inside = Thunks(Counter(), Counter()), None
    for line in text.splitlines():
        if not (thunk := re.match(r"( *)(?:\d+: )?(k[A-Z]\w+)", line)):
            continue
        indent, kind = len(thunk.group(1)), thunk.group(2)
        if inside is not None and indent <= inside:
            inside = None
        (found.alone if inside is None else found.captured)[kind] += 1
        if kind == "kCommandBuffer" and inside is None:
            inside = indent
    return found


def tables(reports: Iterable[dict[str, Any]]) -> str:
    """Markdown; reports with the same fields share a table."""
    lines: list[str] = []
    fields: list[str] = []
    for report in reports:
        if list(report) != fields:
            fields = list(report)
            lines += ["", f"| {' | '.join(fields)} |", f"|{'---|' * len(fields)}"]
        lines.append(f"| {' | '.join(_cell(value) for value in report.values())} |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{count} {name}" for name, count in value.items())
    return f"{value:,}" if type(value) is int else str(value)


def main(kind: str, *names: str) -> None:
    if kind == "packages":
        return print(*packages())
    dump, as_json = Dump(), "--json" in names
    module = importlib.import_module(MODULES[kind])
    made = []
    for name in [name for name in names if name != "--json"] or module.NAMES:
        for report in module.reports(name, dump):
            made.append(report)
            if as_json:
                print(json.dumps(report), flush=True)
    if not as_json:
        print(tables(made))


if __name__ == "__main__":
    main(*sys.argv[1:])
