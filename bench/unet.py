# SPDX-License-Identifier: MIT
"""The coupled U-Net against the same network composed as published (bench/published.py), with the same parameters.

forward   both predicted noises, without a graph
both      a training step without the optimizer: loss = MSE(video) + MSE(audio), and the gradients of all parameters

Rows of float32 compute in it. Rows of bfloat16 and float16 are mmdiffusion and the tuned peers with parameters and
inputs in that dtype, against the published network in fp32 (the baseline) and under autocast to it. Tuned is what an
expert would make of the same network in plain torch (bench/published.py), and torch.compile of that. Work is that of
the published network's matrix products and convolutions, forward, and three times that with gradients, whatever an
implementation saves of it.

On a CPU the process keeps freed memory (mmattn.keep_freed_memory), for all providers: every time is of the steady
state. How long the first calls of a fresh process take depends on its malloc above all.

Parts: the forward pass is run once more with a clock around the functions of each part; what is called inside a part
belongs to it, and what no part has is the rest. Attention includes its norm and its projections. "audio" is all of that
stream outside of RS-MMA. A convolution of mmdiffusion includes the norm, FiLM and SiLU in front of it, which for the
published network are a part of their own. `--help` has examples.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import cli
import harness
import peers
import published
import report
import torch
import torch._inductor.config
import torch.nn.functional as F
from cli import COMPILED, TUNED
from harness import NotApplicable, Provider
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mmattn

BASELINE = "published"
AUTOCAST = "published, autocast"
HALF = "published, half"
OWN = "mmdiffusion"
GRAPH = "mmdiffusion, CUDA graph"
PROVIDERS = (BASELINE, OWN, AUTOCAST, TUNED, COMPILED, HALF, GRAPH, cli.COMPILE)
HEADER = {
    "op": "unet",
    "own": OWN,
    "baseline": BASELINE,
    "bound": "matmul",
    "versus": [BASELINE, AUTOCAST, HALF, TUNED, COMPILED],
    "other_result": {},
    # The peer under autocast is off by 1 to 2% in bfloat16, its gradients by 3%; rounding adds up over sixty layers.
    "disagreement": {"float32": 2e-3, "bfloat16": 8e-2, "float16": 2e-2},
}
WORK = {"forward": 1, "both": 3}
REST = "rest"


@dataclass(frozen=True)
class Shape:
    """Clips of the published configuration: B, frames, height and width, audio positions, width of the first level."""

    batch: int
    frames: int
    size: int
    audio_len: int
    channels: int

    def __str__(self) -> str:
        return f"B{self.batch} {self.frames}x3x{self.size}x{self.size} 1x{self.audio_len} C{self.channels}"

    def config(self) -> dict[str, Any]:
        return {
            "video_size": [self.frames, 3, self.size, self.size],
            "audio_size": [1, self.audio_len],
            "model_channels": self.channels,
            "video_out_channels": 3,
            "audio_out_channels": 1,
            "num_res_blocks": 2,
            "cross_attention_resolutions": [2, 4, 8],
            "cross_attention_windows": [1, 4, 8],
            "cross_attention_shift": True,
            "video_attention_resolutions": [2, 4, 8],
            "audio_attention_resolutions": [-1],
            "channel_mult": [1, 2, 3, 4],
            "num_heads": 4,
            "num_head_channels": self.channels // 2,
            "use_scale_shift_norm": True,
            "resblock_updown": True,
        }

    def short(self) -> Shape:
        """The smallest clip for the same parameters."""
        return dataclasses.replace(self, batch=1, size=8, audio_len=64 * self.frames)

    def inputs(self, dtype: torch.dtype, device: str) -> list[Tensor]:
        """Video, audio, timesteps."""
        random = peers.random("cpu", dtype)
        video = random(self.batch, self.frames, 3, self.size, self.size)
        audio = random(self.batch, 1, self.audio_len)
        return [x.to(device) for x in (video, audio, torch.linspace(900, 100, self.batch).long())]

    def shifts(self) -> list[int]:
        """One for each block that shifts, in the order in which they run."""
        generator = torch.Generator().manual_seed(0)
        blocks = (block for block in skeleton(self).modules() if isinstance(block, published.CrossAttention))
        return [mmattn.draw_shift(self.frames, b.local_window, generator=generator) for b in blocks if b.window_shift]

    def gflop(self, mode: str) -> float:
        return WORK[mode] * sum(parts_of_work(self).values())

    def gbytes(self, mode: str, dtype: torch.dtype) -> float:
        clips = self.batch * (3 * self.frames * self.size**2 + self.audio_len)
        parameters = sum(p.numel() for p in skeleton(self).parameters())
        return peers.least_gbytes(mode, clips + parameters, clips, dtype)


PUBLISHED, SMALL = (16, 64, 25600, 128), (8, 16, 1024, 32)


@functools.cache
def skeleton(shape: Shape) -> published.PublishedUNet:
    """The published network without memory behind it."""
    with torch.device("meta"):
        return published.PublishedUNet(**shape.config())


@functools.lru_cache(maxsize=3)
def network(kind: str, shape: Shape, dtype: torch.dtype, device: str) -> nn.Module:
    """OWN, BASELINE, HALF or TUNED, with the filled parameters; `shape` is a short one: longer clips have the same."""
    stored = torch.float32 if kind == HALF else dtype
    shapes = {key: value.shape for key, value in skeleton(shape).state_dict().items()}
    parameters = {key: value.to(device, stored) for key, value in published.filled(shapes).items()}
    if kind == OWN:
        try:
            from mmdiffusion import CoupledUNet
        except ImportError as error:
            raise NotApplicable(f"mmdiffusion cannot be imported: {error}") from error
        return CoupledUNet.from_published(parameters, **shape.config(), dropout=0.0)
    unet = published.PublishedUNet(**shape.config()).to(device, stored)
    unet.load_state_dict(parameters)
    if kind == TUNED:
        return published.tuned(unet)
    return published.to_half(unet, dtype) if kind == HALF else unet


def is_own(name: str) -> bool:
    return report.is_own(HEADER, name)


def is_low(name: str) -> bool:
    """Whether a provider's parameters and inputs have the dtype of the row: those of the others are in fp32."""
    return is_own(name) or name in (HALF, TUNED, COMPILED)


