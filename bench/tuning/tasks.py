# SPDX-License-Identifier: MIT
"""What is tuned: the entries of the kernels' tables, the shapes each is timed on, and the calls that take it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import attn
import conv
import norm
import torch
from harness import Call
from torch import Tensor

from mmattn_kernels import CircularWindows, Direction
from mmattn_kernels.triton import _host
from tuning import tables
from tuning.candidates import CANDIDATES, Config

# The functions that take an entry of a table: only these are compiled for a candidate.
JIT = {
    ("conv", "taps"): ("_convolve_kernel",),
    ("conv", "pointwise"): ("_convolve_kernel",),
    ("norm", "merge"): ("_merge_kernel", "_backward_merge_kernel"),
    ("norm", "single_launch"): ("_single_launch_kernel", "_backward_single_launch_kernel"),
}
# Of the time, by op and kernel; in order of importance.
WEIGHTS = {
    ("attention", "forward"): 4.0, ("conv", "pointwise"): 1.5,
    ("attention", "backward_dkdv"): 3.0, ("attention", "backward_dq"): 3.0,
    ("norm", "statistics"): 1.0, ("norm", "forward"): 1.0, ("norm", "backward_sums"): 1.0, ("norm", "backward"): 1.0,
    ("norm", "merge"): 0.7, ("norm", "single_launch"): 1.0, ("conv", "taps"): 0.7, ("conv", "backward_weight"): 0.7,
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
        return tables.lookup(self.module._config.tables, self.keys, self.dtype, device_name)

    def override(self, device_name: str, config: Config) -> None:
        """From here on, launches on a device of this name take this configuration."""
        tables.put(self.module._config.tables, device_name, self.keys, config)
        _host.clear_caches()

    def configs(self) -> list[Config]:
        """The listed candidates; no block is wider than the bucket of channels, to which a launcher would cut it."""
        configs = CANDIDATES[self.op, self.kernel, self.keys[1]]
        if self.op != "conv" or self.bucket is None:
            return configs
        block = "BLOCK_M" if self.kernel == "backward_weight" else "BLOCK_N"
        return [config for config in configs if config[block] <= int(self.bucket)]


def make_tasks(dtypes: Iterable[str], head_dims: Iterable[int], batches: Sequence[int]) -> list[Task]:
    """All tasks, the most important ones first."""
    tasks = []
    attention = {d: tuple(attn.Shape(b, h, 16, p, t, s, d) for b in batches for h, p, t, s in attn.PUBLISHED)
                 for d in head_dims}  # fmt: skip
    norms = {kernel: tuple(norm.Shape(b, *size) for b in batches for size in LONG) for _, kernel in WEIGHTS}
    # On larger ones what is merged takes so long that merging does not count.
    norms["merge"] = tuple(norm.Shape(b, *LONG[-1]) for b in batches)
    norms["single_launch"] = tuple(norm.Shape(b * sequences, *size) for b in batches for sequences, *size in SHORT)
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
    if kernel == "single_launch":
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
