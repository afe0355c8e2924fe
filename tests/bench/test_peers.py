"""bench/peers without the peers: how ratios are made, and the comparison with fake ones."""

import json
import sys
import time
from pathlib import Path

import pytest

from bench.peers import __main__ as peers
from bench.peers import process, setup, worker
from bench.peers.catalogue import OURS, Peer, Shelf, catalogue
from bench.peers.process import InPython, PeerFailed, Work
from bench.peers.report import Results, markdown, summary

HERE = Path(__file__).parent


class Fake(Peer):
    note = "none of it is true"

    def __init__(self, name: str, shelf: Shelf, **options: float):
        super().__init__(name, shelf)
        self.python = Path(sys.executable)
        self._options = {"first": 0.5, "further": 0.1, "most": 10**6} | options

    def options(self, sequences: int) -> dict[str, object]:
        return self._options | {"sequences": sequences}


@pytest.fixture
def fake(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "WORKER", HERE / "fake_worker.py")
    return lambda name, **options: Fake(name, Shelf(tmp_path), **options)


def record(round, peer, metric, value, sequences=None):
    return {"round": round, "peer": peer, "metric": metric, "value": value, "sequences": sequences}


def test_ratios_are_made_round_by_round():
    results = Results(
        [
            record("a", OURS, "output", 100.0, 8),
            record("a", "vllm", "output", 50.0, 8),
            record("b", OURS, "output", 60.0, 8),
            record("b", "vllm", "output", 60.0, 8),
            record("c", OURS, "output", 90.0, 8),
            record("c", "vllm", "output", 60.0, 8),
            record("d", OURS, "output", 1000.0, 8),  # was interrupted: it has no pair
        ]
    )
    assert results.ratio("vllm", "output", 8) == (1.0, 1.5, 2.0)
    assert results.values("vllm", "output", 8) == (50.0, 60.0, 60.0)


def test_a_ratio_above_one_is_in_favour_of_jaxserve():
    results = Results([record("a", OURS, "start", 2.0), record("a", "vllm", "start", 100.0)])
    assert results.ratio("vllm", "start").median == 50.0


def test_the_tables_have_goals_beside_the_ratios_and_name_what_failed():
    records = [
        record("a", OURS, "output", 300.0, 1),
        record("a", "vllm", "output", 200.0, 1),
        record("a", OURS, "memory", 4000.0),
        record("a", "vllm", "memory", 8000.0),
        record("a", "other", "failed", "no compiler"),
        record("a", "mended", "failed", "no compiler"),
        record("b", "mended", "memory", 2000.0),
    ]
    text = markdown(Results(records), {"vllm": "bound to both cores"})
    assert "| 1 | vllm | 200.0 (200.0-200.0) | 1.50 (1.50-1.50); goal 1.5 |" in text
    assert "| vllm | 8,000 (8,000-8,000) | 2.00 (2.00-2.00); goal 1.0 |" in text
    assert "- vllm: bound to both cores" in text
    assert "- other failed: no compiler" in text
    assert "mended failed" not in text
    cell = next(c for c in summary(Results(records)) if c["peer"] == "vllm" and c["metric"] == "memory")
    assert (cell["median"], cell["ratio"]["median"]) == (8000.0, 2.0)


def test_a_peer_is_told_what_to_generate_and_timed(fake, tmp_path):
    running = InPython(fake("one"), 4, {}, tmp_path / "log")
    assert running.first_token() > 0
    figures = running.measure(Work(sequences=4, input=10, output=21, seed=1))
    assert figures == {"output": pytest.approx(84 / 10), "prefill": pytest.approx(40 / 2), "first": 2000.0}
    assert running.stop() > 2**20
    assert running.cpu_seconds() == 0  # no process is left


def test_a_paused_peer_takes_no_processor_time_and_goes_on(fake, tmp_path):
    running = InPython(fake("one"), 1, {}, tmp_path / "log")
    running.first_token()
    stat, end = Path(f"/proc/{running._process.pid}/stat"), time.monotonic() + 30
    with running.paused():
        while (state := stat.read_text().rpartition(")")[2].split()[0]) != "T" and time.monotonic() < end:
            time.sleep(0.01)
    assert state == "T"
    assert running.first_token() > 0
    running.stop()


def test_outputs_of_another_length_are_refused(fake, tmp_path):
    running = InPython(fake("short", short=1), 1, {}, tmp_path / "log")
    with pytest.raises(PeerFailed, match="asked for 1 tokens each"):
        running.first_token()
    running.stop()


def compare(monkeypatch, tmp_path, fakes, *argv):
    """Run the command with these peers; its table."""
    monkeypatch.setattr(peers, "catalogue", lambda shelf: {each.name: each for each in fakes})
    monkeypatch.setattr(peers, "PEERS", [each.name for each in fakes])
    monkeypatch.setattr(setup, "export", lambda shelf: None)
    monkeypatch.setattr(peers.report, "draw", lambda results, path: None)
    monkeypatch.setattr(
        sys, "argv", ["peers", *argv, "--sequences", "1", "3", "--out", str(tmp_path / "out")]
    )
    peers.main()
    return (tmp_path / "out" / "table.md").read_text()


def test_a_comparison_of_fake_peers_goes_on_without_one_that_fails(fake, tmp_path, monkeypatch):
    fakes = [fake(OURS), fake("slow", first=1.0, further=0.2), fake("small", most=2), fake("broken", most=0)]
    table = compare(monkeypatch, tmp_path, fakes, "--rounds", "2")
    assert "| 3 | slow | 4.8 (4.8-4.8) | 2.00 (2.00-2.00) |" in table
    assert "| 1 | small | 9.7 (9.7-9.7) | 1.00 (1.00-1.00) |" in table
    assert "- small failed: it ended: too many for me" in table
    assert "- broken failed: it ended: too many for me" in table

    lines = (tmp_path / "out" / "runs.jsonl").read_text().splitlines()
    rounds = {each["round"] for each in map(json.loads, lines) if each["metric"] == "output"}
    assert len(rounds) == 2


def test_further_rounds_join_those_that_are_there(fake, tmp_path, monkeypatch):
    compare(monkeypatch, tmp_path, [fake(OURS), fake("peer")], "run", "report", "--rounds", "1")
    table = compare(
        monkeypatch, tmp_path, [fake(OURS), fake("peer", further=0.2)], "run", "report", "--rounds", "1"
    )
    assert "| 1 | peer | 7.3 (4.9-9.7) |" in table
    other = compare(monkeypatch, tmp_path, [fake(OURS)], "run", "report", "--rounds", "1", "--output", "64")
    assert "| 1 | peer |" not in other, "figures of other work are not mixed in"


def test_a_peer_without_a_server_is_named_in_a_comparison_over_http(fake, tmp_path, monkeypatch):
    fakes = [fake(OURS), fake("peer")]
    table = compare(monkeypatch, tmp_path, fakes, "run", "report", "--over", "http", "--rounds", "1")
    assert "- peer failed: it has no OpenAI-compatible server" in table


def test_every_peer_of_the_catalogue_has_a_worker(tmp_path):
    assert set(catalogue(Shelf(tmp_path))) == set(worker.LOADERS)
