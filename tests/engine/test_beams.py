"""Beam search against a plain one over the engine's own log probabilities, and against transformers'."""

import asyncio
import random
from collections import deque
from contextlib import contextmanager

import numpy as np
import pytest

from jaxserve import AsyncEngine, BeamSearchParams, SamplingParams
from jaxserve.errors import InvalidRequest

PROMPTS = [random.Random(i).choices(range(6, 262), k=3 + 9 * i) for i in (0, 1, 3)]


OPTIONS = {"block_size": 8, "max_model_len": 128}


@pytest.fixture(scope="module")
def engine(make_engine):
    return make_engine(**OPTIONS)


@contextmanager
def made_small(engine, blocks=None, slots=None, overlap=True, cache=True):
    """The engine with so many free blocks and slots."""
    [core] = engine._cores
    scheduler, pool = core._scheduler, core._pool
    engine.reset_prefix_cache()
    core._overlap, scheduler.prefix_cache = overlap, cache
    hidden = pool.allocate(pool.free - blocks) if blocks else []
    free = deque(scheduler._slots)
    scheduler._slots = deque(list(free)[:slots])
    before = engine.stats()
    yield before
    pool.release(hidden)
    scheduler._slots = free
    core._overlap = scheduler.prefix_cache = True
    nothing_is_left(engine)


class Model:
    """float64 log probabilities by transformers' forward pass."""

    def __init__(self, path):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)  # more get in each other's way
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    def after(self, rows):
        """[rows, vocab], after each of these token lists of one length."""
        with self.torch.no_grad():
            logits = self.model(self.torch.tensor(rows), logits_to_keep=1).logits[:, -1].double()
        return self.torch.log_softmax(logits, -1).numpy()


@pytest.fixture(scope="module")
def model(model_dir):
    return Model(model_dir)


def reference(model, prompt, width, max_tokens, length_penalty=1.0, early_stopping=False, eos=(0,)):
    """[(tokens, log probability)], the best first: all ways on are looked at, in the plainest form."""
    beams, finished = [((), 0.0)], []
    for length in range(1, max_tokens + 1):
        logprobs = model.after([[*prompt, *tokens] for tokens, _ in beams])
        totals = np.array([total for _, total in beams])[:, None] + logprobs
        places = [np.unravel_index(i, totals.shape) for i in np.argsort(-totals, axis=None)[:60]]
        ways = [((*beams[row][0], int(token)), totals[row, token]) for row, token in places]
        ends = [way for way in ways[:width] if way[0][-1] in eos or length == max_tokens]
        finished += [(total / length**length_penalty, tokens, total) for tokens, total in ends]
        finished = sorted(finished, key=lambda one: -one[0])[:width]
        beams = [way for way in ways if way[0][-1] not in eos][:width]
        if len(finished) == width:
            far = max_tokens if early_stopping == "never" and length_penalty > 0 else length
            if early_stopping is True or beams[0][1] / far**length_penalty <= finished[-1][0]:
                break
    return [(list(tokens), float(total)) for _, tokens, total in finished]


def found(output):
    return [(sequence.token_ids, sequence.cumulative_logprob) for sequence in output.outputs]


def same(mine, wanted):
    assert [tokens for tokens, _ in mine] == [tokens for tokens, _ in wanted]
    np.testing.assert_allclose([total for _, total in mine], [total for _, total in wanted], atol=1e-3)


def nothing_is_left(engine):
    stats = engine.stats()
    assert (stats["blocks_used"], stats["running"], stats["waiting"]) == (0, 0, 0)
    assert not any(core._searches._searches or core._scheduler._requests for core in engine._cores)


CASES = [
    {"n": 1, "max_tokens": 12},
    {"n": 2, "max_tokens": 20},
    {"n": 4, "max_tokens": 25, "stop_token_ids": [77, 100, 140, 200]},
    {"n": 10, "max_tokens": 18, "length_penalty": 0.0},
    {"n": 3, "max_tokens": 1},
    {"n": 4, "max_tokens": 20, "length_penalty": 2.0, "early_stopping": "never"},
    {"n": 4, "max_tokens": 20, "length_penalty": -1.0, "early_stopping": True},
    {"n": 5, "max_tokens": 20, "ignore_eos": True},
    {"n": 2, "best_of": 6, "max_tokens": 15, "length_penalty": 0.5},
]


def beams(case):
    return SamplingParams(use_beam_search=True, temperature=0.0, logprobs=0, **case)


@pytest.fixture(scope="module")
def stops(model):
    """Tokens that likely beams meet."""
    walks = [tokens for prompt in PROMPTS for tokens, _ in reference(model, prompt, 4, 20, eos=())]
    return [tokens[place] for tokens, place in zip(walks[::4], (3, 6, 12), strict=True)]


@pytest.fixture(scope="module")
def expected(model, stops):
    """expected(case, prompt): the reference's sequences."""
    known = {}

    def get(case, i):
        if (key := (repr(case), i)) not in known:
            options = {name: case[name] for name in ("length_penalty", "early_stopping") if name in case}
            eos = [*([] if case.get("ignore_eos") else [0]), *(stops if "stop_token_ids" in case else ())]
            width = case.get("best_of", case["n"])
            wanted = reference(model, PROMPTS[i], width, case["max_tokens"], eos=eos, **options)
            known[key] = wanted[: case["n"]]
        return known[key]

    return get


