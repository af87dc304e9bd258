"""Large tensors that come and go cost no page faults a second time."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import resource, torch
from src.training.allocator import keep_freed_memory
if {keep}:
    keep_freed_memory()
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    inputs = [torch.zeros(millions << 20) for millions in (12, 16, 10, 14)]
    hidden = [tensor + 1 for tensor in inputs]
    del inputs
    outputs = [tensor * 2 for tensor in hidden]
    del hidden, outputs
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is told")
def test_memory_that_was_freed_is_used_again():
    faults = [
        int(subprocess.check_output([sys.executable, "-c", SCRIPT.format(keep=keep)], cwd=Path(__file__).parents[1]))
        for keep in (True, False)
    ]
    assert faults[0] < 1000  # of 160,000 pages
    assert faults[0] <= faults[1]
