"""The command line as a user meets it: help without heavy imports, errors in one line."""

import json
import subprocess
import sys

import pytest

from jaxserve.cli import main
from jaxserve.cli.main import COMMANDS

HEAVY = ("jax", "flax", "numpy", "transformers", "tokenizers", "starlette", "uvicorn", "rich", "gguf")


def run(capsys, *argv):
    """Exit code, stdout and stderr of one call."""
    try:
        code = main(list(argv))
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=lambda c: c[0] if c else "top")
def test_help_imports_nothing_heavy(command):
    code = (
        "import json, sys\n"
        "from jaxserve.cli import main\n"
        f"try: main({[*command, '--help']!r})\n"
        "except SystemExit as end: code = end.code\n"
        f"print(json.dumps([code, [m for m in {HEAVY!r} if m in sys.modules], len(sys.modules)]))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    code, heavy, modules = json.loads(out.splitlines()[-1])
    assert (code, heavy) == (0, [])
    assert modules < 300
    assert "usage: jaxserve" in out


def test_every_command_is_listed(capsys):
    _, out, _ = run(capsys, "--help")
    assert all(f"  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        ([], 2, "COMMAND"),
        (["srve"], 2, "srve"),
        (["serve", "--max-modellen", "5"], 2, "did you mean --max-model-len?"),
        (["serve", "--max-model", "5"], 2, "unknown argument --max-model"),
        (["serve", "--port", "many"], 2, "--port"),
        (["serve", "--port", "70000"], 1, "port must be between 0 and 65535, not 70000"),
        (["serve", "--mesh", "4by1"], 1, "mesh must look like 4x1"),
        (["serve", "--enable-lora"], 1, "enable_lora"),
        (["serve", "one", "--model", "two"], 1, "MODEL and --model"),
        (["serve", "--config", "absent.toml"], 1, "absent.toml"),
        (["chat", "--api-key", "k"], 1, "--api-key needs --url"),
        (["chat", "--url", "http://127.0.0.1:9", "--mesh", "2"], 1, "--mesh has no meaning with --url"),
        (["chat", "--url", "http://127.0.0.1:9"], 1, "cannot reach http://127.0.0.1:9"),
        (["chat", "--url", "nonsense"], 1, "cannot reach nonsense"),
    ],
)
def test_errors_are_one_line(capsys, argv, code, said):
    got, out, err = run(capsys, *argv)
    assert (got, out) == (code, "")
    assert err.startswith("jaxserve: ") and err.count("\n") == 1
    assert said in err


def test_the_api_server_module_is_serve():
    module = [sys.executable, "-m", "jaxserve.entrypoints.openai.api_server"]
    done = subprocess.run([*module, "--model", "m", "--port", "-1"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "jaxserve: port must be between 0 and 65535, not -1\n"


def test_python_dash_m(capsys):
    done = subprocess.run([sys.executable, "-m", "jaxserve", "--version"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("jaxserve ")
