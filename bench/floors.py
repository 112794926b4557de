# SPDX-License-Identifier: MIT
"""The least time of each published shape on a GPU of given ceilings, and what the U-Net's forward pass consists of.

    python bench/floors.py [--what ops unet] [--batch 1 4 16] [--tflops 790] [--tbytes 4.3] [--list]

A floor is the longer of the work at the rate of a matrix product and the least traffic at that of a copy, in
microseconds; work and traffic of the ops are those of their benchmarks. The network is walked without memory behind it,
in bfloat16: each op of mmattn, and each torch op that launches a kernel. "moved" is what our kernels read and write of
device memory, passes over a tensor counted each and caches ignored; "launches" are kernels on CUDA. No GPU is needed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import attn
import conv
import norm
import report
import torch
import unet
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mmattn
import mmattn._layers
import mmattn.modules

DTYPE = torch.bfloat16
WHOLE = 1024  # positions up to which a norm is one launch: those of norm.json


@dataclasses.dataclass(frozen=True)
class Work:
    """GFLOP, the least GB and those moved, and kernel launches, of one call."""

    gflop: float
    least: float
    moved: float
    launches: int


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """TFLOP/s of a matrix product and TB/s of a copy."""

    tflops: float
    tbytes: float

    def product(self, gflop: float) -> float:
        return 1e3 * gflop / self.tflops

    def memory(self, gbytes: float) -> float:
        return 1e3 * gbytes / self.tbytes

    def floor(self, gflop: float, gbytes: float) -> float:
        """In microseconds, as the others."""
        return max(self.product(gflop), self.memory(gbytes))


def gbytes(*tensors: Tensor | None) -> float:
    return 1e-9 * sum(x.numel() * x.element_size() for x in tensors if x is not None)


def _convolution(x: Tensor, weight: Tensor, *others: Tensor | None) -> tuple[Tensor, float, float]:
    """Output, GFLOP, least GB."""
    out = x.new_empty(*x.shape[:2], weight.shape[0])
    gflop = 2e-9 * weight.numel() * x.shape[0] * x.shape[1]
    return out, gflop, gbytes(x, weight, *others, out)


def _norm(x: Tensor) -> tuple[int, float]:
    """Launches, and GB moved: a short sequence is read once, a long one for its statistics first."""
    return (1, 2 * gbytes(x)) if x.shape[1] <= WHOLE else (3, 3 * gbytes(x))


def dilated_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, norm: Any = None, residual: Tensor | None = None, **_: Any
) -> tuple[Tensor, Work]:
    """One product; in front of it the norm where it would be computed again, else its statistics."""
    out, gflop, least = _convolution(x, weight, bias, residual)
    launches, moved = 1, least
    if norm is not None and (weight.shape[2] > 1 or weight.shape[0] > weight.shape[1]):
        more = _norm(x)
        launches, moved = launches + more[0], moved + more[1]
    elif norm is not None:
        launches, moved = launches + (1 if x.shape[1] <= WHOLE else 2), moved + gbytes(x)
    return out, Work(gflop, least, moved, launches)


def spatial_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, norm: Any = None, residual: Tensor | None = None, **_: Any
) -> tuple[Tensor, Work]:
    """The norm, torch's convolution by a weight that is channels last, and a sum for each of bias and residual."""
    out, gflop, least = _convolution(x, weight, bias, residual)
    launches, moved = _norm(x) if norm is not None else (0, 0.0)
    sums = (bias is not None) + (residual is not None)
    return out, Work(gflop, least, least + moved + 2 * sums * gbytes(out), launches + 1 + sums)


def group_norm(x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Work]:
    launches, moved = _norm(x)
    return x.new_empty(x.shape), Work(0.0, 2 * gbytes(x), moved, launches)


def self_attention(q: Tensor, k: Tensor, v: Tensor, *, segments: int, **_: Any) -> tuple[Tensor, Work]:
    """One kernel, torch's or ours."""
    out = q.new_empty(q.shape)
    moved = gbytes(q, k, v, out)
    return out, Work(4e-9 * q.numel() * q.shape[1] / segments, moved, moved, 1)


