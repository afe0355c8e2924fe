"""`jaxserve bench compare` and the plots, of results made by hand."""

import struct

import pytest

from jaxserve.bench import metrics, results
from jaxserve.bench.client import Record
from jaxserve.bench.results import Run, Step
from jaxserve.cli import main


def result(path, kind="serve", label="ours", factor=1.0, rounds=4, loads=(1, 4)):
    """A result whose latencies are `factor` times those of one with a factor of 1."""
    made = results.new_result(kind, label, {})
    for turn in range(rounds):
        for load in loads:
            records = [
                Record(
                    0.1 * i,
                    factor * (1 + 0.01 * i),
                    [factor * 0.1, factor * (0.9 + 0.01 * i + 0.001 * turn)],
                    5,
                    9,
                )
                for i in range(20)
            ]
            samples = metrics.of_requests(records, factor * 2.0)
            samples |= {"client_cpu_s": [0.1]}
            steps = [Step(0.1 * i, 0.05, 3, 4, ["decode[4]", "mixed[4]"][i % 2]) for i in range(9)]
            if kind == "startup":
                samples = {"ready_s": [factor], "first_token_s": [factor * 1.5 + turn], "warm_s": [9.0]}
            name = {"serve": "max_concurrency", "startup": "caches"}.get(kind, "num_prompts")
            run = Run(
                setting={name: load},
                round=turn,
                duration=2.0 * factor,
                summary=metrics.summarise(samples),
                samples=samples,
                requests=records,
                steps=steps,
            )
            made.runs.append(run)
    results.write(made, str(path))
    return str(path)


def rows(capsys):
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines[2:]]


def test_ratios_of_two_results(tmp_path, capsys):
    a, b = result(tmp_path / "a.json"), result(tmp_path / "b.json", factor=2.0)
    assert main(["bench", "compare", a, b]) == 0
    table = {(setting, name): cells for setting, name, *cells in rows(capsys)}
    ttft = table["max_concurrency 1", "time to first token, ms: p50"]
    assert ttft == ["100.0", "200.0", "2.000", "2.000 to 2.000", "worse"]
    throughput = table["max_concurrency 4", "output tokens/s"]
    assert throughput[2:] == ["0.500", "0.500 to 0.500", "worse"]
    assert main(["bench", "compare", b, a]) == 0
    table = {(setting, name): cells for setting, name, *cells in rows(capsys)}
    assert table["max_concurrency 4", "output tokens/s"][-1] == "better"


def test_the_same_is_neither_better_nor_worse(tmp_path, capsys):
    a = result(tmp_path / "a.json")
    assert main(["bench", "compare", a, a]) == 0
    assert not {"better", "worse"} & {cell for row in rows(capsys) for cell in row}


def test_only_settings_of_both_are_compared(tmp_path, capsys):
    a, b = result(tmp_path / "a.json", loads=(1, 4)), result(tmp_path / "b.json", loads=(4, 8))
    main(["bench", "compare", a, b])
    assert {row[0] for row in rows(capsys)} == {"max_concurrency 4"}


@pytest.mark.parametrize(
    ("b", "said"),
    [
        (lambda p: result(p, kind="latency"), "is of bench serve, "),
        (lambda p: result(p, loads=(9,)), "no setting in common"),
        (lambda p: p.write_text("{}"), "is no result of jaxserve bench"),
        (lambda p: None, "cannot read"),
    ],
)
def test_what_does_not_compare(tmp_path, capsys, b, said):
    a = result(tmp_path / "a.json")
    b(tmp_path / "b.json")
    assert main(["bench", "compare", a, str(tmp_path / "b.json")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("jaxserve: ") and err.count("\n") == 1 and said in err


def test_a_result_survives_its_file(tmp_path):
    made = results.read(result(tmp_path / "a.json"))
    again = tmp_path / "again.json"
    results.write(made, str(again))
    assert results.read(str(again)) == made
    assert made.environment["python"] and made.environment["cores"] >= 1


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("serve", {"throughput", "latency", "timeline-ours", "timeline-_theirs_"}),
        ("throughput", {"throughput", "latency", "timeline-ours", "timeline-_theirs_"}),
        ("startup", {"startup"}),
    ],
)
def test_plots(tmp_path, kind, names):
    pytest.importorskip("matplotlib")
    a = result(tmp_path / "a.json", kind)
    b = result(tmp_path / "b.json", kind, label="/theirs ", factor=1.3)
    assert main(["bench", "compare", a, b, "--plots", str(tmp_path / "plots")]) == 0
    files = {path.stem: path.read_bytes() for path in (tmp_path / "plots").iterdir()}
    assert set(files) == names
    for data in files.values():
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", data[16:24])
        assert 500 <= width <= 3000 and 400 <= height <= 2000
        assert len(data) > 10_000
