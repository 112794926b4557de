# SPDX-License-Identifier: MIT
"""The Triton kernels of dilated_conv1d alone: interpreted on the CPU, or run on a GPU, and compiled ahead of time."""

import dataclasses
import os

import pytest
import torch

# Triton reads this once, when it is first imported; conftest.py sets it too, before any other test imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from triton_common import DEVICE, MATRIX_INSTRUCTION, SHARED_LIMIT, SPILLS, ahead_of_time, named, targets

from mmattn.conv import reference
from mmattn.norm import parameter_gradients
from mmattn.testing import assert_close_to_fp64, relative_error
from mmattn_kernels.triton import conv, norm

pytestmark = [pytest.mark.device, pytest.mark.usefixtures("poisoned_memory")]
PROLOGUE = ("norm_weight", "norm_bias", "scale", "shift")
NAMES = ("weight", "bias", *PROLOGUE, "residual")


@dataclasses.dataclass(frozen=True)
class Case:
    """Small blocks make small shapes cover several tiles and partial ones on each axis."""

    length: int = 37
    channels: int = 20
    out_channels: int = 24
    taps: int = 3
    dilation: int = 2
    groups: int = 5
    batch: int = 1
    film: bool = True
    silu: bool = True
    bias: bool = True
    residual: bool = True
    mean: float = 0.5
    dtype: torch.dtype = torch.float32
    parameters: torch.dtype = torch.float32
    strided: bool = False


BARE = {"groups": 0, "film": False, "silu": False, "bias": False, "residual": False}
CASES = {
    "partial tiles on each axis": Case(),
    "exact tiles": Case(length=32, channels=32, out_channels=16, groups=4, dilation=1),
    "one position": Case(length=1, channels=4, groups=2),
    "a group a channel": Case(groups=20, length=20),
    "one group, two batches": Case(groups=1, batch=2, length=21),
    "K = 1, the convolution alone": Case(taps=1, **BARE),
    "K = 1, with everything": Case(taps=1, out_channels=20),
    "K = 1, fewer channels out": Case(taps=1, out_channels=18, channels=30, batch=2, groups=6, residual=False),
    "K = 1, more channels out": Case(taps=1, residual=False),
    "K = 1, FiLM alone": Case(taps=1, out_channels=9, groups=0, silu=False, batch=2, length=18),
    "K = 1, activation alone": Case(taps=1, out_channels=9, groups=0, film=False),
    "K = 1, strided": Case(taps=1, batch=2, strided=True, groups=0, film=False, silu=False, residual=False),
    "K = 3, the convolution alone": Case(dilation=7, length=50, **BARE),
    "K = 5, dilation 7": Case(taps=5, dilation=7, length=41),
    "K = 5, outer taps past the ends": Case(taps=5, dilation=30, length=41),
    "dilation past the length": Case(dilation=512, length=19),
    "dilation of the length": Case(dilation=19, length=19),
    "dilation of the length less one": Case(dilation=18, length=19),
    "one channel in": Case(channels=1, groups=1, length=20),
    "one channel in, without a prologue": Case(channels=1, **BARE),
    "one channel out": Case(out_channels=1, length=20),
    "many channels in": Case(channels=70, groups=7, length=18, out_channels=5),
    "without FiLM": Case(film=False),
    "without activation": Case(silu=False),
    "activation alone": Case(groups=0, film=False),
    "FiLM alone": Case(groups=0, silu=False, batch=2, length=18),
    "without bias": Case(bias=False, residual=False),
    "strided": Case(batch=2, strided=True, length=21),
    "fp16": Case(dtype=torch.float16),
    "fp16 throughout": Case(dtype=torch.float16, parameters=torch.float16, batch=2, length=18),
}
SANITIZED = (
    "partial tiles on each axis",
    "K = 1, the convolution alone",
    "K = 5, outer taps past the ends",
    "one channel in",
    "strided",
    "fp16 throughout",
)


