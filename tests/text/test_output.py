"""A scripted core: the test plays the engine's part and looks at what a user would see."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.engine.messages import Abort, CoreOutput, TokenLogprobs
from jaxserve.errors import InvalidRequest
from jaxserve.sampling_params import SamplingParams
from jaxserve.text.output import OutputProcessor
from jaxserve.text.tokenizer import Tokenizer

EOS = 1


@pytest.fixture(scope="module")
def tok(byte_level_tokenizer) -> Tokenizer:
    return byte_level_tokenizer


def processor(tok: Tokenizer | None, **more) -> OutputProcessor:
    return OutputProcessor(tok, [EOS], max_model_len=100, **more)


def generate(proc, ids, params, last="length", chunk=1):
    """The RequestOutputs and aborts of one request whose sequences all get `ids`, `chunk` tokens a step."""
    cores = proc.add("r", "p", [5, 6], params)
    shown, aborts = [], []
    for at in range(0, len(ids), chunk):
        part, end = ids[at : at + chunk], at + chunk >= len(ids)
        reason = last if end else None
        stopped = part[-1] if reason == "stop" else None
        step = [CoreOutput(id=c.id, token_ids=part, finish_reason=reason, stop_token=stopped) for c in cores]
        outputs, ended = proc.process(step)
        shown += outputs
        aborts += ended
    return shown, aborts


class TestAdd:
    def test_core_requests(self, tok):
        params = SamplingParams(
            n=2, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, seed=3, logprobs=2, stop_token_ids=[9, EOS]
        )
        first, second = processor(tok).add("a", "x", [5, 6], params)
        assert (first.id, second.id) == ("a#0.0", "a#0.1")
        assert (first.sample_index, second.sample_index) == (0, 1)
        assert first.prompt == [5, 6]
        assert first.max_tokens == 16
        assert first.stop_token_ids == [EOS, 9]
        assert (first.temperature, first.top_p, first.top_k, first.min_p) == (0.5, 0.9, 7, 0.1)
        assert (first.seed, first.logprobs) == (3, 2)

    def test_ignore_eos(self, tok):
        [core] = processor(tok).add("a", None, [5], SamplingParams(ignore_eos=True, stop_token_ids=[9]))
        assert core.stop_token_ids == [9]

    def test_max_tokens_none_is_the_rest(self, tok):
        params = SamplingParams(max_tokens=None)
        assert processor(tok).add("a", None, [5] * 30, params)[0].max_tokens == 70
        assert processor(tok, max_request_tokens=40).add("a", None, [5] * 30, params)[0].max_tokens == 10

    @pytest.mark.parametrize(
        ("prompt", "more", "param", "words"),
        [
            ([], {}, "prompt", ["empty"]),
            ([5] * 100, {}, "prompt", ["100 tokens"]),
            ([5] * 50, {"max_tokens": 51}, "max_tokens", ["50", "51", "101", "100"]),
            ([5, 100000], {}, "prompt[1]", ["100000", "400"]),
            ([5, -1], {}, "prompt[1]", ["-1"]),
            ([5, True], {}, "prompt[1]", ["True"]),
            ([5], {"stop_token_ids": [5, 401]}, "stop_token_ids[1]", ["401"]),
            ([5], {"allowed_token_ids": [5, 401]}, "allowed_token_ids[1]", ["401"]),
            ([5], {"logit_bias": {5: 1.0, 401: 1.0}}, "logit_bias[401]", ["401", "400"]),
            ([5] * 90, {"min_tokens": 11, "max_tokens": None}, "min_tokens", ["11", "10"]),
            ([5], {"best_of": 2, "output_kind": "delta"}, "best_of", ["stream"]),
            ([5] * 50, {"max_tokens": 51, "truncate_prompt_tokens": 50}, "max_tokens", ["101"]),
            ([5] * 50, {"max_tokens": 100, "truncate_prompt_tokens": -1}, "max_tokens", ["101"]),
        ],
    )
    def test_refusals(self, tok, prompt, more, param, words):
        proc = processor(tok)
        with pytest.raises(InvalidRequest) as error:
            proc.add("a", None, prompt, SamplingParams(**more))
        assert error.value.param == param
        assert all(word in str(error.value) for word in words)
        assert len(proc) == 0

    def test_a_prompt_that_fills_the_context_exactly(self, tok):
        assert processor(tok).add("a", None, [5] * 99, SamplingParams(max_tokens=1))[0].max_tokens == 1

    def test_more_than_the_pool_holds(self, tok):
        with pytest.raises(InvalidRequest, match="40 tokens that the KV pool") as error:
            processor(tok, max_request_tokens=40).add("a", None, [5] * 30, SamplingParams(max_tokens=11))
        assert error.value.param == "max_tokens"

    def test_duplicates(self, tok):
        proc = processor(tok)
        proc.add("a", None, [5], SamplingParams())
        with pytest.raises(InvalidRequest, match="'a'"):
            proc.add("a", None, [5], SamplingParams())

    def test_without_a_tokenizer(self):
        proc = processor(None, vocab_size=50)
        with pytest.raises(InvalidRequest, match="tokenizer") as error:
            proc.add("a", None, [5], SamplingParams(stop="x"))
        assert error.value.param == "stop"
        with pytest.raises(InvalidRequest, match="tokenizer") as error:
            proc.add("a", None, [5], SamplingParams(bad_words=["x"]))
        assert error.value.param == "bad_words"
        with pytest.raises(InvalidRequest, match="between 0 and 49"):
            proc.add("a", None, [50], SamplingParams())
        shown, _ = generate(proc, [7, 8], SamplingParams(output_kind="delta"))
        assert [(o.outputs[0].text, o.outputs[0].token_ids) for o in shown] == [("", [7]), ("", [8])]

    def test_what_shapes_logits_reaches_the_core(self, tok):
        fields = {
            "typical_p": 0.5,
            "presence_penalty": 0.1,
            "frequency_penalty": 0.2,
            "repetition_penalty": 1.3,
            "logit_bias": {7: -1.0},
            "allowed_token_ids": [7, 8],
            "min_tokens": 3,
        }
        [core] = processor(tok).add("a", None, [5], SamplingParams(**fields))
        assert {name: getattr(core, name) for name in fields} == fields
        assert core.stop_token_ids == [EOS]

    @pytest.mark.parametrize(
        ("keep", "max_tokens", "kept"), [(3, 5, 3), (60, 5, 50), (-1, 70, 30), (-1, None, 50), (1, 5, 1)]
    )
    def test_a_truncated_prompt_keeps_its_end(self, tok, keep, max_tokens, kept):
        prompt = [*range(2, 52)]
        params = SamplingParams(truncate_prompt_tokens=keep, max_tokens=max_tokens, output_kind="final")
        proc = processor(tok)
        [core] = proc.add("a", "text", prompt, params)
        assert core.prompt == prompt[-kept:]
        [output], _ = proc.process([CoreOutput(id=core.id, token_ids=[7], finish_reason="length")])
        assert (output.prompt, output.prompt_token_ids) == ("text", prompt[-kept:])

    def test_a_prompt_is_truncated_before_its_length_is_checked(self, tok):
        params = SamplingParams(truncate_prompt_tokens=-1, max_tokens=None)
        [core] = processor(tok).add("a", None, [1000] * 10**6 + [5] * 99, params)
        assert (core.prompt, core.max_tokens) == ([5] * 99, 1)


class TestBadWords:
    def banned(self, tok, *words):
        [core] = processor(tok).add("a", None, [5], SamplingParams(bad_words=list(words)))
        return core.bad_words

    def test_a_word_at_the_beginning_and_after_a_space(self, tok):
        alone, after = tok.encode("fox"), tok.encode(" fox")
        assert len(after) < len(alone) + 1  # the space is part of a token
        assert self.banned(tok, "fox") == self.banned(tok, " fox") == [alone, after]

    def test_what_ends_with_another_is_left_out(self, tok):
        assert self.banned(tok, "zq") == [tok.encode("zq")]
        assert tok.encode(" zq")[1:] == tok.encode("zq")

    def test_a_special_token_is_one(self, tok):
        assert self.banned(tok, "<|user|>")[0] == [tok.backend.token_to_id("<|user|>")]

    def test_in_a_vocabulary_that_puts_a_space_first(self, byte_fallback_tokenizer):
        banned = self.banned(byte_fallback_tokenizer, "fox")
        assert banned[0] == byte_fallback_tokenizer.encode("fox", add_special_tokens=False)

    def test_tokens_that_the_model_does_not_have(self, tok):
        proc = OutputProcessor(tok, [], 100, vocab_size=max(tok.encode("fox")))
        with pytest.raises(InvalidRequest, match="fox") as error:
            proc.add("a", None, [2], SamplingParams(bad_words=["fox"]))
        assert error.value.param == "bad_words[0]"


class TestBestOf:
    def run(self, tok, scores, **more):
        """One request of so many sequences of these logprobs, that end one after another."""
        proc = processor(tok)
        params = SamplingParams(best_of=len(scores), output_kind="cumulative", **more)
        cores = proc.add("r", None, [5, 6], params)
        a = tok.encode("a")[0]
        shown = []
        for i, (core, mine) in enumerate(zip(cores, scores, strict=True)):
            for j, score in enumerate(mine):
                out = CoreOutput(id=core.id, token_ids=[a + i], logprobs=[TokenLogprobs([a + i], [score], 1)])
                out.finish_reason = "length" if j == len(mine) - 1 else None
                shown += proc.process([out])[0]
        [output] = shown  # nothing before all have ended
        assert not proc.has_unfinished()
        return a, cores, output

    def test_the_likeliest_per_token_are_given_in_order(self, tok):
        a, cores, output = self.run(tok, [[-1.0, -1.0], [-0.5], [-0.9], [-0.5, -1.0]], n=2)
        assert [core.sample_index for core in cores] == [0, 1, 2, 3]
        assert {core.logprobs for core in cores} == {0}
        assert [(o.index, o.token_ids[0] - a) for o in output.outputs] == [(0, 1), (1, 3)]
        assert [o.cumulative_logprob for o in output.outputs] == [-0.5, -1.5]
        assert output.outputs[0].logprobs is None
        assert output.num_unused_tokens == 3

    def test_equally_likely_ones_keep_their_order(self, tok):
        a, _, output = self.run(tok, [[-1.0], [-1.0], [-1.0]], n=1, logprobs=0)
        assert [o.token_ids for o in output.outputs] == [[a]]
        assert len(output.outputs[0].logprobs) == 1

    def test_as_many_as_are_given_are_not_ranked(self, tok):
        params = SamplingParams(n=2, best_of=2, output_kind="delta")
        assert [core.logprobs for core in processor(tok).add("r", None, [5], params)] == [None, None]


class TestKinds:
    TEXT = "the quick brown 日本 🎉 fox"

    def test_delta(self, tok):
        ids = tok.encode(self.TEXT)
        shown, aborts = generate(processor(tok), ids, SamplingParams(output_kind="delta"))
        assert "".join(o.outputs[0].text for o in shown) == self.TEXT
        assert [token for o in shown for token in o.outputs[0].token_ids] == ids
        assert all(o.outputs[0].text for o in shown[:-1])  # no empty delta before the end
        assert [o.finished for o in shown] == [False] * (len(shown) - 1) + [True]
        assert len(shown) < len(ids)  # tokens inside a character wait for its last one
        assert aborts == []

    def test_cumulative(self, tok):
        ids = tok.encode(self.TEXT)
        shown, _ = generate(processor(tok), ids, SamplingParams(output_kind="cumulative"))
        assert [o.outputs[0].token_ids for o in shown] == [ids[: i + 1] for i in range(len(ids))]
        texts = [o.outputs[0].text for o in shown]
        assert all(b.startswith(a) for a, b in pairwise(texts))
        assert texts[-1] == self.TEXT

    def test_final(self, tok):
        ids = tok.encode(self.TEXT)
        proc = processor(tok)
        [output], _ = generate(proc, ids, SamplingParams(output_kind="final", n=3))
        assert [(o.index, o.text, o.token_ids) for o in output.outputs] == [
            (i, self.TEXT, ids) for i in range(3)
        ]
        assert (output.request_id, output.prompt, output.prompt_token_ids) == ("r", "p", [5, 6])
        assert output.finished
        assert not proc.has_unfinished()

    def test_not_detokenized(self, tok):
        params = SamplingParams(output_kind="delta", detokenize=False)
        shown, _ = generate(processor(tok), [7, 8, 9], params)
        assert [(o.outputs[0].text, o.outputs[0].token_ids) for o in shown] == [("", [i]) for i in (7, 8, 9)]

    def test_sequences_of_one_request_end_apart(self, tok):
        proc = processor(tok)
        a, b = proc.add("r", None, [5], SamplingParams(n=2, output_kind="delta"))
        x, y = tok.encode("x")[0], tok.encode("y")[0]
        [first], _ = proc.process(
            [CoreOutput(id=a.id, token_ids=[x], finish_reason="length"), CoreOutput(id=b.id, token_ids=[y])]
        )
        assert [(o.index, o.text, o.finish_reason) for o in first.outputs] == [
            (0, "x", "length"),
            (1, "y", None),
        ]
        assert not first.finished
        [second], _ = proc.process([CoreOutput(id=b.id, token_ids=[x], finish_reason="length")])
        assert [(o.index, o.text) for o in second.outputs] == [(1, "x")]
        assert second.finished

    def test_one_output_per_request_and_call(self, tok):
        proc = processor(tok)
        cores = [core for name in "ab" for core in proc.add(name, None, [5], SamplingParams(n=2))]
        shown, _ = proc.process([CoreOutput(id=core.id, token_ids=[200]) for core in cores])
        assert [output.request_id for output in shown] == ["a", "b"]
        assert [len(output.outputs) for output in shown] == [2, 2]

    @given(data=st.data())
    def test_kinds_agree(self, tok, data):
        ids = data.draw(st.lists(st.integers(2, tok.vocab_size - 1), min_size=1, max_size=20))
        stop = data.draw(st.lists(st.text("abc the\ufffd", min_size=1, max_size=3), max_size=3))
        more = {"stop": stop, "include_stop_str_in_output": data.draw(st.booleans())}
        chunk = data.draw(st.integers(1, 4))
        delta, _ = generate(processor(tok), ids, SamplingParams(output_kind="delta", **more), chunk=chunk)
        [final], _ = generate(processor(tok), ids, SamplingParams(output_kind="final", **more))
        whole = final.outputs[0]
        assert "".join(o.outputs[0].text for o in delta) == whole.text
        assert [token for o in delta for token in o.outputs[0].token_ids] == whole.token_ids
        last = delta[-1].outputs[0]
        assert (last.finish_reason, last.stop_reason) == (whole.finish_reason, whole.stop_reason)
        if whole.finish_reason == "length":
            assert whole.text == tok.decode(ids)


class TestStop:
    def test_a_stop_string_across_tokens(self, tok):
        ids = tok.encode("the quick brown fox jumps")
        proc = processor(tok)
        shown, aborts = generate(proc, ids, SamplingParams(output_kind="delta", stop=["k br"]))
        output = shown[-1].outputs[0]
        assert "".join(o.outputs[0].text for o in shown) == "the quic"
        assert (output.finish_reason, output.stop_reason) == ("stop", "k br")
        kept = [token for o in shown for token in o.outputs[0].token_ids]
        assert kept == ids[: len(kept)]
        assert "k br" in tok.decode(kept)
        assert "k br" not in tok.decode(kept[:-1])
        assert aborts == [Abort("r#0.0", keep=len(kept))]
        assert len(proc) == 0

    def test_nothing_ends_the_text_before_min_tokens(self, tok):
        ids = tok.encode("quick, quick and quick")
        one, two = len(tok.encode("quick")), len(tok.encode("quick, quick"))
        for least, text in ((0, ""), (one, "quick, "), (two, "quick, quick and ")):
            params = SamplingParams(output_kind="final", stop="quick", max_tokens=60, min_tokens=least)
            shown, _ = generate(processor(tok), ids, params)
            assert shown[-1].outputs[0].text == text

    @pytest.mark.parametrize("chunk", [1, 3, 100])
    def test_tokens_after_it_are_never_shown(self, tok, chunk):
        ids = tok.encode("the quick brown fox jumps")
        params = SamplingParams(
            output_kind="final", stop="quick", include_stop_str_in_output=True, logprobs=0
        )
        proc = processor(tok)
        [core] = proc.add("r", None, [5], params)
        shown = []
        for at in range(0, len(ids), chunk):
            part = ids[at : at + chunk]
            logprobs = [TokenLogprobs([token], [-1.0], 1) for token in part]
            shown += proc.process([CoreOutput(id=core.id, token_ids=part, logprobs=logprobs)])[0]
        [output] = shown
        result = output.outputs[0]
        assert result.text == "the quick"
        assert tok.decode(result.token_ids) == "the quick"
        assert len(result.logprobs) == len(result.token_ids) == -result.cumulative_logprob

    def test_when_the_core_ended_at_the_same_token_nothing_is_aborted(self, tok):
        ids = tok.encode("the quick")
        [output], aborts = generate(processor(tok), ids, SamplingParams(output_kind="final", stop="ick"))
        assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", "ick")
        assert aborts == []

    def test_what_was_held_back_is_shown_at_the_end(self, tok):
        ids = tok.encode("the qui")
        shown, _ = generate(processor(tok), ids, SamplingParams(output_kind="delta", stop="quick"))
        assert "".join(o.outputs[0].text for o in shown) == "the qui"

    def test_end_of_sequence(self, tok):
        ids = [*tok.encode("the"), EOS]
        [output], _ = generate(processor(tok), ids, SamplingParams(output_kind="final"), last="stop")
        result = output.outputs[0]
        assert (result.text, result.token_ids) == ("the", ids)
        assert (result.finish_reason, result.stop_reason) == ("stop", None)

    def test_a_text_that_is_complete_has_its_last_token(self, tok):
        proc, ids = processor(tok), tok.encode("the fox")
        (core,) = proc.add("r", "p", [5, 6], SamplingParams(output_kind="final"))
        [output], _ = proc.process([CoreOutput(id=core.id, token_ids=ids, finish_reason="stop")])
        assert output.outputs[0].text == "the fox" and output.outputs[0].stop_reason is None

    @pytest.mark.parametrize("include", [False, True])
    def test_stop_token(self, tok, include):
        ids = tok.encode("the fox")
        params = SamplingParams(
            output_kind="final", stop_token_ids=[ids[-1]], include_stop_str_in_output=include
        )
        [output], _ = generate(processor(tok), ids, params, last="stop")
        result = output.outputs[0]
        assert result.text == tok.decode(ids if include else ids[:-1])
        assert result.token_ids == ids
        assert (result.finish_reason, result.stop_reason) == ("stop", ids[-1])

    def test_an_ignored_end_of_sequence_may_be_a_stop_token(self, tok):
        params = SamplingParams(output_kind="final", ignore_eos=True, stop_token_ids=[EOS])
        [output], _ = generate(processor(tok), [200, EOS], params, last="stop")
        assert output.outputs[0].stop_reason == EOS


class TestLogprobs:
    def test_shape(self, tok):
        proc = processor(tok)
        [core] = proc.add("r", None, [5], SamplingParams(logprobs=2, output_kind="delta"))
        a, b, c = (tok.encode(char)[0] for char in "abc")
        step = TokenLogprobs([c, a, b], [-5.0, -0.5, -1.0], 9)
        [output], _ = proc.process([CoreOutput(id=core.id, token_ids=[c], logprobs=[step])])
        [entry] = output.outputs[0].logprobs
        assert [(i, p.logprob, p.rank, p.decoded_token) for i, p in entry.items()] == [
            (c, -5.0, 9, "c"),
            (a, -0.5, 1, "a"),
            (b, -1.0, 2, "b"),
        ]
        step = TokenLogprobs([a, a, b], [-0.5, -0.5, -1.0], 1)
        [output], _ = proc.process([CoreOutput(id=core.id, token_ids=[a], logprobs=[step])])
        assert [{i: p.rank for i, p in e.items()} for e in output.outputs[0].logprobs] == [{a: 1, b: 2}]
        assert output.outputs[0].cumulative_logprob == -5.5

    def test_not_asked_for(self, tok):
        [output], _ = generate(processor(tok), [200], SamplingParams(output_kind="final"))
        assert output.outputs[0].logprobs is None
        assert output.outputs[0].cumulative_logprob is None


class TestEnds:
    def test_abort(self, tok):
        proc = processor(tok)
        proc.add("r", None, [5], SamplingParams(n=3))
        proc.process([CoreOutput(id="r#0.1", token_ids=[200], finish_reason="length")])
        assert proc.abort("r") == [Abort("r#0.0"), Abort("r#0.2")]
        assert proc.abort("r") == []
        assert proc.process([CoreOutput(id="r#0.0", token_ids=[200])]) == ([], [])
        assert len(proc) == 0
        [again] = proc.add("r", None, [5], SamplingParams())  # the name is free again
        assert again.id not in ("r#0.0", "r#0.1", "r#0.2")  # but not for what is still on its way

    def test_an_error_fails_the_whole_request(self, tok):
        proc = processor(tok)
        proc.add("r", None, [5], SamplingParams(n=2, output_kind="delta"))
        failed = CoreOutput(id="r#0.0", finish_reason="error", error="out of luck")
        [output], aborts = proc.process([failed, CoreOutput(id="r#0.1", token_ids=[200])])
        assert output.error == "out of luck"
        assert output.finished
        assert [o.finish_reason for o in output.outputs] == ["error", "error"]
        assert aborts == [Abort("r#0.1")]
        assert len(proc) == 0

    @pytest.mark.parametrize("kind", ["delta", "cumulative", "final"])
    def test_fail_all(self, tok, kind):
        proc = processor(tok)
        for name in "ab":
            proc.add(name, None, [5], SamplingParams(output_kind=kind))
        outputs = proc.fail_all("the engine is gone")
        assert [(o.request_id, o.error, o.finished) for o in outputs] == [
            (name, "the engine is gone", True) for name in "ab"
        ]
        assert not proc.has_unfinished()
        assert proc.fail_all("again") == []

    def test_an_abort_by_the_core(self, tok):
        [output], _ = generate(processor(tok), [200], SamplingParams(output_kind="delta"), last="abort")
        assert output.outputs[0].finish_reason == "abort"
        assert output.finished


def test_a_prompt_that_is_too_long_is_refused_before_its_tokens_are_looked_at(tok):
    with pytest.raises(InvalidRequest, match="101 tokens") as refused:
        OutputProcessor(tok, [], max_model_len=100).add("r", None, [-1] * 101, SamplingParams())
    assert refused.value.code == "context_length_exceeded"
