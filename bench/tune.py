# SPDX-License-Identifier: MIT
"""Finds the fastest configurations of the Triton kernels on this machine's GPU, for the tables beside the kernels.

A task is one entry of a table: a kernel, a width of the dtype and, where the table has such a level, a bucket of sizes.
Its candidates are compiled by all cores at once into Triton's cache, for which no GPU is needed; those that take too
much shared memory, spill registers or fail are dropped. The others are called through the op's launchers on the
published shapes, compared with the present configuration's results, and timed against it in rounds of random order, as
replays of CUDA graphs after an L2 flush: few rounds of all, more of the best third, most of the best third of those.
The figure of merit is the geometric mean over shapes of (time of the present configuration) / (time of the candidate),
of the whole op: whatever else it launches counts on both sides. `--help` has examples.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import functools
import gc
import importlib
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import attn
import conv
import harness
import norm
import numpy
import torch
from harness import Call
from torch import Tensor
from tqdm import tqdm

from mmattn_kernels import CircularWindows, Direction
from mmattn_kernels.triton import _host

Config = dict[str, int]
TABLES = Path(_host.__file__).parent
# Stand-ins for a GPU where there is none: name, compute capability, bytes of shared memory a program may take.
TARGETS = {
    "sm_80": ("NVIDIA A100-SXM4-80GB", 80, 163 << 10),
    "sm_90": ("NVIDIA H200", 90, 227 << 10),
    "sm_100": ("NVIDIA B200", 100, 227 << 10),
}
ROUNDS = (7, 21, 63)
MARGIN = 1.02  # a winner by less may be one of chance
COMPILE_TIMEOUT_S = 90
COMPILE_SHARE = 0.6  # of the budget: what is not compiled by then is not tried
TENSOR_MEMORY_COLUMNS = 512


def _configs(names: str, rows: Iterable[tuple[int, ...]]) -> list[Config]:
    """Configurations from rows of values; a row may end before the names do."""
    return [dict(zip(names.split(), row, strict=False)) for row in rows]


_blocks = functools.partial(_configs, "BLOCK_M BLOCK_N num_warps num_stages maxnreg")
_products = functools.partial(_configs, "BLOCK_M BLOCK_N BLOCK_K num_warps num_stages maxnreg")
_splits = functools.partial(_configs, "BLOCK_M BLOCK_N BLOCK_K PROGRAMS num_warps num_stages maxnreg")
_tiles = functools.partial(_configs, "TILE BLOCK_C PROGRAMS num_warps")
_NARROW = _blocks([
    (m, n, warps, stages)
    for m, n in ((16, 16), (16, 32), (32, 16), (32, 32), (64, 16), (64, 32), (32, 64), (64, 64))
    for warps in (4, 8) for stages in (1, 2) if (m + n) * warps <= 768 and m * n >= warps * 64
])  # fmt: skip
_CONVOLUTIONS = _products([
    (64, 64, 64, 4, 3), (64, 64, 64, 4, 4), (64, 64, 64, 4, 3, 128), (128, 64, 64, 4, 3), (128, 64, 64, 4, 4),
    (128, 64, 64, 8, 3), (128, 64, 32, 4, 4), (256, 64, 64, 8, 3),
    (64, 128, 64, 4, 2), (64, 128, 64, 4, 3), (64, 128, 64, 4, 4), (64, 128, 64, 4, 3, 128), (64, 128, 64, 4, 3, 168),
    (64, 128, 128, 4, 2), (64, 128, 64, 8, 3), (64, 128, 32, 4, 3), (64, 128, 32, 4, 4), (128, 128, 64, 4, 3),
    (128, 128, 32, 8, 3), (128, 128, 32, 8, 4),
    (128, 128, 64, 8, 2), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 8, 3, 128),
    (128, 128, 128, 8, 2), (256, 128, 64, 8, 3),
    (64, 256, 64, 4, 3), (64, 256, 64, 8, 3), (128, 256, 32, 8, 4), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4),
])  # fmt: skip
_NARROW_CONVOLUTIONS = _products([
    (m, n, k, warps, stages)
    for m, n, k in ((32, 64, 32), (64, 32, 32), (64, 64, 16), (64, 64, 32), (64, 128, 32), (128, 64, 32))
    for warps in (4, 8) for stages in (2, 3)
])  # fmt: skip
_OVER_TOKENS = _tiles([
    (tile, width, programs, warps)
    for tile, warps in ((1024, 4), (2048, 4), (4096, 4), (4096, 8), (8192, 8))
    for width, programs in ((64, 1024), (64, 2048), (64, 4096), (128, 2048), (128, 4096))
])  # fmt: skip
# By op, kernel and width of the dtype. A present configuration that is not listed is tried as well.
CANDIDATES: dict[tuple[str, str, str], list[Config]] = {
    ("attention", "forward", "16-bit"): _blocks([
        (64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (64, 64, 4, 3, 128), (64, 64, 4, 3, 168),
        (64, 128, 4, 2), (64, 128, 4, 3), (64, 128, 8, 2), (128, 32, 4, 3), (128, 32, 8, 3), (128, 32, 8, 4),
        (128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 8, 2, 128),
        (128, 64, 8, 3, 128), (128, 64, 8, 4, 128), (128, 128, 8, 2), (128, 128, 8, 3), (128, 128, 4, 2),
        (256, 64, 8, 2), (256, 64, 8, 3), (256, 32, 8, 3),
    ]),
    ("attention", "backward_dq", "16-bit"): _blocks([
        (64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 2, 128),
        (64, 64, 4, 2, 168), (64, 128, 4, 1), (64, 128, 4, 2), (64, 128, 8, 2), (128, 32, 4, 2), (128, 32, 8, 2),
        (128, 32, 8, 3), (128, 64, 4, 2), (128, 64, 8, 1), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2, 128),
        (128, 64, 8, 3, 128), (128, 128, 8, 1), (128, 128, 8, 2),
    ]),
    ("attention", "backward_dkdv", "16-bit"): _blocks([
        (32, 64, 4, 2), (32, 64, 4, 3), (32, 64, 4, 2, 168), (64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 4, 3),
        (32, 64, 8, 2), (64, 64, 8, 1), (64, 64, 8, 2), (64, 64, 8, 3), (64, 64, 8, 2, 128), (128, 64, 8, 1),
        (64, 32, 4, 2), (64, 32, 4, 3), (16, 128, 4, 2), (16, 128, 8, 2), (32, 128, 8, 1), (32, 128, 8, 2),
        (32, 128, 8, 3), (64, 128, 8, 1), (64, 128, 8, 2), (64, 128, 8, 3), (128, 128, 8, 1),
    ]),
    **{("attention", kernel, "32-bit"): _NARROW for kernel in ("forward", "backward_dq", "backward_dkdv")},
    **{("conv", kernel, "16-bit"): _CONVOLUTIONS for kernel in ("taps", "pointwise")},
    **{("conv", kernel, "32-bit"): _NARROW_CONVOLUTIONS for kernel in ("taps", "pointwise")},
    ("conv", "backward_weight", "16-bit"): _splits([
        (64, 64, 64, 264, 4, 3), (64, 64, 64, 528, 4, 3), (64, 64, 128, 528, 4, 2), (64, 128, 64, 264, 4, 3),
        (64, 128, 64, 264, 8, 3), (64, 128, 64, 528, 4, 3), (64, 128, 64, 264, 4, 2), (64, 128, 64, 528, 4, 3, 168),
        (64, 128, 128, 264, 4, 2), (128, 64, 64, 264, 4, 3), (128, 64, 64, 528, 4, 3), (128, 64, 64, 264, 8, 3),
        (128, 128, 32, 264, 8, 4), (128, 128, 64, 264, 8, 2), (128, 128, 64, 132, 8, 3), (128, 128, 64, 264, 8, 3),
        (128, 128, 64, 528, 8, 3), (128, 128, 64, 132, 8, 3, 128), (128, 128, 64, 264, 8, 3, 128),
        (128, 128, 64, 528, 8, 3, 128), (128, 128, 64, 264, 8, 2, 128), (128, 128, 64, 264, 4, 3),
        (128, 256, 64, 132, 8, 2), (128, 256, 64, 132, 8, 3), (128, 256, 64, 264, 8, 3),
    ]),
    ("conv", "backward_weight", "32-bit"): _splits([
        (m, n, 32, programs, warps, stages)
        for m, n in ((32, 64), (64, 64), (64, 128)) for programs in (264, 528) for warps in (4, 8) for stages in (1, 2)
    ]),
    **{
        ("norm", kernel, bits): _OVER_TOKENS if bits == "16-bit"
        else [*_OVER_TOKENS, *_tiles([(tile, 32, programs, 4) for tile in (1024, 2048) for programs in (2048, 4096)])]
        for kernel in ("statistics", "forward", "backward_sums", "backward") for bits in ("16-bit", "32-bit")
    },
    **{
        ("norm", "merge", bits): _configs("TILE BLOCK_C num_warps", [
            (tile, 64, warps) for tile in (256, 512, 1024, 2048, 4096) for warps in (1, 2, 4, 8)
            if warps * 128 <= tile <= warps * 512
        ])
        for bits in ("16-bit", "32-bit")
    },
    **{
        ("norm", "whole", bits): _configs("TILE BLOCK_C POSITIONS num_warps", [
            (tile, width, positions, warps)
            for tile, width, warps in (
                (512, 32, 4), (1024, 32, 2), (1024, 32, 4), (2048, 32, 4), (2048, 64, 4), (4096, 64, 8)
            )
            for positions in (256, 1024, 4096)
        ])
        for bits in ("16-bit", "32-bit")
    },
}  # fmt: skip
# The functions that take an entry of a table: only these are compiled for a candidate.
JIT = {
    ("conv", "taps"): ("_convolve_kernel",),
    ("conv", "pointwise"): ("_convolve_kernel",),
    ("norm", "merge"): ("_merge_kernel", "_backward_merge_kernel"),
    ("norm", "whole"): ("_whole_kernel", "_backward_whole_kernel"),
}
# Of the time, by op and kernel; in order of importance.
WEIGHTS = {
    ("attention", "forward"): 4.0, ("conv", "pointwise"): 1.5,
    ("attention", "backward_dkdv"): 3.0, ("attention", "backward_dq"): 3.0,
    ("norm", "statistics"): 1.0, ("norm", "forward"): 1.0, ("norm", "backward_sums"): 1.0, ("norm", "backward"): 1.0,
    ("norm", "merge"): 0.7, ("norm", "whole"): 1.0, ("conv", "taps"): 0.7, ("conv", "backward_weight"): 0.7,
}  # fmt: skip


@dataclass(frozen=True)
class Convolution:
    """B, Cin, Cout, L, dilation, K; with `gradient` the convolution that makes the gradient of its input."""

    batch: int
    channels: int
    out_channels: int
    length: int
    dilation: int
    taps: int = 3
    gradient: bool = False
    silu: bool = True
    residual: bool = False

    def bucket(self) -> int:
        return min(max(1 << (self.out_channels - 1).bit_length(), 64), 512)


CONVOLUTIONS = [*conv.PUBLISHED, conv.FRAMES["published"], (64, 64, 25600, 2)]
# C, L of norms that take several launches, and sequences a clip, C, L of those that may take one: a frame's tokens, the
# frames of a pixel, audio.
LONG = norm.PUBLISHED[:3]
SHORT = [(16, 256, 1024), (16, 384, 256), (1024, 256, 16), (1, 512, 400), (1, 384, 1600), (1, 512, 1024)]
# C, L of a residual block's second convolution.
POINTWISE = [(64, 25600), (128, 25600), (128, 65536), (256, 6400), (256, 16384), (384, 1600), (512, 1024)]


@dataclass(frozen=True)
class Task:
    """One entry of a table: `keys` under a device's name in {op}.json; and the shapes it is timed on."""

    op: str
    kernel: str
    dtype: str
    bucket: str | None
    shapes: tuple[Any, ...]

    def __str__(self) -> str:
        return " ".join([f"{self.op}.{self.kernel}", *self.keys[1:]])

    @property
    def keys(self) -> tuple[str, ...]:
        bits = f"{getattr(torch, self.dtype).itemsize * 8}-bit"
        return self.kernel, bits, *([self.bucket] if self.bucket else [])

    @property
    def module(self) -> Any:
        return importlib.import_module(f"mmattn_kernels.triton.{self.op}")

    @property
    def weight(self) -> float:
        return WEIGHTS[self.op, self.kernel]

    @property
    def jit(self) -> tuple[str, ...]:
        return JIT.get((self.op, self.kernel), (f"_{self.kernel}_kernel",))

    def lookup(self, device_name: str) -> Config:
        return _lookup(self.module._config.tables, self.keys, self.dtype, device_name)

    def override(self, device_name: str, config: Config) -> None:
        """From here on, launches on a device of this name take this configuration."""
        _put(self.module._config.tables, device_name, self.keys, config)
        _host.forget()

    def configs(self) -> list[Config]:
        """The listed candidates; no block is wider than the bucket of channels, to which a launcher would cut it."""
        configs = CANDIDATES[self.op, self.kernel, self.keys[1]]
        if self.op != "conv" or self.bucket is None:
            return configs
        block = "BLOCK_M" if self.kernel == "backward_weight" else "BLOCK_N"
        return [config for config in configs if config[block] <= int(self.bucket)]


