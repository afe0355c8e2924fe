"""Logprobs of prompts, against a Llama in NumPy; whatever the chunks, the cache and the pool."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxserve import SamplingParams
from jaxserve.engine.programs import Programs
from jaxserve.engine.scheduler import Limits
from jaxserve.errors import InvalidRequest

RNG = np.random.default_rng(3)
SHARED = RNG.integers(6, 250, 48).tolist()
PROMPTS = [(SHARED + RNG.integers(6, 250, 200).tolist())[:n] for n in (1, 2, 3, 47, 64, 65, 130, 200)]
ROUNDING = 1e-4


def oracle(path, ids: list[int]) -> np.ndarray:
    """float64 [len(ids), vocab]: the logprobs of what may follow each token."""
    c = json.loads((path / "config.json").read_text())
    w = {name: x.astype(np.float64) for name, x in load_file(path / "model.safetensors").items()}
    dim, length = c["head_dim"], len(ids)

    def norm(x, name):
        return w[name] * x / np.sqrt((x * x).mean(-1, keepdims=True) + c["rms_norm_eps"])

    angles = np.arange(length)[:, None] / c["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def turned(x):
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    x = w["model.embed_tokens.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        h = norm(x, at + "input_layernorm.weight")
        q, k, v = (
            (h @ w[f"{at}self_attn.{name}_proj.weight"].T).reshape(length, -1, dim) for name in "qkv"
        )
        group = q.shape[1] // k.shape[1]
        k, v = np.repeat(turned(k), group, axis=1), np.repeat(v, group, axis=1)
        scores = np.einsum("qhd,khd->hqk", turned(q), k) / np.sqrt(dim)
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out = np.einsum("hqk,khd->qhd", weights, v).reshape(length, -1)
        x = x + out @ w[at + "self_attn.o_proj.weight"].T
        h = norm(x, at + "post_attention_layernorm.weight")
        gate, up = (h @ w[f"{at}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[at + "mlp.down_proj.weight"].T
    logits = norm(x, "model.norm.weight") @ w["lm_head.weight"].T
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def engine(make_engine):
    engine = make_engine(max_num_seqs=8, max_num_batched_tokens=64, num_blocks=128, block_size=8)
    assert engine.wait_until_warm(120)
    return engine


@pytest.fixture(scope="module")
def expected(model_dir):
    return [oracle(model_dir, prompt) for prompt in PROMPTS]


@pytest.fixture(autouse=True)
def nothing_is_compiled(engine):
    engine.reset_prefix_cache()
    yield
    assert engine.stats()["compiles_on_request_path"] == 0


def asking(count: int | None, **options) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 3, "prompt_logprobs": count} | options)


def check(output, expected: np.ndarray, count: int) -> None:
    """Numbers, their order and ranks, up to what rounding may turn round."""
    ids, found = output.prompt_token_ids, output.prompt_logprobs
    assert found[0] is None and len(found) == len(ids)
    for token, entry, logprobs in zip(ids[1:], found[1:], expected, strict=False):
        assert next(iter(entry)) == token
        likeliest = sorted((told.rank, told.logprob) for told in entry.values() if told.rank <= count)
        assert [rank for rank, _ in likeliest] == list(range(1, count + 1))
        best = -np.sort(-logprobs)[:count]
        np.testing.assert_allclose([logprob for _, logprob in likeliest], best, atol=ROUNDING)
        for id, told in entry.items():
            assert told.logprob == pytest.approx(logprobs[id], abs=ROUNDING)
            assert np.sum(logprobs > logprobs[id] + ROUNDING) < told.rank
            assert told.rank <= np.sum(logprobs >= logprobs[id] - ROUNDING)


@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_they_are_the_models_own_in_a_batch(engine, expected, count):
    for output, logprobs in zip(engine.generate(PROMPTS, asking(count)), expected, strict=True):
        check(output, logprobs, count)


def test_tokens_are_told_as_text(engine):
    (entry,) = engine.generate("ab", asking(1))[0].prompt_logprobs[1:]
    assert next(iter(entry.values())).decoded_token == "b"
    assert {told.decoded_token for told in entry.values()} == set(map(engine.tokenizer.token_text, entry))


@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_chunks_of_any_size_give_the_same(engine, expected, monkeypatch, tokens):
    """Of a single token too, which otherwise takes a program that scores nothing."""
    monkeypatch.setattr(Programs, "limits", Limits(1, tokens))
    for prompt, logprobs in zip(PROMPTS[1:6], expected[1:6], strict=True):
        check(engine.generate(prompt, asking(2))[0], logprobs, 2)


def test_nothing_is_taken_from_the_cache_and_all_is_given_to_it(engine, expected):
    for _ in range(2):
        output = engine.generate(PROMPTS[-1], asking(2))[0]
        check(output, expected[-1], 2)
        assert output.num_cached_tokens == 0
    plain = engine.generate(PROMPTS[-1], asking(None))[0]
    assert plain.num_cached_tokens == 192 and plain.prompt_logprobs is None
    assert plain.outputs[0].token_ids == output.outputs[0].token_ids


@pytest.fixture
def asked(engine, monkeypatch):
    """How many tokens' logprobs each step is asked for."""
    programs, counts = engine._cores[0]._programs, []

    def watched(program):
        def call(weights, hidden, tokens):
            counts.append(int(np.sum(tokens >= 0)))
            return program(weights, hidden, tokens)

        return call

    monkeypatch.setattr(programs, "_score", {b: watched(p) for b, p in programs._score.items()})
    return counts


