"""A step of many layers costs the tracing of those that differ."""

import jax
import jax.numpy as jnp
import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine.devices import make_mesh
from jaxserve.engine.model import LoadedModel
from jaxserve.models.layers.block import Block
from jaxserve.pallas_kernels.paged_attention import PoolShape, ragged_meta

SIZES = {
    "architectures": ["MistralForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(("kinds", "traced"), [([SLIDING] * 4, 1), ([SLIDING, FULL] * 2, 2)])
def test_layers_that_are_alike_are_traced_once(monkeypatch, kinds, traced):
    model = LoadedModel(SIZES | {"layer_types": kinds}, make_mesh(EngineConfig(), 0), "float32")
    calls, call = [], Block.__call__

    def counted(self, *args):
        calls.append(self)
        return call(self, *args)

    monkeypatch.setattr(Block, "__call__", counted)
    pool = PoolShape(4, model.kv_heads, 8, model.config.head_dim, model.dtype, False)
    kv = [jax.ShapeDtypeStruct(pool.shape, pool.storage)] * 4

    def step(weights, ids, tables, kv):
        meta = ragged_meta(tables, jnp.zeros(2, jnp.int32), jnp.full(2, 4, jnp.int32), 8)
        return model.functions().hidden(weights, ids, meta, kv)

    ids, tables = jax.ShapeDtypeStruct((8,), jnp.int32), jax.ShapeDtypeStruct((2, 2), jnp.int32)
    jax.eval_shape(step, model.abstract, ids, tables, kv)
    assert len(calls) == traced
