"""The same prompts as transformers renders, over templates with what published ones use."""

import re

import pytest

from jaxserve.errors import InvalidRequest, ModelError
from jaxserve.text.chat_template import ChatTemplate
from jaxserve.text.tokenizer import Tokenizer

NAMED = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = """
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

HEADERS = """{{- bos_token }}
{%- set ns = namespace(system='', first=true) %}
{%- if messages[0]['role'] == 'system' %}
    {%- set ns.system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- if ns.system or tools is not none %}
    {{- '<|start|>system<|end|>\\n\\n' + ns.system }}
    {%- if tools is not none %}
        {{- '\\nYou may call:\\n' }}
        {%- for tool in tools %}{{ tool | tojson(indent=4) }}{{ '\\n\\n' }}{% endfor %}
    {%- endif %}
    {{- '<|eot|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.tool_calls is defined and message.tool_calls %}
        {%- for call in message.tool_calls %}
            {{- '<call>' + call.function.name + ' ' + call.function.arguments | tojson + '</call>' }}
        {%- endfor %}
        {%- continue %}
    {%- endif %}
    {{- '<|start|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|end|>\\n\\n' }}
{%- endif %}"""

ALTERNATING = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{ raise_exception('roles must alternate user/assistant') }}
{% endif %}
{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]
{% else %}{% generation %} {{ message['content'] }}{{ eos_token }}{% endgeneration %}
{% endif %}
{% endfor %}"""

PARTS = """{% macro show(content) %}
{%- if content is string %}{{ content }}{% else %}
{%- for item in content %}{% if item['type'] == 'text' %}{{ item['text'] }}|{% endif %}{% endfor %}
{%- endif %}{% endmacro %}
{%- for message in messages %}{{ message.role }}: {{ show(message.content) }}
{% if loop.last %}{% break %}{% endif %}{% endfor %}
{%- for document in documents or [] %}[{{ document.title }}]{% endfor %}
{%- if enable_thinking is defined and not enable_thinking %}<nothink>{% endif %}"""

TEMPLATES = {"chatml": CHATML, "headers": HEADERS, "alternating": ALTERNATING, "parts": PARTS}
TOOL = {
    "type": "function",
    "function": {
        "name": "wetter",
        "description": 'Größe & <"Grad">',
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
USER = {"role": "user", "content": " Hi <there> & you, \n"}
CHATS = {
    "one": [USER],
    "three": [USER, {"role": "assistant", "content": "Hello. "}, {"role": "user", "content": "日本 🎉"}],
    "answered": [USER, {"role": "assistant", "content": "The answer is "}],
}


def theirs(template, messages, **options):
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template([messages], chat_template=template, **NAMED, **options)
    return rendered[0]


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize(("name", "tools"), [*((name, None) for name in TEMPLATES), ("headers", [TOOL])])
def test_as_transformers(name, chat, tools, prompt):
    ours = ChatTemplate(TEMPLATES[name], NAMED).render(CHATS[chat], tools=tools, add_generation_prompt=prompt)
    assert ours == theirs(TEMPLATES[name], CHATS[chat], tools=tools, add_generation_prompt=prompt)


def test_system_message_and_tool_calls():
    call = {"type": "function", "function": {"name": "wetter", "arguments": {"city": "Köln"}}}
    chat = [
        {"role": "system", "content": " Be brief. "},
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "12"},
    ]
    ours = ChatTemplate(HEADERS, NAMED).render(chat, tools=[TOOL])
    assert ours == theirs(HEADERS, chat, tools=[TOOL], add_generation_prompt=True)
    assert '<call>wetter {"city": "Köln"}</call>' in ours


def test_documents_and_other_variables():
    documents, variables = [{"title": "T", "text": "x"}], {"enable_thinking": False}
    ours = ChatTemplate(PARTS, NAMED).render([USER], documents=documents, chat_template_kwargs=variables)
    assert ours == theirs(PARTS, [USER], documents=documents, add_generation_prompt=True, **variables)
    assert ours.endswith("[T]<nothink>")


@pytest.mark.parametrize("content", ["The answer is", "The answer is ", " The answer"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_continuing_the_last_message(name, content):
    chat = [USER, {"role": "assistant", "content": content}]
    ours = ChatTemplate(TEMPLATES[name], NAMED).render(
        chat, add_generation_prompt=False, continue_final_message=True
    )
    assert ours == theirs(TEMPLATES[name], chat, continue_final_message=True)
    assert ours.endswith(content.strip()) or ours.endswith(content)
    assert chat[-1]["content"] == content  # the caller's messages stay as they are


def test_continuing_needs_a_message_that_is_shown():
    with pytest.raises(InvalidRequest) as error:
        ChatTemplate(CHATML, NAMED).render([USER], continue_final_message=True)
    assert error.value.param == "continue_final_message"
    with pytest.raises(InvalidRequest, match="leaves out") as error:
        ChatTemplate("nothing", NAMED).render(
            [USER], add_generation_prompt=False, continue_final_message=True
        )
    assert error.value.param == "messages"


def test_parts_are_joined_unless_the_template_walks_over_them():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    chat = [{"role": "user", "content": parts}]
    assert "user\none\ntwo<|im_end|>" in ChatTemplate(CHATML, NAMED).render(chat)
    assert ChatTemplate(PARTS, NAMED).render(chat) == "user: one|two|\n"
    continued = ChatTemplate(PARTS, NAMED).render(
        chat, add_generation_prompt=False, continue_final_message=True
    )
    assert continued == "user: one|two"


ALIASED = """{%- macro show(message) %}{% set c = message.get('content') %}
{%- if c is string %}{{ c }}{% else %}{% for part in c %}<{{ part.text }}>{% endfor %}{% endif %}
{%- endmacro %}
{%- for message in messages %}{{ message.role }}: {{ show(message) }}{% endfor %}"""


def test_parts_walked_over_under_another_name():
    chat = [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]
    assert ChatTemplate(ALIASED, NAMED).render(chat) == theirs(ALIASED, chat) == "user: <one><two>"


REASONING = """{% for message in messages %}
{%- if message.reasoning_content is defined %}<think>{{ message.reasoning_content }}</think>{% endif %}
{%- if message.thinking is defined %}<{{ message.thinking }}>{% endif %}
{{- message.content }}{% if message.name is defined %} ({{ message.name }}){% endif %}{% endfor %}"""


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_under_all_its_names(field):
    chat = [USER | {"name": "Ann"}, {"role": "assistant", "content": "Yes", field: "so"}]
    ours = ChatTemplate(REASONING, NAMED).render(chat)
    assert ours == theirs(REASONING, chat) and ours.endswith("(Ann)<think>so</think><so>Yes")


def test_developer_is_system_where_the_template_knows_no_developer():
    chat = [{"role": "developer", "content": "Be brief."}, USER]
    system = [{"role": "system", "content": "Be brief."}, USER]
    assert ChatTemplate(HEADERS, NAMED).render(chat) == ChatTemplate(HEADERS, NAMED).render(system)
    knows = "{% for m in messages %}{{ m.role }}{% if m.role == 'developer' %}!{% endif %}{% endfor %}"
    assert ChatTemplate(knows, NAMED).render(chat) == theirs(knows, chat) == "developer!user"


def test_refusals_are_text():
    refused = {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}
    assert "assistant\nno<|im_end|>" in ChatTemplate(CHATML, NAMED).render([USER, refused])
    assert "assistant: no|" in ChatTemplate(PARTS, NAMED).render([USER, refused])
    said = {"role": "assistant", "content": None, "refusal": "no"}
    assert "assistant\nno<|im_end|>" in ChatTemplate(CHATML, NAMED).render([USER, said])


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"documents": [{"text": "x"}]}, "documents"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs.enable_thinking"),
        ({"chat_template_kwargs": {"message": 1}}, "chat_template_kwargs.message"),
        ({"chat_template_kwargs": {"range": 1}}, "chat_template_kwargs.range"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools"),
    ],
)
def test_what_the_template_has_no_place_for_is_named(options, param):
    with pytest.raises(InvalidRequest) as error:
        ChatTemplate(CHATML, NAMED).render([USER], **options)
    assert error.value.param == param


def test_variables_with_a_default_of_the_templates_own():
    template = "{% if not date is defined %}{% set date = 'today' %}{% endif %}{{ date }}{{ eos_token }}"
    render = ChatTemplate(template, NAMED).render
    assert render([USER]) == theirs(template, [USER]) == "today</s>"
    options = {"date": "Monday", "eos_token": "."}
    assert render([USER], chat_template_kwargs=options) == "Monday."


def test_a_requests_own_template_is_its_own_fault():
    for template in ("{% if %}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}"):
        with pytest.raises(InvalidRequest) as error:
            ChatTemplate(template, NAMED, given=True).render([USER])
        assert error.value.param == "chat_template"


def test_an_assistant_may_have_no_content():
    chat = [USER, {"role": "assistant", "content": None}, {"role": "assistant"}, USER]
    text = ChatTemplate(CHATML, NAMED).render(chat)
    assert text.count("<|im_start|>assistant\n<|im_end|>") == 2


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        (["x"], "messages[0]"),
        ([{"content": "x"}], "messages[0].role"),
        ([USER, {"role": 3, "content": "x"}], "messages[1].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "messages[0].content[0].text"),
    ],
)
def test_wrong_messages_are_named(messages, param):
    with pytest.raises(InvalidRequest) as error:
        ChatTemplate(CHATML, NAMED).render(messages)
    assert error.value.param == param
    assert param in str(error.value)


def test_what_the_template_refuses():
    with pytest.raises(InvalidRequest, match="roles must alternate") as error:
        ChatTemplate(ALTERNATING, NAMED).render([USER, USER])
    assert error.value.param == "messages"
    with pytest.raises(InvalidRequest) as error:
        ChatTemplate("{{ messages[7].content.x }}", NAMED).render([USER])
    assert error.value.param == "messages"


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_the_sandbox_holds(attack):
    with pytest.raises(InvalidRequest):
        ChatTemplate(attack, NAMED).render([USER])


def test_a_broken_template_is_the_models_fault():
    with pytest.raises(ModelError, match="line 2"):
        ChatTemplate("ok\n{% if %}", NAMED).render([USER])


def test_dates():
    text = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}", NAMED).render([USER])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", text)


