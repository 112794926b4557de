# SPDX-License-Identifier: MIT
"""Providers of an op over one sequence: the same inputs and parameters for all, each in the memory layout of its own.

Inputs are made in the baseline's layout. Before the timing a provider brings the first input and the output's gradient
into its own layout; its first result, an output or an input's gradient, is seen in the baseline's through a view.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import harness
import torch
import torch._functorch.config
import torch._inductor.config
from cli import COMPILE
from torch import Tensor

Change = Callable[[Tensor], Tensor]


def unchanged(x: Tensor) -> Tensor:
    """The baseline's own layout."""
    return x


def swapped(x: Tensor) -> Tensor:
    """[B, C, L] as [B, L, C] or back, a view."""
    return x.transpose(1, 2)


def tokens(x: Tensor) -> Tensor:
    """[B, C, L] as [B, L, C] in memory."""
    return x.transpose(1, 2).contiguous()


@dataclass
class Peer:
    """One way to compute function(*inputs, *parameters).

    Attributes:
        parameters: leaves of autograd, in the baseline's order and shapes.
        enter: from the baseline's layout to its own; not timed.
        leave: back; a view, as it is timed.
    """

    function: Callable[..., Tensor]
    parameters: list[Tensor]
    enter: Change = unchanged
    leave: Change = unchanged

    def call(self, inputs: list[Tensor], d_out: Tensor, mode: str) -> harness.Call:
        """What is timed on these inputs: it returns [output], or the gradients of all inputs and parameters."""
        own = [self.enter(inputs[0]), *inputs[1:]]
        leaves = [x.detach().requires_grad_(mode != "forward") for x in own] + self.parameters
        run = harness.timed(self.function, leaves, [self.enter(d_out)], mode)

        def seen() -> list[Tensor]:
            result = run()
            first, *rest = [result] if isinstance(result, Tensor) else result
            return [self.leave(first), *rest]

        return seen


class Shape(Protocol):
    """What a benchmark's shape tells about itself."""

    def gflop(self, mode: str) -> float: ...
    def gbytes(self, mode: str, dtype: torch.dtype) -> float: ...

    def short(self) -> Any:
        """The same with few positions."""

    def parameters(self, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        """Random parameters by name, which need gradients."""

    def inputs(self, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor]:
        """Random inputs, and the output's gradient, in the baseline's layout."""


Make = Callable[[str, Any, dict[str, Tensor], str], Peer]  # (provider, shape, parameters, mode)


def random(device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """A function of a size: normally distributed values from a generator of its own, the same in every process."""
    generator = torch.Generator(device).manual_seed(0)
    return lambda *size: torch.randn(size, generator=generator, device=device).to(dtype)


def least_gbytes(mode: str, inputs: int, outputs: int, dtype: torch.dtype) -> float:
    """Traffic where each of these elements is read once, and each output and gradient written once."""
    elements = {"forward": inputs + outputs, "backward": 2 * inputs + outputs, "both": 3 * inputs + 2 * outputs}
    return 1e-9 * elements[mode] * dtype.itemsize


def compiled(function: Callable[..., Tensor], mode: str) -> Callable[..., Tensor]:
    """torch.compile of it, for these sizes alone."""
    torch.compiler.reset()  # else the shapes before this one use up the limit on recompilations
    torch._functorch.config.donated_buffer = mode != "backward"  # a kept graph runs backward more than once
    return torch.compile(function, dynamic=False)


def providers(
    args: argparse.Namespace, make: Make, shape: Shape, dtype: str, mode: str, names: list[str], notes: dict[str, str]
) -> list[harness.Provider]:
    """The named providers of one case; inputs and parameters are made once, by the first that asks."""
    made: list[Any] = []

    def build(name: str) -> harness.Call:
        if not made:
            of = getattr(torch, dtype), args.device
            made.extend((shape.parameters(*of), *shape.inputs(*of)))
        parameters, inputs, d_out = made
        return make(name, shape, parameters, mode).call(inputs, d_out, mode)

    return [
        harness.Provider(
            name,
            build=lambda name=name: build(name),
            gflop=shape.gflop(mode),
            gbytes=shape.gbytes(mode, getattr(torch, dtype)),
            probe=(memory_probe, (make, shape, dtype, name, mode, args.threads)),
            note=notes.get(name, ""),
        )
        for name in names
    ]


def own_call(
    make: Make, name: str, shape: Shape, dtype: str, mode: str, device: str
) -> tuple[harness.Call, harness.Compare]:
    """The call of the named provider alone, for --base, and the tensors of its result that are compared."""
    of = getattr(torch, dtype), device
    peer = make(name, shape, shape.parameters(*of), mode)
    return peer.call(*shape.inputs(*of), mode), harness.detached


def memory_probe(
    make: Make, shape: Shape, dtype: str, name: str, mode: str, threads: int
) -> tuple[harness.Call, harness.Call]:
    """For a fresh process: the call at few positions and at all of them, on the same parameters.

    What an implementation keeps between calls, as mmattn does a packed copy of each weight, is there before the full
    call, which is charged for what it needs each time.
    """
    torch.set_num_threads(threads)
    torch._inductor.config.compile_threads = 1  # workers would outlive this process
    of = getattr(torch, dtype), "cpu"
    peer = make(name, shape, shape.parameters(*of), mode)
    full = peer.call(*shape.inputs(*of), mode)
    # The compiler is no part of the call's memory either, and compiles for one size.
    small = full if name == COMPILE else peer.call(*shape.short().inputs(*of), mode)
    return small, full
