"""What a frozen encoder makes of the media of a data set, computed once and kept next to the data (--cache_features).

PREFIX.bin/.idx   one document per medium: its rows [tokens, width] as bytes
PREFIX.json       what they were made from, and the names in order; written last
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from src.dataset.binidx import BinIdxWriter, MMapIndexedDataset, with_ending
from src.dataset.media_reader import MediaReader
from src.files import atomic_write, file_lock
from src.multimodal.encoder import EncoderSpec

FORMAT = 1
BATCH = 16  # media that the encoder gets at a time


class FeatureCache:
    """`cache[name]` is rows [tokens, width] in `dtype`."""

    def __init__(self, prefix: Path, names: list[str], width: int, dtype: torch.dtype) -> None:
        self.width, self.dtype = width, dtype
        self._data = MMapIndexedDataset(prefix)
        self._number = {name: i for i, name in enumerate(names)}

    @property
    def blank(self) -> Tensor:
        return torch.zeros(1, self.width, dtype=self.dtype)

    def __getitem__(self, name: str) -> Tensor:
        content = bytearray(self._data[self._number[name]].tobytes())
        return torch.frombuffer(content, dtype=self.dtype).view(-1, self.width)


def open_features(
    spec: EncoderSpec,
    reader: MediaReader,
    names: Iterable[str],
    prefix: Path,
    device: torch.device | str,
    dtype: torch.dtype,
    report: Callable[[str], None],
    build: Callable[[], nn.Module] | None = None,
    weights: str = "",
) -> FeatureCache:
    """The features of these media: those on the disk, where they were made from the same files with the same encoder,
    else computed now. One process computes, others that call it wait. Raises UserError, MediaError, OSError.

    `build`: makes the encoder, with weights of which `weights` is a hash; None: `spec.build`, with those of its folder.
    """
    names = sorted(set(names))
    made_from = {**_made_from(reader, names, dtype), "weights": weights}
    if not _is_current(prefix, made_from):
        with file_lock(with_ending(prefix, ".lock"), wait=True):
            if not _is_current(prefix, made_from):
                report(f"encoding {len(names):,} files once, into {prefix}.bin")
                _compute(spec, (build or spec.build)(), reader, names, prefix, device, dtype)
                with atomic_write(with_ending(prefix, ".json"), "w") as file:
                    json.dump(made_from, file)
    return FeatureCache(prefix, names, spec.width, dtype)


def _made_from(reader: MediaReader, names: list[str], dtype: torch.dtype) -> dict[str, Any]:
    """What the features depend on: the encoder's files and settings, and each medium's size and time of change."""
    digest = hashlib.blake2b(digest_size=16)
    for name in names:
        stat = reader.path(name).stat()
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    folder = str(reader.identity["encoder"]).removeprefix("hf:")
    files = sorted(path for path in Path(folder).glob("*") if path.is_file()) if Path(folder).is_dir() else []
    encoder = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    media = digest.hexdigest()
    return {"format": FORMAT, "encoder": encoder, "settings": reader.identity, "media": media, "dtype": str(dtype)}


def _is_current(prefix: Path, made_from: dict[str, Any]) -> bool:
    try:
        return json.loads(with_ending(prefix, ".json").read_text(encoding="utf-8")) == made_from
    except (FileNotFoundError, ValueError):
        return False


@torch.no_grad()
def _compute(
    spec: EncoderSpec,
    encoder: nn.Module,
    reader: MediaReader,
    names: list[str],
    prefix: Path,
    device: torch.device | str,
    dtype: torch.dtype,
) -> None:
    with_ending(prefix, ".json").unlink(missing_ok=True)  # it never describes features that aren't there
    encoder.to(device, dtype).eval()
    with BinIdxWriter(prefix, np.uint8) as out:
        for first in range(0, len(names), BATCH):
            media = [reader.read(name) for name in names[first : first + BATCH]]
            prepared = [spec.prepare(medium) for medium in media]
            lengths = torch.tensor([len(part) for part in prepared], device=device)
            rows = encoder(torch.cat(prepared).to(device), lengths).to("cpu", dtype)
            for part in rows.split([spec.count(medium) for medium in media]):
                content = part.contiguous().view(torch.uint8).numpy().tobytes()
                out.add_bytes(content, np.array([len(content)], np.int32))
