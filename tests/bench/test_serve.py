"""`jaxserve bench serve` as a user runs it."""

import json
import subprocess
import sys

import pytest

from jaxserve.cli import main

pytest.importorskip("aiohttp")


def bench(*argv):
    return main(["bench", "serve", *map(str, argv)])


def test_a_sweep_over_a_server(fake, tmp_path, capsys):
    file = tmp_path / "new" / "a.json"
    load = ["--concurrency", 1, 3, "--num-prompts", 6, "--rounds", 2, "--input-len", 5, "--output-len", 4]
    assert bench("--base-url", f"{fake.url}/ok", *load, "--output", file, "--label", "fake") == 0
    result = json.loads(file.read_text())
    assert (result["kind"], result["label"], result["options"]["model"]) == ("serve", "fake", "first")
    settings = [(run["setting"]["max_concurrency"], run["round"]) for run in result["runs"]]
    assert settings == [(1, 0), (3, 0), (1, 1), (3, 1)]
    for run in result["runs"]:
        assert run["counts"] | {"mean_concurrency": 0} == {
            "completed": 6,
            "failed": 0,
            "errors": {},
            "error_details": {},
            "prompt_tokens": 66,
            "output_tokens": 24,
            "events": 24,
            "without_usage": 0,
            "mean_concurrency": 0,
        }
        assert len(run["requests"]) == len(run["samples"]["ttft_ms"]) == 6
        assert run["summary"]["output_throughput"] == pytest.approx(24 / run["duration"])
    out = capsys.readouterr().out
    assert "max_concurrency 3: 6 requests" in out and "p99" in out


def test_the_same_seed_asks_the_same_and_each_run_something_else(fake):
    def prompts(seed):
        fake.seen.clear()
        bench("--base-url", f"{fake.url}/ok", "--concurrency", 1, 2, "--num-prompts", 3, "--seed", seed)
        return [body["prompt"] for _, body in fake.seen]

    first = prompts(1)
    assert len(set(first)) == 8  # one to warm up and three in each run
    assert sorted(prompts(1)) == sorted(first)
    assert not set(prompts(2)) & set(first)


def test_a_rate(fake, tmp_path):
    file = tmp_path / "a.json"
    rate = ["--request-rate", 100, "--duration", 0.5, "--output-len", 2]
    assert bench("--base-url", f"{fake.url}/ok", *rate, "--output", file) == 0
    (run,) = json.loads(file.read_text())["runs"]
    assert run["setting"] == {"request_rate": 100.0}
    assert 20 < len(run["requests"]) < 90  # 50 on average
    assert all(request["start"] < 0.5 for request in run["requests"])


def test_arrivals_are_drawn_with_other_numbers_than_prompts(fake, monkeypatch):
    from jaxserve.bench import serve

    seeds = []

    def draws(function, place):
        def seen(*args):
            seeds.append(args[place])
            return function(*args)

        return seen

    monkeypatch.setattr(serve, "arrivals", draws(serve.arrivals, 2))
    monkeypatch.setattr(serve.Workload, "asks", draws(serve.Workload.asks, 1))
    assert bench("--base-url", f"{fake.url}/ok", "--request-rate", 500, 400, "--num-prompts", 2) == 0
    assert len(set(seeds)) == 4


def test_runs_take_one_prompt_of_a_file_after_the_other(fake, tmp_path, capsys):
    file = tmp_path / "data.jsonl"
    texts = [f"prompt number {i:3}" for i in range(10)]
    file.write_text("\n".join(json.dumps({"prompt": text, "output_tokens": 4}) for text in texts))
    load = ["--dataset", file, "--concurrency", 1, 2, "--num-prompts", 4, "--num-warmups"]
    fake.seen.clear()
    assert bench("--base-url", f"{fake.url}/ok", *load, 1) == 0
    assert sorted(body["prompt"] for _, body in fake.seen) == texts
    assert "are again" not in capsys.readouterr().err
    assert bench("--base-url", f"{fake.url}/ok", *load, 2) == 0
    assert capsys.readouterr().err.count("all 10 prompts of") == 1


