"""The held-out loss on the way: the same for any number of processes, harmless to training, and its best weights are
kept."""

import math
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import warm_process
from training_runs import CTX, ROOT, VOCAB, flags, losses, train, train_until, without_figures

from src.cli import parse
from src.config import RunConfig
from src.dataset.binidx import BinIdxWriter, MMapIndexedDataset
from src.inference.heldout_loss import heldout_loss
from src.model import RWKV7
from src.run_log import read_columns, read_curves
from src.training import control, validation
from src.training.distributed import zero
from src.training.distributed.process_group import ProcessGroup
from src.training.module import TrainingModule
from src.training.schedule import RunLength
from src.training.validation import HeldOut, _schedule

RUN = {"my_exit_tokens": CTX * 4 * 60, "epoch_steps": 20, "epoch_save": 1}
WINDOWS = 11  # no multiple of the micro batch, nor of the processes


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("held") / "held"
    with BinIdxWriter(prefix, np.uint16) as writer:
        for first in range(1, 28):
            writer.add_document([first + i for i in range(29)] + [0])
    return prefix


def config_of(data, held, **changed):
    return parse(flags("unused", data, val_data_file=held, **{"val_windows": WINDOWS, **changed}))[0]


def validations(out):
    return read_columns(out / "val.csv")


# ---- which samples ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_window_counts_once_however_they_are_shared(data, held, world_size):
    held_out = HeldOut(config_of(data, held))
    shares = [list(held_out.batches(rank, world_size)) for rank in range(world_size)]
    assert len({tuple(tuple(batch[0].shape) for batch in share) for share in shares}) == 1  # all ranks do the same work
    counted = [
        tuple(row.tolist())
        for share in shares
        for inputs, targets in share
        for row, wanted in zip(inputs, targets, strict=True)
        if (wanted >= 0).all()
    ]
    assert all(((targets >= 0).all(1) | (targets < 0).all(1)).all() for share in shares for _, targets in share)
    alone = [
        tuple(row.tolist())
        for inputs, targets in HeldOut(config_of(data, held, micro_bsz=1)).batches(0, 1)
        for row in inputs
    ]
    assert sorted(counted) == sorted(alone)
    assert len(alone) == WINDOWS


def test_sums_are_exact_and_the_module_trains_on():
    """In fp32 a sum of 2^24 nats would lose the small ones."""
    module = torch.nn.Dropout()
    module.device, seen = torch.device("cpu"), []

    def step(batch, batch_idx):
        seen.append(module.training)
        return batch[0]

    sums = [torch.tensor([2.0**24, 1.0], dtype=torch.float64), *[torch.tensor([1.0, 1.0], dtype=torch.float64)] * 3]
    held_out = SimpleNamespace(
        batches=lambda rank, world_size: [(each,) for each in sums], config=SimpleNamespace(context_parallel=1)
    )
    trainer = SimpleNamespace(strategy=SimpleNamespace(validation_step=step), world_size=1)
    mean, counted = validation.mean_loss(trainer, module, held_out, ProcessGroup(), lambda: False)
    assert (mean * 4, counted) == (2**24 + 3, 4)
    assert seen == [False] * 4
    assert module.training
    assert validation.mean_loss(trainer, module, held_out, ProcessGroup(), lambda: True) is None
    assert module.training


