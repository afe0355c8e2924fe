"""`Engine.chat`: the chat template's prompt, as HTTP renders it."""

import json

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.errors import InvalidRequest

USER = {"role": "user", "content": "Hi"}
STARTED = {"role": "assistant", "content": "Well, "}
GREEDY = SamplingParams(temperature=0.0, max_tokens=4)


@pytest.fixture(scope="module")
def engine(make_engine):
    return make_engine()


def test_one_conversation_is_its_rendered_prompt(engine):
    (answer,) = engine.chat([USER], GREEDY)
    assert answer.prompt == "<|user|>Hi<|end|><|assistant|>"
    assert answer.prompt_token_ids == engine.tokenizer.encode(answer.prompt, add_special_tokens=False)
    (plain,) = engine.generate(answer.prompt, GREEDY)
    assert answer.outputs[0].token_ids == plain.outputs[0].token_ids


def test_a_list_keeps_its_order_and_its_params(engine):
    params = [SamplingParams(temperature=0.0, max_tokens=count) for count in (3, 1, 2)]
    chats = [[{"role": "user", "content": text}] for text in "abc"]
    answers = engine.chat(chats, params)
    assert [answer.prompt for answer in answers] == [f"<|user|>{c}<|end|><|assistant|>" for c in "abc"]
    assert all(len(a.outputs[0].token_ids) <= p.max_tokens for a, p in zip(answers, params, strict=True))
    assert engine.chat([chats[1]], GREEDY)[0].prompt == answers[1].prompt


@pytest.mark.parametrize(
    ("options", "prompt"),
    [
        ({"continue_final_message": True}, "<|user|>Hi<|end|><|assistant|>Well, "),
        ({"add_generation_prompt": False}, "<|user|>Hi<|end|><|assistant|>Well, <|end|>"),
        (
            {"chat_template": "{{ messages[0].content }}{{ mood }}", "chat_template_kwargs": {"mood": "!"}},
            "Hi!",
        ),
        ({"chat_template": "{{ documents[0].text }}", "documents": [{"text": "d"}]}, "d"),
    ],
    ids=["continue", "no generation prompt", "template", "documents"],
)
def test_options(engine, options, prompt):
    assert engine.chat([USER, STARTED], GREEDY, use_progress=False, **options)[0].prompt == prompt


def test_without_params_it_may_take_the_rest_of_the_context(engine):
    (answer,) = engine.chat([{"role": "user", "content": "x" * 490}])
    assert answer.outputs[0].finish_reason == "stop" or len(answer.outputs[0].token_ids) == 512 - 493


