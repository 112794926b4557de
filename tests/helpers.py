# SPDX-License-Identifier: MIT
"""What the tests of the ops and of the modules share."""

import pytest
import torch

import mmattn_kernels.cpu

INSTRUCTION_SETS = ("portable", "avx2", "avx512", "amx")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

needs_extension = pytest.mark.skipif(mmattn_kernels.cpu.missing() is not None, reason=str(mmattn_kernels.cpu.missing()))
REFERENCE_AND_CPU = ("reference", pytest.param("cpu", marks=needs_extension))
REFERENCE_AND_AUTO = ("reference", pytest.param("auto", marks=needs_extension))


def with_gradients(function, tensors, d_out, dtype=None):
    """{"out": function(tensors), "d_<name>": gradient} for a dict of tensors, each used in its own dtype or in `dtype`.

    In their own dtype they keep their strides.
    """
    leaves = {name: x.detach() if dtype is None else x.detach().to(dtype) for name, x in tensors.items()}
    out = function({name: x.requires_grad_() for name, x in leaves.items()})
    out.backward(d_out.to(out.dtype))
    return {"out": out.detach(), **{f"d_{name}": x.grad for name, x in leaves.items()}}


def strided(x):
    """The same values as a slice of something wider: other strides between batches and rows, and an odd offset."""
    batch, length, channels = x.shape
    wide = torch.full((2 * batch + 1, length + 3, channels + 11), float("nan"), dtype=x.dtype)
    wide[1::2, 2:-1, 5:-6] = x
    return wide[1::2, 2:-1, 5:-6]
