"""Exceptions of rank 0 inside `broadcast_from_rank_zero` are raised on every rank, in two real processes."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import warm_process

from src.errors import UserError
from src.run_folder import RunLock
from src.training.distributed import watch
from src.training.run import _refuse_other_folder

ROOT = Path(__file__).parents[1]

BROADCASTS = """
import json, os, time
import torch
import torch.distributed as dist
from src.errors import UserError
from src.training.checkpoint.manifest import DamagedStateError
from tests.ranks import join_ranks


class TwoArguments(Exception):
    # pickled with its one text, so that unpickling fails
    def __init__(self, code, reason):
        super().__init__(f"{code}: {reason}")


def local_class():
    class Local(Exception):
        pass

    return Local("not importable")


ERRORS = {
    "user error": UserError("no such file", flag="load_model", given="x.pth", advice="name another"),
    "os error": OSError(28, "No space left on device", "run/file"),
    "damaged": DamagedStateError("state.json is missing"),
    "assertion": AssertionError("a defect"),
    "lambda": ValueError(lambda: None),
    "two arguments": TwoArguments(3, "unpickling fails"),
    "local class": local_class(),
}
group = join_ranks(2)
results = {"rank": group.rank, "seconds": {}, "errors": {}, "fields": {}}


def raise_on_rank_zero(error):
    assert group.rank == 0, "called on another rank"
    raise error


for name, error in ERRORS.items():
    began = time.monotonic()
    try:
        group.broadcast_from_rank_zero(lambda: raise_on_rank_zero(error))
    except Exception as raised:
        results["errors"][name] = [type(raised).__name__, str(raised)]
        results["fields"][name] = {key: str(value) for key, value in vars(raised).items()}
    results["seconds"][name] = time.monotonic() - began
for name, values in {"flags": {"lr_init": 0.1 + group.rank}, "code": {"the code": "ab"}}.items():
    try:
        group.refuse_other_values(values, flags=name == "flags")
    except UserError as raised:
        results["errors"][name] = [type(raised).__name__, str(raised)]
