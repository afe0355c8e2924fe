"""Starting, losing clients, losing the engine, and ending."""

import asyncio
import http.client
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import httpx
import openai
import pytest

from jaxserve.config import ServerConfig
from jaxserve.server import main, web

LONG = {"prompt": "long", "max_tokens": 500, "ignore_eos": True}


def stream(server, **fields):
    return server.http.stream("POST", "/v1/completions", json=LONG | {"stream": True} | fields)


def next_event(lines):
    return next(line for line in lines if line.startswith("data: "))


def test_a_connection_may_be_idle_for_longer_than_clients_keep_one(server):
    """uvicorn's own five seconds are what several clients keep one for: some requests met the closing."""
    url = server.http.base_url
    connection = http.client.HTTPConnection(url.host, url.port)
    for pause in (0, 6):
        time.sleep(pause)
        sock = connection.sock
        connection.request("GET", "/health")
        assert connection.getresponse().read() is not None
    assert connection.sock is sock is not None
    connection.close()


@pytest.fixture
def slow(launch, tmp_path):
    """A server of the test's own: a request for 500 tokens takes it 25 s."""
    server = launch(
        {"shutdown_timeout": 60}, FAKE_STEP_SECONDS="0.05", FAKE_JOURNAL=str(tmp_path / "journal")
    )
    server.journal = tmp_path / "journal"
    server.journal.touch()
    yield server.wait_ready()
    server.stop(signal.SIGKILL)


def test_the_line_at_start_says_where_and_what(server):
    assert server.line == f"jaxserve listens on {server.url} and serves tiny, also-tiny (512 tokens)\n"


@pytest.mark.parametrize("path", ["/health", "/live", "/ready", "/ping", "/version"])
def test_probes(http, path):
    assert http.get(path).status_code == 200


def test_request_id_comes_back_and_is_the_responses(http):
    response = http.post("/v1/completions", json={"prompt": "a"}, headers={"x-request-id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1" and response.json()["id"] == "cmpl-mine-1"
    bad = http.get("/live", headers={"x-request-id": "x" * 500})
    assert len(bad.headers["x-request-id"]) == 32


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_frees_its_request(slow, eventually, streamed):
    body = json.dumps(LONG | {"stream": streamed, "n": 2}).encode()
    host, port = slow.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as sock:
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%s" % (len(body), body)
        )
        eventually(lambda: slow.journal.read_text().count("add ") == 2)
        assert "end" not in slow.journal.read_text()
    eventually(lambda: slow.journal.read_text().count("end ") == 2)


def test_the_openai_client_closing_its_stream_frees_its_request(slow, eventually):
    client = openai.OpenAI(base_url=f"{slow.url}/v1", api_key="none")
    reply = client.completions.create(
        model=None, stream=True, extra_body={"ignore_eos": True}, **_openai(LONG)
    )
    next(iter(reply))
    reply.close()
    eventually(lambda: "end " in slow.journal.read_text())


def _openai(body):
    return {name: body[name] for name in ("prompt", "max_tokens")}


def test_a_killed_engine_fails_its_requests_and_comes_back(slow, eventually):
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(slow.http.post("/v1/completions", json=LONG)))
    waiting.start()
    with stream(slow) as response:
        lines = response.iter_lines()
        next_event(lines)
        eventually(lambda: slow.journal.read_text().count("add ") == 2)
        (engine,) = slow.engine_pids()
        os.kill(engine, signal.SIGKILL)
        *_, failed, done = [line for line in lines if line.startswith("data: ")]
    assert done == "data: [DONE]"
    error = json.loads(failed.removeprefix("data: "))["error"]
    assert error["code"] == "engine_died" and "-9" in error["message"]
    waiting.join()
    assert answers[0].status_code == 503 and answers[0].json()["error"]["code"] == "engine_died"
    assert int(answers[0].headers["retry-after"]) > 0
    # The backoff alone is longer than this takes.
    for path in ("/ready", "/health"):
        unready = slow.http.get(path)
        assert unready.status_code == 503 and "-9" in unready.json()["error"]["message"]
    refused = slow.http.post("/v1/completions", json=LONG)
    assert refused.status_code == 503 and "retry-after" in refused.headers
    assert slow.http.get("/live").status_code == 200
    eventually(lambda: slow.http.get("/ready").status_code == 200)
    assert slow.engine_pids() != [engine]
    answer = slow.http.post("/v1/completions", json={"prompt": "again", "max_tokens": 5})
    assert answer.json()["choices"][0]["text"] == "again"


