"""Token files: documents are restored, damage is detected, and the format is Megatron's."""

import os
import pickle
import re
import struct
import sys
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from chat_models import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from data import compute_magic_prime, inspect_data
from src.dataset import BinIdxWriter, MMapIndexedDataset, binidx
from src.dataset.binidx import token_dtype
from src.errors import UserError

SAME_FOLDER = settings(max_examples=150)
DTYPES = ["uint8", "int8", "int16", "int32", "int64", "uint16"]


def write(prefix: Path, documents: list[list[int]], dtype: str = "uint16") -> None:
    with BinIdxWriter(prefix, dtype) as out:
        for ids in documents:
            out.add_document(ids)


def read_by_specification(prefix: Path) -> list[list[int]]:
    """An independent reader, written from the description of the format without using the module."""
    idx = prefix.with_suffix(".idx").read_bytes()
    assert idx[:9] == b"MMIDIDX\0\0"
    version, code, n, bounds = struct.unpack_from("<QBQQ", idx, 9)
    assert version == 1
    kind = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}[code]
    start = 34
    sizes = struct.unpack_from(f"<{n}i", idx, start)
    pointers = struct.unpack_from(f"<{n}q", idx, start + 4 * n)
    assert struct.unpack_from(f"<{bounds}q", idx, start + 12 * n) == tuple(range(n + 1))
    assert len(idx) == start + 12 * n + 8 * bounds
    data = prefix.with_suffix(".bin").read_bytes()
    return [np.frombuffer(data, kind, size, pointer).tolist() for size, pointer in zip(sizes, pointers, strict=True)]


@SAME_FOLDER
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_documents_are_restored(tmp_path: Path, data: st.DataObject, dtype: str) -> None:
    info = np.iinfo(dtype)
    documents = data.draw(st.lists(st.lists(st.integers(int(info.min), int(info.max)))))
    write(tmp_path / "x", documents, dtype)
    assert read_by_specification(tmp_path / "x") == documents
    dataset = MMapIndexedDataset(tmp_path / "x")
    assert [dataset[i].tolist() for i in range(len(dataset))] == documents
    assert dataset.tokens.tolist() == [token for ids in documents for token in ids]
    assert dataset.n_tokens == len(dataset.tokens)
    assert dataset.dtype == dtype
    assert dataset.doc_idx.tolist() == list(range(len(documents) + 1))


@pytest.mark.parametrize("ending", ["", ".bin", ".idx"])
def test_a_dataset_is_opened_by_any_of_its_three_names(tmp_path: Path, ending: str) -> None:
    write(tmp_path / "a.v1", [[1, 2], [3]])
    assert len(MMapIndexedDataset(f"{tmp_path}/a.v1{ending}")) == 2


def test_the_dtype_holds_the_largest_id() -> None:
    assert token_dtype(6400) == token_dtype(65536) == np.uint16
    assert token_dtype(65537) == np.int32


def test_ids_out_of_range_raise_and_keep_the_earlier_files(tmp_path: Path) -> None:
    write(tmp_path / "x", [[7]])
    with pytest.raises(ValueError, match="65536"):
        write(tmp_path / "x", [[65535], [65536]])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.bin", "x.idx"]
    assert MMapIndexedDataset(tmp_path / "x")[0].tolist() == [7], "the earlier pair is unchanged"


def test_a_pickled_dataset_contains_only_its_path(tmp_path: Path) -> None:
    write(tmp_path / "x", [[5] * 10_000])
    pickled = pickle.dumps(MMapIndexedDataset(tmp_path / "x"))
    assert len(pickled) < 1000
    assert pickle.loads(pickled)[0].tolist() == [5] * 10_000


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, list[list[int]]]:
    documents = [[3, 1, 4], [], [1, 5, 9, 2, 6], [0, 8]]  # not a zero at the end, which could be padding
    write(tmp_path / "x", documents)
    return tmp_path / "x", documents


@SAME_FOLDER
@given(data=st.data())
def test_a_damaged_index_raises_or_reads_the_same_documents(
    pair: tuple[Path, list[list[int]]], data: st.DataObject
) -> None:
    prefix, documents = pair
    idx = prefix.with_suffix(".idx")
    whole = idx.read_bytes()
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(0, 3))):
        damaged[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(0, len(whole)))] + data.draw(st.binary(max_size=40))
    idx.write_bytes(damaged)
    reported = None
    try:
        dataset = MMapIndexedDataset(prefix)
        assert [dataset[i].tolist() for i in range(len(dataset))] == documents
    except UserError as error:
        reported = error.given
    finally:
        idx.write_bytes(whole)
    # The index disagrees with itself, or, where it is consistent, with the length of x.bin.
    assert reported in (None, idx, prefix.with_suffix(".bin"))


