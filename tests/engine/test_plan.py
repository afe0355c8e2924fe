"""A plan says what the engine that is then started takes and holds, and needs no weights to say it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxserve import Engine
from jaxserve.config import EngineConfig
from jaxserve.engine import devices, topology
from jaxserve.engine import plan as planning
from jaxserve.engine.memory import GRID
from jaxserve.engine.model import LoadedModel
from jaxserve.engine.plan import make_plan
from jaxserve.errors import ConfigError

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = {"max_num_seqs": 8, "max_num_batched_tokens": 64}
ENGINES = {
    "all sequences fit": {"dtype": "float32"},
    "16 bits": {"dtype": "bfloat16", "max_model_len": 100, "block_size": 8},
    "8 bits": {"dtype": "bfloat16", "quantization": "int8"},
    "given": {"dtype": "float32", "num_blocks": 37},
    "what is left": {"dtype": "float32", "max_model_len": 65536},
    "deterministic": {"dtype": "float32", "deterministic": True},
}


@pytest.fixture(scope="session")
def long_model(make_llama):
    return make_llama("long-llama", max_position_embeddings=65536)


@pytest.mark.parametrize("name", ENGINES)
def test_a_plan_is_what_the_engine_becomes(name, long_model, monkeypatch):
    monkeypatch.setattr(devices, "host_memory", lambda: 520 * 2**20)
    options = {"model": str(long_model), "max_model_len": 512} | SMALL | ENGINES[name]
    plan = make_plan(EngineConfig(**options))
    limited = plan.num_blocks < 8 * plan.max_model_len // plan.block_size + 1
    assert limited == (name in ("given", "what is left"))
    if name == "what is left":
        assert 0 <= plan.left < GRID * plan.block_bytes
    with Engine(**options) as engine:
        (core,) = engine._cores
        assert core._kv[0].shape[0] == plan.num_blocks
        assert sum(pool.nbytes for pool in core._kv) == plan.pool == plan.num_blocks * plan.block_bytes
        assert sum(weight.nbytes for weight in core.model.weights) == plan.weights
        assert engine.stats()["blocks_total"] * plan.block_size == plan.pool_tokens
        assert engine.max_model_len == plan.max_model_len
        assert engine.wait_until_warm()
        running = engine.plan()
    assert set(running.programs) <= set(plan.programs)
    if name != "deterministic":  # which may leave programs out
        assert set(running.programs) == set(plan.programs)
    assert running.temporaries == plan.temporaries <= plan.reserved
    assert running.temporaries_from == plan.temporaries_from
    same = ("num_blocks", "weights", "state", "pool", "left", "sequences", "host", "max_request_tokens")
    assert [getattr(running, field) for field in same] == [getattr(plan, field) for field in same]


ON_A_MESH = """
import json, sys
import numpy as np
from jaxserve import Engine
from jaxserve.config import EngineConfig
from jaxserve.engine.plan import make_plan

small = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "dtype": "float32"}
options = {"model": sys.argv[1], "mesh": sys.argv[2]} | small
plan = make_plan(EngineConfig(**options))
with Engine(**options) as engine:
    held = []
    for core in engine._cores:
        arrays = [core._kv, core.model.weights]
        held += [[sum(x.addressable_shards[i].data.nbytes for x in a) for a in arrays]
                 for i in range(core.model.shards)]
    engine.wait_until_warm()
    print(json.dumps([plan.pool, plan.weights, plan.temporaries, plan.reserved, held,
                      engine.plan().temporaries, plan.num_blocks, engine.plan().num_blocks]))
