# SPDX-License-Identifier: MIT
"""Dilated convolutions against their peers, on the same values in the same process.

conv    the convolution alone, K = 3, from channels-first tensors [B, C, L] (the baseline, as in the release) or
        channels-last ones (mmattn)
block   the audio residual block: GroupNorm, SiLU, that convolution; GroupNorm, FiLM, SiLU, a 1x1 convolution; plus the
        skip, a 1x1 convolution where the width changes
frames  the convolution over the frames of a video: of [B*P, C, F], copied from [B, F, C, P] and back (the baseline), or
        of the tokens [B, F*P, C] with P as the dilation

Each returns a contiguous output in its own layout, as what follows reads it. Gradients are those of the inputs and of
all parameters. Work: 2·K·Cin·Cout·L·B FLOP of each convolution forward, twice that backward. `--help` has examples.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass

import cli
import harness
import peers
import report
import torch
import torch.nn.functional as F
from harness import NotApplicable, Provider
from peers import Peer
from torch import Tensor, nn

import mmattn

GROUPS = 32
WHAT = ("conv", "block", "frames")
WORK = {"forward": 1, "backward": 2, "both": 3}
BASELINE = "eager"
OWN = "mmattn"
FIRST = "mmattn, channels-first input"
LAST = "eager, channels last"
HEADER = {
    "op": "conv",
    "baseline": BASELINE,
    "bound": "matmul",
    "versus": [BASELINE, cli.COMPILE, report.BEST],
    "other_result": {},
}
# Cin, Cout, L, dilation: levels of the published U-Net; the last two follow a concatenation or a change of width.
PUBLISHED = [
    (128, 128, 25600, 2),
    (256, 256, 6400, 16),
    (256, 256, 6400, 512),
    (384, 384, 1600, 128),
    (512, 512, 400, 1),
    (768, 384, 1600, 64),
    (1024, 512, 400, 2),
]
QUICK = PUBLISHED[::3]
SMALL = [(64, 64, 200, 3), (96, 64, 77, 40)]
FRAMES = {"published": (256, 256, 16 * 1024, 1024), "small": (64, 64, 5 * 12, 12)}
Function = Callable[[Tensor, Tensor, Tensor], Tensor]  # of x, weight, bias


@dataclass(frozen=True)
class Shape:
    """B, Cin, Cout, L, dilation; of `frames`, L = F*P tokens and the dilation is P."""

    what: str
    batch: int
    channels: int
    out_channels: int
    length: int
    dilation: int

    @property
    def frames(self) -> int:
        return self.length // self.dilation

    def __str__(self) -> str:
        line = f"L{self.length} d{self.dilation}"
        if self.what == "frames":
            line = f"F{self.frames} P{self.dilation}"
        return f"{self.what} B{self.batch} Cin{self.channels} Cout{self.out_channels} {line}"

    def weights(self) -> dict[str, tuple[int, ...]]:
        """Sizes of the convolutions' weights, [Cout, Cin, K], under their published names."""
        cin, cout = self.channels, self.out_channels
        if self.what != "block":
            return {"": (cout, cin, 3)}
        sizes = {"audio_in_layers.2.audio_conv.": (cout, cin, 3), "audio_out_layers.3.audio_conv.": (cout, cout, 1)}
        return sizes if cin == cout else sizes | {"audio_skip_connection.audio_conv.": (cout, cin, 1)}

    def norms(self) -> dict[str, int]:
        """Channels of the normalisations, under their published names."""
        if self.what != "block":
            return {}
        return {"audio_in_layers.0.GroupNorm.": self.channels, "audio_out_layers.0.GroupNorm.": self.out_channels}

    def gflop(self, mode: str) -> float:
        products = sum(cout * cin * k for cout, cin, k in self.weights().values())
        return 2e-9 * products * self.length * self.batch * WORK[mode]

    def gbytes(self, mode: str, dtype: torch.dtype) -> float:
        positions, cin, cout = self.batch * self.length, self.channels, self.out_channels
        parameters = sum(cout * cin * k + cout for cout, cin, k in self.weights().values())
        parameters += 2 * sum(self.norms().values())
        film = self.batch * 2 * cout if self.what == "block" else 0
        return peers.least_gbytes(mode, positions * cin + film + parameters, positions * cout, dtype)

    def short(self) -> Shape:
        if self.what == "frames":
            return dataclasses.replace(self, length=4 * self.frames, dilation=4)
        return dataclasses.replace(self, length=min(self.length, 64))

    def parameters(self, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        random, norms, weights = peers.random(device, dtype), self.norms(), self.weights()
        made = {}
        for name in sorted(norms | weights):  # so ordered, they are as the modules have them
            if name in norms:
                weight = 1 + 0.1 * random(norms[name])
            else:
                cout, cin, k = weights[name]
                weight = random(cout, cin, k) * (cin * k) ** -0.5
            made |= {f"{name}weight": weight, f"{name}bias": 0.1 * random(weight.shape[0])}
        return {name: value.requires_grad_() for name, value in made.items()}

    def inputs(self, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor]:
        random = peers.random(device, dtype)
        if self.what == "frames":
            sizes = [(self.batch, self.frames, c, self.dilation) for c in (self.channels, self.out_channels)]
        else:
            sizes = [(self.batch, c, self.length) for c in (self.channels, self.out_channels)]
        film = [random(self.batch, 2 * self.out_channels)] if self.what == "block" else []
        return [random(*sizes[0]), *film], random(*sizes[1])


def conv_eager(shape: Shape) -> Function:
    d = shape.dilation
    return lambda x, weight, bias: F.conv1d(x, weight, bias, padding=d, dilation=d)


def conv_channels_last(shape: Shape) -> Function:
    """conv2d over [B, C, 1, L], which in these strides is torch's channels_last; conv1d would copy them."""
    d = shape.dilation

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        image = x.transpose(1, 2).unsqueeze(2)
        out = F.conv2d(image, weight.unsqueeze(2), bias, padding=(0, d), dilation=(1, d))
        return out.squeeze(2).transpose(1, 2).contiguous()

    return function


def frames_eager(shape: Shape) -> Function:
    """[B, F, C, P] to [B*P, C, F] and back."""

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = x.permute(0, 3, 2, 1).flatten(0, 1)
        out = F.conv1d(rows, weight, bias, padding=1).unflatten(0, (x.shape[0], -1))
        return out.permute(0, 3, 2, 1).contiguous()

    return function


def frames_channels_last(shape: Shape) -> Function:
    """conv2d with a 3x1 kernel over the image [B, C, F, P], which the tokens are in channels_last."""
    frames = shape.frames

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        image = x.unflatten(1, (frames, -1)).permute(0, 3, 1, 2)
        out = F.conv2d(image, weight.unsqueeze(3), bias, padding=(1, 0))
        return out.permute(0, 2, 3, 1).flatten(1, 2).contiguous()

    return function


def fused(shape: Shape) -> Function:
    """mmattn.dilated_conv1d; of the frames, in however many tokens there are."""
    frames = shape.frames

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        dilation = x.shape[1] // frames if shape.what == "frames" else shape.dilation
        return mmattn.dilated_conv1d(x, weight, bias, dilation=dilation)

    return function


class _Norm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.GroupNorm = nn.GroupNorm(GROUPS, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.GroupNorm(x)


class _Conv(nn.Module):
    def __init__(self, channels: int, out_channels: int, k: int, dilation: int = 1) -> None:
        super().__init__()
        padding = dilation * (k // 2)
        self.audio_conv = nn.Conv1d(channels, out_channels, k, padding=padding, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        return self.audio_conv(x)


class EagerBlock(nn.Module):
    """The audio residual block of torch's modules, composed and named as in the release."""

    def __init__(self, channels: int, out_channels: int, *, dilation: int) -> None:
        super().__init__()
        self.audio_in_layers = nn.Sequential(_Norm(channels), nn.SiLU(), _Conv(channels, out_channels, 3, dilation))
        self.audio_out_layers = nn.Sequential(
            _Norm(out_channels), nn.SiLU(), nn.Dropout(0.0), _Conv(out_channels, out_channels, 1)
        )
        same = channels == out_channels
        self.audio_skip_connection = nn.Identity() if same else _Conv(channels, out_channels, 1)

    def forward(self, audio: Tensor, film: Tensor) -> Tensor:
        h = self.audio_in_layers(audio)
        norm, *rest = self.audio_out_layers
        scale, shift = film.unsqueeze(-1).chunk(2, 1)
        h = norm(h) * (1 + scale) + shift
        for layer in rest:
            h = layer(h)
        return self.audio_skip_connection(audio) + h


FUNCTIONS = {
    "conv": {BASELINE: conv_eager, OWN: fused, LAST: conv_channels_last},
    "frames": {BASELINE: frames_eager, OWN: fused, LAST: frames_channels_last, cli.COMPILE: frames_eager},
}
BLOCKS = {
    BASELINE: EagerBlock,
    OWN: mmattn.DilatedConvBlock,
    FIRST: mmattn.DilatedConvBlock,
    cli.COMPILE: EagerBlock,
}
PROVIDERS = (BASELINE, OWN, FIRST, LAST, cli.COMPILE)


def make_peer(name: str, shape: Shape, parameters: dict[str, Tensor], mode: str) -> Peer:
    values = list(parameters.values())
    if shape.what == "block":
        module = BLOCKS[name](shape.channels, shape.out_channels, dilation=shape.dilation)
        module.to(values[0].device, values[0].dtype).load_state_dict(parameters)
        call = peers.compiled(module, mode) if name == cli.COMPILE else module
        last = (lambda x: peers.tokens(x).transpose(1, 2),) if name == OWN else ()
        return Peer(lambda audio, film, *_: call(audio, film), list(module.parameters()), *last)
    if shape.what == "frames" and shape.length % shape.dilation:
        raise NotApplicable(f"needs whole frames: L={shape.length} is no multiple of P={shape.dilation}")
    function = FUNCTIONS[shape.what][name](shape)
    if name == cli.COMPILE:
        function = peers.compiled(function, mode)
    if name not in (OWN, LAST):
        return Peer(function, values)
    if shape.what == "conv":
        return Peer(function, values, peers.tokens, peers.swapped)
    return Peer(function, values, tokens_of_frames, lambda y: y.unflatten(1, (shape.frames, -1)).transpose(2, 3))


def tokens_of_frames(x: Tensor) -> Tensor:
    """[B, F, C, P] as [B, F*P, C] in memory."""
    return x.transpose(2, 3).flatten(1, 2).contiguous()


def own_call(shape: Shape, dtype: str, mode: str, device: str) -> tuple[harness.Call, harness.Compare]:
    return peers.own_call(make_peer, OWN, shape, dtype, mode, device)


def providers_of(args: argparse.Namespace, shape: Shape, dtype: str, mode: str) -> list[Provider]:
    apply = BLOCKS if shape.what == "block" else FUNCTIONS[shape.what]
    names = [name for name in args.providers if name in apply]
    op = "spatial_conv2d" if shape.what == "frames" else "dilated_conv1d"
    notes = dict.fromkeys((OWN, FIRST), cli.chosen(op, args.device, dtype, shape.channels))
    return peers.providers(args, make_peer, shape, dtype, mode, names, notes)


def parse(argv: list[str] | None) -> argparse.Namespace:
    examples = (
        "--quick",
        "--device cuda --batch 4 --json bench/results/conv-cuda.json",
        "--what conv block --shape 1,256,256,6400,16 --modes forward --threads 1",
    )
    parser = cli.make_parser(
        "conv", "dilated convolutions", examples, PROVIDERS, _shape, "B,CIN,COUT,L,DILATION", modes=("forward", "both")
    )
    parser.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT), help="all; see the top of the file")
    return cli.parse(parser, argv)


def _shape(text: str) -> tuple[int, ...]:
    try:
        batch, channels, out_channels, length, dilation = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not five integers B,CIN,COUT,L,DILATION") from None
    if min(batch, channels, out_channels, length, dilation) < 1 or channels % GROUPS or out_channels % GROUPS:
        raise argparse.ArgumentTypeError(f"{text!r}: expected positive sizes, channels in multiples of {GROUPS}")
    return batch, channels, out_channels, length, dilation


def shapes_of(args: argparse.Namespace) -> list[Shape]:
    if args.shapes == "custom":
        return [Shape(what, *size) for what in args.what for size in args.shape]
    sizes = SMALL if args.shapes == "small" else QUICK if args.quick else PUBLISHED
    frames = FRAMES[args.shapes]
    return [
        Shape(w, b, *size) for w in args.what for b in args.batch for size in ([frames] if w == "frames" else sizes)
    ]


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return cli.run(args, HEADER, shapes_of(args), providers_of)


if __name__ == "__main__":
    sys.exit(main())
