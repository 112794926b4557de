# SPDX-License-Identifier: MIT
"""`python -m mmattn.info`: what is built, what runs here, and why not where not."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata

import torch

import mmattn
from mmattn import dispatch

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_VARIABLES = ("MMATTN_IMPL", "MMATTN_CPU_ISA", "TRITON_INTERPRET")


def report() -> str:
    """The whole report, as lines of text."""
    lines = [*_machine(), ""]
    for op in dispatch.OPS:
        for device in ("cpu", *(("cuda",) if torch.cuda.is_available() else ())):
            for dtype in _DTYPES:
                lines += _choice(op, device, dtype)
    return "\n".join(lines)


def _machine() -> list[str]:
    rows = [
        ("mmattn", mmattn.__version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("triton", _triton()),
        ("cpu", _cpu_model()),
        ("threads", str(torch.get_num_threads())),
        ("cpu extension", _extension()),
        ("cuda devices", _cuda_devices()),
    ]
    rows += [(name, os.environ[name]) for name in _VARIABLES if name in os.environ]
    return [f"{name:<18}{value}" for name, value in rows]


def _choice(op: str, device: str, dtype: torch.dtype) -> list[str]:
    """What impl="auto" runs, then a line for each implementation that cannot run, or is not picked by itself."""
    requested = os.environ.get("MMATTN_IMPL") or "auto"
    reasons = {impl: _unavailable(op, impl, device, dtype) for impl in dispatch.IMPLS}
    if requested not in ("auto", *dispatch.IMPLS):
        chosen = f"error: MMATTN_IMPL is {requested!r}; expected 'auto', {', '.join(map(repr, dispatch.IMPLS))}"
    elif reasons.get(requested):
        chosen = f"error: MMATTN_IMPL is {requested!r}"
    else:
        try:
            chosen = dispatch.explain(op, requested, device, dtype)[0]
        except Exception as error:
            chosen = f"error: {error}"
    parts = dispatch.parts(op, chosen)
    lines = [f"{op} {device} {str(dtype).removeprefix('torch.')}: {chosen}{f' {parts}' if parts else ''}"]
    for impl, reason in reasons.items():
        if impl != chosen:
            lines.append(f"    {impl:<10} {f'no: {reason}' if reason else 'on request'}")
    return lines


def _unavailable(op: str, impl: str, device: str, dtype: torch.dtype) -> str | None:
    try:
        return dispatch.support(op, impl, device, dtype).reason
    except Exception as error:  # a report is wanted most where something is broken
        return str(error)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _triton() -> str:
    import mmattn_kernels.triton

    reason = mmattn_kernels.triton.missing()
    return _version("triton") + (f"; {reason}" if reason and "not installed (pip install triton)" not in reason else "")


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _extension() -> str:
    try:
        import mmattn_kernels.cpu

        reason = mmattn_kernels.cpu.missing()
        if reason is not None:
            return f"no: {reason}"
        extension = mmattn_kernels.cpu.extension()
    except Exception as error:
        return f"no: {error}"
    left_out = mmattn_kernels.cpu.build_record().get("left_out") or {}
    notes = [f"{name} is not in it: {reason}" for name, reason in left_out.items()]
    runs = f"runs {', '.join(extension.instruction_sets())} here"
    return "; ".join(["built", runs, f"{extension.instruction_set()} is active", *notes])


def _cuda_devices() -> str:
    if not torch.cuda.is_available():
        return "none"
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return "; ".join(f"{p.name} (sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB)" for p in found)


if __name__ == "__main__":
    sys.stdout.write(report() + "\n")