@pytest.mark.parametrize("change", [-1, -2, 1, 2])
def test_a_bin_of_another_length_raises(pair: tuple[Path, list[list[int]]], change: int) -> None:
    bin_path = pair[0].with_suffix(".bin")
    length = bin_path.stat().st_size
    bin_path.write_bytes((bin_path.read_bytes() + b"\1\1")[: change - 2 or None])
    with pytest.raises(UserError) as caught:
        MMapIndexedDataset(pair[0])
    assert caught.value.given == bin_path
    assert str(length + change) in caught.value.problem
    assert str(length) in caught.value.expected
    assert ("truncated" in caught.value.advice) == (change < 0)


@pytest.mark.parametrize(
    ("offset", "content", "problem"),
    [
        (0, b"PK", "MMIDIDX"),
        (9, b"\2", "version 2"),
        (17, b"\7", "float32"),
        (17, b"\6", "float64"),
        (17, b"\x63", "code 99"),
    ],
    ids=["magic", "version", "float32", "float64", "unknown dtype"],
)
def test_an_index_of_another_format_raises_with_its_difference(
    pair: tuple[Path, list[list[int]]], offset: int, content: bytes, problem: str
) -> None:
    idx = pair[0].with_suffix(".idx")
    changed = bytearray(idx.read_bytes())
    changed[offset : offset + len(content)] = content
    idx.write_bytes(changed)
    with pytest.raises(UserError) as caught:
        MMapIndexedDataset(pair[0])
    assert caught.value.given == idx
    assert problem in caught.value.problem


def test_missing_files_and_text_files_are_named(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1]])
    (tmp_path / "x.idx").unlink()
    (tmp_path / "texts.jsonl").write_text('{"text": "hello"}')
    with pytest.raises(UserError) as caught:
        MMapIndexedDataset(tmp_path / "texts.jsonl")
    assert caught.value.given == tmp_path / "texts.jsonl"
    assert "data/make_data.py" in caught.value.advice
    with pytest.raises(UserError, match="no such file") as caught:
        MMapIndexedDataset(tmp_path / "x.bin")
    assert caught.value.given == tmp_path / "x.idx"


def split_index(idx: bytes) -> tuple[list[int], np.ndarray, np.ndarray, np.ndarray]:
    """The header's numbers (version, dtype code, items, bounds), sizes, pointers and bounds, as copies."""
    version, code, n, n_bounds = struct.unpack_from("<QBQQ", idx, 9)
    arrays = [
        np.frombuffer(idx, kind, count, start).copy()
        for kind, count, start in (("<i4", n, 34), ("<i8", n, 34 + 4 * n), ("<i8", n_bounds, 34 + 12 * n))
    ]
    return [version, code, n, n_bounds], *arrays


def join_index(sizes: np.ndarray, pointers: np.ndarray, bounds: np.ndarray | list[int], rest: bytes = b"") -> bytes:
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, len(sizes), len(bounds))
    return header + sizes.tobytes() + pointers.tobytes() + np.array(bounds, "<i8").tobytes() + rest


# Bounds of a merged file of four items, and those that it is read with.
MERGED = {
    "merged, only the first bound": ([0], [0, 1, 2, 3, 4]),
    "merged, no bounds": ([], [0, 1, 2, 3, 4]),
    "merged, bounds of the first file": ([0, 1, 2], [0, 1, 2, 3, 4]),
    "merged, a first file with several items per document": ([0, 2], [0, 2, 3, 4]),
}


@pytest.mark.parametrize(("bounds", "expected"), MERGED.values(), ids=MERGED)
def test_items_beyond_the_document_bounds_are_documents(
    pair: tuple[Path, list[list[int]]], bounds: list[int], expected: list[int]
) -> None:
    prefix, documents = pair
    idx = prefix.with_suffix(".idx")
    _, sizes, pointers, _ = split_index(idx.read_bytes())
    idx.write_bytes(join_index(sizes, pointers, bounds))
    dataset = MMapIndexedDataset(prefix)
    assert dataset.doc_idx.tolist() == expected
    assert [dataset[i].tolist() for i in range(4)] == documents
    [warning] = dataset.warnings
    assert str(idx) in warning
    assert f"span {bounds[-1] if bounds else 0} of 4 items" in warning


@pytest.mark.parametrize("first", [1, 2, 3])
def test_overflowed_pointers_are_worked_out_from_the_sizes(pair: tuple[Path, list[list[int]]], first: int) -> None:
    prefix, documents = pair
    idx = prefix.with_suffix(".idx")
    _, sizes, pointers, bounds = split_index(idx.read_bytes())
    pointers[first:] -= 1 << 32
    pointers[3:] -= 1 << 32  # the sum may overflow again
    idx.write_bytes(join_index(sizes, pointers, bounds))
    dataset = MMapIndexedDataset(prefix)
    assert [dataset[i].tolist() for i in (0, 1, 2, 3, -1)] == [*documents, documents[-1]]
    [warning] = dataset.warnings
    assert f"{4 - first} byte pointers overflowed" in warning


