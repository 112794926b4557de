# SPDX-License-Identifier: MIT
"""What every benchmark here shares: the machine's description, its ceilings, fair timing, and peak memory.

One row is one provider on one case (shape, dtype, mode). Providers of a case are sampled in rounds, one sample each
a round in random order, so drift of the machine hits all alike; a ratio is the median of the ratios within rounds. A
provider that fails, does not apply or disagrees with its peers keeps its row, with the reason in place of the figures.
"""

from __future__ import annotations

import ctypes
import datetime
import functools
import multiprocessing
import os
import platform
import random
import re
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
DISAGREEMENT = {"float64": 1e-9, "float32": 2e-3, "bfloat16": 3e-2, "float16": 1e-2}  # float32 may run as tf32
Call = Callable[[], Any]
Compare = Callable[[Any], list[Tensor]]  # of a call's result, the tensors that are compared


class NotApplicable(Exception):
    """Raised while building a provider's call; the message says why it cannot run this case."""


@dataclass
class Provider:
    """One competitor on one case.

    Attributes:
        name: as in the tables.
        build: makes the call that is timed; its tensors are those of the other providers. May raise NotApplicable.
        gflop, gbytes: work of one call, and the least memory traffic (each input read once, each output written once).
        same: it computes the same thing as the baseline, so its result is compared with the baseline's before timing.
        probe: for CPU memory, a picklable (function, arguments); the function returns (a small call, the call) and runs
            in a fresh process.
        note: shown beside the row.
        compare: of the call's result, the tensors that are compared; all of them by default.
        divide: measures, after the rest, how the call's time divides among its parts; kept in the row as it is.
    """

    name: str
    build: Callable[[], Call]
    gflop: float
    gbytes: float
    same: bool = True
    probe: tuple[Callable[..., tuple[Call, Call]], tuple] | None = None
    note: str = ""
    compare: Compare | None = None
    divide: Callable[[Call], Any] | None = None


@dataclass
class Settings:
    """How long to measure: `rounds` samples at most, `budget_s` seconds a provider and row, but `minimum` samples.

    Calls of more work than `max_gflop` are left out. `disagreement` is by how much results may differ from the
    baseline's, in each dtype. With `prime` a call that is not timed goes before each sample:
    where memory bounds an op, peers that share an input would else find it in the cache, and one of another layout not.
    """

    rounds: int = 30
    budget_s: float = 3.0
    warmup_s: float = 0.3
    minimum: int = 3
    graphs: bool = False
    prime: bool = False
    max_gflop: float | None = None
    disagreement: dict[str, float] = field(default_factory=lambda: DISAGREEMENT)


@dataclass
class Samples:
    """Milliseconds of each provider by round, and the reasons of those that have none."""

    ms: dict[str, list[float]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def speed(self, name: str, peer: str) -> float | None:
        """How many times faster `name` is than `peer`: the median over the rounds in which both were sampled."""
        pairs = list(zip(self.ms.get(name, ()), self.ms.get(peer, ()), strict=False))
        return float(numpy.median([theirs / ours for ours, theirs in pairs])) if pairs else None


def describe_machine(device: str, threads: int | None = None) -> dict[str, Any]:
    """The header of a results file: what ran, on what, from which commit, by which command."""
    import mmattn_kernels.cpu

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    kernels_missing = mmattn_kernels.cpu.missing()
    status = _output("git", "status", "--porcelain", "--untracked-files=no")
    header = {
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else _cpu_model(),
        "cpu": _cpu_model(),
        "cpu_cores": os.cpu_count(),
        "instruction_set": None if kernels_missing else mmattn_kernels.cpu.extension().instruction_set(),
        "threads": threads or torch.get_num_threads(),
        "load_average_at_start": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "commit": _output("git", "rev-parse", "--short=10", "HEAD"),
        "dirty": None if status is None else bool(status),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
    }
    if device == "cuda":
        query = "driver_version,power.limit,clocks.max.sm"
        header["cuda"] = torch.version.cuda
        header["gpu"] = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0")
    return header


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    name = found[1] if found else (_output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine())
    return re.sub(r"\s+", " ", re.sub(r"\((R|TM)\)", "", name)).strip()


def sampler(device: str) -> Callable[[Call], float]:
    """A function that runs a call once and returns its milliseconds: device events after an L2 flush, or the clock."""
    if device != "cuda":

        def on_cpu(call: Call) -> float:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3

        return on_cpu
    l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)
    flush = torch.empty(max(256 << 20, 4 * l2), dtype=torch.int8, device="cuda")

    def on_cuda(call: Call) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        flush.zero_()  # also keeps the device busy while the first kernels of the call are being launched
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    return on_cuda


def timed(function: Callable[..., Any], leaves: Sequence[Tensor], grads: Sequence[Tensor], mode: str) -> Call:
    """What is timed of a function: its forward without a graph, the backward of a kept graph, or both."""
    if mode == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return function(*leaves)

        return forward
    if mode == "both":
        return lambda: torch.autograd.grad(function(*leaves), leaves, grads)
    outputs = function(*leaves)
    return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)


