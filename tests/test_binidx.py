"""Token files: what is written comes back, damage is found, Megatron agrees on the format."""

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from src.dataset import BinIdxWriter, MMapIndexedDataset
from src.dataset.binidx import token_dtype

SAME_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
DTYPES = ["uint8", "int8", "int16", "int32", "int64", "uint16"]


def write(prefix: Path, documents: list[list[int]], dtype: str = "uint16") -> None:
    with BinIdxWriter(prefix, dtype) as out:
        for ids in documents:
            out.add_document(ids)


def read_by_the_specification(prefix: Path) -> list[list[int]]:
    """The format once more, straight from its description and on purpose without a line of the module."""
    idx = prefix.with_suffix(".idx").read_bytes()
    assert idx[:9] == b"MMIDIDX\0\0"
    version, code, n, bounds = struct.unpack_from("<QBQQ", idx, 9)
    assert version == 1
    kind = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}[code]
    at = 34
    sizes = struct.unpack_from(f"<{n}i", idx, at)
    pointers = struct.unpack_from(f"<{n}q", idx, at + 4 * n)
    assert struct.unpack_from(f"<{bounds}q", idx, at + 12 * n) == tuple(range(n + 1))
    assert len(idx) == at + 12 * n + 8 * bounds
    data = prefix.with_suffix(".bin").read_bytes()
    return [np.frombuffer(data, kind, size, pointer).tolist() for size, pointer in zip(sizes, pointers, strict=True)]


@SAME_FOLDER
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_any_documents_come_back(tmp_path: Path, data: st.DataObject, dtype: str) -> None:
    info = np.iinfo(dtype)
    documents = data.draw(st.lists(st.lists(st.integers(int(info.min), int(info.max)))))
    write(tmp_path / "x", documents, dtype)
    assert read_by_the_specification(tmp_path / "x") == documents
    dataset = MMapIndexedDataset(tmp_path / "x")
    assert [dataset[i].tolist() for i in range(len(dataset))] == documents
    assert dataset.tokens.tolist() == [token for ids in documents for token in ids]
    assert dataset.n_tokens == len(dataset.tokens)
    assert dataset.dtype == dtype
    assert dataset.doc_idx.tolist() == list(range(len(documents) + 1))


@pytest.mark.parametrize("ending", ["", ".bin", ".idx"])
def test_all_three_names_mean_the_pair(tmp_path: Path, ending: str) -> None:
    write(tmp_path / "a.v1", [[1, 2], [3]])
    assert len(MMapIndexedDataset(f"{tmp_path}/a.v1{ending}")) == 2


def test_the_type_holds_the_last_token() -> None:
    assert token_dtype(6400) == token_dtype(65536) == np.uint16
    assert token_dtype(65537) == np.int32


def test_ids_that_do_not_fit_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    write(tmp_path / "x", [[7]])
    with pytest.raises(ValueError, match="65536"):
        write(tmp_path / "x", [[65535], [65536]])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.bin", "x.idx"]
    assert MMapIndexedDataset(tmp_path / "x")[0].tolist() == [7], "the earlier pair is still there"


def test_a_pickled_dataset_carries_its_name_only(tmp_path: Path) -> None:
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
def test_a_damaged_index_is_an_error_or_harmless(pair: tuple[Path, list[list[int]]], data: st.DataObject) -> None:
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
    except ValueError as error:
        message = str(error)
    else:
        message = "x.idx"
        assert [dataset[i].tolist() for i in range(len(dataset))] == documents
    finally:
        idx.write_bytes(whole)
    assert "x.idx" in message


@pytest.mark.parametrize("change", [-1, -2, 1, 2])
def test_a_bin_of_another_length_is_an_error(pair: tuple[Path, list[list[int]]], change: int) -> None:
    bin_path = pair[0].with_suffix(".bin")
    bin_path.write_bytes((bin_path.read_bytes() + b"\0\0")[: change - 2 or None])
    with pytest.raises(ValueError, match=r"bytes long and by x\.idx should be"):
        MMapIndexedDataset(pair[0])


@pytest.mark.parametrize(
    ("at", "put", "words"),
    [
        (0, b"PK", "no index of this kind"),
        (9, b"\2", "version is 2"),
        (17, b"\7", "float32 numbers"),
        (17, b"\6", "float64 numbers"),
        (17, b"\x63", "unknown code 99"),
    ],
)
def test_a_foreign_index_says_what_it_is(pair: tuple[Path, list[list[int]]], at: int, put: bytes, words: str) -> None:
    idx = pair[0].with_suffix(".idx")
    content = bytearray(idx.read_bytes())
    content[at : at + len(put)] = put
    idx.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        MMapIndexedDataset(pair[0])


def test_missing_files_are_named(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1]])
    (tmp_path / "x.idx").unlink()
    (tmp_path / "texts.jsonl").write_text('{"text": "hello"}')
    with pytest.raises(ValueError, match=r"texts\.jsonl is no token data: data/make_data\.py makes"):
        MMapIndexedDataset(tmp_path / "texts.jsonl")
    with pytest.raises(ValueError, match=r"x\.idx does not exist"):
        MMapIndexedDataset(tmp_path / "x.bin")


def test_several_items_in_a_document(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1], [2], [3]])
    idx = tmp_path / "x.idx"
    body = idx.read_bytes()[34 : 34 + 12 * 3]
    idx.write_bytes(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 3, 2) + body + struct.pack("<2q", 0, 3))
    dataset = MMapIndexedDataset(tmp_path / "x")
    assert len(dataset) == 3
    assert dataset.doc_idx.tolist() == [0, 3]


def test_nine_gigabytes_are_read_and_written(tmp_path: Path) -> None:
    """Pointers pass 2^32 and 2^33 bytes; the skipped_samples of a sparse file take no room."""
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


def test_megatron_reads_ours_and_we_read_megatrons(tmp_path: Path) -> None:
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
