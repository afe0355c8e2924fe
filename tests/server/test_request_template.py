"""A client's own chat template: refused unless the server trusts it, and bounded where it does."""

import threading
import time

import pytest

USER = {"role": "user", "content": "Hello"}
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
GREEDY = "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"


@pytest.fixture(scope="module")
def trusting(launch):
    return launch({"trust_request_chat_template": True}).wait_ready()


def rendered(http, **fields):
    return http.post("/v1/chat/completions/render", json={"messages": [USER]} | fields)


def test_without_the_option_it_is_refused(http):
    for path in ("/v1/chat/completions", "/v1/chat/completions/render", "/tokenize"):
        response = http.post(path, json={"messages": [USER], "chat_template": "x"})
        assert response.status_code == 400
        assert "--trust-request-chat-template" in response.json()["error"]["message"]


def test_it_replaces_the_models(trusting):
    template = (
        "{{ eos_token }}{{ messages[0].name }}:{{ messages[0].content }}{{ mood }}"
        "{% for document in documents %}[{{ document.text }}]{% endfor %}"
    )
    fields = {"chat_template": template, "chat_template_kwargs": {"mood": "!"}, "documents": [{"text": "ß"}]}
    answer = rendered(trusting.http, messages=[USER | {"name": "Ann"}], **fields)
    assert answer.json()["prompt"] == "<|end|>Ann:Hello![ß]"
    body = {"messages": [USER], "chat_template": "{{ messages[0].content }}", "max_tokens": 5}
    reply = trusting.http.post("/v1/chat/completions", json=body).json()
    assert reply["choices"][0]["message"]["content"] == "Hello" and reply["usage"]["prompt_tokens"] == 5


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",
        "{{ raise_exception('no') }}",
        "{{ messages[7].content.x }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ 'a' * 10**10 }}",
        "{{ 10 ** (10 ** 10) }}",
        GREEDY,
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ '\\ud800' }}",
    ],
)
def test_what_it_gets_wrong_is_a_400(trusting, template):
    response = rendered(trusting.http, chat_template=template)
    assert response.status_code == 400, response.text[:500]
    assert response.json()["error"]["param"] in ("chat_template", None)


def test_one_without_end_holds_nobody_up(trusting, eventually):
    answers = []
    slow = threading.Thread(target=lambda: answers.append(rendered(trusting.http, chat_template=ENDLESS)))
    slow.start()
    while not answers:
        assert trusting.http.post("/v1/completions", json={"prompt": "ab"}).status_code == 200
        time.sleep(0.05)
    slow.join()
    assert answers[0].status_code == 400 and answers[0].json()["error"]["param"] == "chat_template"
    eventually(lambda: len(trusting.engine_pids()) == 1)  # the engine's process alone


def test_messages_are_blamed_for_themselves(trusting):
    response = rendered(trusting.http, chat_template="x", continue_final_message=True)
    assert response.json()["error"]["param"] == "messages"
