"""Outputs that a grammar holds: whole engines with a random model, which knows no grammar by itself."""

import json
import re
import threading

import jsonschema
import pytest

from jaxserve import SamplingParams, StructuredOutputsParams
from jaxserve.engine.grammar.compiler import Compiler
from jaxserve.errors import InvalidRequest

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "number of things": {"type": "integer", "minimum": 0, "maximum": 10**6},
        "kind": {"enum": ["first", "second", None]},
    },
    "required": ["name", "number of things", "kind"],
    "additionalProperties": False,
}
CHOICES = ["yes, of course", "no, not at all", "no way"]
ASKED = [
    {"json": SCHEMA},
    {"choice": CHOICES},
    {"regex": "[a-c]{3,9}"},
    {"grammar": 'root ::= "[" n ("," n)? "]"\nn ::= "0" | [1-9] [0-9]? [0-9]?'},
]
EMPTY = {"type": "integer", "minimum": 2, "maximum": 1}
PROMPT = {"prompt_token_ids": [40, 41, 42]}


def params(asked=None, **more):
    given = {"max_tokens": 120, "temperature": 1.0, "seed": 1} | more
    return SamplingParams(**given, structured_outputs=asked and StructuredOutputsParams(**asked))


def is_of(asked, text):
    match asked:
        case {"json": schema}:
            jsonschema.validate(json.loads(text), schema)
        case {"choice": choices}:
            assert text in choices
        case {"regex": pattern}:
            assert re.fullmatch(pattern, text), text
        case {"grammar": _}:
            assert re.fullmatch(r"\[(0|[1-9]\d{0,2})(,(0|[1-9]\d{0,2}))?\]", text), text


@pytest.fixture
def engine(make_engine):
    return make_engine()


@pytest.fixture
def counted(engine):
    """counted(function): what it gives, and the growth of the engine's counters meanwhile."""

    def count(function):
        before = engine.stats()
        given = function()
        after = engine.stats()
        return given, {k: after[k] - before[k] for k in ("steps", "generation_tokens", "forced_tokens")}

    return count


def finish(engine):
    """Run all that is under way; the last output of each request."""
    done = {}
    while engine.has_unfinished():
        done |= {output.request_id: output for output in engine.step()}
    return done


def free(engine):
    finish(engine)  # the last step in flight
    stats = engine.stats()
    return not (stats["running"] or stats["waiting"] or stats["blocks_used"])


def test_a_batch_of_all_kinds_is_of_their_forms_and_leaves_others_alone(engine):
    plain = [params(seed=i, ignore_eos=True, max_tokens=60) for i in range(4)]
    alone = [engine.generate(PROMPT, each)[0].outputs[0].token_ids for each in plain]
    asked = [ASKED[i % len(ASKED)] for i in range(24)]
    wanted = [params(each, seed=i, temperature=i % 3 / 2) for i, each in enumerate(asked)]
    outputs = engine.generate([PROMPT] * 28, wanted + plain)
    for output, each in zip(outputs, asked, strict=False):
        assert output.outputs[0].finish_reason == "stop" and output.outputs[0].stop_reason is None
        is_of(each, output.outputs[0].text)
    assert [output.outputs[0].token_ids for output in outputs[24:]] == alone
    assert free(engine)


def test_what_is_forced_takes_no_steps(engine, counted):
    (output,), grew = counted(lambda: engine.generate(PROMPT, params({"choice": CHOICES})))
    tokens = output.outputs[0].token_ids
    assert output.outputs[0].text in CHOICES and grew["generation_tokens"] == len(tokens)
    assert grew["forced_tokens"] >= len("o way") and grew["steps"] < len(tokens) / 2


def test_nothing_is_taken_without_sampling_while_that_would_hold_up_others(engine, counted):
    (alone,) = engine.generate(PROMPT, params({"choice": CHOICES}))  # and the grammar is there at once
    plain = params(ignore_eos=True, max_tokens=60)
    outputs, grew = counted(lambda: engine.generate([PROMPT] * 2, [plain, params({"choice": CHOICES})]))
    assert outputs[1].outputs[0].text in CHOICES and grew["forced_tokens"] == 0
    assert alone.outputs[0].token_ids == outputs[1].outputs[0].token_ids


