"""Our side of the comparison, a process with eight virtual devices: `python -m tests.models.ours`

Each line of its input is the directory of a checkpoint. It writes ours.npz there, and prints a line of JSON:
by tensor, how far the logits move when it is zeroed (under ""), and when another of its shape takes its place
(under the name of that). Or a text: what went wrong.
"""

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.config import EngineConfig
from jaxserve.engine.compilation import compiler_options
from jaxserve.engine.devices import CPU, make_mesh
from jaxserve.engine.kernels import choose_kernels
from jaxserve.engine.model import LoadedModel
from jaxserve.loading.checkpoint import Checkpoint, open_checkpoint
from jaxserve.pallas_kernels.paged_attention import PoolShape, ragged_meta
from tests.models.scenario import (
    BLOCK,
    BLOCKS,
    GREEDY,
    NUM_BLOCKS,
    ROWS,
    SEQS,
    STEPS,
    WIDTH,
    Part,
    prompts,
)

MESHES = ("1x1", "2x1", "4x1")


class Ours:
    """A model on a mesh, and the one program that computes any batch of it."""

    def __init__(self, checkpoint: Checkpoint, mesh: str):
        config, dtype = EngineConfig(mesh=mesh), jnp.dtype("float32")
        devices = make_mesh(config, 0)
        kernels = choose_kernels(config, devices, dtype)
        self.model = LoadedModel(checkpoint.config, devices, dtype, kernels)
        self.model.load(checkpoint)
        shape, functions = self.model.config, self.model.functions()
        pool = PoolShape(NUM_BLOCKS, self.model.kv_heads, BLOCK, shape.head_dim, dtype, CPU.kv_as_bits)
        self.kv = [jnp.zeros(pool.shape, pool.storage)] * shape.num_hidden_layers

        def step(weights: Any, kv: Any, ids: Any, tables: Any, starts: Any, lengths: Any) -> Any:
            x, kv = functions.hidden(weights, ids, ragged_meta(tables, starts, lengths, ROWS), kv)
            return functions.logits(weights, x, jnp.int32(ROWS)), kv

        options = compiler_options("cpu", dtype) | {"xla_backend_optimization_level": 0}  # compiles fast
        lowered = jax.jit(step).lower(self.model.weights, self.kv, *self._inputs([], {}))
        self.step = lowered.compile(compiler_options=options)

    def run(self, parts: list[Part], tokens: dict[str, list[int]]) -> list[np.ndarray]:
        """The logits of each part's rows; their keys and values stay."""
        logits, self.kv = self.step(self.model.weights, self.kv, *self._inputs(parts, tokens))
        ends = np.cumsum([part.stop - part.start for part in parts])
        return np.split(np.asarray(logits), ends)[:-1]

    def _inputs(self, parts: list[Part], tokens: dict[str, list[int]]) -> tuple[np.ndarray, ...]:
        ids, tables = np.zeros(ROWS, np.int32), np.zeros((SEQS, WIDTH), np.int32)
        starts, lengths = np.zeros(SEQS, np.int32), np.zeros(SEQS, np.int32)
        row = 0
        for i, (name, start, stop) in enumerate(parts):
            starts[i], lengths[i] = start, stop - start
            ids[row : row + stop - start] = tokens[name][start:stop]
            tables[i, : len(BLOCKS[name])] = BLOCKS[name]
            row += stop - start
        return ids, tables, starts, lengths

    def everything(self) -> dict[str, np.ndarray]:
        """The tokens of `alone` with its greedy continuation, and the logits of all sequences' rows."""
        tokens = prompts()
        rows: dict[str, list[np.ndarray]] = {name: [] for name in tokens}
        alone, done = tokens["alone"], 0
        for _ in range(GREEDY + 1):
            [logits] = self.run([Part("alone", done, len(alone))], tokens)
            rows["alone"].append(logits)
            done = len(alone)
            alone.append(int(logits[-1].argmax()))
        for parts in STEPS:
            for part, logits in zip(parts, self.run(parts, tokens), strict=True):
                if part.name == "alone":  # again
                    rows["alone"][-1] = logits
                else:
                    rows[part.name].append(logits)
        return {"tokens": np.array(alone)} | {name: np.concatenate(parts) for name, parts in rows.items()}


def mutations(ours: Ours, checkpoint: Checkpoint) -> dict[str, dict[str, float]]:
    """How far the logits of a prompt move, by tensor and what takes its place."""
    tokens, part = prompts(), Part("alone", 0, 23)
    [wanted] = ours.run([part], tokens)
    shapes, whole = checkpoint.shapes(), ours.model.weights
    found: dict[str, dict[str, float]] = {name: {} for name in shapes}
    for name, shape in shapes.items():
        alike = [other for other in shapes if shapes[other] == shape]
        other = alike[(alike.index(name) + 1) % len(alike)]
        changes = {"": np.zeros(shape, np.float32), other: checkpoint.tensor(other)}
        changes.pop(name, None)
        for what, value in changes.items():
            ours.model.weights = changed(ours.model, checkpoint, name, value)
            [logits] = ours.run([part], tokens)
            found[name][what] = float(np.abs(logits - wanted).max())
    ours.model.weights = whole
    return found


def changed(model: LoadedModel, checkpoint: Checkpoint, name: str, value: np.ndarray) -> list[jax.Array]:
    """The model's weights, with another value of a tensor."""
    placed: dict[str, jax.Array] = {}
    for path, source in model._table.items():
        if name in source.shapes:
            tensors = [value if each == name else checkpoint.tensor(each) for each in source.shapes]
            placed |= model._place(path, source.build(*tensors))
    return [placed.get(path, old) for path, old in zip(model._leaves, model.weights, strict=True)]


def compute(path: Path) -> dict[str, dict[str, float]]:
    checkpoint = open_checkpoint(path)
    models = {mesh: Ours(checkpoint, mesh) for mesh in MESHES}
    found = {mesh: model.everything() for mesh, model in models.items()}
    named = {f"{mesh} {name}": value for mesh, values in found.items() for name, value in values.items()}
    np.savez(path / "ours.npz", **named)
    return mutations(models["1x1"], checkpoint)


if __name__ == "__main__":
    for line in sys.stdin:
        try:
            answer: Any = compute(Path(line.strip()))
        except Exception:
            answer = traceback.format_exc()
        print(json.dumps(answer), flush=True)
