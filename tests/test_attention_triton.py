# SPDX-License-Identifier: MIT
"""The Triton attention kernels alone: interpreted on the CPU (run, where there is a GPU) and compiled ahead of time."""

import dataclasses
import json
import os

import numpy
import pytest
import torch

# Triton reads this once, when it is first imported; conftest.py sets it too, before any other test imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from triton_common import DEVICE, MATRIX_INSTRUCTION, SHARED_LIMIT, SPILLS, TESTS, ahead_of_time, named, targets

from mmattn.testing import assert_close_to_fp64
from mmattn_kernels import CircularWindows, Direction
from mmattn_kernels.triton import attention

pytestmark = pytest.mark.device
GRADS = ("d_video_q", "d_video_k", "d_video_v", "d_audio_q", "d_audio_k", "d_audio_v")


@dataclasses.dataclass(frozen=True)
class Case:
    """Small blocks make small shapes cover several tiles and partial ones on each axis."""

    frames: int = 4
    pixels: int = 5
    audio_len: int = 24
    window: int = 2
    shift: int = 1
    head_dim: int = 16
    heads: int = 2
    batch: int = 1
    dtype: torch.dtype = torch.float32
    blocks: tuple = (16, 16)
    packed: bool = True
    shift_dtype: torch.dtype | None = None


CASES = {
    "one position a segment": Case(frames=3, pixels=1, audio_len=3, window=1, shift=2, heads=1),
    "segments share a tile": Case(frames=16, pixels=4, audio_len=48, window=8, shift=8),
    "a segment is several tiles": Case(frames=2, pixels=37, audio_len=50, window=1, shift=1, heads=1),
    "n of 25, window capped": Case(frames=4, pixels=16, audio_len=100, window=3, shift=1, heads=1),
    "wide key blocks": Case(frames=4, pixels=16, audio_len=100, window=2, shift=2, heads=1, blocks=(16, 64)),
    "wide query blocks": Case(frames=4, pixels=16, audio_len=100, window=2, shift=1, heads=1, blocks=(64, 16)),
    "leftover audio": Case(frames=5, pixels=4, audio_len=23, window=2, shift=3),
    "leftover read by a wrapping window": Case(frames=4, pixels=9, audio_len=19, window=3, shift=3),
    "leftover, window of all frames": Case(frames=4, pixels=6, audio_len=39, window=4, shift=2),
    "leftover nearly a segment": Case(frames=7, pixels=2, audio_len=34, window=1, shift=6),
    "leftover, one position a segment": Case(frames=9, pixels=2, audio_len=17, window=2, shift=7, heads=1),
    "window of all frames": Case(frames=4, pixels=9, audio_len=40, window=4, shift=0),
    "window of one frame": Case(frames=1, pixels=20, audio_len=33, window=1, shift=0),
    "window wraps": Case(frames=8, pixels=5, audio_len=64, window=5, shift=3),
    "two batches, separate tensors": Case(batch=2, heads=1, packed=False),
    "head_dim 48": Case(frames=3, pixels=7, audio_len=25, head_dim=48),
    "head_dim 20": Case(frames=3, pixels=7, audio_len=25, head_dim=20, batch=2),
    "head_dim 128": Case(frames=2, pixels=9, audio_len=22, head_dim=128, window=1),
    "fp16": Case(frames=4, pixels=9, audio_len=50, window=3, shift=1, dtype=torch.float16),
    "fp16, head_dim 64": Case(frames=2, pixels=20, audio_len=41, window=1, head_dim=64, dtype=torch.float16),
    "shift below zero": Case(frames=4, pixels=5, audio_len=27, shift=-3, heads=1),
    "shift past the frames": Case(frames=4, pixels=5, audio_len=27, shift=11, heads=1),
    "shift as an int64 tensor": Case(shift_dtype=torch.int64),
    "shift as an int32 tensor": Case(shift=2, shift_dtype=torch.int32),
}  # fmt: skip
SANITIZED = (
    "segments share a tile",
    "leftover read by a wrapping window",
    "head_dim 20",
    "fp16, head_dim 64",
    "shift past the frames",
    "shift as an int32 tensor",
)


def windowed(q, k, v, frames, window, shift, scale):
    """One direction, frame by frame, over index lists: [B, L, H, D] in any dtype."""
    n_q, n_k = q.shape[1] // frames, k.shape[1] // frames
    outs, lses = [], []
    for g in range(frames):
        rows = q[:, g * n_q : (g + 1) * n_q if g < frames - 1 else None]
        read = [((g + shift) * n_k + j) % k.shape[1] for j in range(window * n_k)]
        scores = torch.einsum("bmhd,bnhd->bhmn", rows, k[:, read]) * scale
        outs.append(torch.einsum("bhmn,bnhd->bmhd", scores.softmax(-1), v[:, read]))
        lses.append(scores.logsumexp(-1))
    return torch.cat(outs, 1), torch.cat(lses, 2)


