"""What the agent of several ranks decides: which failure is the cause, who is told what, who is started again."""

import inspect
import json
import os
import signal
import subprocess
import sys

import pytest
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import PContext
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from training_runs import ROOT

from src.config import RunConfig
from src.errors import UserError
from src.run_folder import write_run
from src.training.distributed import launch, ranks
from src.training.distributed.failure import Cause, cause_of, record_failure, with_recorded
from src.training.distributed.ranks import is_supervised
from src.training.distributed.restarts import RestartPolicy, describe, may_restart
from src.training.run import _has_restarted


@pytest.fixture
def failure(tmp_path, monkeypatch):
    """Makes the failure of a rank: with an exit code, and an error file of some second or a death noticed in it."""

    def make(rank, code, second, message="", step=5, **how):
        path = tmp_path / f"{rank}.json"
        if message:
            monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
            how = {"code": how.pop("recorded", code), "step": step, "can_restart": True, "is_expected": True, **how}
            record_failure(ValueError(message), message, **how)
            os.utime(path, (second, second))
        failed = ProcessFailure(local_rank=rank, pid=100 + rank, exitcode=code, error_file=str(path))
        failed.timestamp = int(second)
        return failed

    return make


def test_the_first_exception_is_the_cause(failure):
    failures = {0: failure(0, 1, 50.3, "connection closed", step=7), 1: failure(1, 1, 50.1, "boom", step=6)}
    cause = cause_of(failures)
    assert (cause.rank, cause.message, cause.step, cause.can_restart, cause.traceback) == (1, "boom", 7, True, "")


def test_a_rank_that_was_killed_is_the_cause_and_not_those_that_notice(failure):
    failures = {0: failure(0, 1, 50.1, "connection closed"), 1: failure(1, -9, 50.6), 2: failure(2, -15, 51)}
    cause = cause_of(failures)
    assert (cause.rank, cause.exit_code, cause.step) == (1, -9, 5)
    assert cause.message == "was killed by signal 9 (SIGKILL)"


def test_a_rank_that_the_agent_killed_at_the_end_is_not_the_cause(failure):
    failures = {0: failure(0, 1, 50.1, "boom"), 1: failure(1, -9, 61), 2: failure(2, -15, 51)}
    assert cause_of(failures).message == "boom"


def test_a_rank_that_the_agent_ended_after_it_had_recorded_its_error_was_not_killed(failure):
    failures = {0: failure(0, -15, 50.4, "connection closed", recorded=1), 1: failure(1, 1, 50.1, "boom")}
    assert cause_of(failures).message == "boom"


def test_a_rank_that_has_recorded_an_error_and_not_ended_yet_is_the_cause(failure, tmp_path):
    noticed, first = failure(2, 1, 50.3, "connection closed"), failure(3, 1, 50.1, "boom")
    files = {0: noticed.error_file, 1: first.error_file, 2: str(tmp_path / "none")}
    cause = cause_of(with_recorded({2: noticed}, files, first_rank=2))
    assert (cause.rank, cause.message) == (3, "boom")


def test_a_rank_that_the_agent_ended_is_not_the_cause_though_its_time_has_no_fractions(failure):
    failures = {0: failure(0, -15, 50.9), 1: failure(1, 1, 50.7, "timed out")}
    assert cause_of(failures).message == "timed out"


def test_an_error_that_nobody_expected_keeps_its_traceback(failure):
    cause = cause_of({0: failure(0, 1, 50, "boom", is_expected=False, can_restart=False)})
    assert cause.traceback.endswith("ValueError: boom\n")
    assert not cause.can_restart


def test_a_mistake_keeps_its_exit_code_when_the_agent_ends_the_rank_before_it_has_left(failure):
    failures = {1: failure(1, 1, 50.4, "connection closed"), 0: failure(0, -15, 50.1, "--ctx_len 0", recorded=2)}
    cause = cause_of(failures)
    assert (cause.rank, cause.exit_code, cause.message) == (0, 2, "--ctx_len 0")