def warm_up(call: Call, sample: Callable[[Call], float], seconds: float, most: int = 50) -> Any:
    """Run the call once, then again until `seconds` have passed; returns the first result."""
    kept = []
    spent = sample(lambda: kept.append(call()))
    for _ in range(most):
        if spent >= seconds * 1e3:
            break
        spent += sample(call)
    return kept[0]


def interleave(calls: dict[str, Call], sample: Callable[[Call], float], settings: Settings) -> Samples:
    """Sample the calls in rounds; a slow one leaves once its budget is spent and it has the minimum of samples."""
    samples = Samples({name: [] for name in calls})
    active, order = list(calls), random.Random(0)
    for _ in range(settings.rounds):
        # A rotation would leave each its neighbour, and one that sweeps the caches would slow the same peer every time.
        for name in order.sample(active, len(active)):
            try:
                if settings.prime:
                    calls[name]()
                samples.ms[name].append(sample(calls[name]))
            except Exception as error:
                samples.reasons[name] = reason_of(error)
                samples.ms.pop(name)
        active = [
            name
            for name in active
            if name in samples.ms
            and (len(samples.ms[name]) < settings.minimum or sum(samples.ms[name]) < settings.budget_s * 1e3)
        ]
    return samples


def run_case(
    case: dict[str, Any],
    providers: Iterable[Provider],
    *,
    sample: Callable[[Call], float],
    settings: Settings,
    baseline: str,
    ratios_to: Iterable[str] = (),
    memory: bool = True,
) -> list[dict[str, Any]]:
    """Measure the providers on one case (op, shape, dims, dtype, mode, device) and return their rows."""
    providers = sorted(providers, key=lambda p: p.name != baseline)
    calls, reasons, expected = {}, {}, None
    on_cuda = case.get("device") == "cuda"
    for provider in providers:
        try:
            if settings.max_gflop and provider.gflop > settings.max_gflop:
                limit = f"more than --max-gflop {settings.max_gflop:g}"
                raise NotApplicable(f"skipped: {provider.gflop:.0f} GFLOP a call, {limit}")
            call = provider.build()
            result = (provider.compare or detached)(warm_up(call, sample, settings.warmup_s))
            if provider.name == baseline:
                expected = result
            elif provider.same and expected is not None:
                error = relative_difference(result, expected)
                if not error <= settings.disagreement.get(case["dtype"], 3e-2):
                    raise AssertionError(f"disagrees with {baseline}: relative difference {error:.1e}")
            calls[provider.name] = call
        except Exception as error:
            reasons[provider.name] = reason_of(error)
    expected = result = None
    ready = {}
    for name, call in calls.items():
        try:
            ready[name] = captured(call) if settings.graphs and on_cuda else call
        except Exception as error:
            reasons[name] = reason_of(error)
    samples = interleave(ready, sample, settings)
    samples.reasons |= reasons
    rows = []
    for provider in providers:
        row = {**case, "provider": provider.name, "note": provider.note, "reason": samples.reasons.get(provider.name)}
        if provider.name in samples.ms:
            row |= figures(provider, samples, ratios_to)
            if memory:
                row |= _memory(provider, calls[provider.name], on_cuda)
            if provider.divide is not None:
                try:
                    row["parts"] = provider.divide(calls[provider.name])
                except Exception as error:
                    row["parts_reason"] = reason_of(error)
        rows.append(row)
    return rows


def figures(provider: Provider, samples: Samples, ratios_to: Iterable[str]) -> dict[str, Any]:
    """What a row says of a provider's samples."""
    ms = samples.ms[provider.name]
    p20, p50, p80 = (float(x) for x in numpy.percentile(ms, [20, 50, 80]))
    return {
        "samples": len(ms),
        "ms_p20": p20,
        "ms_p50": p50,
        "ms_p80": p80,
        "speed": {peer: samples.speed(provider.name, peer) for peer in ratios_to},
        "gflop": provider.gflop,
        "gflop_per_s": provider.gflop / p50 * 1e3,
        "gbyte_per_s": provider.gbytes / p50 * 1e3,
    }


def _memory(provider: Provider, call: Call, on_cuda: bool) -> dict[str, Any]:
    try:
        if on_cuda:
            extra = cuda_peak_extra(call)
        elif provider.probe is not None:
            extra = cpu_peak_extra(*provider.probe)
        else:
            raise NotApplicable("no probe for a fresh process")
    except Exception as error:
        return {"peak_extra_mb": None, "memory_reason": reason_of(error)}
    return {"peak_extra_mb": extra / 2**20, "memory_reason": None}


def reason_of(error: BaseException) -> str:
    """An exception as one line of a table."""
    text = (str(error).strip().splitlines() or [""])[0][:200]
    return text if isinstance(error, (NotApplicable, AssertionError)) and text else f"{type(error).__name__}: {text}"


def detached(result: Any) -> list[Tensor]:
    """The tensors of a result, without its graph."""
    tensors = result if isinstance(result, (tuple, list)) else [result]
    return [t.detach() for t in tensors if isinstance(t, Tensor)]