results["timeout"] = dist.new_group()._get_backend(torch.device("cpu")).options._timeout.total_seconds()
# the group is still in step
results["value"] = group.broadcast_from_rank_zero(lambda: {"from": group.rank})
group.shutdown()
os.write(1, (json.dumps(results) + "\\n").encode())
"""


@pytest.fixture(scope="module")
def ranks():
    """What each of two ranks caught, rank 0's first."""
    done = warm_process.run(
        [sys.executable, "-c", BROADCASTS],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=200, text=True, capture_output=True,
        ranks=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return sorted(map(json.loads, done.stdout.splitlines()), key=lambda results: results["rank"])


@pytest.mark.parametrize("name", ["user error", "os error", "damaged", "assertion"])
def test_an_exception_of_rank_zero_is_raised_on_every_rank(ranks, name):
    assert len(ranks) == 2
    assert ranks[0]["errors"][name] == ranks[1]["errors"][name]
    assert ranks[0]["fields"][name] == ranks[1]["fields"][name]


def test_the_fields_of_a_user_error_arrive_on_every_rank(ranks):
    for results in ranks:
        fields = results["fields"]["user error"]
        assert (fields["flag"], fields["given"], fields["advice"]) == ("load_model", "x.pth", "name another")


@pytest.mark.parametrize(
    ("name", "type_name"), [("lambda", "ValueError"), ("two arguments", "TwoArguments"), ("local class", "Local")]
)
def test_an_unpicklable_exception_arrives_as_its_type_and_text(ranks, name, type_name):
    original, received = (results["errors"][name] for results in ranks)
    assert original[0] == type_name
    assert received == ["RuntimeError", f"rank 0: {type_name}: {original[1]}"]


def test_a_rank_with_other_values_is_named_on_every_rank(ranks):
    first, second = (results["errors"]["flags"] for results in ranks)
    assert first == second
    assert first[1].startswith("--lr_init: rank 1 (")
    assert ") has 1.1, rank 0 0.1; start every process with the same flags" in first[1]
    assert "code" not in ranks[0]["errors"]  # equal values are no error


def test_groups_that_others_make_have_the_time_out_of_the_run(ranks):
    """DeepSpeed clones the group of all ranks without naming one."""
    assert [results["timeout"] for results in ranks] == [60, 60]


def test_no_rank_waits_for_a_timeout(ranks):
    """Well below the 60 s after which a collective fails."""
    assert all(seconds < 20 for results in ranks for seconds in results["seconds"].values())


def test_the_group_works_after_exceptions(ranks):
    assert [results["value"] for results in ranks] == [{"from": 0}, {"from": 0}]


BUCKETS = """
import json, os
import torch
from torch.nn.parallel import DistributedDataParallel
from src.training.distributed.ddp import fix_buckets
from tests.ranks import join_ranks

group = join_ranks(3)


def gradients(is_fixed):
    # of three steps on the same batch
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(37, 37) for _ in range(5)))
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    if is_fixed:
        fix_buckets(parallel)
    for _ in range(3):
        torch.manual_seed(7 + group.rank)
        model.zero_grad()
        parallel(torch.randn(9, 37)).sum().backward()
        yield torch.cat([parameter.grad.flatten().clone() for parameter in model.parameters()])


results = {}
for name in ("fixed", "as DDP orders them"):
    first, second, third = gradients(name == "fixed")
    results[name] = [torch.equal(first, second), torch.equal(second, third), bool(first.norm() > 1)]
group.shutdown()
if group.rank == 0:
    os.write(1, json.dumps(results).encode())
"""


def test_three_ranks_add_gradients_in_the_same_order_in_every_step():
    done = warm_process.run(
        [sys.executable, "-c", BUCKETS],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=200, text=True, capture_output=True,
        ranks=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(done.stdout)
    assert results["fixed"] == [True, True, True]
    assert results["as DDP orders them"] == [False, True, True]  # the first step after a start is another one


def test_a_standstill_is_told_after_a_minute_and_not_while_steps_end(monkeypatch):
    """Steps of a second, of which the sixth takes 75 s, as a validation does, until the eleventh, which hangs."""
    now, told, group = [0.0], [], SimpleNamespace(step=0)
    monkeypatch.setenv("RANK", "1")

    def sleep(seconds):
        now[0] += seconds
        if now[0] > 1000:
            raise StopIteration
        group.step = min(5, int(now[0])) if now[0] < 80 else min(10, int(now[0]) - 74)

    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    monkeypatch.setattr(watch, "log_error", lambda sentence: told.append((now[0], sentence)))
    with pytest.raises(StopIteration):
        watch.watch_steps(lambda: group.step, 600)
    assert [seconds for seconds, _ in told] == [pytest.approx(65, abs=2), pytest.approx(84 + 5 * 75, abs=8)]
    told = [sentence for _, sentence in told]
    assert told[0].startswith("rank 1: no step has ended for 60 s: a process starts, saves, validates or hangs.")
    assert "600 s" in told[0]


def test_a_start_that_stands_still_is_told_once(monkeypatch):
    """Steps of 70 s, the first after 100 s: told before the first ends, and again when the eighth hangs."""
    now, told = [0.0], []
    monkeypatch.setenv("RANK", "0")

    def sleep(seconds):
        now[0] += seconds
        if now[0] > 2000:
            raise StopIteration

    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    monkeypatch.setattr(watch, "log_error", lambda sentence: told.append((now[0], sentence)))
    with pytest.raises(StopIteration):
        watch.watch_steps(lambda: min(7, max(0, int((now[0] - 30) / 70))), 600)
    assert [seconds for seconds, _ in told] == [pytest.approx(60, abs=2), pytest.approx(520 + 5 * 70, abs=8)]
    assert "a process starts, saves, validates or hangs" in told[0][1]


LEAVE = """
import sys, time
from tests.ranks import join_ranks

group = join_ranks(2)
if group.rank == 0:
    time.sleep(2.5)  # draws its figures, while the other rank has left with the run's exit code
group.shutdown()
sys.exit(124)
"""


def test_a_rank_that_leaves_early_with_an_exit_code_has_not_crashed():
    """Rank 0 watches the processes that it started, and looks at them every second."""
    done = warm_process.run(
        [sys.executable, "-c", LEAVE],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=200, text=True, capture_output=True,
        ranks=True,
    )  # fmt: skip
    assert done.returncode == 124, done.stdout + done.stderr
    assert "rank 1" not in done.stderr


def test_a_machine_with_a_folder_of_its_own_is_refused(tmp_path):
    """Every rank writes into the folder of which rank 0 holds the lock."""
    for machine in ("one", "two"):
        (tmp_path / machine).mkdir()
    lock = RunLock(tmp_path / "one")
    lock.acquire()
    _refuse_other_folder(lock)
    with pytest.raises(UserError, match="shared by all machines"):
        _refuse_other_folder(RunLock(tmp_path / "two"))
    lock.release()
