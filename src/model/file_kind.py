"""The kind of a weights file by its first bytes: the ending of its name proves nothing, as files get renamed."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Literal

from src.errors import UserError

Kind = Literal["zip", "pickle", "safetensors", "unknown"]

FIRST_BYTES = 64  # enough for every signature below
# A safetensors file begins with the length of its JSON header. Its own reader takes 100 MB, which may name two million
# tensors of a kilobyte of memory each; a model of 100 layers has half a megabyte.
MAX_SAFETENSORS_HEADER = 16_000_000
DOWNLOAD_AGAIN = "download the file itself, not the page or pointer that stands for it"
# Beginnings of files that people give as weights, lower case; what such a file is, and what to do.
FOREIGN = {
    b"gguf": (
        "a GGUF file (llama.cpp)",
        "a model is converted by: python -m src.inference.export FILE OUT.pth; adapters are not read from GGUF",
    ),
    # GGML's magic numbers ggml, ggmf (rwkv.cpp) and ggjt are stored as little-endian integers.
    **dict.fromkeys(
        (b"lmgg", b"fmgg", b"tjgg"),
        ("a GGML file (rwkv.cpp, llama.cpp)", "name the .pth file that it was converted from"),
    ),
    b"version https://git-lfs": ("a Git LFS pointer: the file itself was not downloaded", "run git lfs pull"),
    b"<!doctype": ("a web page", DOWNLOAD_AGAIN),
    b"<html": ("a web page", DOWNLOAD_AGAIN),
    b"\x89hdf": ("an HDF5 file", ""),
    b"\x93numpy": ("a NumPy array", ""),
    b"mmididx": ("the index of training data (binidx)", "it belongs to --data_file"),
    **dict.fromkeys(
        (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf", b"rar!"), ("a compressed file", "decompress it first")
    ),
}


def file_kind(path: Path) -> Kind:
    """Which reader a weights file needs: "zip" (torch.save), "pickle" (torch.save before 1.6), "safetensors", or
    "unknown" (which torch.load refuses, with its reason).

    Raises UserError, naming the kind, for a file of another program; OSError when `path` can't be read.
    """
    with path.open("rb") as file:
        start = file.read(FIRST_BYTES)
    # First, as the length that it begins with may look like the signature of a pickle or of gzip.
    if start[8:9] == b"{" and 0 < int.from_bytes(start[:8], "little") <= MAX_SAFETENSORS_HEADER:
        return "safetensors"
    for signature, (kind, advice) in FOREIGN.items():
        if start.lstrip().lower().startswith(signature):
            raise UserError(
                f"{kind}, which is not read", given=path, expected="weights (.pth, .safetensors)", advice=advice
            )
    if start.startswith(b"PK\x03\x04"):
        _check_archive(path)
        return "zip"
    # the opcode PROTO, with which every pickle of protocol 2 or later begins
    return "pickle" if start.startswith(b"\x80") else "unknown"


def _check_archive(path: Path) -> None:
    """Raises UserError for a zip archive that torch.save didn't write, such as NumPy's .npz or a zipped folder."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # zipfile raises half a dozen types for a damaged archive
        return  # cut short: its reader fails, and says so
    if any("/code/" in f"/{name}" for name in names):
        raise UserError("a TorchScript program", given=path, expected="a state dict saved by torch.save")
    if names and not any(name.split("/")[-1] == "data.pkl" for name in names):
        raise UserError(
            f"a zip archive that torch.save didn't write (it contains {names[0]})",
            given=path,
            expected="a state dict saved by torch.save",
            advice="unpack it first if it is a packed weights file",
        )
