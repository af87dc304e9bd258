"""Weights files that claim more than they hold: refused before memory is taken, and no values made up for them."""

import copy
import io
import pickle
import resource
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from src.errors import UserError
from src.model import RWKV7, ModelConfig, torch_file
from src.model.torch_file import read_torch_file
from src.model.weights import config_from_weights, read_weights

CONFIG = ModelConfig(2, 64, 40, head_size=32)
# Of address space beyond what a process has: each file below asks for 8 GB or more.
MEMORY = 1 << 30


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return RWKV7(CONFIG).state_dict()


def refused(path, use=read_weights):
    """The error; MemoryError where the reader asks for more than `MEMORY`."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    try:
        with pytest.raises(UserError) as caught:
            use(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert caught.value.given == path
    assert len(str(caught.value)) < 1000
    return caught.value


def rewritten(path, change, compression=zipfile.ZIP_STORED):
    """The zip archive with members changed: `change` maps (name, content) to content or None."""
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            if (new := change(name, content)) is not None:
                archive.writestr(name, new)


# ---- tensors that are no plain ones ----------------------------------------------------------------------------------

KINDS = {
    "meta": (lambda t: t.to("meta"), "meta tensor"),
    "nested": (lambda t: torch.nested.as_nested_tensor(list(t)), "nested tensor"),
    "sparse": (lambda t: t.to_sparse(), "sparse tensor"),
    "csr": (lambda t: t.to_sparse_csr(), "sparse tensor"),
    "quantized": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "quantized tensor"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_without_plain_values_are_named(weights, tmp_path, kind, zipped):
    make, named = KINDS[kind]
    path = tmp_path / "m.pth"
    torch.save({**weights, "head.weight": make(weights["head.weight"])}, path, _use_new_zipfile_serialization=zipped)
    error = refused(path)
    assert "'head.weight'" in error.problem
    assert named in error.problem


def test_tensors_with_the_same_values_are_named(weights, tmp_path):
    """Tied, overlapping and expanded; views of one storage that don't overlap are read."""
    path = tmp_path / "m.pth"
    flat = torch.randn(2 * 64 * 64)
    for change, named in (
        ({"head.weight": weights["emb.weight"]}, "emb.weight and head.weight"),
        ({"emb.weight": flat[: 40 * 64].view(40, 64), "head.weight": flat[64:][: 40 * 64].view(40, 64)}, "head.weight"),
        ({"head.weight": torch.zeros(1, 64).expand(40, 64)}, "elements of head.weight"),
        ({"head.weight": torch.zeros(103).as_strided((40, 64), (1, 1))}, "elements of head.weight"),
    ):
        torch.save({**weights, **change}, path)
        assert named in refused(path).problem
    square = {name: flat[i * 4096 :][:4096].view(64, 64) for i, name in enumerate(("key.weight", "value.weight"))}
    separate = {f"blocks.0.att.{name}": tensor.t() for name, tensor in square.items()}
    torch.save({**weights, **separate}, path)
    assert torch.equal(read_weights(path)["blocks.0.att.value.weight"], square["value.weight"].t())


def test_unused_parameters_and_a_head_tied_by_transformers_are_copied(weights, tmp_path):
    path = tmp_path / "m.pth"
    torch.save({**weights, "blocks.0.att.v0": weights["blocks.0.att.a0"]}, path)
    read = read_weights(path)
    assert read["blocks.0.att.v0"].data_ptr() != read["blocks.0.att.a0"].data_ptr()
    torch.save({"model.embeddings.weight": weights["emb.weight"], "lm_head.weight": weights["emb.weight"]}, path)
    read = read_weights(path)
    assert torch.equal(read["lm_head.weight"], weights["emb.weight"])
    assert read["lm_head.weight"].data_ptr() != read["model.embeddings.weight"].data_ptr()


def test_training_does_not_begin_from_meta_tensors(weights, tmp_path):
    torch.save({name: tensor.to("meta") for name, tensor in weights.items()}, tmp_path / "m.pth")
    assert "meta tensor" in refused(tmp_path / "m.pth").problem


@pytest.mark.parametrize("shape", [(0, 64), (1 << 40, 0)])
def test_a_parameter_without_values_is_named(weights, tmp_path, shape):
    """Its shape is no evidence of a size: a model of 2^40 rows would be built from a file without a value."""
    for save, name in ((torch.save, "m.pth"), (save_safetensors, "m.safetensors")):
        save({**weights, "blocks.0.ffn.key.weight": torch.empty(shape)}, tmp_path / name)
        assert "blocks.0.ffn.key.weight" in refused(tmp_path / name).problem


def save_safetensors(tensors, path):
    from safetensors.torch import save_file

    save_file(tensors, path)