def inputs(case, seed=0):
    """x, the other inputs by name, None if absent, and the gradient of the output, in the dtypes of the case."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape, dtype=case.parameters):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    def tokens(channels):
        if not case.strided:
            return randn(case.batch, case.length, channels, dtype=case.dtype)
        # Rows of a wider tensor, positions outermost.
        return randn(case.length, case.batch, channels + 3, dtype=case.dtype).transpose(0, 1)[..., :channels]

    x = tokens(case.channels).add_(case.mean)
    found = dict.fromkeys(NAMES)
    found["weight"] = randn(case.out_channels, case.channels, case.taps).mul_((case.channels * case.taps) ** -0.5)
    if case.groups:
        found["norm_weight"], found["norm_bias"] = randn(case.channels), randn(case.channels)
    if case.film:
        found["scale"], found["shift"] = randn(case.batch, 2 * case.channels).chunk(2, 1)
    if case.bias:
        found["bias"] = randn(case.out_channels)
    if case.residual:
        found["residual"] = tokens(case.out_channels)
    return x, found, tokens(case.out_channels)


def oracle(x, others, d_out, case, dtype):
    """Output and gradients by plain torch, all in fp64 or, in another dtype, as the case has them."""
    tensors = {"x": x, **{name: t for name, t in others.items() if t is not None}}
    wide = {name: t.to(dtype if dtype == torch.float64 else t.dtype) for name, t in tensors.items()}
    wide = {name: t.detach().clone().requires_grad_() for name, t in wide.items()}
    out = reference(
        wide["x"], wide["weight"], wide.get("bias"), dilation=case.dilation,
        norm=(wide["norm_weight"], wide["norm_bias"], case.groups) if case.groups else None,
        film=(wide["scale"], wide["shift"]) if case.film else None,
        activation="silu" if case.silu else None, residual=wide.get("residual"),
    )  # fmt: skip
    grads = torch.autograd.grad(out, wide.values(), d_out.to(dtype))
    found = {"out": out.detach()} | {f"d_{name}": grad for name, grad in zip(wide, grads, strict=True)}
    found.pop("d_residual", None)  # d_out itself
    return found


def run(x, others, d_out, case):
    at = {"groups": case.groups, "dilation": case.dilation, "silu": case.silu}
    prologue = {name: others[name] for name in PROLOGUE}
    out, stats = conv.forward(x, **others, **at, eps=1e-5)
    assert stats.shape == (case.batch, case.groups, 3) and stats.dtype == torch.float32
    found = conv.backward(
        d_out, x, others["weight"], **prologue, stats=stats, **at, need_x=True, need_weight=True, need_bias=True
    )
    found = dict(zip(("d_x", "d_weight", "d_bias", "sums"), found, strict=True))
    assert found["d_weight"].dtype == found["d_bias"].dtype == found["sums"].dtype == torch.float32
    sums = found.pop("sums")
    if case.groups or case.film or case.silu:
        grads = zip(PROLOGUE, parameter_gradients(sums, *prologue.values()), strict=True)
        found |= {f"d_{name}": grad for name, grad in grads if grad is not None}
    else:
        assert sums.shape == (0,)
    if not case.bias:
        del found["d_bias"]
    return {"out": out, **found}


def assert_matches(case):
    x, others, d_out = inputs(case)
    exact, plain = (oracle(x, others, d_out, case, dtype) for dtype in (torch.float64, case.dtype))
    found = run(x, others, d_out, case)
    assert found.keys() == exact.keys()
    for name, value in found.items():
        assert value.is_contiguous() or name in ("d_scale", "d_shift"), name
        assert value.dtype == plain[name].dtype or name in ("d_weight", "d_bias"), name
        # As autograd returns it: the sums are fp32, the gradient has the dtype of what it is the gradient of.
        value = value.to(plain[name].dtype)
        # torch sums by pairs; sums by lanes round a few times more.
        rounding = 4.0 if value.dtype == torch.float32 else 1.0
        assert_close_to_fp64(value, exact[name], plain[name], name=name, rounding=rounding)


@pytest.fixture
def blocks(monkeypatch):
    convolve = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1}
    weight = {**convolve, "PROGRAMS": 16}
    merge = {"TILE": 256, "BLOCK_C": 16, "num_warps": 4}
    over_tokens = {**merge, "PROGRAMS": 8}
    monkeypatch.setattr(conv, "_config", lambda name, *_: dict(weight if name == "backward_weight" else convolve))
    single_launch = {**merge, "POSITIONS": 20}
    of_norm = {"merge": merge, "single_launch": single_launch}
    monkeypatch.setattr(norm, "_config", lambda name, *_: dict(of_norm.get(name, over_tokens)))


@pytest.mark.parametrize("case", named(CASES, SANITIZED))
def test_forward_and_gradients(case, blocks):
    assert_matches(case)


@pytest.mark.gpu  # bf16 products are wrong in Triton's interpreter
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
@pytest.mark.parametrize(
    "channels, out_channels, groups, taps, dilation",
    (
        (128, 128, 32, 3, 2),
        pytest.param(256, 256, 32, 3, 16, marks=pytest.mark.sanitize),
        (768, 384, 32, 3, 64),
        (20, 24, 5, 5, 512),
        (64, 512, 0, 1, 1),
    ),
)
def test_default_configurations(channels, out_channels, groups, taps, dilation, dtype):
    assert_matches(
        Case(
            length=811, channels=channels, out_channels=out_channels, groups=groups, taps=taps, dilation=dilation,
            batch=2, dtype=dtype,
        )
    )  # fmt: skip


def test_zeros_outside_follow_the_prologue(blocks):
    """The prologue of 0 is not 0: a kernel that pads before it adds silu(shift) at both ends."""
    case = Case(length=5, dilation=4)
    x, others, d_out = inputs(case)
    others["shift"].add_(10)
    exact, plain = (oracle(x, others, d_out, case, dtype) for dtype in (torch.float64, torch.float32))
    assert_close_to_fp64(run(x, others, d_out, case)["out"], exact["out"], plain["out"])


def test_convolution_over_frames(blocks):
    """Over video tokens [B, F*P, C], frames outermost, dilation P is Conv1d over the frames of each pixel."""
    frames, pixels = 5, 7
    case = Case(length=frames * pixels, dilation=pixels, batch=2, **BARE)
    x, others, _ = inputs(case)
    out, _ = conv.forward(x, **others, groups=0, dilation=pixels, silu=False, eps=1e-5)
    over_frames = x.unflatten(1, (frames, pixels)).permute(0, 2, 3, 1).flatten(0, 1)  # [B*P, C, F]
    expected = torch.nn.functional.conv1d(over_frames, others["weight"], padding=1)
    expected = expected.unflatten(0, (2, pixels)).permute(0, 3, 1, 2).flatten(1, 2)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_a_mean_far_from_zero(blocks):
    case = Case(mean=1e3, length=60)
    x, others, d_out = inputs(case)
    exact, plain = (oracle(x, others, d_out, case, dtype) for dtype in (torch.float64, torch.float32))
    found = run(x, others, d_out, case)
    assert_close_to_fp64(found["out"], exact["out"], plain["out"], name="out")
    # The gradients know of the mean what a float holds of it.
    for name in found.keys() - {"out"}:
        assert relative_error(found[name], exact[name]) < 5e-5, name


def test_two_runs_are_bitwise_equal(blocks):
    case = CASES["one group, two batches"]
    one, two = (run(*inputs(case), case) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_weight_of_any_strides(blocks):
    case = Case(length=9)
    x, others, d_out = inputs(case)
    strided = {**others, "weight": others["weight"].permute(2, 0, 1).contiguous().permute(1, 2, 0)}
    one, two = (run(x, o, d_out, case) for o in (others, strided))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_is_not_needed_is_empty(blocks):
    case = Case(length=9)
    x, others, d_out = inputs(case)
    at = {"groups": case.groups, "dilation": case.dilation, "silu": case.silu}
    _, stats = conv.forward(x, **others, **at, eps=1e-5)
    prologue = (others[name] for name in PROLOGUE)
    arguments = d_out, x, others["weight"], *prologue, stats
    need = {"need_x": True, "need_weight": True, "need_bias": True}
    everything = conv.backward(*arguments, **at, **need)
    for name, shown in (("need_x", (0, 3)), ("need_weight", (1,)), ("need_bias", (2,))):
        found = conv.backward(*arguments, **at, **dict.fromkeys(need, False) | {name: True})
        for i, x in enumerate(found):
            assert torch.equal(x, everything[i]) if i in shown else x.shape == (0,), (name, i)


def test_empty_batch():
    case = Case(batch=0)
    found = run(*inputs(case), case)
    assert found["out"].shape == (0, 37, 24) and found["d_x"].shape == (0, 37, 20)
    assert not found["d_weight"].any() and not found["d_bias"].any()


def test_every_configuration_is_complete():
    expected = {"BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages"}
    for device_name in conv._config.tables:
        for kernel in ("taps", "pointwise", "backward_weight"):
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                for channels in (1, 20, 64, 128, 192, 256, 384, 512, 2048):
                    config = conv._config(kernel, dtype, device_name, channels)
                    programs = {"PROGRAMS"} if kernel == "backward_weight" else set()
                    assert config.keys() - {"maxnreg"} == expected | programs


@pytest.mark.ahead_of_time
@pytest.mark.parametrize("target", targets("conv"))
def test_compiles_ahead_of_time(target):
    rows = ahead_of_time("--op", "conv", target)
    products = [row for row in rows if row["kernel"] in ("convolve", "backward_weight")]
    # Of K = 3 forward, backward and the weights, of K = 1 forward and the weights, of each shape.
    assert len(products) == 5 * len({(row["size"], row["dtype"]) for row in rows})
    assert {row["kernel"] for row in rows} > {"convolve", "backward_weight", "merge_weight", "statistics"}
    for row in rows:
        # What is added to a convolution begins its sum: a few registers, once, before the loop.
        assert row["spills"] <= SPILLS + 6 * (row["kernel"] == "convolve"), row
        assert row["shared"] <= SHARED_LIMIT[target], row
    for row in products:
        if row["dtype"] == "bfloat16":
            assert row["mma"] == MATRIX_INSTRUCTION[target], row
            assert target == "gfx942" or row["wide_copies"] > 0, row


@pytest.mark.ahead_of_time
@pytest.mark.xdist_group("conv sm_90")
def test_kept_launches_are_those_of_triton():
    assert ahead_of_time("--op", "conv", "--relaunches") == [{"op": "conv", "launches": 22, "same": True}]


@pytest.mark.ahead_of_time
def test_length_batch_and_dilation_compile_nothing_anew():
    assert ahead_of_time("--op", "conv", "--recompiles") == [{"op": "conv", "first": 14, "changed": []}]
