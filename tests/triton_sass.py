# SPDX-License-Identifier: MIT
"""Counts what the inner loops of the Triton kernels issue on one SM of an H100 or H200, from machine code alone.

    PYTHONPATH=kernels python tests/triton_sass.py [--op attention conv norm] [--json FILE] [--times]

Kernels are compiled ahead of time for sm_90 with their own configurations at the sizes of the published model (see
triton_aot.py) and disassembled. Each innermost loop that loads or multiplies is a row: cycles that each unit of an SM
needs for one iteration of one program, and what that leaves of the peak of the matrix units.

    overlap   all units work at once, so the busiest one (or the issue slots) decides
    serial    the matrix products, and then everything else: what one program alone on an SM gets at best
    loads     bytes an SM asks of memory or L2 per cycle at the overlapped rate; 18.6 is 4.3 TB/s at 1.755 GHz

`--times` predicts whole launches at the published shapes: programs in order onto the slots of 132 SMs. Latencies are
left out but for a fixed cost a program, so these are floors of this code and no promise.
"""

import argparse
import collections
import dataclasses
import functools
import heapq
import json
import pathlib
import re
import sys

import torch
import triton_aot
from ahead_of_time import Compiled
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from mmattn_kernels.triton import attention, conv

SMS, GHZ = 132, 1.755
TENSOR_FLOP, SHARED_BYTES = 4096, 128  # a cycle and SM; bf16, dense
REGISTERS, SHARED, WARPS = 65536, 227 * 1024, 64  # of an SM
# What a program does outside of its loops, in cycles: mostly waiting for its first loads.
PROGRAM_CYCLES = 3000
CONV = [(128, 128), (256, 256), (384, 384), (512, 512), (768, 384), (1024, 512)]
# Positions of audio and, of the convolutions over frames and the projections, of video at their level.
CONV_LENGTHS = {(128, 128): (25600, 65536), (256, 256): (6400, 16384)}
CONV_LENGTHS |= dict.fromkeys(((384, 384), (768, 384)), (1600, 4096))
CONV_LENGTHS |= dict.fromkeys(((512, 512), (1024, 512)), (400, 1024))
ATTENTION = [(4, 1024, 6400, 1), (6, 256, 1600, 4), (8, 64, 400, 8), (8, 64, 400, 16)]
ATTENTION_PRODUCTS = {"forward": 2, "backward_dq": 3, "backward_dkdv": 4}

