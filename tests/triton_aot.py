# SPDX-License-Identifier: MIT
"""Compiles the Triton kernels for GPUs that are not there, and prints what came out as JSON lines.

    PYTHONPATH=kernels python tests/triton_aot.py [--op attention|segments|norm|conv|unet] [sm_80 sm_90 sm_100 gfx942]
        [--recompiles | --relaunches]

The launchers run as they would on the GPU, on CPU tensors, with a driver that only names the target: so the signature,
the alignments and the configuration are the real ones, and the launch stops after compiling. Needs TRITON_INTERPRET
unset. Registers and stack come from cuobjdump, local-memory instructions from nvdisasm, both shipped inside Triton.
"""

import argparse
import json
import pathlib
import re
import sys
from unittest import mock

import torch
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from mmattn_kernels import CircularWindows, Direction, TableWindows
from mmattn_kernels.triton import _host, attention, conv, norm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "bench"))

import ahead_of_time
from ahead_of_time import TARGETS

# Head dimension or number of channels, and dtype; the published model has heads of 64. "tf32" is float32 with torch's
# matrix products set to it.
SHAPES = {op: {target: [(size, "bfloat16")] for target in TARGETS} for op, size in {"norm": 256, "conv": 256}.items()}
SHAPES["attention"] = {target: [(64, "bfloat16"), (64, "float16")] for target in TARGETS}
SHAPES["attention"]["sm_90"] += [(d, "bfloat16") for d in (16, 32, 48, 128)]
SHAPES["attention"]["sm_90"] += [(64, "float32"), (128, "float32"), (64, "tf32")]
SHAPES["segments"] = {target: [(64, "bfloat16")] for target in TARGETS}
SHAPES["segments"]["sm_90"] += [(128, "bfloat16"), (64, "float32")]
SHAPES["norm"]["sm_90"] += [(256, "float32"), (384, "bfloat16")]
SHAPES["conv"]["sm_90"] += [(256, "float32"), (256, "tf32")]
SHAPES["unet"] = {"sm_90": [(128, "bfloat16")]}
original_run, original_compile = JITFunction.run, JITFunction._do_compile


class Driver(ahead_of_time.Driver):
    """With a launch that only notes what it is given."""

    def __init__(self):
        super().__init__()
        self.launched = []
        self.utils = self

    def launcher_cls(self, src, metadata):
        def launch(*args):
            grid, arguments = args[:3], args[9:]  # between them stream, function, metadata and hooks
            self.launched.append((metadata.name, grid, arguments))

        return launch

    def load_binary(self, name, kernel, shared, device):
        return None, None, 0, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 1 << 20}


def record(target_name, compiled=None):
    """From here on, launches compile for the target (or, given `compiled`, only note there what they would compile)."""
    driver.active.target = TARGETS[target_name]
    _host.device_name = lambda device: TARGETS[target_name].device_name
    _host.clear_caches()
    kernels = []

    def run(self, *args, warmup, **kwargs):
        kernels.append((self, original_run(self, *args, warmup=True, **kwargs)))

    def note(self, key, *args, **kwargs):
        compiled.append(self.__name__)
        self.device_caches[driver.active.get_current_device()][0][key] = object()

    JITFunction.run = run
    JITFunction._do_compile = original_compile if compiled is None else note
    return kernels


def launch_attention(size, dtype, *, frames=4, pixels=6, audio_len=27, heads=2, batch=2, window=2, shift=1):
    """Forward and backward on packed projections, as the modules make them: across the streams, and of the video."""

    def projection(length):
        return torch.zeros(batch, length, 3, heads, size, dtype=dtype).unbind(2)

    qkv = *projection(frames * pixels), *projection(audio_len)
    across = Direction(qkv[0], *qkv[4:]), Direction(qkv[3], *qkv[1:3])
    dense = [torch.zeros(x.shape, dtype=dtype) for x in qkv]
    d_across = Direction(dense[0], *dense[4:]), Direction(dense[3], *dense[1:3])
    for directions, windows, places in (
        (across, CircularWindows(frames, window, shift), d_across),
        ([Direction(*qkv[:3])], CircularWindows(pixels, 1, 0), [Direction(*projection(frames * pixels))]),
    ):
        out, lse = attention.forward(directions, windows, size**-0.5)
        attention.backward(directions, out, out, lse, windows, size**-0.5, places)


