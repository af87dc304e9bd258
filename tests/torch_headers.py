"""PyTorch's stable ABI headers of releases other than the one installed, taken from the wheels on the package index."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from src.files import file_lock
from src.ops.build import cache_folder

# What the sources may include: anything else has no stable ABI.
FOLDERS = ("torch/csrc/stable/", "torch/csrc/inductor/aoti_torch/", "torch/headeronly/")
# The wheels for macOS are the smallest (80 to 140 MB, Linux 500 to 900), and these headers are the same on every
# platform.
PLATFORMS = ("macosx_11_0_arm64", "macosx_14_0_arm64")
PYTHON = "3.12"  # a version that every checked release has wheels for
DOWNLOAD_SECONDS = 300


class Unavailable(Exception):
    """The headers can't be downloaded on this machine; the message says why."""


_failed: dict[str, Unavailable] = {}  # one attempt per release and process: without a network each takes many seconds


def headers_of(version: str) -> Path:
    """The include folder of a torch release: from the cache next to the native libraries, or downloaded now."""
    if version in _failed:
        raise _failed[version]
    try:
        return _cached(version)
    except Unavailable as reason:
        _failed[version] = reason
        raise


def _cached(version: str) -> Path:
    root = cache_folder().parent / "rwkv7-torch-headers"
    final = root / version
    if final.is_dir():
        return final
    root.mkdir(parents=True, exist_ok=True)
    with file_lock(root / "lock", wait=True), tempfile.TemporaryDirectory(prefix="download-", dir=root) as folder:
        if not final.is_dir():  # another test process may have been first
            _extract(_download(version, Path(folder)), Path(folder) / "include")
            (Path(folder) / "include").rename(final)
    return final


def _download(version: str, folder: Path) -> Path:
    """The wheel; it is deleted with `folder`."""
    options = ["--no-deps", "--only-binary=:all:", "--python-version", PYTHON, "--dest", str(folder)]
    options += [option for platform in PLATFORMS for option in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "download", *options, f"torch=={version}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"the wheel of torch {version} took over {DOWNLOAD_SECONDS} s to download") from error
    wheels = list(folder.glob("torch-*.whl"))
    if done.returncode != 0 or not wheels:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines()]
        reasons = [line for line in lines if line.startswith("ERROR") or "(constraint)" in line] or lines[-1:]
        raise Unavailable(f"pip can't download the wheel of torch {version}: {'; '.join(reasons)}")
    return wheels[0]


def _extract(wheel: Path, include: Path) -> None:
    prefix = "torch/include/"
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            inside = name.removeprefix(prefix)
            if name.startswith(prefix) and not name.endswith("/") and inside.startswith(FOLDERS):
                path = include / inside
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(name) as source, open(path, "wb") as target:
                    shutil.copyfileobj(source, target)
