"""Every mesh gives the tokens of one device, moves two sums per layer, and shards all that is large."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import jaxserve
from jaxserve.config import EngineConfig, parse_mesh
from jaxserve.engine.devices import make_mesh
from jaxserve.errors import ConfigError

MESHES = ["1x1", "2x1", "4x1", "8x1", "1x2", "2x2", "4x2", "1x8"]
MODELS = {(9, 3): MESHES, (8, 2): MESHES[:4], (7, 1): MESHES[:4]}
"""Heads and KV heads; what depends on them needs no replicas."""
RUNS = [(model, mesh) for model, meshes in MODELS.items() for mesh in meshes]
SHARDED = {"vocab", "kv_heads", "mlp"}
LAYERS, VOCAB = 2, 259


class Reports(NamedTuple):
    """What mesh_report.py says of every model on each of its meshes."""

    paths: dict[tuple[int, int], Path]
    prompts: list[list[int]]
    models: dict[tuple[int, int], dict[str, Any]]


@pytest.fixture(scope="session")
def reports(make_llama) -> Reports:
    """All meshes in one process of eight virtual devices. No mesh divides the vocabulary or the width."""
    paths = {}
    for heads, kv_heads in MODELS:
        sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": 8 * heads}
        biases = {"attention_bias": heads == 7, "mlp_bias": heads == 7}
        sizes |= {"head_dim": 16, "intermediate_size": 93, "vocab_size": VOCAB, "num_hidden_layers": LAYERS}
        paths[heads, kv_heads] = make_llama(
            f"llama-{heads}-{kv_heads}", tie_word_embeddings=heads == 9, **biases, **sizes
        )
    script = Path(__file__).with_name("mesh_report.py")
    runs = [f"{paths[model]}={','.join(meshes)}" for model, meshes in MODELS.items()]
    flags = "--xla_force_host_platform_device_count=8"
    answer = json.loads(in_new_process([str(script), *runs], XLA_FLAGS=flags))
    by_path = {Path(path): found for path, found in answer["models"].items()}
    return Reports(paths, answer["prompts"], {model: by_path[path] for model, path in paths.items()})


def in_new_process(arguments: list[str], **environment: str) -> str:
    """What Python prints; XLA_FLAGS are only those given."""
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    ours = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(jaxserve.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, *arguments], env=kept | ours | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_one_device_gives_the_tokens_of_transformers(reports, model):
    torch = pytest.importorskip("torch")
    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM.from_pretrained(reports.paths[model], dtype=torch.float32)
    found = reports.models[model]["1x1"]
    for prompt, tokens in zip(reports.prompts, found["tokens"], strict=True):
        assert len(tokens) == 12
        ids = torch.tensor([prompt])
        greedy = {"max_new_tokens": len(tokens), "do_sample": False, "eos_token_id": None}
        wanted = theirs.generate(ids, attention_mask=torch.ones_like(ids), **greedy)
        assert tokens == wanted[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("model", "mesh"), RUNS, ids=str)
def test_every_mesh_gives_the_tokens_and_logits_of_one_device(reports, model, mesh):
    found, wanted = reports.models[model][mesh], reports.models[model]["1x1"]
    assert found["tokens"] == wanted["tokens"]
    assert len(found["logits"]) == VOCAB
    np.testing.assert_allclose(found["logits"], wanted["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("model", "mesh"), RUNS, ids=str)
def test_replicas_have_devices_of_their_own_and_share_the_work(reports, model, mesh):
    shape, replicas = parse_mesh(mesh), reports.models[model][mesh]["replicas"]
    devices = [device for replica in replicas for device in replica["devices"]]
    assert devices == list(range(shape.tensor * shape.data))
    assert len(replicas) == shape.data
    assert all(replica["steps"] > 0 for replica in replicas)


@pytest.mark.parametrize(("model", "mesh"), RUNS, ids=str)
def test_each_device_holds_only_its_shard_of_weights_and_pool(reports, model, mesh):
    tensor, found = parse_mesh(mesh).tensor, reports.models[model][mesh]
    held = 0
    for path, (axes, shape, shards) in found["weights"].items():
        wanted = [size // tensor if axis in SHARDED else size for axis, size in zip(axes, shape, strict=True)]
        assert shards == [wanted] * tensor, path
        assert len(shape) == 1 or SHARDED & set(axes), f"{path} is large and on every device"
        held += 4 * math.prod(wanted)
    assert found["bytes_per_device"] == held
    blocks, two, heads, size, dim = found["pool"]
    assert heads == math.ceil(model[1] / tensor) * tensor
    assert found["pools"] == [[[blocks, two, heads // tensor, size, dim]] * tensor] * LAYERS


@pytest.mark.parametrize("name", ["mixed[64]", "decode[4]"])
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_the_collectives_of_a_layer_are_two_sums(reports, model, name):
    program = reports.models[model]["4x1"]["programs"][name]
    tokens, seqs, hidden = program["tokens"], program["seqs"], 8 * model[0]
    found = Counter((operation, tuple(shape)) for operation, shape in program["collectives"])
    assert found == {
        ("all-reduce", (tokens, hidden)): 2 * LAYERS + 1,  # and one for the embedding
        ("all-gather", (seqs, VOCAB + 1)): 1,  # the logits, for sampling
    }
    assert program["collectives_of_sample"] == []


@pytest.mark.parametrize("name", ["mixed[64]", "decode[4]"])
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_a_step_on_a_mesh_leaves_the_pool_in_place(reports, model, name):
    found = reports.models[model]["4x1"]
    program, pools = found["programs"][name], [4 * math.prod(shards[0]) for shards in found["pools"]]
    assert program["donated_bytes"] >= sum(pools)
    assert program["temporary_bytes"] < pools[0] / 2


def test_too_few_devices_are_refused_with_both_numbers():
    said = f"mesh 4x16 needs 64 devices, this machine has {len(jax.devices())} \\(cpu\\); .*=64"
    with pytest.raises(ConfigError, match=said):
        make_mesh(EngineConfig(mesh="4x16"), 0)


REAL = """
import json, sys
from jaxserve import Engine, SamplingParams

small = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 512, "num_blocks": 64}
with Engine(sys.argv[1], mesh=sys.argv[2], dtype="float32", **small) as engine:
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    asked = engine.tokenizer.apply_chat_template(chat)
    prompts = [asked, "The three primary colours are", "def fibonacci(n):"]
    outputs = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True))
print(json.dumps([[output.outputs[0].token_ids, output.outputs[0].text] for output in outputs]))
"""


@pytest.mark.slow
def test_the_default_model_runs_on_four_virtual_devices_that_the_engine_makes(default_model):
    """In a fresh process without XLA_FLAGS. Its 9 query and 3 KV heads are not divided by 4."""
    answers = [in_new_process(["-c", REAL, str(default_model), mesh]) for mesh in ("1x1", "4x1")]
    one, four = map(json.loads, answers)
    assert four == one
    assert "Paris" in four[0][1]
