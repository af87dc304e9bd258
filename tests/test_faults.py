"""The tools of tests/faults, and a few cases of each campaign; `python -m tests.faults.X` runs thousands of them."""

import os
import random
import shutil
import subprocess
import sys
import textwrap

import pytest
import warm_process
from training_runs import ROOT

from tests.faults import power, ranks, syscalls
from tests.faults.campaign import Outcome, run_cases
from tests.faults.disk import MODELS, Call, Disk, read_log, snapshot
from tests.faults.library import library
from tests.faults.rank_main import PHASES

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD, forks and /proc"),
    pytest.mark.skipif(shutil.which("cc") is None and shutil.which("gcc") is None, reason="no C compiler"),
]


# ---- the library -----------------------------------------------------------------------------------------------------

WRITER = """
import os
from pathlib import Path
from tests.faults.library import Fault

folder = Path("folder")
Fault(folder, Path("counts"), *{fault}, log=Path("log")).arm()
results = []
for name in ("a", "b", "c"):
    try:
        with open(folder / f"{{name}}.tmp", "wb", buffering=0) as file:
            results.append(file.write(b"0123456789"))
            os.fsync(file.fileno())
        os.rename(folder / f"{{name}}.tmp", folder / name)
    except OSError as error:
        results.append(error.errno)
os.unlink(folder / "a")
print(results)
"""


def write_three_files(tmp_path, *fault):
    """Exit code, output and the files afterwards of a program that writes three files by temporary names."""
    (tmp_path / "folder").mkdir()
    script = f"import sys; sys.path[:0] = [{str(ROOT)!r}]\n" + textwrap.dedent(WRITER.format(fault=fault))
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env={**os.environ, "LD_PRELOAD": str(library())},
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    files = {path.name: path.read_bytes() for path in (tmp_path / "folder").iterdir()}
    return done.returncode, done.stdout + done.stderr, files


WHOLE = b"0123456789"
FAULTS = [
    (("write", 0, "nothing", 0), 0, "[10, 10, 10]", {"b": WHOLE, "c": WHOLE}),
    (("write", 2, "kill before", 0), -9, "", {"a": WHOLE, "b.tmp": b""}),
    (("write", 2, "kill within", 0), -9, "", {"a": WHOLE, "b.tmp": WHOLE[:5]}),
    (("write", 2, "kill after", 0), -9, "", {"a": WHOLE, "b.tmp": WHOLE}),
    (("write", 2, "short", 0), 0, "[10, 5, 10]", {"b": WHOLE[:5], "c": WHOLE}),
    (("fsync", 2, "fail once", 5), 0, "[10, 10, 5, 10]", {"b.tmp": WHOLE, "c": WHOLE}),
    (("rename", 2, "fail for good", 28), 0, "[10, 10, 28, 10, 28]", {"b.tmp": WHOLE, "c.tmp": WHOLE}),
    (("rename", 1, "kill after", 0), -9, "", {"a": WHOLE}),
    (("unlink", 1, "kill before", 0), -9, "", {"a": WHOLE, "b": WHOLE, "c": WHOLE}),
]


@pytest.mark.parametrize(("fault", "code", "output", "files"), FAULTS, ids=lambda value: str(value)[:40])
def test_the_planned_call_suffers_the_fault(tmp_path, fault, code, output, files):
    assert write_three_files(tmp_path, *fault) == (code, output + "\n" * bool(output), files)


def test_the_log_rebuilds_the_folder(tmp_path):
    before = {"": ((tmp_path).stat().st_ino, None)}
    _, _, files = write_three_files(tmp_path)
    disk = Disk(before)
    for call in read_log(tmp_path / "log"):
        disk.replay(call)
    disk.root.sync()
    disk.write(tmp_path / "rebuilt", "dropped", random.Random(0))
    assert {path.name: path.read_bytes() for path in (tmp_path / "rebuilt").iterdir()} == files


# ---- models of a disk ------------------------------------------------------------------------------------------------