@pytest.fixture(scope="module")
def cases(stops):
    return [case | ({"stop_token_ids": stops} if "stop_token_ids" in case else {}) for case in CASES]


def test_each_search_alone_is_the_plain_one(engine, cases, expected):
    ends = set()
    for case in cases:
        for i, output in enumerate(engine.generate(PROMPTS, beams(case), use_progress=False)):
            same(found(output), expected(case, i))
            ends.update((len(o.token_ids) < case["max_tokens"], o.finish_reason) for o in output.outputs)
    nothing_is_left(engine)
    assert ends >= {(True, "stop"), (False, "length")}


def test_one_beam_is_greedy(engine):
    greedy = engine.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=12, logprobs=0))
    for plain, output in zip(greedy, engine.generate(PROMPTS, beams(CASES[0])), strict=True):
        same(found(output), found(plain))


def mixed(cases):
    """Searches and requests of other kinds in turns, in one batch."""
    for k, case in enumerate(cases):
        for i, prompt in enumerate(PROMPTS):
            yield prompt, beams(case), (case, i)
            if (i + k) % 2:
                yield prompt, SamplingParams(temperature=1.0, seed=k, max_tokens=30, ignore_eos=True), None


WAYS = {
    "roomy": {},
    "in turns": {"overlap": False},
    "few blocks": {"blocks": 20},
    "few blocks, fewer slots than beams": {"blocks": 16, "slots": 6},
    "no cache": {"blocks": 24, "cache": False},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_in_one_batch_each_finds_what_it_finds_alone(engine, cases, expected, way):
    prompts, params, keys = zip(*mixed(cases), strict=True)
    alone = [engine.generate([p], q)[0] for p, q, key in zip(prompts, params, keys, strict=True) if not key]
    with made_small(engine, **way) as before:
        outputs = engine.generate(list(prompts), list(params), use_progress=False)
        assert (engine.stats()["preemptions"] > before["preemptions"]) == ("blocks" in way)
    plain = [output for output, key in zip(outputs, keys, strict=True) if not key]
    assert [o.outputs[0].token_ids for o in plain] == [o.outputs[0].token_ids for o in alone]
    for output, key in zip(outputs, keys, strict=True):
        if key:
            same(found(output), expected(*key))


@pytest.mark.parametrize("way", [{"blocks": 6}, {"slots": 2}, {"blocks": 6, "cache": False}], ids=str)
def test_a_search_that_has_no_room_as_a_whole(engine, expected, way):
    """Its beams run one after the other."""
    with made_small(engine, **way) as before:
        [output] = engine.generate([PROMPTS[2]], beams(CASES[3]))
        assert engine.stats()["preemptions"] > before["preemptions"]
    same(found(output), expected(CASES[3], 2))


@pytest.mark.parametrize("cache", [True, False])
def test_forks_share_full_blocks(engine, cache):
    """While eight beams run, the prompt's blocks are there once, and are computed once."""
    prompt = PROMPTS[2] * 3  # 90 tokens: 11 full blocks
    with made_small(engine, cache=cache):
        computed, most = 0, 0
        [core] = engine._cores
        engine.add_request(prompt, beams({"n": 8, "max_tokens": 20}))
        while engine.has_unfinished():
            engine.step()
            most = max(most, engine.stats()["blocks_used"])
            computed += sum(chunk.length for flight in core._flights for chunk in flight.chunks)
        assert 11 + 8 <= most <= 11 + 8 * 3
        assert computed < 90 + 20 * 8 * 8  # at most a block for each beam and token


def test_as_transformers_generate(engine, model):
    torch = model.torch
    for case in (
        {"n": 3},
        {"n": 4, "length_penalty": 0.5, "early_stopping": True},
        {"n": 5, "length_penalty": -1.0},
    ):
        for prompt in PROMPTS:
            theirs = model.model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt)),
                num_beams=case["n"],
                num_return_sequences=case["n"],
                max_new_tokens=16,
                do_sample=False,
                eos_token_id=0,
                pad_token_id=0,
                length_penalty=case.get("length_penalty", 1.0),
                early_stopping=case.get("early_stopping", False),
                return_dict_in_generate=True,
                output_scores=True,
            )
            params = BeamSearchParams(
                beam_width=case["n"],
                max_tokens=16,
                length_penalty=case.get("length_penalty", 1.0),
                early_stopping=case.get("early_stopping", False),
            )
            [mine] = engine.beam_search([prompt], params)
            for sequence, tokens in zip(mine.sequences, theirs.sequences.tolist(), strict=True):
                assert sequence.tokens == tokens[: len(sequence.tokens)]
                assert set(tokens[len(sequence.tokens) :]) <= {0}
            scores = [sequence.score for sequence in mine.sequences]
            np.testing.assert_allclose(scores, theirs.sequences_scores.numpy(), atol=1e-3)


