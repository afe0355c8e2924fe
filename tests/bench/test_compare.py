"""`jaxserve bench compare` and the plots, of results made by hand."""

import struct

import pytest

from jaxserve.bench import metrics, results
from jaxserve.bench.client import Record
from jaxserve.bench.results import Run, Step
from jaxserve.cli import main


def result(path, kind="serve", label="ours", factor=1.0, rounds=4, loads=(1, 4), **options):
    """A result whose latencies are `factor` times those of one with a factor of 1."""
    made = results.new_result(kind, label, options)
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
        (lambda p: p.write_text('{"format": 2, "kind": 3}'), "has the format 2; this jaxserve reads 1"),
        (lambda p: result(p, output_len=16), "not do the same work: output_len None or 16"),
        (lambda p: result(p, ignore_eos=True), "not do the same work: ignore_eos None or True"),
        (lambda p: result(p, prefix_len=9), "not do the same work: prefix_len None or 9"),
        (lambda p: None, "cannot read"),
    ],
)
def test_what_does_not_compare(tmp_path, capsys, b, said):
    a = result(tmp_path / "a.json")
    b(tmp_path / "b.json")
    assert main(["bench", "compare", a, str(tmp_path / "b.json")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("jaxserve: ") and err.count("\n") == 1 and said in err


RANDOM = {"dataset_name": "random", "dataset_path": None}


@pytest.mark.parametrize(
    ("a", "b", "told"),
    [
        ({"num_prompts": 9}, {"num_prompts": 99}, ["num_prompts 9 or 99"]),
        (
            {"engine": {"num_blocks": 3, "seed": 1}},
            {"engine": {"num_blocks": 4, "seed": 2}},
            ["engine.num_blocks 3 or 4"],
        ),
        ({"seed": 1, "rounds": 2, "max_concurrency": [1, 4]}, {"max_concurrency": [4]}, []),
        (RANDOM | {"input_len": None}, RANDOM | {"input_len": 192}, []),
        ({"dataset_path": "here/x.json"}, {"dataset_path": "there/x.json"}, []),
    ],
)
def test_other_options_that_differ_stand_above_the_table(tmp_path, capsys, a, b, told):
    a, b = result(tmp_path / "a.json", **a), result(tmp_path / "b.json", **b)
    assert main(["bench", "compare", a, b]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("differs: ")] == [f"differs: {each}" for each in told]


def test_nothing_beside_something_is_shown(tmp_path, capsys):
    def goodput(name, values):
        made = results.read(result(tmp_path / name, rounds=len(values), loads=(1,)))
        for run, value in zip(made.runs, values, strict=True):
            run.samples["request_goodput"] = [value]
        results.write(made, str(tmp_path / name))
        return str(tmp_path / name)

    a, b = goodput("a.json", [0.0, 0.0]), goodput("b.json", [5.0, 5.0])
    assert main(["bench", "compare", a, b]) == 0
    (cells,) = [row for row in rows(capsys) if "objectives" in row[1]]
    assert cells[2:] == ["0.00", "5.00"]  # no ratio, no verdict


def test_plots_have_somewhere_to_go(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    a = result(tmp_path / "a.json")
    assert main(["bench", "compare", a, a, "--plots", a]) == 1
    out, err = capsys.readouterr()
    assert not out and err.startswith("jaxserve: cannot write to ")


def test_labels_that_are_alike_have_a_timeline_each(tmp_path):
    pytest.importorskip("matplotlib")
    a, b = result(tmp_path / "a.json"), result(tmp_path / "b.json", factor=1.3)
    assert main(["bench", "compare", a, b, "--plots", str(tmp_path / "plots")]) == 0
    timelines = {path.stem for path in (tmp_path / "plots").glob("timeline*")}
    assert timelines == {"timeline-A_ours", "timeline-B_ours"}


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
