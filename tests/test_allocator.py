"""Memory of freed tensors is reused without page faults; in a lean run it is returned and leaves no fragmentation."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import resource, torch
from src.training.hardware.allocator import set_up_malloc
if {keep}:
    set_up_malloc(lean=False)
for n in range(8):
    if n == 1:
        first = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    inputs = [torch.zeros(millions << 20) for millions in (10, 12, 9, 11)]
    hidden = [tensor + 1 for tensor in inputs]
    del inputs
    outputs = [tensor * 2 for tensor in hidden]
    del hidden, outputs
rollup = open("/proc/self/smaps_rollup").read()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - first, rollup.split("AnonHugePages:")[1].split()[0])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is configured")
def test_freed_memory_is_reused_without_page_faults():
    """The heap reaches its size after some rounds, which depends on its address: all after the first are counted."""
    folder = Path(__file__).parents[1]
    (kept, huge), (mapped, _) = (
        map(int, subprocess.check_output([sys.executable, "-c", SCRIPT.format(keep=keep)], cwd=folder).split())
        for keep in (True, False)
    )
    assert kept < 0.1 * mapped  # of 7 rounds of 129,000 pages
    choice = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if choice.exists() and "[never]" not in choice.read_text():
        assert huge > 300 << 10  # KiB, of 336 MiB of hidden tensors and outputs


FRAGMENTATION = """
import torch
from src.training.hardware.allocator import set_up_malloc
set_up_malloc(lean=True)
peak = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
before = peak()
tensors = [torch.zeros(2 << 20) for _ in range(40)]  # 8 MiB each
for i in range(0, 40, 2):
    tensors[i] = None
for i in range(0, 40, 2):
    tensors[i] = torch.zeros(2 << 20)
print(peak() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is configured")
def test_a_lean_run_does_not_fragment_memory():
    peak_mib = float(subprocess.check_output([sys.executable, "-c", FRAGMENTATION], cwd=Path(__file__).parents[1]))
    assert 300 < peak_mib < 350  # 320 MiB; with fragmentation 50 to 160 more
