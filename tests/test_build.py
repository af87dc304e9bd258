"""The build on first use: the cache serves only what fits and survives races and damage; failures have advice.

A tiny C++ source stands for the library: what is tested is the building, not what is built.
"""

import ctypes
import errno
import fcntl
import os
import platform
import shutil
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import warm_process

from src.ops import build
from src.ops import recipe as recipes
from src.ops.build import BuildError, Recipe
from src.ops.recipe import cpu_recipe
from src.ops.toolchain import find_compiler

ROOT = Path(__file__).parents[1]


@pytest.fixture
def recipe(tmp_path):
    source = tmp_path / "a source.cpp"
    source.write_text('#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n')
    (tmp_path / "answer.h").write_text("#define ANSWER 42\n")
    compiler = find_compiler()
    return Recipe(
        compiler=compiler,
        sources=(source,),
        headers=(tmp_path / "answer.h",),
        commands={".cpp": (compiler, "-O0", "-fPIC", '-DNOTE="a $word"')},
        link=(compiler, "-shared"),
        identity=("this machine",),
    )


def built(recipe, cache):
    return build.build(recipe, cache)


def test_builds_once_and_serves_from_the_cache(recipe, tmp_path, monkeypatch):
    library = built(recipe, tmp_path / "cache")
    assert ctypes.CDLL(str(library)).answer() == 42
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("built again"))
    assert built(recipe, tmp_path / "cache") == library
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == sorted([recipe.key(), "lock"])  # nothing left over


def test_key_follows_everything_the_binary_depends_on(recipe):
    keys = {recipe.key()}
    changes = [
        {"commands": {".cpp": (recipe.compiler, "-O1", "-fPIC")}},
        {"link": (recipe.compiler, "-shared", "-lm")},
        {"identity": ("another machine",)},
    ]
    keys.update(replace(recipe, **change).key() for change in changes)
    recipe.headers[0].write_text("#define ANSWER 43\n")
    keys.add(recipe.key())
    recipe.sources[0].write_text("// changed\n")
    keys.add(recipe.key())
    assert len(keys) == 2 + len(changes) + 1


def test_key_of_the_library_follows_processor_compiler_and_torch(monkeypatch):
    keys = {cpu_recipe().key(), cpu_recipe("baseline").key()}
    with monkeypatch.context() as patch:
        patch.setattr(recipes, "_processor_features", lambda: "avx9000")
        keys.add(cpu_recipe().key())
    with monkeypatch.context() as patch:
        patch.setattr(recipes, "version_of", lambda _: "g++ 99")
        keys.add(cpu_recipe().key())
    with monkeypatch.context() as patch:
        patch.setattr(recipes.torch, "__version__", "9.9")
        keys.add(cpu_recipe().key())
    assert len(keys) == 5
    assert cpu_recipe().key() in keys  # and is the same whenever asked


def test_changed_source_gives_a_new_library(recipe, tmp_path):
    first = built(recipe, tmp_path / "cache")
    recipe.headers[0].write_text("#define ANSWER 43\n")
    second = built(recipe, tmp_path / "cache")
    assert [ctypes.CDLL(str(p)).answer() for p in (first, second)] == [42, 43]