def random_shift_attention(
    video_q: Tensor, video_k: Tensor, video_v: Tensor, audio_q: Tensor, *_: Any, frames: int, window: int, **__: Any
) -> tuple[tuple[Tensor, Tensor], Work]:
    """One kernel for both directions."""
    batch, length, heads, dim = video_q.shape
    shape = attn.Shape(batch, heads, frames, length // frames, audio_q.shape[1], window, dim)
    moved = shape.gbytes("forward", video_q.dtype)
    outs = video_q.new_empty(video_q.shape), audio_q.new_empty(audio_q.shape)
    return outs, Work(shape.gflop("forward"), moved, moved, 1)


PLACES = {
    dilated_conv1d: (mmattn, mmattn._layers),
    spatial_conv2d: (mmattn, mmattn._layers),
    group_norm: (mmattn, mmattn._layers),
    self_attention: (mmattn,),
    random_shift_attention: (mmattn, mmattn.modules),
}


class Walk(TorchDispatchMode):
    """Notes each call of an op of mmattn, without computing it, and each torch op that launches a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, str, Work]] = []
        self._inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        is_kernel = isinstance(out, Tensor) and not func.is_view and name not in ("empty", "_unsafe_view")
        if is_kernel and not self._inside:
            tensors = [x for arg in args for x in (arg if isinstance(arg, list | tuple) else [arg])]
            tensors = [x for x in tensors if isinstance(x, Tensor)]
            moved = gbytes(*tensors, out)
            gflop = 2e-9 * tensors[1].numel() * tensors[2].shape[1] if name == "addmm" else 0.0
            self.calls.append((name, _sizes(out), Work(gflop, moved, moved, 1)))
        return out

    @contextlib.contextmanager
    def open(self) -> Iterator[Walk]:
        with contextlib.ExitStack() as stack:
            for op, owners in PLACES.items():
                for owner in owners:
                    stack.enter_context(mock.patch.object(owner, op.__name__, self._noted(op)))
            stack.enter_context(self)
            yield self

    def _noted(self, op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self._inside = True
            out, work = op(*args, **options)
            self._inside = False
            sizes = _sizes(args[0])
            if op in (dilated_conv1d, spatial_conv2d):
                sizes += f" > {args[1].shape[0]}, {args[1][0, 0].numel()} taps" + ", norm" * bool(options.get("norm"))
            self.calls.append((f"mmattn.{op.__name__}", sizes, work))
            return out

        return call

    def total(self, field: str) -> float:
        return sum(getattr(work, field) for _, _, work in self.calls)


def _sizes(x: Tensor) -> str:
    return "x".join(map(str, x.shape))


def walk_unet(shape: unet.Shape, clock: Callable[[Walk], float] | None = None) -> tuple[Walk, Counter[str]]:
    """One forward pass of mmdiffusion on the meta device, and what the clock advanced in each of its parts."""
    from mmdiffusion import CoupledUNet

    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(DTYPE)
        with torch.device("meta"):
            network = CoupledUNet(**shape.config()).eval()
    finally:
        torch.set_default_dtype(dtype)
    inputs, shifts, walk = shape.inputs(DTYPE, "meta"), shape.shifts(), Walk()
    with torch.no_grad(), walk.open():
        if clock is None:
            network(*inputs, shifts=shifts)
            return walk, Counter()
        with unet.divided(unet.places_of_own(), lambda: clock(walk)) as spent:
            network(*inputs, shifts=shifts)
        spent[unet.REST] = clock(walk) - spent.total()
    return walk, spent


def op_rows(ceilings: Ceilings, batches: list[int]) -> Iterator[list[str]]:
    for module in (attn, norm, conv):
        arguments = ["--device", "cpu", "--batch", *map(str, batches)]
        for shape in module.shapes_of(module.parse(arguments)):
            for mode in ("forward", "both"):
                gflop, moved = shape.gflop(mode), shape.gbytes(mode, DTYPE)
                times = ceilings.product(gflop), ceilings.memory(moved), ceilings.floor(gflop, moved)
                yield [module.HEADER["op"], str(shape), mode, *map(report.number, (gflop, 1e3 * moved, *times))]


def unet_rows(ceilings: Ceilings, shape: unet.Shape) -> Iterator[list[str]]:
    """By part: calls' sums; their floors one by one, from the least traffic and from what is moved."""

    def clock(floor_of: Callable[[Work], float]) -> Callable[[Walk], float]:
        return lambda walk: sum(floor_of(work) for _, _, work in walk.calls)

    columns = [
        walk_unet(shape, clock(function))[1]
        for function in (
            lambda work: work.gflop,
            lambda work: 1e3 * work.least,
            lambda work: 1e3 * work.moved,
            lambda work: work.launches,
            lambda work: ceilings.floor(work.gflop, work.least),
            lambda work: ceilings.floor(work.gflop, work.moved),
        )
    ]
    for part in unet.PARTS:
        yield [part, *(report.number(column[part]) for column in columns)]
    yield ["all", *(report.number(column.total()) for column in columns)]


def call_rows(ceilings: Ceilings, shape: unet.Shape) -> Iterator[list[str]]:
    """Each kind of call, the longest together first."""
    calls = Counter(walk_unet(shape)[0].calls)
    times = {call: n * ceilings.floor(call[2].gflop, call[2].moved) for call, n in calls.items()}
    for call in sorted(times, key=times.__getitem__, reverse=True):
        (name, sizes, work), n = call, calls[call]
        numbers = work.gflop, 1e3 * work.least, 1e3 * work.moved
        yield [name, sizes, str(n), *map(report.number, numbers), str(work.launches), report.number(times[call])]


def show(titles: list[str], rows: list[list[str]], texts: int) -> None:
    widths = [max(len(row[i]) for row in [titles, *rows]) for i in range(len(titles))]
    for row in [titles, *rows]:
        cells = (f"{c:<{w}}" if i < texts else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        print("  ".join(cells).rstrip())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--what", nargs="+", choices=("ops", "unet"), default=["ops", "unet"])
    parser.add_argument("--batch", nargs="+", type=int, metavar="B", help="ops: 1 4 16; unet: 1 4")
    parser.add_argument("--tflops", type=float, default=790.0, help="of a bfloat16 matrix product; default: an H200's")
    parser.add_argument("--tbytes", type=float, default=4.3, help="TB/s of a copy; default: an H200's")
    parser.add_argument("--list", action="store_true", help="each kind of call of the U-Net too")
    args = parser.parse_args(argv)
    ceilings = Ceilings(args.tflops, args.tbytes)
    if "ops" in args.what:
        titles = ["op", "shape", "mode", "GFLOP", "least MB", "product us", "memory us", "floor us"]
        show(titles, list(op_rows(ceilings, args.batch or [1, 4, 16])), 3)
    for batch in (args.batch or [1, 4]) if "unet" in args.what else []:
        shape = unet.Shape(batch, *unet.PUBLISHED)
        print(f"\nU-Net, {shape}, forward")
        titles = ["part", "GFLOP", "least MB", "moved MB", "launches", "floor us", "moved us"]
        show(titles, list(unet_rows(ceilings, shape)), 1)
        if args.list:
            print()
            titles = ["op", "shape", "calls", "GFLOP", "least MB", "moved MB", "launches", "moved us, all"]
            show(titles, list(call_rows(ceilings, shape)), 2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
