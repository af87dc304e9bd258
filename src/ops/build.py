"""The native library: built by ninja on first use, kept in a cache, loaded once per process.

The cache (~/.cache/rwkv7-native, under XDG_CACHE_HOME where that is set) has one folder per key. The key is a hash of
everything that the binary depends on: sources, flags, compiler, processor features, torch. So a changed source,
another machine on the same home directory or another torch gets its own binary, and a reinstall finds the old one. A
build happens in a private folder, which is flushed to the disk and renamed into place when it is complete. The SHA-256
of the library is next to it and checked before each load: a library with pages of zeros, as a power cut leaves them, is
loaded without an error and ends the process where it is called.
"""

import atexit
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from src.files import file_lock, sha256_of, sync_file, sync_folder
from src.ops.cuda import cuda_recipe
from src.ops.recipe import INSTRUCTION_SETS, STABLE_ABI, Recipe, cpu_recipe
from src.ops.rocm import rocm_recipe
from src.ops.toolchain import BuildError, find_ninja

__all__ = [
    "INSTRUCTION_SETS",
    "STABLE_ABI",
    "BuildError",
    "Recipe",
    "build",
    "cache_folder",
    "load_native",
    "why_no_cuda",
]

LIBRARY, CHECKSUM = "librwkv7_native.so", "librwkv7_native.sha256"
SHOWN_OUTPUT = 6000  # characters of a failed build's output in the error: its end has the first compiler's messages

_lock = threading.Lock()  # several threads may be the first to need the library
_registered: set[Callable[[], None]] = set()
_loaded: Path | None = None
_failure: BuildError | None = None  # a build that failed once in this process isn't tried again at every call
_cuda_failure: BuildError | None = None  # why the loaded library has no CUDA kernels although there is a GPU


def load_native(register: Callable[[], None] | None = None, *, instruction_set: str = "native") -> None:
    """Builds the native library unless the cache has it, and loads its ops, `torch.ops.rwkv7`; once per process.

    `register` registers the shapes and gradients of some ops with PyTorch; it is called once, after the library is
    loaded. Raises BuildError when the library can't be built or loaded.
    """
    with _lock:
        _load(instruction_set)
        if register is not None and register not in _registered:
            register()
            _registered.add(register)


def _load(instruction_set: str) -> None:
    global _loaded, _failure, _cuda_failure
    if _loaded is not None:
        return
    if _failure is not None:
        raise _failure
    if torch.cuda.is_available():
        gpu_recipe = rocm_recipe if torch.version.hip else cuda_recipe
        try:
            _loaded = _build_and_load(gpu_recipe(instruction_set))
            return
        except BuildError as error:
            _cuda_failure = error  # the CPU ops may still build
    try:
        _loaded = _build_and_load(cpu_recipe(instruction_set))
    except BuildError as error:
        _failure = error
        raise


def why_no_cuda() -> BuildError | None:
    """Why the loaded library has no CUDA kernels; None when it has them."""
    if _cuda_failure is not None:
        return _cuda_failure
    return None if torch.cuda.is_available() else BuildError("PyTorch sees no GPU")


def _build_and_load(recipe: Recipe) -> Path:
    path = build(recipe)
    try:
        torch.ops.load_library(path)
    except OSError as first:  # a damaged file (a full disk, a crash): build it once more
        shutil.rmtree(path.parent, ignore_errors=True)
        path = build(recipe)
        try:
            torch.ops.load_library(path)
        except OSError as second:
            raise BuildError(f"the native library was built but can't be loaded: {second}") from first
    return path