def _lookup(tables: dict[str, Any], keys: Sequence[str], dtype: str, device_name: str) -> Config:
    kernel, _, *bucket = keys
    return dict(_host.lookup(tables, kernel, getattr(torch, dtype), device_name, *bucket))


def _put(tables: dict[str, Any], device_name: str, keys: Sequence[str], config: Config) -> None:
    *path, last = device_name, *keys
    for key in path:
        tables = tables.setdefault(key, {})
    tables[last] = config


def make_tasks(dtypes: Iterable[str], head_dims: Iterable[int], batches: Sequence[int]) -> list[Task]:
    """All tasks, the most important ones first."""
    tasks = []
    attention = {d: tuple(attn.Shape(b, h, 16, p, t, s, d) for b in batches for h, p, t, s in attn.PUBLISHED)
                 for d in head_dims}  # fmt: skip
    norms = {kernel: tuple(norm.Shape(b, *size) for b in batches for size in LONG) for _, kernel in WEIGHTS}
    # On larger ones what is merged takes so long that merging does not count.
    norms["merge"] = tuple(norm.Shape(b, *LONG[-1]) for b in batches)
    norms["whole"] = tuple(norm.Shape(b * sequences, *size) for b in batches for sequences, *size in SHORT)
    for dtype in dtypes:
        for op, kernel in WEIGHTS:
            if op == "attention":
                tasks += [Task(op, kernel, dtype, str(d), shapes) for d, shapes in attention.items()]
            elif op == "norm":
                tasks.append(Task(op, kernel, dtype, None, norms[kernel]))
            else:
                by_bucket: dict[int, list[Convolution]] = {}
                for shape in _convolutions(kernel, batches):
                    by_bucket.setdefault(shape.bucket(), []).append(shape)
                for bucket in (256, 512, 128, 64):
                    tasks.append(Task(op, kernel, dtype, str(bucket), tuple(by_bucket[bucket])))
    return tasks