def test_sigterm_lets_running_requests_end_and_admits_no_more(slow):
    with stream(slow, max_tokens=60) as response:
        lines = response.iter_lines()
        next_event(lines)
        slow.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 30
        while slow.http.get("/ready").status_code != 503:
            assert time.monotonic() < deadline
        assert "shutting down" in slow.http.get("/ready").json()["error"]["message"]
        refused = slow.http.post("/v1/completions", json=LONG)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
        assert slow.http.get("/health").status_code == 200
        *_, last, done = [line for line in lines if line.startswith("data: ")]
    assert done == "data: [DONE]"
    assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert slow.process.wait(30) == 0
    assert slow.journal.read_text().endswith("close \n")


def test_sigterm_does_not_wait_for_a_request_whose_body_never_comes(launch):
    server = launch({"shutdown_timeout": 600}).wait_ready()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as sock:
        head = "host: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"
        sock.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}".encode())
        assert server.http.get("/live").status_code == 200  # so the server has read what came before
        server.process.send_signal(signal.SIGTERM)
        assert b"shutting_down" in sock.recv(4096)
    assert server.process.wait(30) == 0


def test_more_connections_than_a_shell_allows_files(launch):
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (150, allowed[1]))
    try:
        server = launch()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, allowed)
    server.wait_ready()
    host, port = server.url.removeprefix("http://").split(":")
    with ExitStack() as stack:
        for _ in range(200):
            sock = stack.enter_context(socket.create_connection((host, int(port)), timeout=30))
            sock.sendall(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n")
            assert sock.recv(4096).startswith(b"HTTP/1.1 200")


def test_sigterm_ends_requests_that_outlast_the_timeout(launch):
    server = launch({"shutdown_timeout": 0.2}, FAKE_STEP_SECONDS="0.05").wait_ready()
    with stream(server) as response:
        lines = response.iter_lines()
        next_event(lines)
        server.process.send_signal(signal.SIGTERM)
        *_, failed, _ = [line for line in lines if line.startswith("data: ")]
    assert "shutting down" in json.loads(failed.removeprefix("data: "))["error"]["message"]
    assert server.process.wait(30) == 0


def test_the_second_signal_ends_at_once_and_takes_the_engine_along(slow, eventually):
    with stream(slow) as response:
        next_event(response.iter_lines())
        (engine,) = slow.engine_pids()
        slow.process.send_signal(signal.SIGINT)
        eventually(lambda: slow.http.get("/ready").status_code == 503)
        slow.process.send_signal(signal.SIGINT)
        assert slow.process.wait(30) == 128 + signal.SIGINT
    eventually(lambda: not _alive(engine))


@pytest.mark.parametrize("moment", ["idle", "stopped", "in a step that hangs", "loading"])
def test_the_engine_ends_when_the_http_process_is_killed(launch, tmp_path, eventually, moment):
    journal = tmp_path / "journal"
    journal.touch()
    gate = {"FAKE_GATE": str(tmp_path / "never")} if moment == "loading" else {}
    server = launch(FAKE_JOURNAL=str(journal), **gate)
    if moment != "loading":
        server.wait_ready()
    (engine,) = eventually(server.engine_pids)
    if moment == "stopped":  # and so deaf to the end of its socket
        os.kill(engine, signal.SIGSTOP)
    if moment == "in a step that hangs":
        body = json.dumps({"prompt": "<|tool|>"}).encode()
        host, port = server.url.removeprefix("http://").split(":")
        sock = socket.create_connection((host, int(port)))
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%s" % (len(body), body)
        )
        eventually(lambda: "add " in journal.read_text())
    server.process.kill()
    eventually(lambda: not _alive(engine))


def test_sigterm_during_a_restart_ends_the_requests_that_wait_for_it(launch, tmp_path, eventually):
    gate, journal = tmp_path / "gate", tmp_path / "journal"
    gate.touch(), journal.touch()
    options = {"shutdown_timeout": 0.2, "retry_on_restart": True}
    server = launch(options, FAKE_STEP_SECONDS="0.05", FAKE_GATE=str(gate), FAKE_JOURNAL=str(journal))
    server.wait_ready()
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(server.http.post("/v1/completions", json=LONG)))
    waiting.start()
    eventually(lambda: "add " in journal.read_text())
    gate.unlink()
    (engine,) = server.engine_pids()
    os.kill(engine, signal.SIGKILL)
    (second,) = eventually(lambda: [pid for pid in server.engine_pids() if pid != engine])
    assert server.http.post("/v1/completions", json=LONG).status_code == 503 and not answers
    server.process.send_signal(signal.SIGTERM)
    waiting.join()
    assert answers[0].status_code == 503
    assert "shutting down" in answers[0].json()["error"]["message"]
    assert server.process.wait(30) == 0 and not _alive(second)


