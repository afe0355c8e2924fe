"""What shapes the logits, against NumPy, and through an engine: beside other requests as alone."""

import json
import math
import re
from collections import Counter
from itertools import chain

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest

from jaxserve import SamplingParams
from jaxserve.engine.messages import CoreRequest
from jaxserve.engine.rules import rules_of
from jaxserve.engine.shaping import EnterLayout, RowsLayout, Shaping, enter, is_shaped, shape
from jaxserve.engine.step import Slots
from jaxserve.errors import JaxserveError

VOCAB, SLOTS = 150, 6
PROMPT = [7, 7, 8, 9]
OUTPUT = [8, 20, 20, 20]
SPECS = [
    {},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"frequency_penalty": 1.5},
    {"presence_penalty": -1.2},
    {"logit_bias": {3: -100.0, 20: 4.5, 149: 100.0}},
    {"typical_p": 0.3},
    {"typical_p": 0.9, "temperature": 2.0},
    {"typical_p": 0.2, "temperature": 0.0},
    {"allowed_token_ids": [0, 31, 32, 33, 63, 64, 149]},
    {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.4, "logit_bias": {8: 1.0}},
    {"frequency_penalty": 2.0, "typical_p": 0.5, "allowed_token_ids": list(range(0, 150, 3))},
]
shape_jit, enter_jit = jax.jit(shape, static_argnums=0), jax.jit(enter, static_argnums=0)


def spec_of(fields):
    return CoreRequest(id="a", prompt=PROMPT, max_tokens=9, **fields)


def oracle(logits: np.ndarray, spec: CoreRequest, output: list[int]) -> np.ndarray:
    x = logits.astype(np.float64)
    for token, bias in spec.logit_bias.items():
        x[token] += bias
    seen = list({*spec.prompt, *output})
    x[seen] = np.where(x[seen] > 0, x[seen] / spec.repetition_penalty, x[seen] * spec.repetition_penalty)
    for token, count in Counter(output).items():
        x[token] -= spec.frequency_penalty * count + spec.presence_penalty
    if spec.allowed_token_ids:
        x[np.setdiff1d(np.arange(VOCAB), spec.allowed_token_ids)] = -np.inf
    if spec.typical_p < 1 and spec.temperature > 0:
        p = np.exp((x - x.max()) / spec.temperature)
        p /= p.sum()
        with np.errstate(divide="ignore"):
            surprise = -np.log(p)
        far = np.abs(surprise - np.sum(p[p > 0] * surprise[p > 0]))
        order = np.argsort(far)
        kept = order[: int(np.searchsorted(np.cumsum(p[order]), spec.typical_p)) + 1]
        x[np.setdiff1d(np.arange(VOCAB), kept)] = -np.inf
    return x


class Device:
    """The state of some slots, each with a request, and steps of all of them."""

    def __init__(self, specs, output):
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), (Slots.shapes(SLOTS, 1), Shaping.shapes(SLOTS, VOCAB))
        )
        (self.slots, self.shaping), self.specs = zeros, specs
        temperatures = jnp.array([spec.temperature for spec in specs])
        params = self.slots.params
        params = params._replace(temperature=params.temperature.at[: len(specs)].set(temperatures))
        self.slots = self.slots._replace(params=params)
        for slot, spec in enumerate(specs):
            packed = EnterLayout(VOCAB).pack(slot, spec, output)
            self.shaping = enter_jit(VOCAB, self.shaping, packed)

    def step(self, logits, place, last):
        """Logits [rows, vocab] of token `place` of each output, after the token `last`."""
        rows = len(self.specs) + 1  # the last one is padding
        filled = self.slots.last_token.at[: rows - 1].set(last)
        slots = self.slots._replace(last_token=filled)
        packed, here, masks = RowsLayout(rows, VOCAB).empty()
        here[: rows - 1] = 1
        for row, spec in enumerate(self.specs):
            for rule in rules_of(spec, VOCAB):
                rule.narrow(masks[row], [], place)
        targets = [[slot, len(PROMPT) + place] for slot in range(rows - 1)] + [[SLOTS, 0]]
        padded = np.concatenate([logits, np.zeros((1, VOCAB), np.float32)])
        args = self.shaping, slots, padded, np.array(targets, np.int32), packed
        self.shaping, found = shape_jit("typical", *args)
        _, plain = shape_jit("plain", *args)
        _, masked = shape_jit("masks", *args)
        for row, spec in enumerate(self.specs):  # to the last bit
            assert spec.typical_p < 1.0 or np.array_equal(plain[row], found[row])
            assert is_shaped(spec) or np.array_equal(masked[row], found[row])
        return np.asarray(found)[: rows - 1]


