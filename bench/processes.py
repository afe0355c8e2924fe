"""What a process and all its descendants take, from /proc."""

import os
import threading
from pathlib import Path


def tree(pid: int) -> list[int]:
    """The process and its descendants, parents first; nothing of those that have ended."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []
    return [pid, *(each for child in children for each in tree(child))]


def memory(pid: int) -> int:
    """Bytes of resident memory of one process, pages of files included."""
    return _field(Path(f"/proc/{pid}/status"), "VmRSS")


def shared_memory_divided(pid: int) -> int:
    """Bytes of resident memory of one process; of pages that several have, each counts its part (PSS)."""
    return _field(Path(f"/proc/{pid}/smaps_rollup"), "Pss")


def private_memory(pid: int) -> int:
    """Bytes of anonymous memory: mapped files, as the model and the libraries, grow with what is touched."""
    return _field(Path(f"/proc/{pid}/status"), "RssAnon")


def cpu_seconds(pid: int, thread: int | None = None) -> float:
    """Processor time that one process has used, or one thread of it."""
    place = f"/proc/{pid}" if thread is None else f"/proc/{pid}/task/{thread}"
    try:
        fields = Path(place, "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class PeakMemory:
    """Watches the resident memory of a process and its descendants, added up, until it is stopped.

    Not often, since the system walks all of their pages for it: that is taken from the measured."""

    def __init__(self, pid: int, every: float = 2.0):
        self.bytes = 0
        self._pid = pid
        self._every = every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """The peak, in bytes."""
        self._stop.set()
        self._thread.join()
        self._look()
        return self.bytes

    def _watch(self) -> None:
        while not self._stop.wait(self._every):
            self._look()

    def _look(self) -> None:
        self.bytes = max(self.bytes, sum(shared_memory_divided(pid) for pid in tree(self._pid)))


def _field(file: Path, field: str) -> int:
    """Bytes, of a line in kB."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)
