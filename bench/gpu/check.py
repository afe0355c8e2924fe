"""Every kernel against the specification on this device, over the tests' case table."""

import importlib
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from bench.gpu.job import Job, reason
from jaxserve.pallas_kernels.paged_attention import Implementation, Scaled, paged_attention, why_not_scaled
from jaxserve.pallas_kernels.paged_attention.tuning.measure import QUICK_COMPILE
from tests.pallas_kernels.paged_attention import cases

KERNELS = [name for name in ("mosaic", "gpu") if name in get_args(Implementation)]
IMPLEMENTATIONS = [*KERNELS, "xla"]
OPTIONS = {"xla_gpu_autotune_level": "0"}
"""Values do not depend on it, and compiling takes most of the time here."""
LIMITS = {"float32": 2e-5, "bfloat16": 3 * 4 * 2**-9, "float16": 3 * 4 * 2**-12}
"""In 16 bits three roundings, of the weights and of both outputs, of numbers below 4."""
REPEATS = 3

llama = partial(cases.Case, heads=32, kv_heads=8, dim=128, dtype=jnp.bfloat16)
LLAMA = [
    llama("llama 8b decode", (1,) * 16, tuple(range(100, 1700, 100))),
    llama("llama 8b mixed", (1, 1, 200, 70), (900, 17, 0, 300), pad_rows=9),
    llama("llama 8b, blocks of 64", (1, 1, 200, 70), (900, 17, 0, 300), pad_rows=9, block_size=64),
]
IN_16_BITS = [
    replace(case, name=f"{case.name}, bf16", dtype=jnp.bfloat16, dim=max(case.dim, 64))
    for case in cases.CASES
    if case.dtype == jnp.float32 and case.pool_dtype is None
]
"""Every option as it is served on a GPU."""
FAR = llama("llama 8b, over 2**31 numbers in the pool", (1, 1, 40), (200, 30, 17))


def run(job: Job) -> None:
    everything = [*LLAMA, FAR, *IN_16_BITS, *cases.CASES, *cases.IN_8_BITS]
    chosen = [*cases.CASES[::16], *cases.IN_8_BITS[1:3]] if job.dry else everything
    wrong = 0
    with ThreadPoolExecutor(8) as threads:
        jobs = [(case, threads.submit(prepare, case, job.dry)) for case in chosen]
        for case, prepared in jobs:
            inputs, programs = prepared.result()
            want, want_pool = programs.pop("reference")(*inputs)
            for name in programs:
                if why := why_not(name, case, inputs):
                    job.emit(case=case.name, implementation=name, verdict=f"refused: {why}")
                    continue
                try:
                    row = compare(case, inputs, programs[name], want, want_pool)
                except Exception as error:
                    row = {"verdict": f"failed: {reason(error)}"}
                wrong += row["verdict"] != "ok"
                job.emit(case=case.name, implementation=name, **row)
    sys.exit(f"{wrong} cases are wrong" if wrong else None)


def prepare(case: cases.Case, dry: bool) -> tuple[Any, dict[str, Any]]:
    """Inputs, and a program for each implementation, or one that raises why there is none."""
    x = cases.make(case)
    if case is FAR:  # the same blocks at the end of a large pool
        n = 2**31 // x.pool[0].size
        x.pool = jnp.zeros((n + len(x.pool), *x.pool.shape[1:]), x.pool.dtype).at[n:].set(x.pool)
        x.meta = x.meta._replace(block_tables=x.meta.block_tables + n)
    inputs = (x.q, x.k, x.v, x.pool, x.meta, x.rotation)
    programs = {}
    for name in ("reference", *(IMPLEMENTATIONS if case in LLAMA else KERNELS)):
        attend = jax.jit(partial(paged_attention, **x.options, implementation=name, interpret=dry))
        try:
            programs[name] = attend.lower(*inputs).compile(QUICK_COMPILE if dry else OPTIONS)
        except Exception as error:
            programs[name] = partial(_raise, error)
    return inputs, programs


def why_not(name: str, case: cases.Case, inputs: Any) -> str:
    """Why a kernel does not serve such a layer, where one says so."""
    if isinstance(inputs[3], Scaled):
        return why_not_scaled(name)
    module = importlib.import_module(f"jaxserve.pallas_kernels.paged_attention.{name}")
    layer = case.heads // case.kv_heads, case.dim, case.block_size, case.dtype, inputs[3].dtype
    return module.why_not(*layer) if hasattr(module, "why_not") else ""


def compare(case: cases.Case, inputs: Any, program: Any, want: jax.Array, want_pool: jax.Array) -> dict:
    """Its largest error in rows that count, and whether it gives the same bits again: a race would not."""
    live = np.asarray(inputs[4].row_pos) >= 0
    out, pool = program(*inputs)
    outs = [np.asarray(out)[live] for out in (out, *(program(*inputs)[0] for _ in range(REPEATS - 1)))]
    error = np.abs(outs[0].astype(np.float64) - np.asarray(want, np.float64)[live]).max(initial=0.0)
    # scales are in the weights that are rounded, to bfloat16
    rounded = isinstance(pool, Scaled) and case.dtype == jnp.float16
    limit = LIMITS["bfloat16" if rounded else np.dtype(case.dtype).name]
    if not error <= limit:
        verdict = "WRONG"
    elif not case.rotary and not all(map(_same_blocks, *map(jax.tree.leaves, (pool, want_pool)))):
        verdict = "WRONG POOL"
    elif not all(_same(out, outs[0]) for out in outs):
        verdict = "NOT THE SAME BITS AGAIN"
    else:
        verdict = "ok"
    return {"max_error": float(error), "limit": limit, "verdict": verdict}


def _same_blocks(a: jax.Array, b: jax.Array) -> bool:
    """But for the dummy block."""
    return _same(np.asarray(a)[1:], np.asarray(b)[1:])


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.tobytes() == b.tobytes()


def _raise(error: Exception, *_: Any) -> Any:
    raise error
