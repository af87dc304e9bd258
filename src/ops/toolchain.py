"""The tools that build the native library: where they are, what they say of themselves, and what to install where one is missing."""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import torch


class BuildError(RuntimeError):
    """The native library can't be had; the message has the compiler's words and what to do."""


def find_compiler() -> str:
    """The C++ compiler: $CXX, or the first of c++, g++, clang++ on the PATH."""
    wanted = os.environ.get("CXX", "")
    if wanted:
        found = shutil.which(wanted)
        if found is None:
            raise BuildError(
                f"CXX is set to {wanted!r}, which is not there; unset CXX or name an installed C++ compiler"
            )
        return found
    for name in ("c++", "g++", "clang++"):
        found = shutil.which(name)
        if found is not None:
            return found
    raise BuildError(
        "no C++ compiler (looked for c++, g++, clang++). Install one: `sudo apt install g++` (Debian, Ubuntu), "
        "`sudo dnf install gcc-c++` (Fedora), `xcode-select --install` (macOS), `conda install cxx-compiler` (conda)"
    )


def find_nvcc() -> str:
    """nvcc: under $CUDA_HOME, on the PATH, or in /usr/local/cuda."""
    return _of_toolkit(
        "nvcc",
        "CUDA_HOME",
        "/usr/local/cuda",
        f"there is a GPU but no nvcc: install the CUDA toolkit {torch.version.cuda} (for example "
        f"`conda install -c nvidia cuda-toolkit={torch.version.cuda}`, or NVIDIA's packages) or set CUDA_HOME to its folder",
    )


def find_hipcc() -> str:
    """hipcc: under $ROCM_HOME, on the PATH, or in /opt/rocm."""
    return _of_toolkit(
        "hipcc",
        "ROCM_HOME",
        "/opt/rocm",
        f"there is an AMD GPU but no hipcc: install the HIP compiler of ROCm {torch.version.hip} (`sudo apt install hipcc` from "
        "AMD's packages) or set ROCM_HOME to its folder",
    )


def _of_toolkit(name: str, variable: str, usual_folder: str, advice: str) -> str:
    home = os.environ.get(variable, "")
    if home:
        found = shutil.which(name, path=str(Path(home) / "bin"))
        if found is None:
            raise BuildError(
                f"{variable} is {home!r}, but there is no bin/{name} in it; unset it or name the toolkit's folder"
            )
        return found
    found = shutil.which(name) or shutil.which(name, path=f"{usual_folder}/bin")
    if found is None:
        raise BuildError(advice)
    return found


def find_ninja() -> str:
    """ninja from the Python package of that name, or from the PATH."""
    spec = importlib.util.find_spec("ninja")
    if spec is not None:
        import ninja

        packaged = shutil.which("ninja", path=ninja.BIN_DIR)
        if packaged is not None:
            return packaged
    found = shutil.which("ninja")
    if found is None:
        raise BuildError("ninja is not installed: `pip install ninja`")
    return found


def version_of(compiler: str) -> str:
    """What the compiler says of itself; BuildError when it doesn't run."""
    try:
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the compiler {compiler} does not run: {error}") from error
    if done.returncode != 0:
        raise BuildError(
            f"the compiler {compiler} does not run (exit {done.returncode}):\n{(done.stdout + done.stderr).strip()}"
        )
    return done.stdout
