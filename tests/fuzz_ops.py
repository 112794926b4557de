# SPDX-License-Identifier: MIT
"""Random arguments for the ops: valid ones are compared with the reference, wrong ones must raise or work, never crash.

    python tests/fuzz_ops.py --seconds 30 --seed 0          all instruction sets of this CPU, in turn
    python tests/fuzz_ops.py --case 1234 --isa avx2         one case again, as a finding names it

Each case follows from its number alone. Cases run in worker processes, which say what they begin: where one dies, the
last is the finding. Valid tensors end at a guard page. Exit status 1 if there is any.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import math
import mmap
import os
import random
import selectors
import subprocess
import sys
import time
import warnings
from typing import Any

import torch
from torch import Tensor

import mmattn
from mmattn.testing import assert_close_to_fp64

INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
HANGS_S = 60  # a case that takes as long is a finding
MOST_FINDINGS = 20
HUGE = (-(2**63), -1, 0, 1, 2, 3, 2**31 - 1, 2**31, 2**61, 2**62, 2**63 - 1)
DTYPES = (torch.float32, torch.float32, torch.bfloat16)
OTHER_DTYPES = (torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64, torch.float32, torch.bfloat16)


class Draw(random.Random):
    """Random sizes, tensors and strides of one case."""

    def __init__(self, case: int) -> None:
        super().__init__(case)
        self.generator = torch.Generator().manual_seed(case)

    def size(self, most: int) -> int:
        """1..most, small ones and those around a vector's width above all."""
        near = self.choice((1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65))
        return min(most, near) if self.random() < 0.6 else self.randint(1, most)

    def tensor(self, *size: int, dtype: torch.dtype = torch.float32, expanded: bool = True) -> Tensor:
        """Normal values, one element apart in the last dimension, else in some memory layout."""
        kind = self.choice(("dense", "dense", "slice", "permuted", *(["expanded"] if expanded else [])))
        if kind == "dense" or len(size) < 3:
            x = torch.randn(size, generator=self.generator).to(dtype)
            return x[:1].expand(size) if kind == "expanded" and self.random() < 0.3 else x
        if kind == "slice":
            wide = torch.randn([n + self.randint(0, 3) for n in size], generator=self.generator).to(dtype)
            return wide[tuple(slice(w - n, w) for n, w in zip(size, wide.shape, strict=True))]
        if kind == "permuted":
            order = list(range(len(size) - 1))
            self.shuffle(order)
            x = torch.randn([size[i] for i in order] + [size[-1]], generator=self.generator).to(dtype)
            return x.permute(*(order.index(i) for i in range(len(order))), len(order))
        at = self.randrange(len(size) - 1)
        one = torch.randn([1 if i == at else n for i, n in enumerate(size)], generator=self.generator).to(dtype)
        return one.expand(size)


def attention(draw: Draw, dtype: torch.dtype) -> tuple[str, list[Tensor], dict[str, Any]]:
    frames = draw.size(9)
    window = draw.randint(1, frames)
    pixels, audio_len = draw.size(20), frames + draw.size(60) - 1
    batch, heads, dim = draw.randint(1, 3), draw.randint(1, 3), draw.size(80)
    sizes = [(batch, length, heads, dim) for length in (frames * pixels, audio_len) for _ in range(3)]
    shift: int | Tensor = draw.randint(0, frames - window)
    if draw.random() < 0.3:
        shift = torch.tensor(shift, dtype=draw.choice((torch.int32, torch.int64)))
    options = {"frames": frames, "window": window, "shift": shift, "scale": draw.choice((None, 0.0, -0.5, 1.0))}
    # The gradient of a query whose keys are all the same is 0, and in bf16 what is left of its terms has no bound.
    is_fp32 = dtype == torch.float32
    return "random_shift_attention", [draw.tensor(*size, dtype=dtype, expanded=is_fp32) for size in sizes], options