def test_two_names_of_one_parameter_are_refused(weights, tmp_path):
    torch.save({**weights, "module.head.weight": weights["head.weight"] + 1}, tmp_path / "m.pth")
    assert "two entries" in refused(tmp_path / "m.pth").problem


# ---- more bytes than the file has ------------------------------------------------------------------------------------


class Call:
    """Pickled as a call of `function`."""

    def __init__(self, function, *args):
        self.reduced = (function, args)

    def __reduce__(self):
        return self.reduced


CALLS = {
    "bytearray": Call(bytearray, 8 << 30),
    "storage": Call(torch.UntypedStorage, 8 << 30),
    "typed storage": Call(torch.FloatStorage, 2 << 30),
    "tensor": Call(torch.Tensor, 2 << 30),
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", CALLS)
def test_calls_that_allocate_memory_are_refused(tmp_path, kind, zipped, nested):
    path = tmp_path / "m.pth"
    content = {"emb.weight": CALLS[kind]}
    torch.save({"model": content} if nested else content, path, _use_new_zipfile_serialization=zipped)
    refused(path)


def test_compressed_members_are_refused(weights, tmp_path):
    """200 kB, unpacked 200 MB here; torch.load unpacks them."""
    path = tmp_path / "m.pth"
    torch.save(weights, path)
    rewritten(path, lambda _, content: content, zipfile.ZIP_DEFLATED)
    assert "compressed" in refused(path).problem


@pytest.mark.parametrize("zipped", [True, False])
def test_a_storage_larger_than_its_bytes_in_the_file_is_refused(weights, tmp_path, zipped):
    """The pickle's number of values of a storage, 40 x 64, replaced by 2^31 - 1."""
    path = tmp_path / "m.pth"
    torch.save({"head.weight": weights["head.weight"]}, path, _use_new_zipfile_serialization=zipped)
    old, new = b"M" + struct.pack("<H", 40 * 64), b"J" + struct.pack("<i", (1 << 31) - 1)
    if zipped:
        rewritten(path, lambda name, content: content.replace(old, new) if name.endswith("data.pkl") else content)
    else:
        path.write_bytes(path.read_bytes().replace(old, new))
    assert "8589934588 bytes" in refused(path).problem


@pytest.mark.parametrize("claim", [(1 << 31) - 1, -(1 << 31)])
def test_claims_for_a_storage_of_an_old_file_are_not_made_up_for_by_others(weights, tmp_path, claim):
    """Two tensors in one storage, of which the first claims a size that the second's, or another storage, hides."""
    path = tmp_path / "m.pth"
    whole = weights["head.weight"].flatten()
    torch.save({"a": whole, "b": whole[:8], "c": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    old, content = b"M" + struct.pack("<H", 40 * 64), path.read_bytes()
    assert content.count(old) > 1
    path.write_bytes(content.replace(old, b"J" + struct.pack("<i", claim), 1))
    problem = refused(path).problem
    assert claim < 0 or "made to exhaust memory" in problem


@pytest.mark.parametrize("zipped", [True, False])
def test_a_tensor_beyond_its_storage_is_refused(weights, tmp_path, zipped):
    """The first of its sizes, 40 x 64, replaced by 2^31 - 1: torch makes the storage as large as the tensor."""
    path = tmp_path / "m.pth"
    torch.save({"head.weight": weights["head.weight"]}, path, _use_new_zipfile_serialization=zipped)
    old, new = b"K\x28K\x40\x86", b"J" + struct.pack("<i", (1 << 31) - 1) + b"K\x40\x86"
    if zipped:
        rewritten(path, lambda name, content: content.replace(old, new) if name.endswith("data.pkl") else content)
    else:
        path.write_bytes(path.read_bytes().replace(old, new))
    assert "a tensor of shape (2147483647, 64) in 10240 bytes" in refused(path).problem


def test_parts_of_a_storage_are_read(tmp_path):
    path = tmp_path / "m.pth"
    whole = torch.arange(24.0).view(4, 6)
    kinds = {"columns": whole[:, 1::2].t(), "last": whole[3, 5], "none": whole[4:], "bytes": whole.to(torch.uint16)}
    torch.save(kinds, path)
    read = read_torch_file(path, mmap=False)
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in kinds.items())


def test_a_text_longer_than_the_file_takes_no_memory(weights, tmp_path):
    """The length of a name in an old file replaced by 2^31 - 1: a plain read() would allocate as much."""
    path = tmp_path / "m.pth"
    torch.save({"head.weight": weights["head.weight"]}, path, _use_new_zipfile_serialization=False)
    name = b"X" + struct.pack("<I", 11) + b"head.weight"
    assert name in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(name, b"X" + struct.pack("<I", (1 << 31) - 1) + b"head.weight"))
    error = refused(path)
    while error := error.__cause__ or error.__context__:
        assert not isinstance(error, MemoryError)


def test_a_key_longer_than_the_file_takes_no_memory(weights, tmp_path):
    """The same in the list of keys, which stands behind the content of an old file."""
    path = tmp_path / "m.pth"
    torch.save({"head.weight": weights["head.weight"]}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    start = content.rindex(b"\x80\x02]q\x00X") + len(b"\x80\x02]q\x00X")
    path.write_bytes(content[:start] + struct.pack("<I", (1 << 31) - 1) + content[start + 4 :])
    error = refused(path)
    while error := error.__cause__ or error.__context__:
        assert not isinstance(error, MemoryError)


def test_members_that_share_their_bytes_or_names_are_refused(weights, tmp_path):
    path = tmp_path / "m.pth"
    torch.save(weights, path)
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("m/data.pkl")
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("m/data.pkl", pickled)
    assert "one name" in refused(path).problem
    torch.save(weights, path)
    with zipfile.ZipFile(path, "a") as archive:  # the largest member a hundred times, under other names
        largest = max(archive.infolist(), key=lambda member: member.file_size)
        for number in range(100):
            copied = copy.copy(largest)
            copied.filename = f"m/data/{1000 + number}"
            archive.filelist.append(copied)
        archive.writestr("m/other", b"")  # writes the list anew
    assert "its members have" in refused(path).problem


def pickled(path, data):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", data)
        archive.writestr("m/version", "3\n")


PICKLES = {
    # a table for an entry 2^31 - 1 has 16 GB
    "memo": b"\x80\x02}r" + struct.pack("<I", (1 << 31) - 1) + b".",
    # a tuple of tuples, each twice the one before: 2^60 values to hash
    "tuples": b"\x80\x02}K\x01" + b"q\x00h\x00\x86" * 60 + b"K\x01s.",
    "objects": b"\x80\x02](" + b"]" * 20_010 + b"e.",
    "unknown instruction": b"\x80\x04\x96" + struct.pack("<Q", 1 << 40) + b".",
    "nothing": b"",
    "underflow": b"\x80\x02e.",
    "deep": b"\x80\x02" + b"]" * 15_000 + b"a" * 14_999 + b".",
}


@pytest.mark.parametrize("kind", PICKLES)
def test_pickles_that_take_memory_or_time_are_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(torch_file, "MAX_INSTRUCTIONS", 20_000)
    pickled(tmp_path / "m.pth", PICKLES[kind])
    # as a file of torch before 1.6, in the place of its first pickle
    (tmp_path / "raw.pth").write_bytes(PICKLES[kind])
    for name in ("m.pth", "raw.pth"):
        problem = refused(tmp_path / name).problem
        assert kind != "memo" or "an entry 2147483647" in problem  # where there is so much memory, it would be taken


def test_a_long_header_of_safetensors_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    entry = '"{}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    header = ("{" + ",".join(entry.format(i) for i in range(330_000)) + "}").encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    refused(path)


@pytest.mark.parametrize("number", ["999999999", "9" * 30, "9" * 5000])
def test_block_numbers_are_bounded(weights, number):
    with pytest.raises(UserError) as caught:
        config_from_weights({**weights, f"blocks.{number}.att.x_r": torch.zeros(1)}, "file.pth")
    assert caught.value.given == "file.pth"
    assert "1024" in caught.value.expected
    assert len(str(caught.value)) < 200


def test_every_byte_of_a_small_file_may_be_wrong(weights, tmp_path):
    """Read, or refused by a sentence: with one byte changed, of the archive's structure and of its pickle."""
    buffer = io.BytesIO()
    torch.save({"emb.weight": torch.arange(4.0)}, buffer)
    data = buffer.getvalue()
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        position, value = (int(torch.randint(n, (), generator=generator)) for n in (len(data), 256))
        path = tmp_path / "m.pth"
        path.write_bytes(data[:position] + bytes([value]) + data[position + 1 :])
        try:
            read_torch_file(path, mmap=True)
        except UserError as error:
            assert error.given == path  # noqa: PT017 (either outcome is right)


def test_a_checkpoint_of_a_trainer_is_still_told_apart(weights, tmp_path):
    """Its state of the optimizer has other types, which are no code either."""
    optimizer = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3}]}
    content = {"model": weights, "optimizer": optimizer, "dtype": torch.bfloat16, "seen": {1, 2}}
    torch.save(content, tmp_path / "m.pth")
    assert "'model' contains the weights" in refused(tmp_path / "m.pth").advice
    assert pickle.loads(pickle.dumps(refused(tmp_path / "m.pth"))).problem
