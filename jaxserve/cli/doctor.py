"""`jaxserve doctor`: what is here, what is wrong, what to do."""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Literal, NamedTuple

from jaxserve import __version__
from jaxserve.cli.flags import Parser
from jaxserve.config import DEFAULT_MODEL

PACKAGES = ("jax", "jaxlib", "flax", "transformers", "tokenizers", "safetensors", "gguf", "starlette")
GPU_BUILD = "pip install 'jaxserve[cuda12]' (or [cuda13])"
MARKS = {"ok": " ", "note": "?", "broken": "!"}


class Finding(NamedTuple):
    name: str
    value: str
    state: Literal["ok", "note", "broken"] = "ok"
    advice: str = ""


def parser() -> Parser:
    parser = Parser(prog="jaxserve doctor", description="Say what was found, what is wrong and what to do.")
    parser.add_argument("--json", action="store_true", help="print findings as a JSON list")
    return parser


def run(args: argparse.Namespace) -> int:
    findings = list(examine())
    broken = [finding for finding in findings if finding.state == "broken"]
    if args.json:
        print(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        _print(findings)
        print(f"\n{len(broken)} broken" if broken else "\neverything needed is here")
    return 1 if broken else 0


def examine() -> Iterator[Finding]:
    """Every finding; a check that itself fails is one too."""
    for check in (_versions, _nvidia, _devices, _kernels, _memory, _home, _cache, _default_model):
        yield from _safely(check)


def _versions() -> Iterator[Finding]:
    yield Finding("jaxserve", __version__)
    yield Finding("python", f"{sys.version.split()[0]} at {sys.executable}")
    for name in PACKAGES:
        try:
            yield Finding(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Finding(name, "not installed", "broken", "pip install jaxserve")


def _nvidia() -> Iterator[Finding]:
    gpus = _nvidia_gpus()
    if isinstance(gpus, str):
        yield Finding("NVIDIA driver", gpus, "broken", "install or repair the NVIDIA driver")
    else:
        yield Finding("NVIDIA driver", "; ".join(gpus) or "none")


def _devices() -> Iterator[Finding]:
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:
        wanted = os.environ.get("JAX_PLATFORMS")
        unset = f"unset JAX_PLATFORMS (it is {wanted!r}) or install what it asks for"
        yield Finding("devices", _first_line(error), "broken", unset if wanted else GPU_BUILD)
        return
    names = f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
    gpus = _nvidia_gpus()
    if devices[0].platform == "cpu" and gpus and not isinstance(gpus, str):
        chosen = "cpu" in os.environ.get("JAX_PLATFORMS", "")
        advice = "JAX_PLATFORMS keeps JAX off the GPU" if chosen else f"JAX has no GPU build: {GPU_BUILD}"
        yield Finding("devices", f"{names}; the GPU is not used", "note" if chosen else "broken", advice)
    else:
        yield Finding("devices", names)
    for device in devices:
        if stats := device.memory_stats():
            free = stats["bytes_limit"] - stats["bytes_in_use"]
            yield Finding(f"memory of {device}", f"{_size(free)} of {_size(stats['bytes_limit'])} free")


def _kernels() -> Iterator[Finding]:
    import jax

    from jaxserve.engine.devices import platform_of
    from jaxserve.engine.kernels import cpu_kernels
    from jaxserve.pallas_kernels import native

    platform = platform_of(jax.devices()[0])
    if platform.name != "cpu":
        yield Finding("attention", platform.attention)
        return
    for _, kernel in cpu_kernels("bfloat16", "int8"):
        name = f"C++ kernel {kernel.name}"
        try:
            if not native.find(kernel):
                yield Finding(name, f"compiled on first use, with {shlex.join(native.compiler())}")
            elif missing := native.why_not(kernel):
                raise native.NativeError(missing)
            else:
                yield Finding(name, "compiled for this processor")
        except native.NativeError as error:
            yield Finding(name, f"not used: {error}", "note", "it works without, but slower")


def _memory() -> Iterator[Finding]:
    page = os.sysconf("SC_PAGE_SIZE")
    yield Finding("memory", f"{_size(os.sysconf('SC_PHYS_PAGES') * page)}, {os.cpu_count()} CPUs")


def _home() -> Iterator[Finding]:
    from jaxserve.home import home

    place = home()
    existing = next(path for path in (place, *place.parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        advice = "set JAXSERVE_HOME to a directory that you may write to"
        yield Finding("JAXSERVE_HOME", f"{place} cannot be written", "broken", advice)
        return
    free = shutil.disk_usage(existing).free
    short = Finding("JAXSERVE_HOME", f"{place}, {_size(free)} free")
    yield short if free > 2**30 else short._replace(state="note", advice="a model may not fit on this disk")


def _cache() -> Iterator[Finding]:
    from jaxserve.engine.compilation import cache_dir

    place = cache_dir()
    files = [path.stat().st_size for path in place.rglob("*") if path.is_file()]
    yield Finding("compiled programs", f"{len(files)} files, {_size(sum(files))} at {place}")


def _default_model() -> Iterator[Finding]:
    from jaxserve.loading.hub import list_models

    here = {entry.ref: entry for entry in list_models()}
    if DEFAULT_MODEL in here:
        yield Finding("default model", str(here[DEFAULT_MODEL].path))
    else:
        advice = "jaxserve pull fetches it; jaxserve serve does so by itself"
        yield Finding("default model", f"{DEFAULT_MODEL} is not here yet", "note", advice)


def _nvidia_gpus() -> list[str] | str:
    """Name, driver and memory of each GPU; a text says why nvidia-smi failed."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {error}"
    return done.stdout.splitlines() if done.returncode == 0 else _first_line(done.stdout + done.stderr)


def _safely(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except Exception as error:  # the next checks may say why
        name, problem = check.__name__.strip("_").replace("_", " "), f"{type(error).__name__}: {error}"
        yield Finding(name, _first_line(problem), "broken", "a bug, if no other line explains it")


def _print(findings: list[Finding]) -> None:
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{MARKS[finding.state]} {finding.name:{width}}  {finding.value}")
        if finding.advice:
            print(f"  {'':{width}}  -> {finding.advice}")


def _first_line(text: object) -> str:
    return next(iter(str(text).strip().splitlines()), "no explanation")


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
