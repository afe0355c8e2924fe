"""What a step costs on a device, and the engine's sizes there."""

from typing import NamedTuple

from jaxserve.engine.scheduler import Chunk


class Cost(NamedTuple):
    """Seconds of a step."""

    fixed: float
    row: float
    """Per sequence that decodes."""
    prefill: float
    """Per token of a prompt."""
    context: float
    """Per token of context that a decode attends to."""
    pair: float
    """Per token of context that a token of a prompt attends to."""

    def step(self, chunks: list[Chunk]) -> float:
        decodes = context = prefill = pairs = 0
        for _, start, length, _, _ in chunks:
            if length == 1:
                decodes += 1
                context += start + 1
            else:
                prefill += length
                pairs += length * start + length * (length + 1) // 2
        return (
            self.fixed
            + self.row * decodes
            + self.prefill * prefill
            + self.context * context
            + self.pair * pairs
        )


class Device(NamedTuple):
    cost: Cost
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int
    about: str


DEVICES = {
    # 18.4, 44.9 and 142.9 ms per step, its share of the prompts' included, at 1, 8 and 32 sequences of 128
    # and 128 tokens; products 373 ms at 256 rows; attention 84 ms for a prompt of 512 tokens, and 2 us per
    # token that a decode attends to
    "cpu": Device(
        Cost(fixed=14.5e-3, row=2.0e-3, prefill=1.46e-3, context=2e-6, pair=0.6e-6),
        max_num_seqs=64,
        max_num_batched_tokens=1024,
        block_size=32,
        num_blocks=5824,
        about="SmolLM2-135M on two AVX2 cores, fitted to docs/performance.md",
    ),
    # 16 GB of weights, and 128 KiB of KV per token, at 3.8 TB/s; 16 GFLOP per token and 0.5 MFLOP per pair
    # at 500 TFLOP/s; 0.5 ms for the rest
    "h200": Device(
        Cost(fixed=4.7e-3, row=32e-6, prefill=32e-6, context=34e-9, pair=1e-9),
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        block_size=16,
        num_blocks=52_000,
        about="a model of 8B parameters in bfloat16 on one H200, by arithmetic: not measured",
    ),
}