def oracle(qkv, d_out, at, dtype):
    """Outputs, log-sum-exps and gradients, by plain torch in the given dtype, as one dict in fp64."""
    qkv = [x.detach().to(dtype).requires_grad_() for x in qkv]
    video, video_lse = windowed(qkv[0], qkv[4], qkv[5], **at)
    audio, audio_lse = windowed(qkv[3], qkv[1], qkv[2], **at)
    grads = torch.autograd.grad((video, audio), qkv, [x.to(dtype) for x in d_out])
    found = {"video_out": video, "audio_out": audio, "video_lse": video_lse, "audio_lse": audio_lse}
    found |= dict(zip(GRADS, grads, strict=True))
    return {name: x.detach().double() for name, x in found.items()}


def inputs(case, seed=0):
    """q, k, v of video then audio, the gradients of both outputs, and the remaining arguments."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE, case.dtype)

    qkv, d_out = [], []
    for length in (case.frames * case.pixels, case.audio_len):
        shape = case.batch, length, case.heads, case.head_dim
        if case.packed:
            qkv += randn(case.batch, length, 3, case.heads, case.head_dim).unbind(2)
        else:
            qkv += [randn(case.batch, case.heads, length, case.head_dim).transpose(1, 2) for _ in range(3)]
        # Rows of a wider tensor: strides of its own, D contiguous.
        d_out.append(randn(*shape[:-1], case.head_dim + 3)[..., : case.head_dim])
    at = {"frames": case.frames, "window": case.window, "shift": case.shift, "scale": case.head_dim**-0.5}
    return qkv, d_out, at


def directions(video_q, video_k, video_v, audio_q, audio_k, audio_v):
    return Direction(video_q, audio_k, audio_v), Direction(audio_q, video_k, video_v)


def run(qkv, d_out, at):
    windows, scale = CircularWindows(at["frames"], at["window"], at["shift"]), at["scale"]
    out, lse = attention.forward(directions(*qkv), windows, scale)
    grads = [torch.full_like(x, torch.nan, memory_format=torch.contiguous_format) for x in qkv]
    attention.backward(directions(*qkv), d_out, out, lse, windows, scale, directions(*grads))
    return dict(zip(("video_out", "audio_out", "video_lse", "audio_lse", *GRADS), (*out, *lse, *grads), strict=True))


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """What a launcher allocates begins as NaN, so that an element nobody writes is seen."""
    new_empty = torch.Tensor.new_empty

    def poisoned(*args, **kwargs):
        x = new_empty(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def assert_within_budget(found, exact, plain, dtype):
    """Error against fp64 at most twice that of plain torch in the same dtype, and two roundings.

    Relative, but to elements of 1 at least, as the inputs are: over one key q's and k's gradients are rounding alone.
    """
    for name, x in found.items():
        assert torch.isfinite(x).all(), f"{name}: {int((~torch.isfinite(x)).sum())} of {x.numel()} not finite"
        size = exact[name].norm().clamp(min=x.numel() ** 0.5)
        error, budget = ((y.double() - exact[name]).norm() / size for y in (x, plain[name]))
        limit = 2 * (budget + torch.finfo(dtype).eps)
        assert error <= limit, f"{name}: relative error {error:.2e}, allowed {limit:.2e}"


@pytest.mark.parametrize("case", named(CASES, SANITIZED))
def test_forward_and_gradients(case, blocks):
    blocks(*case.blocks)
    qkv, d_out, at = inputs(case)
    exact = oracle(qkv, d_out, at, torch.float64)
    plain = oracle(qkv, d_out, at, case.dtype)
    if case.shift_dtype:
        at["shift"] = torch.tensor([99, case.shift], dtype=case.shift_dtype, device=DEVICE)[1:]
    found = run(qkv, d_out, at)
    for name, x in found.items():
        assert x.is_contiguous() and x.dtype == (torch.float64 if name.endswith("lse") else case.dtype), name
    assert_within_budget(found, exact, plain, case.dtype)


@pytest.mark.gpu  # bf16 products are wrong in Triton's interpreter
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
@pytest.mark.parametrize("head_dim", (16, 48, pytest.param(64, marks=pytest.mark.sanitize), 128))
def test_default_configurations(head_dim, dtype):
    case = Case(frames=8, pixels=150, audio_len=811, window=3, shift=5, head_dim=head_dim, batch=2, dtype=dtype)
    qkv, d_out, at = inputs(case)
    exact, plain = (oracle(qkv, d_out, at, t) for t in (torch.float64, dtype))
    assert_within_budget(run(qkv, d_out, at), exact, plain, dtype)


@pytest.mark.parametrize("magnitude", (1e2, 1e3, 1e5))
def test_large_scores(magnitude, blocks):
    """Backward has the weights of forward to the digits of plain torch: of their logarithm a float lacks some."""
    rows, columns = numpy.random.default_rng(0).standard_normal((2, 16, 64), dtype=numpy.float32)
    if not numpy.array_equal(rows @ columns.T, (columns @ rows.T).T):
        pytest.skip("the interpreter's products are numpy's, which have other bits transposed on this machine")
    blocks(16, 16)
    qkv, d_out, at = inputs(Case(frames=2, pixels=20, audio_len=41, window=1))
    qkv[0], qkv[3] = qkv[0] * magnitude, qkv[3] * magnitude
    exact, plain = (oracle(qkv, d_out, at, t) for t in (torch.float64, torch.float32))
    found = run(qkv, d_out, at)
    for name in ("video_out", "audio_out", *GRADS):
        left = magnitude if name.endswith("_k") else 1.0  # of two equal products, times the queries
        assert_close_to_fp64(found[name], exact[name], plain[name], name=name, rounding=4.0, absolute=1e-6 * left)


def test_every_small_window(blocks):
    """All windows and shifts of one odd shape: the walks' bounds, where off-by-ones live."""
    blocks(16, 16)
    for frames, audio_len in ((3, 20), (5, 24)):
        for window in range(1, frames + 1):
            for shift in range(frames):
                case = Case(frames=frames, pixels=7, audio_len=audio_len, window=window, shift=shift, heads=1)
                qkv, d_out, at = inputs(case, seed=shift)
                exact, plain = (oracle(qkv, d_out, at, t) for t in (torch.float64, torch.float32))
                assert_within_budget(run(qkv, d_out, at), exact, plain, torch.float32)