def test_a_mistake_that_all_ranks_find_is_rank_zeros(failure):
    failures = {0: failure(0, 2, 50.4, "--ctx_len 0"), 1: failure(1, 2, 50.1, "--ctx_len 0")}
    assert cause_of(failures).rank == 0
    failures = {0: failure(0, 1, 50.4, "connection closed"), 1: failure(1, 2, 50.1, "--data_file x: no such file")}
    assert cause_of(failures).rank == 1


def test_an_exit_code_without_an_error_file_is_told(failure):
    assert cause_of({3: failure(3, 7, 50)}).message == "ended with code 7"


@pytest.mark.parametrize(
    ("cause", "told"),
    [
        (
            Cause(1, -9, "was killed", step=4),
            "RANK: was killed; all processes start again, from WHERE; 2 more restarts (--",
        ),
        (Cause(1, 1, "boom", step=4), "RANK: boom; all processes start again"),
        (
            Cause(1, 1, "boom", step=7),
            "RANK: boom; the same error again in step 8, so the processes are not started again",
        ),
        (Cause(1, 1, "bad numbers", can_restart=False), "RANK: bad numbers"),
        (Cause(0, 2, "--ctx_len 0: expected more"), "--ctx_len 0: expected more"),
        (Cause(3, 2, "--data_file x: no such file"), "RANK: --data_file x: no such file"),
        (Cause(0, 124, "ended with code 124"), ""),
        (Cause(0, 143, "ended with code 143"), ""),
    ],
)
def test_what_may_end_in_another_way_is_tried_again(cause, told):
    before = Cause(1, 1, "boom", step=7)
    left = 2 if may_restart(cause, before) else -1
    assert (left == 2) == ("all processes start again" in told)
    line = describe(cause, before, "RANK", left, 3, "from WHERE")
    assert line.startswith(told) if left == 2 else line == told


def test_after_the_last_restart_the_run_ends_and_can_be_continued():
    line = describe(Cause(1, -9, "was killed"), None, "RANK", -1, 3, "")
    assert line == "RANK: was killed; the same command continues the run"


def test_a_stop_of_the_user_starts_no_rank_again_and_its_failures_are_told(capfd):
    policy = RestartPolicy(max_restarts=3, is_elastic=True, stop_signal=signal.SIGTERM)
    assert policy.restarts_left(Cause(0, 143, "ended with code 143"), 2, 3) == 0
    assert policy.restarts_left(Cause(0, -signal.SIGTERM, "was killed before it had begun"), 2, 3) == 0
    assert capfd.readouterr().err == ""
    assert policy.exit_code == 143
    assert policy.restarts_left(Cause(0, 1, "the state can't be written"), 2, 3) == 0
    assert "the state can't be written; the same command continues the run" in capfd.readouterr().err
    assert policy.exit_code == 1


def test_a_disk_that_stays_full_ends_the_run_unless_a_state_was_saved_in_between(capfd):
    newest = "from the state of step 8"
    policy = RestartPolicy(max_restarts=3, where_it_continues=lambda step: newest)
    full = [Cause(rank, 1, f".step-{n}.tmp: No space left", "", n, is_os_error=True) for rank, n in enumerate((9, 12))]
    assert policy.restarts_left(full[0], 2, 3) == 3
    assert policy.restarts_left(full[1], 2, 2) == 0
    told = "the same error again, and no state was saved since, so the processes are not started again"
    assert told in capfd.readouterr().err
    policy.restarts_left(full[0], 2, 3)
    newest = "from the state of step 12"
    assert policy.restarts_left(full[1], 2, 2) == 2


