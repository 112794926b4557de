# SPDX-License-Identifier: MIT
"""Builds the optional CPU extension; everything else is in pyproject.toml."""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

try:
    from pybind11.setup_helpers import Pybind11Extension
except ImportError:  # building without isolation on a machine that lacks it: install the Python parts alone
    Pybind11Extension = None

CPU = Path("kernels/mmattn_kernels/cpu")
KERNELS = ("attention", "norm", "conv", "hash")
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX512 = ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
INSTRUCTION_SETS = {"portable": []}
if X86:
    INSTRUCTION_SETS |= {
        "avx2": ["-mavx2", "-mfma"],
        "avx512": AVX512,
        "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
    }
COMMON = [
    "-std=c++17",
    "-O3",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-psabi",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
    "-fno-math-errno",
    "-g0",
]


class build_kernels(build_ext):
    """Compiles each kernel once per instruction set, in parallel; a failure leaves the rest of the install whole."""

    def build_extension(self, ext):
        openmp = [] if platform.system() == "Darwin" else ["-fopenmp"]
        extra = os.environ.get("MMATTN_CXXFLAGS", "").split()
        jobs = [(str(CPU / "bindings.cpp"), "bindings", ["-DMMATTN_X86"] if X86 else [])]
        for kernel in KERNELS:
            for isa, flags in INSTRUCTION_SETS.items():
                jobs.append((str(CPU / f"{kernel}.cpp"), f"{kernel}_{isa}", [f"-DMMATTN_ISA={isa}", *flags]))

        def compile_one(job):
            source, name, flags = job
            return self.compiler.compile(
                [source],
                output_dir=str(Path(self.build_temp) / name),
                include_dirs=ext.include_dirs,
                extra_postargs=[*COMMON, *openmp, *flags, *extra],
                depends=ext.depends,
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [o for compiled in pool.map(compile_one, jobs) for o in compiled]
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), extra_postargs=[*openmp, *extra], target_lang="c++"
        )


extensions = []
if Pybind11Extension is not None and os.environ.get("MMATTN_SKIP_EXTENSION") != "1":
    sources = [str(CPU / "bindings.cpp"), *(str(CPU / f"{kernel}.cpp") for kernel in KERNELS)]
    extensions = [
        Pybind11Extension("mmattn_kernels._cpu", sources, depends=[str(p) for p in CPU.glob("*.h")], optional=True)
    ]

setup(ext_modules=extensions, cmdclass={"build_ext": build_kernels})