@pytest.mark.parametrize(
    "more",
    [{"logprobs": 2}, {"presence_penalty": 1e-9}, {"logits_processors": [lambda tokens, logits: logits]}],
)
def test_where_every_token_is_sampled_they_are_the_same(engine, counted, more):
    """With `more`, nothing is taken without a step; what is forced has no choice all the same."""
    for asked in ASKED:
        (jumped,) = engine.generate(PROMPT, params(asked))
        (stepped,), grew = counted(lambda asked=asked: engine.generate(PROMPT, params(asked, **more)))
        assert stepped.outputs[0].token_ids == jumped.outputs[0].token_ids
        assert grew["forced_tokens"] == 0


def test_every_token_has_its_logprobs(engine):
    (output,) = engine.generate(PROMPT, params(ASKED[0], logprobs=1))
    (sequence,) = output.outputs
    assert len(sequence.logprobs) == len(sequence.token_ids)
    assert all(map(dict.__contains__, sequence.logprobs, sequence.token_ids))


def test_n_sequences_go_on_by_themselves(engine):
    (output,) = engine.generate(PROMPT, params({"regex": "[a-z]{8}"}, n=6))
    texts = {sequence.text for sequence in output.outputs}
    assert len(texts) > 1 and all(re.fullmatch("[a-z]{8}", text) for text in texts)


def test_the_grammar_says_where_the_end_is(engine):
    """Nothing ends a text before or after it."""
    for more in ({"ignore_eos": True, "skip_special_tokens": False}, {"min_tokens": 100}):
        (output,) = engine.generate(PROMPT, params({"regex": "[ab]{6}"}, **more))
        assert re.fullmatch("[ab]{6}", output.outputs[0].text), more
        assert output.outputs[0].finish_reason == "stop"
    lengths = set()
    for seed in range(30):
        (output,) = engine.generate(PROMPT, params({"regex": "[^x]+"}, seed=seed, ignore_eos=True))
        lengths.add(len(output.outputs[0].token_ids))
    assert len(lengths) > 1  # it may end at any token, and sometimes does


def test_other_rules_hold_beside_the_grammar_or_end_the_request(engine):
    a, b, c = (6 + sorted_bytes(engine).index(letter) for letter in "abc")
    (output,) = engine.generate(PROMPT, params({"regex": "[abc]{9}"}, allowed_token_ids=[a, c]))
    assert re.fullmatch("[ac]{9}", output.outputs[0].text)
    with pytest.raises(InvalidRequest, match="leave no token"):
        engine.generate(PROMPT, params({"regex": "[ac]b{3}"}, allowed_token_ids=[a]))
    assert free(engine)
    assert b not in (a, c)


def sorted_bytes(engine):
    return [engine.tokenizer.token_text(i) for i in range(6, engine.tokenizer.vocab_size)]


def test_max_tokens_cuts_what_is_forced_too(engine):
    (output,) = engine.generate(PROMPT, params({"choice": ["abcdefghij"]}, max_tokens=4))
    assert output.outputs[0].text == "abcd" and output.outputs[0].finish_reason == "length"


def test_a_pool_that_is_too_small_changes_nothing(engine, make_engine):
    wanted = [params({"regex": "([a-c]{20}, and so on; ){6}"}, seed=i, max_tokens=300) for i in range(12)]
    starved = make_engine(num_blocks=60, block_size=16)
    outputs = starved.generate([PROMPT] * 12, wanted)
    assert starved.stats()["preemptions"] and free(starved)
    for one, other in zip(outputs, engine.generate([PROMPT] * 12, wanted), strict=True):
        assert one.outputs[0].text == other.outputs[0].text
        assert re.fullmatch("([a-c]{20}, and so on; ){6}", one.outputs[0].text)


def test_without_overlap_it_is_the_same(engine, make_engine):
    wanted = [params(asked, seed=i) for i, asked in enumerate(ASKED)]
    one, other = (e.generate([PROMPT] * 4, wanted) for e in (engine, make_engine(overlap=False)))
    assert [o.outputs[0].token_ids for o in one] == [o.outputs[0].token_ids for o in other]


