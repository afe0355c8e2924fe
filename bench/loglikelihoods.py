"""Log probabilities of texts, as evaluations ask for them (`echo` with `logprobs`), against transformers:

    python -m bench.loglikelihoods [--texts 50] [--dtype float32] [serve options, such as --mesh 2x1]

Starts a server of the default model, asks for all texts at once, compares what comes token by token with what
transformers computes in float32 from the same dequantised weights, and asks again, with all of it cached.
The texts come with Python: pieces of its language reference, from 2 tokens to 384.
"""

import argparse
import os
import pydoc_data.topics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np

from bench.transformers_llama import transformers_llama
from jaxserve.config import DEFAULT_MODEL
from jaxserve.loading.checkpoint import Checkpoint, open_checkpoint
from jaxserve.loading.hub import resolve
from jaxserve.text.tokenizer import load_tokenizer

TOP = 5
NEAR = 1e-3
"""Two logprobs that lie no further apart may change places in float32."""


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--texts", type=int, default=50)
    parser.add_argument("--dtype", default="float32")
    args, options = parser.parse_known_args()
    place = resolve(DEFAULT_MODEL)
    prompts = texts(load_tokenizer(place), args.texts)
    with Server(str(place), f"--dtype={args.dtype}", *options) as server:
        began = time.monotonic()
        first = server.ask(prompts)
        print(f"{len(prompts)} texts of {sum(map(len, prompts))} tokens in {time.monotonic() - began:.1f} s")
        again, preempted = server.ask(prompts), server.count("num_preemptions")
        compiled = server.count("compiles_on_request_path")
    expected = theirs(open_checkpoint(place), prompts)
    told = [compare(*triple) for triple in zip(prompts, expected, first, strict=True)]
    print(f"largest error of a token's logprob   {max(error for error, _, _ in told):.1e}")
    print(f"largest error of a text's sum        {max(error for _, error, _ in told):.1e}")
    print(f"positions with another likeliest {TOP}   {sum(count for _, _, count in told)}")
    print(f"largest change when asked again      {max(map(change, first, again)):.1e}")
    print(f"preemptions {preempted:.0f}, compiles on the request path {compiled:.0f}")


def texts(tokenizer: Any, count: int) -> list[list[int]]:
    """Token ids of texts, each longer than the one before."""
    topics = sorted(pydoc_data.topics.topics.values(), key=len, reverse=True)[:count]
    return [tokenizer.encode(topic)[: max(2, int(400 * (i / count) ** 2))] for i, topic in enumerate(topics)]


class Server:
    def __init__(self, *options: str):
        command = [sys.executable, "-m", "jaxserve", "serve", *options, "--port=0"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        url = next(word for word in line.split() if word.startswith("http://"))
        self._http = httpx.Client(base_url=url, timeout=600)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.terminate()
        self._process.wait()

    def ask(self, prompts: list[list[int]]) -> list[dict[str, Any]]:
        """The logprobs of each prompt."""
        model = self._http.get("/v1/models").json()["data"][0]["id"]
        body = {"model": model, "prompt": prompts, "echo": True, "max_tokens": 0, "logprobs": TOP}
        reply = self._http.post("/v1/completions", json=body)
        assert reply.is_success, reply.text
        return [choice["logprobs"] for choice in reply.json()["choices"]]

    def count(self, name: str) -> float:
        """Of a counter in `/metrics`."""
        lines = self._http.get("/metrics").text.splitlines()
        found = [line for line in lines if line.startswith(f"jaxserve:{name}_total")]
        return sum(float(line.rpartition(" ")[2]) for line in found)


def theirs(checkpoint: Checkpoint, prompts: list[list[int]]) -> Iterator[np.ndarray]:
    """float64 [tokens - 1, vocab]: logprobs of what follows each token but the last, of float32 logits.

    torch's log_softmax in float32 is off by 1e-5 in every row of so large a vocabulary: 7e-3 in a text's sum.
    """
    import torch

    model = transformers_llama(checkpoint)
    for ids in prompts:
        with torch.inference_mode():
            yield torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1].double(), -1).numpy()


def compare(ids: list[int], expected: np.ndarray, found: dict[str, Any]) -> tuple[float, float, int]:
    """The largest error of a token, that of the sum, and how many positions have other likeliest tokens."""
    assert found["token_logprobs"][0] is None and len(found["tokens"]) == len(ids)
    own = expected[np.arange(len(ids) - 1), ids[1:]]
    error = np.abs(own - found["token_logprobs"][1:])
    others = 0
    for row, told in zip(expected, found["top_logprobs"][1:], strict=True):
        best = -np.sort(-row)[:TOP]
        others += bool(np.abs(np.array(sorted(told.values(), reverse=True)[:TOP]) - best).max() > NEAR)
    return error.max(), abs(own.sum() - sum(found["token_logprobs"][1:])), others


def change(one: dict[str, Any], other: dict[str, Any]) -> float:
    pairs = zip(one["token_logprobs"][1:], other["token_logprobs"][1:], strict=True)
    return max(abs(a - b) for a, b in pairs)


if __name__ == "__main__":
    main()
