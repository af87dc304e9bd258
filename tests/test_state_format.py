"""Full states on disk: earlier formats are read, only what the manifest lists counts, and each byte is read once."""

import hashlib
import io
import json
import math
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_runs import CTX, losses, newest_state, train, train_until, verified

from src.cli import parse
from src.errors import UserError
from src.files import sha256_of
from src.run_folder import read_run, write_run
from src.training.checkpoint import reader as reader_module
from src.training.checkpoint import shard_file, snapshot, storage
from src.training.checkpoint.manifest import DamagedStateError, Entry, parse_manifest
from src.training.checkpoint.parts import Part, in_shards, own_parts, owners, whole_part
from src.training.checkpoint.reader import StateReader
from src.training.checkpoint.shard_file import ShardFile, header_of
from src.training.checkpoint.state import SavedState
from src.training.checkpoint.storage import StateWriter, state_folders
from src.training.run import run

# A run folder and its data, made in November 2026 by the last version without format numbers; stopped after step 25 of
# 40.
FORMAT_1 = Path(__file__).parent / "fixtures" / "state_format_1"
RUN = {"my_exit_tokens": CTX * 4 * 60, "epoch_steps": 20, "epoch_save": 1}


@pytest.fixture
def format_1(tmp_path, monkeypatch):
    """The fixture's folder as the working directory, and the flags of its run."""
    shutil.copytree(FORMAT_1, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return [
        word for name, value in json.loads(Path("flags.json").read_text()).items() for word in (f"--{name}", str(value))
    ]


def test_a_state_without_format_number_is_read(format_1):
    (folder,) = state_folders(Path("run"))
    state = newest_state(Path("run"))
    assert (state.position.step, state.position.samples, state.position.mini_epoch_samples) == (20, 80, 40)
    assert state.position.skipped_samples == [(120, 4)]
    assert state.position.weights_written
    assert state.counters["adam_steps"] == 20
    assert state.settings["n_embd"] == 16
    tensors = StateReader(folder).tensors()
    expected = load_file(folder / "tensors-0000.safetensors")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert read_run(Path("run"))["settings"]["n_layer"] == 2


def test_a_run_of_the_earlier_format_continues_bit_for_bit(format_1):
    """As the same state does when it is written anew, in today's format: on one machine the weights have the same
    bits."""
    shutil.copytree("run", "rewritten")
    (old,) = state_folders(Path("rewritten"))
    reader = StateReader(old)
    state = SavedState.from_payload(reader.payload)
    parts = [whole_part(key, tensor) for key, tensor in reader.tensors().items()]
    shutil.rmtree(old)
    writer = StateWriter(Path("rewritten"), keep=1)
    writer.write(state.position.step, state.payload(), parts)
    writer.wait()
    write_run(Path("rewritten"), read_run(Path("rewritten")))
    (new,) = state_folders(Path("rewritten"))
    assert json.loads((new / "manifest.json").read_text())["version"] == 3
    assert run(*parse(format_1)) == 0
    assert run(*parse([*format_1, "--proj_dir", "rewritten"])) == 0
    one, two = (torch.load(f"{folder}/rwkv-final.pth") for folder in ("run", "rewritten"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert losses(Path("run")) == losses(Path("rewritten"))


def test_a_resume_reads_each_file_of_the_state_once(tmp_path, data, monkeypatch):
    out = tmp_path / "run"
    train_until(25, out, data, monkeypatch, **RUN)
    (folder,) = state_folders(out)[:1]
    names = sorted(path.name for path in folder.iterdir())
    opened = []

    def watch(event, args):
        if event == "open" and isinstance(args[0], (str, Path)) and Path(args[0]).parent == folder:
            opened.append(Path(args[0]).name)

    monkeypatch.setattr(audited, "callback", watch)
    assert train(out, data, **RUN) == 0
    assert sorted(opened) == names


class audited:
    """An audit hook can't be removed: this one calls what a test sets."""

    callback = None


sys.addaudithook(lambda event, args: audited.callback and audited.callback(event, args))


def test_files_that_the_manifest_does_not_list_are_not_read(tmp_path, data, monkeypatch):
    """A synchronised folder's "conflicted copy" of a shard, for example."""
    out = tmp_path / "run"
    train_until(25, out, data, monkeypatch, **RUN)
    folder = state_folders(out)[0]
    shard = next(folder.glob("*.safetensors"))
    other = {name: tensor + 1 for name, tensor in load_file(shard).items()}
    save_file(other, folder / f"{shard.stem} (conflicted copy).safetensors")
    tensors = StateReader(folder).tensors()
    assert all(torch.equal(tensors[name], tensor - 1) for name, tensor in other.items() if tensor.numel() == 1)
    assert train(out, data, **RUN) == 0
    assert train(tmp_path / "whole", data, **RUN) == 0
    assert losses(out) == losses(tmp_path / "whole")


ENTRY = '{"bytes": 2, "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}'  # of "{}"
BLOCKS = '{"bytes": 2, "header_bytes": 0, "sha256": ["a"]}'
MALFORMED = {
    "not JSON": "{",
    "a list": "[]",
    "deeply nested": "[" * 100_000,
    "no files": '{"version": 2}',
    "files of a wrong type": '{"files": 3}',
    "an infinite size": '{"files": {"state.json": {"bytes": Infinity, "sha256": ""}}}',
    "without state.json": '{"files": {}}',
    "without tensors": f'{{"files": {{"state.json": {ENTRY}}}}}',
    "a file of another kind": f'{{"files": {{"state.json": {ENTRY}, "more.json": {ENTRY}}}}}',
    "a name that no file can have": f'{{"files": {{"state.json": {ENTRY}, "a\\u0000.safetensors": {ENTRY}}}}}',
    "no name": f'{{"files": {{"state.json": {ENTRY}, "": {ENTRY}}}}}',
    "a surrogate": f'{{"files": {{"state.json": {ENTRY}, "\\ud800.safetensors": {ENTRY}}}}}',
    "entries of a wrong type": '{"files": {"state.json": 7, "rank0-0000.safetensors": []}}',
    "a size of a wrong type": '{"files": {"state.json": {"bytes": "2", "sha256": ""}}}',
    "a negative size": '{"files": {"state.json": {"bytes": -1, "sha256": ""}}}',
    "a version of a wrong type": '{"version": true, "files": {}}',
    "an infinite version": '{"version": Infinity, "files": {}}',
    "a version below 1": '{"version": 0, "files": {}}',
    "no UTF-8": "\udcff",
    "a number of 5000 digits": '{"version": ' + "9" * 5000 + "}",
    "fewer blocks than the file has": f'{{"files": {{"state.json": {ENTRY}, "a.safetensors": {BLOCKS}}}}}',
    "no header": f'{{"files": {{"state.json": {ENTRY}, "a.safetensors": {{"bytes": 2, "sha256": ["a"]}}}}}}',
    "blocks of a wrong type": '{"block_bytes": "8", "files": {}}',
    "blocks of no bytes": '{"block_bytes": 0, "files": {}}',
    "a path": '{"files": {"state.json": {"bytes": 1, "sha256": ""}, "../x.safetensors": {"bytes": 1, "sha256": ""}}}',
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_manifest_is_damage(tmp_path, text):
    (tmp_path / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    for name in ("state.json", "more.json", "rank0-0000.safetensors"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(DamagedStateError):
        StateReader(tmp_path)


def test_a_value_never_lies_across_two_blocks():
    entry = {"bytes": 1 << 21, "sha256": ["a", "b", "c"]}
    files = {"state.json": {"bytes": 2, "sha256": "a"}, "a.safetensors": {**entry, "header_bytes": 96}}
    parse_manifest(json.dumps({"version": 3, "files": files}).encode(), Path())
    files["a.safetensors"]["header_bytes"] = 97
    with pytest.raises(DamagedStateError, match=r"the entry of a\.safetensors has no header"):
        parse_manifest(json.dumps({"version": 3, "files": files}).encode(), Path())


@pytest.mark.parametrize("shape", ["[3.0]", "[true,3]", "[-1,-3]", '["3"]'])
def test_a_shape_without_whole_numbers_is_damage(tmp_path, shape):
    header = header_of([Part("a/master", torch.zeros(3), (5,), 1)])[8:].replace(b"[3]", shape.encode(), 1)
    header += b" " * (-len(header) % 8)
    data = len(header).to_bytes(8, "little") + header + bytes(12)
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(DamagedStateError, match="malformed"):
        ShardFile(path, Entry(len(data), len(data), 8, (hashlib.sha256(data).hexdigest(),)))


POSITION = {"step": 1, "samples": 4, "mini_epoch_samples": 4}
COUNTERS = {"adam_steps": 1.0, "skipped_steps": 0.0}


@pytest.mark.parametrize(
    "change",
    [
        {"position": None},
        {"position": {"step": 1}},
        *({"position": {**POSITION, "step": step}} for step in ("1", True, 1.0, -1, math.inf, 1 << 64, None)),
        {"position": {**POSITION, "mini_epoch_samples": 0}},
        {"position": {**POSITION, "mini_epoch_losses": 3}},
        {"position": {**POSITION, "mini_epoch_losses": [math.nan]}},
        {"position": {**POSITION, "weights_written": "yes"}},
        *({"position": {**POSITION, "skipped_samples": runs}} for runs in ([3], [[1, 2, 3]], [[1.5, 2]], [[0, -1]])),
        {"counters": {**COUNTERS, "adam_steps": "many"}},
        {"counters": {**COUNTERS, "adam_steps": math.inf}},
        {"counters": {"adam_steps": 1.0}},
        {"counters": {**COUNTERS, "loss_scale": 2.0}},
        {"settings": 7},
        {"settings": {"n_layer": "two"}},
        {"settings": {"vocab_size": math.inf}},
        {"saved_at": None},
        {"saved_at": math.inf},
        {"saved_at": 1e300},
        {"logs": 3},
        {"logs": {"val.csv": 3}},
    ],
    ids=str,
)
def test_a_malformed_payload_is_damage(change):
    payload = {"position": POSITION, "settings": {}, "counters": COUNTERS, "saved_at": 0.0}
    SavedState.from_payload(payload)
    with pytest.raises(DamagedStateError):
        SavedState.from_payload({**payload, **change})


def failing_reads(patch, fails):
    """EIO, as of a disk with a bad sector: the file is there with its size, and can't be read."""
    read_bytes, read_at = Path.read_bytes, io.FileIO.readinto

    def failing(path):
        if fails(path):
            raise OSError(5, "Input/output error", str(path))
        return read_bytes(path)

    class File(io.FileIO):
        def readinto(self, target):
            if fails(Path(self.name)):
                raise OSError(5, "Input/output error", self.name)
            return read_at(self, target)

    patch.setattr(Path, "read_bytes", failing)
    patch.setattr(shard_file, "open", lambda path, mode, buffering: File(path, "r"), raising=False)
    for module in (shard_file, reader_module):
        patch.setattr(module, "RETRY_SECONDS", 0.0)


@pytest.mark.parametrize("victim", ["manifest.json", "state.json", "rank0-0000.safetensors"])
def test_a_state_of_which_a_file_cannot_be_read_is_archived_and_the_one_before_taken(
    tmp_path, data, monkeypatch, capfd, victim
):
    """EIO, as of a disk with a bad sector, whichever file it hits."""
    out = tmp_path / "run"
    train_until(45, out, data, monkeypatch, save_minutes=0, **RUN)
    with monkeypatch.context() as patch:
        failing_reads(patch, lambda path: path.name == victim and path.parent.name == "step-00000040")
        assert train(out, data, **RUN) == 0
    output = capfd.readouterr().out
    assert f"{victim} can't be read (Input/output error)" in output
    assert "step-00000020, saved" in output
    assert (out / "resume" / "damaged-step-00000040").is_dir()
    assert losses(out)[39] > 0


def test_what_fails_while_a_failure_is_handled_ends_the_run_too(tmp_path, monkeypatch):
    """The writer's thread never ends unnoticed: training would wait for it for ever."""

    def fail(*_):
        raise OSError(28, "No space left on device")

    def fail_again(*_):
        raise RuntimeError("and the handler failed")

    monkeypatch.setattr(storage, "_write_file", fail)
    monkeypatch.setattr(storage, "_save_failure", fail_again)
    monkeypatch.setattr(snapshot, "SHARD_BYTES", 16)
    monkeypatch.setattr(snapshot, "free_memory", lambda *_: 100.0)  # three buffers for twenty shards
    writer = StateWriter(tmp_path, keep=2)
    writer.write(1, {}, [whole_part(f"{i}/master", torch.zeros(4)) for i in range(20)])  # doesn't wait for ever
    with pytest.raises(RuntimeError, match="the handler failed"):
        writer.wait()


def test_a_snapshot_does_not_change_with_the_weights(tmp_path, monkeypatch):
    """The next step changes the tensors in place while the thread still writes them."""
    go_on = threading.Event()
    original = storage._write_file

    def late(path, content):
        go_on.wait(60)
        return original(path, content)

    monkeypatch.setattr(storage, "_write_file", late)
    weight = torch.ones(4)
    writer = StateWriter(tmp_path, keep=2)
    writer.write(1, {}, [whole_part("weight/master", weight)])
    weight.fill_(7)
    go_on.set()
    writer.wait()
    assert StateReader(state_folders(tmp_path)[0]).tensors()["weight/master"].tolist() == [1, 1, 1, 1]


def test_a_disk_that_does_not_answer_fails_the_save_of_several_processes(tmp_path, monkeypatch):
    """A single process waits for it; of several, others would wait for this one."""
    answers = threading.Event()
    original = storage._write_file

    def late(path, content):
        answers.wait(60)
        return original(path, content)

    monkeypatch.setattr(storage, "_write_file", late)
    writer = StateWriter(tmp_path, keep=2)
    writer.wait()
    assert writer._stall_seconds == math.inf
    writer._stall_seconds = 0.3  # as where there are others
    writer.write(1, {}, [whole_part("weight/master", torch.ones(4))])
    writer.check()
    with pytest.raises(OSError, match=r"could not be saved under .*rank 0: no answer in \d+ s"):
        writer.wait()
    with pytest.raises(OSError, match="no answer"):
        writer.check()
    answers.set()
    writer.wait()
    writer.check()
    assert StateReader(state_folders(tmp_path)[0]).tensors()["weight/master"].tolist() == [1, 1, 1, 1]


def test_a_save_takes_the_time_of_a_copy(tmp_path):
    """CPU time of the thread that trains: hashing and writing take several times as much. Pages are touched before."""
    tensors = [torch.randn(1 << 20) for _ in range(24)]  # 96 MB
    parts = [whole_part(f"{i}/master", tensor) for i, tensor in enumerate(tensors)]
    targets = [torch.zeros_like(tensor) for tensor in tensors]
    writer = StateWriter(tmp_path, keep=1)
    writer.prepare(parts)
    ratios = []
    for step in range(3):
        begin = time.thread_time()
        for target, tensor in zip(targets, tensors, strict=True):
            target.copy_(tensor)
        copied = time.thread_time()
        writer.write(step, {}, parts)
        ratios.append((time.thread_time() - copied) / (copied - begin))
        writer.wait()
    assert min(ratios) < 2, ratios


# ---- parts of tensors ------------------------------------------------------------------------------------------------


def random_parts():
    generator = torch.Generator().manual_seed(3)
    shapes = {"emb.weight/master": (37, 5), "b/exp_avg": (64,), "c/idle": (1, 1, 3), "d/master": (9, 2)}
    tensors = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    tensors["c/idle"] = tensors["c/idle"].bfloat16()  # an odd number of 2-byte values
    return [whole_part(key, tensor) for key, tensor in tensors.items()]


@pytest.mark.parametrize("limit", [8, 40, 100, 1 << 20])
def test_shards_divide_the_parts_without_a_gap(limit):
    parts = random_parts()
    shards = list(in_shards(parts, limit))
    assert all(sum(part.size for part in shard) == limit // 4 * 4 for shard in shards[:-2] if limit % 8 == 0)
    pieces = [part for shard in shards for part in shard]
    for part in parts:
        own = sorted((piece for piece in pieces if piece.key == part.key), key=lambda piece: piece.start)
        assert torch.equal(torch.cat([piece.flat for piece in own]), part.flat)
        assert [piece.start for piece in own[1:]] == [piece.stop for piece in own[:-1]]
        assert all(piece.shape == part.shape for piece in own)


@pytest.mark.parametrize("limit", [40, 100, 1 << 20])
def test_any_range_is_read_from_any_division(tmp_path, monkeypatch, limit):
    """Whatever the shards, and with blocks that end within them: the values asked for, and no other block is read."""
    monkeypatch.setattr(snapshot, "SHARD_BYTES", limit)
    monkeypatch.setattr(storage, "BLOCK_BYTES", 64)
    monkeypatch.setattr(shard_file, "BLOCK_BYTES", 64)
    parts = random_parts()
    writer = StateWriter(tmp_path, keep=1)
    writer.write(1, {}, parts)
    writer.wait()
    (folder,) = state_folders(tmp_path)
    whole = StateReader(folder)
    read = whole.tensors()
    assert all(torch.equal(read[part.key], part.tensor) for part in parts)
    assert whole.bytes_read == sum(path.stat().st_size for path in folder.glob("*.safetensors")) == writer.bytes_written
    for part in parts:
        for start in range(0, part.tensor.numel(), 7):
            count = min(11, part.tensor.numel() - start)
            target = Part(part.key, torch.empty(count, dtype=part.tensor.dtype), part.shape, start)
            StateReader(folder).load([target])
            assert torch.equal(target.tensor, part.flat[start : start + count])


def test_a_damaged_block_is_found_by_whoever_needs_it_and_by_nobody_else(tmp_path, monkeypatch):
    for module in (storage, shard_file):
        monkeypatch.setattr(module, "BLOCK_BYTES", 64)
    writer = StateWriter(tmp_path, keep=1)
    tensor = torch.arange(100.0)
    writer.write(1, {}, [whole_part("a/master", tensor)])
    writer.wait()
    (folder,) = state_folders(tmp_path)
    shard = folder / "rank0-0000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1  # in the last value
    shard.write_bytes(data)
    first, last = (Part("a/master", torch.empty(50), (100,), start) for start in (0, 50))
    StateReader(folder).load([first])
    assert torch.equal(first.tensor, tensor[:50])
    with pytest.raises(DamagedStateError, match=r"rank0-0000.safetensors is not what was written"):
        StateReader(folder).load([last])


def test_what_is_not_stored_or_stored_twice_is_damage(tmp_path):
    for step, parts, problem in (
        (1, [Part("a/master", torch.ones(3), (8,), 0), whole_part("b/master", torch.ones(1))], "is missing, in part"),
        (2, [whole_part("b/master", torch.ones(1))], "is missing"),
        (3, [whole_part("a/master", torch.ones(4))], r"is \[4\] instead of \[8\]"),
    ):
        writer = StateWriter(tmp_path, keep=9)
        writer.write(step, {}, parts)
        writer.wait()
        with pytest.raises(DamagedStateError, match=f"a/master {problem}"):
            StateReader(state_folders(tmp_path)[0]).load([whole_part("a/master", torch.empty(8))])
    state = state_folders(tmp_path)[0]
    manifest = json.loads((state / "manifest.json").read_text())
    manifest["files"]["copy.safetensors"] = manifest["files"]["rank0-0000.safetensors"]
    (state / "manifest.json").write_text(json.dumps(manifest))
    shutil.copy(state / "rank0-0000.safetensors", state / "copy.safetensors")
    with pytest.raises(DamagedStateError, match="a/master is stored twice"):
        StateReader(state).tensors()


def test_a_state_of_format_2_is_read(tmp_path):
    """Whole tensors, one SHA-256 per file."""
    parts = random_parts()
    writer = StateWriter(tmp_path, keep=1)
    writer.write(1, {}, parts)
    writer.wait()
    (folder,) = state_folders(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {name: {**entry, "sha256": sha256_of(folder / name)} for name, entry in manifest["files"].items()}
    (folder / "manifest.json").write_text(json.dumps({"version": 2, "files": files}))
    read = StateReader(folder).tensors()
    assert all(torch.equal(read[part.key], part.tensor) for part in parts)


def test_replicated_tensors_are_spread_over_the_ranks():
    parts = [whole_part(f"{i}/master", torch.empty(1 + 37 * i % 100), is_replicated=True) for i in range(60)]
    partition = Part("z/master", torch.empty(5), (20,), 5)
    owner = owners([*parts, partition], 4)
    shares = [own_parts([*parts, partition], owner, rank) for rank in range(4)]
    assert all(partition in share for share in shares)
    keys = [part.key for share in shares for part in share if part.is_replicated]
    assert sorted(keys) == sorted(part.key for part in parts)
    sizes = [sum(part.size for part in share) for share in shares]
    assert max(sizes) <= 1.05 * sum(sizes) / 4


def test_a_copy_that_does_not_fit_into_memory_waits_for_the_disk(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(snapshot, "SHARD_BYTES", 16)
    monkeypatch.setattr(snapshot, "free_memory", lambda *_: 100.0)
    parts = random_parts()
    writer = StateWriter(tmp_path, keep=1)
    writer.write(1, {}, parts)
    writer.wait()
    assert "training waits for the disk" in capfd.readouterr().out
    assert len(writer._buffers._buffers) <= 3
    read = StateReader(state_folders(tmp_path)[0]).tensors()
    assert all(torch.equal(read[part.key], part.tensor) for part in parts)


def test_an_unreadable_file_is_damage(tmp_path, data, monkeypatch):
    train_until(25, tmp_path / "run", data, monkeypatch, **RUN)
    (folder,) = state_folders(tmp_path / "run")[:1]
    verified(folder)
    failing_reads(monkeypatch, lambda path: path.suffix == ".safetensors")
    with pytest.raises(DamagedStateError, match="Input/output error"):
        verified(folder)


def test_damaged_tensors_found_at_the_load_make_the_run_take_the_state_before(tmp_path, data, monkeypatch, capfd):
    """A missing tensor passes every checksum: it is found when all others are loaded."""
    out = tmp_path / "run"
    train_until(45, out, data, monkeypatch, save_minutes=0, **RUN)
    newest = state_folders(out)[0]
    shard = next(newest.glob("*.safetensors"))
    tensors = load_file(shard)
    del tensors["blocks.1.ffn.key.weight/exp_avg"]
    save_file(tensors, shard)
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"][shard.name] = {"bytes": shard.stat().st_size, "sha256": sha256_of(shard)}
    (newest / "manifest.json").write_text(json.dumps(manifest))
    assert train(out, data, **RUN) == 0
    assert "blocks.1.ffn.key.weight/exp_avg is missing" in capfd.readouterr().out
    assert (out / "resume" / "damaged-step-00000040").is_dir()
    assert train(tmp_path / "whole", data, **RUN) == 0
    assert losses(out) == losses(tmp_path / "whole")


def test_files_of_a_later_format_are_refused(tmp_path):
    (tmp_path / "manifest.json").write_text('{"version": 4, "files": {}}')
    with pytest.raises(UserError) as refused:
        StateReader(tmp_path)
    assert refused.value.given == tmp_path
    (tmp_path / "run.json").write_text('{"version": 3}')
    with pytest.raises(UserError) as refused:
        read_run(tmp_path)
    assert refused.value.given == tmp_path / "run.json"
