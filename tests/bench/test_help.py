"""What every benchmark's help needs: no numpy, no client, no engine."""

import json
import subprocess
import sys

import pytest

from jaxserve.cli.bench import BENCHMARKS

HEAVY = ("jax", "numpy", "aiohttp", "matplotlib", "transformers", "tokenizers", "starlette")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_help_imports_nothing_heavy(name):
    code = (
        "import json, sys\n"
        "from jaxserve.cli import main\n"
        f"try: main(['bench', {name!r}, '--help'])\n"
        "except SystemExit as end: code = end.code\n"
        f"print(json.dumps([code, [m for m in {HEAVY!r} if m in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [0, []]
    assert f"usage: jaxserve bench {name}" in done.stdout


def test_an_unknown_option_is_named_with_the_nearest(capsys):
    from jaxserve.cli import main

    with pytest.raises(SystemExit):
        main(["bench", "serve", "--max-concurency", "3"])
    assert "did you mean --max-concurrency?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "sserve"])
    assert "sserve" in capsys.readouterr().err