def _convolutions(kernel: str, batches: Iterable[int]) -> Iterator[Convolution]:
    for batch in batches:
        for size in CONVOLUTIONS:
            if kernel != "pointwise":
                yield Convolution(batch, *size, silu=False)
            if kernel == "taps" and size[0] == size[1]:
                yield Convolution(batch, *size, silu=False, gradient=True)
        if kernel == "pointwise":
            for channels, length in POINTWISE:
                yield Convolution(batch, channels, channels, length, 1, taps=1, residual=True)


def make_call(task: Task, shape: Any, device: str) -> Call:
    """The op's launcher on this shape, on random tensors or, where nothing will run, on tensors without values."""
    dtype = getattr(torch, task.dtype)
    generator = torch.Generator("cuda").manual_seed(0) if device == "cuda" else None

    def random_tensor(*size: int, mean: float = 0.0, deviation: float = 1.0) -> Tensor:
        x = torch.empty(size, dtype=dtype, device=device)
        return x.normal_(mean, deviation, generator=generator) if generator else x

    if task.op == "attention":
        return _attention_call(task.kernel, task.module, shape, random_tensor)
    if task.op == "norm":
        return _norm_call(task.kernel, task.module, shape, random_tensor)
    return _conv_call(task.kernel, task.module, shape, random_tensor)