def test_a_prompt_is_the_beginning_of_a_window_and_its_continuation_the_rest(data, held):
    held_out = HeldOut(config_of(data, held))
    windows = [window.tolist() for inputs, targets in held_out.batches(0, 1) for window in inputs]
    for i, (prompt, continuation, *_) in enumerate(held_out.prompts(3, 5)):
        window = windows[i * WINDOWS // 3]
        assert (prompt, continuation[:-1]) == (window[:5], window[5:])
    assert [len(prompt) for prompt, *_ in held_out.prompts(1, 99)] == [CTX - 1]


def test_ids_that_do_not_fit_are_named_before_training(data, held):
    with pytest.raises(ValueError, match=r"--val_data_file .* token id \d+ doesn't fit --vocab_size 30"):
        HeldOut(config_of(data, held)).check_ids(30)


@pytest.mark.parametrize(
    ("val_every", "expected"),
    [("1", [9, 19, 29, 34]), ("2", [19, 34]), ("0", [34]), ("8steps", [7, 15, 23, 31, 34]), ("17 steps", [16, 33, 34])],
)
def test_when_it_is_measured(val_every, expected):
    length = RunLength.of(exit_tokens=35 * 64, ctx_len=16, global_batch=4, epoch_steps=10)
    due = _schedule(val_every, length)
    assert [step for step in range(35) if due(step)] == expected


@pytest.mark.parametrize("wrong", ["", "often", "-1", "2 epochs", "1.5"])
def test_wrong_val_every_is_refused_with_examples(wrong):
    (fault,) = RunConfig(data_file="x", val_every=wrong).faults()
    assert (fault.flag, fault.given) == ("val_every", wrong)
    assert "500steps" in fault.expected


# ---- in a run --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data, held):
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(out, data, val_data_file=held, val_windows=WINDOWS, val_every="10steps", **RUN) == 0
    return out


def test_training_does_not_notice_it(tmp_path, data, whole):
    assert train(tmp_path / "plain", data, **RUN) == 0
    assert losses(tmp_path / "plain") == losses(whole)
    one, two = (torch.load(out / "rwkv-final.pth") for out in (tmp_path / "plain", whole))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_it_is_the_loss_of_the_weights_at_that_step(whole, held):
    rows = validations(whole)
    assert rows["steps"] == [10, 20, 30, 40, 50, 60]
    assert rows["tokens"] == [steps * CTX * 4 for steps in rows["steps"]]
    held_data = MMapIndexedDataset(held)
    for steps, name in ((20, "rwkv-0.pth"), (40, "rwkv-1.pth"), (60, "rwkv-final.pth")):
        expected = heldout_loss(RWKV7.from_checkpoint(whole / name), held_data, CTX, max_windows=WINDOWS)
        at = rows["steps"].index(steps)
        assert rows["loss"][at] == pytest.approx(expected.loss, abs=1e-5)
        assert rows["counted"][at] == expected.tokens == WINDOWS * CTX
    assert f"validation after step 60: {rows['loss'][-1]:.6f}" in (whole / "train_log.txt").read_text()


def test_the_best_weights_are_kept(tmp_path, data, held, monkeypatch, capfd):
    """Told losses that fall, rise and fall again, but not as low: the last weights are not the best."""
    out = tmp_path / "run"
    measured_losses = iter([(3.0, 1), (2.0, 1), (4.0, 1), (1.0, 1), *[(5.0, 1)] * 7, (1.5, 1)])
    monkeypatch.setattr(validation, "mean_loss", lambda *_: next(measured_losses))
    assert train(out, data, val_data_file=held, val_every="5steps", **{**RUN, "epoch_steps": 5}) == 0
    rows = validations(out)
    assert rows["steps"] == [5.0 * n for n in range(1, 13)]  # one row each
    best = int(np.argmin(rows["loss"]))
    assert rows["steps"][best] == 20
    expected = torch.load(out / f"rwkv-{int(rows['steps'][best]) // 5 - 1}.pth")
    kept = torch.load(out / "rwkv-best.pth")
    assert all(torch.equal(kept[name], expected[name]) for name in expected)
    output = capfd.readouterr().out
    assert (
        f"lowest {rows['loss'][best]:.4f} after step {rows['steps'][best]:.0f}, kept as {out}/rwkv-best.pth" in output
    )


@pytest.mark.parametrize("deaths", [[35], [5, 41]], ids=str)
def test_a_continued_run_remembers_the_best(tmp_path, data, held, whole, monkeypatch, deaths):
    out = tmp_path / "run"
    settings = {"val_data_file": held, "val_windows": WINDOWS, "val_every": "10steps", **RUN}
    for step in deaths:
        train_until(step, out, data, monkeypatch, **settings)
    assert train(out, data, **settings) == 0
    assert validations(out) == validations(whole)
    assert (out / "rwkv-best.pth").exists()


def test_a_measurement_that_is_no_number_is_never_the_best(tmp_path, data, held, monkeypatch, capfd):
    """Neither in the run that measured it nor in the one that goes on."""
    out = tmp_path / "run"
    settings = {"val_data_file": held, "val_every": "10steps", **RUN}
    measured_losses = iter([(math.nan, 1), (3.0, 1), (math.nan, 1), (2.0, 1), (math.nan, 1), (2.5, 1)])
    monkeypatch.setattr(validation, "mean_loss", lambda *_: next(measured_losses))
    train_until(21, out, data, monkeypatch, **settings)
    assert train(out, data, **settings) == 0
    assert "lowest 2.0000 after step 40" in capfd.readouterr().out
    best = torch.load(out / "rwkv-best.pth")
    assert not all(torch.equal(best[name], tensor) for name, tensor in torch.load(out / "rwkv-final.pth").items())
    assert read_curves(out).val_loss.tolist() == [3.0, 2.0, 2.5]


@pytest.mark.parametrize("between", [False, True], ids=["at once", "after a start without"])
def test_an_earlier_best_is_not_overwritten_by_worse_weights(tmp_path, data, held, monkeypatch, between):
    """Continued at a learning rate that makes everything worse."""
    out = tmp_path / "run"
    settings = {"val_data_file": held, "val_windows": WINDOWS, "val_every": "10steps", **RUN}
    train_until(41, out, data, monkeypatch, **settings)
    best = (out / "rwkv-best.pth").read_bytes()
    if between:
        ruinous = {**settings, "lr_init": 1.0, "lr_final": 1.0, "val_data_file": ""}
        train_until(45, out, data, monkeypatch, **ruinous)
    assert train(out, data, **{**settings, "lr_init": 1.0, "lr_final": 1.0}) == 0
    assert validations(out)["loss"][-1] > min(validations(out)["loss"])
    assert (out / "rwkv-best.pth").read_bytes() == best


def test_the_best_before_a_step_includes_that_of_the_step(tmp_path):
    """The continued step was measured before its state was saved."""
    (tmp_path / "val.csv").write_text("steps,tokens,loss,counted\n5,1,,9\n10,1,2.5,9\n20,2,1.5,9\n30,3,0.5,9\n")
    assert [validation.best_loss_before(tmp_path, step) for step in (9, 10, 19, 20)] == [math.inf, 2.5, 2.5, 1.5]


def test_nothing_is_measured_once_a_stop_is_agreed(tmp_path, data, held, whole, monkeypatch):
    """The next start makes up for it."""
    out = tmp_path / "run"
    settings = {"val_data_file": held, "val_windows": WINDOWS, "val_every": "10steps", **RUN}
    original = TrainingModule.training_step

    def step(self, batch, batch_idx):
        if batch_idx == 19:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingModule, "training_step", step)
        measured, evaluate = [], TrainingModule.validation_step
        patch.setattr(TrainingModule, "validation_step", lambda *args: measured.append(1) or evaluate(*args))
        assert train(out, data, **settings) == 128 + signal.SIGTERM
    assert len(measured) == 3  # 11 windows in micro batches of 4, after step 10; no batch of another after step 20
    assert validations(out)["steps"] == [10]
    train_until(25, out, data, monkeypatch, **settings)
    assert validations(out)["loss"] == validations(whole)["loss"][:2]


