"""Engines on meshes of virtual devices, in a process of its own: `python mesh_report.py MODEL=MESH,MESH… …`

Prints one JSON object, by model and mesh: what the engine generates, and what its arrays and programs are.
"""

import json
import math
import sys
from typing import Any

import numpy as np

from jaxserve import Engine, SamplingParams
from jaxserve.engine.batch import Bucket
from jaxserve.engine.core import EngineCore
from tests.hlo import collectives

OPTIONS = {
    "dtype": "float32",
    "num_blocks": 256,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "max_model_len": 128,
}
PROMPTS = [np.random.default_rng(i).integers(0, 259, 3 + 9 * i).tolist() for i in range(10)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def report(model: str, mesh: str) -> dict[str, Any]:
    with Engine(model, mesh=mesh, **OPTIONS) as engine:
        outputs = engine.generate(PROMPTS, GREEDY)
        core = engine._cores[0]
        return {
            "tokens": [output.outputs[0].token_ids for output in outputs],
            "logits": logits(core),
            "replicas": [
                {"steps": core.steps, "devices": [device.id for device in core.model.mesh.devices.flat]}
                for core in engine._cores
            ],
            "weights": {
                path: [leaf.get_metadata()["axes"], weight.shape, shards(weight)]
                for (path, leaf), weight in zip(core.model._leaves.items(), core.model.weights, strict=True)
            },
            "bytes_per_device": core.model.bytes,
            "pool": core.shapes.pool.shape,
            "pools": [shards(pool) for pool in core._kv],
            "programs": programs(core) if mesh == "4x1" else {},
        }


def shards(array: Any) -> list[tuple[int, ...]]:
    """What each device holds of an array."""
    return [shard.data.shape for shard in array.addressable_shards]


def logits(core: EngineCore) -> list[float]:
    """What the mixed program gives for the last token of a prompt alone."""
    programs, prompt = core._programs, PROMPTS[4]
    bucket = programs.buckets[0]
    layout = programs.layout(bucket)
    packed = layout.pack([], core.shapes.max_num_seqs)
    step = layout.fields(packed)
    step["tokens"][: len(prompt)] = prompt
    step["slots"][0], step["q_lens"][0], step["samples"][0] = 0, len(prompt), 1
    blocks = math.ceil(len(prompt) / layout.block_size)
    step["update_slot"][:blocks] = 0
    step["update_index"][:blocks] = range(blocks)
    step["update_block"][:blocks] = range(1, blocks + 1)
    kv, slots, _ = programs.empty_state()
    _, _, found, *_ = programs.forward(bucket)(core.model.weights, kv, slots, packed)
    return np.asarray(found)[0].tolist()


def programs(core: EngineCore) -> dict[str, Any]:
    """By name: rows of tokens and of logits, and what the compiler says of the program on one device."""
    assert core.wait_until_warm(300)
    return {bucket.name: program(core, bucket) for bucket in core._programs.buckets}


def program(core: EngineCore, bucket: Bucket) -> dict[str, Any]:
    compiled = core._programs.forward(bucket)
    memory = compiled.memory_analysis()
    return {
        "tokens": bucket.tokens,
        "seqs": bucket.seqs,
        "collectives": collectives(compiled.as_text()),
        "collectives_of_sample": collectives(
            core._programs.sample(bucket.seqs, "full").as_text()
            + core._programs.shape(bucket.seqs, "typical").as_text()
        ),
        "temporary_bytes": memory.temp_size_in_bytes,
        "donated_bytes": memory.alias_size_in_bytes,
    }


if __name__ == "__main__":
    runs = [argument.rsplit("=", 1) for argument in sys.argv[1:]]
    reports = {model: {mesh: report(model, mesh) for mesh in meshes.split(",")} for model, meshes in runs}
    print(json.dumps({"prompts": PROMPTS, "models": reports}))
