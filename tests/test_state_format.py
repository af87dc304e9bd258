"""Full states on disk: earlier formats are read, only what the manifest lists counts, and each byte is read once."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_runs import CTX, losses, newest_state, train, train_until, verified

from src.cli import parse
from src.errors import UserError
from src.files import sha256_of
from src.run_folder import read_run, write_run
from src.training.checkpoint.state import SavedState
from src.training.checkpoint.storage import DamagedStateError, StateReader, StateWriter, state_folders
from src.training.run import run

# A run folder and its data, made in November 2026 by the last version without format numbers; stopped after step 25 of 40.
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
    (shard,) = StateReader(folder).shards()
    expected = load_file(folder / "tensors-0000.safetensors")
    assert shard.keys() == expected.keys()
    assert all(torch.equal(shard[name], expected[name]) for name in expected)
    assert read_run(Path("run"))["settings"]["n_layer"] == 2


def test_a_run_of_the_earlier_format_continues_bit_for_bit(format_1):
    """As the same state does when it is written anew, in today's format: on one machine the weights have the same bits."""
    shutil.copytree("run", "rewritten")
    (old,) = state_folders(Path("rewritten"))
    reader = StateReader(old)
    state = SavedState.from_payload(reader.payload)
    tensors = [item for shard in reader.shards() for item in shard.items()]
    shutil.rmtree(old)
    writer = StateWriter(Path("rewritten"), keep=1)
    writer.write(state.position.step, state.payload(), tensors)
    writer.wait()
    write_run(Path("rewritten"), read_run(Path("rewritten")))
    (new,) = state_folders(Path("rewritten"))
    assert json.loads((new / "manifest.json").read_text())["version"] == 2
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
        if event == "open" and isinstance(args[0], (str, Path)) and str(folder) in str(args[0]):
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
    (tensors,) = StateReader(folder).shards()
    assert all(torch.equal(tensors[name], tensor - 1) for name, tensor in other.items() if tensor.numel() == 1)
    assert train(out, data, **RUN) == 0
    assert train(tmp_path / "whole", data, **RUN) == 0
    assert losses(out) == losses(tmp_path / "whole")


MALFORMED = {
    "not JSON": "{",
    "a list": "[]",
    "deeply nested": "[" * 100_000,
    "no files": '{"version": 2}',
    "files of a wrong type": '{"files": 3}',
    "an infinite size": '{"files": {"state.json": {"bytes": Infinity, "sha256": ""}}}',
    "without state.json": '{"files": {}}',
    "a path": '{"files": {"state.json": {"bytes": 1, "sha256": ""}, "../x.safetensors": {"bytes": 1, "sha256": ""}}}',
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_manifest_is_damage(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(DamagedStateError):
        StateReader(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"position": None},
        {"position": {"step": 1}},
        {"position": {"step": 1, "samples": 4, "mini_epoch_samples": 4, "skipped_samples": [3]}},
        {"counters": {"adam_steps": "many"}},
        {"settings": 7},
        {"saved_at": None},
    ],
    ids=str,
)
def test_a_malformed_payload_is_damage(change):
    payload = {
        "position": {"step": 1, "samples": 4, "mini_epoch_samples": 4},
        "settings": {},
        "counters": {},
        "saved_at": 0.0,
    }
    SavedState.from_payload(payload)
    with pytest.raises(DamagedStateError):
        SavedState.from_payload({**payload, **change})


def test_an_unreadable_file_is_damage(tmp_path, data, monkeypatch):
    """EIO, as of a disk with a bad sector: the file is there with its size, and can't be read."""
    train_until(25, tmp_path / "run", data, monkeypatch, **RUN)
    (folder,) = state_folders(tmp_path / "run")[:1]
    verified(folder)
    original = Path.read_bytes

    def failing(path):
        if path.suffix == ".safetensors":
            raise OSError(5, "Input/output error", str(path))
        return original(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
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
    (tmp_path / "manifest.json").write_text('{"version": 3, "files": {}}')
    with pytest.raises(UserError) as refused:
        StateReader(tmp_path)
    assert refused.value.given == tmp_path
    (tmp_path / "run.json").write_text('{"version": 3}')
    with pytest.raises(UserError) as refused:
        read_run(tmp_path)
    assert refused.value.given == tmp_path / "run.json"
