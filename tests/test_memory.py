# SPDX-License-Identifier: MIT
"""What the process does with freed memory."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import torch, mmattn

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = [faults() for _ in range(3)][-1]
kept = mmattn.keep_freed_memory()
print(kept, before, [faults() for _ in range(40)][-1])  # small blocks take bits of the first few
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept():
    """64 MB again and again: faulted in every time, and never again once it is kept."""
    kept, before, after = subprocess.check_output([sys.executable, "-c", PROGRAM], text=True).split()
    assert kept == "True" and int(before) > 20 and int(after) * 10 < int(before)