def cache_folder() -> Path:
    """Where built libraries stay: $XDG_CACHE_HOME/rwkv7-native, by default ~/.cache/rwkv7-native."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    # A relative path is to be ignored (XDG Base Directory Specification): it is another folder from each folder.
    return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "rwkv7-native"


def build(recipe: Recipe, cache: Path | None = None) -> Path:
    """The library of `recipe`: from the cache, or built now.

    A cache that can't be written is replaced by a temporary folder, with a warning.
    """
    cache = cache_folder() if cache is None else cache
    final = cache / recipe.key() / LIBRARY
    if _is_whole(final):
        return final
    try:
        # Where a file system has no locks several may build at once, each in a folder of its own: harmless.
        with file_lock(cache / "lock", wait=True, warn=False):
            if not _is_whole(final):  # another process may have built it while we waited
                shutil.rmtree(final.parent, ignore_errors=True)  # damaged, or of a version that kept no checksum
                _build_into(recipe, final)
    except OSError as error:
        folder = Path(tempfile.mkdtemp(prefix="rwkv7-native-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        warnings.warn(
            f"the build cache {cache} can't be written ({error}); building in {folder}, for this process only. "
            "Set XDG_CACHE_HOME to a folder that can be written to keep the build.",
            stacklevel=2,
        )
        final = folder / recipe.key() / LIBRARY
        try:
            _build_into(recipe, final)
        except OSError as second:
            raise BuildError(
                f"nowhere to build: neither {cache} ({error}) nor {folder} ({second}) can be written"
            ) from second
    return final


def _is_whole(library: Path) -> bool:
    """Whether a library of the cache is there and has the SHA-256 that was written next to it."""
    try:
        return library.with_name(CHECKSUM).read_text(encoding="utf-8") == sha256_of(library)
    except (OSError, UnicodeDecodeError):
        return False


def _build_into(recipe: Recipe, final: Path) -> None:
    final.parent.parent.mkdir(parents=True, exist_ok=True)
    # Next to its final place: a rename is atomic only within one file system.
    work = Path(tempfile.mkdtemp(prefix="build-", dir=final.parent.parent))
    try:
        _compile(recipe, work)
        complete = work / "complete"
        complete.mkdir()
        os.rename(work / LIBRARY, complete / LIBRARY)
        (complete / CHECKSUM).write_text(sha256_of(complete / LIBRARY), encoding="utf-8")
        for path in (complete / LIBRARY, complete / CHECKSUM):
            sync_file(path)
        sync_folder(complete)
        try:
            os.rename(complete, final.parent)
        except OSError:
            if not _is_whole(final):  # anything but another process that was first
                raise
        sync_folder(final.parent.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _compile(recipe: Recipe, work: Path) -> None:
    if recipe.prepare is not None:
        recipe = recipe.prepare(recipe, work)
    (work / "build.ninja").write_text(_ninja_file(_join_sources(recipe, work)), encoding="utf-8")
    ninja = [find_ninja(), "-C", str(work)]
    # Messages in English, so that they can be searched for, and so that _advice_for recognises them.
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(
        ninja, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
    )
    if done.returncode == 0:
        return
    output = done.stdout.strip()[-SHOWN_OUTPUT:]
    if "No space left on device" in output:
        raise OSError(28, "No space left on device")
    advice = _advice_for(output, done.returncode, recipe.compiler)
    raise BuildError(
        "the native library could not be built", advice=advice, output=f"Output of the compiler:\n{output}"
    )


def _advice_for(output: str, exit_code: int, compiler: str) -> str:
    """What to do after a failed build."""
    # Compilers exit with 1 whatever happened: their messages are the only sign of a cause.
    out_of_memory = ("Killed", "signal 9", "virtual memory exhausted", "out of memory")
    if exit_code == -signal.SIGKILL or any(sign in output for sign in out_of_memory):
        return (
            "the compiler ran out of memory (it needs about 500 MB): close other programs or add swap, and start again"
        )
    if "internal compiler error" in output or "PLEASE submit a bug report" in output:  # of g++ and of clang
        return (
            f"{compiler} itself crashed: name another compiler, or another version, in CXX (such as g++-14 or clang++)"
        )
    return f"check that {compiler} can compile C++17 (g++ 9 or clang 11 and later), or name another compiler in CXX"


def _join_sources(recipe: Recipe, work: Path) -> Recipe:
    """The C++ sources as two files of about equal length that include them.

    Half of a small source's build time goes into PyTorch's headers, and two compilers run at once.
    """
    halves: tuple[list[Path], list[Path]] = ([], [])
    lengths = {source: source.stat().st_size for source in recipe.sources if source.suffix == ".cpp"}
    for source in sorted(lengths, key=lambda source: lengths[source], reverse=True):
        min(halves, key=lambda half: sum(lengths[other] for other in half)).append(source)
    files = [work / "first-half.cpp", work / "second-half.cpp"]
    for file, half in zip(files, halves, strict=True):
        file.write_text("".join(f'#include "{source}"\n' for source in half), encoding="utf-8")
    return replace(recipe, sources=(*files, *(source for source in recipe.sources if source not in lengths)))


def _ninja_file(recipe: Recipe) -> str:
    def escape(word: str) -> str:
        return word.replace("$", "$$")

    def shell(command: tuple[str, ...]) -> str:
        return " ".join("'" + escape(word).replace("'", "'\\''") + "'" for word in command)

    def path(file: Path) -> str:
        return escape(str(file)).replace(" ", "$ ").replace(":", "$:")

    lines = ["ninja_required_version = 1.3"]
    for suffix, command in recipe.commands.items():
        lines += [f"rule compile_{suffix[1:]}", f"  command = {shell(command)} -c $in -o $out"]
    lines += ["rule link", f"  command = {shell(recipe.link[:1])} $in {shell(recipe.link[1:])} -o $out"]
    # Numbered: two folders may have a source of the same name.
    objects = [f"{number}-{source.stem}.o".replace(" ", "-") for number, source in enumerate(recipe.sources)]
    for source, name in zip(recipe.sources, objects, strict=True):
        lines.append(f"build {name}: compile_{source.suffix[1:]} {path(source)}")
    lines += [f"build {LIBRARY}: link {' '.join(objects)}", f"default {LIBRARY}", ""]
    return "\n".join(lines)
