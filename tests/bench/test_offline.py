"""Benchmarks of an engine in this process: a tiny model, few tokens, real numbers."""

import json

import pytest

from jaxserve.cli import main

ENGINE = ["--dtype", "float32", "--max-num-seqs", "4", "--max-num-batched-tokens", "64", "--num-blocks", "64"]


def bench(name, model_dir, tmp_path, *argv):
    file = tmp_path / "result.json"
    assert main(["bench", name, str(model_dir), *ENGINE, *map(str, argv), "--output", str(file)]) == 0
    return json.loads(file.read_text())


def test_throughput(model_dir, tmp_path, capsys):
    load = ["--num-prompts", 2, 6, "--input-len", 9, "--output-len", 5]
    result = bench("throughput", model_dir, tmp_path, *load, "--seed", 3)
    assert result["kind"] == "throughput"
    assert result["options"]["engine"]["max_num_seqs"] == 4
    assert [run["setting"] for run in result["runs"]] == [{"num_prompts": 2}, {"num_prompts": 6}]
    for run, count in zip(result["runs"], (2, 6), strict=True):
        counts = run["counts"]
        assert (counts["completed"], counts["prompt_tokens"], counts["output_tokens"]) == (
            count,
            9 * count,
            5 * count,
        )
        assert counts["compiles_on_request_path"] == 0
        assert run["summary"]["output_throughput"] == pytest.approx(5 * count / run["duration"])
        assert len(run["samples"]["ttft_ms"]) == len(run["requests"]) == count
        # every token but each last one goes through a step
        steps = run["steps"]
        assert sum(tokens for _, _, tokens, _, _ in steps) >= count * (9 + 5 - 1)
        assert all(0 < tokens <= rows for _, _, tokens, rows, _ in steps)
        assert sum(rows - tokens for _, _, tokens, rows, _ in steps) == counts["padding_tokens"]
        assert 0 <= steps[0][0] <= steps[-1][0] + steps[-1][1] <= run["duration"]
    out = capsys.readouterr().out
    assert "num_prompts 6: 6 requests" in out and "padding" in out


def test_a_dataset_is_tokenised_by_the_engine(model_dir, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"prompt": "hello you", "output_tokens": 4}))
    result = bench("throughput", model_dir, tmp_path, "--num-prompts", 3, "--dataset", file)
    (run,) = result["runs"]
    assert [request["prompt_tokens"] for request in run["requests"]] == [9] * 3  # a byte is a token


def test_a_dataset_needs_a_tokenizer(make_llama, tmp_path, capsys):
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"prompt": "hello you", "output_tokens": 4}))
    model = str(make_llama("mute"))
    assert main(["bench", "throughput", model, *ENGINE, "--dataset", str(file)]) == 1
    assert "mute has no tokenizer for the texts of dataset_path" in capsys.readouterr().err


def test_latency(model_dir, tmp_path, capsys):
    sizes = [
        "--batch-size",
        3,
        "--input-len",
        7,
        "--output-len",
        4,
        "--num-iters",
        5,
        "--num-iters-warmup",
        1,
    ]
    result = bench("latency", model_dir, tmp_path, *sizes)
    assert [run["round"] for run in result["runs"]] == [0, 1, 2, 3, 4]
    for run in result["runs"]:
        assert run["setting"] == {"batch_size": 3}
        assert run["samples"]["latency_ms"] == [pytest.approx(1e3 * run["duration"])]
        assert run["counts"]["output_tokens"] == 12
        assert run["counts"]["prefix_cache_hits"] == 0  # each batch has prompts of its own
    out = capsys.readouterr().out
    assert "batch_size 3: 5 times" in out and "whole batch, ms" in out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["throughput", "--num-prompts", "0"], "num_prompts and rounds must be at least 1"),
        (["throughput", "--memory-fraction", "2"], "memory_fraction"),
        (["throughput", "--output", "/proc/none/a.json"], "cannot write to /proc/none"),
        (["throughput", "--output", "/"], "cannot write to /: it is a directory"),
        (["throughput", "--dataset", "absent.json"], "cannot read the dataset"),
        (["latency", "--batch-size", "0"], "batch_size must be at least 1"),
        (["latency", "--num-iters-warmup", "-1"], "num_iters_warmup must not be negative"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(capsys, argv, said):
    assert main(["bench", *argv, "--model", "absent"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("jaxserve: ") and err.count("\n") == 1 and said in err
