# SPDX-License-Identifier: MIT
"""The ops, and the network of them: what each is called, what measures it, and which tests must pass before that.

`gate` runs those tests; benchmarks call it, so nothing is measured that is known to be wrong. What all ops promise is
tested over this table too, by tests/test_op_contract.py.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from harness import ROOT
from torch import Tensor

import mmattn

Random = Callable[..., Tensor]  # of a size


@dataclass(frozen=True)
class Op:
    """A public function of `mmattn`.

    Attributes:
        function: its name.
        op: the name of what it calls in torch.ops.mmattn.
        arguments: of a source of random numbers and a length: positional tensors, and tensors and numbers by name.
        keeps_dtype: under autocast the output has the dtype of the first tensor, not autocast's.
    """

    function: str
    op: str
    arguments: Callable[[Random, int], tuple[list[Tensor], dict[str, Any]]]
    keeps_dtype: bool = False

    def make(self, dtype: torch.dtype = torch.float32, length: int = 6, seed: int = 0) -> tuple[list[Tensor], dict]:
        """Small valid arguments: those that are tensors, and the others by name."""
        generator = torch.Generator().manual_seed(seed)
        return self.arguments(lambda *size: torch.randn(size, generator=generator).to(dtype), length)


def _attention(random: Random, length: int) -> tuple[list[Tensor], dict[str, Any]]:
    video, audio = ((2, 4 * n, 2, 16) for n in (length, length + 1))
    tensors = [random(*size) for size in (video,) * 3 + (audio,) * 3]
    return tensors, {"frames": 4, "window": 2, "shift": 1}


def _self_attention(random: Random, length: int) -> tuple[list[Tensor], dict[str, Any]]:
    return [random(2, 3 * length, 2, 16) for _ in range(3)], {"segments": 3}


def _segmented_attention(random: Random, length: int) -> tuple[list[Tensor], dict[str, Any]]:
    windows = mmattn.Windows.from_ranges([0, 4, 9, 4 * length], [2, 2 * length, 0], [5, length, 1], keys=3 * length)
    return [random(2, n * length, 2, 16) for n in (4, 3, 3)], {"windows": windows}


def _norm(random: Random, length: int) -> tuple[list[Tensor], dict[str, Any]]:
    film = {"scale": random(2, 32), "shift": random(2, 32), "activation": "silu"}
    return [random(2, length, 32), random(32), random(32)], {"groups": 8, **film}


def _conv(random: Random, positions: int, kernel: tuple[int, ...]) -> tuple[list[Tensor], dict[str, Any]]:
    prologue = {"norm": (random(32), random(32), 8), "film": (random(2, 32), random(2, 32)), "activation": "silu"}
    tensors = [random(2, positions, 32), random(24, 32, *kernel) / 10, random(24)]
    return tensors, {**prologue, "residual": random(2, positions, 24)}


def _conv1d(random: Random, length: int) -> tuple[list[Tensor], dict[str, Any]]:
    tensors, options = _conv(random, length, (3,))
    return tensors, {**options, "dilation": 2}


def _conv2d(random: Random, length: int) -> tuple[list[Tensor], dict[str, Any]]:
    tensors, options = _conv(random, 4 * 6 * length, (3, 3))
    return tensors, {**options, "height": 4, "width": 6}


OPS = {
    op.function: op
    for op in (
        Op("random_shift_attention", "random_shift_attention", _attention),
        Op("self_attention", "self_attention", _self_attention),
        Op("segmented_attention", "segmented_attention", _segmented_attention),
        Op("group_norm", "group_norm", _norm, keeps_dtype=True),
        Op("dilated_conv1d", "conv", _conv1d),
        Op("spatial_conv2d", "conv", _conv2d),
    )
}


@dataclass(frozen=True)
class Entry:
    """One thing that is measured.

    Attributes:
        benchmark: the program, bench/{benchmark}.py.
        functions: those of OPS that it measures; none is all of them, in a network.
        tests: test files of it.
        quick: by device, the tests of those files that come before a measurement, as pytest's -k takes them.
    """

    benchmark: str
    functions: tuple[str, ...]
    tests: tuple[str, ...]
    quick: dict[str, str]


CORRECT = {"cpu": "test_published_values or test_outputs_and_gradients", "cuda": "on_the_device or triton_through"}
ENTRIES = {
    entry.benchmark: entry
    for entry in (
        Entry("attn", ("random_shift_attention",), ("tests/test_attention.py",), CORRECT),
        Entry("segments", ("segmented_attention",), ("tests/test_segmented_attention.py",), CORRECT),
        Entry("norm", ("group_norm",), ("tests/test_norm.py",), CORRECT),
        Entry("conv", ("dilated_conv1d", "spatial_conv2d"), ("tests/test_conv.py",), CORRECT),
        Entry("unet", (), ("tests/test_unet.py",), {"cpu": "published", "cuda": "on_the_device or published"}),
        Entry("superres", (), ("tests/test_superres.py",), {"cpu": "published", "cuda": "published"}),
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
