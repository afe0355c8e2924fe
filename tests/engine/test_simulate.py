"""The simulator: the scheduler keeps its promises over random traffic, and one that does not is found."""

import json
import shlex
import subprocess
import sys

import pytest

from jaxserve.engine.blocks import BlockPool
from jaxserve.engine.scheduler import Limits, Policy, Scheduler
from jaxserve.engine.simulate import COMMAND, main
from jaxserve.engine.simulation.cost import DEVICES, Cost
from jaxserve.engine.simulation.fuzz import broken, scenario
from jaxserve.engine.simulation.run import Setup, Simulation
from jaxserve.engine.simulation.traffic import Arrival, Traffic
from jaxserve.engine.waiting import WaitingQueue


def test_thousands_of_random_engines_keep_every_promise():
    preemptions = hits = 0
    outcomes = set()
    for seed in range(2000):
        setup, requests = scenario(seed)
        simulation = Simulation(setup, requests)
        simulation.run()
        preemptions += simulation.scheduler.preemptions
        hits += simulation.pool.cache.hits
        outcomes |= {visit.outcome for visit in simulation.visits}
    # the traffic really went to where it hurts
    assert preemptions > 1500 and hits > 1500, (preemptions, hits)
    assert outcomes == {"stop", "length", "abort", "queue_full", "too_long"}


def missed_decrement(monkeypatch):
    release = BlockPool.release
    monkeypatch.setattr(
        BlockPool,
        "release",
        lambda pool, blocks: release(pool, [b for b in blocks if pool.references(b) < 2]),
    )


def lost_wakeup(monkeypatch):
    """Who did not fit is never tried again."""
    take = Scheduler._take_cached
    refused = set()

    def once(scheduler, request, room):
        if request in refused or not take(scheduler, request, room):
            refused.add(request)
            return False
        return True

    monkeypatch.setattr(Scheduler, "_take_cached", once)


def wrong_tenant(monkeypatch):
    """Whoever is next pays."""
    charge = WaitingQueue.charge
    monkeypatch.setattr(
        WaitingQueue, "charge", lambda line, request, tokens: charge(line, line.first() or request, tokens)
    )


def overtaking(monkeypatch):
    """A line lets its shortest go first."""
    first = WaitingQueue.first

    def shortest(waiting):
        if (head := first(waiting)) is None:
            return None
        return min((r for r in waiting if waiting.compete(r, head)), key=lambda r: (r.length, r.rank))

    monkeypatch.setattr(WaitingQueue, "first", shortest)


def oldest_preempted(monkeypatch):
    def make_room(scheduler, lengths):
        needed = sum(scheduler._new_blocks(request, length) for request, length in lengths.items())
        while needed > scheduler.pool.free:
            victim = scheduler.running[0]
            needed -= scheduler._new_blocks(victim, lengths.pop(victim, 0))
            scheduler.preempt(victim)

    monkeypatch.setattr(Scheduler, "_make_room", make_room)


def forgotten_queue_limit(monkeypatch):
    add = Scheduler.add

    def unlimited(scheduler, spec, now):
        policy, scheduler.policy = scheduler.policy, scheduler.policy._replace(max_queued=None)
        try:
            return add(scheduler, spec, now)
        finally:
            scheduler.policy = policy

    monkeypatch.setattr(Scheduler, "add", unlimited)


BUGS = {
    missed_decrement: ("leaked block", 3),
    lost_wakeup: ("lost wake-up", 3),
    wrong_tenant: ("fair share", 12),
    overtaking: ("order", 3),
    oldest_preempted: ("preemption", 3),
    forgotten_queue_limit: ("queue limit", 8),
}
"""The promise that each breaks, and how many requests it takes at most to see it."""


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found_shrunk_and_replayed(bug, monkeypatch, capsys):
    rule, most = BUGS[bug]
    with monkeypatch.context() as planted:
        bug(planted)
        assert main(["--fuzz", "1000"]) == 1
        violated, count, command = capsys.readouterr().out.splitlines()
        assert violated.startswith(f"violated: {rule}")
        assert int(count.split()[1]) <= most
    arguments = shlex.split(command.removeprefix(f"  {COMMAND}"))
    assert main(arguments) == 0  # the bug is what is seen, not the traffic
    with monkeypatch.context() as planted:
        bug(planted)
        capsys.readouterr()
        assert main(arguments) == 1
        assert capsys.readouterr().out.splitlines()[0] == violated


