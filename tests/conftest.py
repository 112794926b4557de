# SPDX-License-Identifier: MIT
"""What all tests share. Triton reads TRITON_INTERPRET once, so it is set before anything can import Triton."""

import contextlib
import os
import sys

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

# More threads than work only slow down tests this small.
torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


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
        host.forget()


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
