"""Runs that can't be lost: exact continuation, damaged states, signals, bad steps."""

import gc
import json
import os
import shutil
import signal
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from training_runs import (
    CTX,
    PIPE,
    VOCAB,
    Killed,
    flags,
    from_a_terminal_without_figures,
    log_lines,
    losses,
    metrics,
    newest_state,
    train,
    train_process,
    train_until,
    verified,
)

from src import run_folder
from src.config import RunConfig
from src.dataset.binidx import BinIdxWriter
from src.files import sha256_of
from src.model import RWKV7, ModelConfig
from src.model.cost import parameter_count
from src.model.shared_memory import IDLE_IN_LAYER_0
from src.training import rollback, trainer
from src.training.checkpoint import storage
from src.training.checkpoint.manifest import DamagedStateError
from src.training.checkpoint.parts import whole_part
from src.training.checkpoint.reader import StateReader
from src.training.checkpoint.restore import weights_of_state
from src.training.checkpoint.results import Results
from src.training.checkpoint.resume import ResumePoint, find_resume_point, peek_resume_point
from src.training.checkpoint.state import Position
from src.training.checkpoint.storage import state_folders
from src.training.schedule import RunLength, learning_rate

STEPS = 60
RUN = {"my_exit_tokens": CTX * 4 * STEPS, "epoch_steps": 20, "epoch_save": 1}


def final(out):
    return torch.load(out / "rwkv-final.pth")


def assert_same_run(one, two):
    assert losses(one) == losses(two)
    assert [line[:4] for line in log_lines(one)] == [line[:4] for line in log_lines(two)]
    a, b = final(one), final(two)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """The run that nothing happens to, in fp32 and in bf16."""
    runs = {}
    for precision in ("fp32", "bf16"):
        runs[precision] = tmp_path_factory.mktemp(precision) / "run"
        assert train(runs[precision], data, precision=precision, **RUN) == 0
    return runs


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("deaths", [[25], [3, 20, 41, 59]], ids=str)
def test_continued_runs_are_the_uninterrupted_run(tmp_path, data, whole, monkeypatch, precision, deaths):
    out = tmp_path / "run"
    for step in deaths:
        train_until(step, out, data, monkeypatch, precision=precision, save_minutes=1e-6, **RUN)
    assert train(out, data, precision=precision, **RUN) == 0
    assert [int(row["step"]) for row in metrics(out)] == list(range(STEPS))
    assert_same_run(out, whole[precision])


def test_the_comparison_notices_a_lost_moment(tmp_path, data, whole, monkeypatch):
    out = tmp_path / "run"
    train_until(25, out, data, monkeypatch, save_minutes=1e-6, **RUN)
    folder = state_folders(out)[0]
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    tensors["blocks.1.ffn.key.weight/exp_avg"].zero_()
    save_file(tensors, file)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert train(out, data, **RUN) == 0
    assert losses(out) != losses(whole["fp32"])


DAMAGES = {
    "cut": lambda f: f.write_bytes(f.read_bytes()[:-100]),
    "flipped": lambda f: f.write_bytes(f.read_bytes()[:-50] + bytes([f.read_bytes()[-50] ^ 1]) + f.read_bytes()[-49:]),
    "emptied": lambda f: f.write_bytes(b""),
    "removed": lambda f: f.unlink(),
}


@pytest.fixture(scope="module")
def two_states(tmp_path_factory, data):
    """A run that was killed before step 45, with states of the steps 40 and 20."""
    out = tmp_path_factory.mktemp("two states") / "run"
    with pytest.MonkeyPatch.context() as patch:
        train_until(45, out, data, patch, save_minutes=0, **RUN)
    return out


