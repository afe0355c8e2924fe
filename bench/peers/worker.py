"""One peer, inside its own environment: a line of JSON in, a line out. Needs the peer and nothing else.

    python worker.py NAME OPTIONS

Told {"prompts": [[token, …], …], "output": N} it answers {"seconds", "lengths"} of a greedy generation of
exactly N tokens for each; told {"settle": true}, {} once nothing goes on in the background any more.
"""

import atexit
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

Prompts = list[list[int]]
Generate = Callable[[Prompts, int], list[int]]
"""The lengths of what was generated for each prompt."""
Settle = Callable[[], object]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    generate, settle = LOADERS[sys.argv[1]](**json.loads(sys.argv[2]))
    for line in sys.stdin:
        question = json.loads(line)
        answer: dict[str, object] = {}
        if "settle" in question:
            settle()
        else:
            start = time.perf_counter()
            lengths = generate(question["prompts"], question["output"])
            answer = {"seconds": time.perf_counter() - start, "lengths": lengths}
        print(json.dumps(answer), file=answers, flush=True)


def nothing() -> None:
    pass


def jaxserve(model: str, **options: object) -> tuple[Generate, Settle]:
    from jaxserve import Engine, SamplingParams

    engine = Engine(model, enable_prefix_caching=False, **options)

    def generate(prompts: Prompts, output: int) -> list[int]:
        params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        made = engine.generate(prompts, params, use_progress=False)
        return [len(each.outputs[0].token_ids) for each in made]

    return generate, engine.wait_until_warm


def vllm(model: str) -> tuple[Generate, Settle]:
    from vllm import LLM, SamplingParams

    llm = LLM(model, enable_prefix_caching=False)

    def generate(prompts: Prompts, output: int) -> list[int]:
        params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        made = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [len(each.outputs[0].token_ids) for each in made]

    return generate, nothing


def transformers(model: str, dtype: str) -> tuple[Generate, Settle]:
    import torch
    from transformers import AutoModelForCausalLM

    llm = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    llm.generation_config.eos_token_id = None

    def generate(prompts: Prompts, output: int) -> list[int]:
        ids = torch.tensor(prompts)
        greedy = {"do_sample": False, "max_new_tokens": output, "pad_token_id": 0}
        with torch.inference_mode():
            made = llm.generate(ids, attention_mask=torch.ones_like(ids), **greedy)
        return [made.shape[1] - ids.shape[1]] * len(prompts)

    return generate, nothing


def openvino(model: str) -> tuple[Generate, Settle]:
    import numpy as np
    from openvino import Tensor
    from openvino_genai import ContinuousBatchingPipeline, GenerationConfig, SchedulerConfig

    scheduler = SchedulerConfig()
    scheduler.enable_prefix_caching = False
    pipeline = ContinuousBatchingPipeline(model, scheduler, "CPU")

    def generate(prompts: Prompts, output: int) -> list[int]:
        config = GenerationConfig(max_new_tokens=output, ignore_eos=True, do_sample=False)
        made = pipeline.generate([Tensor(np.array([ids])) for ids in prompts], [config] * len(prompts))
        return [len(each.m_generation_ids[0]) for each in made]

    return generate, nothing


def llama_cpp(server: list[str], url: str) -> tuple[Generate, Settle]:
    """Through its server, all prompts at once."""
    process = subprocess.Popen(server, stdout=2)
    atexit.register(process.kill)
    while True:
        try:
            urllib.request.urlopen(f"{url}/health").close()
            break
        except OSError:  # it does not listen yet, or still loads
            if process.poll() is not None:
                raise SystemExit("llama-server ended") from None
            time.sleep(0.02)

    def ask(prompt: list[int], output: int) -> int:
        question = {"prompt": prompt, "n_predict": output, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(f"{url}/completion", json.dumps(question).encode())
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["tokens_predicted"]

    def generate(prompts: Prompts, output: int) -> list[int]:
        with ThreadPoolExecutor(len(prompts)) as clients:
            return list(clients.map(ask, prompts, [output] * len(prompts)))

    return generate, nothing


LOADERS = {
    "jaxserve": jaxserve,
    "jaxserve-deterministic": jaxserve,
    "vllm": vllm,
    "transformers-bf16": transformers,
    "transformers-f32": transformers,
    "openvino": openvino,
    "llama.cpp": llama_cpp,
}

if __name__ == "__main__":
    main()