def relative_difference(a: Iterable[Tensor], b: Iterable[Tensor]) -> float:
    """The largest of ||a - b|| / ||b|| over pairs of tensors, in at least float32; NaN if anything is."""
    errors = []
    for left, right in zip(a, b, strict=True):
        wide = torch.promote_types(right.dtype, torch.float32)
        left, right = left.to(wide), right.to(wide)
        errors.append(((left - right).norm() / right.norm().clamp_min(1e-30)).item())
    return float(numpy.max(errors))


def captured(call: Call) -> Call:
    """The call as the replay of one CUDA graph: the device's own time, without Python and the launches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    return lambda: (graph.replay(), kept)[1]


def cuda_peak_extra(call: Call) -> int:
    """Bytes that torch's allocator held at the peak of one warm call beyond those held before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@functools.cache  # a peer in fp32 may be in the rows of several dtypes
def cpu_peak_extra(function: Callable[..., tuple[Call, Call]], arguments: tuple, timeout_s: float = 300) -> int:
    """Bytes by which resident memory grew, at its peak, in the first full-size call of a process of its own.

    `function(*arguments)` returns (a small call, the call). The small one loads code and starts threads; then freed
    memory goes back to the system and the peak counter is reset, so that neither what the set-up left behind nor an
    allocator that reuses it can hide an allocation. Outputs, gradients and workspaces all count.
    """
    if not Path("/proc/self/clear_refs").exists():
        raise NotApplicable("peak memory is read from Linux's /proc")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "mmattn"])  # torch loaded once; no thread has run when children are forked
    _give_freed_memory_back()  # what this process has kept may be most of what there is
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_peak_in_child, args=(sender, function, arguments), daemon=True)
    child.start()
    sender.close()
    try:
        if not receiver.poll(timeout_s):
            raise TimeoutError(f"the call took more than {timeout_s:.0f} s in a fresh process")
        outcome = receiver.recv()
    except EOFError:
        child.join(10)
        raise RuntimeError(f"the fresh process ended with code {child.exitcode}") from None
    finally:
        child.kill()
        child.join()
    if isinstance(outcome, str):
        raise RuntimeError(outcome)
    return outcome


def _give_freed_memory_back() -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _peak_in_child(sender: Any, function: Callable[..., tuple[Call, Call]], arguments: tuple) -> None:
    try:
        libc = ctypes.CDLL(None)
        m_mmap_threshold = -3
        if hasattr(libc, "mallopt"):  # fixed, or glibc raises it and then keeps freed blocks of up to 32 MB resident
            libc.mallopt(m_mmap_threshold, 64 << 10)
        small, call = function(*arguments)
        small()
        _give_freed_memory_back()
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        kept = call()
        sender.send(max(0, _resident("VmHWM") - before))
        del kept
    except Exception as error:
        sender.send(reason_of(error))


def _resident(field_name: str) -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field_name}:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) << 10 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def measure_ceilings(device: str, dtypes: Iterable[str], sample: Callable[[Call], float]) -> dict[str, Any]:
    """The machine's rates now: torch's matrix product by dtype (GFLOP/s), a large copy (GB/s, read plus written).

    Numbers of 16 bits can be multiplied in float32 too: their rate is at least that of float32, which a CPU without
    instructions for them has in torch a hundred times over.
    """
    on_cuda = device == "cuda"
    matmul: dict[str, float] = {}
    for dtype in dict.fromkeys(("float32", *dtypes)):
        n, most = (8192, 8192) if on_cuda else (256, 2048)
        # A CPU without bfloat16 takes minutes for a large product of them, a number at a time.
        while (best := _best_ms(_product(n, dtype, device), sample)) < 100 and n < most:
            n *= 2
        matmul[dtype] = max(2e-6 * n**3 / best, matmul.get("float32", 0.0))
    source = torch.ones(1 << (30 if on_cuda else 27), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy = 2e-6 * source.numel() / _best_ms(lambda: target.copy_(source), sample)
    return {"matmul_gflop_per_s": matmul, "copy_gbyte_per_s": copy}


def _product(n: int, dtype: str, device: str) -> Call:
    a, b = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _best_ms(call: Call, sample: Callable[[Call], float]) -> float:
    warm_up(call, sample, 0.2, most=5)
    return min(sample(call) for _ in range(5))


def higher(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The higher of two measurements of the ceilings: one of before the rows, one of after."""
    matmul = {name: max(value, other["matmul_gflop_per_s"][name]) for name, value in one["matmul_gflop_per_s"].items()}
    return {"matmul_gflop_per_s": matmul, "copy_gbyte_per_s": max(one["copy_gbyte_per_s"], other["copy_gbyte_per_s"])}


def add_shares(rows: Iterable[dict[str, Any]], ceilings: dict[str, Any]) -> None:
    """Write into each measured row its share of the matrix product's rate and of the copy's bandwidth.

    The copy is of tensors larger than any cache; on data that stays in a cache its share can pass 100%.
    """
    for row in rows:
        if row.get("gflop_per_s") is not None:
            row["share_of_matmul"] = row["gflop_per_s"] / ceilings["matmul_gflop_per_s"][row["dtype"]]
            row["share_of_copy"] = row["gbyte_per_s"] / ceilings["copy_gbyte_per_s"]