def network_of(name: str, shape: Shape, dtype: str, device: str) -> nn.Module:
    """A provider's network."""
    kind = OWN if is_own(name) else {COMPILED: TUNED, AUTOCAST: BASELINE, cli.COMPILE: BASELINE}.get(name, name)
    return network(kind, shape.short(), getattr(torch, dtype) if is_low(name) else torch.float32, device)


def make_call(name: str, shape: Shape, dtype: str, mode: str, device: str) -> harness.Call:
    """What is timed: it returns both outputs, or the loss and the gradients of all parameters."""
    if name == GRAPH and device != "cuda":
        raise NotApplicable("CUDA graphs need CUDA")
    low = getattr(torch, dtype)
    if name in (AUTOCAST, HALF) and low == torch.float32:
        raise NotApplicable("fp32 needs no autocast" if name == AUTOCAST else "fp32 is no half precision")
    unet = network_of(name, shape, dtype, device).train(mode == "both")
    inputs, shifts = shape.inputs(low if is_low(name) else torch.float32, device), shape.shifts()
    function: Any = unet
    if name in (COMPILED, cli.COMPILE):
        function = peers.compiled(unet, mode)
    if name == GRAPH and mode == "forward":
        function = unet.capture(*inputs)
    autocast = functools.partial(torch.autocast, device, low, enabled=name == AUTOCAST)

    if mode == "forward":

        def forward() -> tuple[Tensor, Tensor]:
            with torch.no_grad(), autocast():
                return function(*inputs, shifts=shifts)

        return forward
    scale = 1024 if low == torch.float16 else 1  # gradients of a mean over a clip are below what fp16 can hold
    noises = [x.flip(-1) for x in shape.inputs(torch.float32, device)[:2]]
    parameters = list(unet.parameters())

    def step() -> list[Tensor]:
        with autocast():
            outputs = function(*inputs, shifts=shifts)
        loss = sum(F.mse_loss(out.float(), noise) for out, noise in zip(outputs, noises, strict=True))
        return [loss, *torch.autograd.grad(scale * loss, parameters)]

    return harness.captured(step) if name == GRAPH else step


