# SPDX-License-Identifier: MIT
"""Triton's attention kernels by tables of ranges: against the dense mask, and compiled ahead of time."""

import dataclasses
import os

import pytest
import torch

# Triton reads this once, when it is first imported; conftest.py sets it too, before any other test imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from helpers import DEVICE, with_gradients
from test_segmented_attention import CASES, Case, random_case
from triton_common import MATRIX_INSTRUCTION, SHARED_LIMIT, SPILLS, ahead_of_time, named, targets

import mmattn
from mmattn import dispatch
from mmattn.testing import assert_close_to_fp64
from mmattn_kernels import Direction, TableWindows
from mmattn_kernels.triton import attention

pytestmark = pytest.mark.device
SMALL = {
    "one query, one key": Case((0, 1), (0,), (1,), 1, heads=1, dim=16),
    "prefixes": Case((0, 15, 26, 45), (0, 0, 0), (13, 25, 63), 63, heads=1, dim=16),
    "centred, cut off": Case((0, 16, 32, 48), (0, 5, 14), (14, 17, 9), 23, dim=16),
    "blocks, two batches": Case((0, 20, 40, 53), (0, 33, 50), (33, 17, 10), 60, batch=2, heads=1, dim=32),
    "wraps around": Case((0, 20, 50, 90), (80, 90, 5), (40, 60, 30), 100, heads=1, dim=16),
    "others between those that read a key": Case((0, 17, 34, 51), (0, 40, 10), (20, 20, 20), 64, heads=1, dim=16),
    "back and forth": Case((0, 10, 30, 37, 80), (60, 0, 40, 10), (30, 10, 20, 5), 70, heads=1, dim=48),
    "some read none": dataclasses.replace(CASES["some read none"], heads=1, dim=16),
    "nobody reads any": Case((0, 9, 30), (10, 60), (0, 0), 70, heads=1, dim=16),
    "empty segments": dataclasses.replace(CASES["empty segments"], heads=1, dim=20),
    "one query a segment": dataclasses.replace(CASES["one query a segment"], heads=1, dim=16),
    "more segments than are looked at together": Case(
        tuple(range(0, 71)), tuple(range(70)), (2, 3) * 35, 90, heads=1, dim=16
    ),
}
SANITIZED = ("wraps around", "some read none", "one query a segment")


def results(case, tensors, d_out, impl, dtype=None):
    """Output, gradients of it and of the log-sum-exp, and the log-sum-exp."""
    windows = case.windows().to(tensors["q"].device)
    kept = []

    def both(t):
        out, lse = mmattn.segmented_attention(*t.values(), windows, return_lse=True, impl=impl)
        kept.append(lse.detach())
        return out + 0.3 * lse.masked_fill(lse.isneginf(), 0).transpose(1, 2)[..., None].to(out.dtype).sin()

    found = with_gradients(both, tensors, d_out, dtype)
    return found, kept[0]


def check(case, dtype=torch.float32, change=lambda x: x):
    tensors, d_out = case.inputs(dtype)
    tensors, d_out = {name: change(x.to(DEVICE)) for name, x in tensors.items()}, d_out.to(DEVICE)
    found, lse = results(case, tensors, d_out, "triton")
    exact, exact_lse = results(case, tensors, d_out, "reference", torch.float64)
    plain, _ = results(case, tensors, d_out, "reference")
    for name, x in found.items():
        assert_close_to_fp64(x, exact[name], plain[name], name=name, rounding=4.0, absolute=1e-6)
    assert torch.allclose(lse, exact_lse, atol=1e-5 if dtype == torch.float32 else 1e-2)
    unread = ~case.windows().mask().any(0)
    assert not found["d_k"][:, unread].any() and not found["d_v"][:, unread].any()


@pytest.mark.parametrize("case", named(SMALL, SANITIZED))
def test_outputs_and_gradients(case, blocks, poisoned_memory):
    blocks(16, 16)
    check(case)


@pytest.mark.parametrize("shape", ((16, 32), (32, 16)))
def test_other_blocks_and_half_precision(shape, blocks, poisoned_memory):
    blocks(*shape)
    check(SMALL["wraps around"], torch.float16)