# Cycles for which a warp's instruction keeps a unit of its SM sub-partition; other instructions issue and no more.
# From the throughputs of compute capability 9.0: FP32 128 lanes an SM and cycle, integers and conversions 64, special
# functions 16. IMAD and HFMA2 run on the half of the FP32 lanes that multiplies integers.
UNITS = {
    "mufu": (8, re.compile(r"MUFU|I2F|F2I|F2F\b|POPC|FRND")),
    "imad": (2, re.compile(r"IMAD|IDP|HFMA2|HMUL2|HADD2")),
    "fp32": (1, re.compile(r"FFMA|FADD|FMUL|FSWZADD")),
    "alu": (
        2,
        re.compile(
            r"FMNMX|FSEL|FSET|F2FP|IADD3|VIADD|IABS|IMNMX|VIMNMX|LOP3|ISETP|ICMP|SEL|PRMT|SHF\b|SGXT|LEA|PLOP3|BMSK"
        ),
    ),
    "shuffle": (1, re.compile(r"SHFL")),
    "shared": (0, re.compile(r"LDS\b|LDSM|STS\b|STSM|LDGSTS")),
    "global": (0, re.compile(r"LDG\b|STG\b|ATOM|RED\b")),
    "wait": (0, re.compile(r"BAR|DEPBAR|LDGDEPBAR|WARPGROUP|WARPSYNC|MEMBAR|FENCE|NANOSLEEP|YIELD")),
    "uniform": (0, re.compile(r"U[A-Z]|R2UR|VOTEU|REDUX")),
}
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?(U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")


@dataclasses.dataclass
class Loop:
    """One iteration of a loop: counts a warp, and cycles of an SM a program."""

    warps: int
    counts: collections.Counter
    tensor: float  # cycles
    shared: float
    loaded: int  # bytes a program
    stored: int
    groups: int  # of products, each waited for
    is_async: bool  # the last group runs on while the next iteration begins

    @property
    def issued(self):
        return self.counts.total()

    def cycles(self):
        busy = {name: count * UNITS[name][0] for name, count in self.counts.items() if name in UNITS}
        busy["fp32"] = max(busy.get("fp32", 0) + busy.get("imad", 0) / 2, busy.pop("imad", 0))
        cycles = {name: c * self.warps / 4 for name, c in busy.items() if c}
        return cycles | {"issue": self.issued * self.warps / 4, "shared": self.shared, "tensor": self.tensor}

    @property
    def overlap(self):
        return max(self.cycles().values())

    @property
    def serial(self):
        return self.tensor + max(c for name, c in self.cycles().items() if name != "tensor")

    def expected(self, programs):
        """Cycles of an iteration where `programs` share an SM: one computes while another multiplies."""
        return self.overlap if self.is_async else max(self.overlap, self.serial / programs)


def unit(opcode):
    return next((name for name, (_, pattern) in UNITS.items() if pattern.match(opcode)), "other")


def loops(sass, warps):
    """The innermost loops of a disassembly that load or multiply, in its order."""
    lines, labels = [], {}
    for line in sass.splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line):
            labels[label[1]] = len(lines)
        elif found := INSTRUCTION.match(line):
            lines.append(found.groups())
    spans = []
    for i, (_, opcode, operands) in enumerate(lines):
        target = re.search(r"\.L_x_\d+", operands) if opcode == "BRA" else None
        if target and labels[target[0]] < i:
            spans.append((labels[target[0]], i + 1))
    inner = [s for s in spans if not any(s != t and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    for first, end in inner:
        loop = _count(lines[first:end], warps)
        if loop.tensor or loop.loaded:
            yield loop


def _count(lines, warps):
    counts = collections.Counter()
    tensor = shared = 0.0
    loaded = stored = groups = 0
    is_async = False
    for _, opcode, operands in lines:
        if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", opcode):
            m, n, k = (int(x) for x in found.groups())
            teams = warps / 4  # of four warps, each with its own products
            tensor += teams * 2 * m * n * k / TENSOR_FLOP
            from_registers = re.match(r"R\d+, R\d+", operands)
            shared += teams * 2 * k * (n + (0 if from_registers else m)) / SHARED_BYTES
            groups += "gsb0" in operands
            counts["tensor"] += 1
        elif found := re.match(r"HMMA\.(\d\d?)(8)(16|8)", opcode):
            m, n, k = (int(x) for x in found.groups())
            tensor += warps * 2 * m * n * k / 2048  # mma.sync reaches half of the rate
            counts["tensor"] += 1
        elif not (opcode == "LDS" and "RZ" in operands):  # never executed
            counts[unit(opcode)] += 1
            is_async |= opcode.startswith("WARPGROUP.DEPBAR") and not operands.endswith("0x0")
            width = 16 if ".128" in opcode else 8 if ".64" in opcode else 2 if "16" in opcode.split(".") else 4
            size = 32 * warps * (16 if opcode.startswith(("LDSM", "STSM")) else width)
            if unit(opcode) == "shared":
                shared += size / SHARED_BYTES
            if opcode.startswith(("LDG.", "LDGSTS")):
                loaded += size
            if opcode.startswith("STG"):
                stored += size
    return Loop(warps, counts, tensor, shared, loaded, stored, groups, is_async)


@dataclasses.dataclass
class Kernel:
    name: str
    size: str
    warps: int
    registers: int
    shared: int
    spills: int
    loops: list
    shape: tuple = ()  # of a convolution: Cin, Cout, taps

    @property
    def programs(self):
        """That fit on an SM at once."""
        per_warp = -(-self.registers * 32 // 256) * 256
        by_shared = SHARED // (self.shared + 1024)
        return min(REGISTERS // (per_warp * self.warps), by_shared, WARPS // self.warps, 32)


def kernels(launch, size):
    """The kernels of one launch, each once."""
    recorded = triton_aot.record("sm_90")
    launch()
    for function, kernel in {id(kernel): (function, kernel) for function, kernel in recorded}.values():
        compiled = Compiled(kernel)
        name, warps = function.__name__.removesuffix("_kernel").removeprefix("_"), kernel.metadata.num_warps
        found = list(loops(compiled.code, warps))
        if found:
            yield Kernel(name, size, warps, compiled.registers, compiled.shared, compiled.spills, found)


def launch_conv(cin, cout, taps):
    """K = 3 and its gradients, or K = 1 with all that the launchers leave around it."""
    x, residual = (torch.zeros(2, 2000, c, dtype=torch.bfloat16) for c in (cin, cout))
    weight, bias = torch.zeros(cout, taps, cin, dtype=torch.bfloat16).transpose(1, 2), torch.zeros(cout)
    if taps == 1:
        at = {"groups": 32, "dilation": 1, "silu": True, "eps": 1e-5}
        conv.forward(x, weight, bias, torch.ones(cin), torch.zeros(cin), None, None, residual, **at)
    else:
        parameters, at = (None,) * 4, {"groups": 0, "dilation": 2, "silu": False}
        out, stats = conv.forward(x, weight, bias, *parameters, None, **at, eps=1e-5)
        conv.backward(out, x, weight, *parameters, stats, **at, need_x=True, need_weight=True, need_bias=False)


def all_kernels(ops):
    if "attention" in ops:
        yield from kernels(lambda: triton_aot.launch_attention(64, torch.bfloat16), "D64")
    if "norm" in ops:
        for c in (128, 256, 512):
            yield from kernels(lambda c=c: triton_aot.launch_norm(c, torch.bfloat16), f"C{c}")
    if "conv" in ops:
        for cin, cout in CONV:
            for taps in (3, 1):
                for kernel in kernels(functools.partial(launch_conv, cin, cout, taps), f"{cin}>{cout} K{taps}"):
                    if kernel.name in ("convolve", "backward_weight"):
                        yield dataclasses.replace(kernel, shape=(cin, cout, taps))


def tile(i, length, len_k, frames, window, block):
    """As attention._tile, on integers."""
    n = length // frames
    n_group = frames if window * (len_k // frames) == len_k else max(block // n, 1)
    last = -(-frames // n_group) - 1
    in_group = -(-n_group * n // block)
    i_group = min(i // in_group, last)
    first = i_group * n_group * n + (i - i_group * in_group) * block
    return first, min(first + block, length if i_group == last else (i_group + 1) * n_group * n)


def key_blocks(i, len_q, len_k, frames, window, block_m, block_n):
    """How many blocks without and with a mask attention._key_walk has."""
    n_q, n_k = len_q // frames, len_k // frames
    first, end = tile(i, len_q, len_k, frames, window, block_m)
    skew = (min((end - 1) // n_q, frames - 1) - min(first // n_q, frames - 1)) * n_k
    is_whole = window * n_k == len_k
    head = 0 if is_whole else -(-skew // block_n)
    n_full = max(window * n_k // block_n - head, 0)
    return n_full, -(-min(skew + window * n_k, len_k) // block_n) - n_full


def query_blocks(i, len_q, len_k, frames, window, block_m, block_n):
    """Of attention._query_walk, without ranges that wrap: no tile reads more than those in the middle do."""
    n_q, n_k = len_q // frames, len_k // frames
    first, end = tile(i, len_k, len_k, frames, window, block_n)
    skew = ((end - 1) // n_k - first // n_k) * n_q
    is_whole = window * n_k == len_k
    n_rows = len_q if is_whole else min(skew + window * n_q, len_q)
    head = 0 if is_whole else -(-skew // block_m)
    n_full = max((n_rows if is_whole else window * n_q) // block_m - head, 0)
    return n_full, -(-n_rows // block_m) - n_full


def makespan(kernel, programs):
    """Microseconds of programs, each a list of (loop, iterations), taken in order by the slots of all SMs."""
    together = min(kernel.programs, -(-len(programs) // SMS))
    slots = [0.0] * (SMS * together)
    for walk in programs:
        cycles = sum(max(loop.expected(1), together * loop.expected(together)) * n for loop, n in walk)
        heapq.heapreplace(slots, slots[0] + PROGRAM_CYCLES + cycles)
    return max(slots) / GHZ / 1e3


def attention_times(kernel, batch, heads, pixels, audio, window, frames=16):
    config = attention._config(kernel.name, torch.bfloat16, "NVIDIA H200", 64)
    of_keys = kernel.name == "backward_dkdv"
    blocks = config["BLOCK_M"], config["BLOCK_N"]
    programs = []
    video = frames * pixels
    for own, other in ((audio, video), (video, audio)):
        lengths = (other, own) if of_keys else (own, other)
        n = attention._tile_count(own, own if of_keys else other, frames, window, blocks[of_keys])
        walks = [(query_blocks if of_keys else key_blocks)(i, *lengths, frames, window, *blocks) for i in range(n)]
        programs += [list(zip(kernel.loops, walk, strict=True)) for walk in walks] * (batch * heads)
    return makespan(kernel, programs)


def conv_times(kernel, batch, length):
    cin, cout, taps = kernel.shape
    config = conv._config("taps" if taps > 1 else "pointwise", torch.bfloat16, "NVIDIA H200", cout)
    config = conv._fit(config, BLOCK_N=cout, BLOCK_K=cin)
    count = batch * -(-length // config["BLOCK_M"]) * -(-cout // config["BLOCK_N"])
    return makespan(kernel, [[(kernel.loops[0], taps * -(-cin // config["BLOCK_K"]))]] * count)


def times(found, batches=(1, 4, 16)):
    """Predicted launches: kernel, shape, batch, GFLOP (of backward kernels all that they multiply), us."""
    for kernel in found:
        if kernel.name in ATTENTION_PRODUCTS and kernel.size == "D64":
            for h, p, t, s in ATTENTION:
                for b in batches:
                    gflop = ATTENTION_PRODUCTS[kernel.name] * 2e-9 * 64 * b * h * s * (p * t + t * p)
                    yield kernel.name, f"H{h} P{p} T{t} S{s}", b, gflop, attention_times(kernel, b, h, p, t, s)
        elif kernel.name == "convolve":
            cin, cout, taps = kernel.shape
            for length in CONV_LENGTHS[cin, cout]:
                for b in batches:
                    gflop = 2e-9 * cin * cout * taps * length * b
                    yield kernel.name, f"{kernel.size} L{length}", b, gflop, conv_times(kernel, b, length)


def rows(kernel):
    for i, loop in enumerate(kernel.loops):
        cycles = loop.cycles()
        label = f"{kernel.name} {i}" if len(kernel.loops) > 1 else kernel.name
        expected = loop.expected(kernel.programs)
        yield {
            "kernel": label, "size": kernel.size, "warps": kernel.warps, "registers": kernel.registers,
            "shared_kib": round(kernel.shared / 1024, 1), "programs": kernel.programs, "spills": kernel.spills,
            "issued": loop.issued, **{f"n_{name}": loop.counts[name] for name in (*UNITS, "tensor", "other")},
            "groups": loop.groups, "async": loop.is_async,
            **{name: round(cycles.get(name, 0)) for name in ("tensor", "issue", "mufu", "fp32", "alu", "shared")},
            "overlap": round(loop.tensor / loop.overlap, 3), "serial": round(loop.tensor / loop.serial, 3),
            "expected": round(loop.tensor / expected, 3), "loads": round((loop.loaded + loop.stored) / expected, 1),
        }  # fmt: skip


COLUMNS = {
    "kernel": "kernel", "size": "size", "warps": "warps", "registers": "regs", "shared_kib": "KiB", "programs": "p/SM",
    "issued": "instr", **{f"n_{name}": name for name in (*UNITS, "tensor")}, "groups": "waits",
    "tensor": "|tensor", "issue": "issue", "mufu": "mufu", "fp32": "fp32", "alu": "alu", "shared": "shared",
    "overlap": "|overlap", "serial": "serial", "expected": "expected", "loads": "B/cycle",
}  # fmt: skip


def table(found):
    """Counts of a warp and iteration | cycles of an SM for a program's iteration | shares of the peak."""
    cells = [list(COLUMNS.values()), *([_cell(row, name) for name in COLUMNS] for row in found)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        yield " ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))


def _cell(row, name):
    return f"{row[name]:.0%}" if name in ("overlap", "serial", "expected") else str(row[name])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--op", nargs="+", choices=("attention", "conv", "norm"), default=["attention", "conv", "norm"])
    parser.add_argument("--times", action="store_true", help="predict launches at the published shapes too")
    parser.add_argument("--json", type=pathlib.Path, help="the loops, as rows")
    args = parser.parse_args()
    if not isinstance(attention._forward_kernel, JITFunction):
        sys.exit("triton_sass.py compiles: unset TRITON_INTERPRET")
    driver.set_active(triton_aot.Driver())
    compiled = list(all_kernels(args.op))
    found = [row for kernel in compiled for row in rows(kernel)]
    print("\n".join(table(found)))
    if args.times:
        for name, shape, batch, gflop, us in times(compiled):
            print(
                f"{name:16}{shape:28} B{batch:<3}{gflop:9.1f} GFLOP{us:9.1f} us{1e-3 * gflop / us * 1e6:7.0f} TFLOP/s"
            )
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