"""


@pytest.mark.parametrize("mesh", ["2x1", "1x2"])
def test_on_a_mesh_each_device_holds_what_was_planned(make_llama, mesh):
    model = make_llama(f"three-heads-{mesh}", num_attention_heads=6, num_key_value_heads=3, vocab_size=259)
    command = [sys.executable, "-c", ON_A_MESH, str(model), mesh]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pool, weights, temporaries, reserved, held, running, blocks, has = json.loads(done.stdout)
    assert held == [[pool, weights]] * 2
    assert blocks == has
    assert running == temporaries <= reserved


@pytest.fixture
def only_config(model_dir, tmp_path):
    """A directory with nothing but a config.json."""
    shutil.copy(model_dir / "config.json", tmp_path)
    return tmp_path


def test_a_config_alone_is_enough(only_config, model_dir):
    options = SMALL | {"dtype": "float32"}
    whole = make_plan(EngineConfig(model=str(model_dir), **options))
    for place in (only_config, only_config / "config.json"):
        plan = make_plan(EngineConfig(model=str(place), **options))
        assert (plan.num_blocks, plan.weights) == (whole.num_blocks, whole.weights)
        assert (plan.temporaries, plan.programs) == (whole.temporaries, whole.programs)


def test_a_model_of_the_hub_is_planned_without_its_weights(only_config, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setenv("JAXSERVE_HOME", str(tmp_path / "home"))
    asked = []

    def download(repository, file, *, revision):
        asked.append((repository, file, revision))
        return str(only_config / "config.json")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("all is fetched"))
    assert make_plan(EngineConfig(model="org/name@v2", **SMALL)).weights > 0
    assert asked == [("org/name", "config.json", "v2")]


def test_sequences_are_limited_by_pool_slots_and_length(model_dir):
    plan = make_plan(EngineConfig(model=str(model_dir), num_blocks=1 + 16 * 40, max_num_seqs=8), "h100")
    assert plan.max_model_len == 512
    assert [(s.tokens, s.in_pool, s.at_once) for s in plan.sequences] == [
        (1024, 10, 0),
        (4096, 2, 0),
        (32768, 0, 0),
    ]
    long = make_plan(EngineConfig(model=str(CONFIGS / "llama-3.1-8b.json"), max_num_seqs=8), "v6e")
    assert [s.at_once for s in long.sequences][:1] == [8]
    assert all(s.at_once == min(8, s.in_pool) for s in long.sequences)
    assert long.sequences[0].in_pool > 8 > long.sequences[2].in_pool > 0


def test_a_request_longer_than_the_pool_is_foreseen(model_dir):
    plan = make_plan(EngineConfig(model=str(model_dir), num_blocks=5, block_size=16), "h100")
    assert (plan.max_model_len, plan.max_request_tokens) == (512, 4 * 16 + 1)


def test_what_cannot_fit_is_refused_before_anything_is_compiled(monkeypatch):
    monkeypatch.setattr(devices, "host_memory", lambda: 20 * 2**30)
    monkeypatch.setattr(LoadedModel, "functions", lambda *_: pytest.fail("programs are made"))
    for device in (None, "v5e", "h100"):
        with pytest.raises(ConfigError, match=r"weights 131\.4 GiB .* and there are"):
            make_plan(EngineConfig(model=str(CONFIGS / "llama-3.1-70b.json")), device)


def test_a_program_that_takes_more_than_was_reserved_needs_a_smaller_pool(model_dir, monkeypatch):
    options = SMALL | {"model": str(model_dir), "dtype": "float32"}
    monkeypatch.setattr(devices, "host_memory", lambda: 1000 * 2**20)
    small = make_plan(EngineConfig(**options, num_blocks=100))
    blocks = 100 + small.left // small.block_bytes
    large = planning.Temporaries(300 * 2**20, "the compiler: mixed[64]")
    monkeypatch.setattr(planning, "measured", lambda programs: large)
    said = r"takes 300\.0 MiB \(the compiler: mixed\[64\]\).*it would with num_blocks=\d+"
    with pytest.raises(ConfigError, match=said) as refused:
        make_plan(EngineConfig(**options, num_blocks=blocks))
    fewer = int(str(refused.value).rpartition("=")[2])
    assert 2 <= fewer < blocks
    assert make_plan(EngineConfig(**options, num_blocks=fewer)).left >= 0


def test_an_unknown_device_is_refused_with_those_that_are_known():
    with pytest.raises(ConfigError, match=r"device must be one of h200, h100, .*v6e, not 'h1000'"):
        make_plan(EngineConfig(), "h1000")


@pytest.mark.parametrize("option", [{"kv_cache_dtype": "fp8"}, {"attention": "mosaic"}], ids=str)
def test_what_a_device_cannot_do_is_not_planned_for_it(option, model_dir):
    with pytest.raises(ConfigError, match=r"cannot be had: it is for .* this is a NVIDIA A100"):
        make_plan(EngineConfig(model=str(model_dir), **option), "a100-80")


@pytest.mark.parametrize("name", topology.CHIPS)
def test_every_known_device_is_planned_for_without_its_compiler(name, model_dir, monkeypatch):
    def compiler_mesh(*_):
        raise NotImplementedError("no such topology\nand more")

    monkeypatch.setattr(planning, "compiler_mesh", compiler_mesh)
    plan = make_plan(EngineConfig(model=str(model_dir), max_num_seqs=2, max_num_batched_tokens=64), name)
    chip = topology.CHIPS[name]
    assert plan.device == chip.name
    assert plan.memory == int(0.9 * int(chip.gib * 2**30))
    assert plan.temporaries == plan.reserved
    assert plan.temporaries_from == f"an estimate: to compile for it takes {chip.packages} (no such topology)"


@pytest.mark.parametrize(
    "name",
    [pytest.param("h200", marks=pytest.mark.aot("gpu")), pytest.param("v5e", marks=pytest.mark.aot("tpu"))],
)
def test_programs_are_compiled_for_a_device_that_is_not_here(name, model_dir):
    config = json.loads((CONFIGS / "llama-3.1-8b.json").read_text()) | {"num_hidden_layers": 1}
    place = model_dir.parent / f"{name}.json"
    place.write_text(json.dumps(config))
    for mesh in ("1x1", "2x1"):
        plan = make_plan(EngineConfig(model=str(place), mesh=mesh, max_num_seqs=32), name)
        assert plan.temporaries_from.startswith("the compiler: ")
        assert plan.reserved / 2 < plan.temporaries <= plan.reserved


PEAK = """
import sys
import threading
from jaxserve import Engine, SamplingParams
from jaxserve.config import EngineConfig
from jaxserve.engine.plan import make_plan