@pytest.mark.parametrize("scale", (-0.3, 0.0, 1.0))
def test_any_scale(scale, blocks):
    blocks(16, 16)
    qkv, d_out, at = inputs(Case(frames=3, pixels=11, audio_len=50))
    at["scale"] = scale
    found, exact, plain = run(qkv, d_out, at), *(oracle(qkv, d_out, at, t) for t in (torch.float64, torch.float32))
    assert_within_budget(found, exact, plain, torch.float32)


def test_a_key_out_of_every_window_gets_zero_gradient(blocks):
    blocks(16, 16)
    case = Case(frames=5, pixels=3, audio_len=24, window=1, shift=0)
    found = run(*inputs(case))
    for name in ("d_audio_k", "d_audio_v"):
        assert not found[name][:, 20:].any() and found[name][:, :20].all(-1).all(), name


def test_two_runs_are_bitwise_equal(blocks):
    blocks(16, 16)
    one, two = (run(*inputs(CASES["leftover, window of all frames"])) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_gradient_of_any_strides(blocks):
    """Gradients arrive transposed in D, or expanded from one number."""
    blocks(16, 16)
    qkv, d_out, at = inputs(Case())
    d_out = [d_out[0].transpose(1, 3).contiguous().transpose(1, 3), d_out[1][:1, :1, :1, :1].expand_as(qkv[3])]
    exact, plain = (oracle(qkv, d_out, at, t) for t in (torch.float64, torch.float32))
    assert_within_budget(run(qkv, d_out, at), exact, plain, torch.float32)


def test_empty_batch():
    qkv, d_out, at = inputs(Case(batch=0))
    found = run(qkv, d_out, at)
    assert found["video_out"].shape == qkv[0].shape and found["audio_lse"].shape == (0, 2, 24)
    assert found["d_audio_k"].shape == qkv[4].shape


def test_published_values(blocks):
    safetensors = pytest.importorskip("safetensors")
    blocks(32, 32)
    with safetensors.safe_open(TESTS / "data/attention.safetensors", "pt", device=DEVICE) as file:
        cases = json.loads(file.metadata()["cases"])
        for i, case in enumerate(cases):
            qkv = file.get_tensor(f"{i}.qkv")
            video_len = case["F"] * case["h"] * case["w"]
            heads = qkv.unflatten(1, (3, case["heads"], case["head_dim"])).permute(1, 0, 4, 2, 3).contiguous()
            split = *heads[:, :, :video_len].unbind(), *heads[:, :, video_len:].unbind()
            windows = CircularWindows(case["F"], case["S"], case["R"])
            out, _ = attention.forward(directions(*split), windows, case["head_dim"] ** -0.5)
            for name, x in zip(("video_out", "audio_out"), out, strict=True):
                published = file.get_tensor(f"{i}.{name}").unflatten(1, (case["heads"], -1)).permute(0, 3, 1, 2)
                error = (x - published).norm() / published.norm()
                assert error < 1e-5, f"case {i} {case}, {name}: {error:.2e}"


@dataclasses.dataclass(frozen=True)
class SelfCase:
    segments: int
    tokens: int  # of a segment
    batch: int = 1
    heads: int = 2
    dim: int = 32
    dtype: torch.dtype = torch.float32


SELF_CASES = {
    "segments of one token": SelfCase(5, 1, batch=2),
    "many segments a tile, the last one partial": SelfCase(11, 5, batch=2, dim=48),
    "frames of a pixel": SelfCase(7, 16),
    "one segment": SelfCase(1, 37),
    "segments longer than a tile": SelfCase(3, 33, heads=1, dim=16),
    "fp16": SelfCase(6, 8, batch=2, dtype=torch.float16),
}


@pytest.mark.parametrize("case", SELF_CASES.values(), ids=SELF_CASES)
def test_self_attention(case, blocks):
    blocks(16, 16)
    generator = torch.Generator().manual_seed(0)
    shape = case.batch, case.segments * case.tokens, 3, case.heads, case.dim
    qkv = torch.randn(shape, generator=generator).to(DEVICE, case.dtype)
    d_out = torch.randn(shape[:2] + shape[3:], generator=generator).to(DEVICE, case.dtype)
    exact, plain = (
        self_attention_oracle(case, qkv.to(dtype), d_out.to(dtype)) for dtype in (torch.float64, case.dtype)
    )
    itself, at = [Direction(*qkv.unbind(2))], (CircularWindows(case.segments, 1, 0), case.dim**-0.5)
    out, lse = attention.forward(itself, *at)
    d_qkv = torch.full_like(qkv, torch.nan)
    attention.backward(itself, [d_out], out, lse, *at, [Direction(*d_qkv.unbind(2))])
    found = {"out": out[0], "d_qkv": d_qkv}
    assert_within_budget(found, exact, plain, case.dtype)


def self_attention_oracle(case, qkv, d_out):
    qkv = qkv.requires_grad_()
    q, k, v = (x.unflatten(1, (case.segments, case.tokens)) for x in qkv.unbind(2))
    weights = torch.einsum("bsqhd,bskhd->bshqk", q * case.dim**-0.5, k).softmax(-1)
    out = torch.einsum("bshqk,bskhd->bsqhd", weights, v).flatten(1, 2)
    return {"out": out.detach(), "d_qkv": torch.autograd.grad(out, qkv, d_out)[0]}


def test_configuration_is_found_by_the_longest_name(monkeypatch):
    def table(warps):
        return {"forward": {"16-bit": {"64": {"num_warps": warps}}}}

    tables = {"default": table(1), "NVIDIA": table(2), "NVIDIA H": table(4), "AMD": {}}
    monkeypatch.setattr(attention._config, "tables", tables)
    for name, warps in {"NVIDIA H200": 4, "NVIDIA B200": 2, "AMD Instinct MI300X": 1, "cpu": 1}.items():
        assert attention._config("forward", torch.bfloat16, name, 48) == {"num_warps": warps}


def test_every_configuration_is_complete():
    for device_name in attention._config.tables:
        for kernel in ("forward", "backward_dq", "backward_dkdv"):
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                for head_dim in (16, 20, 32, 48, 64, 96, 128):
                    config = attention._config(kernel, dtype, device_name, head_dim)
                    assert config.keys() - {"maxnreg"} == {"BLOCK_M", "BLOCK_N", "num_warps", "num_stages"}


@pytest.mark.ahead_of_time
@pytest.mark.parametrize("target", targets("attention"))
def test_compiles_ahead_of_time(target):
    rows = ahead_of_time("--op", "attention", target)
    assert {row["kernel"] for row in rows} == {"forward", "backward_dq", "backward_dkdv"}
    for row in rows:
        assert row["shared"] <= SHARED_LIMIT[target], row
        assert row["spills"] <= (SPILLS if row["size"] == 64 else SPILLS + 4), row
        if row["dtype"] in ("float16", "bfloat16"):
            assert row["mma"] == MATRIX_INSTRUCTION[target], row


@pytest.mark.ahead_of_time
@pytest.mark.xdist_group("attention sm_90")
def test_kept_launches_are_those_of_triton():
    assert ahead_of_time("--op", "attention", "--relaunches") == [{"op": "attention", "launches": 6, "same": True}]


@pytest.mark.ahead_of_time
def test_lengths_and_shift_compile_nothing_anew():
    (counts,) = ahead_of_time("--op", "attention", "--recompiles")
    assert counts == {"op": "attention", "first": 5, "changed": [], "tensor": 3}
