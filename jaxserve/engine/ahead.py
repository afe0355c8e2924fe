"""All that an engine would compile, compiled before it starts: no weight is read."""

from pathlib import Path
from typing import NamedTuple

from jaxserve.config import EngineConfig
from jaxserve.engine.compilation import Counts, cache_dir
from jaxserve.engine.devices import make_mesh, memory_of, platform_of, weight_type
from jaxserve.engine.kernels import choose_kernels, cpu_kernels
from jaxserve.engine.memory import fit
from jaxserve.engine.model import LoadedModel
from jaxserve.engine.process import with_own_devices
from jaxserve.engine.programs import Programs
from jaxserve.errors import EngineDied
from jaxserve.loading.checkpoint import open_checkpoint
from jaxserve.loading.hub import resolve
from jaxserve.pallas_kernels import native


class Made(NamedTuple):
    """What an engine needs, and will find."""

    compiled: int
    here: int
    """Before."""
    bytes: int
    place: Path


def compile_kernels(config: EngineConfig) -> Made:
    """The C++ kernels; none where there is no compiler, or the device is no CPU. Needs no model."""
    mesh = make_mesh(with_own_devices(config, 0), 0)
    dtype = weight_type(config.dtype, {}, platform_of(mesh.devices.flat[0]))
    kernels = cpu_kernels(dtype, config.quantization)
    before = [native.find(kernel) for _, kernel in kernels]
    chosen = choose_kernels(config, mesh, dtype)
    used = [getattr(chosen, name) == "cpu" for name, _ in kernels]
    sizes = [path.stat().st_size for _, kernel in kernels if (path := native.find(kernel))]
    here = sum(was is not None for was, use in zip(before, used, strict=True) if use)
    return Made(sum(used) - here, here, sum(sizes), native.shelf())


def compile_programs(config: EngineConfig) -> Made:
    """Every program of an engine with these options. Raises as the engine would."""
    config = with_own_devices(config, 0)
    mesh = make_mesh(config, 0)
    device = mesh.devices.flat[0]
    found = open_checkpoint(resolve(config.model), tensors=False).config
    dtype = weight_type(config.dtype, found, platform_of(device))
    kernels = choose_kernels(config, mesh, dtype)
    model = LoadedModel(found, mesh, dtype, kernels, config.quantization)
    budget = fit(config, model, memory_of(config, device))
    counts = Counts()
    smallest = model.kernels.smallest_decode(platform_of(device))
    programs = Programs(model, budget.shapes, smallest, counts, config.deterministic)
    with programs.start():
        pass
    if not programs.wait_until_warm():
        raise EngineDied("not every program could be compiled")
    return Made(counts.cache_misses, counts.cache_hits, programs.bytes_on_disk, cache_dir())