@pytest.mark.parametrize("modes", [b"\0\0\0\0", b"\0\1\0\1"])
def test_modes_of_a_multimodal_set_are_skipped_and_counted(pair: tuple[Path, list[list[int]]], modes: bytes) -> None:
    prefix, documents = pair
    idx = prefix.with_suffix(".idx")
    idx.write_bytes(idx.read_bytes() + modes)
    dataset = MMapIndexedDataset(prefix)
    assert [dataset[i].tolist() for i in range(4)] == documents
    [warning] = dataset.warnings
    assert f"{modes.count(1)} of 4 items are not text" in warning


@pytest.mark.parametrize("padding", [1, 2, 5000, 3 << 20])
def test_zero_bytes_after_the_last_token_are_padding(pair: tuple[Path, list[list[int]]], padding: int) -> None:
    prefix, documents = pair
    bin_path = prefix.with_suffix(".bin")
    whole = bin_path.read_bytes()
    bin_path.write_bytes(whole + bytes(padding))
    dataset = MMapIndexedDataset(prefix)
    assert dataset.tokens.tolist() == [token for ids in documents for token in ids]
    [warning] = dataset.warnings
    assert f"{bin_path}: the {padding} zero bytes" in warning
    bin_path.write_bytes(whole + bytes(padding - 1) + b"\1")
    with pytest.raises(UserError) as caught:
        MMapIndexedDataset(prefix)
    assert caught.value.given == bin_path


@pytest.mark.parametrize("program", [compute_magic_prime, inspect_data], ids=lambda program: program.__name__)
def test_programs_print_the_warnings_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, program: ModuleType
) -> None:
    folder = make_tokenizer(tmp_path / "tokenizer")
    write(tmp_path / "x", [[number, 0] for number in range(3, 103)])
    with (tmp_path / "x.bin").open("ab") as file:
        file.write(bytes(10))
    arguments = ["8"] if program is compute_magic_prime else ["--tokenizer", str(folder)]
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "x"), *arguments])
    program.main()
    captured = capsys.readouterr()
    assert f"WARNING: {tmp_path / 'x.bin'}: the 10 zero bytes" in captured.err
    assert "100 documents, 200 tokens" in captured.out
    assert "WARNING" not in captured.out


CONTRADICTIONS = {
    "a pointer off by one token": lambda s, p, b: join_index(s, p + np.array([0, 0, 2, 0]), b),
    "a negative size": lambda s, p, b: join_index(
        s + np.array([0, -1, 1, 0], np.int32), p + np.array([0, 0, -2, 0]), b
    ),
    "pointers exchanged": lambda s, p, b: join_index(s, p[[0, 1, 3, 2]], b),
    "bounds beyond the items": lambda s, p, b: join_index(s, p, [0, 1, 5]),
    "bounds that begin after the first item": lambda s, p, b: join_index(s, p, [1, 2]),
    "bounds of merged files without an offset": lambda s, p, b: join_index(s, p, [0, 1, 2, 1, 2]),
    "fewer modes than items": lambda s, p, b: join_index(s, p, b, b"\0\0\0"),
    "more modes than items": lambda s, p, b: join_index(s, p, b, b"\0" * 5),
}


@pytest.mark.parametrize("damage", CONTRADICTIONS)
def test_contradictory_indices_are_refused(pair: tuple[Path, list[list[int]]], damage: str) -> None:
    idx = pair[0].with_suffix(".idx")
    _, *arrays = split_index(idx.read_bytes())
    idx.write_bytes(CONTRADICTIONS[damage](*arrays))
    with pytest.raises(UserError) as caught:
        MMapIndexedDataset(pair[0])
    assert caught.value.given == idx


def test_a_whole_pair_has_no_warnings(pair: tuple[Path, list[list[int]]]) -> None:
    idx = pair[0].with_suffix(".idx")
    _, *arrays = split_index(idx.read_bytes())
    assert join_index(*arrays) == idx.read_bytes(), "the changes of the tests above are the only ones"
    assert MMapIndexedDataset(pair[0]).warnings == []