options = {"num_blocks": 1025, "max_num_seqs": 4, "max_num_batched_tokens": 64}
plan = make_plan(EngineConfig(**options)).host if sys.argv[1] == "plan" else 0
if not plan:
    with Engine(**options) as engine:
        engine.wait_until_warm()
        for thread in threading.enumerate():
            if thread.name == "memory":
                thread.join()  # the whole pool is taken
        params = SamplingParams(temperature=1.0, max_tokens=64, ignore_eos=True, logprobs=1)
        engine.generate([[i] * 200 for i in range(1, 17)], params, use_progress=False)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(plan, int(peak.split()[1]) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_a_real_process_is_foreseen(default_model):
    """Loosely: a compiler takes less when it finds programs in its cache. docs/memory.md has figures."""
    lines = [
        subprocess.run([sys.executable, "-c", PEAK, kind], capture_output=True, text=True, check=True).stdout
        for kind in ("plan", "engine")
    ]
    planned, peak = int(lines[0].split()[0]), int(lines[1].split()[1])
    assert 0.75 < planned / peak < 1.35


def test_shards_are_what_jax_makes_of_them(model_dir):
    """`weights` counts shapes; jax has the last word."""
    model = LoadedModel(
        json.loads((model_dir / "config.json").read_text()),
        devices.make_mesh(EngineConfig(), 0),
        np.dtype("float32"),
    )
    model.fill(0)
    assert [(w.shape, w.dtype, w.sharding) for w in model.weights] == [
        (w.shape, w.dtype, w.sharding) for w in model.abstract
    ]
    assert model.bytes == sum(w.nbytes for w in jax.tree.leaves(model.weights))