@pytest.mark.parametrize("victim", ["rank0-0000.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_named_and_the_one_before_is_taken(
    tmp_path, data, whole, two_states, capfd, damage, victim
):  # fmt: skip
    if damage == "flipped" and victim == "manifest.json":
        pytest.skip("a flipped bit of the manifest is one of the checks of the other files")
    out = shutil.copytree(two_states, tmp_path / "run")
    newest, before = state_folders(out)
    assert (newest.name, before.name) == ("step-00000040", "step-00000020")
    DAMAGES[damage](newest / victim)
    with pytest.raises(DamagedStateError):
        verified(newest)
    capfd.readouterr()
    assert train(out, data, **RUN) == 0
    output = capfd.readouterr().out
    assert "step-00000040 is damaged" in output
    assert victim in output
    assert "step-00000020" in output
    assert_same_run(out, whole["fp32"])


def test_damaged_states_of_one_step_are_archived_under_names_of_their_own(tmp_path, capfd):
    """A peek moves nothing, and doesn't claim that it did."""
    folder = tmp_path / "resume" / "step-00000040"
    config, length = RunConfig(proj_dir=str(tmp_path)), RunLength.of(1000, 8, 4)
    for expected in ("damaged-step-00000040", "damaged-step-00000040-2", "damaged-step-00000040-3"):
        folder.mkdir(parents=True)
        assert peek_resume_point(config, tmp_path, length).state is None
        assert folder.is_dir()
        assert "damaged-" not in capfd.readouterr().out
        assert find_resume_point(config, tmp_path, length).state is None
        message = capfd.readouterr().out
        assert "manifest.json" in message
        assert f"renamed to {expected}," in message
        assert (folder.parent / expected).is_dir()
        assert state_folders(tmp_path) == []


def test_only_the_last_states_are_kept_and_leftovers_are_swept(tmp_path, data, monkeypatch):
    out = tmp_path / "run"
    (out / "resume" / ".step-00000007.1.tmp").mkdir(parents=True)
    (out / ".metrics.csv.1.tmp").touch()
    (out / ".profile.json.gz.xyz").mkdir()
    (out / ".mine.tmp").mkdir()
    assert train(out, data, keep_resume=3, save_minutes=1e-6, **RUN) == 0
    assert [int(path.name[5:]) for path in state_folders(out)] == [60, 58, 56]
    assert sorted(p.name for p in (out / "resume").iterdir()) == sorted(p.name for p in state_folders(out))
    assert [path.name for path in out.glob(".*") if path.name != ".lock"] == [".mine.tmp"]
    for folder in state_folders(out):
        verified(folder)


def test_a_state_whose_replacement_was_cut_off_stands_again(tmp_path):
    """Killed between the two renames that put a newer state of the same step in its place."""
    for name in (".step-00000020.replaced.tmp", ".step-00000020.7.tmp", ".step-00000040.replaced.tmp", "step-00000040"):
        (tmp_path / "resume" / name).mkdir(parents=True)
        (tmp_path / "resume" / name / "state.json").write_text(name)
    run_folder.remove_leftovers(tmp_path)
    assert sorted(path.name for path in (tmp_path / "resume").iterdir()) == ["step-00000020", "step-00000040"]
    assert (tmp_path / "resume" / "step-00000020" / "state.json").read_text() == ".step-00000020.replaced.tmp"
    assert (tmp_path / "resume" / "step-00000040" / "state.json").read_text() == "step-00000040"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_signals_save_and_stop(tmp_path, data, whole, number, code):
    out = tmp_path / "run"
    argv = flags(out, data, save_minutes=0, **{**RUN, "epoch_steps": 1000, "my_exit_tokens": CTX * 4 * 3000})
    process = train_process(argv, preexec_fn=from_a_terminal_without_figures)
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not ((out / "metrics.csv").exists() and len(metrics(out)) > 5):
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert "same command continues" in output
    assert newest_state(out).position.step == len(metrics(out)) > 5


def test_a_run_outlives_those_who_read_what_it_says(tmp_path, data):
    out = tmp_path / "run"
    argv = flags(out, data, **RUN)
    process = train_process(argv, stderr=PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=100) == 0, process.stderr.read()
    assert process.stderr.read() == ""
    assert len(metrics(out)) == STEPS
    assert final(out)


def test_what_killed_processes_left_is_swept(tmp_path, data):
    out = tmp_path / "run"
    left = [out / ".rwkv-7.pth.31383.tmp", out / "resume" / ".step-00000007.31383.tmp" / "tensors-0000.safetensors"]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    assert train(out, data, **{**RUN, "my_exit_tokens": CTX * 4 * 2}) == 0
    assert not any(path.exists() for path in left)


def wait_until(happened):
    """However long it takes on a busy machine; the test fails where it never happens."""
    for _ in range(6000):
        if happened():
            return
        time.sleep(0.01)
    pytest.fail("did not happen within a minute")


@pytest.mark.parametrize(("mini_epochs", "step"), [({}, 19), ({"epoch_steps": 1, "epoch_save": 1000}, 1)], ids=str)
def test_a_state_is_on_the_disk_before_the_first_numbered_weights(
    tmp_path, data, whole, monkeypatch, mini_epochs, step
):
    """A run that dies while it writes them continues with its moments, to the bits of the run that never died."""
    original = Results.write

    def die(self, module, path, *rest, **named):
        original(self, module, path, *rest, **named)
        if path.name == "rwkv-0.pth":
            raise Killed

    settings = {**RUN, **mini_epochs, "save_minutes": 0}
    with monkeypatch.context() as patch:
        patch.setattr(Results, "write", die)
        with pytest.raises(Killed):
            train(tmp_path / "run", data, **settings)
    assert (tmp_path / "run" / "rwkv-0.pth").exists()
    assert newest_state(tmp_path / "run").position.step == step
    assert train(tmp_path / "run", data, **settings) == 0
    one, two = final(tmp_path / "run"), final(whole["fp32"])
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_a_second_ctrl_c_stops_at_once(tmp_path, data, monkeypatch, capfd):
    from src.training.module import TrainingModule

    original = TrainingModule.training_step

    def step(self, batch, batch_idx):
        if batch_idx == 25:
            wait_until(lambda: state_folders(tmp_path / "run")[0].name == "step-00000020")
            stop = signal.getsignal(signal.SIGINT).__self__
            os.kill(os.getpid(), signal.SIGINT)
            wait_until(lambda: stop.received)  # two signals at once would be delivered as one
            os.kill(os.getpid(), signal.SIGINT)
            wait_until(lambda: False)  # interrupted here
        return original(self, batch, batch_idx)

    before = signal.getsignal(signal.SIGINT)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(TrainingModule, "training_step", step)
            assert train(tmp_path / "run", data, **RUN) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "interrupted; the same command continues" in capfd.readouterr().err
    assert state_folders(tmp_path / "run")[0].name == "step-00000020"
    assert train(tmp_path / "run", data, **RUN) == 0


def test_weights_alone_continue_with_another_batch_and_the_renewed_warm_up_is_not_repeated(
    tmp_path,
    data,
    monkeypatch,
    capfd,
):
    """Mini-epochs stay 20 batches of 4 samples; the weights of mini-epoch 1 stand for 160 samples, whatever the batch
    is now."""
    out = tmp_path / "run"
    train_until(45, out, data, monkeypatch, **RUN)
    shutil.rmtree(out / "resume")
    bigger = {**RUN, "micro_bsz": 8, "epoch_steps": 7}
    train_until(43, out, data, monkeypatch, save_minutes=1e-6, **bigger)
    output = capfd.readouterr().out
    assert f"step 40, {160 * CTX:,} tokens, with a fresh optimizer" in output
    assert "--epoch_steps 7: the mini-epochs of this run stay as they began, with 20" in output
    assert train(out, data, **{**RUN, "micro_bsz": 2}) == 0
    rows = metrics(out)
    assert [int(row["tokens"]) for row in rows[39:44]] == [n * CTX for n in (160, 168, 176, 178, 180)]
    assert int(rows[-1]["tokens"]) == 240 * CTX
    assert [line[0] for line in log_lines(out)] == ["0", "1", "2"]
    settings = {"lr_init": 3e-3, "lr_final": 3e-4, "exit_tokens": CTX * 240, "warmup_steps": -1}
    for row, batch, samples in ((rows[41], 8, 168), (rows[42], 2, 176), (rows[60], 2, 212)):
        expected = learning_rate(samples / batch, tokens_per_step=batch * CTX, restarted_at=160 / batch, **settings)
        assert float(row["lr"]) == pytest.approx(expected, rel=1e-6)


def test_time_limit_saves_and_stops_in_time(tmp_path, data, capfd):
    begin = time.monotonic()
    long = {**RUN, "my_exit_tokens": CTX * 4 * 100_000}
    assert train(tmp_path / "run", data, time_limit=0.55, **long) == 124  # 33 s, of which 30 are kept for the last save
    assert time.monotonic() - begin < 33
    assert "--time_limit" in capfd.readouterr().out
    assert state_folders(tmp_path / "run")


def test_a_run_that_began_in_the_middle_is_continued_before_its_first_weights(tmp_path, data, monkeypatch, capfd):
    """--epoch_begin 3 and --epoch_save 10: no rwkv-N.pth is written for a long time, and none is missed."""
    base = tmp_path / "base.pth"
    torch.save(RWKV7(ModelConfig(2, 32, VOCAB, head_size=16)).state_dict(), base)
    settings = {**RUN, "epoch_steps": 10, "epoch_save": 10, "load_model": base, "epoch_begin": 3}
    out = tmp_path / "run"
    train_until(46, out, data, monkeypatch, save_minutes=1e-6, **settings)
    assert not list(out.glob("rwkv-*.pth"))
    assert train(out, data, **settings) == 0
    output = capfd.readouterr().out
    assert "at step" in output
    assert "has no rows" not in output  # none is missing before the first
    assert [line[0] for line in log_lines(out)] == ["3", "4", "5"]


def test_a_beginning_after_the_end_is_refused(tmp_path, data, capfd):
    base = tmp_path / "base.pth"
    torch.save(RWKV7(ModelConfig(2, 32, VOCAB, head_size=16)).state_dict(), base)
    assert train(tmp_path / "run", data, load_model=base, epoch_begin=3, **RUN) == 2
    assert "--epoch_begin 3: the run has only 3 mini-epochs" in capfd.readouterr().err
    assert not list((tmp_path / "run").glob("rwkv-*"))


@pytest.mark.parametrize("kept", ["state", "weights"])
def test_an_end_that_was_moved_into_the_past_is_refused(tmp_path, data, monkeypatch, capfd, kept):
    out = tmp_path / "run"
    train_until(45, out, data, monkeypatch, **RUN)
    if kept == "weights":
        shutil.rmtree(out / "resume")
    assert train(out, data, **{**RUN, "my_exit_tokens": CTX * 4 * 39}) == 2
    assert f"{CTX * 4 * 39}: the run is at {CTX * 4 * 40} tokens already" in capfd.readouterr().err
    assert not (out / "rwkv-final.pth").exists()
    assert train(out, data, **{**RUN, "my_exit_tokens": CTX * 4 * 50}) == 0
    assert len(metrics(out)) == 50


def test_a_run_may_end_where_it_is(tmp_path, data, monkeypatch):
    """Its end moved exactly to the newest state."""
    out = tmp_path / "run"
    train_until(45, out, data, monkeypatch, **RUN)
    assert train(out, data, **{**RUN, "my_exit_tokens": CTX * 4 * 40}) == 0
    a, b = final(out), torch.load(out / "rwkv-1.pth")
    assert all(torch.equal(a[name], b[name]) for name in a)
    shutil.rmtree(out / "resume")
    (out / "rwkv-final.pth").unlink()
    assert train(out, data, **{**RUN, "my_exit_tokens": CTX * 4 * 40}) == 0
    assert final(out).keys() == b.keys()


def test_the_last_state_is_complete_before_the_final_weights(tmp_path, data, monkeypatch):
    """A folder that has them is complete in every part."""
    from src.training.checkpoint import callbacks

    order = []

    def recording(owner, name):
        original = getattr(owner, name)

        def call(*arguments, **named):
            result = original(*arguments, **named)
            order.append(name)
            return result

        monkeypatch.setattr(owner, name, call)

    recording(storage.StateWriter, "write")
    recording(storage.StateWriter, "wait")
    recording(callbacks, "refuse_unusable")
    assert train(tmp_path / "run", data, **{**RUN, "my_exit_tokens": CTX * 4 * 2}) == 0
    before = order[: order.index("refuse_unusable")]
    assert before[-2:] == ["write", "wait"]


def test_weights_of_a_state_that_lacks_some_are_not_taken(tmp_path):
    sizes = ModelConfig(2, 32, VOCAB, head_size=16)
    kinds = {name: "idle" if name in IDLE_IN_LAYER_0 else "master" for name in RWKV7(sizes).state_dict()}
    weights = {f"{name}/{kinds[name]}": tensor for name, tensor in RWKV7(sizes).state_dict().items()}

    def read(step, tensors):
        writer = storage.StateWriter(tmp_path, keep=9)
        writer.write(step, {}, [whole_part(key, tensor) for key, tensor in tensors.items()])
        writer.wait()
        return weights_of_state(StateReader(storage.state_folders(tmp_path)[0]), sizes, torch.float32, tmp_path)

    assert len(read(1, weights)) == len(weights)
    for step, changed in enumerate(({}, {"head.weight/master": torch.zeros(3, 3)}), start=2):
        damaged = {**{name: tensor for name, tensor in weights.items() if "head" not in name}, **changed}
        with pytest.raises(DamagedStateError, match=r"head\.weight"):
            read(step, damaged)


def test_the_clock_of_saves_starts_again_with_each(tmp_path, data, monkeypatch):
    """A step takes 20 seconds, and a state is saved a minute after the one before."""
    from src.training.checkpoint import callbacks
    from src.training.module import TrainingModule

    now, original = [1000.0], TrainingModule.training_step

    def step(self, batch, batch_idx):
        now[0] += 20
        return original(self, batch, batch_idx)

    monkeypatch.setattr(TrainingModule, "training_step", step)
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    out, short = tmp_path / "run", {**RUN, "my_exit_tokens": CTX * 4 * 14}
    assert train(out, data, save_minutes=1, keep_resume=100, **short) == 0
    assert sorted(int(folder.name[5:]) for folder in state_folders(out)) == [4, 8, 12, 14]


def test_the_seed_of_the_weights_is_that_of_the_last_beginning(tmp_path, data, monkeypatch):
    """A start that dies before its first save is drawn anew by the next."""
    out = tmp_path / "run"
    train_until(5, out, data, monkeypatch, **{**RUN, "random_seed": 3})
    assert run_folder.read_run(out)["origin"]["seed"] == 3
    train_until(25, out, data, monkeypatch, **{**RUN, "random_seed": 4})
    assert train(out, data, **{**RUN, "random_seed": 5}) == 0
    assert run_folder.read_run(out)["origin"]["seed"] == 4


def test_what_a_changed_setting_means(tmp_path, data, monkeypatch, capfd):
    out = tmp_path / "run"
    train_until(25, out, data, monkeypatch, **RUN)
    capfd.readouterr()
    for changed in ({"ctx_len": 8}, {"n_layer": 3}, {"magic_prime": 353}):
        assert train(out, data, **{**RUN, **changed}) == 2
        output = capfd.readouterr().err
        assert f"--{next(iter(changed))}" in output or "don't fit" in output
        assert "Traceback" not in output
    assert train(out, data, weight_decay=0.01, **RUN) == 0
    output = capfd.readouterr().out
    assert "--weight_decay was 0.0 at the last start, is 0.01 now" in output
    assert output.count("at the last start") == 1  # what didn't change is as run.json records it


def test_other_data_under_the_same_name_is_refused(tmp_path, data, monkeypatch, capfd):
    copy = tmp_path / "count"
    for end in (".bin", ".idx"):
        shutil.copy(f"{data}{end}", f"{copy}{end}")
    train_until(25, tmp_path / "run", copy, monkeypatch, **RUN)
    with BinIdxWriter(copy, np.uint16) as writer:
        for _ in range(200):
            writer.add_document([*range(1, 30), 0])
    assert train(tmp_path / "run", copy, **RUN) == 2
    assert "--data_file" in capfd.readouterr().err


def test_the_time_limit_knows_how_long_the_disk_takes(tmp_path, monkeypatch):
    original = storage._write_file

    handed_over = threading.Event()

    def slowly(path, content):
        assert handed_over.wait(60)  # whoever wrote in the caller's thread would wait here
        time.sleep(0.2)
        return original(path, content)

    monkeypatch.setattr(storage, "_write_file", slowly)
    writer = storage.StateWriter(tmp_path, keep=2)
    writer.write(1, {}, [whole_part("weight/master", torch.zeros(4))])
    handed_over.set()
    writer.wait()
    assert writer.slowest_seconds >= 0.6  # three files


def test_the_time_limit_expects_a_first_save_to_take_long(tmp_path):
    """Of a large model, whose state is minutes of a disk's time, before one was seen; then what was seen counts. Never
    half of a short limit."""
    large = parameter_count(ModelConfig(24, 2048, 65536))
    assert (
        60
        < trainer.expected_save_seconds(large, time_limit=0)
        == trainer.expected_save_seconds(large, time_limit=1440)
        < 120
    )
    assert trainer.expected_save_seconds(large, time_limit=4) == 30
    writer = storage.StateWriter(tmp_path, keep=2, expected_seconds=90.0)
    assert writer.slowest_seconds == 90
    writer.write(1, {}, [whole_part("weight/master", torch.zeros(4))])
    writer.wait()
    assert 0 < writer.slowest_seconds < 30


def test_a_failed_save_stops_the_run_and_leaves_the_earlier_states_whole(tmp_path, data, monkeypatch, capfd):
    out = tmp_path / "run"
    train_until(25, out, data, monkeypatch, **RUN)
    before = {path: path.read_bytes() for path in state_folders(out)[0].iterdir()}
    from src.training.checkpoint import storage

    def full(path, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "_write_file", full)
        assert train(out, data, **RUN) == 1
    assert "No space left" in capfd.readouterr().err
    assert {path: path.read_bytes() for path in state_folders(out)[0].iterdir()} == before
    assert train(out, data, **RUN) == 0


@pytest.fixture
def poisoned(monkeypatch):
    """Gradients of chosen samples become NaN, whenever those are read."""
    from src.training.module import TrainingModule

    original = TrainingModule.training_step
    poison = set()

    def step(self, batch, batch_idx):
        out = original(self, batch, batch_idx)
        keys = {tuple(row.tolist()) for row in batch[0]}
        if keys & poison:
            out["loss"] = out["loss"] * float("nan")
        return out

    monkeypatch.setattr(TrainingModule, "training_step", step)
    return poison


def rows_of_step(data, step):
    from src.dataset.pretrain import PretrainDataset
    from src.dataset.sample_order import magic_prime

    dataset = PretrainDataset(data, CTX, magic_prime(6000, CTX), step * 4, 4, 4, 0, 1, 64)
    return [tuple(dataset[j][0].tolist()) for j in range(4)]


def test_one_bad_step_is_left_out_and_the_run_goes_on(tmp_path, data, poisoned, capfd):
    poisoned.add(rows_of_step(data, 30)[1])
    assert train(tmp_path / "run", data, **RUN) == 0
    output = capfd.readouterr().out
    assert "step 31 skipped" in output
    assert all(torch.isfinite(tensor).all() for tensor in final(tmp_path / "run").values())


def test_too_many_bad_steps_go_back_once_and_skip_their_samples(tmp_path, data, poisoned, capfd):
    for step in (30, 31, 32):
        poisoned.add(rows_of_step(data, step)[2])
    out = tmp_path / "run"
    assert train(out, data, **RUN) == 0
    output = capfd.readouterr().out
    assert "rolling back to the state of step 20" in output
    assert [int(row["step"]) for row in metrics(out)] == list(range(STEPS))
    assert all(np.isfinite(losses(out)))
    state = newest_state(out)
    (first, count), *rest = state.position.skipped_samples
    assert not rest
    assert first == 30 * 4
    assert count >= 3 * 4


@pytest.mark.parametrize(("step", "skipped"), [(2, [(8, 4), (16, 8)]), (4, [(8, 4), (20, 4)])])
def test_samples_of_a_second_roll_back_are_left_out_besides_those_of_the_first(monkeypatch, step, skipped):
    """Steps 3 and 4 fail, of samples 16 to 23, since 8 to 11 are left out. Those before the point that the run goes
    back to stay where they are: it has passed them."""
    length = RunLength.of(exit_tokens=10_000, ctx_len=8, global_batch=4, epoch_steps=10)
    begun, earlier = (ResumePoint(Position(n, 4 * n, 40, skipped_samples=[(8, 4)]), length) for n in (2, step))
    monkeypatch.setattr(rollback, "find_resume_point", lambda *_: earlier)
    group = SimpleNamespace(broadcast_from_rank_zero=lambda function: function())
    samples = SimpleNamespace(locate=lambda n: f"sample {n}")
    context = SimpleNamespace(process_group=group, samples=samples, config=RunConfig(), proj_dir=None)
    result = trainer.FitResult(failed_steps=range(3, 5), good_steps=1)
    assert rollback._roll_back(context, begun, result, rolled_back_to=-1).position.skipped_samples == skipped


def test_bad_steps_at_the_very_end_are_made_up_for_too(tmp_path, data, poisoned):
    for step in range(STEPS - 3, STEPS):
        poisoned.add(rows_of_step(data, step)[0])
    out = tmp_path / "run"
    assert train(out, data, **RUN) == 0
    assert all(np.isfinite(losses(out)))
    [(first, count)] = newest_state(out).position.skipped_samples
    assert first <= (STEPS - 3) * 4  # a poisoned row may stand in the steps before too
    assert first + count == STEPS * 4


def test_going_back_to_the_beginning_draws_the_same_weights_and_keeps_nothing(tmp_path, data, poisoned, monkeypatch):
    from src.training.optim import MasterAdamW

    for step in range(3):
        poisoned.add(rows_of_step(data, step)[0])
    drawn, optimizers, models = [], [], []
    original = trainer.build_model

    def build(*args):
        things = [type(thing) for thing in gc.get_objects()]
        optimizers.append(things.count(MasterAdamW))
        models.append(things.count(RWKV7))
        model, values = original(*args)
        drawn.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return model, values

    monkeypatch.setattr(trainer, "build_model", build)
    gc.collect()
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert train(tmp_path / "run", data, **RUN) == 0
    first, second = drawn
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert optimizers[1] == optimizers[0]
    assert models[1] == models[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def nan_from(monkeypatch, first, last=10**9, act=lambda step: None):
    """The loss of steps `first` to `last` is NaN; `act` is called in each step."""
    from src.training.module import TrainingModule

    original = TrainingModule.training_step

    def step(self, batch, batch_idx):
        out = original(self, batch, batch_idx)
        act(self.trainer.global_step)
        if first <= self.trainer.global_step <= last:
            out["loss"] = out["loss"] * float("nan")
        return out

    monkeypatch.setattr(TrainingModule, "training_step", step)


def test_a_stop_among_skipped_steps_saves_and_nothing_else_does(tmp_path, data, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        nan_from(patch, 8, act=lambda step: step == 12 and os.kill(os.getpid(), signal.SIGTERM))
        code = train(out, data, max_bad_steps=50, save_minutes=1e-6, keep_resume=100, **{**RUN, "epoch_steps": 5})
    assert code == 128 + signal.SIGTERM
    *earlier, last = sorted(int(folder.name[5:]) for folder in state_folders(out))
    assert last == 13  # the stop
    assert earlier
    assert max(earlier) <= 8
    assert not (out / "rwkv-1.pth").exists()  # of steps 6 to 10


def test_weights_are_not_saved_among_skipped_steps(tmp_path, data, monkeypatch, capfd):
    """A run that goes back, or that starts again without a state, would go back to them."""
    out, settings = tmp_path / "run", {**RUN, "epoch_steps": 5, "save_minutes": 0, "my_exit_tokens": CTX * 4 * 30}
    nan_from(monkeypatch, 13, 16)
    assert train(out, data, max_bad_steps=10, **settings) == 0
    assert "note: rwkv-2.pth is not written, since the last 2 steps were skipped" in capfd.readouterr().out
    assert sorted(run_folder.numbered_weights(out)) == [0, 1, 3, 4, 5]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_run_without_a_good_step_fails(tmp_path, data, monkeypatch, capfd, precision):
    """Whether the limit of bad steps is reached or not; and again when the same command is given again."""
    out, short = tmp_path / "run", {**RUN, "my_exit_tokens": CTX * 4 * 4}
    nan_from(monkeypatch, 0)
    for _ in range(2):
        assert train(out, data, max_bad_steps=10, precision=precision, **short) == 1
        assert "no step had a finite loss and gradient" in capfd.readouterr().err
        assert not (out / "rwkv-final.pth").exists()


def test_weights_that_are_not_finite_are_no_result(tmp_path, data, monkeypatch, capfd):
    """A last step whose gradient was finite and whose update was not."""
    from src.training.optim import MasterAdamW

    original = MasterAdamW.step

    def step(self, closure=None):
        loss = original(self, closure)
        with torch.no_grad():
            self.parameters[-1].view(-1)[3] = float("inf")
        return loss

    monkeypatch.setattr(MasterAdamW, "step", step)
    out, short = tmp_path / "run", {**RUN, "my_exit_tokens": CTX * 4}
    assert train(out, data, precision="bf16", **short) == 1
    assert "is not finite, so rwkv-final.pth is not written" in capfd.readouterr().err
    assert not (out / "rwkv-final.pth").exists()


@pytest.mark.parametrize(("mini_epoch", "good_steps"), [(20, 5), (20, 0), (5, 0)])
def test_bad_steps_everywhere_stop_the_run_with_a_report(tmp_path, data, monkeypatch, capfd, mini_epoch, good_steps):
    from src.training.module import TrainingModule

    original = TrainingModule.training_step

    def step(self, batch, batch_idx):
        out = original(self, batch, batch_idx)
        if self.trainer.global_step >= good_steps:
            out["loss"] = out["loss"] * float("nan")
        return out

    monkeypatch.setattr(TrainingModule, "training_step", step)
    assert train(tmp_path / "run", data, **{**RUN, "epoch_steps": mini_epoch}) == 1
    assert not (tmp_path / "run" / "rwkv-final.pth").exists()
    output = capfd.readouterr().err
    assert "not finite again" in output
    assert "the first is at token" in output
