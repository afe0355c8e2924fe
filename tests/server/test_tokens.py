"""`/tokenize`, `/detokenize`, `/tokenizer_info` and `/v1/chat/completions/render`."""

import json

import pytest

USER = {"role": "user", "content": "Hé"}


def post(http, path, **body):
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_tokens_of_a_text_and_back(http):
    answer = post(http, "/tokenize", prompt="Hé<|end|>", model="tiny")
    assert answer == {"count": 4, "max_model_len": 512, "tokens": answer["tokens"], "token_strs": None}
    assert answer["tokens"][-1] == 0
    assert post(http, "/detokenize", tokens=answer["tokens"]) == {"prompt": "Hé<|end|>"}
    assert post(http, "/tokenize", prompt="Hé<|end|>", messages=None) == answer
    assert post(http, "/detokenize", tokens=[]) == {"prompt": ""}


def test_tokens_of_a_chat_are_those_of_its_rendering(http):
    rendered = post(http, "/v1/chat/completions/render", messages=[USER])
    assert rendered["prompt"] == "<|user|>Hé<|end|><|assistant|>"
    answer = post(http, "/tokenize", messages=[USER], return_token_strs=True)
    assert answer["tokens"] == rendered["prompt_token_ids"] and answer["count"] == 6
    assert answer["token_strs"] == ["<|user|>", "H", "Ã", "©", "<|end|>", "<|assistant|>"]
    shorter = post(http, "/tokenize", messages=[USER], add_generation_prompt=False)
    assert shorter["tokens"] == answer["tokens"][:-1]


def test_many_tokens(http):
    answer = post(http, "/tokenize", prompt="ab" * 10_000, return_token_strs=True)
    assert answer["count"] == 20_000 and answer["token_strs"] == ["a", "b"] * 10_000
    assert post(http, "/detokenize", tokens=answer["tokens"])["prompt"] == "ab" * 10_000


def test_tokenizer_info(http):
    info = http.get("/tokenizer_info").json()
    assert info["eos_token"] == "<|end|>" and "message.content" in info["chat_template"]
    assert info["tokenizer_class"] and info["model_max_length"] == 512
    end = {"content": "<|end|>", "special": True, "lstrip": False, "rstrip": False, "single_word": False}
    assert end.items() <= info["added_tokens_decoder"]["0"].items()


@pytest.fixture(scope="module")
def begins(launch, model_dir, tmp_path_factory):
    """A server whose tokenizer puts `<|system|>` before a text."""
    path = tmp_path_factory.mktemp("begins")
    (path / "tokenizer_config.json").write_text((model_dir / "tokenizer_config.json").read_text())
    backend = json.loads((model_dir / "tokenizer.json").read_text())
    first = {"SpecialToken": {"id": "<|system|>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    backend["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text],
        "special_tokens": {"<|system|>": {"id": "<|system|>", "ids": [1], "tokens": ["<|system|>"]}},
    }
    (path / "tokenizer.json").write_text(json.dumps(backend))
    return launch({"tokenizer": str(path)}).wait_ready()


@pytest.mark.parametrize(
    ("path", "prompt", "by_default"),
    [
        ("/tokenize", {"prompt": "a"}, True),
        ("/tokenize", {"messages": [USER]}, False),
        ("/v1/completions", {"prompt": "a"}, True),
        ("/v1/completions", {"prompt": "a", "echo": True, "max_tokens": 0}, True),
        ("/v1/chat/completions", {"messages": [USER]}, False),
        ("/v1/chat/completions/render", {"messages": [USER]}, False),
    ],
    ids=str,
)
def test_special_tokens(begins, path, prompt, by_default):
    asked = prompt if path == "/tokenize" else {"max_tokens": 1, "return_token_ids": True} | prompt

    def tokens(**options):
        answer = post(begins.http, path, **asked, **options)
        return (
            answer.get("tokens") or answer.get("prompt_token_ids") or answer["choices"][0]["prompt_token_ids"]
        )

    plain, special = tokens(add_special_tokens=False), tokens(add_special_tokens=True)
    assert special == [1, *plain]
    assert tokens() == (special if by_default else plain)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [USER]}, "prompt"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {"prompt": None}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "documents": []}, "documents"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages[0].content"),
        ("/tokenize", {"messages": [USER], "chat_template": "x"}, "chat_template"),
        ("/tokenize", {"messages": [USER], "temperature": 1}, "temperature"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [1, 288]}, "tokens[1]"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [2**70]}, "tokens[0]"),
        ("/detokenize", {"tokens": [True]}, "tokens[0]"),
        ("/detokenize", {"tokens": [*[1] * 5000, 10**9]}, "tokens[5000]"),
        ("/detokenize", {"tokens": [1], "skip": True}, "skip"),
        ("/v1/chat/completions/render", {"prompt": "a"}, "messages"),
        ("/v1/chat/completions/render", {"messages": [USER], "prompt": "a"}, "prompt"),
    ],
    ids=str,
)
def test_bad_requests(http, path, body, param):
    response = http.post(path, json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_another_model_is_a_404(http):
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        assert http.post(path, json=body | {"model": "other"}).status_code == 404
