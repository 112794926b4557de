# SPDX-License-Identifier: MIT
"""What the process does with freed memory."""

import os
import platform
import subprocess
import sys

import pytest
from helpers import needs_extension

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


END_OF_THE_HEAP = """
import ctypes
import mmattn

mmattn.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.sbrk.restype = libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
block = libc.malloc(5 << 29)  # of which no page is touched
end = libc.sbrk(0)
libc.free(block)
print(libc.sbrk(0) == end)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_more_bytes_than_an_int_holds_are_kept():
    assert subprocess.check_output([sys.executable, "-c", END_OF_THE_HEAP], text=True) == "True\n"


@needs_extension
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_while_threads_compute():
    """A child must find nothing locked by a thread that it does not have."""
    program = """
import os, signal, sys, threading, time
import torch, mmattn
torch.set_num_threads(1)
x, weight, bias = torch.randn(1, 4, 64), torch.randn(64, 64, 1), torch.randn(64)
compute = lambda: mmattn.dilated_conv1d(x, weight, bias, norm=(bias, bias, 8), impl="cpu")
expected, stop = compute(), threading.Event()

def work():
    while not stop.is_set():
        compute()

threads = [threading.Thread(target=work) for _ in range(3)]
[thread.start() for thread in threads]
bad = 0
for _ in range(300):
    if (child := os.fork()) == 0:
        signal.alarm(20)  # ends one that spins
        os._exit(0 if torch.equal(compute(), expected) else 1)
    bad += os.waitpid(child, 0)[1] != 0
stop.set()
sys.exit(f"{bad} of 300 children failed" if bad else 0)
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
