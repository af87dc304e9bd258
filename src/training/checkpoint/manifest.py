"""A state's manifest: the files of the state with size and SHA-256. Whatever no writer of ours wrote is damage.

Of a file of tensors it has a SHA-256 for the header and for each block of `block_bytes` after it: a rank reads and
verifies those that it needs.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from src.errors import UserError

# 1 (manifests without a number): up to November 2026, tensors-0000.safetensors. 2: shards named by rank. 3: shards of
# every rank, with parts of tensors, hashed in blocks.
FORMAT_VERSION = 3
# Large enough that the hashes of a state of 800 GB are 60 MB of JSON, small enough that a rank that needs a 64th of a
# matrix of 4096 x 4096 reads little more.
BLOCK_BYTES = 1 << 20
MANIFEST, PAYLOAD = "manifest.json", "state.json"
SHARD_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}\.safetensors")


class DamagedStateError(Exception):
    """A state on disk is not what was written; the text says what is wrong with it, `folder` which state it is."""

    folder: Path | None = None


class Entry(NamedTuple):
    """What the manifest says about a file."""

    size: int  # bytes
    header_bytes: int  # of the first block; all of a file that has one SHA-256 (state.json, formats 1 and 2)
    block_bytes: int  # of each block after it, but the last
    hashes: tuple[str, ...]  # SHA-256 of each block


def parse_json(name: str, data: bytes) -> dict[str, Any]:
    """The object in a JSON file. Raises DamagedStateError."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:  # the latter: nested a hundred thousand times
        raise DamagedStateError(f"{name} can't be parsed ({error})") from error
    if not isinstance(content, dict):
        raise DamagedStateError(f"{name} is malformed: expected an object")
    return content


def parse_manifest(data: bytes, folder: Path) -> dict[str, Entry]:
    """The entries by file name: state.json and at least one file of tensors. Raises DamagedStateError, and UserError
    for a manifest of a later version."""
    manifest = parse_json(MANIFEST, data)
    version = manifest.get("version", 1)
    if type(version) is not int or version < 1:
        raise DamagedStateError(f"{MANIFEST} is malformed: version {version!r}")
    if version > FORMAT_VERSION:
        raise UserError(
            f"format version {version}",
            given=folder,
            expected=f"at most {FORMAT_VERSION}",
            advice="it was saved by a later version of this program: update this one",
        )
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise DamagedStateError(f"{MANIFEST} is malformed: it lists no files")
    block_bytes = manifest.get("block_bytes", BLOCK_BYTES)
    if type(block_bytes) is not int or block_bytes < 8 or block_bytes % 8:  # no value may lie across two blocks
        raise DamagedStateError(f"{MANIFEST} is malformed: blocks of {str(block_bytes)[:20]} bytes")
    entries = {name: _parse_entry(name, entry, block_bytes) for name, entry in files.items()}
    if PAYLOAD not in entries:
        raise DamagedStateError(f"{MANIFEST} does not list {PAYLOAD}")
    if len(entries) == 1:
        raise DamagedStateError(f"{MANIFEST} lists no file of tensors")
    return entries


def _parse_entry(name: str, entry: Any, block_bytes: int) -> Entry:
    # Names of ours only: another one may lead out of the folder, or be none that a file can have.
    if name != PAYLOAD and not SHARD_NAME.fullmatch(name):
        raise DamagedStateError(f"{MANIFEST} lists {name[:100]!r}, which is no file of a state")
    size, sha256 = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
    hashes: list[Any] = sha256 if isinstance(sha256, list) and name != PAYLOAD else [sha256]
    if type(size) is not int or size < 0 or not all(isinstance(block, str) for block in hashes):
        raise DamagedStateError(f"{MANIFEST} is malformed: the entry of {name} has no size and SHA-256")
    if hashes is not sha256:
        return Entry(size, size, block_bytes, tuple(hashes))
    header_bytes = entry.get("header_bytes")
    # a multiple of 8, as blocks: no value may lie across two of them
    if type(header_bytes) is not int or not 0 <= header_bytes <= size or header_bytes % 8:
        raise DamagedStateError(f"{MANIFEST} is malformed: the entry of {name} has no header")
    if len(hashes) != 1 + -(-(size - header_bytes) // block_bytes):
        raise DamagedStateError(f"{MANIFEST} is malformed: {name} has {len(hashes)} blocks")
    return Entry(size, header_bytes, block_bytes, tuple(hashes))
