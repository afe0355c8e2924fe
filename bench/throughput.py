"""Offline throughput beside transformers: the same model, weights and prompts, in turn, in one run.

    python bench/throughput.py [--sequences 1 8 32] [--input 128] [--output 128] [--rounds 3] [--peers …]

Needs torch and transformers (`make test` installs them). Each peer runs in a process of its own, one at
a time; a round is one run of each. Prints output tokens per second and their ratio (median, min, max).
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

Generate = Callable[[list[list[int]], int], list[list[int]]]
PEERS = ("jaxserve bfloat16", "transformers bfloat16", "transformers float32")
DETERMINISTIC = "jaxserve-deterministic bfloat16"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--input", type=int, default=128)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", nargs="+", choices=[*PEERS, DETERMINISTIC], default=list(PEERS))
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        serve_peer(args.peer)
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    processes = {peer: Process(peer) for peer in args.peers}
    for peer, process in processes.items():
        print(f"{peer}: loaded and warm after {process.ready():.1f} s", flush=True)
    print(f"\n{args.input} tokens in, {args.output} out, greedy, {args.rounds} rounds, median (min-max)\n")
    width = max(map(len, args.peers))
    print(f"| {'sequences':9} | {'peer':{width}} | {'output tokens/s':22} | {args.peers[0]} / peer |")
    print(f"|{'-' * 11}|{'-' * (width + 2)}|{'-' * 24}|{'-' * (len(args.peers[0]) + 9)}|")
    for count in args.sequences:
        rates: dict[str, list[float]] = {peer: [] for peer in args.peers}
        for turn in range(args.rounds):
            chance = random.Random(count * 1000 + turn)
            prompts = [[chance.randrange(1000, 40000) for _ in range(args.input)] for _ in range(count)]
            for peer, process in processes.items():
                rates[peer].append(count * args.output / process.run(prompts, args.output))
        for peer, mine in rates.items():
            ratios = [a / b for a, b in zip(rates[args.peers[0]], mine, strict=True)]
            row = f"| {count:9} | {peer:{width}} | {spread(mine, 1):22} | {spread(ratios, 2):22} |"
            print(row, flush=True)
    for process in processes.values():
        process.close()


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


class Process:
    """A peer in a process of its own: one line of JSON in, one out."""

    def __init__(self, peer: str):
        command = [sys.executable, __file__, "--peer", peer]
        self._start = time.perf_counter()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        # one at a time: a peer that loads would take the processor from the others
        self._ask({"prompts": [[5] * 16], "output": 2})
        self._loaded = time.perf_counter() - self._start

    def ready(self) -> float:
        return self._loaded

    def run(self, prompts: list[list[int]], output: int) -> float:
        """Seconds for these prompts."""
        answer = self._ask({"prompts": prompts, "output": output})
        assert answer["lengths"] == [output] * len(prompts), answer["lengths"]
        return float(answer["seconds"])

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, question: dict) -> dict:
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a peer ended early; run it alone with --peer to see why")
        return json.loads(line)


def serve_peer(peer: str) -> None:
    name, dtype = peer.split()
    ours = name.startswith("jaxserve")
    generate = jaxserve_engine(dtype, peer == DETERMINISTIC) if ours else transformers_model(dtype)
    for line in sys.stdin:
        question = json.loads(line)
        start = time.perf_counter()
        tokens = generate(question["prompts"], question["output"])
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "lengths": [len(t) for t in tokens]}), flush=True)


def jaxserve_engine(dtype: str, deterministic: bool) -> Generate:
    from jaxserve import Engine, SamplingParams

    engine = Engine(dtype=dtype, deterministic=deterministic)
    engine.wait_until_warm()

    def generate(prompts: list[list[int]], output: int) -> list[list[int]]:
        params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        return [o.outputs[0].token_ids for o in engine.generate(prompts, params, use_progress=False)]

    return generate


def transformers_model(dtype: str) -> Generate:
    """The same dequantised weights, batched greedy `generate` with its KV cache."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from jaxserve.config import DEFAULT_MODEL
    from jaxserve.loading.checkpoint import open_checkpoint
    from jaxserve.loading.hub import resolve

    checkpoint = open_checkpoint(resolve(DEFAULT_MODEL))
    model = LlamaForCausalLM(LlamaConfig(**checkpoint.config))
    state = {name: torch.tensor(np.array(checkpoint.tensor(name))) for name in checkpoint.shapes()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    model = model.to(getattr(torch, dtype)).eval()

    def generate(prompts: list[list[int]], output: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=output,
                max_new_tokens=output,
                do_sample=False,
                pad_token_id=2,
            )
        return made[:, ids.shape[1] :].tolist()

    return generate


if __name__ == "__main__":
    main()