def test_other_held_out_data_begins_its_own_best(tmp_path, data, held, monkeypatch, capfd):
    out = tmp_path / "run"
    settings = {"val_windows": WINDOWS, "val_every": "10steps", **RUN}
    train_until(41, out, data, monkeypatch, val_data_file=held, **settings)
    earlier, best = (out / "val.csv").read_text(), (out / "rwkv-best.pth").read_bytes()
    assert train(out, data, val_data_file=data, **{**settings, "lr_init": 1.0, "lr_final": 1.0}) == 0
    output = capfd.readouterr().out
    assert "after step 40, the lowest so far" in output
    assert "WARNING: --val_data_file is the training data itself" in output
    assert (
        f"--val_data_file {held} are archived as {out}/val-1.csv, the best weights by them {out}/rwkv-best-1.pth"
        in output
    )
    assert (out / "val-1.csv").read_text() == earlier
    assert (out / "rwkv-best-1.pth").read_bytes() == best
    assert validations(out)["steps"] == [40, 50, 60]  # of one file only
    assert train(out, data, restart=1, val_data_file=held, **settings) == 0
    assert (out / "previous-1" / "val-1.csv").read_text() == earlier
    assert (out / "previous-1" / "rwkv-best-1.pth").read_bytes() == best


@pytest.mark.parametrize("changed", [{}, {"val_data_file": ""}], ids=["the same", "without"])
def test_the_same_held_out_data_keeps_its_rows(tmp_path, data, held, whole, monkeypatch, changed):
    """A start in between that measures nothing changes nothing about them either."""
    out = tmp_path / "run"
    settings = {"val_data_file": held, "val_windows": WINDOWS, "val_every": "10steps", **RUN}
    train_until(35, out, data, monkeypatch, **settings)
    train_until(45, out, data, monkeypatch, **{**settings, **changed})
    assert train(out, data, **settings) == 0
    assert not (out / "val-1.csv").exists()
    rows, expected = validations(out), validations(whole)
    assert set(zip(rows["steps"], rows["loss"], strict=True)) <= set(
        zip(expected["steps"], expected["loss"], strict=True)
    )
    assert rows["steps"][-1] == 60