@pytest.mark.parametrize(
    ("messages", "options", "param"),
    [
        ([], {}, "messages"),
        ([{"role": "user"}], {}, "messages[0].content"),
        ([[USER], [{"role": "user", "content": 3}]], {}, "messages[1][0].content"),
        ([[USER], []], {}, "messages[1]"),
        ([USER], {"documents": [{"text": "d"}]}, "documents"),
        ([USER], {"chat_template": "{% if"}, "chat_template"),
        ([USER], {"chat_template_kwargs": {"mod": 1}}, "chat_template_kwargs.mod"),
        (
            [USER],
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
        ([{"role": "user", "content": "x" * 600}], {}, "messages"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named_before_anything_runs(engine, messages, options, param):
    with pytest.raises(InvalidRequest) as error:
        engine.chat(messages, **options)
    assert error.value.param == param
    assert not engine.has_unfinished()


def test_params_are_one_or_one_each(engine):
    with pytest.raises(InvalidRequest, match="1 prompts but 2"):
        engine.chat([USER], [GREEDY, GREEDY])


def test_llm_chat_takes_vllms_names(model_dir):
    options = {"dtype": "float32", "max_num_seqs": 2, "max_num_batched_tokens": 64, "num_blocks": 32}
    with LLM(model=str(model_dir), **options) as llm:
        (answer,) = llm.chat([USER], sampling_params=GREEDY, use_tqdm=False, add_generation_prompt=True)
    assert answer.prompt == "<|user|>Hi<|end|><|assistant|>"


TOOL = {"type": "function", "function": {"name": "clock"}}


def test_tools_are_in_the_prompt_and_outputs_are_messages(make_engine):
    template = "{{ tools[0].function.name if tools else '' }}|{{ messages[0].content }}"
    with make_engine(reasoning_parser="deepseek_r1") as engine:
        options = {"chat_template": template, "use_progress": False}
        (answer,) = engine.chat([USER], GREEDY, tools=[TOOL], **options)
        assert answer.prompt == "clock|Hi"
        (sequence,) = answer.outputs
        # it never ends to think
        assert sequence.message.reasoning == sequence.text.lstrip() and sequence.message.content == ""
        assert sequence.message.tool_calls == [] and sequence.reasoning_tokens > 0
        assert engine.chat([USER], GREEDY, tools=[TOOL], tool_choice="none", **options)[0].prompt == "|Hi"
        (plain,) = engine.generate("Hi", GREEDY, use_progress=False)
        assert plain.outputs[0].events is None and plain.outputs[0].message.content == plain.outputs[0].text


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tools": [{}]}, "tools[0].type"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
def test_wrong_tools_are_named(engine, options, param):
    with pytest.raises(InvalidRequest) as error:
        engine.chat([USER], **options)
    assert error.value.param == param


MOVE = {
    "type": "function",
    "function": {
        "name": "move",
        "parameters": {"properties": {"to": {"enum": ["left", "right"]}}, "required": ["to"]},
    },
}


def test_a_call_that_must_come_is_one_whatever_the_model(engine):
    options = {"chat_template": "{{ tools[0].function.name }}?", "use_progress": False}
    params = SamplingParams(n=4, seed=1, max_tokens=200)
    named = {"type": "function", "function": {"name": "move"}}
    for choice in ("required", named):
        (answer,) = engine.chat(
            [USER], params, tools=[MOVE], tool_choice=choice, parallel_tool_calls=False, **options
        )
        for output in answer.outputs:
            (call,) = output.message.tool_calls
            assert call.name == "move" and json.loads(call.arguments)["to"] in ("left", "right")
            assert output.finish_reason == "stop" and output.message.content == ""


def test_params_of_a_chat_keep_their_form_behind_thoughts(make_engine):
    with make_engine(reasoning_parser="qwen3") as engine:
        params = SamplingParams(max_tokens=50, structured_outputs={"choice": ["yes", "no"]})
        options = {"chat_template": "Hm</think>", "use_progress": False}
        (answer,) = engine.chat([USER], params, **options)
        assert answer.outputs[0].message.content in ("yes", "no")


@pytest.fixture(scope="module")
def thinker(make_engine, model_dir, tmp_path_factory):
    """A model with `<think>` (4) and `</think>` (5)."""
    path = tmp_path_factory.mktemp("thinker")
    for file in model_dir.iterdir():
        text = file.read_bytes().replace(b"<|tool|>", b"<think>").replace(b"<|fails|>", b"</think>")
        (path / file.name).write_bytes(text)
    with make_engine(model=str(path), reasoning_parser="deepseek_r1") as engine:
        yield engine


def test_thoughts_end_after_their_budget(thinker):
    params = [
        SamplingParams(seed=i, max_tokens=40, ignore_eos=True, thinking_token_budget=budget)
        for i, budget in enumerate((0, 1, 7, 30, 100))
    ]
    answers = thinker.chat([[USER]] * len(params), params, use_progress=False)
    for answer, wanted in zip(answers, params, strict=True):
        (output,) = answer.outputs
        ends = [i for i, token in enumerate(output.token_ids) if token == 5]
        if wanted.thinking_token_budget < 40:
            assert ends and ends[0] <= wanted.thinking_token_budget
            assert output.reasoning_tokens == ends[0]
    assert answers[2].outputs[0].token_ids[7] == 5
    # those before are the ones that came without
    (free,) = thinker.chat([USER], SamplingParams(seed=2, max_tokens=40, ignore_eos=True), use_progress=False)
    assert free.outputs[0].token_ids[:7] == answers[2].outputs[0].token_ids[:7]
    off = "<think></think>"
    params = SamplingParams(seed=2, max_tokens=5, ignore_eos=True, thinking_token_budget=0)
    (answer,) = thinker.chat([USER], params, chat_template=off, use_progress=False)
    assert answer.outputs[0].token_ids[0] != 5


def test_content_that_goes_on_is_content(thinker):
    params = SamplingParams(seed=2, max_tokens=9, ignore_eos=True, thinking_token_budget=2)
    options = {"continue_final_message": True, "use_progress": False}
    (answer,) = thinker.chat([USER, STARTED], params, **options)
    message = answer.outputs[0].message
    assert message.reasoning == "" and message.content == answer.outputs[0].text
    thinking = {"role": "assistant", "content": "<think>Well, "}
    (answer,) = thinker.chat([USER, thinking], params, **options)
    assert answer.outputs[0].message.reasoning and answer.outputs[0].token_ids[2] == 5


def test_thoughts_a_budget_and_a_call_that_must_come(thinker):
    params = SamplingParams(n=3, seed=1, max_tokens=200, thinking_token_budget=5)
    options = {"chat_template": "{{ tools[0].function.name }}?", "use_progress": False}
    (answer,) = thinker.chat(
        [USER], params, tools=[MOVE], tool_choice="required", parallel_tool_calls=False, **options
    )
    for output in answer.outputs:
        (call,) = output.message.tool_calls
        assert json.loads(call.arguments)["to"] in ("left", "right")
        # a grammar lets no character be cut, and here a token is a byte
        assert output.reasoning_tokens <= 5 + 3 and output.finish_reason == "stop"
