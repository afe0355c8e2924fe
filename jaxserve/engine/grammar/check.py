"""The engine's end of the process in which grammars are tried."""

import itertools
import logging
import subprocess
import sys
import threading
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from jaxserve.engine.grammar.check_process import frame, read_frames
from jaxserve.engine.grammar.vocabulary import Vocabulary
from jaxserve.errors import JaxserveError

log = logging.getLogger(__name__)

Answer = tuple[str | None, str | None, int]
"""Why not, where (a field, `#` and a JSON pointer), and how many bytes it took."""


class Checker:
    """Starts its process with the first grammar, and again if it ends. For any thread."""

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self._process: subprocess.Popen[bytes] | None = None
        self._pending: dict[int, Future[Answer]] = {}
        self._names = itertools.count()
        self._lock = threading.Lock()

    def check(self, text: str) -> Answer:
        """Waits for the answer. Raises JaxserveError if the process ends meanwhile."""
        answer: Future[Answer] = Future()
        with self._lock:
            process = self._process or self._start()
            name = next(self._names)
            self._pending[name] = answer
            with suppress(OSError):  # it has just ended, and its reader says so
                self._send(process, [name, text])
        return answer.result()

    def close(self) -> None:
        with self._lock:
            if self._process and self._process.stdin:
                self._process.stdin.close()

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxserve.engine.grammar.check_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._process = process
        threading.Thread(target=self._read, args=(process,), name="grammar check", daemon=True).start()
        self._send(process, [self.vocabulary.tokens, self.vocabulary.eos_ids])
        return process

    def _send(self, process: subprocess.Popen[bytes], value: Any) -> None:
        assert process.stdin is not None
        process.stdin.write(frame(value))
        process.stdin.flush()

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        try:
            for name, error, place, taken in read_frames(process.stdout):
                with self._lock:
                    answer = self._pending.pop(name)
                answer.set_result((error, place, taken))
        except Exception:
            log.exception("the answers of the process that checks grammars cannot be read")
            process.kill()
        process.wait()
        with self._lock:
            self._process = None
            lost, self._pending = self._pending, {}
        for answer in lost.values():
            answer.set_exception(JaxserveError("the process that checks grammars ended"))