def test_a_machine_that_joins_or_leaves_costs_no_restart(capfd):
    policy = RestartPolicy(max_restarts=3, is_elastic=True)
    assert policy.restarts_left(Cause(0, 143, "ended with code 143"), 2, 3) == 4  # torch takes one of them
    assert "a machine joins or leaves" in capfd.readouterr().err
    policy = RestartPolicy(max_restarts=3)
    assert policy.restarts_left(Cause(0, 143, "ended with code 143"), 2, 3) == 0


def test_the_error_file_has_the_form_of_torch(failure, tmp_path):
    """torchrun shows it, too."""
    failed = failure(0, 1, 50, "boom")
    assert failed.message["message"] == "boom"
    assert set(failed.message["extraInfo"]) >= {"py_callstack", "timestamp"}
    assert json.loads((tmp_path / "0.json").read_text())["message"]["message"] == "boom"


def test_without_space_for_the_error_file_the_error_is_printed(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "no folder" / "error.json"))
    record_failure(ValueError("boom"), "boom", 1, step=1, can_restart=True, is_expected=True)
    assert "boom (" in capfd.readouterr().err


def test_only_the_attempts_of_a_command_after_the_first_leave_restart_out(monkeypatch, tmp_path):
    config = RunConfig(proj_dir=str(tmp_path), restart=True)
    monkeypatch.setenv("ROLE_NAME", "train.py")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "x")
    monkeypatch.setenv(ranks.LAUNCHED_AT, "12.5")
    write_run(tmp_path, {"launch": "12.5"})
    assert not _has_restarted(config)
    monkeypatch.setenv(ranks.RESTARTED, "1")
    assert _has_restarted(config)
    write_run(tmp_path, {"launch": "7.5"})  # of the run before: the first attempt failed before it was archived
    assert not _has_restarted(config)
    (tmp_path / "run.json").write_text("damaged")
    assert not _has_restarted(config)


def test_only_the_ranks_of_our_own_agent_leave_their_errors_to_it():
    assert is_supervised({"ROLE_NAME": "train.py", "TORCHELASTIC_ERROR_FILE": "x"})
    assert not is_supervised({"ROLE_NAME": "default", "TORCHELASTIC_ERROR_FILE": "x"})
    assert not is_supervised({})


def test_what_the_agent_overrides_is_what_torch_calls():
    """Hooks of torch's SimpleElasticAgent: another torch may have moved them."""
    for name in ("_restart_workers", "_monitor_workers"):
        assert name in vars(launch.Agent), name
        assert hasattr(LocalElasticAgent, name), f"this torch has no {name}: restarts would follow no rule of ours"
    assert list(inspect.signature(PContext.close).parameters) == ["self", "death_sig", "timeout"]  # ours as the default


def test_a_place_of_the_meeting_that_is_nowhere_is_told(monkeypatch):
    for name in (
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE",
        "TORCHELASTIC_SIGNALS_TO_HANDLE",
        ranks.LAUNCHED_AT,
        ranks.AGENT,
    ):
        monkeypatch.setenv(name, "removed at the end of the test")
    with pytest.raises(
        UserError, match=r"^--rdzv_endpoint nowhere.invalid:29500: nowhere.invalid can't be found from "
    ):
        launch.launch(1, RestartPolicy(), (2, 2), "nowhere.invalid:29500")


@pytest.mark.parametrize(("endpoint", "here"), [("127.0.0.1:1", "127.0.0.1"), ("[::1]:1", "::1")])
def test_the_machine_of_the_endpoint_is_known_by_that_name(endpoint, here):
    assert launch._address_here(endpoint) == here


def test_another_machine_is_known_by_its_address_towards_the_endpoint():
    try:
        address = launch._address_here("192.0.2.1:1")  # of no machine (RFC 5737); nothing is sent
    except UserError:
        pytest.skip("no network")
    assert address != "192.0.2.1"


def test_one_process_does_not_load_the_agent():
    program = "import sys, src.training.run; print([name for name in sys.modules if 'elastic.agent' in name])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
