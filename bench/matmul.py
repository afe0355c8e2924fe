"""Times all products of one step of the default model, in each form that a weight can have:

    python -m bench.matmul --rows 1 8 32 64 256 --repeats 10

Milliseconds by rows, the fastest and the median. Forms take turns, so that all meet the same noise. The head
is multiplied by at most 64 rows, as in a step.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxserve.models.layers.embedding import Embedding
from jaxserve.models.layers.linear import Linear, Product
from jaxserve.models.layers.param import Scope, plain

LAYERS, HIDDEN, WIDE, VOCAB = 30, 576, 1536, 49152
FORMS = {
    "xla bfloat16": ("xla", None),
    "xla int8": ("xla", "int8"),
    "cpu bfloat16": ("cpu", None),
    "cpu int8": ("cpu", "int8"),
}
DTYPE = jnp.dtype(ml_dtypes.bfloat16)


def products(implementation: str, quantization: str | None) -> list[Product]:
    """Those of all layers, and the head; with weights."""
    made: list[Product] = []
    scope = Scope(DTYPE)
    for _ in range(LAYERS):
        for depth, outs in [(HIDDEN, 960), (HIDDEN, HIDDEN), (HIDDEN, 2 * WIDE), (WIDE, HIDDEN)]:
            made.append(Linear(scope, plain(depth), plain(outs)))
    made.append(Embedding(scope, VOCAB, HIDDEN))
    random = np.random.default_rng(0)
    for product in made:
        product.multiply_with(implementation, quantization)
        given = random.standard_normal(product.matrix, np.float32) * 0.02
        for name, value in product.keep(given).items():
            getattr(product, name)[...] = jnp.asarray(value)
    return made


def step_of(made: list[Product]) -> Callable[[jax.Array], jax.Array]:
    """All of them one after the other, each on what came of the last."""
    from flax import nnx

    graph, weights = nnx.split(nnx.List(made))

    @jax.jit
    def run(weights, x):
        *layers, head = nnx.merge(graph, weights)
        for product in layers:
            _, depth = product.matrix
            y = product.contract(x[:, :depth])[:, :WIDE]
            x = x.at[:, : y.shape[1]].add(y * 1e-3)
        return head.contract(x[:64, :HIDDEN])

    return lambda x: jax.block_until_ready(run(weights, x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64, 256])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    args = parser.parse_args()
    steps = {name: step_of(products(*FORMS[name])) for name in args.forms}
    print("rows", *(f"{name:>20}" for name in steps))
    for rows in args.rows:
        x = jnp.asarray(np.random.default_rng(1).standard_normal((rows, WIDE), np.float32))
        times: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(args.repeats + 1):
            for name, step in steps.items():
                begin = time.perf_counter()
                step(x)
                if turn:  # the first compiles
                    times[name].append(1e3 * (time.perf_counter() - begin))
        print(f"{rows:4}", *(f"{min(t):12.1f} {statistics.median(t):7.1f}" for t in times.values()))


if __name__ == "__main__":
    main()
