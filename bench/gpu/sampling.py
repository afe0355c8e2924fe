"""Choosing tokens: values over the tests' hard rows, and the time by rows and filters, beside XLA's form."""

import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.gpu.check import REPEATS
from bench.gpu.job import Job, shape
from jaxserve.engine.sampling import sample, uniform
from jaxserve.pallas_kernels.sampling import gpu
from jaxserve.pallas_kernels.timing import seconds_per_call
from tests.engine.sampling_cases import hard_rows, misses, params

LIMIT = 1e-4
"""Of a token's distance from its quantile: sums of a whole vocabulary in float32."""
ROWS = 1, 64, 256
FILTERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "top_p 0.95": {"top_p": 0.95},
    "top_k 20, top_p 0.95": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
}


def run(job: Job) -> None:
    vocab = shape(job.dry)["vocab_size"]
    if job.dry:  # nothing here calls it in interpret mode
        gpu.sample = partial(gpu.sample, interpret=True)
    verdict = check(job, 9000 if job.dry else vocab)
    for rows in ROWS[:1] if job.dry else ROWS:
        logits = 3 * jax.random.normal(jax.random.key(rows), (rows, vocab))
        for by in ("gpu", "xla"):
            program = jax.jit(partial(sample, variant="random", implementation=by))
            for filters, row in FILTERS.items():
                found = {"rows": rows, "filters": filters, "by": by, "GB": 4e-9 * rows * vocab, "TFLOP": 0.0}
                job.try_emit(found, partial(measure, program, logits, row))
    sys.exit(None if verdict == "ok" else "tokens are wrong")


def check(job: Job, vocab: int) -> str:
    """Of tokens, and whether they are the same again: a race would not give them."""
    logits, rows = hard_rows(vocab, without="subnormal")  # which a GPU does not flush
    p, positions = params(rows), jnp.zeros(len(rows), jnp.int32)
    program = jax.jit(partial(sample, variant="random", implementation="gpu"))
    tokens = [np.asarray(program(jnp.asarray(logits), p, positions).tokens) for _ in range(REPEATS)]
    u = np.asarray(uniform(p.seed, p.sample_index, positions))
    error = float(misses(logits, rows, u, tokens[0]).max())
    same = all(np.array_equal(again, tokens[0]) for again in tokens)
    verdict = "WRONG" if not error <= LIMIT else "ok" if same else "NOT THE SAME TOKENS AGAIN"
    found = {"max_error": error, "limit": LIMIT, "verdict": verdict}
    job.emit(case=f"sampling: {len(rows)} hard rows", implementation="sampling gpu", **found)
    return verdict


def measure(program: Any, logits: jax.Array, row: dict[str, Any]) -> dict[str, float]:
    rows = len(logits)
    p, positions = params([{**row, "seed": i} for i in range(rows)]), jnp.arange(rows, dtype=jnp.int32)
    return {"ms": 1e3 * seconds_per_call(lambda _, i: program(logits, p, positions).tokens, None)}
