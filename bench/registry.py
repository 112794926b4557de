# SPDX-License-Identifier: MIT
"""The ops, and the network of them: what each is called, what measures it, and which tests must pass before that.

`gate` runs those tests; benchmarks call it, so nothing is measured that is known to be wrong.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

from harness import ROOT


@dataclass(frozen=True)
class Entry:
    """One thing that is measured.

    Attributes:
        benchmark: the program, bench/{benchmark}.py.
        public: names in `mmattn`, or in `mmdiffusion` where there are none.
        tests: test files of it.
        quick: by device, the tests of those files that come before a measurement, as pytest's -k takes them.
    """

    benchmark: str
    public: tuple[str, ...]
    tests: tuple[str, ...]
    quick: dict[str, str]


CORRECT = {"cpu": "test_published_values or test_outputs_and_gradients", "cuda": "on_the_device or triton_through"}
ENTRIES = {
    entry.benchmark: entry
    for entry in (
        Entry("attn", ("random_shift_attention",), ("tests/test_attention.py",), CORRECT),
        Entry("norm", ("group_norm",), ("tests/test_norm.py",), CORRECT),
        Entry("conv", ("dilated_conv1d", "spatial_conv2d"), ("tests/test_conv.py",), CORRECT),
        Entry("unet", (), ("tests/test_unet.py",), {"cpu": "published", "cuda": "on_the_device or published"}),
    )
}


def gate(benchmark: str, device: str) -> str | None:
    """Run the quick tests of what a benchmark measures: None where all pass, or why nothing is to be measured."""
    entry = ENTRIES[benchmark]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=short", "-p", "no:cacheprovider", *entry.tests]
    command += ["-k", entry.quick[device], *(["-m", "gpu"] if device == "cuda" else [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    return (
        f"{done.stdout}{done.stderr}\n`{' '.join(command[1:])}` does not pass: nothing measured (--no-gate does anyway)"
    )