def comparable(unet: nn.Module, result: list[Tensor]) -> list[Tensor]:
    """Of the loss and the gradients in a network's own order: the loss, and all gradients by published name, as one."""
    loss, *gradients = result
    twin = copy.deepcopy(unet).requires_grad_(False)
    for parameter, gradient in zip(twin.parameters(), gradients, strict=True):
        parameter.copy_(gradient)
    named = twin.to_published() if hasattr(twin, "to_published") else twin.state_dict()
    return [loss.detach(), torch.cat([named[name].flatten() for name in sorted(named)])]


def own_call(shape: Shape, dtype: str, mode: str, device: str) -> tuple[harness.Call, harness.Compare]:
    """The call of mmdiffusion alone, for --base, and the tensors of its result that are compared."""
    compare = functools.partial(comparable, network_of(OWN, shape, dtype, device))
    return make_call(OWN, shape, dtype, mode, device), harness.detached if mode == "forward" else compare


def memory_probe(name: str, shape: Shape, dtype: str, mode: str, threads: int) -> tuple[harness.Call, harness.Call]:
    """For a fresh process: the call on the smallest clip and on the whole one, with the same network.

    What mmattn keeps between calls, a packed copy of each weight, is there before the whole call.
    """
    torch.set_num_threads(threads)
    torch._inductor.config.compile_threads = 1  # workers would outlive this process
    full = make_call(name, shape, dtype, mode, "cpu")
    # The compiler is no part of the call's memory, and compiles for one size.
    return (full if name in (COMPILED, cli.COMPILE) else make_call(name, shape.short(), dtype, mode, "cpu")), full


# Parts: where a part's functions are, as (owner, name, part); a part that is a function is given the call's arguments.
Place = tuple[Any, str, "str | Callable[..., str]"]
SPATIAL, TEMPORAL, ONE, NORM = "spatial convolution", "temporal convolution", "video 1x1", "norm, FiLM, SiLU"
WITHIN_FRAMES, OVER_FRAMES, CROSS = "self-attention in frames", "self-attention over frames", "RS-MMA"
RESAMPLE, AUDIO = "resampling, concatenation", "audio"
PARTS = (SPATIAL, TEMPORAL, ONE, WITHIN_FRAMES, OVER_FRAMES, CROSS, AUDIO, NORM, RESAMPLE, REST)


def places_of_published(is_tuned: bool = False) -> list[Place]:
    forwards: dict[type[nn.Module], str | Callable[..., str]] = {
        published.SpatialConv: SPATIAL,
        published.TemporalConv: TEMPORAL,
        published.VideoConv: lambda conv, *_: ONE if conv.video_conv.kernel_size == (1, 1, 1) else SPATIAL,
        published.AudioConv: AUDIO,
        published.SelfAttention: AUDIO,
        published.SpatialAttention: WITHIN_FRAMES,
        published.TemporalAttention: OVER_FRAMES,
        published.CrossAttention: CROSS,
        published.Norm: NORM,
        published.FiLM: NORM,
        nn.SiLU: NORM,
        published.Resample: RESAMPLE,
    }
    classes = published.TUNED if is_tuned else {}
    return [(classes.get(cls, cls), "forward", part) for cls, part in forwards.items()] + [(torch, "cat", RESAMPLE)]


