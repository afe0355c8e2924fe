"""An engine with the TPU's attention, which XLA plays on the CPU: its pool, its layout, its steps."""

import json
from pathlib import Path

import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, AxisType

from jaxserve import Engine, SamplingParams
from jaxserve.config import EngineConfig
from jaxserve.engine import kernels
from jaxserve.engine.devices import CPU, TPU, Memory
from jaxserve.engine.kernels import PORTABLE
from jaxserve.engine.memory import fit
from jaxserve.engine.model import LoadedModel
from jaxserve.errors import ConfigError

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 8,
    "max_model_len": 128,
    "num_blocks": 17,
    "block_size": 16,
    "matmul": "xla",
}
PROMPTS = [list(range(10, 10 + n)) for n in (1, 7, 40, 21)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


def answers(model, **options):
    with Engine(str(model), dtype="float32", **SMALL, **options) as engine:
        (core,) = engine._cores
        pool = core._kv[0].shape
        found = [engine.generate(PROMPTS, GREEDY, use_progress=False) for _ in range(2)]
        hits = engine.stats()["prefix_cache_hits"]
    return pool, [[output.outputs[0].token_ids for output in each] for each in found], hits


@pytest.fixture
def interpreted(interpreted_tpu, monkeypatch):
    monkeypatch.setattr(kernels, "attention_for", lambda *_: "tpu")
    pltpu.set_tpu_interpret_mode(True)
    yield
    pltpu.set_tpu_interpret_mode(None)


def test_an_engine_generates_the_same_with_it(make_llama, interpreted, monkeypatch):
    model = make_llama(
        "three-heads-for-a-tpu", num_attention_heads=6, num_key_value_heads=3, num_hidden_layers=1
    )
    pool, found, hits = answers(model)
    assert pool == (17, 16, 2 * 4, 128)
    monkeypatch.undo()
    pool, wanted, wanted_hits = answers(model, attention="xla")
    assert pool == (17, 2, 3, 16, 10)
    assert found == wanted and hits == wanted_hits > 0


def test_auto_is_the_kernel_on_a_tpu_where_it_serves():
    def chosen(platform, dtype="bfloat16", head_dim=128, **options):
        wanted = PORTABLE._replace(attention=kernels.attention_for(EngineConfig(**options), platform))
        return kernels.serving(wanted, dtype, head_dim).attention

    assert [chosen(TPU, kind) for kind in ("bfloat16", "float32", "float16")] == ["tpu", "tpu", "xla"]
    assert [chosen(TPU, head_dim=dim) for dim in (64, 256)] == ["tpu", "xla"]
    assert chosen(TPU, attention="xla") == "xla"
    with pytest.raises(ConfigError, match="it is for TPUs, and this is a cpu"):
        chosen(CPU, attention="tpu")


def fitted(dtype="bfloat16", **options):
    config = EngineConfig(mesh="4x1", **options)
    mesh = AbstractMesh((4,), ("tensor",), axis_types=(AxisType.Auto,))
    shape = json.loads((CONFIGS / "llama-3.1-8b.json").read_text())
    wanted = PORTABLE._replace(attention=kernels.attention_for(config, TPU))
    return fit(config, LoadedModel(shape, mesh, dtype, wanted), Memory(TPU, "a TPU", 2**34, 0, "a part"))


def test_blocks_are_as_large_as_the_tables_of_all_sequences_ask_for():
    assert fitted().shapes.pool.block_size == 128
    assert fitted(max_num_seqs=512).shapes.pool.block_size == 512
    assert fitted(max_num_seqs=512, attention="xla").shapes.pool.block_size == 128
    with pytest.raises(
        ConfigError, match=r"131072 tokens take 4\.0 MiB.* with block_size=128, a smaller max"
    ):
        fitted(block_size=16)


def test_what_was_asked_for_and_does_not_serve_the_model_is_refused():
    with pytest.raises(ConfigError, match=r"attention=tpu cannot be had for this model: .* not in float16"):
        fitted(dtype="float16", attention="tpu")
