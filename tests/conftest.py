# SPDX-License-Identifier: MIT
"""What all tests share. The environment is set first: torch and Triton read it once, when they are imported."""

import contextlib
import os
import re
import sys
from importlib import metadata

if "PYTEST_XDIST_WORKER" in os.environ:  # one process a core: a thread each, and to whatever it starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy
import pytest

# More threads than work only slow down tests this small.
torch.set_num_threads(min(2, torch.get_num_threads()))
# cuDNN rounds fp32 to TF32 unless told otherwise, and fp32 here is compared with fp64.
torch.backends.cudnn.allow_tf32 = False
_LONG = re.compile("inductor|compiled|full_size|fuzz|examples_run|compiler|build_without|dry_run")
_CONTEXT_IS_LOST = pytest.StashKey()


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items):
    has_gpu = torch.cuda.is_available()
    cannot_interpret = None if has_gpu else _interpreter_is_broken()
    for item in items:
        if item.get_closest_marker("device") and not item.get_closest_marker("ahead_of_time"):
            if has_gpu:
                item.add_marker(pytest.mark.gpu)
            elif cannot_interpret:
                item.add_marker(pytest.mark.skip(reason=cannot_interpret))
        if item.get_closest_marker("gpu") and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if has_gpu or "PYTEST_XDIST_WORKER" in os.environ:  # the longest first, or one process ends long after the others
        items.sort(key=lambda item: not (item.get_closest_marker("ahead_of_time") or _LONG.search(item.name)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.excinfo is not None and item.get_closest_marker("gpu") and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            item.config.stash[_CONTEXT_IS_LOST] = item.nodeid
    return report


def pytest_runtest_protocol(item):
    """After an illegal access every call of CUDA fails, so a process of pytest-xdist ends, and gets a successor."""
    culprit = item.config.stash.get(_CONTEXT_IS_LOST, None)
    if culprit and "PYTEST_XDIST_WORKER" in os.environ:
        sys.stderr.write(f"{culprit} broke the CUDA context: this process ends, and {item.nodeid} fails for it\n")
        sys.stderr.flush()
        os._exit(1)


def _interpreter_is_broken():
    try:
        version = tuple(int(part) for part in metadata.version("triton").split(".")[:2])
    except metadata.PackageNotFoundError:
        return None  # the tests say so themselves
    if version < (3, 7) and tuple(int(part) for part in numpy.__version__.split(".")[:2]) >= (2, 4):
        return f"the interpreter of Triton {version[0]}.{version[1]} needs numpy below 2.4"
    return None


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def automatic_choice(monkeypatch):
    """The environment of whoever runs the tests does not choose what they test."""
    monkeypatch.delenv("MMATTN_IMPL", raising=False)


@pytest.fixture(autouse=True)
def launches():
    """Kernels are launched by the tables that the test sees."""
    if host := sys.modules.get("mmattn_kernels.triton._host"):
        host.clear_caches()


@pytest.fixture(autouse=True)
def announcements(monkeypatch):
    """What is said once a process is said in each test, whichever run before it."""
    if dispatch := sys.modules.get("mmattn.dispatch"):
        monkeypatch.setattr(dispatch, "_announced", set())


@pytest.fixture(autouse=True)
def one_instruction_set():
    """A test that chooses another for the CPU kernels leaves that of the process to the next ones."""
    module = sys.modules.get("mmattn_kernels._cpu")
    name = module and module.instruction_set()
    yield
    if module:
        assert module.instruction_set() == name


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Fresh memory begins as NaN, so that an output element nobody writes is seen."""

    def poison(allocate):
        def allocate_nan(*args, **kwargs):
            fresh = allocate(*args, **kwargs)
            return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

        return allocate_nan

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture
def threads():
    """Set the number of torch's threads: the fixture is the function, and undoes its effect."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def fresh_dynamo():
    import torch._dynamo.testing  # which torch does not import by itself

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def instruction_set():
    """Choose the CPU kernels' instruction set: the fixture is the function, and undoes its effect."""
    import mmattn_kernels.cpu

    if reason := mmattn_kernels.cpu.missing():
        pytest.skip(reason)
    extension = mmattn_kernels.cpu.extension()
    before = extension.instruction_set()

    def use(name):
        if name not in extension.instruction_sets():
            pytest.skip(f"this CPU and build run {', '.join(extension.instruction_sets())}")
        extension.use_instruction_set(name)

    yield use
    extension.use_instruction_set(before)


@pytest.fixture
def blocks(monkeypatch):
    """A function that sets the tile sizes of Triton's attention kernels."""
    from mmattn_kernels.triton import attention

    def pin(block_m, block_n):
        config = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 4, "num_stages": 1}
        monkeypatch.setattr(attention, "_config", lambda *args: config)

    return pin


@pytest.fixture
def small_files():
    """A context in which no file can grow beyond a few blocks, as on a full disk."""
    resource = pytest.importorskip("resource")

    @contextlib.contextmanager
    def limited(size=2000):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited
