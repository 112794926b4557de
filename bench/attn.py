# SPDX-License-Identifier: MIT
"""Random-shift attention against its peers, on the same tensors in the same process.

Every provider takes the packed projections of the module, [B, L, 3, H, D] for video and audio, and returns contiguous
[B, L, H, D] outputs of both directions, as the projection that follows reads them. Gradients are those of the packed
tensors. Work: 4·D·H·B·Lq·Lk FLOP a direction forward, 2.5 times that backward. `--help` has examples.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cli
import harness
import published
import report
import torch
import torch.nn.functional as F
from harness import NotApplicable, Provider
from torch import Tensor

import mmattn

BASELINE = "SDPA over views"
FULL = "full SDPA"
HEADER = {
    "op": "attention",
    "baseline": BASELINE,
    "bound": "matmul",
    "versus": [BASELINE, report.BEST, FULL],
    "other_result": {FULL: "unless S = F"},
}
WORK = {"forward": 1.0, "backward": 2.5, "both": 3.5}
TENSORS_MOVED = {"forward": 4, "backward": 8, "both": 12}  # forward q k v o; backward q k v o dO dQ dK dV
Attend = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Shape:
    """B, H, F frames of P tokens, T audio positions, window S, D; the shift is in the middle of its range."""

    batch: int
    heads: int
    frames: int
    pixels: int
    audio_len: int
    window: int
    dim: int

    @property
    def segment(self) -> int:
        return self.audio_len // self.frames

    @property
    def shift(self) -> int:
        return (self.frames - self.window) // 2

    @property
    def scale(self) -> float:
        return self.dim**-0.5

    def __str__(self) -> str:
        names = {"batch": "B", "heads": "H", "frames": "F", "pixels": "P", "audio_len": "T", "window": "S", "dim": "D"}
        return " ".join(f"{letter}{getattr(self, name)}" for name, letter in names.items())

    def gflop(self, mode: str, *, full: bool = False) -> float:
        video, audio = self.frames * self.pixels, self.audio_len
        pairs = 2 * video * audio if full else (video * self.segment + audio * self.pixels) * self.window
        return 4e-9 * self.dim * self.heads * self.batch * pairs * WORK[mode]

    def gbytes(self, mode: str, dtype: torch.dtype) -> float:
        elements = self.batch * (self.frames * self.pixels + self.audio_len) * self.heads * self.dim
        return 1e-9 * elements * dtype.itemsize * TENSORS_MOVED[mode]


PUBLISHED = [(4, 1024, 6400, 1), (6, 256, 1600, 4), (8, 64, 400, 8), (8, 64, 400, 16)]  # H, P, T, S of each U-Net level
SMALL = [(2, 16, 160, 1), (2, 16, 160, 4), (2, 16, 160, 16)]
# --shapes scaling: the second level of the published U-Net at twice its frames, so that no window is of all, and one
# size at a time; a frame has as much sound in all.
SWEEP_BASE = {"frames": 32, "window": 4, "pixels": 256}
SWEEPS = {"frames": (8, 16, 32, 64, 128), "window": (1, 2, 4, 8, 16), "pixels": (64, 256, 1024, 2304)}
SWEEP_HEADS, SWEEP_SEGMENT = 6, 100


def fused(shape: Shape) -> Attend:
    """mmattn.random_shift_attention."""
    geometry = {"frames": shape.frames, "window": shape.window, "shift": shape.shift}
    return lambda video, audio: mmattn.random_shift_attention(*video.unbind(2), *audio.unbind(2), **geometry)


def _whole_segments(shape: Shape) -> None:
    if shape.audio_len % shape.frames:
        raise NotApplicable(f"needs whole segments: T={shape.audio_len} is no multiple of F={shape.frames}")


def _sdpa_by_frame(frames: int, windows: Callable[[Tensor], Tensor]) -> Attend:
    """SDPA with (batch, frame) as its batch; windows(x) makes [B*F, H, S*n, D] of keys or values [B, L, H, D]."""

    def direction(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries = q.unflatten(1, (frames, -1)).flatten(0, 1).transpose(1, 2)  # [B*F, H, n, D]
        out = F.scaled_dot_product_attention(queries, windows(k), windows(v))
        return out.transpose(1, 2).reshape(q.shape)

    return _both_directions(direction)


def sdpa_over_views(shape: Shape) -> Attend:
    """The bar to beat: torch's SDPA on overlapping views of K and V, rolled by R segments, padded by S-1."""
    _whole_segments(shape)
    frames, window, shift = shape.frames, shape.window, shape.shift

    def windows(x: Tensor) -> Tensor:
        batch, length, heads, dim = x.shape
        segment = length // frames
        x = x.roll(-shift * segment, 1)
        x = torch.cat([x, x[:, : (window - 1) * segment]], 1)
        strides = x.stride()
        size = (batch, frames, heads, window * segment, dim)
        x = x.as_strided(size, (strides[0], segment * strides[1], strides[2], strides[1], strides[3]))
        return x.flatten(0, 1)  # [B*F, H, S*n, D]

    return _sdpa_by_frame(frames, windows)


