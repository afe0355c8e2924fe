"""The default model against transformers on the same dequantised weights."""

import asyncio
import os
import subprocess
import sys

import numpy as np
import openai
import pytest

from bench.transformers_llama import transformers_llama
from jaxserve import Engine, SamplingParams
from jaxserve.engine.kernels import Kernels

torch = pytest.importorskip("torch")

NEW = 12
OPTIONS = {"dtype": "float32", "max_num_seqs": 20, "max_num_batched_tokens": 64, "max_model_len": 512}
QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "def fibonacci(n):",
    "The quick brown fox",
    "Explain photosynthesis to a child in two sentences.",
    "1, 1, 2, 3, 5, 8,",
    "Translate 'good morning' into Spanish.",
    "Once upon a time in a small village",
    "List three prime numbers.",
    "SELECT name FROM users WHERE",
    "Why is the sky blue?",
    "Dear Sir or Madam,\n\nI am writing to",
    "<html><body><h1>",
    "Der schnelle braune Fuchs",
    "Who wrote Romeo and Juliet?",
    "The meaning of life is",
    "What is 2+2?",
    "Q: How many legs has a spider?\nA:",
    "import numpy as np\n\n",
    "Tell me about the moon. " * 12,
]


@pytest.fixture(scope="module")
def checkpoint(default_model):
    from jaxserve.loading.checkpoint import open_checkpoint

    return open_checkpoint(default_model)


@pytest.fixture(scope="module")
def reference(checkpoint):
    """transformers' Llama in float32, with the weights as we dequantise them."""
    return transformers_llama(checkpoint)


@pytest.fixture(scope="module")
def engine(default_model):
    with Engine(str(default_model), **OPTIONS) as engine:
        yield engine


@pytest.fixture(scope="module")
def prompts(engine):
    """Half of them as chats, half as plain text."""
    chats = [engine.tokenizer.apply_chat_template([{"role": "user", "content": q}]) for q in QUESTIONS[::2]]
    return chats + [engine.tokenizer.encode(q) for q in QUESTIONS[1::2]]


@pytest.fixture(scope="module")
def expected(reference, prompts):
    """transformers' greedy tokens, one prompt at a time."""
    out = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            mask = torch.ones_like(ids)
            options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
            made = reference.generate(ids, attention_mask=mask, **options)
            out.append(made[0, len(prompt) :].tolist())
    return out


def greedy(engine, prompts):
    outputs = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True))
    return [output.outputs[0].token_ids for output in outputs]


def test_greedy_tokens_in_one_batch_and_alone(engine, prompts, expected):
    assert greedy(engine, prompts) == expected
    assert [greedy(engine, [prompt])[0] for prompt in prompts] == expected


def test_the_server_gives_32_streaming_clients_the_same(engine, default_model, prompts, expected):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    command = [sys.executable, "-m", "jaxserve", "serve", str(default_model), "--port=0", *flags]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    try:
        url = next(word for word in server.stdout.readline().split() if word.startswith("http://"))
        model = openai.OpenAI(base_url=f"{url}/v1", api_key="none").models.list().data[0].id
        got = asyncio.run(stream_all(url, model, [prompts[i % len(prompts)] for i in range(32)]))
    finally:
        server.terminate()
        assert server.wait(60) == 0
    texts = [engine.tokenizer.decode(tokens) for tokens in expected]
    assert got == [texts[i % len(prompts)] for i in range(32)]


async def stream_all(url, model, prompts):
    """The joined text of each prompt's stream, all at once."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:

        async def one(prompt):
            stream = await client.completions.create(
                model=model,
                prompt=prompt,
                max_tokens=NEW,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        return await asyncio.gather(*map(one, prompts))


def test_it_knows_the_capital_of_france(engine, prompts):
    output = engine.generate([prompts[0]], SamplingParams(temperature=0.0, max_tokens=20))[0].outputs[0]
    assert "Paris" in output.text and output.finish_reason == "stop"


KERNELS = [
    pytest.param(Kernels("xla", "xla", "xla"), id="xla"),
    pytest.param(Kernels("cpu", "cpu", "cpu"), id="cpu", marks=pytest.mark.compiler),
]
ROUNDED = pytest.param(Kernels("xla", "xla", "xla", rounded=True), id="rounded as on a GPU")


def our_logits(checkpoint, dtype, ids, kernels):
    """float32 [len(ids), vocab] of one prefill."""
    import jax
    import jax.numpy as jnp

    from jaxserve.config import EngineConfig
    from jaxserve.engine.compilation import compiler_options
    from jaxserve.engine.devices import CPU, make_mesh
    from jaxserve.engine.model import LoadedModel
    from jaxserve.pallas_kernels.paged_attention import PoolShape, ragged_meta

    model = LoadedModel(checkpoint.config, make_mesh(EngineConfig(), 0), dtype, kernels)
    model.load(checkpoint)
    step = model.functions()
    layers, dim = checkpoint.config["num_hidden_layers"], checkpoint.config["head_dim"]
    pool = PoolShape(12, model.kv_heads, 32, dim, model.dtype, CPU.kv_as_bits)

    def run(weights, kv, ids):
        blocks = jnp.arange(1, 12, dtype=jnp.int32)[None]
        meta = ragged_meta(blocks, jnp.zeros(1, jnp.int32), jnp.full(1, len(ids), jnp.int32), len(ids))
        x, _ = step.hidden(weights, ids, meta, kv)
        return step.logits(weights, x, jnp.int32(len(ids)))

    kv = [jnp.zeros(pool.shape, pool.storage)] * layers
    args = model.weights, kv, jnp.asarray(ids, jnp.int32)
    program = jax.jit(run).lower(*args).compile(compiler_options=compiler_options("cpu", model.dtype))
    return np.asarray(program(*args))


@pytest.fixture(scope="module")
def text(prompts):
    return [token for prompt in prompts for token in prompt][:256]


@pytest.fixture(scope="module")
def reference_logits(reference, text):
    with torch.inference_mode():
        return reference(torch.tensor([text])).logits[0].numpy()


@pytest.mark.parametrize("kernels", KERNELS)
def test_float32_logits_equal_transformers(checkpoint, text, reference_logits, kernels):
    assert reference_logits.std() > 1
    error = np.abs(our_logits(checkpoint, "float32", text, kernels) - reference_logits).max()
    assert error < 2e-4
    print(f"largest float32 error: {error:.1e}")


@pytest.fixture(scope="module")
def bfloat16_logits(reference, text, reference_logits):
    """After the float32 ones: the model is turned into bfloat16 for good."""
    with torch.inference_mode():
        return reference.to(torch.bfloat16)(torch.tensor([text])).logits[0].float().numpy()


@pytest.mark.parametrize("kernels", [*KERNELS, ROUNDED])
def test_bfloat16_is_as_close_to_float32_as_transformers_is(
    checkpoint, text, reference_logits, bfloat16_logits, kernels
):
    ours, theirs = our_logits(checkpoint, "bfloat16", text, kernels), bfloat16_logits
    error, allowed = (np.abs(x - reference_logits).mean() for x in (ours, theirs))
    assert 0 < error <= 1.2 * allowed
    print(f"mean bf16 error: ours {error:.4f}, transformers' {allowed:.4f}")
