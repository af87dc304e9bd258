"""The tools that build the native library: where they are, which version, and what to install where one is missing."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch


class BuildError(RuntimeError):
    """The native library, or the kernel asked for, is not available.

    problem   what is missing or went wrong: "no C++ compiler (looked for c++, g++, clang++)"
    advice    what to do about it; "" where there is nothing
    output    the compiler's own messages; "" where it said nothing
    kernel    the value of --kernel that needed it; "" before a kernel was chosen

    `str()` is `problem; advice`, with the output on the lines after it.
    """

    def __init__(self, problem: str, *, advice: str = "", output: str = "", kernel: str = "") -> None:
        super().__init__(problem)  # only the problem: str() adds the rest
        self.problem, self.advice, self.output, self.kernel = problem, advice, output, kernel

    def __str__(self) -> str:
        first_line = f"{self.problem}; {self.advice}" if self.advice else self.problem
        return f"{first_line}\n{self.output}" if self.output else first_line


def find_compiler() -> str:
    """The C++ compiler: $CXX, or the first of c++, g++, clang++ on the PATH."""
    if sys.platform == "win32":  # the sources compile there, but how they are linked with torch was never tried
        raise BuildError("the native kernels are not built on Windows", advice="run in WSL (docs/platforms.md)")
    name_in_environment = os.environ.get("CXX", "")
    if name_in_environment:
        path = shutil.which(name_in_environment)
        if path is None:
            raise BuildError(
                f"CXX is set to {name_in_environment!r}, which does not exist",
                advice="unset CXX or name an installed C++ compiler",
            )
        return path
    # c++ first: the system's own choice of a compiler.
    for name in ("c++", "g++", "clang++"):
        path = shutil.which(name)
        if path is not None:
            return path
    raise BuildError(
        "no C++ compiler (looked for c++, g++, clang++)",
        advice="install one: `sudo apt install g++` (Debian, Ubuntu), `sudo dnf install gcc-c++` (Fedora), "
        "`xcode-select --install` (macOS), `conda install cxx-compiler` (conda)",
    )


def find_nvcc() -> str:
    """nvcc: under $CUDA_HOME, on the PATH, or in /usr/local/cuda."""
    return _find_in_toolkit(
        "nvcc",
        "CUDA_HOME",
        "/usr/local/cuda",
        BuildError(
            "there is a GPU but no nvcc",
            advice=f"install the CUDA toolkit {torch.version.cuda} (for example "
            f"`conda install -c nvidia cuda-toolkit={torch.version.cuda}`, or NVIDIA's packages) "
            "or set CUDA_HOME to its folder",
        ),
    )


def find_hipcc() -> str:
    """hipcc: under $ROCM_HOME, on the PATH, or in /opt/rocm."""
    return _find_in_toolkit(
        "hipcc",
        "ROCM_HOME",
        "/opt/rocm",
        BuildError(
            "there is an AMD GPU but no hipcc",
            advice=f"install the HIP compiler of ROCm {torch.version.hip} "
            "(`sudo apt install hipcc` from AMD's packages) or set ROCM_HOME to its folder",
        ),
    )


def _find_in_toolkit(name: str, variable: str, usual_folder: str, missing: BuildError) -> str:
    home = os.environ.get(variable, "")
    if home:
        # A folder that somebody named is the only one looked at: another version from the PATH would be a surprise.
        path = shutil.which(name, path=str(Path(home) / "bin"))
        if path is None:
            raise BuildError(
                f"{variable} is {home!r}, which has no bin/{name}", advice="unset it or name the toolkit's folder"
            )
        return path
    # Installers of the toolkits don't put their folder on the PATH.
    path = shutil.which(name) or shutil.which(name, path=f"{usual_folder}/bin")
    if path is None:
        raise missing
    return path


def find_ninja() -> str:
    """ninja from the Python package of that name, or from the PATH."""
    # find_spec and not a try: an import that fails inside of the package is another problem than a missing one.
    spec = importlib.util.find_spec("ninja")
    if spec is not None:
        import ninja

        # The package's own folder first: its script may lie in a virtual environment that is not on the PATH.
        packaged = shutil.which("ninja", path=ninja.BIN_DIR)
        if packaged is not None:
            return packaged
    path = shutil.which("ninja")
    if path is None:
        raise BuildError("ninja is not installed", advice="`pip install ninja`")
    return path


def version_of(compiler: str) -> str:
    """The output of `compiler --version`; BuildError when it doesn't run."""
    try:
        # A minute: the first start of a compiler from a cold network file system takes many seconds.
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the compiler {compiler} does not run: {error}") from error
    if done.returncode != 0:  # a compiler for another architecture, or a wrapper without what it wraps
        raise BuildError(
            f"the compiler {compiler} does not run (exit {done.returncode})", output=(done.stdout + done.stderr).strip()
        )
    return done.stdout
