"""Rows times the weights of their experts: values, and the time in bf16 by the number of tokens."""

import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bench.gpu.check import OPTIONS, REPEATS
from bench.gpu.job import Job, reason
from jaxserve.pallas_kernels.grouped_matmul import grouped_matmul
from jaxserve.pallas_kernels.paged_attention.tuning.measure import CALLS, QUICK_COMPILE, normal
from jaxserve.pallas_kernels.timing import seconds_per_call
from tests.pallas_kernels.grouped_matmul.cases import CASES, Case, make, oracle


class Experts(NamedTuple):
    """One product of a layer: each token takes k of them."""

    count: int
    k: int
    depth: int
    outs: int


QWEN = Experts(128, 8, 2048, 1536)
"""Gate and up of Qwen3 30B."""
TOKENS = 64, 1, 8, 512, 2048
DRY, DRY_TOKENS = Experts(4, 2, 32, 48), (1, 20)
PRODUCTS = 8
"""In a row in one program, as layers are, each with other experts: no weight is in a cache."""
DENSE = 64
"""Most tokens for jax's ragged_dot: it multiplies each row with every expert."""


def run(job: Job) -> None:
    wrong = 0
    with ThreadPoolExecutor(8) as threads:
        jobs = [(case, threads.submit(prepare, case, job.dry)) for case in (CASES[::6] if job.dry else CASES)]
        for case, prepared in jobs:
            try:
                row = compare(case, *prepared.result())
            except Exception as error:
                row = {"verdict": f"failed: {reason(error)}"}
            wrong += row["verdict"] != "ok"
            job.emit(case=f"experts: {case.name}", implementation="grouped_matmul gpu", **row)
    experts = DRY if job.dry else QWEN
    w = normal(0, experts.count, experts.outs, experts.depth)
    for tokens in DRY_TOKENS if job.dry else TOKENS:
        sizes = chosen(experts, tokens)
        for by in ("gpu", *(["jax ragged_dot"] if tokens <= DENSE else [])):
            found = {"tokens": tokens, "by": by, **cost(experts, sizes)}
            job.try_emit(found, partial(measure, by, w, tokens * experts.k, sizes, job.dry))
    sys.exit(f"{wrong} cases are wrong" if wrong else None)


def prepare(case: Case, dry: bool) -> tuple[Any, ...]:
    inputs = make(case)
    multiply = jax.jit(partial(grouped_matmul, dtype=case.out_dtype, implementation="gpu", interpret=dry))
    return multiply.lower(*inputs).compile(QUICK_COMPILE if dry else OPTIONS), *inputs


def compare(case: Case, program: Any, *inputs: np.ndarray) -> dict[str, Any]:
    """Its largest error, and whether it gives the same bits again: a race would not."""
    want = oracle(*inputs)
    outs = [np.asarray(program(*inputs))[: len(want)] for _ in range(REPEATS)]
    error = np.abs(outs[0].astype(np.float64) - want).max(initial=0.0)
    rounding = jnp.finfo(case.out_dtype).eps * np.abs(want).max(initial=0.0)
    limit = 1.2e-7 * (case.depth + 64) + float(rounding)
    if not error <= limit:
        verdict = "WRONG"
    elif any(out.tobytes() != outs[0].tobytes() for out in outs):
        verdict = "NOT THE SAME BITS AGAIN"
    else:
        verdict = "ok"
    return {"max_error": float(error), "limit": limit, "verdict": verdict}


def chosen(experts: Experts, tokens: int) -> np.ndarray:
    """int32 [calls, products, experts]: rows of each, k different experts for a token."""
    rng = np.random.default_rng(tokens)
    picked = rng.random((CALLS, PRODUCTS, tokens, experts.count)).argsort(axis=-1)[..., : experts.k]
    return (picked[..., None] == np.arange(experts.count)).sum(axis=(2, 3), dtype=np.int32)


def cost(experts: Experts, sizes: np.ndarray) -> dict[str, float]:
    """Of one product: rows in and out in 16 bits, and the weights of those experts that have rows."""
    rows, used = int(sizes[0, 0].sum()), float((sizes > 0).sum(axis=-1).mean())
    numbers = rows * (experts.depth + experts.outs) + used * experts.depth * experts.outs
    return {"GB": 2e-9 * numbers, "TFLOP": 2e-12 * rows * experts.depth * experts.outs}


def measure(by: str, w: jax.Array, rows: int, sizes: np.ndarray, dry: bool) -> dict[str, float]:
    multiply = partial(grouped_matmul, dtype=jnp.bfloat16, implementation="gpu", interpret=dry)
    products, repeats = PRODUCTS, 5
    if by == "jax ragged_dot":
        multiply, products, repeats = ragged_dot, 1, 1

    def step(x: jax.Array, w: jax.Array, sizes: jax.Array) -> list[jax.Array]:
        return [multiply(x, w, sizes[i]) for i in range(products)]

    x, each = normal(1, rows, w.shape[2]), [jnp.asarray(call) for call in sizes]
    program = jax.jit(step).lower(x, w, each[0]).compile(QUICK_COMPILE if dry else None)
    taken = seconds_per_call(lambda _, i: program(x, w, each[i]), [], CALLS, repeats)
    return {"ms": 1e3 * taken / products}


def ragged_dot(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    depths = lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])
    return lax.ragged_dot_general(x, w, sizes, depths, preferred_element_type=jnp.bfloat16)