def sdpa_over_unfold(shape: Shape) -> Attend:
    """The best that torch's SDPA was brought to here, see published.sdpa_over_unfold."""
    _whole_segments(shape)
    at = shape.frames, shape.window, shape.shift
    return _both_directions(lambda q, k, v: published.sdpa_over_unfold(q, k, v, *at))


def sdpa_over_copies(shape: Shape) -> Attend:
    """The same with every window copied, as S rolled copies side by side: more memory, a cheaper backward."""
    _whole_segments(shape)
    if shape.window == shape.frames:
        raise NotApplicable("a window of all frames needs no copies: see SDPA over unfold")
    frames, window, shift = shape.frames, shape.window, shape.shift

    def windows(x: Tensor) -> Tensor:
        x = x.unflatten(1, (frames, -1))  # [B, F, n, H, D]
        x = torch.cat([x.roll(-(shift + j), 1) for j in range(window)], 2)  # [B, F, S*n, H, D]
        return x.flatten(0, 1).transpose(1, 2)

    return _sdpa_by_frame(frames, windows)


def full_sdpa(shape: Shape) -> Attend:
    """Attention of every video token to every audio position and back: more work, and another result unless S = F."""

    def direction(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2).contiguous()

    return _both_directions(direction)


def frame_loop(shape: Shape) -> Attend:
    """A Python loop over the frames that gathers each window by index; the indices are made beforehand."""
    _whole_segments(shape)
    frames, window, shift, scale = shape.frames, shape.window, shape.shift, shape.scale
    indices: dict[tuple[int, torch.device], list[Tensor]] = {}

    def window_indices(length: int, device: torch.device) -> list[Tensor]:
        if (length, device) not in indices:
            segment = length // frames
            offsets = torch.arange(window * segment, device=device)
            indices[length, device] = [((i + shift) * segment + offsets) % length for i in range(frames)]
        return indices[length, device]

    def direction(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = []
        for queries, index in zip(q.chunk(frames, 1), window_indices(k.shape[1], k.device), strict=True):
            keys, values = k.index_select(1, index), v.index_select(1, index)
            scores = torch.einsum("bqhd,bkhd->bhqk", queries * scale, keys)
            weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
            out.append(torch.einsum("bhqk,bkhd->bqhd", weights, values))
        return torch.cat(out, 1)

    return _both_directions(direction)


def flex_attention(shape: Shape) -> Attend:
    """torch.compile'd FlexAttention with a block mask made beforehand for this one shift. CUDA."""
    _whole_segments(shape)
    from torch.nn.attention import flex_attention as flex

    video_len, audio_len, frames = shape.frames * shape.pixels, shape.audio_len, shape.frames
    window, shift = shape.window, shape.shift
    torch.compiler.reset()  # else the shapes before this one use up the limit on recompilations
    attend = torch.compile(flex.flex_attention, dynamic=False)

    def mask(q_segment: int, k_segment: int) -> Any:
        def inside(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k // k_segment - q // q_segment - shift + 2 * frames) % frames < window

        q_len, k_len = q_segment * frames, k_segment * frames
        return flex.create_block_mask(inside, None, None, q_len, k_len, device="cuda")

    masks = {video_len: mask(shape.pixels, shape.segment), audio_len: mask(shape.segment, shape.pixels)}
    if video_len == audio_len:
        raise NotApplicable("F*P = T: one mask for both directions is not handled here")

    def direction(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return attend(q, k, v, block_mask=masks[q.shape[2]]).transpose(1, 2).contiguous()

    return _both_directions(direction)


def _both_directions(direction: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Attend:
    def attend(video: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        (video_q, video_k, video_v), (audio_q, audio_k, audio_v) = video.unbind(2), audio.unbind(2)
        return direction(video_q, audio_k, audio_v), direction(audio_q, video_k, video_v)

    return attend


ATTENDS = {
    BASELINE: sdpa_over_views,
    "mmattn": fused,
    "SDPA over unfold": sdpa_over_unfold,
    "SDPA over copies": sdpa_over_copies,
    FULL: full_sdpa,
    "frame loop": frame_loop,
    "FlexAttention": flex_attention,
}


@dataclass
class Inputs:
    """The tensors of one case, shared by its providers: packed projections and the gradients of both outputs."""

    video: Tensor
    audio: Tensor
    d_video: Tensor
    d_audio: Tensor

    @classmethod
    def make(cls, shape: Shape, dtype: torch.dtype, device: str, *, grad: bool) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)

        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device).to(dtype)

        channels = (shape.heads, shape.dim)
        lengths = (shape.frames * shape.pixels, shape.audio_len)
        packed = [random(shape.batch, length, 3, *channels).requires_grad_(grad) for length in lengths]
        return cls(*packed, *(random(shape.batch, length, *channels) for length in lengths))


def make_call(attend: Attend, inputs: Inputs, mode: str) -> harness.Call:
    """What is timed, on these inputs."""
    return harness.timed(attend, (inputs.video, inputs.audio), (inputs.d_video, inputs.d_audio), mode)


def own_call(shape: Shape, dtype: str, mode: str, device: str) -> tuple[harness.Call, harness.Compare]:
    """The call of mmattn alone, for --base, and the tensors of its result that are compared."""
    inputs = Inputs.make(shape, getattr(torch, dtype), device, grad=mode != "forward")
    return make_call(fused(shape), inputs, mode), harness.detached


def memory_probe(shape: Shape, dtype: str, name: str, mode: str, threads: int) -> tuple[harness.Call, harness.Call]:
    """For a fresh process: the same call at a small size and at the full one."""
    torch.set_num_threads(threads)
    small = dataclasses.replace(shape, pixels=min(shape.pixels, 4), audio_len=shape.frames * min(shape.segment, 4))
    calls = []
    for size in (small, shape):
        inputs = Inputs.make(size, getattr(torch, dtype), "cpu", grad=mode != "forward")
        calls.append(make_call(ATTENDS[name](size), inputs, mode))
    return calls[0], calls[1]


def providers_of(args: argparse.Namespace, shape: Shape, dtype: str, mode: str) -> list[Provider]:
    """The chosen providers of one case; their inputs are made once, by the first that asks."""
    made: list[Inputs] = []

    def build(name: str) -> harness.Call:
        if name == "FlexAttention" and args.device != "cuda":
            raise NotApplicable("measured on CUDA alone; on the CPU it has no backward")
        attend = ATTENDS[name](shape)
        if not made:
            made.append(Inputs.make(shape, getattr(torch, dtype), args.device, grad=mode != "forward"))
        return make_call(attend, made[0], mode)

    def note(name: str) -> str:
        if name == "mmattn":
            return cli.chosen("random_shift_attention", args.device, dtype, shape.dim)
        if name == FULL and shape.window < shape.frames:
            return f"another result, {shape.gflop(mode, full=True) / shape.gflop(mode):.0f}x the work"
        return ""

    return [
        Provider(
            name,
            build=lambda name=name: build(name),
            gflop=shape.gflop(mode, full=name == FULL),
            gbytes=shape.gbytes(mode, getattr(torch, dtype)),
            same=name != FULL or shape.window == shape.frames,
            probe=(memory_probe, (shape, dtype, name, mode, args.threads)),
            note=note(name),
        )
        for name in args.providers
    ]


def parse(argv: list[str] | None) -> argparse.Namespace:
    examples = (
        "--quick",
        "--device cuda --dtype bfloat16 --batch 1 16 --json bench/results/attn-cuda.json",
        "--shapes custom --shape 1,4,16,64,400,8,64 --modes forward --threads 1",
        "--shapes scaling --modes forward --json out/scaling.json",
    )
    what, shape = "random-shift attention", "B,H,F,P,T,S,D"
    parser = cli.make_parser("attn", what, examples, ATTENDS, _shape, shape, more_shapes=["scaling"])
    return cli.parse(parser, argv)


def _shape(text: str) -> Shape:
    try:
        shape = Shape(*(int(part) for part in text.split(",")))
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is not seven integers B,H,F,P,T,S,D") from None
    if min(dataclasses.astuple(shape)) < 1 or shape.window > shape.frames or shape.audio_len < shape.frames:
        raise argparse.ArgumentTypeError(f"{text!r}: expected positive sizes, S <= F and T >= F")
    return shape


def shapes_of(args: argparse.Namespace) -> list[Shape]:
    if args.shapes == "custom":
        return args.shape
    if args.shapes == "scaling":
        sweeps = [SWEEP_BASE | {axis: size} for axis, sizes in SWEEPS.items() for size in sizes]
        return list(dict.fromkeys(_of_sweep(batch, **sizes) for batch in args.batch for sizes in sweeps))
    sizes = PUBLISHED if args.shapes == "published" else SMALL
    return [Shape(b, h, 16, p, t, s, 64) for b in args.batch for h, p, t, s in sizes]


def _of_sweep(batch: int, frames: int, window: int, pixels: int) -> Shape:
    return Shape(batch, SWEEP_HEADS, frames, pixels, SWEEP_SEGMENT * frames, window, 64)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    header = HEADER | ({"sweep_base": SWEEP_BASE} if args.shapes == "scaling" else {})
    return cli.run(args, header, shapes_of(args), providers_of)


if __name__ == "__main__":
    sys.exit(main())
