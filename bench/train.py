# SPDX-License-Identifier: MIT
"""A training step of the coupled U-Net against the published loop: clips a second and peak memory.

    python bench/train.py --shape 1,8,32,1024,32 --steps 3
    python bench/train.py --steps 2 --threads 2           # the published size: minutes

A step is all of it: noise, forward, backward, AdamW, the average of the parameters. The published loop is
bench/published.py with torch's AdamW and a tensor at a time for the average, in fp32 and under autocast; ours is
mmdiffusion.training.train, which also draws and converts the clips. Each runs in a fresh process that keeps freed
memory, one after the other; the first step is not timed, the middle one of the others is given. Memory is the peak of
the process less what it had before the network was made.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
import unet

import mmattn

LOOPS = ("published", "published, autocast", "mmdiffusion", "mmdiffusion, bf16", "mmdiffusion, bf16, checkpointing")
RATE = 0.9999
_CLIPS = 64  # that exist


class Noise:
    """Clips of noise."""

    def __init__(self, shape: unet.Shape) -> None:
        self.shape = shape

    def __len__(self) -> int:
        return _CLIPS

    def __getitem__(self, i: int) -> Any:
        from mmdiffusion.data import Item

        source = torch.Generator().manual_seed(i)
        size = (self.shape.frames, 3, self.shape.size, self.shape.size)
        video = torch.randint(256, size, generator=source, dtype=torch.uint8)
        return Item(video, torch.randint(-9999, 9999, (1, self.shape.audio_len), generator=source).short(), f"{i}")


def ours(shape: unet.Shape, name: str) -> Iterator[Any]:
    from mmdiffusion.training import Recipe, train

    network = unet.network(unet.OWN, shape.short(), torch.float32, "cpu")
    if "checkpointing" in name:
        network.enable_gradient_checkpointing()
    precision = "bfloat16" if "bf16" in name else "float32"
    recipe = Recipe(batch_size=shape.batch, micro_batch=None, precision=precision, ema_rates=(RATE,))
    yield from train(network, Noise(shape), recipe)


def published(shape: unet.Shape, name: str) -> Iterator[None]:
    from mmdiffusion.diffusion.process import GaussianDiffusion

    network, diffusion = unet.network(unet.BASELINE, shape.short(), torch.float32, "cpu").train(), GaussianDiffusion()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.0)
    averages = [x.detach().clone() for x in network.parameters()]
    clips = shape.inputs(torch.float32, "cpu")[:2]
    shifts = shape.shifts()
    while True:
        t = torch.randint(1000, (shape.batch,))
        noises = [torch.randn_like(x) for x in clips]
        states = [diffusion.diffuse(x, t, noise) for x, noise in zip(clips, noises, strict=True)]
        with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in name):
            outputs = network(*states, t, shifts=shifts)
        loss = sum((out.float() - noise).square().mean() for out, noise in zip(outputs, noises, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for average, x in zip(averages, network.parameters(), strict=True):
                average.mul_(RATE).add_(x, alpha=1 - RATE)
        yield


def measure(name: str, shape: unet.Shape, steps: int, threads: int) -> dict[str, Any]:
    """In this process."""
    torch.set_num_threads(threads)
    mmattn.keep_freed_memory()
    before = _peak()
    loop = ours(shape, name) if unet.is_own(name.split(",")[0]) else published(shape, name)
    next(loop)
    seconds = []
    for _ in range(steps):
        begun = time.perf_counter()
        next(loop)
        seconds.append(time.perf_counter() - begun)
    step = statistics.median(seconds)
    return {"loop": name, "s_per_step": step, "clips_per_s": shape.batch / step, "peak_mb": _peak() - before}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _shape(text: str) -> unet.Shape:
    return unet.Shape(*unet._shape(text))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=_shape, default=_shape("1,16,64,25600,128"), metavar="B,F,SIZE,T,CHANNELS")
    parser.add_argument("--loops", nargs="+", choices=LOOPS, default=LOOPS)
    parser.add_argument("--steps", type=int, default=3, help="that are timed (3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--one", choices=LOOPS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(measure(args.one, args.shape, args.steps, args.threads)))
        return 0
    print(f"{args.shape}, torch {torch.__version__}, {args.threads} threads, the middle of {args.steps} steps")
    print(f"{'loop':34}{'s a step':>10}{'clips/s':>10}{'peak MB':>10}{'times as published':>20}")
    first = None
    for name in args.loops:
        shape = ",".join(str(getattr(args.shape, x)) for x in ("batch", "frames", "size", "audio_len", "channels"))
        options = ["--one", name, "--shape", shape, "--steps", str(args.steps), "--threads", str(args.threads)]
        done = subprocess.run([sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        first = first or row
        ratio = first["s_per_step"] / row["s_per_step"]
        print(f"{name:34}{row['s_per_step']:10.3f}{row['clips_per_s']:10.2f}{row['peak_mb']:10.0f}{ratio:20.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