LONE = Setup(100, 4, Limits(4, 16), Policy(), Cost(1.0, 0.1, 0.5, 0.001, 0.01), True)


def visits(setup: Setup, *arrivals: Arrival):
    simulation = Simulation(setup, list(enumerate(arrivals)))
    simulation.run()
    return simulation.visits, simulation.meters


def test_the_clock_is_the_cost_of_the_steps():
    (visit,), meters = visits(LONE, Arrival(arrival=2.0, prompt=3, output=3))
    first = 1.0 + 3 * 0.5 + 6 * 0.01
    second, third = 1.1 + 0.004, 1.1 + 0.005
    assert visit.started == 2.0
    assert visit.first == pytest.approx(2.0 + first)
    assert visit.ended == pytest.approx(2.0 + first + second + third)
    assert list(meters.gaps) == pytest.approx([second, third])
    assert meters.busy == pytest.approx(first + second + third) and meters.steps == 3


def test_a_request_that_ends_by_itself_has_one_step_more_in_flight():
    limit, stop = Arrival(arrival=0, prompt=3, output=3), Arrival(arrival=0, prompt=3, output=3, max_tokens=9)
    (by_limit,), three = visits(LONE, limit)
    (by_itself,), four = visits(LONE, stop)
    assert (by_limit.outcome, by_itself.outcome) == ("length", "stop")
    assert by_limit.ended == by_itself.ended and (three.steps, four.steps) == (3, 4)


def test_what_comes_during_a_step_is_seen_after_it():
    first, late = Arrival(arrival=0, prompt=3, output=8), Arrival(arrival=0.5, prompt=3, output=1)
    (one, two), _ = visits(LONE, first, late)
    assert two.started == one.first == pytest.approx(1.0 + 3 * 0.5 + 6 * 0.01)


def test_a_client_that_goes_away_leaves_room():
    setup = LONE._replace(limits=Limits(1, 16))
    gone = Arrival(arrival=0, prompt=3, output=300, abort=5.0)
    (one, two), _ = visits(setup, gone, Arrival(arrival=1.0, prompt=3, output=1))
    assert (one.outcome, two.outcome) == ("abort", "length")
    assert one.ended == two.started and 5.0 <= one.ended < 7.0


def test_a_shared_beginning_is_found():
    alike = Arrival(arrival=0, prompt=20, output=1, prefix="system", prefix_tokens=16)
    other = Arrival(arrival=0, prompt=20, output=1, prefix="another", prefix_tokens=16)
    simulation = Simulation(LONE._replace(limits=Limits(4, 99)), list(enumerate([alike, other, alike])))
    simulation.run()
    assert simulation.pool.cache.hits == 16


def test_the_processor_is_as_fast_as_it_was_measured():
    """Output tokens per second of docs/performance.md, which the costs were fitted to."""
    device = DEVICES["cpu"]
    limits = Limits(device.max_num_seqs, device.max_num_batched_tokens)
    setup = Setup(device.num_blocks, device.block_size, limits, Policy(), device.cost)
    for sequences, measured in ((1, 54.3), (8, 178.2), (32, 223.8)):
        same = [Arrival(arrival=0, prompt=128, output=128)] * sequences
        seen, _ = visits(setup, *same)
        assert sequences * 128 / max(visit.ended for visit in seen) == pytest.approx(measured, rel=0.1)


