# SPDX-License-Identifier: MIT
"""Builds the optional CPU extension; everything else is in pyproject.toml.

What a compiler does not know costs only what needs it: a flag for tuning is left out, an instruction set whose flags
are unknown is not built. What became of the build is recorded beside the extension, in _cpu.json, for
`python -m mmattn.info`: pip hides the output of a build that succeeds, and one without the extension does.
"""

import json
import os
import platform
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CPU = Path("kernels/mmattn_kernels/cpu")
KERNELS = ("attention", "norm", "conv", "hash")
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
AMX = [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"]
X86_SETS = {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": AVX512_BF16, "amx": AMX}
TUNING = {isa: ["-mprefer-vector-width=512"] for isa in ("avx512", "avx512_bf16", "amx")}
REQUIRED = ["-std=c++17", "-O3", "-fvisibility=hidden"]
WELCOME = ["-Wall", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized", "-fno-math-errno", "-g0"]
REMEDY = (
    "install a C++17 compiler (Debian: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install)"
)


class build_kernels(build_ext):
    """Compiles each kernel once per instruction set, in parallel; a failure leaves the rest of the install whole."""

    def run(self):
        self.record = {"reason": None, "left_out": {}}
        super().run()
        reason = self.record["reason"]
        for folder in self._record_folders():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "_cpu.json").write_text(json.dumps(self.record, indent=2) + "\n")
        for name, why in self.record["left_out"].items():
            sys.stderr.write(f"mmattn: kernels for {name} are not built: {why}\n")
        if reason:
            sys.stderr.write(f"mmattn: installed WITHOUT its CPU kernels, so it is slow on CPUs: {reason}\n")

    def build_extension(self, ext):
        try:
            if os.environ.get("MMATTN_SKIP_EXTENSION") == "1":
                raise CompileError("MMATTN_SKIP_EXTENSION=1 was set for the build")
            self._build(ext)
        except Exception as error:
            self.record["reason"] = " ".join(str(error).split())
            raise CompileError(self.record["reason"]) from error  # an optional extension may fail by this alone

    def _build(self, ext):
        try:
            import pybind11
        except ImportError:
            raise CompileError("pybind11 is not installed; pip install pybind11, or build with isolation") from None
        includes = [pybind11.get_include()]
        if not self._knows([]):
            raise CompileError(f"no C++17 compiler works here (CXX={os.environ.get('CXX', 'c++')}); {REMEDY}")
        openmp = [flag for flag in ["-fopenmp"] if platform.system() != "Darwin" and self._knows([flag])]
        common = [*REQUIRED, *(flag for flag in WELCOME if self._knows([flag])), *openmp]
        extra = os.environ.get("MMATTN_CXXFLAGS", "").split()
        sets = {"portable": [], **self._known_sets()}
        jobs = [("bindings", "bindings", [f"-DMMATTN_HAS_{isa.upper()}" for isa in sets])]
        for kernel in KERNELS:
            jobs += [(kernel, f"{kernel}_{isa}", [f"-DMMATTN_ISA={isa}", *flags]) for isa, flags in sets.items()]

        def compile_one(job):
            source, name, flags = job
            return self.compiler.compile(
                [str(CPU / f"{source}.cpp")],
                output_dir=str(Path(self.build_temp) / name),
                include_dirs=[*includes, *self.compiler.include_dirs],
                extra_postargs=[*common, *flags, *extra],
                depends=ext.depends,
            )

        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = [o for compiled in pool.map(compile_one, jobs) for o in compiled]
        except CompileError as error:
            raise CompileError(f"a kernel does not compile ({error}); `pip install -v` shows the messages") from error
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), extra_postargs=[*openmp, *extra], target_lang="c++"
        )

    def _known_sets(self):
        """Flags by instruction set, of those that the compiler knows all flags of."""
        if platform.machine().lower() not in ("x86_64", "amd64"):
            return {}
        asked = {flag for flags in (*X86_SETS.values(), *TUNING.values()) for flag in flags}
        unknown = {flag for flag in asked if not self._knows([flag])}
        known = {}
        for isa, flags in X86_SETS.items():
            missing = [flag for flag in flags if flag in unknown]
            if missing:
                self.record["left_out"][isa] = f"the compiler does not know {', '.join(missing)}"
            else:
                known[isa] = [*flags, *(flag for flag in TUNING.get(isa, []) if flag not in unknown)]
        return known

    def _knows(self, flags):
        """Whether the compiler takes these flags; asked by compiling a line of C++17."""
        with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
            probe = Path(folder) / "probe.cpp"
            probe.write_text("inline constexpr int answer = 42;\nint main() { return answer - 42; }\n")
            own = os.dup(2)
            os.dup2(nowhere.fileno(), 2)  # of the compiler, which a refusal is expected of
            try:
                self.compiler.compile([str(probe)], output_dir=folder, extra_postargs=["-std=c++17", *flags])
            except CompileError:
                return False
            finally:
                os.dup2(own, 2)
                os.close(own)
        return True

    def _record_folders(self):
        """Where the extension goes: among what is built, and in the tree if it is used in place."""
        for ext in self.extensions:
            yield Path(self.build_lib, *ext.name.split(".")[:-1])
            if self.inplace:
                yield CPU.parent


setup(
    ext_modules=[
        Extension(
            "mmattn_kernels._cpu",
            [str(CPU / f"{name}.cpp") for name in ("bindings", *KERNELS)],
            depends=[str(path) for path in sorted(CPU.glob("*.h"))],
            optional=True,
        )
    ],
    cmdclass={"build_ext": build_kernels},
)
