"""The native library for AMD GPUs: cuda/*.cu as torch.utils.hipify translates it, compiled by hipcc.

The translation is made in the build folder: the repository has one copy of each kernel.
"""

from __future__ import annotations

import os
import shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import torch

from src.ops.recipe import Recipe, cpu_recipe, gpu_headers, gpu_sources
from src.ops.toolchain import find_hipcc, version_of


def rocm_recipe(instruction_set: str = "native") -> Recipe:
    """The recipe of the CPU and GPU ops for the AMD GPUs present (or those in PYTORCH_ROCM_ARCH)."""
    base = cpu_recipe(instruction_set)
    hipcc = find_hipcc()
    # Wherever hipcc lies, its runtime is in the lib folder next to its bin.
    libraries = Path(hipcc).resolve().parent.parent / "lib"
    flags = ("-std=c++17", "-O3", "-fPIC", *(f"--offload-arch={name}" for name in gpu_names()))
    return Recipe(
        compiler=base.compiler,
        sources=(*base.sources, *gpu_sources()),
        headers=(*base.headers, *gpu_headers()),
        commands={**base.commands, ".hip": (hipcc, *flags)},
        link=(*base.link, "-ltorch_hip", f"-L{libraries}", "-lamdhip64"),
        identity=(*base.identity, version_of(hipcc), torch.version.hip or ""),
        prepare=translate_sources,
    )


def translate_sources(recipe: Recipe, folder: Path) -> Recipe:
    """`recipe` with each .cu source replaced by its translation, written under `folder`."""
    from torch.utils.hipify import hipify_python

    # hipify rewrites whole folders, and decides by where a file lies what it may touch.
    before, after = folder / "cuda", folder / "hip"
    before.mkdir()
    for file in (*recipe.sources, *recipe.headers):
        if file.suffix in (".cu", ".cuh"):
            shutil.copy(file, before)
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # hipify prints a line for every file
        hipify_python.hipify(
            project_directory=str(before),
            output_directory=str(after),
            includes=[f"{before}/*"],
            extensions=(".cu", ".cuh"),
            extra_files=[str(path) for path in before.iterdir()],
            is_pytorch_extension=True,
            show_detailed=False,
        )
    # hipify chooses the folders below `after` itself, so the files are found by name.
    kernels = {path.stem: path for path in after.rglob("*.hip")}
    return replace(recipe, sources=tuple(kernels[x.stem] if x.suffix == ".cu" else x for x in recipe.sources))


def gpu_names() -> list[str]:
    """The processors to compile for, such as gfx90a: PYTORCH_ROCM_ARCH ("gfx90a;gfx942"), or the GPUs present."""
    listed = os.environ.get("PYTORCH_ROCM_ARCH", "").replace(";", " ").split()
    devices = range(torch.cuda.device_count())
    # The part after a colon ("gfx90a:sramecc+") is a mode of the card; code without it runs in every mode.
    return listed or sorted({torch.cuda.get_device_properties(i).gcnArchName.split(":")[0] for i in devices})
