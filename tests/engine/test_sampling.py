from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.engine.sampling import _quantile, filtered, sample, uniform
from jaxserve.pallas_kernels.sampling import cpu, gpu
from jaxserve.pallas_kernels.sampling.search import first_above
from jaxserve.sampling_params import MAX_LOGPROBS
from tests.engine.sampling_cases import HARD, OFF, hard_rows, misses, oracle, params

MIXES = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.3},
    {"temperature": 5.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10**9},
    {"top_p": 1e-9},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
    {"temperature": 1.8, "top_k": 50, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 0.6, "min_p": 0.05, "top_p": 0.99},
    {"temperature": 0.0, "top_k": 3, "top_p": 0.1, "min_p": 0.5},
]
sample_jit = jax.jit(sample, static_argnums=(3, 4))
filtered_jit = jax.jit(filtered)


def draw_with(implementation, logits, rows, variant="random", positions=None):
    positions = jnp.zeros(len(rows), jnp.int32) if positions is None else jnp.array(positions, jnp.int32)
    return sample_jit(jnp.asarray(logits, jnp.float32), params(rows), positions, variant, implementation)


@pytest.fixture(autouse=True, scope="module")
def interpreted():
    """The kernel for GPUs, played on the CPU, with tiles so small that some rows have more than is listed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "LANES", 512)
        patch.setattr(gpu, "sample", partial(gpu.sample, interpret=True))
        yield


CPP = pytest.param("cpu", marks=pytest.mark.compiler)
everywhere = pytest.mark.parametrize("draw", ["xla", "gpu", CPP], indirect=True)


@pytest.fixture(params=["xla", CPP])
def draw(request):
    return partial(draw_with, request.param)


def random_logits(rows: int, vocab: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (rows, vocab)).astype(np.float32)


@everywhere
@pytest.mark.parametrize("vocab", [1, 128, 1000])
def test_every_mix_of_filters_in_one_batch(draw, vocab):
    rows = [row for row in MIXES if row.get("temperature") != 0.0] * 4
    logits = random_logits(len(rows), vocab)
    got = np.asarray(filtered_jit(jnp.array(logits), params(rows)))
    for x, row, weights in zip(logits, rows, got, strict=True):
        # only what rounding could move over the edge may differ
        wide, narrow = oracle(x, row, 1e-5), oracle(x, row, -1e-5)
        assert np.all((narrow > 1e-30) <= (weights > 0)) and np.all((weights > 0) <= (wide > 0)), row
        np.testing.assert_allclose(weights[weights > 0], wide[weights > 0], rtol=1e-4)
    tokens = np.asarray(draw(logits, rows).tokens)
    wide = [oracle(x, row, 1e-5) for x, row in zip(logits, rows, strict=True)]
    assert np.all(np.array(wide)[np.arange(len(rows)), tokens] > 0)


def test_kept_tokens_are_those_of_transformers():
    warpers = pytest.importorskip("transformers.generation.logits_process")
    torch = pytest.importorskip("torch")
    rows = [{**OFF, **row} for row in MIXES if row.get("temperature") != 0.0] * 8
    logits = random_logits(len(rows), 500, seed=1)
    got = np.asarray(filtered_jit(jnp.array(logits), params(rows))) > 0
    for x, row, kept in zip(logits, rows, got, strict=True):
        chain = [warpers.TemperatureLogitsWarper(row["temperature"])]
        chain += [warpers.MinPLogitsWarper(row["min_p"])] if row["min_p"] else []
        chain += [warpers.TopKLogitsWarper(row["top_k"])] if row["top_k"] else []
        chain += [warpers.TopPLogitsWarper(row["top_p"])] if row["top_p"] < 1 else []
        scores = torch.from_numpy(x[None])
        for warper in chain:
            scores = warper(None, scores)
        assert np.array_equal(kept, np.isfinite(scores[0].numpy())), row


@everywhere
def test_greedy_takes_the_first_of_the_largest(draw):
    logits = np.zeros((4, 300), np.float32)
    logits[0, [7, 200]] = 1.0
    logits[1] = -5.0
    logits[2, 299] = 3e38
    logits[3, :] = -np.inf
    logits[3, 5] = -1e30
    expected = [7, 0, 299, 5]
    assert draw(logits, [{"temperature": 0.0}] * 4, "greedy").tokens.tolist() == expected
    assert draw(logits, [{"temperature": 0.0}] * 4, "random").tokens.tolist() == expected


def test_equal_logits_stay_together():
    logits = np.zeros((3, 6), np.float32)
    logits[:, 1:4] = 2.0
    logits[:, 5] = 3.0
    kept = filtered_jit(jnp.array(logits), params([{"top_k": 2}, {"top_p": 0.5}, {"min_p": np.exp(-1.0)}]))
    assert (np.asarray(kept) > 0).tolist() == [[False, True, True, True, False, True]] * 3


@everywhere
@pytest.mark.parametrize("row", [{}, {"top_k": 2}, {"top_p": 0.6}, {"min_p": 0.3}, {"temperature": 1e-38}])
def test_extreme_logits(draw, row):
    tiny = np.finfo(np.float32).min
    logits = np.array(
        [
            [-np.inf, 1.0, -np.inf, 1.0],
            [3e38, -3e38, tiny, 3e38],
            [1e-40, 0.0, -0.0, -1e-40],
            [-np.inf, -np.inf, -3e38, -np.inf],
        ],
        np.float32,
    )
    weights = np.asarray(filtered_jit(jnp.array(logits), params([row] * 4)))
    assert np.all(np.isfinite(weights)) and np.all(weights.max(axis=1) == 1.0)
    assert (weights[0] > 0).tolist() == [False, True, False, True]
    assert (weights[1] > 0).tolist() == [True, False, False, True]
    assert (weights[3] > 0).tolist() == [False, False, True, False]
    for seed in range(20):
        tokens = draw(logits, [{**row, "seed": seed}] * 4).tokens
        assert np.all(weights[np.arange(4), np.asarray(tokens)] > 0)


def test_a_temperature_near_zero_is_greedy(draw):
    logits = random_logits(64, 300)
    tokens = draw(logits, [{"temperature": 1e-6, "seed": i} for i in range(64)]).tokens
    assert tokens.tolist() == logits.argmax(axis=1).tolist()


@pytest.mark.parametrize(
    ("row", "vocab"),
    [
        ({}, 10),
        ({"temperature": 0.5}, 10),
        ({"temperature": 2.0, "top_k": 6}, 40),
        ({"top_p": 0.9, "min_p": 0.01}, 300),
    ],
)
def test_frequencies(draw, row, vocab):
    """Chi-square against the oracle's distribution, at a level of one in a million."""
    count = 20_000
    logits = np.random.default_rng(vocab).normal(0, 1.5, vocab).astype(np.float32)
    # one request's positions: what a long output would draw
    tokens = draw(
        np.broadcast_to(logits, (count, vocab)), [{**row, "seed": 5}] * count, positions=np.arange(count)
    ).tokens
    seen = np.bincount(np.asarray(tokens), minlength=vocab)
    weights = oracle(logits, row)
    assert np.all(seen[weights == 0] == 0)
    expected = weights[weights > 0] / weights.sum() * count
    # rare tokens together, as the test wants at least five expected in each cell
    order = np.argsort(expected)
    cells = np.maximum(np.cumsum(expected[order]) // 20, 0).astype(int)
    groups = np.unique(cells, return_inverse=True)[1]
    observed = np.bincount(groups, seen[weights > 0][order])
    wanted = np.bincount(groups, expected[order])
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    freedom = len(wanted) - 1
    # Wilson and Hilferty's approximation of the quantile; 4.75 is the normal's
    critical = freedom * (1 - 2 / (9 * freedom) + 4.75 * np.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < critical


@everywhere
def test_a_token_depends_on_its_own_row_alone(draw):
    vocab, row = 1000, {"temperature": 0.9, "top_p": 0.9, "top_k": 100, "seed": 2**63 + 11}
    logits = random_logits(1, vocab)
    alone = [draw(logits, [row], positions=[p]).tokens.item() for p in range(20)]
    others = random_logits(8, vocab, seed=9)
    for at in (0, 3, 7):
        rows = [{**MIXES[(i + at) % len(MIXES)], "seed": i} for i in range(8)]
        rows[at] = row
        others[at] = logits[0]
        mixed = [
            draw(others, rows, positions=np.arange(8) + 31 * p + (np.arange(8) == at) * (p - at - 31 * p))
            for p in range(20)
        ]
        assert [sampled.tokens[at].item() for sampled in mixed] == alone


def test_streams_differ_by_seed_index_and_position():
    seeds = [0, 1, 2**32, 2**32 + 1, 2**64 - 1]
    rows = [(seed, index, position) for seed in seeds for index in range(4) for position in range(50)]
    p = params([{"seed": seed, "sample_index": index} for seed, index, _ in rows])
    u = np.asarray(uniform(p.seed, p.sample_index, jnp.array([position for *_, position in rows])))
    assert np.all((u >= 0) & (u < 1)) and len(np.unique(u)) > len(rows) - 3
    assert abs(u.mean() - 0.5) < 0.03
    streams = u.reshape(-1, 50)
    correlation = np.corrcoef(streams) - np.eye(len(streams))
    assert np.abs(correlation).max() < 0.7


@pytest.mark.parametrize("implementation", ["xla", CPP])
def test_uniform_numbers_are_those_of_jax_random_to_the_bit(implementation):
    def of_jax(seed, index, position):
        key = jax.random.key(0, impl="threefry2x32")
        for word in (*seed, index, position):
            key = jax.random.fold_in(key, word)
        return jax.random.uniform(key)

    rng = np.random.default_rng(8)
    seed = jnp.asarray(rng.integers(0, 2**32, (500, 2), np.uint32)).at[0].set(0)
    index = jnp.asarray(rng.integers(0, 5, 500), jnp.int32)
    position = jnp.asarray(rng.integers(0, 2**31, 500), jnp.int32)
    ours = np.asarray(uniform(seed, index, position, implementation))
    assert ours.tobytes() == np.asarray(jax.jit(jax.vmap(of_jax))(seed, index, position)).tobytes()


@pytest.mark.compiler
@pytest.mark.parametrize("spread", [0.01, 3.0, 40.0])
def test_cpp_draws_what_xla_draws(spread):
    """From the same uniform numbers; but for those that rounding moves from one token to its neighbour."""
    rows = [{**row, "seed": i} for i, row in enumerate(MIXES * 8)]
    logits = np.random.default_rng(3).normal(0, spread, (len(rows), 49_000)).astype(np.float32)
    logits[::3, 7::5] = -np.inf
    ours, xla = (draw_with(each, logits, rows) for each in ("cpu", "xla"))
    assert np.mean(np.asarray(ours.tokens) == np.asarray(xla.tokens)) > 0.95
    assert np.all(np.isfinite(logits[np.arange(len(rows)), np.asarray(ours.tokens)]))


@everywhere
def test_answers_whatever_the_logits_are(draw):
    logits = np.zeros((4, 300), np.float32)
    logits[0], logits[1], logits[2, 7], logits[3, 5:9] = np.nan, -np.inf, np.inf, np.nan
    for row in MIXES:
        full = draw(logits, [row] * 4, "full")
        assert all(0 <= token < 300 for token in full.tokens.tolist())
        assert np.all((np.asarray(full.top_tokens) >= 0) & (np.asarray(full.top_tokens) < 300))


def test_variants_agree(draw):
    rows = [{**row, "seed": i} for i, row in enumerate(MIXES)]
    logits = random_logits(len(rows), 777)
    drawn = draw(logits, rows, "random")
    full = draw(logits, rows, "full")
    greedy = draw(logits, rows, "greedy")
    assert full.tokens.tolist() == drawn.tokens.tolist()
    assert drawn.logprobs is None and greedy.logprobs is None
    cold = [i for i, row in enumerate(MIXES) if row.get("temperature") == 0.0]
    assert drawn.tokens[np.array(cold)].tolist() == greedy.tokens[np.array(cold)].tolist()


@everywhere
def test_hard_rows_draw_what_the_oracle_has_at_their_quantile(draw):
    logits, rows = hard_rows(9000)
    p = params(rows)
    u = uniform(p.seed, p.sample_index, jnp.zeros(len(rows), jnp.int32))
    missed = misses(logits, rows, np.asarray(u), np.asarray(draw(logits, rows).tokens))
    wrong = np.flatnonzero(missed > 1e-4)
    assert not wrong.size, [(i // len(HARD), HARD[i % len(HARD)], missed[i]) for i in wrong]


@pytest.mark.parametrize("vocab", [1, 5, MAX_LOGPROBS, 1000])
def test_logprobs_are_the_models_own(draw, vocab):
    rows = [{**row, "seed": i} for i, row in enumerate(MIXES)]
    logits = random_logits(len(rows), vocab, seed=4)
    got = jax.tree.map(np.asarray, draw(logits, rows, "full"))
    x = logits.astype(np.float64)
    expected = x - x.max(axis=1, keepdims=True)
    expected -= np.log(np.exp(expected).sum(axis=1, keepdims=True))
    at = np.arange(len(rows))
    np.testing.assert_allclose(got.logprobs, expected[at, got.tokens], atol=1e-5)
    assert got.ranks.tolist() == [1 + (row > row[t]).sum() for row, t in zip(x, got.tokens, strict=True)]
    order = np.argsort(-x, axis=1, kind="stable")[:, :MAX_LOGPROBS]
    assert got.top_tokens.tolist() == order.tolist()
    np.testing.assert_allclose(got.top_logprobs, np.take_along_axis(expected, order, 1), atol=1e-5)


def test_of_equally_likely_tokens_the_first_are_told(draw):
    logits = np.random.default_rng(6).integers(-4, 4, (9, 5000)).astype(np.float32)
    logits[0], logits[1], logits[2, 40:] = 0.0, np.arange(5000), -np.inf
    logits[3] = np.arange(5000) // 128 % 2  # groups of equal ones, and more of them than are told
    top = draw(logits, [{"temperature": 0.0}] * 9, "full").top_tokens
    assert top.tolist() == np.argsort(-logits, axis=1, kind="stable")[:, :MAX_LOGPROBS].tolist()


def test_a_quantile_at_the_very_end_stays_among_the_kept():
    # the largest uniform number, a total that rounds, and many filtered tokens after the last kept one
    weights = np.zeros((3, 1000), np.float32)
    weights[0, :700] = np.random.default_rng(0).random(700)
    weights[1, 3] = 1.0
    weights[2, [0, 130]] = 1.0, 1e-12
    u = jnp.full(3, np.float32(1 - 2**-24))
    index = jax.jit(_quantile)(jnp.array(weights), u)
    assert index.tolist()[1:] == [3, 0] and weights[0, index[0]] > 0
    assert jax.jit(_quantile)(jnp.array(weights), jnp.ones(3))[1] == 3


@pytest.mark.compiler
def test_cpp_stays_among_the_kept_at_the_very_end():
    logits = random_logits(3, 1000)
    logits[0, 700:], logits[1, :], logits[1, 3] = -np.inf, -np.inf, 0.0
    p = params([{}, {}, {"top_k": 2}])
    last = jnp.full(3, np.float32(1 - 2**-24))
    tokens = cpu.sample(jnp.asarray(logits), p.temperature, p.top_p, p.min_p, p.top_k, last).tolist()
    assert tokens[0] < 700 and tokens[1] == 3 and tokens[2] in np.argsort(logits[2])[-2:]


@pytest.mark.compiler
def test_logprobs_of_fewer_tokens_than_are_told():
    logits = np.full((1, 300), -np.inf, np.float32)
    logits[0, [7, 0, 250]] = 3.0, 1.0, 2.0
    ours, xla = (draw_with(each, logits, [{"temperature": 0.0}], "full") for each in ("cpu", "xla"))
    assert ours.top_tokens.tolist() == xla.top_tokens.tolist()
    np.testing.assert_allclose(ours.top_logprobs, xla.top_logprobs, atol=1e-5)


@pytest.mark.compiler
def test_one_logit_far_below_changes_nothing():
    logits = random_logits(64, 5000)
    logits[:, 4999] = -60.0
    rows = [{"top_p": 0.8, "seed": i} for i in range(64)]
    before = draw_with("cpu", logits, rows).tokens.tolist()
    logits[:, 4999] = -1e9
    assert draw_with("cpu", logits, rows).tokens.tolist() == before


@pytest.mark.parametrize(("goal", "index"), [(0.0, 1), (0.49, 1), (0.5, 3), (0.99, 3), (1.0, 3), (2.0, 3)])
def test_running_sums_that_do_not_rise_choose_no_token_without_weight(goal, index):
    weights = jnp.array([[0.0, 0.5, 0.0, 0.5, 0.0, 0.0]])
    sums = jnp.array([[1e-7, 0.5, 0.5000001, 1.0, 1.0000001, 1.0]])
    assert first_above(weights, sums, jnp.array([[goal]])).tolist() == [index]


def test_greedy_takes_the_first_of_the_largest_whatever_the_vocabulary(draw):
    for vocab in (1, 5, 127, 128, 129, 1000, 1024):
        logits = np.random.default_rng(vocab).integers(-3, 3, (40, vocab)).astype(np.float32)
        logits[0] = -np.inf
        assert np.array_equal(draw(logits, [{}] * 40, "greedy").tokens, logits.argmax(axis=1))


@pytest.mark.parametrize(("variant", "most"), [("greedy", 0.1), ("random", 2.5), ("full", 2.5)])
@pytest.mark.parametrize("implementation", ["xla", CPP])
def test_temporaries_of_the_vocabularys_size(implementation, variant, most):
    """Beside the logits: none to be greedy; the weights, and which of them are kept, to draw."""
    rows, vocab = 64, 4096
    logits = jnp.zeros((rows, vocab))
    arguments = logits, params([{}] * rows), jnp.zeros(rows, jnp.int32)
    compiled = sample_jit.lower(*arguments, variant, implementation).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < most * logits.nbytes