@pytest.mark.parametrize("part", [SPECS[:6], SPECS[6:]], ids=["first", "second"])
def test_rows_are_shaped_as_numpy_does(part):
    specs, rng = [spec_of(fields) for fields in part], np.random.default_rng(0)
    device, output = Device(specs, OUTPUT), list(OUTPUT)
    for turn, last in enumerate((999, 20, 3, 3, 8)):
        # what was known as the request entered is not counted again
        output += [last] if turn else []
        logits = rng.normal(0, 3, (len(specs), VOCAB)).astype(np.float32)
        found = device.step(logits, len(output), min(last, VOCAB - 1))
        for row, spec in enumerate(specs):
            wanted = oracle(logits[row], spec, output)
            assert np.array_equal(np.isfinite(found[row]), np.isfinite(wanted)), spec
            np.testing.assert_allclose(found[row], wanted, rtol=1e-5, atol=1e-5)


def test_a_step_that_is_read_twice_counts_its_token_once():
    device = Device([spec_of({"frequency_penalty": 1.0})], [])
    logits = np.zeros((1, VOCAB), np.float32)
    for _ in range(2):
        assert device.step(logits, 1, 5)[0, 5] == -1.0


def test_words_of_several_tokens_end_at_their_last():
    (rule,) = rules_of(spec_of({"bad_words": [[1, 2, 3], [3, 33]]}), VOCAB)
    assert rule.late
    cases = ([], []), ([1, 2], [3]), ([2], []), ([5, 1, 2], [3]), ([3], [33]), ([1, 2, 3], [33])
    for output, banned in cases:
        mask = np.full(5, 2**32 - 1, np.uint32)
        rule.narrow(mask, output, len(output))
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
        assert np.flatnonzero(bits == 0).tolist() == banned


PROPERTIES = {"a": {"enum": [1, 22]}, "b": {"type": "boolean"}}
OBJECT = {"type": "object", "properties": PROPERTIES, "required": ["b"], "additionalProperties": False}
FIELDS = [
    {},
    {"temperature": 0.8},
    {"repetition_penalty": 1.5},
    {"frequency_penalty": 1.0, "temperature": 1.0},
    {"presence_penalty": 1.5},
    {"logit_bias": {70: 8.0, 71: 8.0}},
    {"typical_p": 0.4, "temperature": 1.0},
    {"allowed_token_ids": list(range(40, 90)), "temperature": 1.0},
    {"min_tokens": 12, "max_tokens": 20, "stop_token_ids": list(range(6, 200))},
    {"stop_token_ids": list(range(6, 100))},
    {"logits_processors": [lambda output, logits: logits * (1 - 2 * (len(output) % 2))]},
    {"top_k": 5, "temperature": 1.0, "repetition_penalty": 0.8, "logprobs": 3},
    {"logprobs": 2, "logit_bias": {65: 5.0}},
    {"min_p": 0.1, "temperature": 1.3, "presence_penalty": -1.0},
    {"top_p": 0.7, "temperature": 1.0, "frequency_penalty": -0.5, "min_tokens": 3},
    {"repetition_penalty": 1.1, "typical_p": 0.9, "temperature": 1.0, "allowed_token_ids": list(range(150))},
    {"structured_outputs": {"regex": "[a-f]{2}; so on: [u-z]{4}"}, "max_tokens": 20},
    {"structured_outputs": {"choice": ["no", "never", "nothing"]}, "logprobs": 1},
    {"structured_outputs": {"json": OBJECT}, "max_tokens": 60, "temperature": 1.0, "frequency_penalty": 0.2},
    {"structured_outputs": {"json_object": True}, "bad_words": ["a", "ee"], "temperature": 1.0},
    {"bad_words": ["a", "ab", "xyz"], "temperature": 1.0},
    {"n": 3, "temperature": 1.0, "presence_penalty": 0.7},
    {"n": 2, "best_of": 4, "temperature": 1.0},
    {"stop": ["e", "tt"], "temperature": 1.0, "include_stop_str_in_output": True},
    {"truncate_prompt_tokens": 4},
    {"detokenize": False, "temperature": 1.0, "top_k": 3},
    {"ignore_eos": False, "temperature": 2.0, "logit_bias": {0: 4.0}},
    {"skip_special_tokens": False, "logit_bias": {1: 6.0}, "temperature": 1.0},
]


FAILING = {"logits_processors": [lambda output, logits: 1 / 0]}


def params_of(i, fields):
    fixed = {"temperature": 0.0, "seed": i, "max_tokens": 10 + i % 7, "ignore_eos": True}
    return SamplingParams(**{**fixed, **fields})


def requests():
    rng = np.random.default_rng(3)
    shared = rng.integers(6, 262, 40).tolist()
    for i in range(2 * len(FIELDS)):
        prompt = shared[: 20 * (i % 3)] + rng.integers(6, 262, 1 + i % 9).tolist()
        yield prompt, params_of(i, FIELDS[i % len(FIELDS)])


def results(outputs):
    """Of each request its sequences' tokens, text and logprobs."""
    return [[(s.token_ids, s.text, s.logprobs) for s in output.outputs] for output in outputs]


