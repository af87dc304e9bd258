"""What a power cut leaves of a folder: rebuilt from the log of its system calls, under several models of a disk.

A file is an inode with content; a folder maps names to inodes. fsync of a file makes its content durable, fsync of a
folder its names. What was not made durable before the cut is, by model:

    dropped      lost: contents and names are those of the last fsync
    reordered    each write and each name on its own there or not, at random
    torn         all names are there; of the writes since the fsync a random part, the last of them cut in the middle of
                 a sector, gaps filled with zeros
    names first  all names and sizes are there, and none of the content: zeros
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.library import KINDS

# inode and content (None: a folder) by relative path, folders first
Snapshot = dict[str, tuple[int, bytes | None]]
MODELS = ("dropped", "reordered", "torn", "names first")
HEADER = struct.Struct("=IIIIQQq")
SECTOR = 512


@dataclass(frozen=True)
class Call:
    kind: str
    path: str  # relative to the folder; "" is the folder itself
    other: str  # the new name of a rename
    inode: int
    offset: int  # of a write; the length of a truncation
    data: bytes


@dataclass(frozen=True)
class Recording:
    before: Snapshot  # the folder when the recorded run started
    calls: list[Call]


def snapshot(folder: Path) -> Snapshot:
    contents: Snapshot = {"": (folder.stat().st_ino, None)}
    for path in sorted(folder.rglob("*")):
        content = None if path.is_dir() else path.read_bytes()
        contents[path.relative_to(folder).as_posix()] = (path.stat().st_ino, content)
    return contents


def read_log(path: Path) -> list[Call]:
    return list(_calls(path.read_bytes()))


def _calls(content: bytes) -> Iterator[Call]:
    at = 0
    while at < len(content):
        kind, path, other, _, inode, size, offset = HEADER.unpack_from(content, at)
        at += HEADER.size
        parts = []
        for length in (path, other, size):
            parts.append(content[at : at + length])
            at += length
        names = [part.decode().strip("/").removesuffix(" (deleted)") for part in parts[:2]]
        yield Call(KINDS[kind], names[0], names[1], inode, offset, parts[2])


@dataclass(eq=False)
class _Node:
    """A file or a folder; `pending` are its changes since its last fsync."""

    is_folder: bool
    durable: bytearray = field(default_factory=bytearray)
    content: bytearray = field(default_factory=bytearray)
    names: dict[str, _Node] = field(default_factory=dict)
    durable_names: dict[str, _Node] = field(default_factory=dict)
    pending: list[tuple] = field(default_factory=list)

    def change(self, *change: object) -> None:
        self.pending.append(change)
        _apply(change, self.content, self.names)

    def sync(self) -> None:
        self.durable, self.durable_names, self.pending = bytearray(self.content), dict(self.names), []


def _apply(change: tuple, content: bytearray, names: dict[str, _Node]) -> None:
    match change:
        case ("write", offset, data):
            content.extend(bytes(max(0, offset - len(content))))
            content[offset : offset + len(data)] = data
        case ("truncate", length):
            del content[length:]
            content.extend(bytes(length - len(content)))
        case ("add", name, node):
            names[name] = node
        case ("remove", name):
            names.pop(name, None)


class Disk:
    """The folder while the calls of a log are replayed. It begins as `before` is, all of it durable."""

    def __init__(self, before: Snapshot) -> None:
        self._by_inode: dict[int, _Node] = {}
        for path, (inode, content) in before.items():
            node = self._by_inode[inode] = _Node(content is None, content=bytearray(content or b""))
            if path == "":
                self.root = node
            else:
                folder, name = self._folder_of(path)
                folder.names[name] = node
        for node in self._by_inode.values():
            node.sync()

    def _folder_of(self, path: str) -> tuple[_Node, str]:
        *folders, name = path.split("/")
        node = self.root
        for folder in folders:
            node = node.names[folder]
        return node, name

    def replay(self, call: Call) -> None:
        match call.kind:
            case "open" | "mkdir":
                folder, name = self._folder_of(call.path)
                node = self._by_inode[call.inode] = _Node(call.kind == "mkdir")
                folder.change("add", name, node)
            case "write":
                self._by_inode[call.inode].change("write", call.offset, call.data)
            case "truncate":
                self._by_inode[call.inode].change("truncate", call.offset)
            case "fsync":
                (self.root if call.path == "" else self._by_inode[call.inode]).sync()
            case "unlink":
                folder, name = self._folder_of(call.path)
                folder.change("remove", name)
            case "rename":
                (old, old_name), (new, new_name) = self._folder_of(call.path), self._folder_of(call.other)
                node = old.names[old_name]
                old.change("remove", old_name)
                new.change("add", new_name, node)

    def write(self, target: Path, model: str, chance: random.Random) -> None:
        """What a power cut now would leave, to the folder `target`."""
        _write(self.root, target, model, chance)


def _write(node: _Node, target: Path, model: str, chance: random.Random) -> None:
    content, names = _after_cut(node, model, chance)
    if node.is_folder:
        target.mkdir(exist_ok=True)
        for name, child in names.items():
            _write(child, target / name, model, chance)
    else:
        target.write_bytes(content)


def _after_cut(node: _Node, model: str, chance: random.Random) -> tuple[bytearray, dict[str, _Node]]:
    content, names = bytearray(node.durable), dict(node.durable_names)
    if model == "names first":
        content.extend(bytes(max(0, len(node.content) - len(content))))
        return content[: len(node.content)], node.names
    if model == "torn" and node.is_folder:
        return content, node.names
    if model == "dropped":
        return content, names
    for change in node.pending:
        if chance.random() < 0.5:
            continue
        if model == "torn" and change is node.pending[-1] and change[0] == "write":
            change = ("write", change[1], change[2][: chance.randrange(len(change[2]) + 1) // SECTOR * SECTOR])
        _apply(change, content, names)
    return content, names