def places_of_own() -> list[Place]:
    from mmdiffusion.model import blocks

    return [
        (blocks, "convolve_frames", SPATIAL),
        (blocks, "convolve", lambda x, layer, **_: ONE if layer.kernel_size == (1,) else TEMPORAL),
        (blocks.AudioBlock, "forward", AUDIO),
        (blocks.AudioHead, "forward", AUDIO),
        (blocks.SpatialAttention, "forward", WITHIN_FRAMES),
        (blocks.TemporalAttention, "forward", OVER_FRAMES),
        (mmattn.RandomShiftAttention, "forward", CROSS),
        (mmattn, "group_norm", NORM),
        (blocks.VideoBlock, "_project", ONE),
        (blocks.VideoBlock, "_pool", RESAMPLE),
        (blocks.VideoBlock, "_repeat", RESAMPLE),
        (torch, "cat", RESAMPLE),
    ]


@contextlib.contextmanager
def divided(places: list[Place], clock: Callable[[], float]) -> Iterator[Counter[str]]:
    """While open, adds up by part what the clock advances in calls of the places."""
    spent: Counter[str] = Counter()
    inside = False

    def clocked(function: Callable[..., Any], part: str | Callable[..., str]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal inside
            first = next(x for x in args if not isinstance(x, nn.Module))
            dim = (first if isinstance(first, Tensor) else first[0]).dim()
            if inside or dim < 3:  # the time embedding is no stream
                return function(*args, **options)
            name = AUDIO if dim == 3 else part if isinstance(part, str) else part(*args, **options)
            inside, start = True, clock()
            try:
                return function(*args, **options)
            finally:
                spent[name] += clock() - start
                inside = False

        return call

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(mmattn._replay, "LARGEST", 0))  # or no function of a part would be called
        for owner, name, part in places:
            stack.enter_context(mock.patch.object(owner, name, clocked(getattr(owner, name), part)))
        yield spent


