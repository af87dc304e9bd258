"""Token files: documents are restored, damage is detected, and the format is Megatron's."""

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from src.dataset import BinIdxWriter, MMapIndexedDataset
from src.dataset.binidx import token_dtype
from src.errors import UserError

SAME_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
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
    documents = [[3, 1, 4], [], [1, 5, 9, 2, 6], [0]]
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
    try:
        dataset = MMapIndexedDataset(prefix)
    except UserError as error:
        # The index disagrees with itself, or, where it is consistent, with the length of x.bin.
        assert error.given in (idx, prefix.with_suffix(".bin"))  # noqa: PT017 (either outcome is right)
    else:
        assert [dataset[i].tolist() for i in range(len(dataset))] == documents
    finally:
        idx.write_bytes(whole)


@pytest.mark.parametrize("change", [-1, -2, 1, 2])
def test_a_bin_of_another_length_raises(pair: tuple[Path, list[list[int]]], change: int) -> None:
    bin_path = pair[0].with_suffix(".bin")
    length = bin_path.stat().st_size
    bin_path.write_bytes((bin_path.read_bytes() + b"\0\0")[: change - 2 or None])
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


def test_documents_of_several_items_are_read(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1], [2], [3]])
    idx = tmp_path / "x.idx"
    body = idx.read_bytes()[34 : 34 + 12 * 3]
    idx.write_bytes(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 3, 2) + body + struct.pack("<2q", 0, 3))
    dataset = MMapIndexedDataset(tmp_path / "x")
    assert len(dataset) == 3
    assert dataset.doc_idx.tolist() == [0, 3]


def test_nine_gigabytes_are_read_and_written(tmp_path: Path) -> None:
    """Pointers exceed 2^32 and 2^33 bytes; the holes of a sparse file take no disk space."""
    size = 1_500_000_000
    with BinIdxWriter(tmp_path / "big", "uint16") as out:
        for number in range(3):
            out._bin.seek((number + 1) * size * 2 - 2)
            out._bin.write(struct.pack("<H", 65533 + number))
        out._sizes.write(struct.pack("<3i", size, size, size))
        out.n_documents = 3
    dataset = MMapIndexedDataset(tmp_path / "big")
    assert dataset.n_tokens == 3 * size
    assert [int(dataset[i][-1]) for i in range(3)] == [65533, 65534, 65535]
    assert [int(dataset[i][0]) for i in range(3)] == [0, 0, 0]


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
