# SPDX-License-Identifier: MIT
"""Attention by windows of any shape against what models do today, on the same tensors in the same process.

Every provider takes q [B, Lq, H, D], k and v [B, Lk, H, D] and returns contiguous [B, Lq, H, D]; masks, indices and
windows are made beforehand. Work: 4·D·H·B FLOP a pair of a query and a key that it reads, forward; 3.5 times that with
gradients. `--help` has examples.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass

import cli
import harness
import report
import torch
import torch.nn.functional as F
from harness import NotApplicable, Provider
from torch import Tensor

import mmattn

BASELINE = "SDPA, dense mask"
HEADER = {
    "op": "segments",
    "baseline": BASELINE,
    "bound": "matmul",
    "versus": [BASELINE, report.BEST],
    "other_result": {},
}
WORK = {"forward": 1.0, "backward": 2.5, "both": 3.5}
TENSORS = {"forward": (2, 2), "backward": (4, 4), "both": (6, 6)}  # of queries, of keys
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
VIDEO, SOUND = (0, 1536, 2688, 3840, 4992, 6144), (0, 26, 51, 76, 101, 126)  # tokens of a causal model's blocks
# An audio token that 21 latent frames of 81 frames each look around, of 173.
CENTERS = (-3, *(int(173 / 81 * (8 * i - 2) / 2) - 1 for i in range(1, 21)))
CASES = ("a", "b", "c", "d", "e", "f32", "f1024", *(f"g{level}" for level in range(1, 5)))


@dataclass(frozen=True)
class Shape:
    """A case of CASES at a batch size; its windows, heads and head dimension follow."""

    case: str
    batch: int = 1

    def windows(self, device: str) -> mmattn.Windows:
        make = mmattn.Windows
        bounds = {"a": (VIDEO, SOUND), "b": (SOUND, VIDEO), "c": (SOUND, SOUND), "d": (VIDEO, VIDEO)}
        if self.case in bounds:
            queries, keys = bounds[self.case]
            return make.prefix(queries, keys[1:], keys=keys[-1], device=device)
        if self.case == "e":
            return make.centered(CENTERS, 8, queries=21 * 1024, keys=173, device=device)
        if self.case.startswith("f"):
            keys = int(self.case[1:])
            return make.blocks((0, 512, 1024), (0, keys // 2, keys), keys=keys, device=device)
        _, queries, keys, window = self._published()
        return make.circular(16, window, (16 - window) // 2, queries=queries, keys=keys, device=device)

    def _published(self) -> tuple[int, int, int, int]:
        heads, pixels, keys, window = ((4, 1024, 6400, 1), (6, 256, 1600, 4), (8, 64, 400, 8), (8, 64, 400, 16))[
            int(self.case[1:]) - 1
        ]
        return heads, 16 * pixels, keys, window

    def heads(self) -> tuple[int, int]:
        """Their number and their dimension."""
        if self.case.startswith("g"):
            return self._published()[0], 64
        return {"a": (32, 64), "b": (32, 64), "c": (32, 64), "d": (32, 128), "e": (40, 128)}.get(self.case, (4, 64))

    def __str__(self) -> str:
        windows, (heads, dim) = self.windows("cpu"), self.heads()
        return f"{self.case}: B{self.batch} H{heads} Lq{windows.queries} Lk{windows.keys} D{dim}"

    def gflop(self, mode: str) -> float:
        windows, (heads, dim) = self.windows("cpu"), self.heads()
        pairs = int((windows.query_bounds.diff() * windows.key_length).sum())
        return 4e-9 * dim * heads * self.batch * pairs * WORK[mode]

    def gbytes(self, mode: str, dtype: torch.dtype) -> float:
        windows, (heads, dim) = self.windows("cpu"), self.heads()
        positions = TENSORS[mode][0] * windows.queries + TENSORS[mode][1] * windows.keys
        return 1e-9 * self.batch * heads * dim * positions * dtype.itemsize


def ranges(windows: mmattn.Windows) -> list[tuple[slice, Tensor | slice]]:
    """Queries and keys of each segment; keys as a slice unless they wrap around."""
    bounds, begins, lengths = (table.tolist() for table in windows.tables)
    found: list[tuple[slice, Tensor | slice]] = []
    for (lo, hi), begin, length in zip(itertools.pairwise(bounds), begins, lengths, strict=True):
        end = begin + length
        index = (torch.arange(length) + begin) % windows.keys if end > windows.keys else slice(begin, end)
        found.append((slice(lo, hi), index))
    return found


def fused(shape: Shape, windows: mmattn.Windows) -> Attend:
    """mmattn.segmented_attention."""
    return lambda q, k, v: mmattn.segmented_attention(q, k, v, windows)


def dense(shape: Shape, windows: mmattn.Windows) -> Attend:
    """One call with a boolean mask, as the causal models do it."""
    mask = windows.mask()
    return lambda q, k, v: _sdpa(q, k, v, mask)


def loop(shape: Shape, windows: mmattn.Windows) -> Attend:
    """A call for each segment on slices of the keys, each into its part of the output."""
    pieces = ranges(windows)
    return lambda q, k, v: torch.cat([_sdpa(q[:, own], k[:, keys], v[:, keys]) for own, keys in pieces], 1)


def copies(shape: Shape, windows: mmattn.Windows) -> Attend:
    """One call with the segments as its batch: windows copied, and padded under a mask where their lengths differ."""
    bounds, begins, lengths = (table.long() for table in windows.tables)
    rows = bounds.diff()
    if (rows != rows[0]).any():
        raise NotApplicable("needs segments of as many queries")
    longest, count = int(lengths.max()), len(begins)
    index = (begins[:, None] + torch.arange(longest)) % windows.keys
    mask = None if (lengths == longest).all() else (torch.arange(longest) < lengths[:, None])[:, None, None]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch = q.shape[0]
        own = mask if mask is None else mask.repeat(batch, 1, 1, 1)
        segments = q.unflatten(1, (count, -1)).flatten(0, 1)
        return _sdpa(segments, k[:, index].flatten(0, 1), v[:, index].flatten(0, 1), own).view(q.shape)

    return attend


def flex_attention(shape: Shape, windows: mmattn.Windows) -> Attend:
    """torch.compile'd FlexAttention with `Windows.block_mask`."""
    from torch.nn.attention import flex_attention as flex

    torch.compiler.reset()
    compiled = torch.compile(flex.flex_attention, dynamic=False)
    mask = windows.block_mask()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask).transpose(1, 2).contiguous()

    return attend


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
    return out.transpose(1, 2).contiguous()


