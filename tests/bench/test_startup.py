"""`jaxserve bench startup`: lives of servers that are started, asked and ended."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxserve.bench.startup import as_flags
from jaxserve.cli import main
from jaxserve.cli.flags import Parser, add_options, read_options
from jaxserve.config import EngineConfig

pytest.importorskip("aiohttp")

FAKE = f"{sys.executable} {Path(__file__).with_name('fake_openai.py')} {{port}}"


def startup(tmp_path, *argv):
    file = tmp_path / "result.json"
    assert main(["bench", "startup", *map(str, argv), "--output", str(file), "--timeout", "100"]) == 0
    return json.loads(file.read_text())["runs"]


def test_another_server(tmp_path, capsys):
    runs = startup(tmp_path, "--command", FAKE, "--rounds", 2, "--label", "fake")
    assert [run["setting"] for run in runs] == [{}, {}]
    for run in runs:
        assert set(run["samples"]) == {"ready_s", "first_token_s"}  # it does not say that it is warm
        assert 0 < run["summary"]["ready_s"] < run["summary"]["first_token_s"] < run["duration"]
    assert "fake" in capsys.readouterr().out


def test_the_caches_of_another_server(tmp_path):
    """It finds an empty directory at a cold start, and what it left at a warm one."""
    seen = tmp_path / "seen"
    note = f"import os, runpy, sys; open({str(seen)!r}, 'a').write(str(os.listdir(sys.argv[2])));"
    note += " os.close(os.open(sys.argv[2] + '/kept', os.O_CREAT));"
    note += f" runpy.run_path({str(Path(__file__).with_name('fake_openai.py'))!r}, run_name='__main__')"
    runs = startup(tmp_path, "--command", f'{sys.executable} -c "{note}" {{port}} {{cache}}', "--rounds", 2)
    assert [run["setting"]["caches"] for run in runs] == ["cold", "warm"] * 2
    assert seen.read_text() == "[]['kept']" * 2


def test_the_client_is_loaded_before_a_server_starts():
    """Else the time of it would count as the server's."""
    code = (
        "import subprocess, sys\n"
        "from jaxserve.cli import main\n"
        "def started(*args, **options): print('aiohttp' in sys.modules); raise OSError(1, 'enough')\n"
        "subprocess.Popen = started\n"
        "main(['bench', 'startup', '--command', 'x {port}'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split()[-1] == "True"  # before it, git is asked for the commit
    assert done.stderr == "jaxserve: cannot start x: enough\n"


def test_a_server_that_ends_is_quoted(capsys):
    command = f"{sys.executable} -c 'import sys; sys.exit(\"out of luck {{port}}\"[:11])'"
    assert main(["bench", "startup", "--command", command]) == 1
    err = capsys.readouterr().err
    assert "the server ended with status 1; its last words: out of luck" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--command", "x"], "command must have its {port}"),
        (["--command", "x {port}", "--caches", "cold"], "need a {cache}"),
        (["--command", "x {port}", "--num-blocks", "9"], "--num-blocks has no meaning with a command"),
        (["--command", "x {port} 'a"], "command cannot be read: No closing quotation"),
        (["--command", "/no/such/thing {port}"], "cannot start /no/such/thing"),
        (["--rounds", "0"], "rounds must be at least 1"),
        (["--caches", "hot"], "caches"),
    ],
)
def test_mistakes(capsys, argv, said):
    assert main(["bench", "startup", *argv]) == 1
    err = capsys.readouterr().err
    assert err.startswith("jaxserve: ") and err.count("\n") == 1 and said in err


def test_the_engines_options_become_flags_again():
    options = ["--num-blocks", "64", "--no-overlap", "--deterministic", "--dtype", "float32", "--model", "m"]
    parser = Parser()
    add_options(parser, EngineConfig)
    config = read_options(parser.parse_args(options), EngineConfig)
    flags = as_flags(config)
    assert sorted(flags) == sorted(options)
    assert as_flags(EngineConfig()) == []


def test_jaxserve(model_dir, tmp_path):
    """Cold, then warm: ready, a token, and every program compiled, in this order."""
    small = [
        "--dtype",
        "float32",
        "--max-num-seqs",
        "2",
        "--max-num-batched-tokens",
        "32",
        "--num-blocks",
        "32",
    ]
    runs = startup(tmp_path, model_dir, *small, "--rounds", 1, "--caches", "cold", "warm")
    assert [run["setting"]["caches"] for run in runs] == ["cold", "warm"]
    for run in runs:
        summary = run["summary"]
        assert 0 < summary["ready_s"] < summary["first_token_s"] < summary["warm_s"]