def self_attention(draw: Draw, dtype: torch.dtype) -> tuple[str, list[Tensor], dict[str, Any]]:
    segments = draw.size(20)
    size = draw.randint(1, 3), segments * draw.size(40), draw.randint(1, 3), draw.size(80)
    tensors = [draw.tensor(*size, dtype=dtype, expanded=dtype == torch.float32) for _ in range(3)]
    return "self_attention", tensors, {"segments": segments, "scale": draw.choice((None, 0.0, 0.7))}


def segmented_attention(draw: Draw, dtype: torch.dtype) -> tuple[str, list[Tensor], dict[str, Any]]:
    segments, keys = draw.size(20), draw.size(70)
    queries = draw.size(90)
    bounds = [0, *sorted(draw.randint(0, queries) for _ in range(segments - 1)), queries]
    begin = [draw.randrange(keys) for _ in range(segments)]
    length = [draw.choice((0, 1, keys, draw.randint(0, keys))) for _ in range(segments)]
    batch, heads, dim = draw.randint(1, 3), draw.randint(1, 3), draw.size(80)
    is_fp32 = dtype == torch.float32
    tensors = [draw.tensor(batch, n, heads, dim, dtype=dtype, expanded=is_fp32) for n in (queries, keys, keys)]
    windows = mmattn.Windows.from_ranges(bounds, begin, length, keys=keys)
    return "segmented_attention", tensors, {"windows": windows, "scale": draw.choice((None, 0.0, 0.7))}


