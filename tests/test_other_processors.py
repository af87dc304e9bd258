"""The CPU code on what this machine may not be: ARM, by a cross compiler and an emulator; clang, macOS and Windows by
cross compilation; and under the sanitizers.

On Debian and Ubuntu: `apt install g++-aarch64-linux-gnu qemu-user clang`; for macOS and Windows `pip install ziglang`,
which is clang with the headers of other systems.
"""

import importlib.util
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from src.ops.recipe import CPU_FOLDER, cpu_recipe

pytestmark = pytest.mark.slow
DRIVER = Path(__file__).parent / "other_processors" / "wkv7_driver.cpp"
KERNEL = CPU_FOLDER / "wkv7_cpu.cpp"
ARM_COMPILER, ARM = "aarch64-linux-gnu-g++", "qemu-aarch64"
needs_arm_compiler = pytest.mark.skipif(shutil.which(ARM_COMPILER) is None, reason=f"no {ARM_COMPILER}")
needs_clang = pytest.mark.skipif(shutil.which("clang++") is None, reason="no clang++")
needs_zig = pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="no ziglang")
needs_emulator = pytest.mark.skipif(shutil.which(ARM) is None, reason=f"no {ARM}")


def flags():
    """The library's own, without the instruction set."""
    _, *words = cpu_recipe("baseline").commands[".cpp"]
    return [word for word in words if not word.startswith("-march")]


def run(*command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


@needs_arm_compiler
@pytest.mark.parametrize("processor", ["cortex-a72", "neoverse-v1"])  # NEON; SVE: other vectorizers
@pytest.mark.parametrize("source", cpu_recipe().sources, ids=lambda path: path.name)
def test_compiles_for_arm(source, processor, tmp_path):
    run(ARM_COMPILER, *flags(), f"-mcpu={processor}", "-c", source, "-o", tmp_path / "object.o")


@needs_arm_compiler
@needs_emulator
def test_wkv7_on_arm_is_the_recurrence(tmp_path):
    run(ARM_COMPILER, *flags(), "-static", f"-I{CPU_FOLDER}", DRIVER, KERNEL, "-o", tmp_path / "driver")
    run(ARM, tmp_path / "driver")


@needs_clang
def test_wkv7_of_clang_is_the_recurrence(tmp_path):
    run("clang++", *flags(), f"-I{CPU_FOLDER}", DRIVER, KERNEL, "-o", tmp_path / "driver")
    run(tmp_path / "driver")


@needs_zig
@pytest.mark.parametrize("target", ["aarch64-macos", "x86_64-macos", "aarch64-linux-gnu"])
@pytest.mark.parametrize("source", cpu_recipe().sources, ids=lambda path: path.name)
def test_compiles_with_clang_and_libcxx(source, target, tmp_path):
    """Apple's compiler is clang with libc++, and without OpenMP."""
    run(sys.executable, "-m", "ziglang", "c++", "-target", target, *flags(), "-c", source, "-o", tmp_path / "object.o")


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instruction sets of x86-64")
@pytest.mark.parametrize("instruction_set", ["native", "avx2", "baseline"])
def test_wkv7_does_nothing_undefined(instruction_set, tmp_path):
    compiler, *words = cpu_recipe(instruction_set).commands[".cpp"]
    sanitizers = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    run(compiler, *words, *sanitizers, f"-I{CPU_FOLDER}", DRIVER, KERNEL, "-o", tmp_path / "driver")
    run(tmp_path / "driver")
