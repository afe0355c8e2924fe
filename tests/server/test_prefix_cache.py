"""The prefix cache over HTTP: reported, kept apart by key and salt, forgotten on demand."""

import signal

import httpx
import pytest

from .conftest import Server


@pytest.fixture(scope="module")
def start(model_dir):
    servers = []

    def start(*flags: str) -> Server:
        command = ["-m", "jaxserve", "serve", str(model_dir), "--port", "0", "--max-num-seqs", "4"]
        command += ["--block-size", "8", "--api-key", "one", "--api-key", "two", *flags]
        servers.append(Server(command, {"api_key": ["one"]}, {}))
        return servers[-1].wait_ready()

    yield start
    for server in servers:
        server.stop(signal.SIGKILL)


def cached(server: Server, key: str = "one", prompt: int = 9, **fields) -> int:
    body = {"prompt": [prompt] * 20, "max_tokens": 2} | fields
    headers = {"authorization": f"Bearer {key}"}
    response = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_a_key_and_a_salt_have_caches_of_their_own(start):
    server = start()
    assert [cached(server), cached(server)] == [0, 16]
    assert [cached(server, "two"), cached(server, "two")] == [0, 16]
    assert [cached(server, cache_salt="mine"), cached(server, cache_salt="mine")] == [0, 16]
    assert server.http.post("/reset_prefix_cache").status_code == 200
    assert cached(server) == 0
    assert httpx.post(f"{server.url}/reset_prefix_cache").status_code == 401


def test_one_cache_for_all_keys_if_asked_for(start):
    server = start("--share-prefix-cache")
    assert [cached(server), cached(server, "two")] == [0, 16]
    assert cached(server, "two", cache_salt="mine") == 0
