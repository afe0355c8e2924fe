"""Start-up: from starting the server's process to the first token over HTTP, cold and warm.

    python bench/startup.py [--rounds 3]

Cold: an empty compilation cache, the model on disk. Warm: the cache that the cold start left. Prints the
seconds (median, min, max) until the server says ready, until the first token of a chat, and until every
program is compiled.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

QUESTION = {
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "stream": True,
    "temperature": 0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    from jaxserve.config import DEFAULT_MODEL
    from jaxserve.home import home
    from jaxserve.loading.hub import resolve

    resolve(DEFAULT_MODEL)
    rows: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as place:
        os.symlink(home().resolve() / "models", Path(place) / "models")
        for _ in range(args.rounds):
            for made in ("compiled", "native"):
                shutil.rmtree(Path(place) / made, ignore_errors=True)
            rows["cold"].append(start(place))
            rows["warm"].append(start(place))
    print("| start | until ready, s | until first token, s | until warm, s |")
    print("|-------|----------------|----------------------|---------------|")
    for name, runs in rows.items():
        cells = [spread([run[key] for run in runs]) for key in ("ready", "token", "warm")]
        print(f"| {name} | {' | '.join(cells)} |")


def start(place: str) -> dict[str, float]:
    """Seconds since the start of one server's life until each event."""
    begin = time.perf_counter()
    server = subprocess.Popen(
        [sys.executable, "-m", "jaxserve", "serve", "--port", "0"],
        env=os.environ | {"JAXSERVE_HOME": place},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        url = next(word for word in server.stdout.readline().split() if word.startswith("http://"))
        ready = time.perf_counter() - begin
        with ask(url) as answer:
            next(line for line in answer if b'"content":"' in line and b'"content":""' not in line)
            token = time.perf_counter() - begin
        while get(f"{url}/ready")["engine"] != "warm":
            time.sleep(0.2)
        return {"ready": ready, "token": token, "warm": time.perf_counter() - begin}
    finally:
        server.terminate()
        server.wait()


def ask(url: str) -> Any:
    model = get(f"{url}/v1/models")["data"][0]["id"]
    body = json.dumps(QUESTION | {"model": model}).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"content-type": "application/json"})
    return urllib.request.urlopen(request)


def get(url: str) -> Any:
    with urllib.request.urlopen(url) as answer:
        return json.load(answer)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"


if __name__ == "__main__":
    main()