def test_no_template(byte_level_tokenizer):
    with pytest.raises(InvalidRequest, match="--chat-template"):
        byte_level_tokenizer.render_chat([USER])


def test_special_tokens_come_from_the_template_only(byte_level_tokenizer):
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    tokenizer = Tokenizer(byte_level_tokenizer.backend, NAMED, chat_template=template)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "the"}])
    assert ids == [0, *tokenizer.encode("the"), 1]


CALL = {"id": "1", "type": "function", "function": {"name": "wetter", "arguments": '{"city": "Köln"}'}}
ROUND = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL, CALL | {"id": "2"}]},
    {"role": "tool", "tool_call_id": "1", "content": "12"},
    {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "13"}]},
]
WRITTEN = '<tool_call>\n{"name": "wetter", "arguments": {"city": "Köln"}}\n</tool_call>'


def test_arguments_are_an_object_for_templates():
    ours = ChatTemplate(HEADERS, NAMED).render(ROUND, tools=[TOOL])
    call = {"type": "function", "function": {"name": "wetter", "arguments": {"city": "Köln"}}}
    parsed = [USER, {"role": "assistant", "content": "", "tool_calls": [call] * 2}]
    parsed += [{"role": "tool", "content": "12"}, {"role": "tool", "content": "13"}]
    assert ours == theirs(HEADERS, parsed, tools=[TOOL], add_generation_prompt=True)


