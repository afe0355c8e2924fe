"""`jaxserve bench serve` against the server that it is made for."""

import json

import pytest

from jaxserve.cli import main

pytest.importorskip("aiohttp")


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_every_token_of_a_real_server_is_counted(real_server, tmp_path, endpoint):
    file = tmp_path / "result.json"
    load = ["--concurrency", "1", "4", "--num-prompts", "6", "--input-len", "8", "--output-len", "12"]
    where = ["--base-url", real_server.url, "--endpoint", endpoint, "--output", str(file)]
    assert main(["bench", "serve", *where, *load, "--ignore-eos", "--goodput", "e2el:600000"]) == 0
    for run in json.loads(file.read_text())["runs"]:
        counts = run["counts"]
        assert (counts["completed"], counts["failed"], counts["without_usage"]) == (6, 0, 0)
        assert counts["output_tokens"] == 6 * 12
        assert counts["prompt_tokens"] > 6 * 8
        assert counts["events"] <= 6 * 12  # a token that is no whole character waits for the next
        assert run["summary"]["request_goodput"] == run["summary"]["request_throughput"]
        for request in run["requests"]:
            assert 0 < request["times"][0] <= request["times"][-1] <= request["end"]
