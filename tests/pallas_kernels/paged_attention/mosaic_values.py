"""The case table through the Mosaic kernels in interpret mode: a line of JSON, [name, what is wrong], each.

    NPROC=16 python -m tests.pallas_kernels.paged_attention.mosaic_values [NAME ...]

For a process of its own: interpret mode blocks threads of XLA's CPU client, and hangs where there are few.
NPROC gives it more than there are processors, if jax has not started yet.
"""

import json
import sys
from dataclasses import replace

import jax.numpy as jnp

from jaxserve.pallas_kernels.paged_attention import mosaic
from jaxserve.pallas_kernels.paged_attention.tuning.measured import Tuning, instead
from jaxserve.pallas_kernels.paged_attention.tuning.mosaic import HEAD_DIMS

from .cases import BF16, CASES, Case, make
from .test_values import check
from .test_values import test_what_another_sequence_left_behind_is_not_read as check_stale

STALE = "what another sequence left behind"
UNSPLIT = "a context that is not split"
MORE = [
    # more tiles of context than stages
    Case("chunk past the stages", (10, 70), (290, 300), dim=128),
    Case("chunk long window", (10,), (290,), window=60, dim=128),
    Case(UNSPLIT, (1, 1), (300, 63), dim=256),
    Case("gqa 24 alibi sinks", (1, 1, 9), (39, 2, 18), 24, 1, sinks=True, alibi=True, soft_cap=3.0),
    Case("head size 192", (1, 1, 7, 12), (39, 2, 0, 18), dim=192),
    Case("block size 24", (1, 1, 7, 12), (139, 2, 0, 18), block_size=24),
]


def in_16_bits(case: Case) -> Case:
    """The case as tensor cores take it: in 16 bits and, unless it is about that, of a head size they have."""
    kind = case.dtype if case.dtype == jnp.float16 else BF16
    about_dim = case.name.startswith("head size") or case.dim in HEAD_DIMS
    return replace(case, dtype=kind, bits=False, dim=case.dim if about_dim else 64)


def why_not(case: Case) -> str:
    group = case.heads // case.kv_heads
    return mosaic.why_not(group, case.dim, case.block_size, case.dtype, case.pool_dtype or case.dtype)


TABLE = {case.name: case for case in map(in_16_bits, CASES + MORE)}
SERVED = [*(name for name, case in TABLE.items() if not why_not(case)), STALE]
QUICK = ["decode long alibi bf16", "everything", "chunk past the stages", UNSPLIT, STALE]
"""What `make test` has time for."""


def wrong_with(name: str) -> str:
    """What is wrong with the results; empty when nothing is."""
    with instead(Tuning(filled=1 if name == UNSPLIT else None)):
        try:
            if name == STALE:
                check_stale("mosaic", {"dtype": BF16, "dim": 64})
            else:
                check("mosaic", make(TABLE[name]))
        except AssertionError as error:
            return str(error)
    return ""


if __name__ == "__main__":
    for name in sys.argv[1:] or SERVED:
        print(json.dumps([name, wrong_with(name)]), flush=True)
