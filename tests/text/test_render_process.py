"""The process for a client's own template: what it answers, and what ends it."""

import json
import signal
import subprocess
import sys

CHAT = [{"role": "user", "content": "Hello"}]


def render(template, **options):
    return subprocess.run(
        [sys.executable, "-m", "jaxserve.text.render_process"],
        input=json.dumps([template, {"eos_token": "</s>"}, CHAT, options]),
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_it_gives_the_prompt_or_says_why_not():
    done = render("{{ messages[0].content }}{{ mood }}{{ eos_token }}", chat_template_kwargs={"mood": "é"})
    assert json.loads(done.stdout) == {"text": "Helloé</s>"}
    wrong = json.loads(render("{{ mood }}", documents=[{"text": "x"}]).stdout)
    assert wrong["param"] == "documents" and "documents" in wrong["error"]


def test_processor_time_is_bounded():
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    assert render(endless).returncode in (-signal.SIGKILL, -signal.SIGXCPU)


def test_memory_is_bounded():
    assert "MemoryError" in json.loads(render("{{ 'a' * 10**9 }}").stdout)["error"]


def test_length_is_bounded():
    answer = json.loads(render("{{ 'a' * 10**7 }}").stdout)
    assert answer["param"] == "chat_template" and "characters" in answer["error"]