def _attention_call(kernel: str, module: Any, shape: attn.Shape, random_tensor: Callable[..., Tensor]) -> Call:
    lengths = (shape.frames * shape.pixels, shape.audio_len)
    qkv = [x for n in lengths for x in random_tensor(shape.batch, n, 3, shape.heads, shape.dim).unbind(2)]
    at = CircularWindows(shape.frames, shape.window, shape.shift), shape.scale
    directions = Direction(qkv[0], *qkv[4:]), Direction(qkv[3], *qkv[1:3])
    if kernel == "forward":
        return lambda: [t for of_direction in zip(*module.forward(directions, *at), strict=True) for t in of_direction]
    d_out = [random_tensor(shape.batch, n, shape.heads, shape.dim) for n in lengths]
    out, lse = module.forward(directions, *at)
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in qkv]
    places = Direction(grads[0], *grads[4:]), Direction(grads[3], *grads[1:3])

    def backward() -> list[Tensor]:
        module.backward(directions, d_out, out, lse, *at, places)
        return grads

    return backward


def _norm_call(kernel: str, module: Any, shape: norm.Shape, random_tensor: Callable[..., Tensor]) -> Call:
    x = random_tensor(shape.batch, shape.length, shape.channels)
    parameters = random_tensor(shape.channels, mean=1.0, deviation=0.1), random_tensor(shape.channels, deviation=0.1)
    groups = {"groups": norm.GROUPS}

    def statistics() -> Any:
        return module.statistics(x, *parameters, None, None, **groups, eps=1e-5)

    if kernel == "statistics":
        return statistics
    if kernel == "forward":
        return lambda: module.forward(x, *parameters, None, None, **groups, silu=True, eps=1e-5)
    d_out = random_tensor(*x.shape)
    stats, _ = statistics()

    def backward() -> Any:
        return module.backward(d_out, x, *parameters, None, None, stats, **groups, silu=True)

    if kernel == "merge":
        return lambda: (*statistics(), *backward())
    if kernel == "whole":
        return lambda: (*module.forward(x, *parameters, None, None, **groups, silu=True, eps=1e-5), *backward())
    return backward


def _conv_call(kernel: str, module: Any, shape: Convolution, random_tensor: Callable[..., Tensor]) -> Call:
    # Without groups: the prologue is computed the same way, and the statistics' kernels do not dilute the time.
    cin, cout = shape.channels, shape.out_channels
    x = random_tensor(shape.batch, shape.length, cin)
    # Laid out so that it is read in place.
    weight = random_tensor(cout, shape.taps, cin, deviation=(cin * shape.taps) ** -0.5).transpose(1, 2)
    film = [random_tensor(shape.batch, cin, deviation=0.1) if kernel == "pointwise" else None for _ in range(2)]
    at = {"groups": 0, "dilation": shape.dilation, "silu": shape.silu}
    like_out = [random_tensor(shape.batch, shape.length, cout) for _ in range(shape.gradient or shape.residual)]
    if kernel == "backward_weight" or shape.gradient:
        d_out = like_out[0] if like_out else random_tensor(shape.batch, shape.length, cout)
        need = {"need_x": shape.gradient, "need_weight": not shape.gradient, "need_bias": False}
        stats = x.new_empty((shape.batch, 0, 2), dtype=torch.float32)
        return lambda: module.backward(d_out, x, weight, None, None, *film, stats, **at, **need)
    bias, residual = random_tensor(cout), like_out[0] if like_out else None
    return lambda: module.forward(x, weight, bias, None, None, *film, residual, **at, eps=1e-5)


@dataclass
class Candidate:
    """A configuration of one task, and what came of it.

    Attributes:
        reason: why it was dropped, "kind: details", or None.
        compiled: registers, bytes of shared memory, spills: the most of the kernels it was compiled to.
        stage: how many stages of the race it finished.
        ratio: the present configuration's time by its own, a geometric mean over the shapes, in the last of these.
        ratios: the same of each shape.
        ms: the median time on each shape.
    """

    config: Config
    present: bool = False
    reason: str | None = None
    compiled: dict[str, Any] = field(default_factory=dict)
    stage: int = 0
    ratio: float | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    ms: dict[str, float] = field(default_factory=dict)


def make_candidates(task: Task, device_name: str, limit: int | None = None) -> list[Candidate]:
    """The present configuration, and those of the list that differ from it: `limit` in all."""
    present = task.lookup(device_name)
    configs = [present, *(config for config in task.configs() if config != present)]
    return [Candidate(config, present=config is present) for config in configs[:limit]]


@dataclass(frozen=True)
class Target:
    """A GPU as far as compilation goes: its name, compute capability, and bytes of shared memory for a program."""

    device_name: str
    capability: int
    shared_limit: int

    @classmethod
    def here(cls) -> Target:
        properties = torch.cuda.get_device_properties(0)
        shared = getattr(properties, "shared_memory_per_block_optin", 0) or (99 << 10)
        return cls(torch.cuda.get_device_name(), properties.major * 10 + properties.minor, shared)


@dataclass(frozen=True)
class Job:
    """One compilation: the tasks that share a configuration, up to what a launcher alone reads of it.

    With `everything` the other kernels of the op are compiled too, as they are in the tables.
    """

    tasks: tuple[Task, ...]
    config: Config
    everything: bool


def make_jobs(entries: Iterable[tuple[Task, Sequence[Candidate]]]) -> list[tuple[Job, list[Candidate]]]:
    """The compilations that the candidates need, each with the candidates it serves, in the order of the entries."""
    grouped: dict[tuple, tuple[list[Task], list[Candidate]]] = {}
    for task, candidates in entries:
        for candidate in candidates:
            compiled = sorted((name, value) for name, value in candidate.config.items() if name != "PROGRAMS")
            tasks, served = grouped.setdefault((task.op, task.kernel, task.dtype, *compiled), ([], []))
            served.append(candidate)
            if task not in tasks:
                tasks.append(task)
    return [
        (Job(tuple(tasks), served[0].config, any(candidate.present for candidate in served)), served)
        for tasks, served in grouped.values()
    ]


