"""Rows to choose tokens from, and what an oracle in float64 would choose."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxserve.engine.sampling import RowParams

OFF = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "top_k": 0, "seed": 0, "sample_index": 0}
HARD = [
    {},
    {"temperature": 100.0},
    {"temperature": 2e-38},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 5000},
    {"top_k": 8999},
    {"top_k": 9000},
    {"top_p": 1e-12},
    {"top_p": 0.5},
    {"top_p": 0.999},
    {"top_p": float(np.float32(1 - 2**-24))},
    {"min_p": 0.999},
    {"top_k": 300, "top_p": 0.7, "min_p": 1e-4, "temperature": 1.5},
]


def params(rows: list[dict[str, Any]]) -> RowParams:
    rows = [{**OFF, **row} for row in rows]

    def column(name, dtype):
        return jnp.array(np.array([row[name] for row in rows], dtype))

    seeds = np.array([row["seed"] for row in rows], np.uint64).view(np.uint32).reshape(-1, 2)
    floats = (column(name, np.float32) for name in ("temperature", "top_p", "min_p"))
    return RowParams(*floats, column("top_k", np.int32), jnp.array(seeds), column("sample_index", np.int32))


def hard_logits(vocab: int) -> dict[str, np.ndarray]:
    """Rows with much to keep, with ties, and with numbers at the ends of what floats can be."""
    rng = np.random.default_rng(12)
    ramp = np.arange(vocab, dtype=np.float32)
    return {
        "all equal": np.full(vocab, 3.5),
        "all equal but one": np.where(ramp == 70, 1.0, 0.5),
        "few values": rng.integers(-2, 3, vocab),
        "a ramp": ramp / 1000,
        "steps": ramp // 7 / 500,
        "normal": rng.normal(0, 3, vocab),
        "one far above": np.where(ramp == vocab - 1, 80.0, rng.normal(0, 1, vocab)),
        "most masked": np.where(ramp % 200 == 7, rng.normal(0, 2, vocab), -np.inf),
        "three left": np.where(np.isin(ramp, [3, 4097, vocab - 2]), 1.0, -np.inf),
        "subnormal": rng.integers(-3, 4, vocab) * 1e-42,
        "around zero": np.where(ramp % 2 == 0, 0.0, -0.0),
        "the whole range": np.linspace(-3.4e38, 3.4e38, vocab),
        "below zero": rng.normal(-40, 3, vocab),
        "both ends": np.where(ramp % 3 == 0, 3.4e38, -3.4e38),
    }


def hard_rows(vocab: int, without: str = "") -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Each of those logits, but for one, with each of the filters: float32 [R, vocab], and the parameters."""
    chosen = [x for name, x in hard_logits(vocab).items() if name != without]
    logits = np.repeat(np.array(chosen, np.float32), len(HARD), axis=0)
    return logits, [{**HARD[i % len(HARD)], "seed": i} for i in range(len(logits))]


def oracle(logits: np.ndarray, row: dict[str, Any], slack: float = 0.0) -> np.ndarray:
    """float64 [vocab] relative probabilities by sorting; `slack` widens the filters by rounding's share."""
    row = {**OFF, **row}
    x = logits.astype(np.float64)
    weights = np.exp((x - x.max()) / row["temperature"])
    weights = np.where(weights >= row["min_p"] * (1 - slack), weights, 0.0)
    if 0 < row["top_k"] < len(x):
        weights = np.where(x >= np.sort(x)[-row["top_k"]], weights, 0.0)
    if row["top_p"] < 1.0:
        order = np.argsort(-x, kind="stable")
        mass = np.cumsum(weights[order]) / weights.sum()
        last = min(np.searchsorted(mass, row["top_p"] * (1 + slack)), len(x) - 1)
        weights = np.where(x >= x[order[last]], weights, 0.0)
    return weights


def misses(logits: np.ndarray, rows: list[dict[str, Any]], u: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """float64 [R]: how far u lies outside of the token's part of the oracle's distribution; infinite if the
    filters drop the token. What rounding could move over a filter's edge may be kept or not."""
    found = np.zeros(len(rows))
    for i, (x, row, token) in enumerate(zip(logits, rows, tokens, strict=True)):
        x = np.where(np.abs(x) < np.finfo(np.float32).tiny, 0.0, x)  # as CPUs flush them
        wide, narrow = oracle(x, row, 1e-5), oracle(x, row, -1e-5)
        if wide[token] == 0.0:
            found[i] = np.inf
        elif np.array_equal(wide > 0, narrow > 0):
            sums = np.cumsum(wide) / wide.sum()
            found[i] = max(0.0, u[i] - sums[token], sums[token] - wide[token] / wide.sum() - u[i])
    return found
