"""Files that change under a run: its folder is moved, its lock removed, its data truncated or replaced. The run ends
with a sentence, what is saved is whole, and nothing of others is overwritten."""

import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import CTX, flags, losses, newest_state, train

from src.config import RunConfig
from src.dataset import watched_file
from src.dataset.binidx import BinIdxWriter, MMapIndexedDataset
from src.dataset.pretrain import PretrainDataset
from src.dataset.sample_order import magic_prime
from src.dataset.watched_file import DataFileError
from src.training import trainer
from src.training.data import PretrainSamples
from src.training.module import TrainingModule

RUN = {"my_exit_tokens": CTX * 4 * 30, "epoch_steps": 10, "epoch_save": 1}


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch):
    """They take most of the time of a tiny run."""
    for name in ("write_loss_figure", "write_report"):
        monkeypatch.setattr(f"src.training.training_run.{name}", lambda *arguments: "")


def during(monkeypatch, step, act):
    """`act` is called once, while step number `step` (from 0) computes."""
    original, done = TrainingModule.training_step, []

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == step and not done:
            done.append(step)
            act()
        return original(self, batch, batch_idx)

    monkeypatch.setattr(TrainingModule, "training_step", training_step)


def contents(folder):
    """But for what is not under its final name, and metrics.csv: a run may add to the file that it has open."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "metrics.csv"]
    return {path: path.read_bytes() for path in files if not any(part.endswith(".tmp") for part in path.parts)}


# ---- the folder ------------------------------------------------------------------------------------------------------


def moved(out):
    """And another run begins under the old name."""
    out.rename(out.with_name("moved"))
    (out / "resume").mkdir(parents=True)
    (out / ".lock").touch()
    for name in ("rwkv-0.pth", "metrics.csv", "train_log.txt", "run.json", "resume/step-00000010"):
        (out / name).write_text("of another run")


FOLDERS = {
    "moved": moved,
    "gone": lambda out: out.rename(out.with_name("moved")),
    "lock removed": lambda out: (out / ".lock").unlink(),
    "lock of another": lambda out: ((out / ".lock").unlink(), (out / ".lock").touch()),
}


@pytest.mark.parametrize("change", FOLDERS)
def test_a_run_whose_folder_is_no_longer_its_own_stops(tmp_path, data, monkeypatch, capfd, change):
    out = tmp_path / "run"
    before = {}

    def act():
        for thread in threading.enumerate():  # a state that is being published was checked before
            if thread.name == "state-writer":
                thread.join()
        FOLDERS[change](out)
        before.update(contents(out))

    with monkeypatch.context() as patch:
        during(patch, 15, act)
        assert train(out, data, save_minutes=1e-6, **RUN) == 2
    error = capfd.readouterr().err
    assert f"--proj_dir {out}: the folder was moved, or its .lock removed" in error
    assert "Traceback" not in error
    assert contents(out) == before
    assert out.exists() == (change != "gone")
    kept = tmp_path / "moved" if change in ("moved", "gone") else out
    assert train(kept, data, **RUN) == 0
    assert len(losses(kept)) == 30


def test_the_lock_is_checked_right_before_a_state_is_published(tmp_path, data, monkeypatch, capfd):
    """Between the step's check and the end of the save."""
    from src.training.checkpoint import storage

    out, original = tmp_path / "run", storage._write_file

    def write(path, content):
        if path.name == "manifest.json" and (out / ".lock").exists():
            (out / ".lock").unlink()
        return original(path, content)

    monkeypatch.setattr(storage, "_write_file", write)
    assert train(out, data, **RUN) == 2
    assert ".lock removed" in capfd.readouterr().err
    assert not list((out / "resume").glob("step-*"))


@pytest.mark.parametrize("name", ["rwkv-0.pth", "rwkv-final.pth"])
def test_the_lock_is_checked_right_before_weights_are_published(tmp_path, data, monkeypatch, name):
    out, save = tmp_path / "run", torch.save

    def saving(weights, file):
        save(weights, file)
        if name in file.name:
            (out / ".lock").unlink(missing_ok=True)

    monkeypatch.setattr(torch, "save", saving)
    assert train(out, data, **RUN) == 2
    assert not (out / name).exists()