class _Driver:
    """What JITFunction.run asks of a driver before it launches; with it nothing is launched."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


def _compile_loop(connection: Any, target: Target) -> None:
    """The life of a compiling process: jobs in, outcomes out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where the compiler dumps its intermediate code when it fails
    torch.set_num_threads(1)
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(_Driver(GPUTarget("cuda", target.capability, 32)))
    _host.device_name = lambda device: target.device_name
    original = JITFunction.run
    wanted: list[str] = []
    kernels: dict[int, Any] = {}

    def run(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> None:
        if not wanted or self.__name__ in wanted:
            kernel = original(self, *args, warmup=True, **kwargs)
            if self.__name__ in tuned:
                kernels[id(kernel)] = kernel

    JITFunction.run = run
    counts = count_compilations()
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        start = time.perf_counter()
        before = dict(counts)
        tuned = job.tasks[0].jit
        wanted[:] = () if job.everything else tuned
        kernels.clear()
        tables = job.tasks[0].module._config.tables
        own = copy.deepcopy(tables.get(target.device_name, {}))  # or later jobs' companions would be this one's
        try:
            for task in job.tasks:
                task.override(target.device_name, job.config)
            for task in job.tasks:
                for shape in task.shapes:
                    make_call(task, shape, "cpu")()
            outcome = usage_of(kernels.values())
            outcome["reason"] = too_much(outcome, target)
        except Exception as error:
            outcome = {"reason": f"compiling failed: {harness.reason_of(error)}"}
        tables[target.device_name] = own
        outcome |= {name: counts[name] - before[name] for name in counts}
        connection.send(outcome | {"seconds": round(time.perf_counter() - start, 3)})


def count_compilations() -> dict[str, int]:
    """Counts, from here on, of this process's compilations, and of the kernels it found in Triton's cache instead."""
    counts = {"compilations": 0, "cache_hits": 0}
    knobs = getattr(importlib.import_module("triton"), "knobs", None)

    def listener(*, cache_hit: bool, **_: Any) -> None:
        counts["cache_hits" if cache_hit else "compilations"] += 1

    if knobs is not None:  # triton >= 3.4
        knobs.compilation.listener = listener
    return counts


def usage_of(kernels: Iterable[Any]) -> dict[str, Any]:
    """The most registers, shared memory, tensor memory and spills of any of the kernels; what is unknown, None."""
    rows = []
    for kernel in kernels:
        row = {"shared": kernel.metadata.shared, "tensor_memory": getattr(kernel.metadata, "tmem_size", None) or 0}
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = _tool("cuobjdump", "-res-usage", file.name)
            if usage is None:
                rows.append(row | {"registers": None, "spills": None})
                continue
            row["registers"] = _number("REG", usage)
            row["spills"] = 0
            if _number("STACK", usage):  # without a stack there is nowhere to spill to
                code = _tool("nvdisasm", "-c", file.name)
                row["spills"] = None if code is None else len(re.findall(r"\b(?:STL|LDL)\b", code))
        rows.append(row)
    names = ("registers", "shared", "tensor_memory", "spills")
    return {name: max((row[name] for row in rows if row[name] is not None), default=None) for name in names}


def _number(name: str, usage: str) -> int:
    found = re.search(rf"{name}:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump does not say {name}")
    return int(found[1])


def _tool(name: str, *arguments: str) -> str | None:
    """The output of one of the programs in Triton's package, or None where it has none such."""
    triton = importlib.import_module("triton")
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    if not path.exists():
        return None
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def too_much(usage: dict[str, Any], target: Target) -> str | None:
    """Why a kernel of this usage is not worth running."""
    if (usage["shared"] or 0) > target.shared_limit:
        return f"shared memory: {usage['shared']} bytes of {target.shared_limit}"
    if (usage["tensor_memory"] or 0) > TENSOR_MEMORY_COLUMNS:
        return f"tensor memory: {usage['tensor_memory']} columns of {TENSOR_MEMORY_COLUMNS}"
    if usage["spills"]:
        return f"spills: {usage['spills']} accesses to local memory"
    return None


def compile_all(
    jobs: Sequence[Any],
    target: Any,
    *,
    processes: int,
    expired: Callable[[], bool] = lambda: False,
    timeout_s: float = COMPILE_TIMEOUT_S,
    loop: Callable[[Any, Any], None] = _compile_loop,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of a job, its outcome) as they come, until `expired`. A crash or a hang costs its own job alone."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "triton", "mmattn"]
    )  # imported once; no thread has run when they are forked
    waiting = collections.deque(range(len(jobs)))
    workers: dict[Any, tuple[Any, int, float]] = {}

    def start() -> Any:
        ours, theirs = context.Pipe()
        process = context.Process(target=loop, args=(theirs, target), daemon=True)
        process.start()
        theirs.close()
        return ours, process

    def give(connection: Any, process: Any) -> None:
        if waiting:
            number = waiting.popleft()
            with contextlib.suppress(OSError):  # it has ended already, which shows when its answer is read
                connection.send(jobs[number])
            workers[connection] = process, number, time.monotonic()
        else:
            connection.close()

    try:
        for _ in range(min(processes, len(jobs))):
            give(*start())
        while workers and not expired():
            for connection in multiprocessing.connection.wait(list(workers), timeout=0.5):
                process, number, _ = workers.pop(connection)
                try:
                    outcome = connection.recv()
                except (EOFError, OSError):
                    process.join(10)
                    outcome = {"reason": f"compiling failed: the process ended with code {process.exitcode}"}
                    connection, process = start() if waiting else (connection, process)
                yield number, outcome
                give(connection, process)
            for connection, (process, number, since) in list(workers.items()):
                if time.monotonic() - since > timeout_s:
                    del workers[connection]
                    process.kill()
                    yield number, {"reason": f"compiling failed: not done after {timeout_s:g} s"}
                    if waiting:
                        give(*start())
    finally:
        for process, _, _ in workers.values():
            process.kill()