def launch_segments(size, dtype, *, queries=70, keys=27, segments=3, begin=5, heads=2, batch=2):
    """Forward and backward by tables, with a gradient of the log-sum-exp."""
    q, k, v = (torch.zeros(batch, length, heads, size, dtype=dtype) for length in (queries, keys, keys))
    bounds = torch.arange(segments + 1, dtype=torch.int32) * queries // segments
    windows = TableWindows(bounds, *(torch.full((segments,), begin, dtype=torch.int32) for _ in range(2)))
    directions, scale = [Direction(q, k, v)], size**-0.5
    out, lse = attention.forward(directions, windows, scale)
    attention.backward(directions, out, out, lse, windows, scale, directions, [torch.zeros_like(lse[0])])


def launch_norm(size, dtype, *, length=2000, short=50, batch=2):
    """A forward and a backward call as the audio block makes them: scale and shift are halves of one tensor.

    Of a long sequence and of one short enough for one launch.
    """
    parameters = torch.ones(size), torch.zeros(size), *torch.zeros(batch, 2 * size, dtype=dtype).chunk(2, 1)
    for positions in (length, short):
        x = torch.zeros(batch, positions, size, dtype=dtype)
        out, stats = norm.forward(x, *parameters, groups=32, silu=True, eps=1e-5)
        norm.backward(out, x, *parameters, stats, groups=32, silu=True)


def launch_conv(size, dtype, *, length=2000, batch=2, dilation=2):
    """Forward and backward calls with everything in front of the convolution and behind it, of K = 3 and of K = 1."""
    x = torch.zeros(batch, length, size, dtype=dtype)
    ones, zeros = torch.ones(size), torch.zeros(size)
    prologue = ones, zeros, *torch.zeros(batch, 2 * size, dtype=dtype).chunk(2, 1)
    at = {"groups": 32, "dilation": dilation, "silu": True}
    for taps in (3, 1):
        weight = torch.zeros(size, size, taps, dtype=dtype)
        out, stats = conv.forward(x, weight, zeros, *prologue, x, **at, eps=1e-5)
        conv.backward(out, x, weight, *prologue, stats, **at, need_x=True, need_weight=True, need_bias=True)


def launch_unet(size, dtype):
    """A training step of the published network on a short clip of small frames: all kernels it consists of."""
    from mmattn import dispatch
    from mmattn_kernels import Support
    from mmdiffusion import CoupledUNet

    unet = CoupledUNet(video_size=(16, 3, 16, 16), audio_size=(1, 6400), model_channels=size).to(dtype)
    inputs = torch.zeros(1, 16, 3, 16, 16, dtype=dtype), torch.zeros(1, 1, 6400, dtype=dtype), torch.zeros(1)
    chosen = {"support": lambda *_: Support(), "explain": lambda *_: ("triton", [])}
    with mock.patch.multiple(dispatch, **chosen):
        count = len(unet.shift_ranges())
        for shifts in ([0] * count, torch.zeros(count, dtype=torch.int32)):
            video, audio = unet(*inputs, shifts=shifts)
            (video.sum() + audio.sum()).backward()


LAUNCH = {
    "attention": launch_attention,
    "segments": launch_segments,
    "norm": launch_norm,
    "conv": launch_conv,
    "unet": launch_unet,
}
# What may change without a kernel compiling anew.
CHANGES = {
    "attention": (
        {"shift": 0}, {"shift": 2}, {"shift": 16}, {"window": 1}, {"window": 4}, {"frames": 16}, {"frames": 1},
        {"pixels": 1}, {"pixels": 16}, {"audio_len": 16}, {"audio_len": 25}, {"heads": 1}, {"heads": 16},
        {"batch": 1}, {"batch": 16},
    ),
    "segments": (
        {"queries": 16}, {"queries": 1025}, {"keys": 16}, {"keys": 6144}, {"segments": 1}, {"segments": 16},
        {"begin": 0}, {"begin": 1}, {"begin": 16}, {"heads": 1}, {"heads": 16}, {"batch": 1}, {"batch": 16},
    ),
    "norm": (
        {"length": 1025}, {"length": 1040}, {"length": 70000}, {"short": 1}, {"short": 16}, {"short": 33},
        {"batch": 1}, {"batch": 16},
    ),
    "conv": (
        {"length": 1025}, {"length": 1040}, {"length": 7000}, {"batch": 1}, {"batch": 16},
        {"dilation": 1}, {"dilation": 16}, {"dilation": 512},
    ),
}  # fmt: skip


