"""The waste of the paged KV pool: slots of tokens that are allocated and hold none.

    python -m bench.pool_waste [--duration 600] [--max-model-len 8192]

Turns the real scheduler and block pool (jaxserve.engine.simulation) over a mixed load: short and long prompts
and outputs, half of them with a shared system prompt, in a pool that is large enough and in one that is not.
Beside it stands what reserving the maximum length for every sequence would waste. Means over
sequences and steps.
"""

import argparse
from typing import Any

from jaxserve.engine.scheduler import Chunk, Limits, Policy
from jaxserve.engine.simulation.cost import DEVICES
from jaxserve.engine.simulation.run import Setup, Simulation
from jaxserve.engine.simulation.traffic import Traffic


class Measured(Simulation):
    """Adds up, at every step, what the running sequences have and what they use."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.sequences = self.tokens = self.slots = 0

    def _dispatch(self, chunks: list[Chunk]) -> None:
        super()._dispatch(chunks)
        running = self.scheduler.running
        self.sequences += len(running)
        self.tokens += sum(request.computed for request in running)
        self.slots += sum(len(request.blocks) for request in running) * self.pool.block_size

    @property
    def used(self) -> float:
        """Tokens of a sequence."""
        return self.tokens / self.sequences

    @property
    def unused(self) -> float:
        """Slots of a sequence without a token."""
        return (self.slots - self.tokens) / self.sequences


def measure(load: Traffic, block_size: int, pool_tokens: int) -> Measured:
    device = DEVICES["cpu"]
    limits = Limits(device.max_num_seqs, device.max_num_batched_tokens)
    setup = Setup(1 + pool_tokens // block_size, block_size, limits, Policy(), device.cost)
    run = Measured(setup, enumerate(load.draw()), 1000)
    run.run()
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--duration", type=float, default=600.0, help="seconds of arrivals")
    parser.add_argument("--max-model-len", type=int, default=8192)
    args = parser.parse_args()
    load = Traffic(rate=2.0, prompt_tokens=200, prompt_spread=1.0, output_tokens=100, long_share=0.02)
    load.duration = args.duration
    columns = ["block", "pool, tokens", "sequences", "preempted", "tokens each", "paged: unused", "in blocks"]
    print("|", " | ".join([*columns, "reserved: unused"]), "|")
    print("|---" * (len(columns) + 1) + "|")
    for size in (16, 32, 64, 128):
        for pool in (186_368, 16_384):
            run = measure(load, size, pool)
            cells = [
                size,
                f"{pool:,}",
                f"{run.sequences / run.meters.steps:.1f}",
                run.scheduler.preemptions,
                f"{run.used:.0f}",
                f"{run.unused:.1f} ({run.unused / (run.used + run.unused):.1%})",
                f"{run.unused / size:.2f}",
                f"{args.max_model_len - run.used:.0f} ({1 - run.used / args.max_model_len:.1%})",
            ]
            print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