SAVE = [
    Call("open", "x.tmp", "", 2, 0, b""),
    Call("write", "x.tmp", "", 2, 0, b"new"),
    Call("fsync", "x.tmp", "", 2, 0, b""),
    Call("rename", "x.tmp", "x", 2, 0, b""),
    Call("fsync", "", "", 1, 0, b""),
]


def left(tmp_path, calls, model, seed=0):
    disk = Disk({"": (1, None), "x": (9, b"old")})
    for call in calls:
        disk.replay(call)
    target = tmp_path / f"{model}-{seed}"
    disk.write(target, model, random.Random(seed))
    return {name: content for name, (_, content) in snapshot(target).items() if name}


def test_what_was_synced_is_there_under_every_model(tmp_path):
    assert all(left(tmp_path, SAVE, model) == {"x": b"new"} for model in MODELS)


def test_without_fsync_of_the_folder_a_rename_may_be_lost(tmp_path):
    assert left(tmp_path, SAVE[:-1], "dropped") == {"x": b"old"}
    assert left(tmp_path, SAVE[:-1], "names first") == {"x": b"new"}


def test_without_fsync_of_the_file_its_new_name_may_have_no_content(tmp_path):
    careless = [call for call in SAVE if call.path != "x.tmp" or call.kind != "fsync"]
    assert left(tmp_path, careless, "names first") == {"x": bytes(3)}
    assert {left(tmp_path, careless, "torn", seed)["x"] for seed in range(20)} >= {b""}
    found = [left(tmp_path, careless[:-1], "reordered", seed) for seed in range(40)]
    assert {"x": b"old"} in found
    assert {"x": b""} in found


# ---- campaigns -------------------------------------------------------------------------------------------------------


def test_a_campaign_goes_on_where_it_was_stopped(tmp_path, capsys):
    def case(number, chance):
        return Outcome("odd" if number % 2 else "even", ("three",) if number == 3 else (), tried=10)

    file = tmp_path / "tally.json"
    assert run_cases("x", case, ["--count", "3", "--continue", str(file)]).broken == {}
    tally = run_cases("x", case, ["--count", "2", "--continue", str(file)])
    assert (tally.cases, tally.tried, tally.kinds, tally.broken) == (5, 50, {"even": 3, "odd": 2}, {"three": [3]})
    assert "python -m tests.faults.x --seed 0 --case 3" in capsys.readouterr().out


def assert_nothing_broke(name, case, numbers):
    for number in numbers:
        outcome = case(number, random.Random(f"0 {number}"))
        assert outcome.reasons == (), f"python -m tests.faults.{name} --case {number}\n{outcome.detail}"


def test_a_sample_of_system_call_faults_and_power_cuts():
    assert_nothing_broke("syscalls", syscalls.case, [0, 3])
    assert_nothing_broke("power", power.case, [0, 1])


# readers without a known fault; `python -m tests.faults.fuzz` tries all
READERS = ("state.json", "state tensors", "run.json", "binidx index", "conversations", "tokenizer.json", "command line")
FUZZ_SAMPLE = """
import random, sys
from tests.faults import fuzz
from tests.faults.readers import READERS
fuzz.BATCH = 30
for name in sys.argv[1:]:
    outcome = fuzz.case(list(READERS).index(name), random.Random(0))
    assert outcome.tried == 30 and not outcome.reasons, outcome.detail
"""


def test_a_sample_of_mutated_inputs():
    """In a process without threads, which can be forked."""
    done = warm_process.run(
        [sys.executable, "-c", FUZZ_SAMPLE, *READERS], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("syscalls", 40), ("power", 40), ("fuzz", 7000), ("kills", 9)])
def test_a_campaign_of_minutes(name, count):
    done = warm_process.run(
        [sys.executable, "-m", f"tests.faults.{name}", "--count", str(count), "--seed", "1"],
        cwd=ROOT, capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(PHASES)), ids=list(PHASES))
def test_a_rank_that_fails_in_any_phase(number):
    assert_nothing_broke("ranks", ranks.case, [number])