# ---- stopped in the middle of it -------------------------------------------------------------------------------------


def interrupted(monkeypatch, number, act):
    """`act` is called once, after the second batch of validation `number` (from 0)."""
    original, seen = TrainingModule.validation_step, []

    def step(self, batch, batch_idx):
        seen.append(0)
        if len(seen) == number * 3 + 2:  # 11 windows in micro batches of 4
            act()
        return original(self, batch, batch_idx)

    monkeypatch.setattr(TrainingModule, "validation_step", step)
    return seen


def test_a_signal_stops_a_validation_between_batches(tmp_path, data, held, whole, monkeypatch):
    out = tmp_path / "run"
    settings = {"val_data_file": held, "val_windows": WINDOWS, "val_every": "10steps", **RUN}
    with monkeypatch.context() as patch:
        seen = interrupted(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(out, data, **settings) == 128 + signal.SIGTERM
    assert len(seen) == 2 * 3 + 2
    assert validations(out)["steps"] == [10, 20]  # nothing of the half one
    assert len(losses(out)) == 30  # and no further step
    assert train(out, data, **settings) == 0
    assert validations(out) == validations(whole)
    assert losses(out) == losses(whole)


def test_a_signal_in_the_last_validation(tmp_path, data, held, monkeypatch, capfd):
    out = tmp_path / "run"
    settings = {"val_data_file": held, "val_windows": WINDOWS, "val_every": "10steps", **RUN}
    with monkeypatch.context() as patch:
        interrupted(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(out, data, **settings) == 0
    assert (out / "rwkv-final.pth").exists()
    assert "after step 50 (stopped before the last measurement)" in capfd.readouterr().out


def test_the_time_limit_keeps_the_time_of_a_validation(tmp_path, data, held, monkeypatch, capfd):
    """The second one would take as long as the first, and end too late: the run stops before it, and measures when it
    goes on."""
    out = tmp_path / "run"
    settings = {"val_data_file": held, "val_windows": WINDOWS, "val_every": "10steps", **RUN}
    with monkeypatch.context() as patch:
        passed = []  # hours
        clock = SimpleNamespace(monotonic=lambda: time.monotonic() + 3600 * len(passed))
        patch.setattr(control, "time", clock)
        patch.setattr(validation, "time", clock)
        seen = interrupted(patch, 0, lambda: passed.append(1))
        assert train(out, data, time_limit=90, **settings) == 124
    assert "--time_limit" in capfd.readouterr().out
    assert len(seen) == 3
    assert validations(out)["steps"] == [10]
    assert 18 <= len(losses(out)) <= 20


def test_curves_have_it(whole):
    curves = read_curves(whole)
    assert curves.val_tokens.tolist() == [steps * CTX * 4 for steps in range(10, 70, 10)]
    assert np.isfinite(curves.seconds_at(curves.val_tokens)).all()


# ---- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param("ddp", marks=pytest.mark.slow),
        pytest.param("deepspeed_stage_2", marks=pytest.mark.slow),
        "deepspeed_stage_3",
    ],
)
def test_two_processes_find_what_one_finds(tmp_path, data, held, strategy):
    if strategy.startswith("deepspeed") and not zero.is_usable():
        pytest.skip(f"{zero.REQUIREMENT} is not installed")
    out = tmp_path / "run"
    short = {**RUN, "my_exit_tokens": CTX * 4 * 20, "lr_init": 3e-3, "lr_final": 3e-4}
    argv = flags(
        out,
        data,
        val_data_file=held,
        val_windows=WINDOWS,
        val_every="10steps",
        micro_bsz=2,
        devices=2,
        strategy=strategy,
        load_model=_weights(tmp_path, data),
        **short,
    )
    done = warm_process.run(
        [sys.executable, "train.py", *argv], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        capture_output=True, timeout=200, ranks=True, preexec_fn=without_figures,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("held-out loss") == 4, done.stdout  # before, twice on the way, at the end: one voice
    again = tmp_path / "again"
    assert (
        train(
            again,
            data,
            val_data_file=held,
            val_windows=WINDOWS,
            val_every="10steps",
            load_model=_weights(tmp_path, data),
            **short,
        )
        == 0
    )
    one, two = validations(again), validations(out)
    assert one["steps"] == two["steps"] == [0, 10, 20]
    assert one["counted"] == two["counted"]
    assert two["loss"][0] == pytest.approx(one["loss"][0], abs=1e-6)
    assert two["loss"] == pytest.approx(one["loss"], abs=2e-4)
    measured = [read_columns(path / "metrics.csv") for path in (again, out)]
    for name in ("update_w0", "update_matrices", "update_others", "largest_logit"):
        # the largest logit is looked for in the first rows of each process's micro batch: here that is all of them
        assert measured[1][name][0] == pytest.approx(measured[0][name][0], rel=1e-3), name


def _weights(tmp_path, data):
    """Initial weights that all these runs start from."""
    path = tmp_path / "initial.pth"
    if not path.exists():
        torch.manual_seed(3)
        torch.save(RWKV7(parse(flags("unused", data))[0].model_config(VOCAB)).state_dict(), path)
    return path


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_the_validation_of_both(tmp_path, data, held):
    """What happens in a process of its own: the second sends itself a signal in its second validation, at its second
    batch."""
    out = tmp_path / "run"
    program = tmp_path / "train_and_signal.py"
    program.write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from src.training.module import TrainingModule\n"
        "original, seen = TrainingModule.validation_step, []\n"
        "def step(self, batch, batch_idx):\n"
        "    seen.append(0)\n"
        "    if self.trainer.global_rank == 1 and len(seen) == 6 + 2:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return original(self, batch, batch_idx)\n"
        "TrainingModule.validation_step = step\n"
        "import train\n"
        "sys.exit(train.main())\n"
    )
    argv = flags(
        out,
        data,
        val_data_file=held,
        val_windows=WINDOWS,
        val_every="10steps",
        micro_bsz=1,
        accumulate_grad_batches=2,
        devices=2,
        **RUN,
    )
    done = subprocess.run(
        [sys.executable, str(program), *argv], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        capture_output=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 128 + signal.SIGTERM, done.stdout[-3000:] + done.stderr[-3000:]
    assert "same command continues" in done.stdout
    assert validations(out)["steps"] == [10]
    assert len(losses(out)) == 20