class OutOfTime(Exception):
    """A task has used its share of the budget."""


def prepare(
    task: Task,
    shape: Any,
    candidates: Sequence[Candidate],
    *,
    device_name: str,
    check: Callable[[], None],
    make: Callable[[Task, Any, str], Call] = make_call,
    capture: Callable[[Call], Call] = harness.captured,
) -> dict[int, Call]:
    """The calls to be timed, by the candidate's number; the first one's results are what the others are compared with.

    Those that fail or disagree are dropped: their `reason` says so. Raises what the first one raises.
    """
    base = candidates[0]
    limit = harness.DISAGREEMENT[task.dtype]
    task.override(device_name, base.config)
    call = make(task, shape, "cuda")
    expected = _tensors(call())
    calls = {}
    try:
        for number, candidate in enumerate(candidates):
            check()
            task.override(device_name, candidate.config)
            try:
                error = harness.relative_difference(_tensors(call()), expected)
                if not error <= limit:
                    candidate.reason = f"disagrees: relative difference {error:.1e}, {shape}"
                else:
                    calls[number] = capture(call)
            except Exception as error:
                candidate.reason = f"running failed: {harness.reason_of(error)}, {shape}"
            if number not in calls and candidate is base:
                raise RuntimeError(base.reason)
    finally:
        task.override(device_name, base.config)
    return calls


def _tensors(result: Any) -> list[Tensor]:
    result = result if isinstance(result, (tuple, list)) else [result]
    return [x.detach() for x in result if isinstance(x, Tensor) and x.numel()]


def race(
    candidates: Sequence[Candidate],
    shapes: Sequence[Any],
    prepare: Callable[[Any, Sequence[Candidate]], dict[int, Call]],
    sample: Callable[[Call], float],
    check: Callable[[], None],
    rounds: Sequence[int] = ROUNDS,
) -> None:
    """Fill in the candidates' ratios to the first one that is not dropped, in stages; each takes the best third on.

    `prepare(shape, candidates)` makes the calls, `check()` raises OutOfTime. A stage that is cut short leaves no trace,
    so what it would have decided is decided by the one before.
    """
    order = random.Random(0)
    alive = [candidate for candidate in candidates if candidate.reason is None]
    for stage, count in enumerate(rounds, 1):
        if len(alive) < 2:
            return
        if stage > 1:
            base, *others = alive
            others.sort(key=lambda candidate: -(candidate.ratio or 0))
            alive = [base, *others[: max(2, math.ceil(len(alive) / 3))]]
        figures: dict[int, dict[str, tuple[float, float]]] = {id(candidate): {} for candidate in alive}
        for shape in shapes:
            check()
            entrants = [candidate for candidate in alive if candidate.reason is None]
            calls = prepare(shape, entrants)
            ms = _sample_rounds(calls, entrants, count, sample, check, order)
            for number, times in ms.items():
                speed = numpy.median([base / own for base, own in zip(ms[0], times, strict=True)])
                figures[id(entrants[number])][str(shape)] = float(speed), float(numpy.median(times))
            del calls
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        alive = [candidate for candidate in alive if candidate.reason is None]
        for candidate in alive:
            candidate.stage = stage
            candidate.ratios = {shape: speed for shape, (speed, _) in figures[id(candidate)].items()}
            candidate.ms = {shape: ms for shape, (_, ms) in figures[id(candidate)].items()}
            candidate.ratio = math.exp(sum(map(math.log, candidate.ratios.values())) / len(candidate.ratios))


def start_race(candidates: Sequence[Candidate], *arguments: Any) -> None:
    """A race against the first candidate that works: it starts again where that one is dropped in it."""
    while True:
        base = next((candidate for candidate in candidates if candidate.reason is None), None)
        try:
            return race(candidates, *arguments)
        except Exception:
            if base is None or base.reason is None:  # then another configuration would do no better
                raise


def _sample_rounds(
    calls: dict[int, Call],
    entrants: Sequence[Candidate],
    rounds: int,
    sample: Callable[[Call], float],
    check: Callable[[], None],
    order: random.Random,
) -> dict[int, list[float]]:
    """Milliseconds of each call by round, every round in an order of its own; one that fails is dropped."""
    ms: dict[int, list[float]] = {number: [] for number in calls}
    for _ in range(rounds):
        check()
        for number in order.sample(list(ms), len(ms)):
            try:
                ms[number].append(sample(calls[number]))
            except Exception as error:
                entrants[number].reason = f"running failed: {harness.reason_of(error)}"
                if number == 0:
                    raise
                del ms[number]
    return ms


def choose(candidates: Sequence[Candidate]) -> Candidate | None:
    """The one to take: the best of the last stage if it wins by more than the margin, or has nothing to win against.

    None where no candidate works.
    """
    alive = [candidate for candidate in candidates if candidate.reason is None]
    present = next((candidate for candidate in alive if candidate.present), None)
    last = max((candidate.stage for candidate in alive), default=0)
    if last == 0:
        return present
    best = max((candidate for candidate in alive if candidate.stage == last), key=lambda c: c.ratio or 0)
    return best if present is None or (best.ratio or 0) > MARGIN else present


def report(task: Task, candidates: Sequence[Candidate], note: str = "") -> str:
    """One line: what was chosen, its ratio, how many candidates there were, and how many dropped out and why."""
    kinds = collections.Counter(str(c.reason).split(":")[0] for c in candidates if c.reason)
    dropped = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "none"
    chosen = choose(candidates)
    if chosen is None:
        verdict = "nothing to choose from"
    elif chosen.stage == 0:
        verdict = "not timed"
    elif chosen.present:
        others = [c.ratio or 0 for c in candidates if not c.present and c.stage == chosen.stage and not c.reason]
        verdict = f"keeps {_show(chosen.config)}" + (f", best other {max(others):.3f}x" if others else "")
    else:
        verdict = f"{chosen.ratio:.3f}x by {_show(chosen.config)}, was {_show(candidates[0].config)}"
    return f"{task}: {verdict}; {len(candidates)} candidates, dropped: {dropped}" + (f"; {note}" if note else "")