def test_traffic_is_what_was_asked_for():
    traffic = Traffic(duration=86_400.0, rate=0.2, daily=0.8, tenants=3, priorities=2, long_share=0.0)
    requests = list(traffic.draw())
    assert requests == list(traffic.draw()) != list(Traffic(seed=1).draw())
    assert len(requests) == pytest.approx(86_400 * 0.2, rel=0.03)
    by_hour = [sum(int(r.arrival // 3600) == hour for r in requests) for hour in range(24)]
    assert sum(by_hour[12:18]) > 3 * sum(by_hour[0:6])
    assert sorted(r.output for r in requests)[len(requests) // 2] == pytest.approx(40, rel=0.05)
    tenants = [r.tenant for r in requests]
    assert tenants.count("tenant-0") == pytest.approx(2 * tenants.count("tenant-1"), rel=0.1)


def test_a_small_day(capsys):
    day = ["--rate", "0.01", "--duration", "86400", "--daily", "0.5", "--tenants", "2", "--priorities", "2"]
    assert main([*day, "--duration", "3600", "--scheduling-policy", "priority"]) == 0
    told = capsys.readouterr().out
    assert "tenant-1" in told and "priorities" in told and "preemptions" in told
    assert main([*day, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert sum(result["requests"].values()) == sum(g["requests"] for g in result["tenants"].values()) > 700
    assert 0.0 < result["device"]["busy"] < 0.1
    first = result["times"]["first_token"]
    assert 0.0 <= result["times"]["queued"]["p99"] < first["p99"] <= first["max"]
    assert 0.0 < first["p50"] < first["p99"]


def test_a_trace(tmp_path, capsys):
    trace = tmp_path / "trace.jsonl"
    late = {"arrival": 3, "prompt": 5000, "output": 2, "tenant": "a", "priority": 1, "abort": 4}
    trace.write_text(json.dumps(late) + '\n{"arrival": 1.5, "prompt": 10, "output": 4, "tenant": "b"}\n')
    assert main(["--trace", str(trace), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["requests"] == {"finished": 1, "aborted": 1, "refused": 0, "too long": 0}
    assert main(["--trace", str(trace), "--requests", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["requests"]["aborted"] == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--rate", "0"], "rate must be above 0"),
        (["--stop-share", "2"], "stop_share must be from 0 to 1"),
        (["--max-prompt-share", "7"], "max_prompt_share must be above 0"),
        (["--requests", "1,x"], "requests must be numbers"),
        (["--cost-row", "-1"], "cost"),
        (["--audit-every", "0"], "audit_every must be at least 1"),
        (["--trace", "TRACE"], "line 2: prompt and output must be at least 1"),
        (["--trace", "nowhere"], "cannot read the trace"),
        (["--mesh", "2"], "unknown argument --mesh"),
    ],
)
def test_bad_input_is_named(arguments, told, tmp_path, capsys):
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"arrival": 1, "prompt": 1, "output": 1}\n{"arrival": 1, "prompt": 0, "output": 1}\n')
    with pytest.raises(SystemExit) as ended:
        main([str(trace) if argument == "TRACE" else argument for argument in arguments])
    assert ended.value.code == 2 and told in capsys.readouterr().err


def test_a_violation_of_a_long_run_is_replayed_from_its_command(monkeypatch, capsys):
    with monkeypatch.context() as planted:
        lost_wakeup(planted)
        arguments = ["--duration", "600", "--max-num-seqs", "8", "--num-blocks", "12", "--long-share", "0"]
        assert main(arguments) == 1
        violated, count, command = capsys.readouterr().out.splitlines()
        assert violated.startswith("violated: lost wake-up") and int(count.split()[1]) <= 4
    with monkeypatch.context() as planted:
        lost_wakeup(planted)
        assert main(shlex.split(command.removeprefix(f"  {COMMAND}"))) == 1
        assert capsys.readouterr().out.splitlines()[0] == violated


def test_imports_no_jax():
    code = "import sys, jaxserve.engine.simulate\nprint([m for m in ('jax', 'torch') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_one_seed_is_one_scenario():
    assert scenario(7) == scenario(7) and broken(*scenario(7)) is None