def test_requests_that_wait_for_a_restart_that_fails_get_the_reason(launch, tmp_path, eventually):
    gate, journal = tmp_path / "gate", tmp_path / "journal"
    gate.touch(), journal.touch()
    server = launch(
        {"retry_on_restart": True}, FAKE_STEP_SECONDS="0.05", FAKE_GATE=str(gate), FAKE_JOURNAL=str(journal)
    )
    server.wait_ready()
    gate.write_text("the model is gone")
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(server.http.post("/v1/completions", json=LONG)))
    waiting.start()
    eventually(lambda: "add " in journal.read_text())
    os.kill(server.engine_pids()[0], signal.SIGKILL)
    waiting.join()
    assert answers[0].status_code == 503
    assert "the model is gone" in answers[0].json()["error"]["message"]
    assert server.process.wait(30) == 1
    server.stop()
    assert "jaxserve: the model is gone" in server.err


@pytest.mark.parametrize("error", [None, RuntimeError("no more sockets")])
def test_an_http_server_that_ends_by_itself_is_a_failure(model_dir, monkeypatch, capsys, error):
    async def serve(self, sockets):
        await asyncio.sleep(0)
        if error:
            raise error

    class Replica:
        def start(self, config, deliver): ...
        async def close(self): ...

    monkeypatch.setattr(web.Server, "serve", serve)
    assert main.run(ServerConfig(model=str(model_dir), port=0), [Replica()]) == 1
    reason = ": RuntimeError('no more sockets')" if error else ""
    assert capsys.readouterr().err == f"jaxserve: the HTTP server ended by itself{reason}\n"


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_model_that_cannot_load_ends_the_server_with_the_reason(launch):
    server = launch(FAKE_FAILS="told")
    assert server.process.wait(60) == 1
    server.stop()
    assert "jaxserve: the model is broken" in server.err and "Traceback" not in server.err


def test_an_engine_that_crashes_in_every_start_is_given_up(launch):
    server = launch(FAKE_FAILS="crash")
    assert server.process.wait(60) == 1
    server.stop()
    assert "jaxserve: the engine process ended with status 9" in server.err
    assert server.err.count("it is started again") == 2


def test_a_port_in_use_is_one_line(server, model_dir):
    port = int(server.url.rpartition(":")[2])
    done = subprocess.run(
        [sys.executable, "tests/server/fake_server.py", json.dumps({"model": str(model_dir), "port": port})],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr == f"jaxserve: cannot listen on 127.0.0.1:{port}: Address already in use\n"


def test_while_loading_it_listens_and_says_so(launch, tmp_path, eventually):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    gate = tmp_path / "gate"
    server = launch({"port": port}, FAKE_GATE=str(gate))
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}")

    def answer(path):
        try:
            return client.get(path)
        except httpx.TransportError:
            return None

    unready = eventually(lambda: answer("/ready"))
    assert unready.status_code == 503 and "loading" in unready.json()["error"]["message"]
    assert client.get("/live").status_code == 200
    assert client.get("/health").status_code == 503
    refused = client.post("/v1/completions", json=LONG)
    assert refused.status_code == 503 and "loading" in refused.json()["error"]["message"]
    assert client.get("/v1/models").json()["data"][0]["max_model_len"] is None
    gate.touch()
    server.wait_ready()
    assert client.get("/ready").json() == {"status": "ready", "engine": "warm"}


def test_a_signal_while_loading_ends_it(launch, tmp_path, eventually):
    server = launch(FAKE_GATE=str(tmp_path / "never"))
    (engine,) = eventually(server.engine_pids)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0
    assert not _alive(engine)


def test_replicas_share_the_requests(launch, tmp_path):
    server = launch({"mesh": "1x2"}, FAKE_STEP_SECONDS="0.05", FAKE_JOURNAL=str(tmp_path / "{replica}"))
    server.wait_ready()
    server_pids = server.engine_pids()
    assert len(server_pids) == 2
    with stream(server) as one, stream(server) as two:
        next_event(one.iter_lines()), next_event(two.iter_lines())
        added = [(tmp_path / name).read_text().count("add ") for name in "01"]
    assert sum(added) == 2
