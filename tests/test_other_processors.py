"""The CPU code on what this machine may not be: ARM, by a cross compiler and an emulator; Windows, by a cross compiler
and Wine; clang, with both C++ libraries; macOS by cross compilation; SSE2 alone; and under the sanitizers.

On Debian and Ubuntu: `apt install clang libc++-dev libc++abi-dev g++-aarch64-linux-gnu qemu-user-static
g++-mingw-w64-x86-64-posix wine64`; for macOS `pip install ziglang`, which is clang with the headers of other systems.
"""

import importlib.util
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from src.ops.recipe import CPU_FOLDER, cpu_recipe

pytestmark = pytest.mark.slow
DRIVER = Path(__file__).parent / "other_processors" / "wkv7_driver.cpp"
KERNEL = CPU_FOLDER / "wkv7_cpu.cpp"
ARM = ("qemu-aarch64", "qemu-aarch64-static")
WINE = ("wine64", "/usr/lib/wine/wine64", "wine")  # the second is Debian's
# compiler, its flags beside the library's own, and the programs one of which runs the result; (): this machine does
TOOLS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "clang": ("clang++", (), ()),
    "clang-libc++": ("clang++", ("-stdlib=libc++",), ()),
    "arm64": ("aarch64-linux-gnu-g++", ("-static",), ARM),
    "arm64-sve": ("aarch64-linux-gnu-g++", ("-static", "-mcpu=neoverse-v1"), ARM),  # SVE: another vectorizer
    "arm64-clang": ("clang++", ("-static", "--target=aarch64-linux-gnu"), ARM),
    "windows": ("x86_64-w64-mingw32-g++", ("-static",), WINE),
}
if platform.machine() in ("x86_64", "AMD64"):
    TOOLS |= {"sse2": ("g++", ("-march=x86-64",), ()), "clang-sse2": ("clang++", ("-march=x86-64",), ())}
needs_zig = pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="no ziglang")


def flags():
    """The library's own, without the instruction set."""
    _, *words = cpu_recipe("baseline").commands[".cpp"]
    return [word for word in words if not word.startswith("-march")]


def run(*command):
    # Not by a pipe, which Wine's servers hold open when the program has ended.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        done = subprocess.run([str(word) for word in command], stdout=output, stderr=subprocess.STDOUT)
        output.seek(0)
        assert done.returncode == 0, output.read()[-3000:]


def compiler(name):
    """The command of TOOLS, which compiles with the library's flags; a test without the compiler is skipped."""
    program, own, _ = TOOLS[name]
    if shutil.which(program) is None:
        pytest.skip(f"no {program}")
    return (program, *flags(), *own)


@pytest.mark.parametrize("name", TOOLS)
def test_every_source_compiles(name, tmp_path):
    command = compiler(name)
    for source in cpu_recipe().sources:
        run(*command, "-O1", "-c", source, "-o", tmp_path / "object.o")


@pytest.mark.parametrize("name", TOOLS)
def test_wkv7_is_the_recurrence(name, tmp_path, monkeypatch):
    emulators = TOOLS[name][2]
    emulator = [path for path in map(shutil.which, emulators) if path][:1]
    if emulators and not emulator:
        pytest.skip(f"no {emulators[0]}")
    run(*compiler(name), f"-I{CPU_FOLDER}", DRIVER, KERNEL, "-o", tmp_path / "driver.exe")
    monkeypatch.setenv("WINEPREFIX", str(tmp_path / "wine"))
    monkeypatch.setenv("WINEDEBUG", "-all")
    run(*emulator, tmp_path / "driver.exe")


@needs_zig
@pytest.mark.parametrize("target", ["aarch64-macos", "x86_64-macos", "x86_64-windows-gnu", "aarch64-windows-gnu"])
def test_every_source_compiles_with_clang_and_libcxx(target, tmp_path):
    """Apple's compiler is clang with libc++, and without OpenMP; Windows: clang without MSVC."""
    command = (sys.executable, "-m", "ziglang", "c++", "-target", target, *flags(), "-O1")
    for source in cpu_recipe().sources:
        run(*command, "-c", source, "-o", tmp_path / "object.o")


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instruction sets of x86-64")
@pytest.mark.parametrize("instruction_set", ["native", "avx2", "baseline"])
def test_wkv7_does_nothing_undefined(instruction_set, tmp_path):
    compiler, *words = cpu_recipe(instruction_set).commands[".cpp"]
    sanitizers = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    run(compiler, *words, *sanitizers, f"-I{CPU_FOLDER}", DRIVER, KERNEL, "-o", tmp_path / "driver")
    run(tmp_path / "driver")
