# SPDX-License-Identifier: MIT
"""Triton's compiler without a GPU: targets, a driver that launches nothing, and what a compiled kernel takes.

For the tuner, which compiles its candidates so, and for tests/triton_aot.py.
"""

from __future__ import annotations

import functools
import importlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Target:
    """A GPU as far as compilation goes.

    Attributes:
        device_name: as torch.cuda.get_device_name gives it.
        arch: ten times the compute capability, or AMD's name of an architecture.
        shared_limit: bytes of shared memory a program may take.
        backend: Triton's.
    """

    device_name: str
    arch: int | str
    shared_limit: int
    backend: str = "cuda"

    @classmethod
    def here(cls) -> Target:
        properties = torch.cuda.get_device_properties(0)
        shared = getattr(properties, "shared_memory_per_block_optin", 0) or (99 << 10)
        return cls(torch.cuda.get_device_name(), properties.major * 10 + properties.minor, shared)

    def gpu(self) -> Any:
        """Triton's own description of it."""
        compiler = importlib.import_module("triton.backends.compiler")
        return compiler.GPUTarget(self.backend, self.arch, 32 if self.backend == "cuda" else 64)


# Stand-ins for GPUs where there are none.
TARGETS = {
    "sm_80": Target("NVIDIA A100-SXM4-80GB", 80, 163 << 10),
    "sm_90": Target("NVIDIA H200", 90, 227 << 10),
    "sm_100": Target("NVIDIA B200", 100, 227 << 10),
    "gfx942": Target("AMD Instinct MI300X", "gfx942", 64 << 10, "hip"),
}


class Driver:
    """What JITFunction.run asks of a driver before it launches; with it nothing is launched."""

    def __init__(self, target: Target | None = None) -> None:
        self.target = target

    def get_current_device(self) -> str:
        return str(self.target)  # Triton keeps compiled kernels per device: one "device" a target

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target and self.target.gpu()


def tool(name: str, *arguments: str) -> str | None:
    """The output of one of NVIDIA's programs in Triton's package, or None where it has none such."""
    triton = importlib.import_module("triton")
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    if not path.exists():
        return None
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


class Compiled:
    """What a compiled kernel takes; whatever needs a program that Triton does not bring along is None."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def _on_cubin(self, name: str, option: str) -> str | None:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.kernel.asm["cubin"])
            file.flush()
            return tool(name, option, file.name)

    @functools.cached_property
    def code(self) -> str | None:
        """The instructions of the GPU itself, as text."""
        return self.kernel.asm["amdgcn"] if "amdgcn" in self.kernel.asm else self._on_cubin("nvdisasm", "-c")

    @functools.cached_property
    def _usage(self) -> str | None:
        return self._on_cubin("cuobjdump", "-res-usage")

    def _number(self, cuda: str, hip: str) -> int | None:
        name, text = (hip, self.code) if "amdgcn" in self.kernel.asm else (cuda, self._usage)
        if text is None:
            return None
        found = re.search(rf"{name}:\s*(\d+)", text)
        if found is None:
            raise ValueError(f"{name} is not said of {self.kernel.metadata.name}")
        return int(found[1])

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return self.kernel.metadata.shared

    @property
    def tensor_memory(self) -> int:
        """Columns of tensor memory."""
        return getattr(self.kernel.metadata, "tmem_size", None) or 0

    @property
    def registers(self) -> int | None:
        return self._number("REG", r"\.vgpr_count")

    @property
    def stack(self) -> int | None:
        """Bytes."""
        return self._number("STACK", r"\.private_segment_fixed_size")

    @property
    def spills(self) -> int | None:
        """Accesses to local memory (cuda), or registers kept there (hip)."""
        if "amdgcn" in self.kernel.asm:
            return self._number("", r"\.vgpr_spill_count")
        if self.stack == 0:  # there is nowhere to spill to
            return 0
        return None if self.code is None else len(re.findall(r"\b(?:STL|LDL)\b", self.code))