@pytest.mark.parametrize("arguments", ["", "{}", "{", "3", {}, None])
def test_whatever_a_model_wrote_can_be_sent_back(arguments):
    call = CALL | {"function": {"name": "wetter", "arguments": arguments}}
    ours = ChatTemplate(HEADERS, NAMED).render([USER, {"role": "assistant", "tool_calls": [call]}])
    shown = f'"{arguments}"' if arguments in ("{", "3") else "{}"
    assert f"<call>wetter {shown}</call>" in ours


@pytest.mark.parametrize("name", ["chatml", "alternating", "parts"])
def test_tools_of_templates_without_a_place_for_them(name):
    """Without a system message they are the user's; nothing of the conversation is left out."""
    ours = ChatTemplate(TEMPLATES[name], NAMED).render(ROUND, tools=[TOOL])
    assert ours.index("# Tools") < ours.index('{"type": "function", "function": {"name": "wetter"')
    assert ours.index("</tool_call>") < ours.index("Hi <there>") < ours.index(f"{WRITTEN}\n{WRITTEN}")
    answers = "<tool_response>\n12\n</tool_response>\n<tool_response>\n13\n</tool_response>"
    assert ours.index(WRITTEN) < ours.index(answers)
    untold = ChatTemplate(TEMPLATES[name], NAMED).render(ROUND)
    assert "# Tools" not in untold and untold.index(WRITTEN) < untold.index(answers)


def test_the_preamble_follows_the_system_message():
    chat = [{"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "Well, "}]
    options = {"tools": [TOOL], "add_generation_prompt": False, "continue_final_message": True}
    ours = ChatTemplate(CHATML, NAMED).render(chat, **options)
    assert ours.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n")
    assert ours.endswith("</tool_call><|im_end|>\n<|im_start|>assistant\nWell, ")


def test_a_template_that_shows_nothing_of_the_tools_is_refused():
    with pytest.raises(InvalidRequest) as error:
        ChatTemplate("Hi", NAMED).render([USER], tools=[TOOL])
    assert error.value.param == "tools"


def test_a_call_has_no_content_where_the_template_asks_for_that():
    """As DeepSeek V3's does."""
    source = (
        "{% for m in messages %}{% if m['content'] is none %}{{ m.tool_calls[0].id }}{% endif %}{% endfor %}"
    )
    assert ChatTemplate(source, NAMED).render(ROUND[:2]) == "1"


def test_an_answer_is_named_after_its_call():
    source = "{% for m in messages %}{{ m.name }}{% endfor %}{# tool_calls #}"
    assert ChatTemplate(source, NAMED).render(ROUND) == "wetter" * 2


@pytest.mark.parametrize(
    ("calls", "param"),
    [
        ({}, None),
        (3, "messages[0].tool_calls"),
        ([3], "messages[0].tool_calls[0].function"),
        ([{"function": {"name": 3}}], "messages[0].tool_calls[0].function"),
    ],
)
def test_calls_that_are_none(calls, param):
    chat = [{"role": "assistant", "content": "a", "tool_calls": calls}]
    if param is None:
        assert ChatTemplate(CHATML, NAMED).render(chat) == ChatTemplate(CHATML, NAMED).render(
            [{"role": "assistant", "content": "a"}]
        )
        return
    with pytest.raises(InvalidRequest) as error:
        ChatTemplate(CHATML, NAMED).render(chat)
    assert error.value.param == param
