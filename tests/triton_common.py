# SPDX-License-Identifier: MIT
"""What the tests of the Triton kernels share."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from triton import __version__ as triton_version

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "bench"))

from ahead_of_time import TARGETS

TESTS = pathlib.Path(__file__).resolve().parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHARED_LIMIT = {name: target.shared_limit for name, target in TARGETS.items()}
# In words of local memory. The configurations are those of Triton 3.7: older ones allocate registers a little worse,
# and 3.9 keeps more of attention's forward kernel there, outside its loop over whole blocks (docs/perf-notes.md).
_TRITON = tuple(int(part) for part in triton_version.split(".")[:2])
SPILLS = 16 if _TRITON < (3, 7) else 0 if _TRITON < (3, 9) else 32
MATRIX_INSTRUCTION = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma", "gfx942": "mfma"}


def ahead_of_time(*args):
    """The lines of triton_aot.py, in a process of its own: Triton reads TRITON_INTERPRET once."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent / "kernels"), environment.get("PYTHONPATH", "")])
    command = [sys.executable, TESTS / "triton_aot.py", *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def targets(op):
    """The targets as parameters. Tests of one group run in one process, and find what those before them compiled."""
    return [pytest.param(name, marks=pytest.mark.xdist_group(f"{op} {name}")) for name in TARGETS]


def named(cases, sanitized):
    """The cases as parameters of a test; those named in `sanitized` are run by compute-sanitizer too."""
    assert cases.keys() >= set(sanitized)
    return [
        pytest.param(case, id=name, marks=[pytest.mark.sanitize] if name in sanitized else [])
        for name, case in cases.items()
    ]
