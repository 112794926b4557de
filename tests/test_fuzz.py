# SPDX-License-Identifier: MIT
"""The ops on random arguments, right and wrong: half a minute of tests/fuzz_ops.py, which runs for longer by hand."""

import os
import signal
import sys

import fuzz_ops
import pytest
import torch
from helpers import needs_extension


@needs_extension
def test_no_random_argument_crashes_an_op_or_gives_another_result():
    done, findings = fuzz_ops.run(seconds=30, seed=0, sets=fuzz_ops.available())
    assert not findings, "\n".join(findings)
    assert done > 50


@needs_extension
def test_a_case_follows_from_its_number():
    for case in range(1, 40):
        one, two = (fuzz_ops.Draw(case) for _ in range(2))
        (name, *arguments), (other, *others) = (draw.choice(fuzz_ops.OPS)(draw, torch.float32) for draw in (one, two))
        assert name == other
        assert all(map(torch.equal, fuzz_ops.tensors_of(arguments), fuzz_ops.tensors_of(others)))


@needs_extension
def test_a_wrong_result_is_a_finding(monkeypatch, instruction_set):
    right = fuzz_ops.results
    monkeypatch.setattr(
        fuzz_ops, "results", lambda *a, **o: [1.01 * x for x in right(*a, **o)] if "cpu" in a else right(*a, **o)
    )
    with pytest.raises(AssertionError, match="the error against fp64"):
        fuzz_ops.check(1, "portable")


@pytest.mark.skipif(sys.platform != "linux", reason="signals")
@needs_extension
def test_a_crash_is_a_finding_and_the_rest_goes_on():
    worker = fuzz_ops.Worker(7, 2, ["portable"])
    try:
        while worker.since is None:
            worker.read()
        os.kill(worker.process.pid, signal.SIGSEGV)
        with pytest.raises(EOFError):
            while True:
                worker.read()
        running = worker.running.split()[0]
        assert worker.death().startswith(f"--case {running} --isa portable: died with code -11")
        successor = worker.next()
        assert successor.running == f"{int(running) + 2} portable"
        successor.stop()
    finally:
        worker.stop()
