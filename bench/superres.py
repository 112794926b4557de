# SPDX-License-Identifier: MIT
"""The super-resolution network against the same one composed as published (bench/published_superres.py).

One forward call, as a step of sampling makes it. Rows of float32 compute in it. Rows of bfloat16 are mmdiffusion and
the tuned peers with parameters and inputs in that dtype, against the published network in fp32 (the baseline) and under
autocast to it. Tuned is what an expert would make of the same network in plain torch: channels last, fused attention,
and torch.compile of that. Work is that of the published network's matrix products and convolutions, whatever an
implementation saves.

Parts are those of bench/unet.py, the 3x3 convolutions by the resolution of their output; a convolution of mmdiffusion
includes the norm, FiLM and SiLU in front of it. `--help` has examples.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from dataclasses import dataclass
from typing import Any

import cli
import harness
import peers
import published_superres as published
import report
import torch
import torch._inductor.config
import unet as coupled
from cli import COMPILED, TUNED
from harness import NotApplicable, Provider
from published import filled as reference_parameters
from torch import Tensor, nn

BASELINE = "published"
AUTOCAST = "published, autocast"
OWN = "mmdiffusion"
PROVIDERS = (BASELINE, OWN, AUTOCAST, TUNED, COMPILED)
HEADER = {
    "op": "superres",
    "own": OWN,
    "baseline": BASELINE,
    "bound": "matmul",
    "versus": [BASELINE, AUTOCAST, TUNED, COMPILED],
    "other_result": {},
    "disagreement": {"float32": 2e-3, "bfloat16": 8e-2, "float16": 2e-2},
}
ONE, ATTENTION, NORM = "1x1", "self-attention", "norm, FiLM, SiLU"
RESAMPLE = "resampling, concatenation"


@dataclass(frozen=True)
class Shape:
    """Images of the published network: B, height and width, width of the first level."""

    batch: int
    size: int
    channels: int

    def __str__(self) -> str:
        return f"B{self.batch} 3x{self.size}x{self.size} C{self.channels}"

    def config(self) -> dict[str, Any]:
        return {
            "in_channels": 3,
            "model_channels": self.channels,
            "out_channels": 6,
            "num_res_blocks": 2,
            "attention_resolutions": (8, 16, 32),
            "channel_mult": (1, 1, 2, 2, 4, 4),
            "num_heads": 4,
            "use_scale_shift_norm": True,
        }

    def short(self) -> Shape:
        """The smallest image for the same parameters."""
        return dataclasses.replace(self, batch=1, size=32)

    def inputs(self, dtype: torch.dtype, device: str) -> list[Tensor]:
        """x, low_res, timesteps."""
        random = peers.random("cpu", dtype)
        x, low_res = (random(self.batch, 3, size, size) for size in (self.size, self.size // 4))
        return [x.to(device) for x in (x, low_res, torch.linspace(960, 100, self.batch).long())]

    def gflop(self, mode: str) -> float:
        return sum(parts_of_work(self).values())

    def gbytes(self, mode: str, dtype: torch.dtype) -> float:
        images = self.batch * 3 * self.size**2
        parameters = sum(p.numel() for p in skeleton(self).parameters())
        return peers.least_gbytes(mode, 17 * images // 16 + parameters, 2 * images, dtype)


PUBLISHED, SMALL = (256, 192), (64, 32)


def skeleton(shape: Shape) -> published.PublishedSuperResolutionUNet:
    """The published network without memory behind it."""
    with torch.device("meta"):
        return published.PublishedSuperResolutionUNet(**shape.config())


@functools.lru_cache(maxsize=1)
def filled(shape: Shape) -> dict[str, Tensor]:
    """311 M random numbers take longer to draw than a call."""
    return reference_parameters({key: value.shape for key, value in skeleton(shape).state_dict().items()})


@functools.lru_cache(maxsize=3)
def network(kind: str, shape: Shape, dtype: torch.dtype, device: str) -> nn.Module:
    """OWN, BASELINE or TUNED, with the filled parameters; `shape` is a short one, as larger images have the same."""
    parameters = {key: value.to(device, dtype) for key, value in filled(shape).items()}
    if kind == OWN:
        try:
            from mmdiffusion import SuperResolutionUNet
        except ImportError as error:
            raise NotApplicable(f"mmdiffusion cannot be imported: {error}") from error
        return SuperResolutionUNet.from_published(parameters, image_size=shape.size)
    unet = skeleton(shape).to_empty(device=device).to(dtype)
    unet.load_state_dict(parameters)
    return published.tuned(unet.eval()) if kind == TUNED else unet.eval()


def network_of(name: str, shape: Shape, dtype: str, device: str) -> nn.Module:
    """A provider's network: the published one is in fp32, whatever the row."""
    kind = {COMPILED: TUNED, AUTOCAST: BASELINE}.get(name, name)
    return network(kind, shape.short(), torch.float32 if kind == BASELINE else getattr(torch, dtype), device)


def make_call(name: str, shape: Shape, dtype: str, mode: str, device: str) -> harness.Call:
    """What is timed: it returns the output."""
    low = getattr(torch, dtype)
    if name == AUTOCAST and low == torch.float32:
        raise NotApplicable("fp32 needs no autocast")
    unet = network_of(name, shape, dtype, device)
    inputs = shape.inputs(torch.float32 if name in (BASELINE, AUTOCAST) else low, device)
    if name in (TUNED, COMPILED):
        inputs = [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs]
    function: Any = peers.compiled(unet, mode) if name == COMPILED else unet
    autocast = functools.partial(torch.autocast, device, low, enabled=name == AUTOCAST)

    def forward() -> Tensor:
        with torch.no_grad(), autocast():
            return function(*inputs)

    return forward


