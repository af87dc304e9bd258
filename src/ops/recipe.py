"""What the native library is compiled from and how: the part that every machine has, the CPU ops.

Sources are found by folder: every cuda/cpu/*.cpp, and for a GPU every cuda/*.cpp and cuda/*.cu. Nobody keeps a list,
so a new file is compiled and a new header counts in the cache key as soon as it lies there.
"""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from src.ops.toolchain import find_compiler, version_of

SOURCE_FOLDER = Path(__file__).resolve().parents[2] / "cuda"
CPU_FOLDER = SOURCE_FOLDER / "cpu"
STABLE_ABI = "0x020a000000000000"  # torch 2.10: the oldest whose headers have all that the sources use

# Options per instruction set: the machine's own, or a fixed one (to measure and test what other machines run).
INSTRUCTION_SETS = {
    "native": (),
    "avx512": ("-march=x86-64-v4",),
    "avx2": ("-march=x86-64-v3",),
    "baseline": ("-march=x86-64",),
}


@dataclass(frozen=True)
class Recipe:
    """What is compiled and how. `commands`: by a source's suffix, the compile command before `-c SOURCE -o OBJECT`."""

    compiler: str
    sources: tuple[Path, ...]
    headers: tuple[Path, ...]
    commands: dict[str, tuple[str, ...]]
    link: tuple[str, ...]
    identity: tuple[str, ...] = field(default=())  # versions of the tools, features of the processor
    prepare: Callable[[Recipe, Path], Recipe] | None = None  # a step in the build folder before compiling

    def key(self) -> str:
        """A hash of everything that the binary depends on (paths of the installation don't count)."""
        digest = hashlib.sha256()
        torch_folder = str(Path(torch.__file__).parent)
        for file in (*self.sources, *self.headers):
            digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
        arguments = [part for suffix, command in sorted(self.commands.items()) for part in (suffix, *command)]
        for part in (*arguments, *self.link, *self.identity):
            digest.update(part.replace(torch_folder, "TORCH").encode() + b"\0")
        return digest.hexdigest()[:32]


def files_in(folder: Path, *suffixes: str) -> tuple[Path, ...]:
    """The files directly in `folder` with one of these suffixes."""
    # Sorted, since the order is part of the cache key and a folder has none.
    return tuple(sorted(path for path in folder.iterdir() if path.suffix in suffixes))


def cpu_recipe(instruction_set: str = "native") -> Recipe:
    """The recipe of the CPU ops for this machine (or for a named instruction set)."""
    compiler = find_compiler()
    torch_folder = Path(torch.__file__).parent
    machine = INSTRUCTION_SETS[instruction_set]
    if instruction_set == "native":
        machine = ("-march=native",) if platform.machine() in ("x86_64", "AMD64") else ("-mcpu=native",)
    # A multiply and an add may become one instruction, and math functions need not set errno. Not -ffast-math: NaN
    # and infinity must stay visible.
    numerics = ("-ffp-contract=fast", "-fno-math-errno")
    torch_headers = (f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-isystem", str(torch_folder / "include"))
    return Recipe(
        compiler=compiler,
        sources=files_in(CPU_FOLDER, ".cpp"),
        headers=(*files_in(CPU_FOLDER, ".h"), *files_in(SOURCE_FOLDER, ".h")),
        commands={".cpp": (compiler, "-std=c++17", "-O3", *machine, *numerics, "-fPIC", *torch_headers)},
        link=(compiler, "-shared", f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"),
        identity=(version_of(compiler), platform.machine(), _processor_features(), torch.__version__, sys.platform),
    )


def gpu_sources() -> tuple[Path, ...]:
    """The kernels and their bindings, which a GPU's recipe adds to those of the CPU."""
    return files_in(SOURCE_FOLDER, ".cpp", ".cu")


def gpu_headers() -> tuple[Path, ...]:
    """The headers that only GPU sources include."""
    return files_in(SOURCE_FOLDER, ".cuh")


def _processor_features() -> str:
    """What -march=native depends on: the model and feature flags of the processor."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # macOS has no /proc
        return platform.processor()
    fields = ("flags", "Features", "model name", "cpu family", "model", "CPU implementer", "CPU part")
    return "\n".join(sorted({line for line in text.splitlines() if line.split(":")[0].strip() in fields}))
