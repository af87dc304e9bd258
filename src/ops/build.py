"""The native library: built by ninja on first use, kept in a cache, loaded once per process.

The cache (~/.cache/rwkv7-native, under XDG_CACHE_HOME where that is set) has one folder per key. The key is a hash of
everything that the binary depends on: sources, flags, compiler, processor features, torch. So a changed source, another
machine on the same home directory or another torch gets its own binary, and a reinstall finds the old one. A build happens
in a private folder and is renamed into place when whole.
"""

import atexit
import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from src.files import file_lock
from src.ops.toolchain import BuildError, find_compiler, find_ninja, find_nvcc, version_of

SOURCE_FOLDER = Path(__file__).resolve().parents[2] / "cuda"
CPU_SOURCES = (
    "wkv7.cpp",
    "wkv7_cpu.cpp",
    "token_shift.cpp",
    "time_mix.cpp",
    "relu_squared.cpp",
    "cross_entropy_cpu.cpp",
    "decode.cpp",
    "pack.cpp",
)
HEADERS = ("wkv7_cpu.h", "small_products.h", "packed.h", "vec.h", "dense.h", "cross_entropy.h")
CUDA_SOURCES = (
    "wkv7_cuda.cpp",
    "wkv7_recurrent.cu",
    "wkv7_chunked.cu",
    "cross_entropy_cuda.cpp",
    "cross_entropy.cu",
)
CUDA_HEADERS = (
    "port.cuh",
    "wkv7_document.cuh",
    "chunked_fragments.cuh",
    "chunked_prepare.cuh",
    "chunked_state.cuh",
    "chunked_backward.cuh",
    "on_device.h",
)
OLDEST_GPU, OLDEST_GPU_OF_CUDA_13 = (7, 0), (7, 5)
LIBRARY = "librwkv7_native.so"
STABLE_ABI = "0x020a000000000000"  # torch 2.10: the oldest whose headers have all that we use

# Options per instruction set: the machine's own, or a fixed one (to measure and test what other machines run).
INSTRUCTION_SETS = {
    "native": (),
    "avx512": ("-march=x86-64-v4",),
    "avx2": ("-march=x86-64-v3",),
    "baseline": ("-march=x86-64",),
}


@dataclass(frozen=True)
class Recipe:
    """What is compiled and how. `commands` maps a source's suffix to its compile command up to `-c SOURCE -o OBJECT`."""

    compiler: str
    sources: tuple[Path, ...]
    headers: tuple[Path, ...]
    commands: dict[str, tuple[str, ...]]
    link: tuple[str, ...]
    identity: tuple[str, ...] = field(default=())  # versions of the tools, features of the processor
    prepare: Callable[["Recipe", Path], "Recipe"] | None = None  # what is done in the build's folder before compiling

    def key(self) -> str:
        """A hash of everything that the binary depends on (paths of the installation don't count)."""
        digest = hashlib.sha256()
        torch_folder = str(Path(torch.__file__).parent)
        for file in (*self.sources, *self.headers):
            digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
        words = [word for suffix, command in sorted(self.commands.items()) for word in (suffix, *command)]
        for word in (*words, *self.link, *self.identity):
            digest.update(word.replace(torch_folder, "TORCH").encode() + b"\0")
        return digest.hexdigest()[:32]


_lock = threading.Lock()  # several threads may be the first to need the library
_registered: set[Callable[[], None]] = set()
_loaded: Path | None = None
_failure: BuildError | None = None  # a build that failed once in this process isn't tried again at every call
_cuda_failure: BuildError | None = None  # why the loaded library has no CUDA kernels although there is a GPU


def load_native(register: Callable[[], None] | None = None, *, instruction_set: str = "native") -> None:
    """Builds the native library unless the cache has it, and loads its ops (`torch.ops.rwkv7`). Does nothing the second time.

    `register` tells PyTorch of some ops' shapes and gradients; it is called once, when the library is there.
    Raises BuildError, with a message that a person can act on, when it can't be built or loaded.
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
        try:
            _loaded = _build_and_load(_gpu_recipe(instruction_set))
            return
        except BuildError as error:
            _cuda_failure = error  # the CPU ops can still be had
    try:
        _loaded = _build_and_load(cpu_recipe(instruction_set))
    except BuildError as error:
        _failure = error
        raise


def why_no_cuda() -> str:
    """Why the loaded library has no CUDA kernels, with the compiler's words ('' when it has them)."""
    if _cuda_failure is not None:
        return str(_cuda_failure)
    return "" if torch.cuda.is_available() else "PyTorch sees no GPU"


