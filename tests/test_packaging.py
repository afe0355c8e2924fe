"""The wheel has the package and nothing else: the links at the top of the repository are not shipped."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKS = ("models", "server", "pallas_kernels")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> list[str]:
    """Names of the files in a wheel built now."""
    pytest.importorskip("hatchling")
    place = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(place)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (file,) = place.glob("*.whl")
    return zipfile.ZipFile(file).namelist()


def test_the_wheel_has_each_module_once(wheel):
    modules = [str(path.relative_to(ROOT)) for path in (ROOT / "jaxserve").rglob("*.py")]
    assert sorted(name for name in wheel if name.endswith(".py")) == sorted(modules)


def test_the_wheel_has_nothing_else(wheel):
    assert {name.split("/")[0].split("-")[0] for name in wheel} == {"jaxserve"}


@pytest.mark.parametrize("name", LINKS)
def test_links_lead_into_the_package(name):
    link = ROOT / name
    assert link.is_symlink()
    assert link.readlink() == Path("jaxserve") / name


def test_the_extras_are_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {"cuda12", "cuda13", "tpu", "test", "bench", "otel", "ray"}
    assert wanted <= set(project["optional-dependencies"])
