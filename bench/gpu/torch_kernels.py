"""The same attention through PyTorch and FlashAttention, where they are installed."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from bench.gpu.job import Job, reason
from bench.gpu.kernels import DRY_HEADS, HEADS, cold_sets, row, works
from jaxserve.pallas_kernels.paged_attention.tuning.measure import CALLS, Heads, Work

LAYERS, REPEATS = 8, 5


def run(job: Job) -> None:
    alternatives = {}
    for name, find in ("torch", sdpa), ("flash-attn", flash_attn):
        try:
            alternatives |= find()
        except Exception as error:
            job.emit(by=name, absent=reason(error))
    if not alternatives:
        return
    import torch

    device = "cpu" if job.dry else "cuda"
    if not job.dry:
        torch.zeros(1, device=device)  # raises why there is no GPU
    job.emit(torch=torch.__version__)
    heads = DRY_HEADS if job.dry else HEADS
    for work in works(job):
        for by, attend in alternatives.items():
            job.try_emit(row(work, heads, by), lambda: {"ms": milliseconds(work, heads, attend, device)})  # noqa: B023


def sdpa() -> dict[str, Callable[..., Any]]:
    """PyTorch's scaled_dot_product_attention, one backend after the other."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right

    def attend(backend: SDPBackend, q: Any, k: Any, v: Any) -> Any:
        """`[sequences, heads, length, dim]`; a view of `[sequences, length, heads, dim]`."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = causal_lower_right(q.shape[2], k.shape[2]) if q.shape[2] > 1 else None
        with sdpa_kernel(backend):
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=0.1, enable_gqa=True
            )
        return out.transpose(1, 2)

    names = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    return {f"torch sdpa {name}": partial(attend, backend) for name, backend in names.items()}


def flash_attn() -> dict[str, Callable[..., Any]]:
    """The package flash-attn, which splits contexts itself."""
    from flash_attn import flash_attn_with_kvcache

    return {
        "flash-attn": lambda q, k, v: flash_attn_with_kvcache(q, k, v, softmax_scale=0.1, causal=True),
    }


def milliseconds(work: Work, heads: Heads, attend: Callable[..., Any], device: str) -> float:
    """Of one layer; on a GPU the time of a CUDA graph, between events."""
    import torch

    def normal(length: int, count: int) -> Any:
        return torch.randn(work.sequences, length, count, heads.dim, dtype=torch.bfloat16, device=device)

    sets = cold_sets(work, LAYERS, heads)
    context = work.before + work.rows
    made = [(normal(context, heads.kv), normal(context, heads.kv)) for _ in range(1 + max(map(max, sets)))]
    q = normal(work.rows, heads.query)

    def calls() -> None:
        state = q
        for layers in sets:
            for k, v in [made[i] for i in layers]:
                state = (state + attend(state, k, v)) / 2

    with torch.inference_mode():
        calls()
        take = on_host if device == "cpu" else in_graph
        return take(calls) / (CALLS * LAYERS)


def on_host(calls: Callable[[], None]) -> float:
    begin = time.perf_counter()
    calls()
    return 1e3 * (time.perf_counter() - begin)


def in_graph(calls: Callable[[], None]) -> float:
    import torch

    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    times = []
    for _ in range(REPEATS + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[1:])