def _build_and_load(recipe: Recipe) -> Path:
    path = build(recipe)
    try:
        torch.ops.load_library(path)
    except OSError as first:  # a damaged file (a full disk, a crash): once more from the start
        shutil.rmtree(path.parent, ignore_errors=True)
        path = build(recipe)
        try:
            torch.ops.load_library(path)
        except OSError as second:
            raise BuildError(f"the native library was built but can't be loaded: {second}") from first
    return path


def cpu_recipe(instruction_set: str = "native") -> Recipe:
    """The recipe of the CPU ops for this machine (or for a named instruction set)."""
    compiler = find_compiler()
    torch_folder = Path(torch.__file__).parent
    machine = INSTRUCTION_SETS[instruction_set]
    if instruction_set == "native":
        machine = ("-march=native",) if platform.machine() in ("x86_64", "AMD64") else ("-mcpu=native",)
    flags = (
        "-std=c++17", "-O3", *machine, "-ffp-contract=fast", "-fno-math-errno", "-fPIC",
        f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-isystem", str(torch_folder / "include"),
    )  # fmt: skip
    return Recipe(
        compiler=compiler,
        sources=tuple(SOURCE_FOLDER / name for name in CPU_SOURCES),
        headers=tuple(SOURCE_FOLDER / name for name in HEADERS),
        commands={".cpp": (compiler, *flags)},
        link=(compiler, "-shared", f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"),
        identity=(version_of(compiler), platform.machine(), _processor_features(), torch.__version__, sys.platform),
    )


def _gpu_recipe(instruction_set: str) -> Recipe:
    if torch.version.hip:
        from src.ops.rocm import rocm_recipe  # it takes its parts from here

        return rocm_recipe(instruction_set)
    return cuda_recipe(instruction_set)


def cuda_recipe(instruction_set: str = "native") -> Recipe:
    """The recipe of the CPU and CUDA ops, for the GPUs present (or those in TORCH_CUDA_ARCH_LIST)."""
    base = cpu_recipe(instruction_set)
    nvcc = find_nvcc()
    version = version_of(nvcc)
    found = re.search(r"release (\d+)\.(\d+)", version)
    wanted = torch.version.cuda or ""
    if found is None or found[1] != wanted.split(".")[0]:
        raise BuildError(
            f"nvcc ({nvcc}) is of CUDA {'.'.join(found.groups()) if found else 'an unknown version'}, but this PyTorch was built "
            f"for CUDA {wanted}: install the CUDA toolkit {wanted} (and point CUDA_HOME at it), or a PyTorch for your CUDA"
        )
    nvcc_flags = ("-std=c++17", "-O3", "-ccbin", base.compiler, "-Xcompiler", "-fPIC", *gpu_targets())
    return Recipe(
        compiler=base.compiler,
        sources=(*base.sources, *(SOURCE_FOLDER / name for name in CUDA_SOURCES)),
        headers=(*base.headers, *(SOURCE_FOLDER / name for name in CUDA_HEADERS)),
        commands={**base.commands, ".cu": (nvcc, *nvcc_flags)},
        # nvcc knows where its runtime lies, also when it is a wrapper's name; PyTorch has the same one loaded.
        link=(nvcc, "-ccbin", base.compiler, "-cudart=shared", *base.link[1:], "-ltorch_cuda"),
        identity=(*base.identity, version, wanted),
    )


def gpu_targets() -> tuple[str, ...]:
    """nvcc's -gencode options for TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX"), or for the GPUs present."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not wanted:
        devices = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        wanted = [f"{major}.{minor}" for major, minor in sorted(devices)]
    options = []
    oldest = OLDEST_GPU_OF_CUDA_13 if int((torch.version.cuda or "13").split(".")[0]) >= 13 else OLDEST_GPU
    for target in wanted:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", target)
        if match is None:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST has {target!r}; expected capabilities like '8.0;9.0' or '9.0+PTX'")
        major, minor, variant, ptx = match.groups()
        if (int(major), int(minor)) < oldest:
            raise BuildError(
                f"the CUDA kernels need a GPU of capability {oldest[0]}.{oldest[1]} or later (7.0 with a torch for CUDA 12), this one "
                f"has {major}.{minor}; use --kernel reference"
            )
        number = f"{major}{minor}{variant}"
        options += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if ptx:
            options += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return tuple(options)


def cache_folder() -> Path:
    """Where built libraries stay: $XDG_CACHE_HOME/rwkv7-native, by default ~/.cache/rwkv7-native."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if root else Path.home() / ".cache") / "rwkv7-native"


def build(recipe: Recipe, cache: Path | None = None) -> Path:
    """The library of `recipe`: from the cache, or built now.

    A cache that can't be written is replaced by a temporary folder, with a warning.
    """
    cache = cache_folder() if cache is None else cache
    final = cache / recipe.key() / LIBRARY
    if final.is_file():
        return final
    try:
        # Where a file system has no locks several may build at once, each in a folder of its own: harmless.
        with file_lock(cache / "lock", wait=True, warn=False):
            if not final.is_file():  # another process may have built it while we waited
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


def _build_into(recipe: Recipe, final: Path) -> None:
    final.parent.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="build-", dir=final.parent.parent))
    try:
        _compile(recipe, work)
        whole = work / "whole"
        whole.mkdir()
        os.rename(work / LIBRARY, whole / LIBRARY)
        try:
            os.rename(whole, final.parent)
        except OSError:
            if not final.is_file():  # not just another process that was first
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _compile(recipe: Recipe, work: Path) -> None:
    if recipe.prepare is not None:
        recipe = recipe.prepare(recipe, work)
    (work / "build.ninja").write_text(_ninja_file(_joined(recipe, work)), encoding="utf-8")
    ninja = [find_ninja(), "-C", str(work)]
    # Messages in English, so that they can be searched for.
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(
        ninja, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
    )
    if done.returncode == 0:
        return
    words = done.stdout.strip()[-6000:]
    if "No space left on device" in words:
        raise OSError(28, "No space left on device")
    if done.returncode == -signal.SIGKILL or any(
        sign in words for sign in ("Killed", "signal 9", "virtual memory exhausted", "out of memory")
    ):
        advice = "The compiler ran out of memory: it needs about 500 MB; close something, or add swap, and start again."
    elif "internal compiler error" in words or "PLEASE submit a bug report" in words:  # g++'s and clang's words
        advice = f"{recipe.compiler} itself crashed: name another compiler, or another version of it, in CXX (such as g++-14 or clang++)."
    else:
        advice = f"Check that {recipe.compiler} can compile C++17 (g++ 9 or clang 11 and later), or name another compiler in CXX."
    raise BuildError(f"the native library could not be built. {advice} The compiler's words:\n{words}")