def _show(config: Config) -> str:
    return " ".join(f"{name.removeprefix('BLOCK_')}={value}" for name, value in config.items())


def render(tables: dict[str, Any]) -> str:
    """The text of a table: a configuration a line."""

    def level(value: dict[str, Any], indent: str) -> str:
        if not any(isinstance(inner, dict) for inner in value.values()):
            return json.dumps(value)
        lines = (f"{indent}  {json.dumps(name)}: {level(inner, indent + '  ')}" for name, inner in value.items())
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"

    return level(tables, "") + "\n"


def updated(text: str, device_name: str, chosen: Iterable[tuple[Task, Config]]) -> str:
    """The text of a table with these configurations under the device's name, where a lookup would not find them anyway.

    The name goes behind the longest one that begins it, kernels and buckets in the order of the defaults.
    """
    tables = json.loads(text)
    for task, config in chosen:
        others = {name: table for name, table in tables.items() if name != device_name}
        own = tables.get(device_name, {})
        rest = {keys: leaf for keys, leaf in _leaves(own, len(task.keys)) if keys != task.keys}
        tables[device_name] = {}
        for keys, leaf in rest.items():
            _put(tables, device_name, keys, leaf)
        if _lookup(others, task.keys, task.dtype, device_name) != config:
            _put(tables, device_name, task.keys, config)
    own = tables.pop(device_name, {})
    if not own:
        return render(tables)
    # A lookup goes by the longest name, so the order is for readers.
    names = list(json.loads(text))
    if device_name not in names:
        before = max((name for name in names if device_name.startswith(name)), key=len, default=names[-1])
        names.insert(names.index(before) + 1, device_name)
    return render({name: _ordered(own, tables["default"]) if name == device_name else tables[name] for name in names})


def _leaves(table: dict[str, Any], depth: int) -> Iterator[tuple[tuple[str, ...], Config]]:
    for name, value in table.items():
        if depth == 1:
            yield (name,), value
        else:
            for keys, leaf in _leaves(value, depth - 1):
                yield (name, *keys), leaf


