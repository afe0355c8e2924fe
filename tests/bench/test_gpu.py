"""bench/gpu without a GPU: its report, its time limits, and its sections in small."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.gpu import __main__ as gpu
from bench.gpu import report
from bench.gpu.job import ROOT, Job
from bench.gpu.report import Results, markdown

COPY, MATMUL = 4000.0, 800.0


def attention(by, ms, sequences=32, rows=1, before=4095, section="kernels"):
    work = {"sequences": sequences, "rows": rows, "before": before}
    return {"section": section, **work, "by": by, "GB": 0.4, "TFLOP": 0.002, "ms": ms}


def decode(count, ms, section="engine", **more):
    row = {
        "decode": f"{count} x 1024",
        "sequences": count,
        "context": 1024,
        "ms": ms,
        "tokens_per_s": 1e3 * count / ms,
    }
    return {"section": section, **row, "GB": 16.0, "TFLOP": 0.02 * count, **more}


def checked(case, verdict, **errors):
    return {"section": "check", "case": case, "implementation": "gpu", "verdict": verdict, **errors}


STEP = {"idle": 0.02, "programs": ["decode[64]"]}
ROWS = [
    {"section": "run", "created": "today", "dry": False},
    {"section": "ceilings", "device": "a GPU", "jax": "0", "GiB": 1.0},
    {"section": "ceilings", "ceiling": "copy", "rate": COPY, "unit": "GB/s"},
    {"section": "ceilings", "ceiling": "matmul", "rate": MATMUL, "unit": "TFLOP/s"},
    checked("decode", "ok", max_error=1e-3, limit=4e-3),
    checked("mixed", "WRONG", max_error=1.0, limit=4e-3),
    checked("alibi", "refused: no reason"),
    {"section": "experts", "tokens": 64, "by": "gpu", "GB": 0.8, "TFLOP": 0.003, "ms": 0.25},
    {"section": "experts", "tokens": 64, "by": "jax ragged_dot", "GB": 0.8, "TFLOP": 0.003, "ms": 2.0},
    checked("odd", "ok", max_error=1.0, limit=2.0) | {"section": "experts", "implementation": "g"},
    {"section": "sampling", "rows": 9, "filters": "plain", "by": "gpu", "GB": 0.4, "TFLOP": 0.0, "ms": 0.2},
    {"section": "sampling", "rows": 9, "filters": "plain", "by": "xla", "GB": 0.4, "TFLOP": 0.0, "ms": 1.0},
    attention("gpu", 0.2),
    attention("mosaic", 0.125),
    attention("jax xla", 1.0),
    attention("torch sdpa flash", 0.25, section="torch_kernels"),
    {"section": "torch_kernels", "by": "flash-attn", "absent": "ModuleNotFoundError: No module named 'it'"},
    decode(1, 8.0, **STEP),
    decode(64, 5.0, **STEP),
    {"section": "engine", "decode": "256 x 4096", "absent": "the pool has 9 tokens"},
    decode(64, 50.0, section="peers", peer="transformers 5", prefill_ms=9.0, compile_s=1.0),
    {"section": "engine", "prefill": "1 x 8000", "ms": 100.0, "tokens_per_s": 8e4, "GB": 16.0, "TFLOP": 40.0},
    {"section": "run", "of": "engine", "status": "stopped after 9 s", "seconds": 9.0},
]  # fmt: skip


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def line(text, begin):
    return cells(next(each for each in text.splitlines() if each.startswith(f"| {begin}")))


def test_goals_are_beside_what_was_measured():
    text = markdown(Results(ROWS))
    assert line(text, "decode attention")[1:] == ["≥ 85.0%", "80.0%", "not met"]  # 0.1 ms of 0.125
    assert line(text, "decode step, 1 ")[1:] == ["≥ 80.0%", "50.0%", "not met"]  # 4 ms of 8
    assert line(text, "decode step, 64")[1:] == ["≥ 75.0%", "80.0%", "met"]
    assert line(text, "prefill: part")[1:] == ["≥ 60.0%", "50.0%", "not met"]  # 50 ms of 100
    assert line(text, "device idle")[1:] == ["< 5.0%", "2.0%", "met"]
    assert line(text, "warm start")[2] == "not measured"


def test_the_tables_say_what_was_seen():
    text = markdown(Results(ROWS))
    assert line(text, "32 x 4,096") == [
        "32 x 4,096, decode", "0.2 (50%)", "0.125 (80%)", "1 (10%)", "0.25 (40%)", "2.00",
    ]  # fmt: skip
    assert line(text, "64 x 1024") == [
        "64 x 1024",
        "5 (80%)",
        "12,800",
        "2.0%",
        "decode[64]",
        "50.00",
        "10.00",
    ]
    assert line(text, "gpu |")[1:] == ["1 of 2", "1", "25%"]
    assert line(text, "gpu | mixed")[2] == "WRONG"
    assert line(text, "9 |") == ["9", "plain", "0.2 (50%)", "1 (10%)"]
    assert line(text, "64 |") == ["64", "0.25 (80%)", "2 (10%)"]
    assert line(text, "g |")[1:] == ["1 of 1", "0", "50%"]
    assert "- flash-attn: ModuleNotFoundError" in text and "the pool has 9 tokens" in text
    assert line(text, "engine | stopped")[1] == "stopped after 9 s"


def test_the_docs_have_the_goals_as_they_are():
    assert report.goals_table(Results([]), "not measured yet") in (ROOT / "docs/gpu.md").read_text()


def test_a_report_of_nothing():
    assert "not measured" in markdown(Results([]))


def test_plots_are_drawn_of_what_there_is(tmp_path):
    pytest.importorskip("matplotlib")
    from bench.gpu import plots

    for rows in ROWS, []:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        plots.run(Job("plots", str(tmp_path), str(tmp_path), 0.0, 0.0, True, "auto"))
        for name in "roofline", "attention", "engine":
            assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
            (tmp_path / f"{name}.png").unlink()


def play(tmp_path, monkeypatch, source, seconds):
    """Sections are processes that run this."""
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "here" / "__main__.py"))
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "__main__.py").write_text(source)
    job = Job("ceilings", str(tmp_path), str(tmp_path), time.time(), seconds, True, "auto")
    return gpu.run(job)


def state(stat):
    """Of a process, X when it is gone."""
    return stat.read_text().rpartition(")")[2].split()[0] if stat.exists() else "X"


def test_a_section_that_hangs_is_stopped_with_what_it_started(tmp_path, monkeypatch):
    note = tmp_path / "child"
    source = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(note)!r}).write_text(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    assert play(tmp_path, monkeypatch, source, 4.0) == "stopped after 4 s"
    stat, until = Path(f"/proc/{note.read_text()}/stat"), time.monotonic() + 20
    while state(stat) not in "ZX":
        assert time.monotonic() < until, "what the section started runs on"
        time.sleep(0.1)


def test_a_section_that_fails_is_quoted(tmp_path, monkeypatch):
    status = play(tmp_path, monkeypatch, "raise SystemExit('out of luck')", 30.0)
    assert status == "failed with 1: out of luck"


def test_all_limits_together_are_under_ten_minutes():
    assert sum(gpu.SECTIONS.values()) <= gpu.TOTAL < 590
    docs = (ROOT / "docs/gpu.md").read_text()
    assert all(f"| `{name}` | {seconds} |" in docs for name, seconds in gpu.SECTIONS.items())


def bench(tmp_path, *argv):
    """From elsewhere, by its path."""
    command = [sys.executable, str(ROOT / "bench/gpu"), "--dry", "--out", str(tmp_path / "out"), *argv]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    rows = [json.loads(each) for each in (tmp_path / "out/rows.jsonl").read_text().splitlines()]
    return done, rows


def test_kernels_in_small(tmp_path):
    """Ceilings, attention and the report of it: each work by ours and by jax's, in processes of their own."""
    done, rows = bench(tmp_path, "--sections", "ceilings", "kernels", "experts", "sampling")
    assert done.returncode == 0, done.stdout + done.stderr
    results = Results(rows)
    assert results.copy > 0 and results.matmul > 0
    timed = {(row["by"], row["rows"] > 1) for row in results.attention() if row.get("ms", 0) > 0}
    assert {(by, many) for by in ("gpu", "xla", "jax xla") for many in (False, True)} <= timed
    for row in results.of("kernels", "absent"):  # cuDNN and Hopper's kernel are for GPUs, and masks differ
        assert row["by"] in ("jax cudnn", "mosaic") or (row["by"] == "jax xla" and row["before"])
    assert all(results.of_ceiling(row) > 0 for row in results.of("kernels", "ms"))
    assert {row["by"] for row in results.of("experts", "ms")} == {"gpu", "jax ragged_dot"}
    assert {row["by"] for row in results.of("sampling", "ms")} == {"gpu", "xla"}
    for section in ("experts", "sampling"):
        assert {row["verdict"] for row in results.of(section, "verdict")} == {"ok"}
    assert re.search(r"\| ceilings \| ok \|", done.stdout)
    cells = json.loads((tmp_path / "out/gpu.json").read_text())
    assert any(row.get("of_ceiling", 0) > 0 for row in cells["rows"]) and len(cells["goals"]) == 7


def test_without_matplotlib_the_numbers_are_there(tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    (tmp_path / "site/matplotlib.py").write_text("raise ImportError('not here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    done, rows = bench(tmp_path, "--sections", "ceilings", "plots")
    assert done.returncode == 0 and "- plots: ImportError: not here" in done.stdout
    assert len(Results(rows).of("ceilings", "rate")) == 3
    assert "| matmul |" in (tmp_path / "out/report.md").read_text()


@pytest.mark.parametrize("argv", [["--sections", "nothing"], ["--seconds", "soon"]])
def test_what_it_does_not_know_is_refused(argv, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpu", *argv])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 2 and argv[1] in capsys.readouterr().err
