"""What train_temp, the official trainer, does as well: which rwkv-N.pth and rwkv-init.pth there are, and an unreadable
rwkv-N.pth."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from training_runs import CTX, Killed, log_lines, losses, metrics, train, train_until

from src.config import RunConfig
from src.errors import UserError
from src.files import sha256_of
from src.run_folder import has_drawn_init, read_run, replace_drawn_init
from src.training.checkpoint.callbacks import SaveWeights
from src.training.checkpoint.resume import find_resume_point, peek_resume_point
from src.training.schedule import RunLength

STEPS = 60
RUN = {"my_exit_tokens": CTX * 4 * STEPS, "epoch_steps": 20, "epoch_save": 1}


def weights_files(folder):
    return {path.name for path in folder.glob("rwkv-*.pth")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """The run that nothing happens to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(out, data, **RUN) == 0
    return out


# ---- the last whole mini-epoch of a pass -----------------------------------------------------------------------------


@pytest.mark.parametrize("global_batch", [16, 48, 1000])
def test_minipile_has_rwkv_71_beside_rwkv_70(global_batch):
    length = RunLength.of(1_498_226_207, 512, global_batch)
    weights = SaveWeights(None, length, 5, Path("run"), non_finite=None, prime=2_926_181)
    ends = {length.step_after(n) - 1 for n in range(73)}
    saved = [length.mini_epoch(step) for step in sorted(ends) if weights.saves_at(step)]
    assert saved == [*range(0, 71, 5), 71, 72]
    assert not any(weights.saves_at(end - 1) for end in ends)


def test_conversations_have_no_pass_of_a_prime():
    length = RunLength.of(100 * CTX, CTX, 4, epoch_steps=5)
    weights = SaveWeights(None, length, 2, Path("run"), non_finite=None, prime=0)
    assert [length.mini_epoch(step) for step in range(length.steps) if weights.saves_at(step)] == [0, 2, 4]


def test_a_run_writes_and_announces_the_last_whole_mini_epoch(tmp_path, data, capfd):
    """The prime of 6,000 tokens is 359: of mini-epochs of 40 samples, number 7 is the last whole one of a pass, and
    number 9, with which the run ends, is partial."""
    settings = {"my_exit_tokens": 6000, "epoch_steps": 10, "epoch_save": 5}
    out = tmp_path / "run"
    train(out, data, check=1, **settings)
    assert "6 weights files" in capfd.readouterr().out
    assert train(out, data, **settings) == 0
    names = ("init", "0", "5", "7", "9", "final")
    assert weights_files(out) == {f"rwkv-{name}.pth" for name in names}
    assert (out / "resume" / "step-00000080").is_dir()  # the full state of rwkv-7.pth


# ---- an unreadable rwkv-N.pth ----------------------------------------------------------------------------------------

DAMAGES = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "emptied": lambda file: file.write_bytes(b""),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),  # after a power failure
    "other bytes": lambda file: file.write_bytes(file.read_bytes().replace(b"blocks", b"\xff" * 6)),
}


def without_states(run, folder):
    """A copy of a run in which rwkv-N.pth are all that is left to continue from."""
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "resume")
    (folder / "rwkv-final.pth").unlink()
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_one_before_an_unreadable_file_is_taken(tmp_path, data, whole, capfd, damage):
    out = without_states(whole, tmp_path / "run")
    DAMAGES[damage](out / "rwkv-2.pth")
    content = (out / "rwkv-2.pth").read_bytes()
    capfd.readouterr()
    assert train(out, data, **RUN) == 0
    output = capfd.readouterr().out
    assert f"WARNING: {out / 'rwkv-2.pth'} is damaged" in output
    assert "renamed to damaged-rwkv-2.pth" in output
    assert "rwkv-1.pth, at step 40" in output
    assert (out / "damaged-rwkv-2.pth").read_bytes() == content
    assert [int(row["step"]) for row in metrics(out)] == list(range(STEPS))
    assert [line[0] for line in log_lines(out)] == ["0", "1", "2"]
    assert losses(out)[:41] == losses(whole)[:41]
    assert torch.load(out / "rwkv-2.pth")  # written anew


