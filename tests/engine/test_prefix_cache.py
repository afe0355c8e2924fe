"""The prefix cache: chains of blocks, and what an engine with one answers."""

import pytest

from jaxserve import Engine, SamplingParams
from jaxserve.engine.prefix_cache import PrefixCache

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
OPTIONS = {"dtype": "float32", "max_num_seqs": 8, "max_num_batched_tokens": 64, "block_size": 8}


def commit(cache: PrefixCache, salt: str, blocks: dict[int, list[int]]) -> None:
    node = salt
    for block, tokens in blocks.items():
        node = cache.commit(node, tokens, block)


def test_a_chain_is_found_as_far_as_it_is_the_same():
    cache = PrefixCache()
    commit(cache, "", {5: [1, 2], 6: [3, 4], 7: [5, 6]})
    assert cache.match("", [1, 2, 3, 4, 5, 6, 7], 2)[0] == [5, 6, 7]
    assert cache.match("", [1, 2, 3, 4, 5], 2)[0] == [5, 6]
    assert cache.match("", [1, 2, 9, 9, 5, 6], 2)[0] == [5]
    assert cache.match("", [3, 4], 2)[0] == []
    assert cache.match("salt", [1, 2, 3, 4], 2)[0] == []


def test_the_first_of_two_equal_blocks_is_found_and_chains_go_on_from_it():
    cache = PrefixCache()
    commit(cache, "", {5: [1, 2], 6: [3, 4]})
    commit(cache, "", {8: [1, 2], 9: [7, 8]})
    assert 8 not in cache and cache.match("", [1, 2, 7, 8], 2)[0] == [5, 9]


def test_what_comes_after_a_forgotten_block_is_not_found_even_when_it_comes_back():
    cache = PrefixCache()
    commit(cache, "", {5: [1, 2], 6: [3, 4]})
    cache.forget(5)
    assert cache.match("", [1, 2, 3, 4], 2)[0] == []
    commit(cache, "", {9: [1, 2]})
    assert cache.match("", [1, 2, 3, 4], 2)[0] == [9]
    cache.forget(6)
    assert 6 not in cache


@pytest.fixture(scope="module")
def model(make_llama):
    return make_llama("prefix")


@pytest.fixture(scope="module")
def engine(model):
    with Engine(str(model), **OPTIONS) as engine:
        yield engine


def ids(outputs):
    return [[sequence.token_ids for sequence in output.outputs] for output in outputs]


PROMPTS = [[7, *range(10, 40), i, 3, i] for i in range(5, 9)]


def test_tokens_are_those_of_an_engine_without_it(engine, model):
    with Engine(str(model), **OPTIONS, enable_prefix_caching=False) as plain:
        wanted = ids(plain.generate(PROMPTS, GREEDY))
        assert plain.stats()["prefix_cache_hits"] == 0
        assert all(output.num_cached_tokens == 0 for output in plain.generate(PROMPTS, GREEDY))
    engine.reset_prefix_cache()
    assert ids(engine.generate(PROMPTS, GREEDY)) == wanted
    again = engine.generate(PROMPTS, GREEDY)
    assert ids(again) == wanted
    assert [output.num_cached_tokens for output in again] == [32] * len(PROMPTS)


def test_the_next_turn_reuses_the_answer(engine, model):
    [first] = engine.generate([PROMPTS[0]], GREEDY)
    turn = PROMPTS[0] + first.outputs[0].token_ids + [4, 4, 4]
    [second] = engine.generate([turn], GREEDY)
    # 34 tokens asked, 12 answered; the last of them was never fed back
    assert second.num_cached_tokens == 40
    engine.reset_prefix_cache()
    [fresh] = engine.generate([turn], GREEDY)
    assert fresh.num_cached_tokens == 0 and ids([fresh]) == ids([second])


def test_a_list_that_its_caller_changes_is_no_prompt_of_others(engine):
    engine.reset_prefix_cache()
    mine = [13] * 9
    for output in engine.stream(mine, GREEDY):
        mine += output.outputs[0].token_ids
        mine[3] = 5
    [other] = engine.generate([[13] * 3 + [5] + [13] * 20], GREEDY)
    assert other.num_cached_tokens == 0


def test_salts_keep_prompts_apart(engine):
    def cached(salt: str) -> int:
        prompt = {"prompt_token_ids": [9] * 20, "cache_salt": salt}
        return engine.generate([prompt], GREEDY)[0].num_cached_tokens

    assert [cached(salt) for salt in ("a", "a", "b", "", "a")] == [0, 16, 0, 0, 16]


def test_sequences_of_one_prompt_share_it(engine):
    engine.reset_prefix_cache()
    before = engine.stats()
    [output] = engine.generate([[11] * 33], SamplingParams(n=4, temperature=1.0, seed=5, max_tokens=3))
    after = engine.stats()
    assert after["prefix_cache_hits"] - before["prefix_cache_hits"] == 3 * 32
    assert output.num_cached_tokens == 0


def test_a_hundred_prompts_share_a_long_beginning(make_llama):
    """Their own tokens are computed, and those that they share once."""
    model = make_llama("long-context", max_position_embeddings=2048)
    system = [6 + i * i % 250 for i in range(1000)]
    prompts = [[*system, *(6 + (i * k) % 250 for k in range(1, 25))] for i in range(1, 101)]
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    answers, computed = [], []
    for caching in (False, True):
        options = {"dtype": "float32", "max_num_seqs": 8, "num_blocks": 400}
        with Engine(str(model), enable_prefix_caching=caching, **options) as engine:
            answers.append(ids(engine.generate(prompts, params)))
            stats = engine.stats()
            computed.append(stats["prompt_tokens"] - stats["prefix_cache_hits"])
    assert answers[0] == answers[1]
    assert computed[0] == 100 * 1024 and computed[1] < computed[0] / 10