def norm(draw: Draw, dtype: torch.dtype) -> tuple[str, list[Tensor], dict[str, Any]]:
    groups = draw.size(33)
    channels, batch = groups * draw.randint(1, 4), draw.randint(1, 3)
    own = draw.choice((dtype, torch.float32))
    # Groups of hardly any variance amplify every rounding without a bound; values repeated are such.
    length = max(draw.size(200), 8 * groups // channels)
    tensors = [draw.tensor(batch, length, channels, dtype=dtype, expanded=False)]
    tensors += [draw.tensor(channels, dtype=own) for _ in range(2)]
    film = {name: draw.tensor(batch, channels, dtype=own) for name in ("scale", "shift") if draw.random() < 0.5}
    return "group_norm", tensors, {"groups": groups, **film, "activation": draw.choice((None, "silu"))}


def conv(draw: Draw, dtype: torch.dtype) -> tuple[str, list[Tensor], dict[str, Any]]:
    groups, batch, out = draw.randint(1, 8), draw.randint(1, 3), draw.size(70)
    channels = groups * draw.size(12)
    own = draw.choice((dtype, torch.float32))
    if spatial := draw.random() < 0.4:
        height, width = draw.size(12), draw.size(34)
        length, kernel = draw.randint(1, 3) * height * width, (3, 3)
        where = {"height": height, "width": width}
    else:
        length, kernel = draw.size(150), (draw.choice((1, 3, 3, 5, 7)),)
        where = {"dilation": draw.choice((1, 2, 3, draw.size(200), 2**20))}
    weight = draw.tensor(out, channels, *kernel, dtype=own) / (channels * math.prod(kernel)) ** 0.5
    normalised = draw.random() < 0.5 and length * channels >= 8 * groups
    tensors = [draw.tensor(batch, length, channels, dtype=dtype, expanded=not normalised), weight]
    tensors += [draw.tensor(out, dtype=own)] if draw.random() < 0.7 else []
    options: dict[str, Any] = {**where, "activation": draw.choice((None, "silu"))}
    if normalised:
        options["norm"] = (draw.tensor(channels, dtype=own), draw.tensor(channels, dtype=own), groups)
    if draw.random() < 0.5:
        options["film"] = (draw.tensor(batch, channels, dtype=own), draw.tensor(batch, channels, dtype=own))
    if draw.random() < 0.5:
        options["residual"] = draw.tensor(batch, length, out, dtype=dtype)
    return "spatial_conv2d" if spatial else "dilated_conv1d", tensors, options


OPS = (attention, self_attention, segmented_attention, norm, conv)


def tensors_of(value: Any) -> list[Tensor]:
    """The floating-point tensors in arguments or results, in their order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [x for y in values for x in tensors_of(y)]


def mapped(value: Any, function: Any) -> Any:
    """The same arguments with function(x) for each floating-point tensor x."""
    if isinstance(value, Tensor):
        return function(value) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: mapped(x, function) for name, x in value.items()}
    return type(value)(mapped(x, function) for x in value) if isinstance(value, (tuple, list)) else value


def at_a_guard_page(x: Tensor) -> Tensor:
    """The same values and strides in memory whose next byte belongs to nobody: a read past the end is a crash."""
    if not x.numel() or x.layout != torch.strided:
        return x
    span = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    size = span * x.element_size()
    page = mmap.PAGESIZE
    end = -(-size // page) * page
    memory = mmap.mmap(-1, end + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(address + end), page, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    flat = torch.frombuffer(memory, dtype=x.dtype, count=span, offset=end - size)
    flat.copy_(x.detach().as_strided((span,), (1,)))
    return flat.as_strided(x.shape, x.stride())


def results(name: str, arguments: tuple[list[Tensor], dict[str, Any]], impl: str, seed: int, dtype: Any = None) -> Any:
    """Outputs, then the gradients of all tensors, each used in its own dtype and strides, or in `dtype`."""

    def leaf(x: Tensor) -> Tensor:
        return x.detach().to(x.dtype if dtype is None else dtype).requires_grad_()

    tensors, options = mapped(arguments, leaf)
    out = tensors_of(getattr(mmattn, name)(*tensors, **options, impl=impl))
    draw = Draw(seed)
    grads = [draw.tensor(*x.shape, dtype=arguments[0][0].dtype).to(x.dtype) for x in out]
    if impl == "cpu":
        grads = [at_a_guard_page(x) for x in grads]
    torch.autograd.backward(out, grads)
    return [*(x.detach() for x in out), *(x.grad for x in tensors_of((tensors, options)))]


def check_valid(draw: Draw, case: int) -> None:
    """A valid call gives what the reference gives, within the budget of the same computation by plain torch."""
    dtype = draw.choice(DTYPES)
    name, tensors, options = draw.choice(OPS)(draw, dtype)
    arguments = tensors, options
    found = results(name, mapped(arguments, at_a_guard_page), "cpu", case)
    exact = results(name, arguments, "reference", case, torch.float64)
    plain = results(name, arguments, "reference", case)
    for i, (x, y, z) in enumerate(zip(found, exact, plain, strict=True)):
        label = f"{name} of {[tuple(t.shape) for t in tensors]}, {dtype}, {options.keys()}: result {i}"
        # Sums that cancel have no digits of their own, as the gradient of a query whose keys are all the same: what is
        # left is of the size of what was added.
        absolute = max(2e-5, torch.finfo(x.dtype).eps / 2)
        assert_close_to_fp64(x, y, z, name=label, rounding=8.0, absolute=absolute)


def spoiled_tensor(draw: Draw, x: Tensor | None) -> Any:
    """Something else in the place of a tensor."""
    if x is None:
        return draw.choice((torch.randn(draw.size(9)), torch.randn(2, draw.size(9), 3)))
    shape, dim = list(x.shape), draw.randrange(max(1, x.dim()))
    kind = draw.choice(("none", "meta", "dtype", "shape", "rank", "expanded", "stride", "empty", "negative", "zero"))
    if not x.is_floating_point() and draw.random() < 0.5:  # a table, whose values kernels take for places
        return torch.tensor([draw.choice(HUGE) for _ in range(x.numel())]).clamp(-(2**31), 2**31 - 1).to(x.dtype)
    if kind == "none":
        return None
    if kind == "meta":
        return x.to("meta")
    if kind == "dtype":
        return x.to(draw.choice(OTHER_DTYPES))
    if kind == "shape" and shape:
        shape[dim] = draw.choice((0, 1, shape[dim] - 1 if shape[dim] > 1 else 2, shape[dim] + 1, 2 * shape[dim]))
        return torch.randn(shape).to(x.dtype)
    if kind == "rank":
        return x[0] if shape and shape[0] and draw.random() < 0.5 else x[None]
    if kind == "expanded":
        return torch.ones((), dtype=x.dtype).expand(x.shape)
    if kind == "stride" and shape:
        return torch.randn([*shape[:-1], 2 * shape[-1]]).to(x.dtype)[..., ::2]
    if kind == "empty":
        return x.new_empty(0)
    if kind == "zero":
        return torch._efficientzerotensor(x.shape, dtype=x.dtype)
    return torch._neg_view(x)


def check_wrong(draw: Draw) -> None:
    """With one to three wrong arguments an op, or its public function, raises a Python exception or works."""
    name, tensors, options = draw.choice(OPS)(draw, draw.choice(DTYPES))
    if draw.random() < 0.3:
        check_wrong_after_right(draw, name, tensors, options)
        return
    with Recorded() as recorded:
        leaves, rest = mapped((tensors, options), lambda x: x.detach().requires_grad_())
        out = tensors_of(getattr(mmattn, name)(*leaves, **rest, impl="cpu"))
        torch.autograd.backward(out, [torch.ones_like(x) for x in out])
    function, arguments = draw.choice(recorded.calls)
    for _ in range(draw.choice((1, 1, 2, 3))):
        at = draw.randrange(len(arguments))
        value = arguments[at]
        if isinstance(value, bool):
            arguments[at] = not value
        elif isinstance(value, int):
            arguments[at] = draw.choice((*HUGE, value + 1, value - 1, 2 * value))
        elif isinstance(value, float):
            arguments[at] = draw.choice((math.nan, math.inf, -1.0, 0.0, 1e300))
        elif isinstance(value, str):
            arguments[at] = draw.choice(("cpu", "reference", "triton", "auto", "", "\0"))
        else:
            arguments[at] = spoiled_tensor(draw, value)
    try:
        result = function(*arguments)
    except Exception:
        return
    float(sum(x.double().sum() for x in tensors_of(result) if not x.is_meta))  # reads what was returned


def check_wrong_after_right(draw: Draw, name: str, tensors: list[Tensor], options: dict[str, Any]) -> None:
    """The public function twice with the right arguments, which it knows then, and once with wrong tensors."""
    for _ in range(2):
        results(name, (tensors, options), "cpu", 0)
    count = len(tensors_of((tensors, options)))
    spoiled = {draw.randrange(count) for _ in range(draw.choice((1, 1, 2)))}
    at = itertools.count()
    wrong = mapped((tensors, options), lambda x: spoiled_tensor(draw, x) if next(at) in spoiled else x)
    try:
        float(sum(x.double().sum() for x in tensors_of(results(name, wrong, "cpu", 0)) if not x.is_meta))
    except Exception:
        return


class Recorded(torch.utils._python_dispatch.TorchDispatchMode):
    """The calls of torch.ops.mmattn while it is open, as (op, arguments)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "mmattn":
            self.calls.append((func, [x.detach() if isinstance(x, Tensor) else x for x in args]))
        return func(*args, **(kwargs or {}))


def check(case: int, isa: str) -> None:
    """Run one case; AssertionError, or any other exception out of a valid call, is a finding."""
    import mmattn_kernels.cpu

    mmattn_kernels.cpu.extension().use_instruction_set(isa)
    draw = Draw(case)
    if case % 3:
        check_valid(draw, case)
    else:
        check_wrong(draw)


def work(first: int, step: int, sets: list[str]) -> None:
    """In a worker: cases first, first + step, ..., each with the next instruction set and named before it, for ever."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for i in itertools.count():
        case, isa = first + i * step, sets[i % len(sets)]
        print(f"begin {case} {isa}", flush=True)
        try:
            check(case, isa)
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"finding {text[:400]}", flush=True)


class Worker:
    """A process that runs cases, and what it said last; `since` is None till it has begun its first."""

    def __init__(self, first: int, step: int, sets: list[str]) -> None:
        self.step, self.sets, self.running, self.since, self.unread = step, sets, f"{first} {sets[0]}", None, b""
        command = [sys.executable, __file__, "--worker", str(first), "--step", str(step), "--isa", *sets]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("MMATTN_IMPL", None)
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def finding(self, text: str) -> str:
        case, isa = self.running.split()
        return f"--case {case} --isa {isa}: {text}"

    def read(self) -> tuple[int, list[str]]:
        """How many cases it has begun since the last time, and findings; EOFError where it died."""
        data = os.read(self.process.stdout.fileno(), 1 << 16)
        if not data:
            raise EOFError
        *lines, self.unread = (self.unread + data).split(b"\n")
        begun, findings = 0, []
        for line in lines:
            kind, _, text = line.decode().partition(" ")
            if kind == "begin":
                self.running, self.since, begun = text, time.monotonic(), begun + 1
            else:
                findings.append(self.finding(text))
        return begun, findings

    def death(self) -> str:
        code = self.process.wait()
        last = self.process.stderr.read().decode().strip().splitlines()[-1:]
        return self.finding(f"died with code {code} {' '.join(last)}")

    def next(self) -> Worker:
        """One that goes on after the case of this one, with the instruction set after its own."""
        case, isa = self.running.split()
        at = self.sets.index(isa) + 1
        return Worker(int(case) + self.step, self.step, self.sets[at:] + self.sets[:at])

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


def run(seconds: float, seed: int, sets: list[str]) -> tuple[int, list[str]]:
    """Fuzz for that long, counted from the first case, with a worker a core; the number of cases, and the findings."""
    count = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    workers = [Worker(1_000_000 * seed + i, count, sets) for i in range(count)]
    findings: list[str] = []
    done, end = 0, math.inf
    try:
        while time.monotonic() < end and len(findings) < MOST_FINDINGS:
            with selectors.DefaultSelector() as selector:
                for worker in workers:
                    selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
                ready = [key.data for key, _ in selector.select(timeout=1.0)]
            for i, worker in enumerate(workers):
                try:
                    begun, found = worker.read() if worker in ready else (0, [])
                    done, findings = done + begun, findings + found
                    if worker.since is None or time.monotonic() - worker.since < HANGS_S:
                        continue
                    findings.append(worker.finding(f"takes more than {HANGS_S} s"))
                except EOFError:
                    findings.append(worker.death())
                worker.stop()
                workers[i] = worker.next()
            if done and end == math.inf:
                end = time.monotonic() + seconds
    finally:
        for worker in workers:
            worker.stop()
    return done, findings


def available() -> list[str]:
    """The instruction sets of this CPU and build."""
    import mmattn_kernels.cpu

    if reason := mmattn_kernels.cpu.missing():
        raise SystemExit(f"nothing to fuzz: {reason}")
    return [name for name in INSTRUCTION_SETS if name in mmattn_kernels.cpu.extension().instruction_sets()]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tests/fuzz_ops.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=30, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the cases; default: %(default)s")
    parser.add_argument("--isa", choices=INSTRUCTION_SETS, nargs="+", help="default: all of this CPU and build")
    parser.add_argument("--case", type=int, help="run this one alone, in this process")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--step", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker is not None:
        work(args.worker, args.step, args.isa)
    if args.case is not None:
        for isa in args.isa or available():
            check(args.case, isa)
        print(f"case {args.case}: nothing found")
        return 0
    start = time.monotonic()
    done, findings = run(args.seconds, args.seed, args.isa or available())
    for finding in findings:
        print(finding)
    print(f"{done} cases in {time.monotonic() - start:.0f} s from seed {args.seed}, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