def work_of(places: list[Place], parts: Sequence[str], call: Callable[[], Any]) -> dict[str, float]:
    """GFLOP of a call by part, as torch counts those of its own modules."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        with divided(places, counter.get_total_flops) as spent:
            call()
        spent[REST] = counter.get_total_flops() - spent.total()
    return {part: 1e-9 * spent[part] for part in parts}


def times_of(places: list[Place], parts: Sequence[str], device: str, call: harness.Call) -> dict[str, float]:
    """Milliseconds of a call by part: the faster of two calls."""

    def clock() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() * 1e3

    runs = []
    for _ in range(2):
        with divided(places, clock) as spent:
            start = clock()
            call()
            spent[REST] = clock() - start - spent.total()
        runs.append(spent)
    best = min(runs, key=Counter.total)
    return {part: best[part] for part in parts}


@functools.cache
def parts_of_work(shape: Shape) -> dict[str, float]:
    """GFLOP of the forward pass by part, counted on the published network."""
    inputs = shape.inputs(torch.float32, "meta")
    return work_of(places_of_published(), PARTS, lambda: skeleton(shape)(*inputs, shifts=shape.shifts()))


def divide(name: str, shape: Shape, device: str, call: harness.Call) -> dict[str, dict[str, float]]:
    """Milliseconds and GFLOP of a forward call by part."""
    places, gflop = places_of_own() if is_own(name) else places_of_published(name == TUNED), parts_of_work(shape)
    return {part: {"ms": ms, "gflop": gflop[part]} for part, ms in times_of(places, PARTS, device, call).items()}


def providers_of(args: argparse.Namespace, shape: Shape, dtype: str, mode: str) -> list[Provider]:
    def provider(name: str) -> Provider:
        # In the rows of another dtype the published network in fp32 is the same once more.
        is_new = name in (AUTOCAST, TUNED, HALF, OWN) or (name == BASELINE and dtype == "float32")
        has_parts = mode == "forward" and is_new
        stored = dtype if is_low(name) or name == AUTOCAST else "float32"
        computes = "" if stored == dtype else "in float32"
        return Provider(
            name,
            build=lambda: make_call(name, shape, dtype, mode, args.device),
            gflop=shape.gflop(mode),
            gbytes=shape.gbytes(mode, getattr(torch, stored)),
            probe=(memory_probe, (name, shape, stored, mode, args.threads)),
            note=cli.chosen("dilated_conv1d", args.device, dtype, shape.channels) if is_own(name) else computes,
            compare=None
            if mode == "forward"
            else lambda result: comparable(network_of(name, shape, dtype, args.device), result),
            divide=functools.partial(divide, name, shape, args.device) if has_parts else None,
        )

    return [provider(name) for name in args.providers]


def breakdown(header: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The parts of each row that has them, as aligned plain text."""
    lines = []
    for row in rows:
        if "parts" not in row:
            continue
        total = sum(part["ms"] for part in row["parts"].values())
        lines.append(f"\n{row['provider']}, {row['shape']}, {row['dtype']}: {report.number(total)} ms")
        lines.append(f"{'part':28}{'ms':>8}{'of time':>9}{'GFLOP':>8}{'GFLOP/s':>9}{'of matmul':>11}")
        for name, part in row["parts"].items():
            rate = 1e3 * part["gflop"] / part["ms"] if part["ms"] else 0.0
            share = rate / header["ceilings"]["matmul_gflop_per_s"][row["dtype"]]
            cells = f"{report.number(part['ms']):>8}{report.percent(part['ms'] / total):>9}"
            if report.number(part["gflop"]) != "0" and name != REST:
                cells += f"{report.number(part['gflop']):>8}{rate:9.0f}{report.percent(share):>11}"
            lines.append(f"{name:28}{cells}")
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    examples = (
        "--quick --breakdown",
        "--dtype bfloat16 --modes forward --breakdown",
        "--device cuda --batch 1 4 --json bench/results/unet-cuda.json",
        "--shape 1,16,32,12800,64 --threads 1",
    )
    parser = cli.make_parser(
        "unet",
        "the coupled U-Net",
        examples,
        PROVIDERS,
        _shape,
        "B,F,SIZE,T,CHANNELS",
        modes=("forward", "both"),
        batches=(1, 4),
        quick_shapes="small",
    )
    parser.add_argument("--breakdown", action="store_true", help="print how the time of a forward pass is divided")
    args = cli.parse(parser, argv, on_request=[cli.COMPILE, GRAPH, HALF])
    if "backward" in args.modes:
        parser.error("--modes: forward or both")
    return args


def _shape(text: str) -> tuple[int, ...]:
    try:
        batch, frames, size, audio_len, channels = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not five integers B,F,SIZE,T,CHANNELS") from None
    if min(batch, size, audio_len, channels) < 1 or frames < 8 or size % 8 or audio_len % 64 or channels % 32:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected B from 1, F from 8, SIZE in multiples of 8, T of 64, CHANNELS of 32"
        )
    if audio_len // 64 < frames:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected T of at least 64 F, a position a frame where it is shortest"
        )
    return batch, frames, size, audio_len, channels


def shapes_of(args: argparse.Namespace) -> list[Shape]:
    if args.shapes == "custom":
        return [Shape(*size) for size in args.shape]
    return [Shape(batch, *(SMALL if args.shapes == "small" else PUBLISHED)) for batch in args.batch]


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    # A step of the published network takes a minute on a few cores, and warming up is one more.
    header = HEADER | {"versus": [peer for peer in HEADER["versus"] if peer in args.providers]}
    status = cli.run(args, header, shapes_of(args), providers_of, minimum={"both": 2})
    if args.breakdown:
        print(breakdown(*report.read_json(args.json)))
    return status


if __name__ == "__main__":
    sys.exit(main())
