"""The C++ sources compile with the headers of the oldest and the newest supported torch, whichever is installed."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
import torch_headers

from src.ops.build import BuildError
from src.ops.recipe import SOURCE_FOLDER, STABLE_ABI, cpu_recipe

OLDEST, NEWEST = "2.10.0", "2.15.0"  # NEWEST is raised when a new release passes
BETWEEN = ("2.11.0", "2.12.0", "2.13.0", "2.14.1")
SOURCES = sorted(SOURCE_FOLDER.rglob("*.cpp"))


def messages(source: Path, include: Path) -> str:
    """What the compiler says of `source`, as the library compiles it but with these headers; "" when it accepts it."""
    try:
        compiler, *flags = cpu_recipe("native").commands[".cpp"]
    except BuildError as error:
        pytest.skip(str(error))
    installed = str(Path(torch.__file__).parent / "include")
    flags = [str(include) if flag == installed else flag for flag in flags]
    assert str(include) in flags
    command = [compiler, *flags, "-fsyntax-only", "-Wall", "-Werror", str(source)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stderr


def headers(version: str) -> Path:
    try:
        return torch_headers.headers_of(version)
    except torch_headers.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("version", [OLDEST, NEWEST, *(pytest.param(v, marks=pytest.mark.slow) for v in BETWEEN)])
def test_sources_compile_with_this_torch(version, tmp_path):
    together = tmp_path / "all.cpp"  # PyTorch's headers take most of the time: they are read once
    together.write_text("".join(f'#include "{source}"\n' for source in SOURCES))
    assert messages(together, headers(version)) == ""


def test_a_macro_of_a_later_torch_is_noticed(tmp_path):
    """The negative control: what torch 2.13 introduced."""
    source = tmp_path / "later.cpp"
    source.write_text("#include <torch/csrc/stable/tensor.h>\nvoid f() { STABLE_TORCH_ERROR_CODE_CHECK(0); }\n")
    assert "STABLE_TORCH_ERROR_CODE_CHECK" in messages(source, headers(OLDEST))
    assert messages(source, headers(NEWEST)) == ""


def test_the_oldest_torch_is_the_one_that_the_requirements_and_the_abi_name():
    requirements = (Path(__file__).parents[1] / "requirements.txt").read_text(encoding="utf-8")
    major, minor = OLDEST.split(".")[:2]
    assert re.search(rf"^torch *>= *{major}\.{minor}\b", requirements, re.MULTILINE)
    assert int(STABLE_ABI, 16) == int(major) << 56 | int(minor) << 48


def test_sources_include_only_headers_with_a_stable_abi():
    for path in [*SOURCES, *SOURCE_FOLDER.rglob("*.h")]:
        included = re.findall(r"#include <((?:torch|ATen|c10)/[^>]+)>", path.read_text(encoding="utf-8"))
        assert all(name.startswith(torch_headers.FOLDERS) for name in included), path


def test_a_wheel_that_cannot_be_downloaded_is_a_reason_to_skip(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch_headers, "_failed", {})
    (tmp_path / "pip.py").write_text("print('ERROR: no network'); raise SystemExit(1)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for _ in range(2):
        with pytest.raises(torch_headers.Unavailable, match=r"torch 2\.10\.0: ERROR: no network"):
            torch_headers.headers_of("2.10.0")
        (tmp_path / "pip.py").write_text("raise SystemExit('asked again')")
    assert [path.name for path in (tmp_path / "rwkv7-torch-headers").iterdir()] == ["lock"]