def same(found, wanted):
    sequences = (chain.from_iterable(requests) for requests in (found, wanted))
    for (*given, logprobs), (*known, expected) in zip(*sequences, strict=True):
        assert given == known
        for here, there in zip(logprobs or (), expected or (), strict=True):
            assert here.keys() == there.keys()
            for token in here:
                assert here[token].logprob == pytest.approx(there[token].logprob, abs=1e-4)


@pytest.fixture(scope="module")
def alone(make_engine):
    engine = make_engine(max_num_seqs=32)
    return results(engine.generate(prompt, params, use_progress=False)[0] for prompt, params in requests())


def test_requests_of_all_kinds_in_one_batch_are_as_each_alone(make_engine, alone):
    engine = make_engine(max_num_seqs=32)
    before = engine.stats()
    same(results(engine.generate(*zip(*requests(), strict=True), use_progress=False)), alone)
    after = engine.stats()
    assert after["compiles_on_request_path"] == 0
    assert after["prefix_cache_hits"] > before["prefix_cache_hits"]


def test_what_is_preempted_goes_on_as_if_it_had_not_been(make_engine, alone):
    engine = make_engine(max_num_seqs=32, num_blocks=14, max_model_len=96)
    same(results(engine.generate(*zip(*requests(), strict=True), use_progress=False)), alone)
    assert engine.stats()["preemptions"] > 0
    assert engine.stats()["blocks_used"] == 0


def test_every_field_does_something(alone):
    def of(number):
        """Tokens and text of the first sequences of those with these fields."""
        return [sequences[0][:2] for sequences in alone[number :: len(FIELDS)]]

    assert all({70, 71} & set(tokens) for tokens, _ in of(5))
    assert all(set(tokens) <= set(range(40, 90)) for tokens, _ in of(7))
    assert all(len(tokens) > 12 for tokens, _ in of(8)) and all(len(tokens) < 10 for tokens, _ in of(9))
    assert all(re.fullmatch("[a-f]{2}; so on: [u-z]{4}", text) for _, text in of(16))
    assert all(text in ("no", "never", "nothing") for _, text in of(17))
    assert all(jsonschema.validate(json.loads(text), OBJECT) is None for _, text in of(18))
    assert not any("a" in text for _, text in of(20))
    assert {len(sequences) for sequences in alone[21 :: len(FIELDS)]} == {3}
    assert {len(sequences) for sequences in alone[22 :: len(FIELDS)]} == {2}
    assert not any(text for _, text in of(25))


def test_a_request_that_leaves_no_token_ends_alone(make_engine):
    engine = make_engine(max_num_seqs=32)
    prompt = [10, 11, 12]
    wanted = engine.generate(prompt, params_of(0, {}), use_progress=False)[0].outputs[0].token_ids
    ids = [
        engine.add_request(prompt, params_of(0, {"output_kind": "final"})),
        engine.add_request(
            prompt, params_of(0, {"allowed_token_ids": [9], "min_tokens": 2, "stop_token_ids": [9]})
        ),
        engine.add_request(prompt, params_of(0, FAILING)),
    ]
    found = {}
    while engine.has_unfinished():
        found |= {output.request_id: output for output in engine.step()}
    assert found[ids[0]].outputs[0].token_ids == wanted
    assert "no token" in found[ids[1]].error and "ZeroDivisionError" in found[ids[2]].error
    assert engine.stats()["blocks_used"] == 0
    with pytest.raises(JaxserveError, match="ZeroDivisionError"):
        engine.generate(prompt, params_of(0, FAILING))


def test_what_is_drawn_has_the_shaped_distribution(make_engine):
    """Chi-square over the first token of many seeds, at the 0.1% level."""
    engine = make_engine(max_num_seqs=32)
    prompt, fields = [30, 31, 32, 30], {"temperature": 1.5, "allowed_token_ids": list(range(28, 40))}
    fields |= {"repetition_penalty": 3.0, "logit_bias": {33: 2.0}}
    seen = {}
    raw = SamplingParams(max_tokens=1, logits_processors=[lambda _, logits: seen.update(x=logits) or logits])
    engine.generate(prompt, raw, use_progress=False)
    x = seen["x"].astype(np.float64)
    x[33] += 2.0
    x[prompt] = np.where(x[prompt] > 0, x[prompt] / 3.0, x[prompt] * 3.0)
    p = np.exp(x[28:40] / 1.5)
    p /= p.sum()
    draws = 2000
    each = [SamplingParams(n=100, max_tokens=1, seed=seed, **fields) for seed in range(draws // 100)]
    outputs = engine.generate([prompt] * len(each), each, use_progress=False)
    tokens = [sequence.token_ids[0] for output in outputs for sequence in output.outputs]
    counts = np.bincount(tokens, minlength=40)[28:]
    assert counts.sum() == draws
    statistic = float(np.sum((counts - draws * p) ** 2 / (draws * p)))
    # the 99.9th percentile of chi-square, by Wilson and Hilferty
    degrees = len(p) - 1
    limit = degrees * (1 - 2 / (9 * degrees) + 3.09 * math.sqrt(2 / (9 * degrees))) ** 3
    assert statistic < limit
