"""The Mosaic kernels' values, where jax can interpret them, and what they do not serve."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxserve.pallas_kernels.paged_attention import paged_attention
from jaxserve.pallas_kernels.paged_attention.mosaic import why_not

from .cases import BF16, CASES, make
from .mosaic_values import QUICK, SERVED, TABLE

can_interpret = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="interpret mode of Mosaic GPU came with jax 0.11"
)


@pytest.fixture(scope="module")
def wrong() -> dict[str, str]:
    """What is wrong with each case."""
    script = [sys.executable, "-m", f"{__package__}.mosaic_values", *QUICK]
    root, env = Path(__file__).parents[3], os.environ | {"NPROC": "16"}
    done = subprocess.run(script, capture_output=True, text=True, cwd=root, env=env)
    assert done.returncode == 0, done.stderr
    return dict(map(json.loads, done.stdout.splitlines()))


@can_interpret
@pytest.mark.parametrize("name", QUICK)
def test_values(name, wrong):
    assert wrong[name] == ""


def test_it_serves_the_table_but_for_what_it_names():
    assert set(TABLE) - set(SERVED) == {f"head size {dim}" for dim in (16, 80, 96)} | {"block size 4"}


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        ((4, 128, 16, jnp.float32, jnp.float32), "multiplies bfloat16 and float16, not float32"),
        ((4, 128, 16, BF16, jnp.uint16), "KV of the queries' type, bfloat16, not uint16"),
        ((4, 80, 16, BF16, BF16), "head sizes 64, 128, 192, 256, not 80"),
        ((4, 128, 20, BF16, BF16), "blocks of 20 are no multiple"),
        ((71, 64, 16, BF16, BF16), "up to 48 query heads for a KV head, not 71"),
    ],
)
def test_what_it_does_not_serve_is_refused(layer, reason):
    assert reason in why_not(*layer)


def test_the_seam_refuses_too():
    x = make(CASES[0])
    with pytest.raises(ValueError, match="not float32"):
        paged_attention(x.q, x.k, x.v, x.pool, x.meta, **x.options, implementation="mosaic")