def test_in_vllms_form(engine):
    [mine] = engine.beam_search(["Hello"], BeamSearchParams(beam_width=3, max_tokens=8))
    [plain] = engine.generate(["Hello"], beams({"n": 3, "max_tokens": 8}))
    for sequence, output in zip(mine.sequences, plain.outputs, strict=True):
        prompt = engine.tokenizer.encode("Hello")
        assert sequence.tokens == [*prompt, *output.token_ids]
        assert sequence.text == engine.tokenizer.decode(sequence.tokens)
        assert sequence.text.startswith("Hello")
        assert sequence.cum_logprob == pytest.approx(
            sum(p[t].logprob for p, t in zip(sequence.logprobs, output.token_ids, strict=True))
        )
        assert sequence.score == pytest.approx(sequence.cum_logprob / len(output.token_ids))
        assert sequence.finish_reason == output.finish_reason
    assert mine.sequences == sorted(mine.sequences, key=lambda one: -one.score)


def test_asynchronous(engine, model_dir):
    params = BeamSearchParams(beam_width=4, max_tokens=10)

    async def run():
        small = {"max_num_seqs": 16, "max_num_batched_tokens": 128, "num_blocks": 256} | OPTIONS
        async with AsyncEngine(model=str(model_dir), dtype="float32", **small) as one:
            searches = [one.beam_search(prompt, params) for prompt in PROMPTS]
            outputs = await asyncio.gather(*searches)
            lost = asyncio.create_task(
                one.beam_search(PROMPTS[0], BeamSearchParams(beam_width=4, max_tokens=100))
            )
            await asyncio.sleep(0.2)
            lost.cancel()
            await asyncio.gather(lost, return_exceptions=True)
            while (await one.stats())["blocks_used"]:
                await asyncio.sleep(0.01)
            return outputs

    wanted = engine.beam_search(PROMPTS, params)
    for mine, theirs in zip(asyncio.run(run()), wanted, strict=True):
        assert [s.tokens for s in mine.sequences] == [s.tokens for s in theirs.sequences]


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8, 13])
def test_aborted_at_any_moment_it_leaves_nothing(engine, steps):
    ids = [engine.add_request(PROMPTS[i], beams({"n": 5, "max_tokens": 40})) for i in range(3)]
    for _ in range(steps):
        engine.step()
    engine.abort(ids)
    while engine.has_unfinished():
        assert engine.step() == []
    nothing_is_left(engine)


@pytest.mark.parametrize("after", [1, 4, 9])
def test_a_failed_step_ends_its_searches_and_no_others(engine, monkeypatch, expected, after):
    [core] = engine._cores
    dispatch, calls = core._dispatch, []

    def fail(schedule):
        calls.append(schedule.chunks)
        if len(calls) == after:
            raise RuntimeError("no luck")
        return dispatch(schedule)

    monkeypatch.setattr(core, "_dispatch", fail)
    case = {"n": 4, "max_tokens": 12}
    ids = [engine.add_request(prompt, beams(case | {"output_kind": "final"})) for prompt in PROMPTS]
    done = {}
    while engine.has_unfinished():
        done |= {output.request_id: output for output in engine.step()}
    hit = {chunk.request.spec.prompt[0] for chunk in calls[after - 1]}
    assert sorted(done) == sorted(ids) and hit
    for i, name in enumerate(ids):
        if PROMPTS[i][0] in hit:
            assert "no luck" in done[name].error
        else:
            same(found(done[name]), expected(case, i))
    nothing_is_left(engine)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 11}, "n"),
        ({"n": 2, "best_of": 11}, "best_of"),
        ({"temperature": 0.5}, "temperature"),
        ({"top_p": 0.5}, "top_p"),
        ({"top_k": 3}, "top_k"),
        ({"stop": "a"}, "stop"),
        ({"logit_bias": {1: 1.0}}, "logit_bias"),
        ({"min_tokens": 1}, "min_tokens"),
        ({"presence_penalty": 1.0}, "presence_penalty"),
        ({"bad_words": ["a"]}, "bad_words"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"length_penalty": 11.0}, "length_penalty"),
        ({"early_stopping": "soon"}, "early_stopping"),
        ({"use_beam_search": 1}, "use_beam_search"),
        ({"use_beam_search": False, "length_penalty": 2.0}, "length_penalty"),
        ({"use_beam_search": False, "early_stopping": True}, "early_stopping"),
    ],
)
def test_what_goes_with_no_search(fields, param):
    with pytest.raises(InvalidRequest) as refused:
        SamplingParams(**({"use_beam_search": True, "temperature": 0.0} | fields))
    assert refused.value.param == param


def test_refusals_name_the_width(engine):
    with pytest.raises(InvalidRequest, match="at most 10 beams, not 11") as refused:
        engine.beam_search(PROMPTS, BeamSearchParams(beam_width=11, max_tokens=4))
    assert refused.value.param == "beam_width"
    with pytest.raises(InvalidRequest, match="10 beams with 12 tokens") as refused:
        engine.generate(PROMPTS, beams({"n": 10, "stop_token_ids": [*range(20, 31)]}))
    assert refused.value.param == "n"