def usage(kernel):
    """What tests ask of a compiled kernel: what it takes, by which instructions it multiplies, how wide it loads."""
    compiled = ahead_of_time.Compiled(kernel)
    found = {name: getattr(compiled, name) for name in ("shared", "registers", "stack", "spills")}
    if "amdgcn" in kernel.asm:
        return found | {"mma": "mfma" if "v_mfma" in compiled.code else None}
    ptx = kernel.asm["ptx"]
    return found | {
        "mma": next((name for name in ("wgmma", "tcgen05.mma", "mma.sync") if name in ptx), None),
        "wide_loads": len(re.findall(r"ld\.global(?:\.\w+)*\.v4\.b32", ptx)),
        "wide_copies": len(re.findall(r"cp\.async\.cg[^;]*0x10", ptx)),
    }


def figures(op, target_name, size, dtype):
    kernels = record(target_name)
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    LAUNCH[op](size, getattr(torch, "float32" if dtype == "tf32" else dtype))
    for function, kernel in {id(kernel): (function, kernel) for function, kernel in kernels}.values():
        yield {
            "op": op, "target": target_name, "size": size, "dtype": dtype,
            "kernel": function.__name__.removesuffix("_kernel").removeprefix("_"),
            "warps": kernel.metadata.num_warps, **usage(kernel),
        }  # fmt: skip


def recompiles(op):
    """Which kernels compile anew in calls that differ in what CHANGES lists alone."""
    compiled = []
    record("sm_90", compiled)
    size = SHAPES[op]["sm_90"][0][0]
    LAUNCH[op](size, torch.bfloat16)
    counts = {"op": op, "first": len(compiled)}
    for change in CHANGES[op]:
        LAUNCH[op](size, torch.bfloat16, **change)
    counts["changed"] = compiled[counts["first"] :]
    if op == "attention":
        before = len(compiled)
        for value in (0, 1, 16):
            launch_attention(size, torch.bfloat16, shift=torch.tensor([0, value])[1:])
        counts["tensor"] = len(compiled) - before
    return counts


def relaunches(op):
    """How many launches a call makes, and whether kept ones are given what Triton itself gives them."""
    driver.active.target = TARGETS["sm_90"]
    _host.device_name = lambda device: TARGETS["sm_90"].device_name
    size = SHAPES[op]["sm_90"][0][0]
    rounds = []
    for run in (original_run, None):  # nothing is left to Triton's own the second time
        JITFunction.run = run
        driver.active.launched.clear()
        LAUNCH[op](size, torch.bfloat16)
        rounds.append([(kernel, grid, [_described(x) for x in args]) for kernel, grid, args in driver.active.launched])
    JITFunction.run = original_run
    return {"op": op, "launches": len(rounds[0]), "same": rounds[0] == rounds[1]}


def _described(x):
    return [str(x.dtype), list(x.shape), list(x.stride())] if isinstance(x, torch.Tensor) else x


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="target", help=f"of {', '.join(TARGETS)}; default all")
    parser.add_argument("--op", choices=LAUNCH, help="default all")
    parser.add_argument("--recompiles", action="store_true", help="count recompilations instead")
    parser.add_argument("--relaunches", action="store_true", help="compare kept launches with Triton's instead")
    args = parser.parse_args()
    if not isinstance(attention._forward_kernel, JITFunction):
        sys.exit("triton_aot.py compiles: unset TRITON_INTERPRET")
    driver.set_active(Driver())
    for op in [args.op] if args.op else CHANGES if args.recompiles or args.relaunches else LAUNCH:
        if args.recompiles:
            print(json.dumps(recompiles(op)))
            continue
        if args.relaunches:
            print(json.dumps(relaunches(op)))
            continue
        for target in args.targets or TARGETS:
            for size, dtype in SHAPES[op].get(target, ()):
                for row in figures(op, target, size, dtype):
                    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
