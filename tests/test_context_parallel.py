"""--context_parallel: processes that share samples compute the losses and gradients of one. On CPUs, over gloo."""

import functools
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import warm_process

from src.training.distributed.context_parallel import bytes_received, data_parallel
from tests.context_parallel_run import SIZES

ROOT = Path(__file__).parents[1]
CASES = {
    "rows": {},
    "packed": {"packed": True},
    "one document": {"packed": True, "long": True},
    "pieces": {"chunk_ctx": 12},
    "packed pieces": {"packed": True, "chunk_ctx": 12},
    "packed pieces in float64": {"packed": True, "chunk_ctx": 12, "double": True},
    "recomputed": {"packed": True, "grad_cp": True},
    "recomputed pieces": {"chunk_ctx": 12, "grad_cp": True},
    "truncated pieces": {"chunk_ctx": 12, "bptt": 1},
    "states": {"adapter": "state"},
    "packed states": {"adapter": "state", "packed": True, "chunk_ctx": 12},
    "lora": {"adapter": "lora", "packed": True},
}


PROCESSES = [2, 3, pytest.param(4, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of each case by the number of processes, which run when they are first asked for."""
    out = tmp_path_factory.mktemp("shared")

    @functools.cache
    def of(processes):
        plan = out / f"{processes}.json"
        plan.write_text(json.dumps({"processes": processes, "cases": CASES}))
        done = warm_process.run(
            [sys.executable, "-m", "tests.context_parallel_run", str(out), str(plan)], cwd=ROOT, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300, capture_output=True, ranks=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return {name: torch.load(out / str(processes) / f"{name}.pt") for name in CASES}

    return of


@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_one_process(results, processes, case):
    expected, found = results(1)[case], results(processes)[case]
    one, other = expected["values"], found["values"]
    assert one.keys() == other.keys()
    bound = 1e-9 if "float64" in case else 1e-5
    for name in one:
        error = (other[name] - one[name]).norm() / one[name].norm().clamp(min=1e-12)
        assert error < bound, (name, error)
    torch.testing.assert_close(found["held_out"], expected["held_out"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("processes", PROCESSES)
def test_the_bytes_received_are_those_of_the_formula(results, processes):
    received = {case: result["received"] for case, result in results(processes).items()}
    assert received["rows"] == bytes_received(SIZES, processes, sequences=2, dtype_bytes=4)
    assert received["packed"] == bytes_received(SIZES, processes, sequences=1, dtype_bytes=4)
    assert received["recomputed"] == bytes_received(SIZES, processes, sequences=1, dtype_bytes=4, forward=2)
    # two pieces, of which the first is computed forward twice
    assert received["pieces"] == bytes_received(SIZES, processes, 2, dtype_bytes=4, forward=3, backward=2)
    assert received["recomputed pieces"] == bytes_received(SIZES, processes, 2, dtype_bytes=4, forward=5, backward=2)


def test_processes_of_a_group_read_the_same_samples():
    assert [data_parallel(rank, 6, 3) for rank in range(6)] == [(0, 2), (0, 2), (0, 2), (1, 2), (1, 2), (1, 2)]