@pytest.mark.parametrize("overlap", [False, True])
def test_a_preempted_prompt_is_not_asked_again_for_what_is_known(
    engine, expected, asked, monkeypatch, overlap
):
    """A part of it is known when others take its place, and its blocks are gone when it returns."""
    (core,) = engine._cores
    monkeypatch.setattr(core, "_overlap", overlap)
    monkeypatch.setattr(Programs, "limits", Limits(8, 64))
    engine.add_request(PROMPTS[-1], asking(3))
    engine.step()
    engine.step()
    (request,) = core._scheduler.running
    known = len(request.scores)
    assert 0 < known < 199
    core._scheduler.preempt(request)
    engine.reset_prefix_cache()
    (output,) = [output for output in drain(engine) if output.finished]
    check(output, expected[-1], 3)
    assert request.preemptions == 1 and sum(asked) == 199


def test_a_preempted_prompt_takes_from_the_cache_what_is_known(engine, expected, monkeypatch):
    (core,) = engine._cores
    monkeypatch.setattr(core, "_overlap", False)
    engine.add_request(PROMPTS[-1], asking(3))
    engine.step()
    (request,) = core._scheduler.running
    assert len(request.scores) == 64
    core._scheduler.preempt(request)
    core._scheduler.schedule(Limits(8, 8))
    assert request.computed == 64 + 8
    core._scheduler.preempt(request)
    check(drain(engine)[-1], expected[-1], 3)


def test_a_small_pool_preempts_and_changes_nothing(make_engine, expected):
    small = make_engine(max_num_seqs=8, max_num_batched_tokens=64, num_blocks=33, block_size=8)
    outputs = small.generate(PROMPTS[2:], asking(4, max_tokens=40, ignore_eos=True))
    for output, logprobs in zip(outputs, expected[2:], strict=True):
        check(output, logprobs, 4)
    assert small.stats()["preemptions"] > 0


def drain(engine):
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step()
    return outputs


@pytest.mark.parametrize("kind", ["delta", "cumulative", "final"])
def test_they_come_with_the_first_output(engine, expected, asked, kind):
    engine.add_request(PROMPTS[5], asking(1, n=3, max_tokens=4, output_kind=kind, ignore_eos=True))
    outputs = drain(engine)
    check(outputs[0], expected[5], 1)
    told = [output.prompt_logprobs is not None for output in outputs]
    assert told == [kind != "delta" or i == 0 for i in range(len(outputs))]
    assert sum(asked) == 64  # one of the three asks
    assert {s.index: s.finish_reason for s in outputs[-1].outputs}
    assert sum(len(s.token_ids) for o in outputs for s in o.outputs) == 12 or kind == "cumulative"


def test_steps_without_them_score_nothing(engine, asked):
    engine.generate(PROMPTS, asking(None, logprobs=2))
    assert asked == []


def test_what_cannot_be_asked_for():
    for count in (-1, 21, True, 1.0):
        with pytest.raises(InvalidRequest, match="prompt_logprobs"):
            asking(count)
