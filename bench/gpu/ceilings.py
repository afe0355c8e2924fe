"""What the device can do at most: copy, read, and multiply."""

from functools import partial

import jax
import jax.numpy as jnp

from bench.gpu.job import Job
from jaxserve.pallas_kernels.paged_attention.tuning.measure import normal
from jaxserve.pallas_kernels.timing import seconds_per_call


def run(job: Job) -> None:
    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit", 0)
    job.emit(device=device.device_kind, jax=jax.__version__, GiB=memory / 2**30)
    size, side = (2**20, 256) if job.dry else (2**30, 8192)
    x = normal(0, size)

    def copy(x, i):
        return plus(x)

    def read(total, i):
        return add(total, x)

    def multiply(b, i):
        return product(b, a)

    plus = jax.jit(lambda x: x + 1)
    add = jax.jit(lambda total, x: total + x.sum(dtype=jnp.float32))
    seconds = partial(seconds_per_call, calls=8)
    job.emit(ceiling="read", rate=1e-9 * x.nbytes / seconds(read, jnp.float32(0)), unit="GB/s")
    job.emit(ceiling="copy", rate=2e-9 * x.nbytes / seconds(copy, x), unit="GB/s")
    # of random numbers, scaled so that they stay as large: on zeros a device is faster
    a, b = normal(1, side, side), normal(2, side, side)
    product = jax.jit(lambda b, a: (a @ b) * side**-0.5)
    job.emit(ceiling="matmul", rate=2e-12 * side**3 / seconds(multiply, b), unit="TFLOP/s")