def test_fields_and_headers(fake):
    extra = ["--extra-body", '{"top_k": 3, "stream_options": null}', "--ignore-eos", "--api-key", "secret"]
    named = ["--model", "second", "--endpoint", "chat", "--temperature", 0.7]
    assert bench("--base-url", f"{fake.url}/ok/v1", "--num-prompts", 1, *extra, *named) == 0
    headers, body = fake.seen[-1]
    assert headers["authorization"] == "Bearer secret"
    wanted = {"model": "second", "top_k": 3, "stream_options": None, "ignore_eos": True, "temperature": 0.7}
    assert body | wanted == body


def test_the_key_is_not_written(fake, tmp_path):
    file = tmp_path / "a.json"
    bench("--base-url", f"{fake.url}/ok", "--num-prompts", 1, "--api-key", "hidden-key", "--output", file)
    assert "hidden-key" not in file.read_text()


def test_errors_are_shown(fake, capsys):
    assert bench("--base-url", f"{fake.url}/503", "--num-prompts", 2, "--model", "m") == 1
    out, err = capsys.readouterr()
    assert "0 requests" in out and "2 failed" in out and "2  failed: HTTP 503" in out and "no: 503" in out
    assert "no request succeeded" in err


def test_counting_events_is_told(fake, capsys):
    assert bench("--base-url", f"{fake.url}/no-usage", "--num-prompts", 2) == 0
    assert "did not count the tokens of 2 requests" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--max-concurrency", "0"], "max_concurrency must be above 0"),
        (["--request-rate", "-1"], "request_rate must be above 0"),
        (["--goodput", "tfft:5"], "goodput takes ttft:MS"),
        (["--extra-body", "[1]"], "extra_body must be a JSON object"),
        (["--extra-body", "{"], "extra_body is not JSON"),
        (["--burstiness", "2"], "burstiness needs a request_rate"),
        (["--input-len", "0"], "input_len must be at least 1"),
        (["--range-ratio", "1"], "range_ratio must be from 0"),
        (["--dataset", "absent.json"], "cannot read the dataset"),
        (["--base-url", "localhost:8000"], "base_url must be like http://host:8000, not localhost:8000"),
        (["--base-url", "http://host:port"], "base_url must be like http://host:8000, not http://host:port"),
        (["--output", "."], "cannot write to .: it is a directory"),
        (["--endpoint", "chat", "--model", "m", "--base-url", "http://127.0.0.1:9"], "is not ready"),
    ],
)
def test_mistakes_are_one_line(capsys, argv, said, fake):
    where = [] if "--base-url" in argv else ["--base-url", f"{fake.url}/ok"]
    assert bench(*argv, *where, "--ready-check-timeout-sec", 0) == 1
    err = capsys.readouterr().err
    assert err.startswith("jaxserve: ") and err.count("\n") == 1 and said in err


def test_a_server_without_models_needs_a_name(fake, capsys):
    assert bench("--base-url", f"{fake.url}/no-models", "--model", "m", "--num-prompts", 1) == 0
    assert bench("--base-url", f"{fake.url}/no-models", "--ready-check-timeout-sec", 0) == 1
    assert "is not ready: HTTP 404" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--base-url", "URL/locked"], "answers HTTP 401: give another --api-key"),
        (["--base-url", "http://127.0.0.1:9", "--dataset", "absent.json"], "cannot read the dataset"),
    ],
)
def test_what_waiting_does_not_change_is_told_at_once(fake, capsys, monkeypatch, argv, said):
    from jaxserve.bench import serve

    monkeypatch.setattr(serve, "POLL_SECONDS", 1e9)
    assert bench(*(text.replace("URL", fake.url) for text in argv)) == 1
    assert said in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install():
    code = (
        "import sys; sys.modules['aiohttp'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'aiohttp' else find(name, *rest)\n"
        "from jaxserve.cli import main\n"
        "sys.exit(main(['bench', 'serve', '--model', 'm']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "jaxserve: this needs aiohttp: pip install 'jaxserve[bench]'\n"
