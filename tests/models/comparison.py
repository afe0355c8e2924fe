"""A family's logits beside those of transformers, in every way that an engine may compute them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.models import reference
from tests.models.scenario import GREEDY, SHARED, prompts

ROOT = Path(__file__).parents[2]
MOVED = 1e-3
"""A change of a logit that is none of rounding."""


class Comparison(NamedTuple):
    std: float
    """Of transformers' logits."""
    errors: dict[str, dict[str, float]]
    """The largest of any logit: by mesh and sequence; `greedy` are the rows of tokens that we chose."""
    agreed: dict[str, int]
    """By mesh, how many of the tokens that we chose greedily are those that transformers chooses."""
    tensors: int
    idle: list[tuple[str, str]]
    """Tensors that may be zeroed (beside "") or replaced unnoticed, with what may take their place."""


Ask = Callable[[Path], dict[str, dict[str, float]]]


@contextmanager
def our_side() -> Iterator[Ask]:
    """What has the process of ours.py compute a checkpoint; it ends with the context."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.models.ours"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | flags, **pipes) as process:

        def ask(path: Path) -> dict[str, dict[str, float]]:
            print(path, file=process.stdin, flush=True)
            answer = json.loads(process.stdout.readline())
            assert isinstance(answer, dict), answer
            return answer

        yield ask
        process.stdin.close()


def compare(case: str, ask: Ask, path: Path) -> Comparison:
    """`path` is an empty directory."""
    model = reference.make(case)
    model.save_pretrained(path)
    moved = ask(path)
    found = np.load(path / "ours.npz")
    meshes = dict.fromkeys(name.partition(" ")[0] for name in found)
    errors: dict[str, dict[str, float]] = {}
    agreed = {}
    for mesh in meshes:
        tokens = prompts() | {"alone": found[f"{mesh} tokens"].tolist()}
        wanted = {name: reference.logits(model, ids) for name, ids in tokens.items()}
        wanted["shared"] = wanted["shared"][SHARED:]
        wanted["alone"] = wanted["alone"][:-1]
        off = {name: np.abs(found[f"{mesh} {name}"] - logits) for name, logits in wanted.items()}
        off["greedy"], off["alone"] = off["alone"][-GREEDY:], off["alone"][:-GREEDY]
        errors[mesh] = {name: float(error.max()) for name, error in off.items()}
        chosen = wanted["alone"][-GREEDY - 1 :].argmax(axis=1)
        agreed[mesh] = int((chosen == tokens["alone"][-GREEDY - 1 :]).sum())
    std = min(logits.std() for logits in wanted.values())
    idle = [
        (name, other)
        for name, by in moved.items()
        for other, far in by.items()
        if far < MOVED and not _idle_there(model, name, other)
    ]
    return Comparison(float(std), errors, agreed, len(moved), idle)


def _idle_there(model: reference.Model, name: str, other: str) -> bool:
    """Whether transformers' model does not need a tensor either: what all keys have in common, where no
    position turns it, changes no attention."""
    tokens = prompts()["alone"]
    changed = reference.logits_without(model, name, other, tokens)
    return np.abs(changed - reference.logits(model, tokens)).max() < MOVED
