"""Small models of families, as programs: for what must hold of any that the registry will ever have."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from jaxserve.config import EngineConfig
from jaxserve.engine.compilation import Counts
from jaxserve.engine.devices import Memory, Platform
from jaxserve.engine.kernels import kernels_for
from jaxserve.engine.memory import fit
from jaxserve.engine.model import LoadedModel
from jaxserve.engine.programs import Programs

CONFIGS = Path(__file__).with_name("configs") / "small"
FAMILIES = sorted(path.stem for path in CONFIGS.glob("*.json"))
"""Those whose programs differ in more than numbers; of sizes that a mesh of four divides."""


def config_of(family: str) -> dict:
    return json.loads((CONFIGS / f"{family}.json").read_text())


def programs_of(
    family: str,
    platform: Platform,
    mesh: Mesh | AbstractMesh,
    kind: type[Programs] = Programs,
    **options: Any,
) -> Programs:
    """The ladder of an engine for 16 sequences and 64 tokens; nothing is compiled."""
    sizes = {"max_num_seqs": 16, "max_num_batched_tokens": 64, "max_model_len": 512, "num_blocks": 65}
    config = EngineConfig(mesh=f"{mesh.size}x1", **sizes, **options)
    kernels = kernels_for(config, platform, jnp.bfloat16)
    if platform.name == "cpu":
        kernels = kernels._replace(attention="xla")
    model = LoadedModel(config_of(family), mesh, jnp.bfloat16, kernels)
    budget = fit(config, model, Memory(platform, "a device", 2**30, 0, "a gibibyte"))
    return kind(model, budget.shapes, platform.smallest_decode, Counts())
