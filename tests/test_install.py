# SPDX-License-Identifier: MIT
"""What an install leaves behind on machines with old compilers, or none, and without the extra packages."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from helpers import needs_git

ROOT = pathlib.Path(__file__).resolve().parent.parent

needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def build(tmp_path, compiler: str, **environment: str) -> tuple[subprocess.CompletedProcess, dict, pathlib.Path]:
    """The build of setup.py by a compiler: what it printed, its record, and the folder of what it built."""
    pytest.importorskip("pybind11")
    built = tmp_path / "lib" / "mmattn_kernels"
    folders = ["--build-temp", tmp_path / "temp", "--build-lib", tmp_path / "lib"]
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", *folders],
        cwd=ROOT,
        env={**os.environ, "CC": compiler, "CXX": compiler, "MMATTN_CXXFLAGS": "-O0 -DMMATTN_NO_OP", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done, json.loads((built / "_cpu.json").read_text()), built


def fake_compiler(tmp_path, refused: str) -> str:
    """g++ that does not know flags of a pattern of the shell."""
    path = tmp_path / "g++"
    path.write_text(
        "#!/bin/sh\n"
        f'for flag in "$@"; do case $flag in {refused}) echo "g++: error: unrecognized option $flag" >&2; exit 1;; '
        'esac; done\nexec g++ "$@"\n'
    )
    path.chmod(0o755)
    return str(path)


@needs_a_compiler
def test_a_compiler_without_amx_loses_amx_alone(tmp_path):
    compiler = fake_compiler(tmp_path, "-mamx-*|-mavx512*|-Wno-psabi")
    done, record, built = build(tmp_path, compiler)
    assert record["reason"] is None
    assert record["left_out"].keys() == {"avx512", "avx512_bf16", "amx"}
    assert "-mamx-tile" in record["left_out"]["amx"] and "amx" in done.stderr
    code = "import torch, mmattn_kernels._cpu as m; print(m.instruction_sets())"
    sets = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(built.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "'portable', 'avx2']" in sets.stdout, sets.stdout + sets.stderr


@needs_a_compiler
@pytest.mark.parametrize(
    ("refused", "environment", "reason"),
    [
        ("*", {}, "no C++17 compiler works here"),
        ("-DMMATTN_NO_OP", {}, "a kernel does not compile"),
        ("none", {"MMATTN_SKIP_EXTENSION": "1"}, "MMATTN_SKIP_EXTENSION=1"),
    ],
    ids=["no compiler", "a kernel fails", "skipped"],
)
def test_a_build_without_the_extension_says_so(tmp_path, refused, environment, reason):
    done, record, built = build(tmp_path, fake_compiler(tmp_path, refused), **environment)
    assert reason in record["reason"] and not list(built.glob("_cpu*.so"))
    last = done.stderr.strip().splitlines()[-1]
    assert "WITHOUT its CPU kernels" in last and reason in last


def test_the_reason_of_a_missing_extension_is_told(tmp_path, monkeypatch):
    import mmattn_kernels.cpu as cpu

    package = tmp_path / "cpu"
    package.mkdir()
    monkeypatch.setattr(cpu, "__file__", str(package / "__init__.py"))
    monkeypatch.setitem(sys.modules, "mmattn_kernels._cpu", None)
    cpu._load.cache_clear()
    try:
        assert "is not built" in cpu.missing() and cpu.build_record() == {}
        (tmp_path / "_cpu.json").write_text(json.dumps({"reason": "no C++17 compiler works here", "left_out": {}}))
        cpu._load.cache_clear()
        assert "no C++17 compiler works here" in cpu.missing()
        (tmp_path / "_cpu.json").write_text("[")
        assert cpu.build_record() == {}
    finally:
        cpu._load.cache_clear()


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("diffusers", "import mmdiffusion"),
        ("diffusers", "from mmdiffusion.cli import main; main(['--help'])"),
        ("av", "import mmdiffusion.media"),
    ],
)
def test_without_the_extra_packages_the_remedy_is_named(package, call):
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.modules[{package!r}] = None; {call}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert f"needs {package}, which" in done.stderr and "pip install -e '.[diffusion]' in a clone" in done.stderr


@needs_git
def test_the_source_distribution_has_every_file(tmp_path):
    pytest.importorskip("pybind11")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    packed = (tmp_path / "mmattn.egg-info" / "SOURCES.txt").read_text().split()
    assert set(tracked) - {".gitignore"} <= set(packed)
