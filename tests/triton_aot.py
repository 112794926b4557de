# SPDX-License-Identifier: MIT
"""Compiles the Triton attention kernels for GPUs that are not there, and prints what came out as JSON lines.

    PYTHONPATH=kernels python tests/triton_aot.py [sm_80 sm_90 sm_100 gfx942] [--recompiles]

The launchers run as they would on the GPU, on CPU tensors, with a driver that only names the target: so the signature,
the alignments and the configuration are the real ones, and the launch stops after compiling. Needs TRITON_INTERPRET
unset. Registers and stack come from cuobjdump, local-memory instructions from nvdisasm, both shipped inside Triton.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from mmattn_kernels.triton import attention

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), "NVIDIA A100-SXM4-80GB"),
    "sm_90": (GPUTarget("cuda", 90, 32), "NVIDIA H200"),
    "sm_100": (GPUTarget("cuda", 100, 32), "NVIDIA B200"),
    "gfx942": (GPUTarget("hip", "gfx942", 64), "AMD Instinct MI300X"),
}
# Head dimension and dtype; the published model has 64. "tf32" is float32 with torch's matrix products set to it.
SHAPES = {target: [(64, "bfloat16"), (64, "float16")] for target in TARGETS}
SHAPES["sm_90"] += [(d, "bfloat16") for d in (16, 32, 48, 128)]
SHAPES["sm_90"] += [(64, "float32"), (128, "float32"), (64, "tf32")]
original_run, original_compile = JITFunction.run, JITFunction._do_compile
TOOLS = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"


class _Driver:
    """What JITFunction.run asks of a driver before it launches."""

    def __init__(self):
        self.target = None

    def get_current_device(self):
        return str(self.target)  # Triton keeps compiled kernels per device: one "device" a target.

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self.target


def record(target_name, compiled=None):
    """From here on, launches compile for the target (or, given `compiled`, only note there what they would compile)."""
    driver.active.target, device_name = TARGETS[target_name]
    attention._device_name = lambda device: device_name
    kernels = []

    def run(self, *args, warmup, **kwargs):
        kernels.append((self, original_run(self, *args, warmup=True, **kwargs)))

    def note(self, key, *args, **kwargs):
        compiled.append(self.__name__)
        self.device_caches[driver.active.get_current_device()][0][key] = object()

    JITFunction.run = run
    JITFunction._do_compile = original_compile if compiled is None else note
    return kernels


def launch(*, head_dim, dtype, frames=4, pixels=6, audio_len=27, heads=2, batch=2, window=2, shift=1):
    """One forward and one backward call on a packed projection, as the modules make it."""

    def projection(length):
        return torch.zeros(batch, length, 3, heads, head_dim, dtype=dtype).unbind(2)

    qkv = *projection(frames * pixels), *projection(audio_len)
    at = {"frames": frames, "window": window, "shift": shift, "scale": head_dim**-0.5}
    out = attention.forward(*qkv, **at)
    attention.backward(*out[:2], *qkv, *out, **at)


def _usage(kernel):
    figures = {"shared": kernel.metadata.shared, "spills": None, "mma": None}
    asm = kernel.asm
    if "cubin" in asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(asm["cubin"])
            file.flush()
            usage = _tool("cuobjdump", "-res-usage", file.name)
            sass = _tool("nvdisasm", "-c", file.name)
        figures["registers"] = int(re.search(r"REG:(\d+)", usage)[1])
        figures["stack"] = int(re.search(r"STACK:(\d+)", usage)[1])
        figures["spills"] = len(re.findall(r"\b(?:STL|LDL)\b", sass))
        instructions = ("wgmma", "tcgen05.mma", "mma.sync")
        figures["mma"] = next((i for i in instructions if i in asm["ptx"]), None)
        figures["wide_copies"] = len(re.findall(r"cp\.async\.cg[^;]*0x10", asm["ptx"]))
    else:
        text = asm["amdgcn"]
        figures["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        figures["spills"] = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])
        figures["stack"] = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1])
        figures["mma"] = "mfma" if "v_mfma" in text else None
    return figures


def _tool(name, *args):
    return subprocess.run([TOOLS / name, *args], check=True, capture_output=True, text=True).stdout


def figures(target_name, head_dim, dtype):
    kernels = record(target_name)
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    launch(head_dim=head_dim, dtype=getattr(torch, "float32" if dtype == "tf32" else dtype))
    for function, kernel in kernels:
        yield {
            "target": target_name, "head_dim": head_dim, "dtype": dtype,
            "kernel": function.__name__.removesuffix("_kernel").removeprefix("_"),
            "warps": kernel.metadata.num_warps, **_usage(kernel),
        }  # fmt: skip


def recompiles():
    """Which kernels compile anew in calls that differ in lengths, frames, window, shift, heads and batch alone."""
    compiled = []
    record("sm_90", compiled)
    launch(head_dim=64, dtype=torch.bfloat16)
    first = len(compiled)
    changes = (
        {"shift": 0}, {"shift": 2}, {"shift": 16}, {"window": 1}, {"window": 4}, {"frames": 16}, {"frames": 1},
        {"pixels": 1}, {"pixels": 16}, {"audio_len": 16}, {"audio_len": 25}, {"heads": 1}, {"heads": 16},
        {"batch": 1}, {"batch": 16},
    )  # fmt: skip
    for change in changes:
        launch(head_dim=64, dtype=torch.bfloat16, **change)
    before_tensor = len(compiled)
    for value in (0, 1, 16):
        launch(head_dim=64, dtype=torch.bfloat16, shift=torch.tensor([0, value])[1:])
    return {"first": first, "changed": compiled[first:before_tensor], "tensor": len(compiled) - before_tensor}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="target", help=f"of {', '.join(TARGETS)}; default all")
    parser.add_argument("--recompiles", action="store_true", help="count recompilations instead")
    args = parser.parse_args()
    if not isinstance(attention._forward_kernel, JITFunction):
        sys.exit("triton_aot.py compiles: unset TRITON_INTERPRET")
    driver.set_active(_Driver())
    if args.recompiles:
        print(json.dumps(recompiles()))
        return
    for target in args.targets or TARGETS:
        for head_dim, dtype in SHAPES[target]:
            for row in figures(target, head_dim, dtype):
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
