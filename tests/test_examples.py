# SPDX-License-Identifier: MIT
"""The programs of examples/ run, and find their modules before and after to be equal."""

import pathlib
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"
PROGRAMS = {"causal_av": 2, "talking_head": 1, "dance": 1}  # comparisons of each


def test_all_are_listed():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*PROGRAMS, "side_by_side"}


@pytest.mark.parametrize("name", PROGRAMS)
def test_runs_and_is_equal(name):
    done = subprocess.run([sys.executable, EXAMPLES / f"{name}.py", "--small"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal, outputs and gradients") == PROGRAMS[name]


def test_what_is_not_equal_is_refused(monkeypatch):
    import torch

    monkeypatch.syspath_prepend(str(EXAMPLES))
    from side_by_side import compare

    class Other(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * 1.001

    with pytest.raises(AssertionError, match="before and after differ by"):
        compare(torch.nn.Linear(3, 4), Other(3, 4), torch.randn(2, 3), repeats=1)