def _joined(recipe: Recipe, work: Path) -> Recipe:
    """The C++ sources as two files that include them, of about equal length: half of a small source's time goes into PyTorch's headers."""
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

    def shell(words: tuple[str, ...]) -> str:
        return " ".join("'" + escape(word).replace("'", "'\\''") + "'" for word in words)

    def path(file: Path) -> str:
        return escape(str(file)).replace(" ", "$ ").replace(":", "$:")

    lines = ["ninja_required_version = 1.3"]
    for suffix, command in recipe.commands.items():
        lines += [f"rule compile_{suffix[1:]}", f"  command = {shell(command)} -c $in -o $out"]
    lines += ["rule link", f"  command = {shell(recipe.link[:1])} $in {shell(recipe.link[1:])} -o $out"]
    objects = [f"{number}-{source.stem}.o".replace(" ", "-") for number, source in enumerate(recipe.sources)]
    for source, name in zip(recipe.sources, objects, strict=True):
        lines.append(f"build {name}: compile_{source.suffix[1:]} {path(source)}")
    lines += [f"build {LIBRARY}: link {' '.join(objects)}", f"default {LIBRARY}", ""]
    return "\n".join(lines)


def _processor_features() -> str:
    """What -march=native depends on: the model and feature flags of the processor."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()
    wanted = ("flags", "Features", "model name", "cpu family", "model", "CPU implementer", "CPU part")
    return "\n".join(sorted({line for line in text.splitlines() if line.split(":")[0].strip() in wanted}))