def test_eight_at_once_do_not_break_each_other(recipe, tmp_path):
    script = (
        "import ctypes, pathlib, sys; from src.ops import build; from src.ops.build import Recipe\n"
        f"r = {recipe!r}\n"
        f"print(ctypes.CDLL(str(build.build(r, pathlib.Path({str(tmp_path / 'cache')!r})))).answer())"
    ).replace("PosixPath", "pathlib.PosixPath")
    command = [sys.executable, "-c", script]
    all_of_them = [
        warm_process.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    for process in all_of_them:
        out, err = process.communicate(timeout=120)
        assert (out.strip(), process.returncode) == ("42", 0), err


def test_without_locks_two_builders_still_agree(recipe, tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    results = []
    threads = [threading.Thread(target=lambda: results.append(built(recipe, tmp_path / "cache"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(results)) == 1
    assert len(results) == 3


def test_a_lock_file_that_someone_left_is_not_waited_for(recipe, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "lock").write_text("left over")
    built(recipe, tmp_path / "cache")


def test_a_damaged_library_is_built_again(tmp_path, monkeypatch, recipe):
    loads = []

    def load(path):
        loads.append(Path(path).stat().st_size)
        ctypes.CDLL(str(path))

    monkeypatch.setattr(build, "cpu_recipe", lambda _: recipe)
    monkeypatch.setattr(build, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(build, "_loaded", None)
    monkeypatch.setattr(build, "_failure", None)
    monkeypatch.setattr(build.torch.ops, "load_library", load)
    built(recipe, tmp_path / "cache").write_bytes(b"")
    build.load_native()
    assert len(loads) == 1  # its checksum tells it before it is loaded
    assert loads[0] > 0


def test_a_library_with_pages_of_zeros_is_built_again(recipe, tmp_path):
    """As a power cut leaves them: the loader maps it without an error, and calling it ends the process."""
    path = built(recipe, tmp_path / "cache")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    assert built(recipe, tmp_path / "cache") == path
    assert ctypes.CDLL(str(path)).answer() == 42


def test_a_library_of_a_version_that_kept_no_checksum_is_built_again(recipe, tmp_path):
    path = built(recipe, tmp_path / "cache")
    path.with_name(build.CHECKSUM).unlink()
    path.write_bytes(b"")
    assert built(recipe, tmp_path / "cache").stat().st_size > 0
    assert build._is_whole(path)


def test_library_and_names_are_on_the_disk_before_they_have_their_place(recipe, tmp_path, synced):
    path = built(recipe, tmp_path / "cache")
    moved = synced.index("rename", path.parent)
    assert {file.name for file in synced.files(before=moved)} >= {path.name, build.CHECKSUM}
    assert synced.folders(after=moved) == [tmp_path / "cache"]
    assert len(synced.folders(before=moved)) == 1  # the one that is renamed


def test_a_failed_build_is_not_tried_again_at_every_call(monkeypatch):
    tries = []

    def fail(_):
        tries.append(1)
        raise BuildError("no compiler")

    monkeypatch.setattr(build, "cpu_recipe", fail)
    monkeypatch.setattr(build, "_loaded", None)
    monkeypatch.setattr(build, "_failure", None)
    for _ in range(3):
        with pytest.raises(BuildError, match="no compiler"):
            build.load_native()
    assert len(tries) == 1


def test_threads_that_need_it_at_once_load_and_register_once(monkeypatch):
    loads, registrations = [], []
    monkeypatch.setattr(build, "cpu_recipe", lambda _: None)
    monkeypatch.setattr(build, "_build_and_load", lambda _: (time.sleep(0.2), loads.append(1), Path())[-1])
    monkeypatch.setattr(build, "_loaded", None)
    monkeypatch.setattr(build, "_failure", None)
    monkeypatch.setattr(build, "_registered", set())
    monkeypatch.setattr(build.torch.cuda, "is_available", lambda: False)

    def register():
        assert loads
        registrations.append(1)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: build.load_native(register), range(8)))
    assert (len(loads), len(registrations)) == (1, 1)


def test_a_cache_that_cannot_be_written_is_replaced_with_a_warning(recipe, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.warns(UserWarning, match="can't be written"):
        library = built(recipe, tmp_path / "file" / "cache")
    assert ctypes.CDLL(str(library)).answer() == 42


def test_a_full_disk_is_replaced_with_a_warning(recipe, tmp_path, monkeypatch):
    real = build._compile

    def full(recipe, work):
        if work.is_relative_to(tmp_path / "cache"):
            raise OSError(28, "No space left on device")
        real(recipe, work)

    monkeypatch.setattr(build, "_compile", full)
    with pytest.warns(UserWarning, match="No space left"):
        built(recipe, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("build-*"))


def fake_compiler(tmp_path, script):
    path = tmp_path / "fake-cxx"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def build_error(recipe, cache):
    with pytest.raises(BuildError) as caught:
        built(recipe, cache)
    return caught.value


def test_compiler_output_is_shown(recipe, tmp_path):
    recipe.sources[0].write_text("this is not C++\n")
    error = build_error(recipe, tmp_path / "cache")
    assert "a source.cpp" in error.output
    assert recipe.compiler in error.advice
    assert error.output in str(error)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["lock"]


@pytest.mark.parametrize(
    "message",
    [
        "c++: fatal error: Killed signal terminated program cc1plus",
        "nvcc error : cicc died due to signal 9 (Kill signal)",
        "cc1plus: out of memory allocating 65536 bytes",
    ],
    ids=["g++", "nvcc", "allocation"],
)
def test_compiler_killed_for_memory_is_recognised(recipe, tmp_path, message):
    compiler = fake_compiler(tmp_path, f"echo '{message}' >&2; exit 1")
    error = build_error(replace(recipe, commands={".cpp": (compiler,)}), tmp_path / "cache")
    assert "out of memory" in error.advice
    assert message in error.output


@pytest.mark.parametrize(
    "message",
    [
        "x.cpp:54:28: internal compiler error: in vect_transform_reduction, at tree-vect-loop.cc:7457",
        "PLEASE submit a bug report to https://github.com/llvm/llvm-project/issues/ and include the crash backtrace",
    ],
    ids=["g++", "clang"],
)
def test_compiler_crash_is_distinguished_from_a_rejected_source(recipe, tmp_path, message):
    compiler = fake_compiler(tmp_path, f"echo '{message}' >&2; exit 1")
    error = build_error(replace(recipe, commands={".cpp": (compiler,)}, compiler=compiler), tmp_path / "cache")
    assert "fake-cxx itself crashed" in error.advice
    assert "CXX" in error.advice
    assert message in error.output


def test_a_disk_that_fills_up_everywhere_says_so(recipe, tmp_path):
    compiler = fake_compiler(tmp_path, "echo 'fatal error: error writing to x.s: No space left on device' >&2; exit 1")
    with (
        pytest.warns(UserWarning, match="can't be written"),
        pytest.raises(BuildError, match=r"nowhere to build.*No space left"),
    ):
        built(replace(recipe, commands={".cpp": (compiler,)}), tmp_path / "cache")


FALLBACK = """
import warnings
import torch
from src.ops import wkv7
from src.ops.build import BuildError
from src.ops.portable import wkv7_portable
x = [torch.randn(1, 3, 1, 32) for _ in range(6)]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        assert torch.equal(wkv7(*x)[0], wkv7_portable(*x)[0])
assert len(caught) == 1, caught
print(caught[0].message)
try:
    wkv7(*x, kernel="recurrent")
except BuildError as error:
    assert error.kernel == "recurrent" and "--kernel portable" in error.advice
    assert str(error).count("--kernel") == 1
    print("by name:", error)
"""


@pytest.mark.parametrize(("script", "expected"), [
    (None, "no C++ compiler"),
    ("echo 'wrong architecture' >&2; exit 3", "wrong architecture"),
    ('[ "$1" = --version ] && exit; echo "unknown option" >&2; exit 1', "unknown option"),
    ('[ "$1" = --version ] && exit; echo "Killed signal terminated program cc1plus" >&2; exit 1', "ran out of memory"),
], ids=["no compiler", "does not run", "refuses", "killed for memory"])  # fmt: skip
def test_without_a_library_there_is_one_warning_and_the_right_answer(tmp_path, script, expected):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "CXX": ""}
    if script is None:
        environment["PATH"] = str(tmp_path)
    else:
        environment["CXX"] = fake_compiler(tmp_path, script)
    done = warm_process.run(
        [sys.executable, "-c", FALLBACK], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    warning, by_name = done.stdout.split("by name: ")
    assert "portable kernel" in warning
    in_one_line = {"wrong architecture": "does not run", "unknown option": "could not be built"}  # not the output
    assert in_one_line.get(expected, expected) in warning
    assert expected in by_name


def test_on_windows_nothing_is_compiled_and_wsl_is_named(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(BuildError, match=r"not built on Windows.*WSL"):
        cpu_recipe()


def test_a_missing_compiler_comes_with_the_commands_to_install_one(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BuildError) as caught:
        cpu_recipe()
    assert "apt install g++" in caught.value.advice


def test_a_broken_compiler_is_reported_with_its_output(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, "echo 'wrong architecture' >&2; exit 3"))
    with pytest.raises(BuildError, match="exit 3") as caught:
        cpu_recipe()
    assert caught.value.output == "wrong architecture"
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="CXX is set to 'no-such-compiler'"):
        cpu_recipe()


def test_every_source_and_header_is_found_and_counts_in_the_key(tmp_path, monkeypatch):
    """A new file needs no entry in a list; a change of any file gives another key."""
    folder = shutil.copytree(recipes.SOURCE_FOLDER, tmp_path / "cuda")
    monkeypatch.setattr(recipes, "SOURCE_FOLDER", folder)
    monkeypatch.setattr(recipes, "CPU_FOLDER", folder / "cpu")
    monkeypatch.setattr(recipes, "version_of", lambda _: "g++ 99")

    def gpu_recipe():
        cpu = cpu_recipe()
        return replace(cpu, sources=cpu.sources + recipes.gpu_sources(), headers=cpu.headers + recipes.gpu_headers())

    kept = set(gpu_recipe().sources + gpu_recipe().headers)
    assert kept == {path for path in folder.rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu")}
    keys = {gpu_recipe().key()}
    for path in sorted(kept):
        path.write_text(path.read_text() + "// changed\n")
        keys.add(gpu_recipe().key())
    for number, name in enumerate(("cpu/new.cpp", "cpu/new.h", "new.cu", "new.cuh", "new.h"), start=1):
        (folder / name).write_text("")
        keys.add(gpu_recipe().key())
        assert len(gpu_recipe().sources + gpu_recipe().headers) == len(kept) + number
    assert len(keys) == 1 + len(kept) + 5
    cpu_key = cpu_recipe().key()
    (folder / "new.cu").write_text("// for a GPU\n")
    assert cpu_recipe().key() == cpu_key  # nothing that a CPU's library is made of


def test_cache_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.cache_folder() == tmp_path / "rwkv7-native"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert build.cache_folder().parent.name == ".cache"


def test_importing_builds_and_reads_nothing(tmp_path):
    script = (
        "import torch, subprocess, os\n"
        "def refuse(*a, **k): raise SystemExit('a process was started')\n"
        "subprocess.Popen = subprocess.run = os.system = refuse\n"
        "class Watched(dict):\n"
        "    def __getitem__(self, *a): raise SystemExit(f'the environment was read: {a}')\n"
        "    get = __contains__ = __getitem__\n"
        "os.environ = Watched(os.environ)\n"
        "import src.ops, src.ops.build, src.ops.reference\n"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


TESTS_OF_OPS = (
    "test_wkv7.py::test_native_is_as_exact_as_plain_pytorch",
    "test_elementwise.py::test_token_shift",
    "test_elementwise.py::test_inputs",
    "test_elementwise.py::test_output",
    "test_elementwise.py::test_relu_squared",
    "test_loss.py::test_low_precision_is_as_exact_as_plain_pytorch",
    "test_loss.py::test_gradient_takes_the_place_of_logits_that_nobody_needs",
    "test_decode.py::test_the_native_step_agrees_with_the_training_forward",
    "test_decode.py::test_packing_keeps_every_bit",
)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instruction sets of x86-64")
@pytest.mark.parametrize("instruction_set", [pytest.param("avx2", marks=pytest.mark.slow), "baseline"])
def test_other_instruction_sets_compute_the_same(instruction_set):
    """The ops' own tests, in a process that has loaded a library for another processor."""
    script = (
        "import sys, pytest; from src.ops import build\n"
        f"build.load_native(instruction_set={instruction_set!r})\n"
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    arguments = ["-q", "-p", "no:cacheprovider", *(f"tests/{name}" for name in TESTS_OF_OPS)]
    done = warm_process.run([sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
