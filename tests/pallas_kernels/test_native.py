"""Compiling and keeping C++ kernels, with a small one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxserve.pallas_kernels import native

GOOD = 'extern "C" int answer() { return 42; }'

pytestmark = pytest.mark.compiler


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("JAXSERVE_HOME", str(tmp_path / "home"))
    folder = tmp_path / "kernel"
    folder.mkdir()
    (folder / "cpu.cc").write_text(GOOD)
    return folder / "cpu.cc"


def libraries(source: Path) -> list[str]:
    return sorted(path.name for path in (source.parents[1] / "home" / "native").iterdir())


def why_not_in_another_process(source: Path, **environment: str) -> str:
    code = "import sys, pathlib; from jaxserve.pallas_kernels import native\n"
    code += "print(native.why_not(native.Kernel(pathlib.Path(sys.argv[1]))))"
    command, env = [sys.executable, "-c", code, str(source)], os.environ | environment
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_library_is_compiled_once_and_anew_when_its_source_changes(source, monkeypatch):
    assert native.why_not(native.Kernel(source)) == ""
    (library,) = (source.parents[1] / "home" / "native").iterdir()
    made = library.stat().st_mtime_ns
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert why_not_in_another_process(source) == ""
    assert library.stat().st_mtime_ns == made
    monkeypatch.delenv("CXX")
    source.write_text(GOOD.replace("42", "43"))
    assert why_not_in_another_process(source) == ""
    assert len(libraries(source)) == 2


def test_no_compiler_is_said(source, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    problem = "there is no C++ compiler: CXX=no-such-compiler -m64 is not here"
    assert native.why_not(native.Kernel(source)) == problem
    monkeypatch.setattr(native, "COMPILERS", ())
    monkeypatch.delenv("CXX")
    other = source.with_name("other.cc")
    other.write_text(GOOD)
    assert native.why_not(native.Kernel(other)) == "there is no C++ compiler: install g++ or clang++"


def test_a_source_that_does_not_compile_gives_the_compilers_words_and_leaves_nothing(source):
    source.write_text("int answer() { return nothing; }")
    assert "nothing" in native.why_not(native.Kernel(source))
    assert libraries(source) == []


def test_a_home_that_cannot_be_written_is_said(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXSERVE_HOME", str(tmp_path / "file"))
    assert "cpu.cc could not be compiled: " in native.why_not(native.Kernel(source))


@pytest.mark.parametrize("kept", [0, 100, 8000])
def test_a_library_that_was_cut_short_is_made_anew(source, kept):
    assert native.why_not(native.Kernel(source)) == ""
    (library,) = (source.parents[1] / "home" / "native").iterdir()
    whole = library.read_bytes()
    library.unlink()  # this process has mapped it
    library.write_bytes(whole[:kept])
    assert why_not_in_another_process(source) == ""
    assert library.read_bytes() == whole


def test_a_missing_handler_is_said(source):
    with pytest.raises(native.NativeError, match="has no handler question"):
        native.target(native.Kernel(source), "question")


def test_a_strange_locale_is_no_harm(source):
    source.write_text(f"// x · yᵀ\n{GOOD}", encoding="utf-8")
    strange = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert why_not_in_another_process(source, **strange) == ""