# ---- the data --------------------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path, data):
    """A copy of the data that a test may damage; the sound one is next to it."""
    for ending in (".bin", ".idx"):
        shutil.copy(f"{data}{ending}", tmp_path / f"own{ending}")
        shutil.copy(f"{data}{ending}", tmp_path / f"sound{ending}")
    return tmp_path / "own"


def truncate(path):
    os.truncate(path, 4096)  # to a page: a memory map would raise SIGBUS beyond it


def replace(path):
    shutil.copy2(path, f"{path}.new")  # of equal size and time
    os.replace(f"{path}.new", path)


def overwrite(path):
    content = path.read_bytes()
    path.write_bytes(content[::-1])


DATA_CHANGES = [(truncate, ".bin"), (overwrite, ".bin"), (replace, ".idx"), (Path.unlink, ".idx")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """The losses of the run that nothing happens to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(out, data, **RUN) == 0
    return losses(out)


@pytest.mark.parametrize(("change", "ending"), DATA_CHANGES, ids=[f"{c.__name__} {e}" for c, e in DATA_CHANGES])
def test_changed_data_stop_the_run_with_its_state_saved(tmp_path, own, whole, monkeypatch, capfd, change, ending):
    out, victim = tmp_path / "run", own.with_name(f"own{ending}")
    with monkeypatch.context() as patch:
        during(patch, 15, lambda: change(victim))
        assert train(out, own, save_minutes=0, **RUN) == 2
    error = capfd.readouterr().err
    assert str(victim) in error
    assert "the same command" in error
    assert "Traceback" not in error
    assert newest_state(out).position.step == 16
    shutil.copy(tmp_path / f"sound{ending}", victim)
    assert train(out, own, **RUN) == 0
    assert losses(out) == whole


def test_data_that_end_in_the_middle_of_a_step_leave_the_state_of_the_step_before(tmp_path, own, monkeypatch, capfd):
    """The next micro batch can't be read, and the step that it belongs to is not taken."""
    settings = {**RUN, "micro_bsz": 2, "accumulate_grad_batches": 2}
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        during(patch, 15, lambda: truncate(own.with_name("own.bin")))
        assert train(out, own, save_minutes=0, **settings) == 2
    assert "it has 4096 bytes, it had 12000" in capfd.readouterr().err
    assert newest_state(out).position.step in (15, 16)
    shutil.copy(tmp_path / "sound.bin", own.with_name("own.bin"))
    assert train(out, own, **settings) == 0
    assert len(losses(out)) == 30


@pytest.mark.parametrize("change", [truncate, Path.unlink])
def test_changed_held_out_data_stop_the_run_too(tmp_path, data, own, monkeypatch, capfd, change):
    """Found before the next measurement, which would read it."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        during(patch, 15, lambda: change(own.with_name("own.bin")))
        assert train(out, data, val_data_file=own, save_minutes=0, **RUN) == 2
    assert "own.bin" in capfd.readouterr().err
    assert newest_state(out).position.step == 16


def test_a_disk_that_fails_under_the_data_ends_the_run_with_its_state(tmp_path, data, monkeypatch, capfd):
    reads, original = [], watched_file._pread

    def failing(descriptor, size, position):
        reads.append(size)
        if len(reads) > 2000:
            raise OSError(5, "Input/output error")
        return original(descriptor, size, position)

    def fail_from_now_on():
        reads.extend([0] * 2000)

    with monkeypatch.context() as patch:
        patch.setattr(watched_file, "_pread", failing)
        during(patch, 15, fail_from_now_on)
        assert train(tmp_path / "run", data, save_minutes=0, **RUN) == 2
    error = capfd.readouterr().err
    assert f"{data}.bin: can't be read (Input/output error)" in error
    assert newest_state(tmp_path / "run").position.step == 16
    assert len(losses(tmp_path / "run")) == 16


def test_conversations_are_watched_too(tmp_path, monkeypatch, capfd):
    from chat_models import make_tokenizer

    file = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "1 2 3"}, {"role": "assistant", "content": "4 5 6"}]
    file.write_text("\n".join(json.dumps({"conversations": turns}) for _ in range(40)))
    settings = {"data_type": "sft", "tokenizer": make_tokenizer(tmp_path / "tokenizer"), "vocab_size": 400, **RUN}
    settings |= {"ctx_len": 32, "my_exit_tokens": 32 * 4 * 30}
    cache = tmp_path / "chats.jsonl.sft.bin"
    with monkeypatch.context() as patch:
        during(patch, 15, lambda: os.truncate(cache, 4))
        assert train(tmp_path / "run", file, save_minutes=0, **settings) == 2
    assert f"{cache}: changed while it was in use: it has 4 bytes" in capfd.readouterr().err
    assert newest_state(tmp_path / "run").position.step == 16


def test_reads_of_a_truncated_file_raise(tmp_path, own):
    data = MMapIndexedDataset(own)
    dataset = PretrainDataset(own, CTX, magic_prime(data.n_tokens, CTX), 0, 100, 4, 0, 1, 64)
    assert data[3].tolist() == data.tokens[3 * 30 : 4 * 30].tolist()
    assert data.read(5990, 7000).tolist() == data.tokens[5990:].tolist()
    truncate(own.with_name("own.bin"))
    for read in (lambda: data[199], lambda: data.read(0, 6000), lambda: [dataset[i] for i in range(100)]):
        with pytest.raises(DataFileError, match="it has 4096 bytes, it had 12000"):
            read()
    os.truncate(own.with_name("own.idx"), 100)
    with pytest.raises(DataFileError, match=r"own\.idx"):
        data[199]


def test_ids_of_a_file_that_was_written_over_are_no_mistake_of_the_vocabulary(own):
    dataset = PretrainDataset(own, CTX, magic_prime(6000, CTX), 0, 100, 4, 0, 1, 64)
    own.with_name("own.bin").write_bytes(b"\xff" * 12000)
    with pytest.raises(DataFileError, match="written again"):
        dataset[0]


def test_initial_weights_do_not_stay_mapped_to_their_file(tmp_path, data, monkeypatch):
    """A file that is overwritten or truncated during the run must not reach the weights."""
    from src.cli import parse
    from src.model import RWKV7

    base = tmp_path / "base.pth"
    torch.manual_seed(1)
    torch.save(RWKV7(parse(flags("x", data))[0].model_config(64)).state_dict(), base)
    expected, original = torch.load(base), trainer.build_model
    checked = []

    def build(*arguments):
        model, values = original(*arguments)
        base.write_bytes(bytes(base.stat().st_size))
        checked.extend(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
        return model, values

    monkeypatch.setattr(trainer, "build_model", build)
    assert train(tmp_path / "run", data, load_model=base, precision="fp32", **{**RUN, "my_exit_tokens": CTX * 4}) == 0
    assert checked
    assert all(checked)


def test_the_end_of_the_data_is_part_of_its_identity(tmp_path):
    """Of data so long that what is compared are its ends."""
    identities = []
    for last in (1, 2):
        tokens = np.zeros(2_000_100, np.uint16)
        tokens[-1] = last
        with BinIdxWriter(tmp_path / "long", np.uint16) as writer:
            writer.add_bytes(tokens.tobytes(), np.array([len(tokens)]))
        identities.append(PretrainSamples(RunConfig(data_file=str(tmp_path / "long"), ctx_len=CTX)).identity)
    assert identities[0] != identities[1]


def test_reads_that_the_system_cuts_short_are_completed(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(bytes(range(20)))
    original = watched_file._pread
    monkeypatch.setattr(watched_file, "_pread", lambda file, size, position: original(file, min(size, 3), position))
    assert watched_file.WatchedFile(tmp_path / "x").read(5, 10) == bytes(range(5, 15))
