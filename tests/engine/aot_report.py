"""What the programs of published models become on devices that are not here.

`python -m tests.aot steps [NAME ...]`; they are the engine's own, of the ladder that `jaxserve plan` prints.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxserve.config import EngineConfig
from jaxserve.engine.compilation import Counts
from jaxserve.engine.devices import weight_type
from jaxserve.engine.kernels import choose_kernels
from jaxserve.engine.memory import fit
from jaxserve.engine.model import LoadedModel
from jaxserve.engine.programs import SHAPES, VARIANTS, Programs
from jaxserve.engine.topology import chip, compiler_mesh, memory_of_chip
from tests.aot import NO_WORK, Dump
from tests.hlo import collectives, instructions

CONFIGS = Path(__file__).parents[1] / "configs"
MIB = 2**20


class Target(NamedTuple):
    """An engine that could be, and what is compiled of its ladder beside the largest steps."""

    model: str
    device: str
    mesh: str
    steps: tuple[str, ...] = ()
    attention: str = "auto"


STEPS = "decode[1]", "decode[64]", "mixed[512]"
TARGETS = {
    "8B h200": Target("llama-3.1-8b", "h200", "1x1", STEPS),
    "8B h200 mosaic": Target("llama-3.1-8b", "h200", "1x1", STEPS, "mosaic"),
    "70B h200 4x1": Target("llama-3.1-70b", "h200", "4x1", STEPS),
    "8B v5e 4x1": Target("llama-3.1-8b", "v5e", "4x1"),
    "8B v6e": Target("llama-3.1-8b", "v6e", "1x1"),
}
NAMES = list(TARGETS)
KEPT = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call"}
"""Operations that make nothing."""


def reports(name: str, dump: Dump) -> Iterator[dict[str, Any]]:
    target = TARGETS[name]
    path, there = CONFIGS / f"{target.model}.json", chip(target.device)
    config = EngineConfig(model=str(path), mesh=target.mesh, attention=target.attention)
    mesh, memory = compiler_mesh(config, there), memory_of_chip(config, there)
    raw = json.loads(path.read_text())
    dtype = weight_type(config.dtype, raw, memory.platform)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        kernels = choose_kernels(config, mesh, dtype)
        model = LoadedModel(raw, mesh, dtype, kernels)
        budget = fit(config, model, memory)
        programs = Programs(model, budget.shapes, kernels.smallest_decode(memory.platform), Counts())
        for step, compiled in _compile(programs, target.steps, dump):
            text = compiled.as_text()
            run = list(instructions(text))
            taken = programs.temporaries().get(step, compiled.memory_analysis().temp_size_in_bytes)
            found = {
                "target": name,
                "jax": jax.__version__,
                "program": step,
                "temporaries MiB": round(taken / MIB, 1),
                "planned MiB": round(budget.temporaries / MIB, 1),
                "in place MiB": round(compiled.memory_analysis().alias_size_in_bytes / MIB, 1),
                "pools MiB": round(budget.pool / MIB, 1),
                "loops": sum(each.operation == "while" for each in run),
                "branches": sum(each.operation == "conditional" for each in run),
                "copies": _copies(step, run, model, budget.pool // budget.shapes.layers),
                "collectives": _counted(f"{name} {size}" for name, size in collectives(text)),
            }
            yield found | (_gpu(dump) if target.device == "h200" else {})


def _compile(programs: Programs, steps: tuple[str, ...], dump: Dump) -> Iterator[tuple[str, Any]]:
    """Names and programs; the dump is of the last one."""
    decode, mixed = max(b for b in programs.buckets if b.tokens == b.seqs), max(programs.buckets)
    compiled = [*(b for b in programs.buckets if b.name in steps), decode, mixed]
    for bucket in compiled:
        dump.clear()
        programs._compile_forward(bucket)
        yield bucket.name, programs.forward(bucket)
    singles = [b.seqs for b in compiled if b.tokens == b.seqs]
    for rows, variant in product(singles, VARIANTS):
        dump.clear()
        programs._compile_sample(rows, variant)
        yield f"sample[{rows}] {variant}", programs.sample(rows, variant)
    for rows, shaping in product(singles, SHAPES):
        dump.clear()
        programs._compile_shape(rows, shaping)
        yield f"shape[{rows}] {shaping}", programs.shape(rows, shaping)
    dump.clear()
    programs._compile_score(mixed)
    yield f"score[{mixed.tokens}]", programs.score(mixed)
    dump.clear()
    programs._compile_admit()
    yield "admit", programs.admit


def _copies(step: str, run: list, model: LoadedModel, pool: int) -> dict[str, int]:
    """By its name: what makes a copy as large as a pool, or in a decode anything as large as a weight (as
    activations of a mixed step are)."""
    weights, pool = set(), pool // model.dtype.itemsize
    if step.startswith("decode"):
        shards = [leaf.sharding.shard_shape(leaf.shape) for leaf in model.abstract if leaf.ndim > 1]
        weights = {math.prod(sizes) for sizes in [*shards, *(leaf.shape for leaf in model.abstract)]}
        weights = {size for size in weights if size >= MIB}
    made = [each for each in run if each.operation not in KEPT and "S(1)" not in each.result]
    return _counted(
        each.name.rstrip("0123456789.")
        for each in made
        if weights & set(each.elements) or (pool in each.elements and "copy" in each.name)
    )


def _gpu(dump: Dump) -> dict[str, Any]:
    """What thunks and ptxas say of the program that was compiled last."""
    thunks, kernels, shared = dump.thunks(), dump.kernels(), dump.shared_memory()
    work = [{kind: n for kind, n in part.items() if kind not in NO_WORK} for part in thunks]
    return {
        "kernels": sum(work[0].values()) + sum(work[1].values()),
        "command buffers": thunks.alone["kCommandBuffer"],
        "outside": dict(sorted(work[1].items())),
        "registers": max(kernel.registers for kernel in kernels),
        "spilled": sum(kernel.spilled for kernel in kernels),
        "shared": max(shared.values()),
    }


def _counted(names: Any) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))
