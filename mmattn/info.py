# SPDX-License-Identifier: MIT
"""`python -m mmattn.info`: what is built, what runs here, and why not where not."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from importlib import metadata
from typing import NamedTuple

import torch

import mmattn
from mmattn import dispatch

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_VARIABLES = ("MMATTN_IMPL", "MMATTN_CPU_ISA", "TRITON_INTERPRET")


def report(*, is_verbose: bool = False) -> str:
    """The report, as lines of text: the machine, what impl="auto" runs of each op, and each reason why something does
    not run once.

    Args:
        is_verbose: a paragraph for each op, device and dtype instead, with the reason of each implementation.
    """
    lines = [*_machine(), ""]
    reasons: dict[str, None] = {}  # in the order in which they are met
    for op in dispatch.OPS:
        for device in ("cpu", *(("cuda",) if torch.cuda.is_available() else ())):
            choices = {str(dtype).removeprefix("torch."): _choice(op, device, dtype) for dtype in _DTYPES}
            if is_verbose:
                lines += [line for dtype, choice in choices.items() for line in choice.lines(f"{op} {device} {dtype}")]
                continue
            dtypes: dict[str, list[str]] = {}
            for dtype, choice in choices.items():
                dtypes.setdefault(choice.said, []).append(dtype)
                reasons |= {f"{impl}: {why}": None for impl, why in choice.others.items() if why}
            said = ", ".join(f"{choice} ({', '.join(of)})" for choice, of in dtypes.items())
            lines.append(f"{op} on {device}: {said}")
    if reasons:
        lines += ["", "what does not run, and why (--verbose says it of each op and dtype):", *reasons]
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


class _Choice(NamedTuple):
    """What impl="auto" runs, and why each other implementation cannot run; None for one that runs on request."""

    said: str
    others: dict[str, str | None]

    def lines(self, name: str) -> list[str]:
        others = [f"    {impl:<10} {f'no: {why}' if why else 'on request'}" for impl, why in self.others.items()]
        return [f"{name}: {self.said}", *others]


def _choice(op: str, device: str, dtype: torch.dtype) -> _Choice:
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
    others = {impl: reason for impl, reason in reasons.items() if impl != chosen}
    return _Choice(f"{chosen}{f' {parts}' if parts else ''}", others)


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
    parser = argparse.ArgumentParser(
        "python -m mmattn.info", description="What is built, what runs on this machine, and why not where not."
    )
    parser.add_argument("--verbose", action="store_true", help="each op, device and dtype by itself, with all reasons")
    sys.stdout.write(report(is_verbose=parser.parse_args().verbose) + "\n")
