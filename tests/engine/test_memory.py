"""The arithmetic of memory: against the compiler's, and what it refuses with nothing loaded or compiled."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from bench.pool_waste import measure
from jaxserve import Engine
from jaxserve.config import EngineConfig, parse_mesh
from jaxserve.engine import compilation, devices
from jaxserve.engine.devices import CPU, GPU, TPU, Memory, make_mesh, memory_of
from jaxserve.engine.kernels import Kernels
from jaxserve.engine.memory import CPU_POOL_BYTES, GRID, fit
from jaxserve.engine.model import LoadedModel
from jaxserve.engine.programs import Programs
from jaxserve.engine.simulation.traffic import Traffic
from jaxserve.errors import ConfigError

CONFIGS = Path(__file__).parents[1] / "configs"
GIB = 2**30
BASE = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "num_hidden_layers": 1,
    "max_position_embeddings": 4096,
}
DEEP_MLP = BASE | {
    "vocab_size": 1000,
    "hidden_size": 512,
    "intermediate_size": 4096,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
UNGATED = DEEP_MLP | {"mlp_bias": True}
"""That the C++ product cannot gate."""
MANY_HEADS = BASE | {
    "vocab_size": 1000,
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}
LARGE_VOCABULARY = BASE | {
    "vocab_size": 50001,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# model, dtype, kernels, max_num_seqs, max_num_batched_tokens, tensor[, quantization, kv_cache_dtype]
SHAPES = [
    (DEEP_MLP, "bfloat16", ("xla", "xla"), 8, 2048, 1),
    (MANY_HEADS, "bfloat16", ("xla", "xla"), 16, 1024, 1),
    (MANY_HEADS, "float32", ("reference", "xla"), 4, 64, 1),
    (LARGE_VOCABULARY, "bfloat16", ("xla", "xla"), 64, 256, 1),
    (DEEP_MLP, "bfloat16", ("xla", "xla"), 8, 2048, 2),
    pytest.param((DEEP_MLP, "bfloat16", ("cpu", "cpu"), 8, 2048, 1), marks=pytest.mark.compiler),
    pytest.param((MANY_HEADS, "float32", ("cpu", "cpu"), 16, 1024, 1), marks=pytest.mark.compiler),
    pytest.param((LARGE_VOCABULARY, "bfloat16", ("cpu", "cpu"), 64, 256, 1), marks=pytest.mark.compiler),
    pytest.param((MANY_HEADS, "bfloat16", ("cpu", "cpu"), 16, 1024, 1), marks=pytest.mark.compiler),
    pytest.param((UNGATED, "bfloat16", ("cpu", "cpu"), 8, 2048, 1), marks=pytest.mark.compiler),
]
IN_8_BITS = [
    (DEEP_MLP, "bfloat16", ("xla", "xla"), 8, 2048, 1, "int8"),
    (DEEP_MLP, "bfloat16", ("xla", "xla"), 8, 2048, 2, "int8"),
    (MANY_HEADS, "bfloat16", ("xla", "xla"), 16, 1024, 1, "int8"),
    pytest.param((DEEP_MLP, "bfloat16", ("cpu", "cpu"), 8, 2048, 1, "int8"), marks=pytest.mark.compiler),
    (MANY_HEADS, "bfloat16", ("xla", "xla"), 16, 1024, 1, None, "int8"),
    (MANY_HEADS, "bfloat16", ("xla", "xla"), 16, 1024, 1, None, "fp8"),
]


def compare(config, dtype, kernels, seqs, tokens, tensor, quantization=None, kv="auto"):
    """(estimate, what the compiler says of the largest program), in bytes."""
    options = EngineConfig(
        mesh=f"{tensor}x1",
        dtype=dtype,
        attention=kernels[0],
        quantization=quantization,
        kv_cache_dtype=kv,
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        max_model_len=512,
        num_blocks=65,
    )
    mesh = make_mesh(options, 0)
    model = LoadedModel(config, mesh, jnp.dtype(dtype), Kernels(*kernels, sampler=kernels[1]), quantization)
    budget = fit(options, model, memory_of(options, mesh.devices.flat[0]))
    programs = Programs(model, budget.shapes, 4, compilation.Counts())
    programs.compile_largest()
    return budget.temporaries, max(programs.temporaries().values())


@pytest.mark.parametrize("args", SHAPES + IN_8_BITS)
def test_temporaries_are_bounded_before_anything_is_compiled(args):
    if args[5] == 1:
        estimate, compiled = compare(*args)
    else:  # this process has one device
        code = f"import test_memory; print(*test_memory.compare{args})"
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        estimate, compiled = map(int, done.stdout.split())
    assert compiled <= estimate <= 1.5 * compiled + 8 * 2**20


def plan(name="llama-3.1-8b", memory=72 * GIB, used=0, platform=GPU, dtype="bfloat16", **options):
    config = EngineConfig(model=name, dtype=dtype, **options)
    tensor = parse_mesh(config.mesh).tensor
    mesh = AbstractMesh((tensor,), ("tensor",), axis_types=(AxisType.Auto,))
    shape = json.loads((CONFIGS / f"{name}.json").read_text())
    model = LoadedModel(shape, mesh, jnp.dtype(dtype))
    return fit(config, model, Memory(platform, "a device", memory, used, "0.9 of 80.0 GiB"))


def test_the_pool_takes_what_is_left_down_to_the_grid():
    budget = plan()
    blocks = budget.shapes.pool.num_blocks
    assert budget.weights == 2 * 8_030_261_248
    assert budget.block == 32 * 2 * 16 * 8 * 128 * 2
    assert blocks % GRID == 0
    assert blocks * budget.block <= 72 * GIB - budget.beside < (blocks + GRID) * budget.block


def test_another_reading_of_free_memory_changes_nothing():
    some = plan()
    middle = some.pool + some.beside + GRID // 2 * some.block
    readings = {plan(memory=middle + off * 2**20).shapes for off in (-40, -1, 0, 1, 40)}
    assert len(readings) == 1


def test_memory_that_others_use_is_not_planned_with():
    free, used = plan(), plan(used=8 * GIB)
    assert 0 <= free.pool - used.pool - 8 * GIB + GRID * free.block <= 2 * GRID * free.block


def test_a_mesh_divides_weights_and_blocks():
    one, four = plan(), plan(mesh="4x1")
    assert one.weights / 4.01 < four.weights < one.weights / 3.99
    assert four.block * 4 == one.block
    assert four.shapes.pool.num_blocks > 4 * one.shapes.pool.num_blocks


def test_the_pool_is_never_larger_than_all_sequences_need():
    budget = plan(max_num_seqs=4, max_model_len=1024)
    assert budget.shapes.pool.num_blocks == 4 * 1024 // 16 + 1


@pytest.mark.parametrize("mesh", ["1x1", "2x1", "8x1", "1x2", "4x2"])
def test_the_default_pools_of_virtual_devices_share_four_gib(mesh):
    shape = parse_mesh(mesh)
    budget = plan(mesh=mesh, platform=CPU, memory=200 * GIB)
    held = budget.pool * shape.tensor * shape.data
    assert 0.5 * CPU_POOL_BYTES < held <= CPU_POOL_BYTES


REFUSED = {
    "too large for the device": (
        {"name": "llama-3.1-70b"},
        r"weights 131\.4 GiB \+ state .* = 1\d\d\.\d GiB and there are 72\.0 GiB .*; it would with mesh=2x1",
    ),
    "float32": (
        {"dtype": "float32", "memory": 24 * GIB},
        r"weights 29\.9 GiB .* with dtype=bfloat16, or mesh=2x1",
    ),
    "blocks": (
        {"num_blocks": 100_000},
        r"KV pool 195\.3 GiB \(100000 blocks of 2\.0 MiB\).*num_blocks=\d+, or mesh=",
    ),
    "long steps": (
        {"max_num_batched_tokens": 1 << 19},
        r"temporaries \d+\.\d GiB.* with max_num_batched_tokens=\d+",
    ),
    "many sequences": ({"max_num_seqs": 30_000}, r"would with max_num_seqs=\d+"),
    "a TPU's programs": ({"platform": TPU, "memory": 14 * GIB}, r"runtime \d\.\d GiB"),
    "this host": (
        {"name": "llama-3.1-70b", "platform": CPU, "memory": 17 * GIB},
        r"with \d+\.\d GiB of memory: no one option",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_fit_is_refused_with_the_arithmetic(case):
    options, said = REFUSED[case]
    with pytest.raises(ConfigError, match=said) as refused:
        plan(**options)
    terms, total = re.search(r"fit: (.*) = ([\d.]+ \w+)", str(refused.value)).groups()
    sizes = [number(text) for text in re.findall(r"[\d.]+ [GM]iB", re.sub(r"\(.*?\)", "", terms))]
    assert sum(sizes) == pytest.approx(number(total), abs=0.06 * len(sizes) * GIB)


@pytest.mark.parametrize("case", list(REFUSED)[:5])
def test_every_change_that_a_refusal_names_makes_it_fit(case):
    options, _ = REFUSED[case]
    with pytest.raises(ConfigError) as refused:
        plan(**options)
    changes = re.findall(r"(\w+)=(\w+)", str(refused.value).partition("would with")[2])
    assert changes
    for name, value in changes:
        assert plan(**options | {name: int(value) if value.isdigit() else value}).fits


def number(text):
    value, unit = text.split()
    return float(value) * {"GiB": GIB, "MiB": 2**20}[unit]


def test_an_engine_refuses_before_it_loads(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text((CONFIGS / "llama-3.1-70b.json").read_text())
    for name in ("load", "fill"):
        monkeypatch.setattr(LoadedModel, name, lambda *_: pytest.fail("weights are loaded"))
    monkeypatch.setattr(devices, "host_memory", lambda: 20 * GIB)
    said = r"weights 131\.4 GiB .* there are 18\.0 GiB \(0\.9 of 20\.0 GiB of free memory\)"
    with pytest.raises(ConfigError, match=said):
        Engine(str(tmp_path), load_format="dummy", dtype="bfloat16")


def test_free_memory_is_that_of_the_container(tmp_path, monkeypatch):
    whole = devices.host_memory()
    assert 0 < whole <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(devices, "CGROUPS", [(str(limit), str(used))])
    limit.write_text("max\n")
    used.write_text("7000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 500\nactive_file 9\n")
    assert devices.host_memory() > whole / 2
    limit.write_text("10000\n")
    assert devices.host_memory() == 3500
    used.write_text("20000\n")
    assert devices.host_memory() == 0


def test_weights_are_counted_as_they_are_loaded(model_dir):
    options = {"dtype": "float32", "num_blocks": 33, "max_num_seqs": 4, "max_num_batched_tokens": 16}
    with Engine(str(model_dir), **options) as engine:
        (core,) = engine._cores
        assert core.budget.weights == sum(w.nbytes for w in core.model.weights)
        state = sum(x.nbytes for x in jax.tree.leaves((core._slots, core._chooser.shaping)))
        assert core.budget.state == pytest.approx(state, rel=0.1)


@pytest.mark.parametrize("pool", [100_000, 8_192])
@pytest.mark.parametrize("size", [16, 64])
def test_at_most_half_a_block_of_a_sequence_is_unused(size, pool):
    run = measure(Traffic(duration=60, rate=4, prompt_tokens=200, prompt_spread=1.0), size, pool)
    assert run.sequences > 10_000 and (run.scheduler.preemptions > 0) == (pool == 8_192)
    assert 0.3 < run.unused / size <= 0.5