ATTENDS = {
    BASELINE: dense,
    "mmattn": fused,
    "loop of SDPA": loop,
    "SDPA over copies": copies,
    "FlexAttention": flex_attention,
}


def make_call(shape: Shape, dtype: str, name: str, mode: str, device: str) -> harness.Call:
    """What is timed; the inputs are the same in every call of this."""
    windows, (heads, dim) = shape.windows(device), shape.heads()
    generator = torch.Generator(device).manual_seed(0)

    def random(length: int) -> Tensor:
        size = shape.batch, length, heads, dim
        return torch.randn(size, generator=generator, device=device).to(getattr(torch, dtype))

    lengths = windows.queries, windows.keys, windows.keys
    leaves = [random(length).requires_grad_(mode != "forward") for length in lengths]
    return harness.timed(ATTENDS[name](shape, windows), leaves, [random(windows.queries)], mode)


def own_call(shape: Shape, dtype: str, mode: str, device: str) -> tuple[harness.Call, harness.Compare]:
    """The call of mmattn alone, for --base, and the tensors of its result that are compared."""
    return make_call(shape, dtype, "mmattn", mode, device), harness.detached


def memory_probe(shape: Shape, dtype: str, name: str, mode: str, threads: int) -> tuple[harness.Call, harness.Call]:
    """For a fresh process: a small case, and the call."""
    torch.set_num_threads(threads)
    small = make_call(Shape("f32"), dtype, name, mode, "cpu")
    return small, make_call(shape, dtype, name, mode, "cpu")


def providers_of(args: argparse.Namespace, shape: Shape, dtype: str, mode: str) -> list[Provider]:
    """The chosen providers of one case."""

    def build(name: str) -> harness.Call:
        if name == "FlexAttention" and mode != "forward" and args.device == "cpu":
            raise NotApplicable("has no backward on the CPU")
        return make_call(shape, dtype, name, mode, args.device)

    note = cli.chosen("segmented_attention", args.device, dtype, shape.heads()[1])
    return [
        Provider(
            name,
            build=lambda name=name: build(name),
            gflop=shape.gflop(mode),
            gbytes=shape.gbytes(mode, getattr(torch, dtype)),
            probe=(memory_probe, (shape, dtype, name, mode, args.threads)),
            note=note if name == "mmattn" else "",
        )
        for name in args.providers
    ]


def _shape(text: str) -> Shape:
    if text not in CASES:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(CASES)}")
    return Shape(text)


def parse(argv: list[str] | None) -> argparse.Namespace:
    examples = ("--quick", "--shape a --shape e --dtype bfloat16 --modes forward", "--device cuda --batch 1")
    what = "attention by windows of any shape"
    parser = cli.make_parser("segments", what, examples, ATTENDS, _shape, "CASE", modes=("forward", "both"))
    return cli.parse(parser, argv, on_request=("FlexAttention",))


def shapes_of(args: argparse.Namespace) -> list[Shape]:
    chosen = [shape.case for shape in args.shape] or (CASES if args.shapes == "published" else ("c", "f32", "g3"))
    return [Shape(case, batch) for batch in args.batch for case in chosen]


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return cli.run(args, HEADER, shapes_of(args), providers_of)


if __name__ == "__main__":
    sys.exit(main())
