"""Prompts, lengths and arrivals: what was asked for, and the same for the same seed."""

import itertools
import json
import statistics

import pytest

from jaxserve.bench.workload import WORDS, Workload, arrivals, estimate_tokens, read_dataset, token_ids, words
from jaxserve.errors import ConfigError


def asks(count, seed=0, speak=words, **options):
    return list(itertools.islice(Workload(**options).asks(seed, speak, estimate_tokens), count))


def test_a_seed_draws_the_same_again_and_another_something_else():
    assert asks(5, seed=3) == asks(5, seed=3)
    assert not {ask.prompt for ask in asks(5, seed=3)} & {ask.prompt for ask in asks(5, seed=4)}


def test_fixed_lengths():
    for ask in asks(20, input_len=30, output_len=7):
        assert (ask.tokens, len(ask.prompt.split()), ask.output_tokens) == (30, 30, 7)


def test_uniform_lengths_stay_in_their_range_and_fill_it():
    drawn = asks(2000, input_len=100, output_len=10, range_ratio=0.5)
    lengths = [ask.tokens for ask in drawn]
    assert (min(lengths), max(lengths)) == (50, 150)
    assert statistics.mean(lengths) == pytest.approx(100, rel=0.03)
    assert {ask.output_tokens for ask in drawn} == set(range(5, 16))


def test_sharegpt_like_lengths_have_their_means_and_long_tails():
    drawn = asks(4000, dataset_name="sharegpt-like", speak=lambda rng, tokens: "")
    lengths = [ask.tokens for ask in drawn]
    outputs = [ask.output_tokens for ask in drawn]
    # cutting the tail off at 1,024 and 2,048 tokens takes a little from the means
    assert statistics.mean(lengths) == pytest.approx(161, rel=0.1)
    assert statistics.mean(outputs) == pytest.approx(338, rel=0.1)
    assert statistics.median(lengths) < 0.7 * statistics.mean(lengths)
    assert min(lengths) >= 4 and max(lengths) == 1024
    assert all(ask.tokens + ask.output_tokens <= 2048 for ask in drawn)


def test_prompts_share_their_beginnings():
    drawn = asks(60, input_len=3, prefix_len=5, num_prefixes=2)
    assert {ask.tokens for ask in drawn} == {8}
    assert len({tuple(ask.prompt.split()[:5]) for ask in drawn}) == 2
    assert len({ask.prompt for ask in drawn}) == 60


def test_token_ids():
    drawn = asks(50, speak=token_ids(40), input_len=20, prefix_len=2)
    ids = [token for ask in drawn for token in ask.prompt]
    assert set(ids) == set(range(40)) and len(ids) == 50 * 22


def test_each_word_is_one_token_of_the_default_model(default_model):
    from jaxserve.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(default_model)
    assert len(set(WORDS)) == len(WORDS)
    (ask,) = asks(1, input_len=500)
    assert len(tokenizer.encode(ask.prompt)) == 500
    assert all(len(tokenizer.encode(f" {word}")) == 1 for word in WORDS)


@pytest.mark.parametrize(("burstiness", "spread"), [(1.0, 1.0), (0.25, 2.0), (4.0, 0.5)])
def test_arrivals_have_their_rate_and_burstiness(burstiness, spread):
    """The deviation of a gamma distribution's values is its mean over the root of its shape."""
    due = list(itertools.islice(arrivals(rate=5.0, burstiness=burstiness, seed=1), 20_000))
    gaps = [later - earlier for earlier, later in itertools.pairwise(due)]
    assert statistics.mean(gaps) == pytest.approx(1 / 5, rel=0.05)
    assert statistics.pstdev(gaps) == pytest.approx(spread / 5, rel=0.05)
    assert due == list(itertools.islice(arrivals(5.0, burstiness, seed=1), 20_000))


def test_sharegpts_json(tmp_path):
    conversation = {
        "conversations": [{"from": "human", "value": "a" * 40}, {"from": "gpt", "value": "b" * 80}]
    }
    alone = {"conversations": [{"from": "human", "value": "nobody answered"}]}
    file = tmp_path / "sharegpt.json"
    file.write_text(json.dumps([conversation, alone]))
    (first, again) = asks(2, dataset_path=str(file))
    assert first == again == ("a" * 40, 10, 20)


def test_json_lines(tmp_path):
    file = tmp_path / "mine.jsonl"
    rows = [
        {"prompt": "x" * 20, "output_tokens": 9},
        {"messages": [{"content": "y" * 24}, {"content": "z" * 28}]},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert {(ask.tokens, ask.output_tokens) for ask in asks(9, dataset_path=str(file))} == {(5, 9), (6, 7)}
    assert {ask.output_tokens for ask in asks(9, dataset_path=str(file), output_len=50)} == {50}


def test_too_long_and_too_short_ones_are_left_out(tmp_path):
    file = tmp_path / "mine.jsonl"
    texts = ["x" * 8, "y" * 5000, "z" * 400]
    file.write_text("\n".join(json.dumps({"prompt": text, "output_tokens": 5}) for text in texts))
    assert {ask.prompt[0] for ask in asks(9, dataset_path=str(file))} == {"z"}
    file.write_text(json.dumps({"prompt": "x"}))
    with pytest.raises(ConfigError, match="has no prompt of 4 to 1024 tokens"):
        asks(1, dataset_path=str(file))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"prompt": 5}', r"Expected `str \| null`, got `int`"),
        ('{"prompt": "a", "output_tokens": "many"}', r"got `str` - at `\$\.output_tokens`"),
        ('{"prompt": "a", "output_tokens": 9.5}', r"got `float` - at `\$\.output_tokens`"),
        ('{"prompt": "a", "output_tokens": 0}', r">= 1 - at `\$\.output_tokens`"),
        ('{"messages": [{"content": "a"}, 3]}', r"at `\$\.messages"),
        ('{"text": "a"}', "it has no prompt"),
        ("{", "truncated"),
    ],
)
def test_the_line_that_is_wrong_is_named(tmp_path, row, said):
    file = tmp_path / "wrong.jsonl"
    file.write_text(f'{{"prompt": "right", "output_tokens": 9}}\n{row}\n')
    with pytest.raises(ConfigError, match=rf"wrong\.jsonl, line 2, is neither .*{said}"):
        read_dataset(str(file))
    if row.endswith("}"):
        file.write_text(f'[{{"prompt": "right"}}, {row}]')
        with pytest.raises(ConfigError, match=rf"wrong\.jsonl, entry 2, is neither .*{said}"):
            read_dataset(str(file))


@pytest.mark.parametrize("content", ["[]", "", "{", '[{"text": "no prompt"}]', "[1]", "\xff"])
def test_what_is_no_dataset(tmp_path, content):
    file = tmp_path / "wrong.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"wrong\.json.* (is neither|has no prompts)"):
        read_dataset(str(file))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dataset_name": "sharegpt-like", "range_ratio": 0.5}, "range_ratio is for random prompts"),
        ({"dataset_path": "x", "input_len": 5}, "dataset_path brings its prompts"),
        ({"num_prefixes": 2}, "num_prefixes needs a prefix_len"),
        ({"prefix_len": -1}, "prefix_len must not be negative"),
    ],
)
def test_options_that_mean_nothing_together_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        Workload(**options)
