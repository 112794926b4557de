# SPDX-License-Identifier: MIT
"""Group normalisation and SiLU against their peers, on the same values in the same process.

The baseline is torch's own group_norm and silu on channels-first tensors [B, C, L], as the release has them; mmattn
takes channels-last ones, [B, L, C]. Gradients are those of the input, the weight and the bias. The op is bound by
memory, so its rate is that of the least traffic: each input read once, each output written once. FLOP are not counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from dataclasses import dataclass

import cli
import harness
import peers
import report
import torch
import torch.nn.functional as F
from harness import Provider
from peers import Peer
from torch import Tensor

import mmattn

GROUPS = 32
BASELINE = "eager"
LAST = "eager, channels last"
HEADER = {
    "op": "norm",
    "baseline": BASELINE,
    "bound": "copy",
    "versus": [BASELINE, cli.COMPILE, report.BEST],
    "other_result": {},
}
PUBLISHED = [(128, 65536), (256, 16384), (128, 25600), (512, 1024)]  # C, L: video and audio of the U-Net's levels
QUICK = PUBLISHED[1::2]
SMALL = [(64, 200), (96, 77)]


@dataclass(frozen=True)
class Shape:
    """B, C, L."""

    batch: int
    channels: int
    length: int

    def __str__(self) -> str:
        return f"B{self.batch} C{self.channels} L{self.length}"

    def gflop(self, mode: str) -> float:
        return 0.0

    def gbytes(self, mode: str, dtype: torch.dtype) -> float:
        elements = self.batch * self.channels * self.length
        return peers.least_gbytes(mode, elements + 2 * self.channels, elements, dtype)

    def short(self) -> Shape:
        return dataclasses.replace(self, length=min(self.length, 64))

    def parameters(self, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        random = peers.random(device, dtype)
        made = {"weight": 1 + 0.1 * random(self.channels), "bias": 0.1 * random(self.channels)}
        return {name: value.requires_grad_() for name, value in made.items()}

    def inputs(self, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor]:
        random = peers.random(device, dtype)
        size = (self.batch, self.channels, self.length)
        return [random(*size)], random(*size)


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, GROUPS, weight, bias))


def eager_channels_last(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # As [B, C, 1, L] these strides are torch's channels_last, which its CPU kernel takes; as [B, C, L] they are copied.
    # Its backward crashes (torch 2.13) where the weight needs a gradient and the input does not: here both do.
    return eager(x.transpose(1, 2).unsqueeze(2), weight, bias).squeeze(2).transpose(1, 2)


def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return mmattn.group_norm(x, weight, bias, GROUPS, activation="silu")


FUNCTIONS = {BASELINE: eager, "mmattn": fused, LAST: eager_channels_last, cli.COMPILE: eager}


def make_peer(name: str, shape: Shape, parameters: dict[str, Tensor], mode: str) -> Peer:
    function = FUNCTIONS[name]
    if name == cli.COMPILE:
        function = peers.compiled(function, mode)
    layout = (peers.tokens, peers.swapped) if name in ("mmattn", LAST) else ()
    return Peer(function, list(parameters.values()), *layout)


def own_call(shape: Shape, dtype: str, mode: str, device: str) -> tuple[harness.Call, harness.Compare]:
    return peers.own_call(make_peer, "mmattn", shape, dtype, mode, device)


def providers_of(args: argparse.Namespace, shape: Shape, dtype: str, mode: str) -> list[Provider]:
    notes = {"mmattn": cli.chosen("group_norm", args.device, dtype, shape.channels)}
    return peers.providers(args, make_peer, shape, dtype, mode, args.providers, notes)


def parse(argv: list[str] | None) -> argparse.Namespace:
    examples = (
        "--quick",
        "--device cuda --json bench/results/norm-cuda.json",
        "--shape 1,128,25600 --modes forward --threads 1",
    )
    parser = cli.make_parser("norm", "group normalisation with SiLU", examples, FUNCTIONS, _shape, "B,C,L")
    return cli.parse(parser, argv)


def _shape(text: str) -> Shape:
    try:
        shape = Shape(*(int(part) for part in text.split(",")))
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is not three integers B,C,L") from None
    if min(dataclasses.astuple(shape)) < 1 or shape.channels % GROUPS:
        raise argparse.ArgumentTypeError(f"{text!r}: expected positive sizes, C a multiple of {GROUPS}")
    return shape


def shapes_of(args: argparse.Namespace) -> list[Shape]:
    if args.shapes == "custom":
        return args.shape
    sizes = SMALL if args.shapes == "small" else QUICK if args.quick else PUBLISHED
    return [Shape(b, *size) for b in args.batch for size in sizes]


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return cli.run(args, HEADER, shapes_of(args), providers_of)


if __name__ == "__main__":
    sys.exit(main())