def test_a_failed_step_costs_only_its_own_requests(engine, monkeypatch):
    core = engine._cores[0]
    late = [engine.add_request(PROMPT, params({"regex": "[ab]{40}"}, seed=i)) for i in range(3)]
    while core._scheduler.unfinished < 3 or core.steps < 3:
        engine.step()
    read = core._read
    monkeypatch.setattr(core, "_read", lambda flight: (_ for _ in ()).throw(RuntimeError("the device")))
    done = {output.request_id: output for output in engine.step()}
    monkeypatch.setattr(core, "_read", read)
    more = engine.add_request(PROMPT, params({"regex": "[ab]{40}"}, seed=3))
    done |= finish(engine)
    assert all("the device" in done[each].error for each in late)
    assert re.fullmatch("[ab]{40}", done[more].outputs[0].text) and free(engine)


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"regex": "("}, "structured_outputs.regex"),
        ({"grammar": "start: nothing"}, "structured_outputs.grammar"),
        ({"json": {"type": "object", "not": {}}}, "structured_outputs.json#/not"),
        ({"json": {"type": "array", "items": EMPTY, "minItems": 1}}, "structured_outputs.json#"),
    ],
)
def test_a_grammar_that_cannot_be_is_refused_and_harms_nobody(engine, asked, param):
    other = engine.add_request(PROMPT, params({"choice": CHOICES}))
    with pytest.raises(InvalidRequest) as refused:
        engine.generate(PROMPT, params(asked))
    assert refused.value.param == param
    assert finish(engine)[other].outputs[0].text in CHOICES


def test_a_grammar_that_fails_while_it_runs_ends_its_own_request(engine):
    bomb = params({"regex": "(a{1,1000}){1,1000}"}, min_tokens=400, max_tokens=400)
    texts = []
    with pytest.raises(InvalidRequest, match="too complex") as failed:
        for output in engine.stream(PROMPT, bomb):
            texts.append(output.outputs[0].text)
    assert "".join(texts).startswith("aaa") and failed.value.param == "structured_outputs.regex"
    is_of({"choice": CHOICES}, engine.generate(PROMPT, params({"choice": CHOICES}))[0].outputs[0].text)
    assert free(engine)


class Gate:
    """Compiling waits for it."""

    def __init__(self, monkeypatch):
        self.opened = threading.Event()
        compile = Compiler._compile

        def wait(compiler, grammar):
            assert self.opened.wait(30)
            return compile(compiler, grammar)

        monkeypatch.setattr(Compiler, "_compile", wait)


def test_a_request_is_held_until_its_grammar_is_there(engine, monkeypatch):
    finish(engine)
    gate = Gate(monkeypatch)
    steps = engine.stats()["steps"]
    held = engine.add_request(PROMPT, params({"regex": "held[ab]{3}"}, n=2))
    for _ in range(3):
        assert engine.step() == []
    assert engine.has_unfinished() and engine.stats()["waiting"] == 2 and engine.stats()["steps"] == steps
    (output,) = engine.generate(PROMPT, params(max_tokens=5))  # it holds up nobody
    assert len(output.outputs[0].token_ids) <= 5
    gate.opened.set()
    assert all(re.fullmatch("held[ab]{3}", sequence.text) for sequence in finish(engine)[held].outputs)


def test_a_held_request_can_be_aborted(engine, monkeypatch):
    finish(engine)
    gate = Gate(monkeypatch)
    held = engine.add_request(PROMPT, params({"regex": "gone[ab]{3}"}))
    engine.abort(held)
    assert not engine.has_unfinished() and free(engine)
    gate.opened.set()


def test_one_grammar_is_compiled_once(engine, monkeypatch):
    compiled = []
    compile = Compiler._compile

    def count(compiler, grammar):
        compiled.append(grammar)
        return compile(compiler, grammar)

    monkeypatch.setattr(Compiler, "_compile", count)
    for _ in range(2):
        engine.generate([PROMPT] * 3, params({"regex": "once[ab]{3}"}, n=4))
    assert len(compiled) == 1


def test_a_text_is_not_shorter_than_min_tokens_where_the_grammar_lets_it_be_longer(engine):
    for more in ({}, {"ignore_eos": True}):
        for seed in range(8):
            wanted = params({"regex": "[a-c]*"}, min_tokens=6, logit_bias={0: 9.0}, seed=seed, **more)
            (output,) = engine.generate(PROMPT, wanted)
            assert len(output.outputs[0].text) >= 5


def test_pointers_of_any_length_come_back_whole_or_not_at_all(engine):
    """Answers of several processes come through one pipe."""
    schemas = [{"properties": {f"{i}" + "x" * 200_000: {"pattern": "("}}} for i in range(4)]
    ids = [engine.add_request(PROMPT, params({"json": schema})) for schema in schemas]
    found = {}
    while engine.has_unfinished():
        found |= {output.request_id: output for output in engine.step()}
    assert all(found[id].error_code == "invalid_request" for id in ids)
    (output,) = engine.generate(PROMPT, params({"choice": ["yes"]}))
    assert output.outputs[0].text == "yes"
