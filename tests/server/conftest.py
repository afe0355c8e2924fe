import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

HERE = Path(__file__).parent


class Server:
    """A server in a process of its own, on a free port."""

    def __init__(self, command: list[str], config: dict, env: dict[str, str]):
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"} | env,
        )
        self.key = (config.get("api_key") or ["none"])[0]

    def wait_ready(self) -> "Server":
        line = self.process.stdout.readline()
        assert "listens on" in line, self.process.communicate()
        self.line = line
        self.url = next(word for word in line.split() if word.startswith("http://"))
        headers = {"authorization": f"Bearer {self.key}"}
        self.http = httpx.Client(base_url=self.url, headers=headers, timeout=60)
        return self

    def engine_pids(self) -> list[int]:
        pid = self.process.pid
        return [int(pid) for pid in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            self.out, self.err = self.process.communicate(timeout=60)
        finally:
            self.process.kill()
        return self.process.returncode


@pytest.fixture(scope="session")
def launch(model_dir):
    """Starts servers with the fake core; ends them with the session."""
    servers: list[Server] = []

    def start(config: dict | None = None, **env: str) -> Server:
        config = {"model": str(model_dir), "port": 0} | (config or {})
        servers.append(Server([str(HERE / "fake_server.py"), json.dumps(config)], config, env))
        return servers[-1]

    yield start
    for server in servers:
        server.stop(signal.SIGKILL)


@pytest.fixture(scope="session")
def start_real(model_dir):
    """start_real(*options): a tiny Llama served, nothing faked; it ends with the session."""
    servers: list[Server] = []

    def start(*options: str) -> Server:
        command = ["-m", "jaxserve", "serve", str(model_dir), "--port", "0", "--dtype", "float32"]
        servers.append(Server([*command, *options], {}, {}))
        return servers[-1].wait_ready()

    yield start
    for server in servers:
        server.stop(signal.SIGKILL)


@pytest.fixture(scope="session")
def real_server(start_real):
    return start_real("--max-num-seqs", "8")


@pytest.fixture(scope="session")
def journal(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("journal") / "journal"
    path.touch()
    return path


@pytest.fixture(scope="session")
def server(launch, journal) -> Server:
    """The server that most tests share."""
    config = {"served_model_name": ["tiny", "also-tiny"], "max_body_size": 200_000}
    return launch(config, FAKE_STEP_SECONDS="0.002", FAKE_JOURNAL=str(journal)).wait_ready()


@pytest.fixture
def http(server) -> httpx.Client:
    return server.http


@pytest.fixture(scope="session")
def eventually():
    def wait(condition, seconds: float = 30.0):
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, "it never happened"
            time.sleep(0.02)
        return value

    return wait
