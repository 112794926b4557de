# SPDX-License-Identifier: MIT
"""What the examples share: two modules of the same parameters on the same inputs, equal, and what each costs."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

EQUAL = 1e-5  # relative to the largest number


def parse(what: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=what.strip().splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a size that takes no time, for tests")
    return parser.parse_args()


def compare(before: nn.Module, after: nn.Module, *inputs: Tensor, repeats: int = 3) -> None:
    """Print time and memory of both, forward and backward; AssertionError where outputs or gradients differ."""
    after.load_state_dict(before.state_dict())
    results = {}
    for name, module in (("before", before), ("after", after)):

        def step(module: nn.Module = module) -> list[Tensor]:
            leaves = [x.detach().requires_grad_() for x in inputs]
            out = module(*leaves)
            wanted = [*leaves, *module.parameters()]
            return [out.detach(), *torch.autograd.grad(out.square().mean(), wanted)]

        results[name] = step()
        memory = peak_memory(step)
        seconds = statistics.median(timed(step) for _ in range(repeats))
        print(f"{name:7s} {1e3 * seconds:8.1f} ms   {memory}")
    for one, other in zip(*results.values(), strict=True):
        error = float((one - other).abs().max() / one.abs().max())
        assert error < EQUAL, f"before and after differ by {error:.1e}; expected less than {EQUAL:.0e}"
    print("equal, outputs and gradients")


def timed(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def peak_memory(function: Callable[[], object]) -> str:
    """What a call adds to this process's memory at its highest; where Linux does not say so, nothing."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    try:
        reset.write_text("5")  # from here on the highest is that of the call
    except OSError:
        return ""

    def kilobytes(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))

    standing = kilobytes("VmRSS:")
    function()
    return f"{(kilobytes('VmHWM:') - standing) / 1024:8.0f} MB more at the peak"