def test_the_pair_is_replaced_in_an_order_that_survives_a_power_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file is on disk before it has its name, and no old index is ever next to a new .bin."""
    for value in (1, 2):  # the second time over an earlier pair
        events: list[str] = []
        real_fsync, real_replace, real_path_replace, real_unlink = os.fsync, os.replace, Path.replace, Path.unlink

        def fsync(descriptor: int) -> None:
            events.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")  # noqa: B023
            real_fsync(descriptor)  # noqa: B023

        def replace(source: Any, target: Any) -> None:
            events.append(f"name {Path(target).name}")  # noqa: B023
            real_replace(source, target)  # noqa: B023

        def path_replace(source: Path, target: Path) -> Path:
            events.append(f"name {target.name}")  # noqa: B023
            return real_path_replace(source, target)  # noqa: B023

        def unlink(path: Path, missing_ok: bool = False) -> None:
            events.append(f"remove {path.name}")  # noqa: B023
            real_unlink(path, missing_ok)  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            patch.setattr(os, "replace", replace)
            patch.setattr(Path, "replace", path_replace)
            patch.setattr(Path, "unlink", unlink)
            with BinIdxWriter(tmp_path / "x", "uint16") as out:
                out.add_document([value] * 5)
        folder = f"fsync {tmp_path.name}"
        steps = [re.sub(r"^fsync \.x\.idx\..*", "fsync x.idx", event) for event, _ in groupby(events)]
        assert [step for step in steps if "sizes" not in step and step != "remove x.bin.part"] == [
            *("fsync x.bin.part", "remove x.idx", folder, "name x.bin", folder, "fsync x.idx", "name x.idx", folder)
        ]
        assert MMapIndexedDataset(tmp_path / "x")[0].tolist() == [value] * 5


@pytest.mark.parametrize("border", [4, 8])
def test_bounds_that_descend_between_two_blocks_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, border: int
) -> None:
    monkeypatch.setattr(binidx, "_INDEX_BLOCK", 4)
    with BinIdxWriter(tmp_path / "x", "uint16") as out:
        for value in range(11):
            out.add_document([value])
    assert len(MMapIndexedDataset(tmp_path / "x")) == 11
    path = tmp_path / "x.idx"
    content = bytearray(path.read_bytes())
    bounds = np.frombuffer(content, "<i8", 12, len(content) - 8 * 12)  # 0 .. 11, at the end of the file
    bounds[border - 1], bounds[border] = border, border - 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="ascending"):
        MMapIndexedDataset(tmp_path / "x")


def test_documents_of_several_items_are_read(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1], [2], [3]])
    idx = tmp_path / "x.idx"
    body = idx.read_bytes()[34 : 34 + 12 * 3]
    idx.write_bytes(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 3, 2) + body + struct.pack("<2q", 0, 3))
    dataset = MMapIndexedDataset(tmp_path / "x")
    assert len(dataset) == 3
    assert dataset.doc_idx.tolist() == [0, 3]


def test_nine_gigabytes_are_read_and_written(tmp_path: Path) -> None:
    """Pointers exceed 2^32 and 2^33 bytes; the holes of a sparse file take no disk space, and are not read."""
    hole, sizes = 1_500_000_000, [1_500_000_000, 2] * 3
    with BinIdxWriter(tmp_path / "big", "uint16") as out:
        for number in range(3):
            out._bin.seek(2 * ((number + 1) * hole + number * 2))
            out._bin.write(struct.pack("<2H", number, 65533 + number))
        out._sizes.write(struct.pack("<6i", *sizes))
        out.n_documents = len(sizes)
    dataset = MMapIndexedDataset(tmp_path / "big")
    assert dataset.n_tokens == sum(sizes)
    expected = [[number, 65533 + number] for number in range(3)]
    assert [dataset[i].tolist() for i in (1, 3, 5)] == expected
    assert [dataset.tokens[end - 2 : end].tolist() for end in np.cumsum(sizes)[1::2]] == expected
    assert [dataset.tokens[start : start + 2].tolist() for start in np.cumsum([0, *sizes])[0:5:2]] == [[0, 0]] * 3
    idx = tmp_path / "big.idx"
    _, written, pointers, bounds = split_index(idx.read_bytes())
    overflowed = np.array([0, *np.cumsum(written[:-1] * np.int64(2))]).astype("<i4").astype("<i8")
    assert (overflowed != pointers).any()
    idx.write_bytes(join_index(written, overflowed, bounds))
    dataset = MMapIndexedDataset(tmp_path / "big")
    assert [dataset[i].tolist() for i in (1, 3, 5)] == expected


def test_files_are_exchanged_with_megatron(tmp_path: Path) -> None:
    megatron = pytest.importorskip(
        "megatron.core.datasets.indexed_dataset", reason="pip install --no-deps megatron-core"
    )
    import torch

    documents = [[17, 4, 0], [65535, 0], [0]]
    write(tmp_path / "ours", documents)
    read = megatron.IndexedDataset(str(tmp_path / "ours"))
    assert [read[i].tolist() for i in range(len(read))] == documents
    assert list(read.document_indices) == [0, 1, 2, 3]
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    for ids in documents:
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    theirs = MMapIndexedDataset(tmp_path / "theirs")
    assert [theirs[i].tolist() for i in range(len(theirs))] == documents