def own_call(shape: Shape, dtype: str, mode: str, device: str) -> tuple[harness.Call, harness.Compare]:
    """The call of mmdiffusion alone, for --base, and the tensors of its result that are compared."""
    return make_call(OWN, shape, dtype, mode, device), harness.detached


def memory_probe(name: str, shape: Shape, dtype: str, mode: str, threads: int) -> tuple[harness.Call, harness.Call]:
    """For a fresh process: the call on the smallest image and on the whole one, with the same network.

    What mmattn keeps between calls, a packed copy of each weight, is there before the whole call.
    """
    torch.set_num_threads(threads)
    torch._inductor.config.compile_threads = 1  # workers would outlive this process
    full = make_call(name, shape, dtype, mode, "cpu")
    # The compiler is no part of the call's memory, and compiles for one size.
    return (full if name == COMPILED else make_call(name, shape.short(), dtype, mode, "cpu")), full


def _convolutions(shape: Shape) -> list[str]:
    return [f"3x3 at {size}" for size in (shape.size >> level for level in range(6))]


def _at(height: int) -> str:
    return f"3x3 at {height}"


def places_of_published() -> list[coupled.Place]:
    return [
        (published.Conv3x3, "forward", lambda conv, x: _at(x.shape[-1])),
        (nn.Conv2d, "forward", ONE),
        (published.Attention, "forward", ATTENTION),
        (published.Norm, "forward", NORM),
        (published.FiLM, "forward", NORM),
        (nn.SiLU, "forward", NORM),
        (published.Pool, "forward", RESAMPLE),
        (published.Repeat, "forward", RESAMPLE),
        (torch, "cat", RESAMPLE),
    ]


def places_of_own() -> list[coupled.Place]:
    from mmattn import _layers
    from mmdiffusion.model import superres

    return [
        (superres, "convolve_frames", lambda x, *_, **__: _at(x.shape[2])),
        (superres, "convolve", ONE),
        (superres.ImageAttention, "forward", ATTENTION),
        (_layers, "normalise_frames", NORM),
        (superres, "pool_frames", RESAMPLE),
        (superres, "repeat_frames", RESAMPLE),
        (torch, "cat", RESAMPLE),
    ]


def parts_of(shape: Shape) -> list[str]:
    return [*_convolutions(shape), ONE, ATTENTION, NORM, RESAMPLE, coupled.REST]


@functools.cache
def parts_of_work(shape: Shape) -> dict[str, float]:
    """GFLOP by part, counted on the published network."""
    inputs = shape.inputs(torch.float32, "meta")
    return coupled.work_of(places_of_published(), parts_of(shape), lambda: skeleton(shape)(*inputs))


def divide(name: str, shape: Shape, device: str, call: harness.Call) -> dict[str, dict[str, float]]:
    """Milliseconds and GFLOP of a call by part."""
    places, gflop = places_of_own() if name == OWN else places_of_published(), parts_of_work(shape)
    times = coupled.times_of(places, parts_of(shape), device, call)
    return {part: {"ms": ms, "gflop": gflop[part]} for part, ms in times.items()}


def providers_of(args: argparse.Namespace, shape: Shape, dtype: str, mode: str) -> list[Provider]:
    def provider(name: str) -> Provider:
        # In the rows of another dtype the published network in fp32 is the same once more.
        has_parts = name == OWN or (name == BASELINE and dtype == "float32") or name in (AUTOCAST, TUNED)
        stored = "float32" if name in (BASELINE, AUTOCAST) else dtype
        probed = "float32" if name == BASELINE else dtype
        computes = "in float32" if name == BASELINE and dtype != "float32" else ""
        return Provider(
            name,
            build=lambda: make_call(name, shape, dtype, mode, args.device),
            gflop=shape.gflop(mode),
            gbytes=shape.gbytes(mode, getattr(torch, stored)),
            probe=(memory_probe, (name, shape, probed, mode, args.threads)),
            note=cli.chosen("spatial_conv2d", args.device, dtype, shape.channels) if name == OWN else computes,
            divide=functools.partial(divide, name, shape, args.device) if has_parts else None,
        )

    return [provider(name) for name in args.providers]


def parse(argv: list[str] | None) -> argparse.Namespace:
    examples = ("--quick --breakdown", "--dtype bfloat16 --breakdown", "--shape 4,128,64 --threads 1")
    parser = cli.make_parser(
        "superres",
        "the super-resolution network",
        examples,
        PROVIDERS,
        _shape,
        "B,SIZE,CHANNELS",
        modes=("forward",),
        batches=(1, 4),
        quick_shapes="small",
    )
    parser.add_argument("--breakdown", action="store_true", help="print how the time of a call is divided")
    args = cli.parse(parser, argv)
    if args.modes != ["forward"]:
        parser.error("--modes: forward")
    return args


def _shape(text: str) -> tuple[int, ...]:
    try:
        batch, size, channels = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not three integers B,SIZE,CHANNELS") from None
    if min(batch, size, channels) < 1 or size % 32 or channels % 32:
        raise argparse.ArgumentTypeError(f"{text!r}: expected B from 1, SIZE and CHANNELS in multiples of 32")
    return batch, size, channels


def shapes_of(args: argparse.Namespace) -> list[Shape]:
    if args.shapes == "custom":
        return [Shape(*size) for size in args.shape]
    return [Shape(batch, *(SMALL if args.shapes == "small" else PUBLISHED)) for batch in args.batch]


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    header = HEADER | {"versus": [peer for peer in HEADER["versus"] if peer in args.providers]}
    status = cli.run(args, header, shapes_of(args), providers_of)
    if args.breakdown:
        print(coupled.breakdown(*report.read_json(args.json)))
    return status


if __name__ == "__main__":
    sys.exit(main())
