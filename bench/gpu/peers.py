"""The same model through transformers: a static cache, and a forward pass made by torch.compile."""

import time
from statistics import median
from typing import Any

from bench.gpu.job import Job, Model, reason, shape


def run(job: Job) -> None:
    try:
        import torch
        import transformers
    except ImportError as error:
        return job.emit(peer="transformers", absent=reason(error))
    device = "cpu" if job.dry else "cuda"
    config = shape(job.dry)
    name = f"transformers {transformers.__version__}, torch {torch.__version__}"
    try:
        model = random_model(config, device)
    except Exception as error:
        return job.emit(peer=name, absent=reason(error))
    counts, context, steps = ((1, 4), 32, 4) if job.dry else ((1, 32, 8, 64), 1024, 32)
    for count in counts:
        row = {"peer": name, "decode": f"{count} x {context}", "sequences": count, "context": context}
        cost = Model(config).decode(count, context + steps / 2)
        job.try_emit(row, lambda: {**generate(model, count, context, steps), **cost})  # noqa: B023


def random_model(config: dict[str, Any], device: str) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    model.generation_config.eos_token_id = None
    return model


class Clock:
    """A streamer that only notes when tokens come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def generate(model: Any, count: int, context: int, steps: int) -> dict[str, float]:
    """Milliseconds of a token for each sequence, and of the prompts; the first time is for the compiler."""
    import torch

    ids = torch.randint(model.config.vocab_size, (count, context), device=model.device)
    options = {"do_sample": False, "max_new_tokens": steps, "pad_token_id": 0}
    begin = time.perf_counter()
    with torch.inference_mode():
        for _ in range(2):
            compiled, clock = time.perf_counter() - begin, Clock()
            begin = time.perf_counter()
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                cache_implementation="static",
                streamer=clock,
                **options,
            )
    prompts, first, *rest = clock.times
    each = median(b - a for a, b in zip([first, *rest], rest, strict=False))
    return {
        "ms": 1e3 * each,
        "tokens_per_s": count / each,
        "prefill_ms": 1e3 * (first - prompts),
        "compile_s": compiled,
    }
