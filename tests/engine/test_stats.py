from jaxserve import SamplingParams
from jaxserve.engine.stats import Histogram, StepStats, add_up


def test_numbers_add_up_and_flags_need_every_replica():
    one = {"running": 2, "block_size": 16, "warm": False}
    two = {"running": 3, "block_size": 16, "warm": True}
    assert add_up([one, two]) == {"running": 5, "block_size": 16, "warm": False}
    assert add_up([two]) == two and add_up([]) == {}


def test_what_one_replica_alone_counted_is_kept():
    one = {"program_steps": {"decode[1]": 2, "mixed[64]": 1}}
    two = {"program_steps": {"decode[2]": 3, "mixed[64]": 4}}
    assert add_up([one, two]) == {"program_steps": {"decode[1]": 2, "decode[2]": 3, "mixed[64]": 5}}
    assert one["program_steps"]["mixed[64]"] == 1


def test_a_histogram_counts_up_to_each_bound():
    histogram = Histogram((1, 2.5, 10))
    histogram.observe(1)
    histogram.observe(1.5, times=3)
    histogram.observe(11)
    assert histogram.values() == {"1.0": 1, "2.5": 4, "10.0": 4, "+Inf": 5, "sum": 16.5}


def test_a_step_takes_from_the_end_of_the_one_before_it_or_from_its_dispatch():
    stats = StepStats()
    stats.finished("decode[1]", 1, dispatched=10.0, now=12.0)
    stats.finished("decode[1]", 1, dispatched=11.0, now=13.0)  # it waited for the first
    stats.finished("mixed[64]", 40, dispatched=20.0, now=20.5)
    values = stats.values()
    assert values["step_seconds"]["sum"] == 2 + 1 + 0.5
    assert values["program_steps"] == {"decode[1]": 2, "mixed[64]": 1}
    assert values["step_tokens"]["sum"] == 42 and values["step_tokens"]["1.0"] == 2


def test_a_device_is_idle_from_when_it_was_found_so_until_the_next_dispatch_while_there_is_work():
    stats = StepStats()
    stats.idle(1.0)
    stats.idle(2.0)  # found again
    stats.dispatched(4.0)
    stats.dispatched(5.0)  # it was busy
    stats.idle(6.0)
    stats.idle(None)  # the work went away
    stats.dispatched(9.0)
    assert stats.values()["device_idle_seconds"] == 3.0


def test_who_has_to_wait_is_scheduled_after_the_one_before_it_has_ended(make_engine):
    engine = make_engine(max_num_seqs=1)
    before = engine.stats()
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    first, second = engine.generate([[7, 8, 9], [10, 11]], params)
    for output in (first, second):
        times = output.metrics
        assert times is output.outputs[0].metrics and times.num_generation_tokens == 8
        assert 0 < times.queued_ts <= times.scheduled_ts < times.first_token_ts < times.last_token_ts
    assert second.metrics.queued_ts < first.metrics.first_token_ts
    assert second.metrics.scheduled_ts >= first.metrics.last_token_ts
    after = engine.stats()
    assert after["inter_token_seconds"]["+Inf"] - before["inter_token_seconds"]["+Inf"] == 2 * 7
    assert after["step_tokens"]["sum"] - before["step_tokens"]["sum"] == 3 + 2 + 2 * 7
    steps = after["steps"] - before["steps"]
    assert steps == sum(after["program_steps"].values()) - sum(before["program_steps"].values())
    assert after["device_idle_seconds"] > before["device_idle_seconds"]  # nothing can overlap the last token


def test_whoever_asks_gets_every_step():
    stats = StepStats()
    stats.finished("decode[1]", 1, dispatched=1.0, now=2.0)
    steps = []
    stats.record = steps.append
    stats.finished("decode[4]", 3, dispatched=1.5, now=3.0)
    assert steps == [("decode[4]", 3, 2.0, 3.0)]


def test_the_steps_of_an_engine_can_be_recorded(make_engine):
    engine = make_engine()
    steps = []
    engine.record_steps(steps.append)
    engine.generate([[7, 8, 9]], SamplingParams(max_tokens=4, ignore_eos=True), use_progress=False)
    assert [step.tokens for step in steps[:4]] == [3, 1, 1, 1]
    assert all(step.began < step.ended for step in steps)
