"""The Hugging Face hub: which files are asked for, what counts as whole, and no network at all."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import RepositoryNotFoundError

from jaxserve.errors import ModelError
from jaxserve.loading import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARDED = ["config.json", "tokenizer.json", "model.safetensors.index.json"] + [
    f"model-0000{n}-of-00002.safetensors" for n in (1, 2)
]


class FakeHub:
    """A repository of empty files; `fails` is raised by a download after its first file."""

    def __init__(self, cache: Path, names: list[str]):
        self.cache, self.names = cache, names
        self.fails: Exception | None = None
        self.calls: list[list[str]] = []

    def model_info(self, repository, *, revision, timeout):
        return SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=name) for name in self.names])

    def snapshot_download(self, repository, *, revision, allow_patterns):
        self.calls.append(allow_patterns)
        place = self.cache / repository.replace("/", "--") / revision
        place.mkdir(parents=True, exist_ok=True)
        for name in allow_patterns:
            (place / name).write_bytes(b"")
            if self.fails:
                raise self.fails
        return str(place)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    def of(names):
        found = FakeHub(tmp_path / "cache", names)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", found.snapshot_download)
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: None)
        return found

    monkeypatch.setenv("JAXSERVE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return of


def test_fetched_once_then_found_without_the_hub(fake):
    repository = fake([*SHARDED, "README.md", "pytorch_model.bin", "onnx/model.safetensors", "x.gguf"])
    place = hub.resolve("org/name")
    assert sorted(repository.calls[0]) == sorted(SHARDED)
    assert hub.resolve("hf:org/name") == place
    assert len(repository.calls) == 1
    assert [(entry.ref, entry.path) for entry in hub.list_models()] == [("hf:org/name", place)]


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["config.json", "x.gguf"], ["x.gguf", "config.json"]),
        (["model.safetensors", "consolidated.safetensors"], ["model.safetensors"]),
        (["training_args.bin", "pytorch_model.bin", "x.gguf"], ["pytorch_model.bin"]),
    ],
)
def test_the_weights_that_are_taken(fake, names, wanted):
    repository = fake(names)
    hub.resolve("org/name")
    assert repository.calls == [wanted]


@pytest.mark.parametrize("names", [["a.gguf", "b.gguf"], ["tf_model.h5"]])
def test_no_one_model_in_it(fake, names):
    repository = fake(names)
    with pytest.raises(ModelError, match="no safetensors"):
        hub.resolve("org/name")
    assert repository.calls == []


def test_an_interrupted_fetch_is_not_a_model(fake):
    repository = fake(SHARDED)
    repository.fails = ConnectionError("reset by peer")
    with pytest.raises(ModelError, match="reset by peer"):
        hub.resolve("org/name")
    assert hub.list_models() == []
    repository.fails = None
    assert all((hub.resolve("org/name") / name).exists() for name in SHARDED)


def test_a_revision_is_a_model_of_its_own(fake):
    repository = fake(SHARDED)
    hub.resolve("org/name@refs/pr/1")
    hub.resolve("org/name")
    assert len(repository.calls) == 2
    assert [entry.ref for entry in hub.list_models()] == ["hf:org/name", "hf:org/name@refs/pr/1"]


def test_a_cache_that_was_emptied_is_filled_again(fake):
    repository = fake(SHARDED)
    place = hub.resolve("org/name")
    for file in place.iterdir():
        file.unlink()
    place.rmdir()
    assert hub.list_models() == []
    assert (hub.resolve("org/name") / "config.json").exists()
    assert len(repository.calls) == 2


def test_no_such_repository(fake, monkeypatch):
    import httpx

    repository = fake(SHARDED)

    def missing(*args, **kwargs):
        answer = httpx.Response(404, request=httpx.Request("GET", "http://localhost"))
        raise RepositoryNotFoundError("404\nsecond line", response=answer)

    monkeypatch.setattr(repository, "model_info", missing)
    with pytest.raises(ModelError, match="has no org/name, or it is private") as caught:
        hub.resolve("org/name")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("offline", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
@pytest.mark.parametrize("cached", ["nothing", "half", "whole"])
def test_offline(tmp_path, offline, cached):
    """What another program left in the hub's cache serves if it is whole; else one line says what to do."""
    snapshot = tmp_path / "hf/hub/models--org--name/snapshots" / COMMIT
    if cached != "nothing":
        snapshot.mkdir(parents=True)
        reference = snapshot.parent.parent / "refs/main"
        reference.parent.mkdir()
        reference.write_text(COMMIT)
        (snapshot / "config.json").write_text("{}")
    if cached == "whole":
        (snapshot / "model.safetensors").write_bytes(b"")
    code = (
        "from jaxserve.loading.hub import resolve\n"
        "from jaxserve.errors import ModelError\n"
        "try: print(resolve('org/name'))\n"
        "except ModelError as error: print('ModelError', error)"
    )
    env = os.environ | {"JAXSERVE_HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "hf")} | offline
    env.pop("HF_HUB_CACHE", None)
    answer = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert len(answer) == 1
    if cached == "whole":
        assert answer[0] == str(snapshot)
    else:
        assert answer[0].startswith("ModelError") and "cannot be reached" in answer[0]
        assert "pypi:package" in answer[0]