def test_without_a_readable_file_the_initial_weights_are_taken(tmp_path, data, whole, capfd):
    out = without_states(whole, tmp_path / "run")
    for n in range(3):
        (out / f"rwkv-{n}.pth").write_bytes(b"")
    length = RunLength.of(RUN["my_exit_tokens"], CTX, 4, RUN["epoch_steps"])
    config = RunConfig(proj_dir=str(out), train_stage=3)
    before = weights_files(out)
    assert peek_resume_point(config, out, length).weights == out / "rwkv-init.pth"
    assert weights_files(out) == before  # a peek moves nothing
    assert "would be used" in capfd.readouterr().out
    assert train(out, data, train_stage=3, **RUN) == 0
    assert losses(out) == losses(whole)


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {}, "epoch": 3}], ids=["list", "checkpoint"])
def test_a_file_that_is_whole_but_no_state_dict_is_refused(tmp_path, data, whole, capfd, content):
    """The user has put it there: to go on without it would hide the mistake."""
    out = without_states(whole, tmp_path / "run")
    torch.save(content, out / "rwkv-2.pth")
    assert train(out, data, **RUN) == 2
    assert "rwkv-2.pth" in capfd.readouterr().err
    assert (out / "rwkv-2.pth").exists()


@pytest.mark.parametrize(
    ("content", "advice"),
    [(b"GGUF\x03\0\0\0", "cut short"), (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull")],
    ids=["gguf", "lfs"],
)
def test_a_file_of_another_program_is_refused(tmp_path, data, whole, capfd, content, advice):
    out = without_states(whole, tmp_path / "run")
    (out / "rwkv-2.pth").write_bytes(content)
    assert train(out, data, **RUN) == 2
    assert advice in capfd.readouterr().err
    assert (out / "rwkv-2.pth").read_bytes() == content


def test_a_link_to_a_missing_file_stays(tmp_path, whole):
    """To a disk that isn't mounted, for example."""
    out = without_states(whole, tmp_path / "run")
    (out / "rwkv-2.pth").unlink()
    (out / "rwkv-2.pth").symlink_to(tmp_path / "disk" / "rwkv-2.pth")
    length = RunLength.of(RUN["my_exit_tokens"], CTX, 4, RUN["epoch_steps"])
    assert find_resume_point(RunConfig(proj_dir=str(out)), out, length).weights == out / "rwkv-2.pth"
    assert (out / "rwkv-2.pth").is_symlink()


def test_with_a_full_state_the_weights_are_not_read(tmp_path, data, whole):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "rwkv-final.pth").unlink()
    (out / "rwkv-2.pth").write_bytes(b"")
    assert train(out, data, **RUN) == 0
    assert not list(out.glob("damaged-*"))


def test_damaged_files_move_with_their_run(tmp_path, data, whole):
    out = without_states(whole, tmp_path / "run")
    (out / "rwkv-2.pth").write_bytes(b"")
    assert train(out, data, **RUN) == 0
    assert train(out, data, restart=1, **RUN) == 0
    assert (out / "previous-1" / "damaged-rwkv-2.pth").exists()
    assert not list(out.glob("damaged-*"))


# ---- rwkv-init.pth of stage 0 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_the_initial_weights_are_those_that_training_begins_with(tmp_path, data, precision, dtype):
    # fp16: the first steps are skipped, until the loss scale fits
    short = {"my_exit_tokens": CTX * 4 * (24 if precision == "fp16" else 6), "precision": precision}
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(one, data, **short) == 0
    weights = torch.load(one / "rwkv-init.pth")
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    two.mkdir()
    shutil.copy(one / "rwkv-init.pth", two)
    assert train(two, data, train_stage=3, random_seed=8, **short) == 0
    assert losses(two) == losses(one)
    final, expected = (torch.load(out / "rwkv-final.pth") for out in (two, one))
    assert all(torch.equal(final[name], expected[name]) for name in expected)


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("killed_at", [5, 25])
def test_the_run_remains_the_same_run(tmp_path, data, whole, monkeypatch, killed_at, stage):
    """Stages 2 and 3 read the rwkv-init.pth that stage 0 wrote, and stage 0 doesn't draw another run's."""
    out = tmp_path / "run"
    train_until(killed_at, out, data, monkeypatch, **RUN)
    assert train(out, data, train_stage=stage, **RUN) == 0
    assert not (out / "previous-1").exists()
    assert losses(out) == losses(whole)
    assert sha256_of(out / "rwkv-init.pth") == sha256_of(whole / "rwkv-init.pth")
    assert train(out, data, train_stage=3, **RUN) == 0  # complete
    assert not (out / "previous-1").exists()


def test_a_start_that_draws_anew_replaces_the_file(tmp_path, data, whole, monkeypatch):
    """The first was killed before its first save; the next has another seed, and the file is what it starts from."""
    out = tmp_path / "run"
    train_until(5, out, data, monkeypatch, **{**RUN, "random_seed": 3})
    assert sha256_of(out / "rwkv-init.pth") != sha256_of(whole / "rwkv-init.pth")
    assert train(out, data, **RUN) == 0
    assert sha256_of(out / "rwkv-init.pth") == sha256_of(whole / "rwkv-init.pth")
    assert losses(out) == losses(whole)
    assert read_run(out)["origin"]["seed"] == 7


def test_resumed_runs_do_not_touch_it(tmp_path, data, monkeypatch):
    out = tmp_path / "run"
    train_until(25, out, data, monkeypatch, **RUN)
    before = (out / "rwkv-init.pth").stat().st_mtime_ns
    assert train(out, data, **{**RUN, "random_seed": 3}) == 0
    assert (out / "rwkv-init.pth").stat().st_mtime_ns == before


@pytest.mark.parametrize("used", [False, True], ids=["new folder", "read by a killed start"])
def test_a_file_of_stage_1_is_never_replaced(tmp_path, data, monkeypatch, used):
    out = tmp_path / "run"
    assert train(out, data, train_stage=1, random_seed=99) == 0
    before = (out / "rwkv-init.pth").read_bytes()
    if used:
        train_until(5, out, data, monkeypatch, train_stage=3, **RUN)
    assert train(out, data, **RUN) == 0
    assert (out / "rwkv-init.pth").read_bytes() == before
    assert not has_drawn_init(out)


def test_weights_that_are_given_are_not_written(tmp_path, data, whole):
    out = tmp_path / "run"
    assert train(out, data, load_model=whole / "rwkv-final.pth", **RUN) == 0
    assert "rwkv-init.pth" not in weights_files(out)


def test_a_restart_archives_it_and_draws_another(tmp_path, data, whole):
    """Then stage 3 continues the new run: a file left from the old one would start a third."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    assert train(out, data, restart=1, **{**RUN, "random_seed": 3}) == 0
    assert sha256_of(out / "previous-1" / "rwkv-init.pth") == sha256_of(whole / "rwkv-init.pth")
    assert has_drawn_init(out)
    assert train(out, data, train_stage=3, **{**RUN, "random_seed": 3}) == 0
    assert not (out / "previous-2").exists()


def test_a_restart_of_stage_3_starts_from_it(tmp_path, data, whole):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    assert train(out, data, restart=1, train_stage=3, **RUN) == 0
    assert losses(out) == losses(whole)
    assert not (out / "previous-1" / "rwkv-init.pth").exists()


def test_another_model_archives_it(tmp_path, data, whole):
    """Its initial weights are given, so that the file of the run before would be wrong for stage 3."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    assert train(out, data, load_model=whole / "rwkv-final.pth", **RUN) == 0
    assert (out / "previous-1" / "rwkv-init.pth").exists()
    assert train(out, data, train_stage=3, **RUN) == 0  # complete
    assert not (out / "previous-2").exists()


def test_a_swapped_file_begins_a_new_run(tmp_path, data, whole):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "rwkv-final.pth").rename(out / "rwkv-init.pth")
    swapped = sha256_of(out / "rwkv-init.pth")
    assert train(out, data, train_stage=3, **RUN) == 0
    assert losses(out)[0] < losses(whole)[0] - 0.5
    assert sha256_of(out / "rwkv-init.pth") == swapped


