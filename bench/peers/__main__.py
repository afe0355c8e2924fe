"""jaxserve beside its peers: the same model and prompts on the same machine, in alternation, as ratios.

    python -m bench.peers [setup run report] [--peers …] [--sequences 1 8 32 64] [--rounds 4] [--over http]

`setup` installs each peer into an environment of its own under $JAXSERVE_HOME/peers, once. `run` measures: in
each round every peer starts, alone; then, for each number of sequences, each generates in turn while the rest
are stopped. Every figure is at once appended to runs.jsonl in --out: run again for more rounds, or with other
peers. `report` makes table, JSON and plot of all that is there. Without an action it does the three. A peer
that cannot be installed or fails is named in the table.

In Python prompts are random tokens, and "first token" is when a whole batch has its first. Over HTTP they are
words; each server is loaded by `jaxserve bench serve`, closed-loop, and it is the median of the requests.
"""

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path

from bench.peers import report, setup
from bench.peers.catalogue import OURS, PEERS, SLOT, Peer, Shelf, catalogue
from bench.peers.process import InPython, OverHTTP, PeerFailed, Running, Work

ACTIONS = ("setup", "run", "report")
WAYS: dict[str, type[Running]] = {"python": InPython, "http": OverHTTP}


def main() -> None:
    peers = catalogue(shelf := Shelf())
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser("python -m bench.peers", description=about)
    parser.add_argument("actions", nargs="*", help=f"of {', '.join(ACTIONS)}; default: all")
    parser.add_argument("--peers", nargs="+", default=PEERS, help=f"of {', '.join(peers)}")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--input", type=int, default=192, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=128, help="tokens generated for it")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--over", choices=WAYS, default="python")
    parser.add_argument("--no-cold", action="store_true", help="no starts with nothing compiled")
    parser.add_argument("--out", type=Path, default=shelf.root / "results", help="where results go")
    args = parser.parse_args()
    if unknown := (set(args.actions) - set(ACTIONS)) | (set(args.peers) - set(peers)):
        parser.error(f"no {', '.join(unknown)}")
    actions = args.actions or ACTIONS
    if args.input + args.output > SLOT:
        parser.error(f"a sequence has room for {SLOT} tokens")
    args.out.mkdir(parents=True, exist_ok=True)
    journal = Journal(args.out / "runs.jsonl", args)
    chosen = {name: peers[name] for name in dict.fromkeys([OURS, *args.peers])}
    if "setup" in actions:
        prepare(shelf, chosen, journal)
    if "run" in actions:
        compare(chosen, args, journal)
    if "report" in actions:
        tell(journal, args.out, peers)


class Journal:
    """The file of all figures, which prints what it is given, and reads those of the same kind of work."""

    def __init__(self, path: Path, args: argparse.Namespace):
        self.path = path
        self.round = ""
        self._work = {"over": args.over, "input": args.input, "output": args.output}

    def write(self, peer: str, metric: str, value: float | str, sequences: int | None = None) -> None:
        record = {"round": self.round, **self._work, "peer": peer, "metric": metric, "value": value}
        with self.path.open("a") as file:
            print(json.dumps(record | ({"sequences": sequences} if sequences else {})), file=file)
        shown = f"{value:.2f}" if isinstance(value, float) else value
        print(f"{peer:18} {sequences or '':>4} {metric:8} {shown}", flush=True)

    def read(self) -> report.Results:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        records = map(json.loads, lines)
        return report.Results(each for each in records if each.items() >= self._work.items())


@contextmanager
def left_out(name: str, peers: dict[str, Peer], journal: Journal) -> Iterator[None]:
    """A peer that fails is no longer one of the peers; the others go on."""
    try:
        yield
    except PeerFailed as failure:
        journal.write(name, "failed", str(failure))
        del peers[name]


@contextmanager
def alone(name: str, running: dict[str, Running]) -> Iterator[None]:
    """One peer's turn, in which the others do not run at all."""
    with ExitStack() as others:
        for other, each in running.items():
            if other != name:
                others.enter_context(each.paused())
        yield


def prepare(shelf: Shelf, peers: dict[str, Peer], journal: Journal) -> None:
    setup.export(shelf)
    for name in list(peers):
        with left_out(name, peers, journal):
            setup.make(peers[name])


def compare(peers: dict[str, Peer], args: argparse.Namespace, journal: Journal) -> None:
    for turn in range(args.rounds):
        journal.round = datetime.now().isoformat(timespec="milliseconds")
        running: dict[str, Running] = {}
        try:
            for name in list(peers):
                with left_out(name, peers, journal), alone(name, running):
                    start(peers[name], running, args, journal)
            for count in args.sequences:
                work = Work(count, args.input, args.output, seed=1000 * turn + count)
                for name in list(peers):
                    with left_out(name, peers, journal):
                        measure(name, running, work, journal)
        finally:
            for name, each in running.items():
                peak = each.stop()
                if name in peers:  # and has not failed
                    journal.write(name, "memory", peak / 2**20)


def start(peer: Peer, running: dict[str, Running], args: argparse.Namespace, journal: Journal) -> None:
    """Once with nothing compiled, and once more, which stays."""
    if args.over == "http" and peer.server(0, 1) is None:
        raise PeerFailed("it has no OpenAI-compatible server")
    way, log, most = WAYS[args.over], args.out / f"{peer.name}.log", max(args.sequences)
    with tempfile.TemporaryDirectory() as empty:
        if not args.no_cold and (variables := peer.cold(Path(empty))) is not None:
            cold = way(peer, most, variables, log)
            try:
                journal.write(peer.name, "cold", cold.first_token())
            finally:
                cold.stop()
    running[peer.name] = way(peer, most, {}, log)
    journal.write(peer.name, "start", running[peer.name].first_token())
    running[peer.name].settle()


def measure(name: str, running: dict[str, Running], work: Work, journal: Journal) -> None:
    with alone(name, running):
        figures = running[name].measure(work)
    for metric, value in figures.items():
        journal.write(name, metric, value, work.sequences)


def tell(journal: Journal, out: Path, peers: dict[str, Peer]) -> None:
    results = journal.read()
    table = report.markdown(results, {name: peer.note for name, peer in peers.items()})
    print(f"\n{table}")
    (out / "table.md").write_text(table + "\n")
    (out / "summary.json").write_text(json.dumps(report.summary(results), indent=1))
    report.draw(results, out / "peers.png")
    print(f"\n{out}: runs.jsonl, summary.json, table.md, peers.png")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # not without stopping the peers
    main()
