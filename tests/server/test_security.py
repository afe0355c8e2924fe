"""API keys and browsers' origins."""

import httpx
import openai
import pytest

BODY = {"prompt": "a", "max_tokens": 1}


@pytest.fixture(scope="module")
def locked(launch):
    """Needs a key, and lets two origins in."""
    config = {"api_key": ["first", "zweiter-schlüssel"], "allowed_origins": ["https://a.example"]}
    return launch(config).wait_ready()


@pytest.fixture
def stranger(locked):
    with httpx.Client(base_url=locked.url) as client:
        yield client


@pytest.mark.parametrize("path", ["/health", "/live", "/ready", "/ping"])
def test_probes_are_open(stranger, path):
    assert stranger.get(path).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/models", "/v1/models/x", "/version", "/nowhere", "/metrics", "/health/"),
        *("/tokenize", "/detokenize", "/tokenizer_info", "/v1/chat/completions/render"),
    ],
)
def test_all_else_needs_a_key(stranger, path):
    response = stranger.get(path)
    assert response.status_code == 401
    error = response.json()["error"]
    assert error["code"] == "invalid_api_key" and error["type"] == "invalid_request_error"
    assert response.headers["www-authenticate"] == "Bearer" and response.headers["x-request-id"]


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer"},
        {"authorization": "first"},
        {"authorization": "Basic first"},
        {"x-api-key": "firs"},
        {"x-api-key": ""},
        {"x-api-key": b"\xff\xfe"},
    ],
)
def test_a_wrong_key_is_refused(stranger, headers):
    assert stranger.post("/v1/completions", json=BODY, headers=headers).status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer first"},
        {"authorization": "bearer first"},
        {"x-api-key": "first"},
        {"x-api-key": "zweiter-schlüssel".encode()},
    ],
)
def test_each_key_is_let_in_either_way(stranger, headers):
    assert stranger.post("/v1/completions", json=BODY, headers=headers).status_code == 200


def test_openai_client_with_a_wrong_key(locked):
    client = openai.OpenAI(base_url=f"{locked.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_cors_preflight_needs_no_key(stranger):
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    allowed = stranger.options("/v1/completions", headers={"origin": "https://a.example"} | asked)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://a.example"
    other = stranger.options("/v1/completions", headers={"origin": "https://b.example"} | asked)
    assert "access-control-allow-origin" not in other.headers


def test_a_browser_may_read_answers_and_errors(stranger):
    for headers, status in (({"x-api-key": "first"}, 200), ({}, 401)):
        response = stranger.get("/v1/models", headers={"origin": "https://a.example"} | headers)
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == "https://a.example"


def test_cors_is_off_by_default(http):
    response = http.get("/v1/models", headers={"origin": "https://a.example"})
    assert "access-control-allow-origin" not in response.headers


def test_an_empty_key_is_no_key(launch):
    server = launch({"api_key": [""]})
    assert server.process.wait(60) == 1
    server.stop()
    assert server.err == "jaxserve: api_key must not be empty\n"
