"""Runs of train.py: from nothing to weights, cut and continued, wrong input refused. Real files, real fits, tiny
sizes."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from chat_models import make_tokenizer
from training_runs import CTX, ROOT, VOCAB, flags, log_lines, losses, metrics, train, train_process

from src import run_folder
from src.dataset.binidx import MMapIndexedDataset
from src.dataset.pretrain import PretrainDataset
from src.dataset.sample_order import magic_prime
from src.files import file_lock
from src.model import RWKV7
from src.ops.loss import cross_entropy_l2wrap


def test_end_to_end_then_complete(tmp_path, data):
    out = tmp_path / "run"
    init = train_process(flags(out, data, train_stage=1))
    output, _ = init.communicate(timeout=120)
    assert init.returncode == 0, output
    assert torch.load(out / "rwkv-init.pth")["emb.weight"].dtype == torch.bfloat16
    trained = subprocess.run(  # as a user starts it
        [sys.executable, "train.py", *flags(out, data, train_stage=3, load_model="0")],
        cwd=ROOT, text=True, capture_output=True, timeout=120,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stdout + trained.stderr
    saved = sorted(path.name for path in out.glob("*.pth"))
    assert saved == ["rwkv-0.pth", "rwkv-2.pth", "rwkv-3.pth", "rwkv-final.pth", "rwkv-init.pth"]
    assert (out / "loss.png").stat().st_size > 10_000
    lines = log_lines(out)
    assert [int(line[0]) for line in lines] == [0, 1, 2, 3]
    for n, line in enumerate(lines):
        mean = np.mean(losses(out)[10 * n : 10 * n + 10])
        assert float(line[1]) == pytest.approx(mean, abs=2e-6)
        assert float(line[2]) == pytest.approx(np.exp(mean), rel=1e-3)
        assert re.fullmatch(r"0\.\d{8}", line[3])
        assert line[6] == str(n)
    assert "NEW RUN" in (out / "train_log.txt").read_text()
    assert float(lines[-1][1]) < float(lines[0][1]) - 0.5  # it learns

    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert train(out, data, train_stage=3) == 0
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_weights_alone_continue_at_the_right_place(tmp_path, data, capfd):
    """Without the full state (an old folder, or only the .pth files copied) the newest rwkv-N.pth is taken."""
    whole = {"my_exit_tokens": CTX * 4 * 100, "epoch_steps": 20, "epoch_save": 2}
    out = tmp_path / "run"
    assert train(out, data, **whole) == 0
    for name in ("rwkv-3.pth", "rwkv-4.pth", "rwkv-final.pth"):  # 3 is the last whole one of a pass
        (out / name).unlink()
    shutil.rmtree(out / "resume")
    start = 3 * 20
    weights = RWKV7.from_checkpoint(out / "rwkv-2.pth")
    before = losses(out)

    assert train(out, data, **whole) == 0
    assert f"rwkv-2.pth, at step {start}" in capfd.readouterr().out
    assert [int(row["step"]) for row in metrics(out)] == list(range(100))
    assert [int(line[0]) for line in log_lines(out)] == list(range(5))
    assert losses(out)[: start + 1] == before[: start + 1]
    # the first loss after the restart is that of the saved weights on exactly the samples of that step
    prime = magic_prime(MMapIndexedDataset(data).n_tokens, CTX)
    dataset = PretrainDataset(data, CTX, prime, start * 4, 4, 4, 0, 1, VOCAB)
    tokens, targets = (torch.stack(parts) for parts in zip(*(dataset[j] for j in range(4)), strict=True))
    with torch.no_grad():
        expected = cross_entropy_l2wrap(weights(tokens)[0], targets).item()
    assert losses(out)[start] == pytest.approx(expected, abs=1e-5)
    rates = [float(row["lr"]) for row in metrics(out)]
    assert rates[start] == pytest.approx(0.01 * rates[start - 1], rel=0.1)  # renewed warm-up
    assert rates[start + 10] < rates[start - 1]  # the cosine went on


def test_one_seed_gives_equal_losses(tmp_path, data):
    for name in ("one", "two"):
        assert train(tmp_path / name, data) == 0
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    assert train(tmp_path / "other", data, random_seed=8) == 0
    assert losses(tmp_path / "one") != losses(tmp_path / "other")


@pytest.mark.parametrize(
    "changed",
    [
        {"grad_cp": 1},
        {"head_chunk": 24},
        {"micro_bsz": 2, "accumulate_grad_batches": 2},
        {"kernel": "reference"},
        {"strategy": "deepspeed_stage_2"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_settings_that_change_no_mathematics(tmp_path, data, changed):
    short = {"my_exit_tokens": CTX * 4 * 12}
    assert train(tmp_path / "plain", data, **short) == 0
    assert train(tmp_path / "changed", data, **short, **changed) == 0
    assert losses(tmp_path / "changed") == pytest.approx(losses(tmp_path / "plain"), abs=2e-4)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("tf32", torch.float32)]
)
def test_precisions(tmp_path, data, precision, dtype):
    assert train(tmp_path / "run", data, precision=precision) == 0
    assert torch.load(tmp_path / "run" / "rwkv-final.pth")["blocks.0.att.key.weight"].dtype == dtype
    values = losses(tmp_path / "run")
    assert values[-1] < values[0] - 0.3


def test_weight_swap_begins_a_new_run_and_keeps_the_old_one(tmp_path, data):
    out = tmp_path / "run"
    train(out, data, train_stage=1)
    assert train(out, data, train_stage=3) == 0
    earlier = losses(out)
    (out / "rwkv-final.pth").rename(out / "rwkv-init.pth")
    assert train(out, data, train_stage=3) == 0
    assert (out / "previous-1" / "rwkv-3.pth").exists()
    assert losses(out / "previous-1") == earlier
    assert losses(out)[0] < earlier[0] - 0.5  # it began from trained weights, at step 0
    assert len(losses(out)) == len(earlier)
    assert train(out, data, train_stage=3) == 0  # complete, nothing moved
    assert not (out / "previous-2").exists()


def test_a_complete_folder_answers_for_its_own_run_only(tmp_path, data, capfd):
    out = tmp_path / "run"
    assert train(out, data) == 0
    assert train(out, data) == 0
    assert "is complete" in capfd.readouterr().out
    assert train(out, data, n_layer=3) == 2
    assert "--n_layer 3: was 2" in capfd.readouterr().err


def test_a_tokenizer_that_is_not_there_is_found_before_training(tmp_path, data, capfd):
    """Also where --vocab_size makes it unnecessary for building the model."""
    assert train(tmp_path / "run", data, tokenizer="nothere") == 2
    assert "--tokenizer nothere" in capfd.readouterr().err
    assert not (tmp_path / "run" / "metrics.csv").exists()


def test_a_run_may_name_its_own_copy_of_the_tokenizer(tmp_path, data):
    folder, out = make_tokenizer(tmp_path / "tokenizer", None), tmp_path / "run"
    settings = {"vocab_size": 0, "my_exit_tokens": CTX * 4 * 2}
    assert train(out, data, tokenizer=folder, **settings) == 0
    copied = (out / "tokenizer" / "tokenizer.json").read_bytes()
    assert train(out, data, tokenizer=out / "tokenizer", restart=1, **settings) == 0
    for kept in (out, out / "previous-1"):
        assert (kept / "tokenizer" / "tokenizer.json").read_bytes() == copied


def test_a_move_of_an_earlier_run_that_was_cut_is_finished_by_the_next_start(tmp_path, data, monkeypatch):
    out = tmp_path / "run"
    assert train(out, data) == 0
    names = {path.name for path in out.iterdir() if path.name != ".lock"}
    rename = Path.rename

    def cut(self, target):
        if self.name == "resume":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", cut)
        with pytest.raises(KeyboardInterrupt):
            run_folder.archive_run(out)
    assert run_folder.read_run(out), "whose folder it is must be known until everything is moved"
    run_folder.archive_run(out)
    assert not run_folder.read_run(out)
    moved = {path.name for k in (1, 2) for path in (out / f"previous-{k}").iterdir()}
    assert moved == names
    assert "rwkv-init.pth" in names  # the run wrote it itself


def test_starting_over_after_removing_the_weights_asks_for_restart(tmp_path, data, capfd):
    out = tmp_path / "run"
    train(out, data, train_stage=1)
    assert train(out, data, train_stage=3) == 0
    first = losses(out)
    for path in out.glob("rwkv-*.pth"):
        if path.name != "rwkv-init.pth":
            path.unlink()
    assert train(out, data, train_stage=3) == 2
    assert "--restart 1" in capfd.readouterr().err
    assert train(out, data, train_stage=3, restart=1) == 0
    assert losses(out) == first
    assert (out / "previous-1" / "resume").is_dir()


def test_load_model_in_stage_0_and_partial(tmp_path, data):
    assert train(tmp_path / "base", data) == 0
    base = tmp_path / "base" / "rwkv-final.pth"
    assert train(tmp_path / "tuned", data, load_model=base) == 0
    assert losses(tmp_path / "tuned")[0] < losses(tmp_path / "base")[0] - 0.5
    weights = torch.load(base)
    del weights["blocks.1.ffn.x_k"]
    torch.save(weights, tmp_path / "part.pth")
    assert train(tmp_path / "part", data, load_model=tmp_path / "part.pth") == 2
    assert train(tmp_path / "part", data, load_model=tmp_path / "part.pth", load_partial=1) == 0


def test_stage_1_never_overwrites(tmp_path, data):
    assert train(tmp_path, data, train_stage=1) == 0
    before = (tmp_path / "rwkv-init.pth").read_bytes()
    assert train(tmp_path, data, train_stage=1, random_seed=99) == 0
    assert (tmp_path / "rwkv-init.pth").read_bytes() == before
    assert train(tmp_path, data, train_stage=1, n_layer=3) == 2


def test_vocabulary_and_length_are_worked_out(tmp_path, data):
    assert train(tmp_path, data, vocab_size=0, my_exit_tokens=0, epoch_steps=0) == 0
    remembered = json.loads((tmp_path / "run.json").read_text())["settings"]
    assert remembered["vocab_size"] == 58  # ids run from 0 to 57
    assert remembered["my_exit_tokens"] == 6000
    assert [int(line[0]) for line in log_lines(tmp_path)] == [0]  # one partial mini-epoch


WRONG = {
    "data missing": ({"data_file": "nowhere/data"}, "nowhere/data"),
    "ids beyond the vocabulary": ({"vocab_size": 20}, "--vocab_size"),
    "data shorter than a window": ({"ctx_len": 8000}, "8000"),
    "composite prime": ({"magic_prime": 374}, "371|367|365|359|353"),
    "a kernel that a CPU lacks": ({"kernel": "chunked"}, "kernel 'chunked'"),
    "nothing to continue": ({"train_stage": 3}, "--train_stage"),
    "weights missing": ({"load_model": "no.pth"}, "no.pth"),
    "no GPU": ({"accelerator": "gpu"}, "--accelerator"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_gets_one_message_and_code_2(tmp_path, data, capfd, name):
    changed, output = WRONG[name]
    if name == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert train(tmp_path / "run", data, **changed) == 2
    captured = capfd.readouterr()
    assert re.search(output, captured.err)
    assert "Traceback" not in captured.err
    assert not list((tmp_path / "run").glob("rwkv-*"))


def test_foreign_weights_name_the_sizes_that_fit(tmp_path, data, capfd):
    assert train(tmp_path / "base", data, my_exit_tokens=64) == 0
    final = tmp_path / "base" / "rwkv-final.pth"
    assert train(tmp_path / "run", data, load_model=final, n_layer=3) == 2
    output = capfd.readouterr().err
    assert "blocks.2" in output
    assert "--n_layer 2 --n_embd 32 --vocab_size 64" in output


def test_folder_without_permission(tmp_path, data, capfd):
    (tmp_path / "file").write_text("")
    assert train(tmp_path / "file" / "run", data) == 2
    assert "--proj_dir" in capfd.readouterr().err


def test_a_second_run_in_the_same_folder_is_refused(tmp_path, data, capfd):
    with file_lock(tmp_path / ".lock", wait=False):
        assert train(tmp_path, data) == 2
    assert "another run" in capfd.readouterr().err
    assert not (tmp_path / "train_log.txt").exists()


def test_a_runs_own_best_weights_do_not_put_it_aside(tmp_path, data, capfd):
    """Nor does a name that was mistyped beside --restart train the old run on."""
    out = tmp_path / "run"
    assert train(out, data, val_data_file=data, val_windows=4) == 0
    assert train(out, data, load_model=out / "rwkv-best.pth") == 2
    assert "belongs to the run" in capfd.readouterr().err
    assert train(out, data, restart=1, load_model=tmp_path / "typo.pth") == 2
    assert "typo.pth: no such file" in capfd.readouterr().err
    assert train(out, data, restart=1, val_data_file=tmp_path / "typo") == 2
    assert "typo" in capfd.readouterr().err
    assert not (out / "previous-1").exists()