def test_any_strides(blocks, poisoned_memory):
    """As views of something wider, with an offset, and with the heads outermost."""
    blocks(16, 16)
    check(SMALL["prefixes"], change=lambda x: torch.nn.functional.pad(x, (3, 5))[..., 3:-5])
    check(SMALL["centred, cut off"], change=lambda x: x.transpose(1, 2).contiguous().transpose(1, 2))


@pytest.mark.parametrize("shape", ((16, 16), (32, 16)))
def test_random_tables(shape, blocks, poisoned_memory):
    blocks(*shape)
    for seed in range(6):
        check(dataclasses.replace(random_case(seed + shape[0]), batch=1, heads=1, dim=16))


def test_two_runs_are_bitwise_equal(blocks):
    blocks(16, 16)
    case = SMALL["wraps around"]
    tensors, d_out = (
        {name: x.to(DEVICE) for name, x in t.items()} for t in (case.inputs()[0], {"d": case.inputs()[1]})
    )
    (one, _), (two, _) = (results(case, tensors, d_out["d"], "triton") for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_values_that_are_no_ranges_leave_the_rest_alone(blocks):
    """Nobody checks tables on an accelerator: whatever they hold, nothing outside of the tensors is read or written."""
    blocks(16, 16)
    for bounds, begin, length in (
        ((0, 999, -5, 40), (-7, 1 << 30, -(1 << 30)), (5, 1 << 30, -3)),
        ((30, 20, 10, 0), (0, 0, 0), (99, 99, 99)),
    ):
        tables = TableWindows(*(torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (bounds, begin, length)))
        # A page of NaN around each tensor: what is read of it would be seen.
        wide = torch.full((4, 1, 3 * 40, 1, 16), torch.nan, device=DEVICE)
        wide[:, :, 40:80] = 0.5
        inside = [x[:, 40:80] for x in wide]
        direction, places = Direction(*inside[:3]), torch.full((3, 1, 120, 1, 16), 7.0, device=DEVICE)
        out, lse = attention.forward([direction], tables, 0.25)
        gradients = [Direction(*(x[:, 40:80] for x in places))]
        attention.backward([direction], [inside[3]], out, lse, tables, 0.25, gradients)
        assert torch.isfinite(out[0]).all()
        assert (places[:, :, :40] == 7).all() and (places[:, :, 80:] == 7).all()


def test_auto_is_triton_on_a_gpu(monkeypatch):
    """As far as a machine without one can tell: its kernels take every dtype and head dimension that they promise."""
    from mmattn_kernels import triton as kernels

    monkeypatch.setattr(kernels, "_too_old", lambda: None)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert dispatch.explain("segmented_attention", "auto", "cuda", dtype, 64) == ("triton", [])
    for dim in (8, 256):
        chosen, (reason,) = dispatch.explain("segmented_attention", "auto", "cuda", torch.float16, dim)
        assert chosen == "reference" and f"the head dimension is {dim}, and it takes 16 to 128" in reason


@pytest.mark.ahead_of_time
@pytest.mark.parametrize("target", targets("segments"))
def test_compiles_ahead_of_time(target):
    rows = ahead_of_time("--op", "segments", target)
    assert {row["kernel"] for row in rows} == {"forward", "backward_dq", "backward_dkdv"}
    for row in rows:
        assert row["shared"] <= SHARED_LIMIT[target], row
        assert row["spills"] <= SPILLS, row
        if row["dtype"] == "bfloat16":
            assert row["mma"] == MATRIX_INSTRUCTION[target], row


@pytest.mark.ahead_of_time
@pytest.mark.xdist_group("segments sm_90")
def test_sizes_and_tables_compile_nothing_anew():
    assert ahead_of_time("--op", "segments", "--recompiles") == [{"op": "segments", "first": 3, "changed": []}]
    assert ahead_of_time("--op", "segments", "--relaunches") == [{"op": "segments", "launches": 3, "same": True}]