def _ordered(value: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """The keys in the order of `like`, what it does not have behind them."""
    names = [*(name for name in like if name in value), *(name for name in value if name not in like)]
    return {
        name: _ordered(value[name], like.get(name, {})) if isinstance(value[name], dict) else value[name]
        for name in names
    }


def write_tables(folder: Path, device_name: str, chosen: Sequence[tuple[Task, Config]]) -> list[Path]:
    """Write the tables that change into the folder, which may be the one they came from; returns their paths."""
    written = []
    for op in sorted({task.op for task, _ in chosen}):
        text = (TABLES / f"{op}.json").read_text()
        new = updated(text, device_name, [(task, config) for task, config in chosen if task.op == op])
        if new != text:
            folder.mkdir(parents=True, exist_ok=True)
            written.append(folder / f"{op}.json")
            written[-1].write_text(new)
    return written


def parse(argv: list[str] | None) -> argparse.Namespace:
    prog = "python bench/tune.py"
    examples = (
        "--write",
        "--kernels attention.forward conv --batch 4 --budget-s 120 --out-tables out",
        "--device cpu --target sm_100 --kernels norm",
    )
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Finds the fastest configurations of the Triton kernels on this GPU, for the kernels' tables.",
        epilog="examples:\n" + "".join(f"  {prog} {arguments}\n" for arguments in examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = sorted({op for op, _ in WEIGHTS}) + [f"{op}.{kernel}" for op, kernel in WEIGHTS]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default=device, help="found by itself; cpu compiles, and times nothing")
    add("--target", choices=TARGETS, help="with --device cpu, what to compile for; default sm_90")
    add("--kernels", nargs="+", choices=names, metavar="K", help=f"of {' '.join(names)}; default all")
    add("--dtype", nargs="+", choices=("float32", "bfloat16", "float16"), default=["bfloat16"], help="default bfloat16")
    add("--head-dim", nargs="+", type=int, choices=(16, 32, 64, 128), default=[64], help="of attention; default 64")
    add("--batch", nargs="+", type=int, default=[4, 16], metavar="B", help="default 4 16")
    add("--limit", type=int, metavar="N", help="at most so many candidates a kernel, the present one included")
    add("--budget-s", type=float, default=420.0, metavar="S", help="seconds for everything; default 420")
    add("--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="that compile; default: one a core")
    add("--json", type=Path, default=Path("out/tune.json"), help="default out/tune.json")
    add("--write", action="store_true", help="change the tables beside the kernels")
    add("--out-tables", type=Path, metavar="DIR", help="write the tables that change there")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    if args.device == "cuda" and torch.version.hip:
        parser.error("--device cuda: this is an AMD GPU; expected one of NVIDIA")
    if args.device == "cuda" and args.target:
        parser.error("--target goes with --device cpu; on a GPU that one is the target")
    if args.device == "cpu" and (args.write or args.out_tables):
        parser.error("--write and --out-tables need --device cuda: without a GPU nothing is timed")
    if len({getattr(torch, dtype).itemsize for dtype in args.dtype}) < len(args.dtype):
        parser.error(f"--dtype {' '.join(args.dtype)}: those of one width share the tables' entries; name one of them")
    for name in ("budget_s", "processes"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name):g}; expected more than 0")
    if min(args.batch) < 1:
        parser.error(f"--batch is {min(args.batch)}; expected 1 or more")
    if args.limit is not None and args.limit < 2:
        parser.error(f"--limit is {args.limit}; expected 2 or more: the present configuration and another")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing")
    return args


@dataclass
class Run:
    """One run of the program: what it was asked, what it has found so far."""

    args: argparse.Namespace
    target: Target
    entries: list[tuple[Task, list[Candidate]]]
    header: dict[str, Any]
    notes: dict[Task, str] = field(default_factory=dict)
    seconds: dict[Task, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.started = time.monotonic()

    def left(self) -> float:
        return self.args.budget_s - (time.monotonic() - self.started)

    def save(self) -> None:
        rows = []
        for task, candidates in self.entries:
            chosen = choose(candidates)
            rows.append({
                "op": task.op, "keys": task.keys, "dtype": task.dtype, "note": self.notes.get(task),
                "seconds": self.seconds.get(task),
                "shapes": [str(shape) for shape in task.shapes],
                "chosen": chosen and chosen.config, "changed": bool(chosen and not chosen.present),
                "candidates": [asdict(candidate) for candidate in candidates],
            })  # fmt: skip
        self.args.json.parent.mkdir(parents=True, exist_ok=True)
        self.args.json.write_text(json.dumps({**self.header, "tasks": rows}, indent=1) + "\n")


def compile_candidates(run: Run) -> None:
    """Compile for all tasks; drop what does not fit. A present configuration that spills stays: it is what there is."""
    jobs = make_jobs(run.entries)
    start = time.monotonic()
    on_cuda = run.args.device == "cuda"
    for _, served in jobs:
        for candidate in served:
            candidate.reason = "out of time: not compiled"
    totals = collections.Counter[str]()
    outcomes = compile_all(
        [job for job, _ in jobs],
        run.target,
        processes=run.args.processes,
        expired=lambda: on_cuda and run.left() < (1 - COMPILE_SHARE) * run.args.budget_s,
    )
    for number, outcome in tqdm(outcomes, total=len(jobs), desc="compiling", unit="case", file=sys.stderr):
        totals.update({name: outcome.pop(name, 0) for name in ("compilations", "cache_hits")})
        reason = outcome.pop("reason")
        for candidate in jobs[number][1]:
            spilling = candidate.present and str(reason).startswith("spills")
            candidate.reason, candidate.compiled = None if spilling else reason, outcome
    seconds = time.monotonic() - start
    run.header["compilation"] = {"jobs": len(jobs), "seconds": seconds, "processes": run.args.processes, **totals}
    run.save()
    count = sum(len(candidates) for _, candidates in run.entries)
    tqdm.write(
        f"compiled {count} candidates as {totals['compilations']} kernels, {totals['cache_hits']} found in Triton's "
        f"cache, in {seconds:.0f} s by {run.args.processes} processes"
    )


def time_candidates(run: Run) -> None:
    """Race the candidates of each task, in its share of the time; the next tasks' ops then run with what has won."""
    sample = harness.sampler("cuda")
    gc.freeze()  # some versions of torch collect garbage before every capture, of which there are thousands here
    counts = count_compilations()
    end = time.monotonic() + run.left()
    weights = [task.weight for task, _ in run.entries]
    with tqdm(run.entries, desc="timing", unit="case", file=sys.stderr) as progress:
        for number, (task, candidates) in enumerate(progress):
            progress.set_description(f"timing {task}")
            now = time.monotonic()
            deadline = now + (end - now) * weights[number] / sum(weights[number:])

            def check(deadline: float = deadline) -> None:
                if time.monotonic() > deadline:
                    raise OutOfTime

            ready = functools.partial(prepare, task, device_name=run.target.device_name, check=check)
            try:
                start_race(candidates, task.shapes, ready, sample, check)
            except OutOfTime:
                run.notes[task] = "out of time"
            except KeyboardInterrupt:
                run.notes[task] = "interrupted"
                raise
            except Exception as error:
                run.notes[task] = f"gave up: {harness.reason_of(error)}"
            finally:
                run.header["compiled_again"] = counts["compilations"]
                run.seconds[task] = round(time.monotonic() - now, 3)
                run.save()
                tqdm.write(report(task, candidates, run.notes.get(task, "")))
            chosen = choose(candidates)
            if chosen is not None:
                task.override(run.target.device_name, chosen.config)
    if counts["compilations"]:
        tqdm.write(f"{counts['compilations']} kernels were compiled again: what the processes compiled was not found")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    target = Target.here() if args.device == "cuda" else Target(*TARGETS[args.target or "sm_90"])
    wanted = set(args.kernels or {op for op, _ in WEIGHTS})
    tasks = make_tasks(args.dtype, args.head_dim, args.batch)
    tasks = [task for task in tasks if {task.op, f"{task.op}.{task.kernel}"} & wanted]
    entries = [(task, make_candidates(task, target.device_name, args.limit)) for task in tasks]
    header = harness.describe_machine(args.device) | {"target": asdict(target), "budget_s": args.budget_s}
    run = Run(args, target, entries, header)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what has been found is kept then too
    try:
        compile_candidates(run)
        if args.device == "cpu":
            for task, candidates in entries:
                tqdm.write(report(task, candidates))
            print(f"Nothing was timed: there is no GPU here. Compiled for {target.device_name}; results: {args.json}")
            return 0
        time_candidates(run)
    except KeyboardInterrupt:
        tqdm.write("interrupted: what has been found so far is kept")
    run.save()
    chosen = [(task, c.config) for task, candidates in entries if (c := choose(candidates)) and not c.present]
    for folder in [*([TABLES] if args.write else []), *([args.out_tables] if args.out_tables else [])]:
        for path in write_tables(folder, target.device_name, chosen):
            print(f"table: {path}")
    print(f"{len(chosen)} of {len(entries)} entries change; results: {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