@pytest.mark.parametrize("earlier", [False, True], ids=["first start", "drawn anew"])
def test_a_kill_while_it_is_written_leaves_no_file_without_a_record(tmp_path, monkeypatch, earlier):
    """Such a file would be taken for the user's: never replaced, and a swap to stage 3."""
    if earlier:
        replace_drawn_init(tmp_path, lambda path: path.write_bytes(b"earlier"))
        assert has_drawn_init(tmp_path)
    replace = os.replace

    def killed(source, target):
        if Path(target).name == "rwkv-init.pth":
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(Killed):
            replace_drawn_init(tmp_path, lambda path: path.write_bytes(b"new"))
    assert weights_files(tmp_path) == set()
    replace_drawn_init(tmp_path, lambda path: path.write_bytes(b"new"))
    assert (tmp_path / "rwkv-init.pth").read_bytes() == b"new"
    assert has_drawn_init(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "rwkv-init.pth"]


def test_a_damaged_run_json_is_archived_by_a_restart(tmp_path, data, whole):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "run.json").write_text("{")
    with pytest.raises(UserError):
        read_run(out)
    assert train(out, data, restart=1, **RUN) == 0
    assert (out / "previous-1" / "run.json").read_text() == "{"
    assert json.loads((out / "run.json").read_text())["settings"]["n_layer"] == 2
