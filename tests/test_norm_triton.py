# SPDX-License-Identifier: MIT
"""The Triton kernels of group_norm alone: interpreted on the CPU, or run on a GPU, and compiled ahead of time."""

import dataclasses
import os

import pytest
import torch

# Triton reads this once, when it is first imported; conftest.py sets it too, before any other test imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from triton_common import DEVICE, SHARED_LIMIT, SPILLS, ahead_of_time, named, targets

from mmattn.norm import parameter_gradients, reference
from mmattn.testing import assert_close_to_fp64, relative_error
from mmattn_kernels.triton import norm

pytestmark = [pytest.mark.device, pytest.mark.usefixtures("poisoned_memory")]
KERNELS = ("statistics", "merge", "forward", "backward_sums", "backward", "single_launch")
OVER_TOKENS = ("statistics", "forward", "backward_sums", "backward")
PARAMETERS = ("weight", "bias", "scale", "shift")
GRADS = ("d_x", *(f"d_{name}" for name in PARAMETERS))


@dataclasses.dataclass(frozen=True)
class Case:
    """Small tiles make small shapes cover several chunks, tiles and blocks of channels, and partial ones of each."""

    length: int = 37
    channels: int = 20
    groups: int = 5
    batch: int = 1
    film: bool = True
    silu: bool = True
    mean: float = 0.5
    dtype: torch.dtype = torch.float32
    parameters: torch.dtype = torch.float32
    strided: bool = False
    tile: int = 64
    block_c: int = 8
    programs: int = 12
    positions: int = 0  # up to which one launch does everything


CASES = {
    "partial tiles, chunks and channels": Case(),
    "one position": Case(length=1, channels=4, groups=2),
    "fewer positions than a tile": Case(length=3, channels=12, groups=3),
    "exact tiles": Case(length=32, channels=16, groups=4),
    "every tile its own chunk": Case(programs=1000),
    "one chunk of all tiles": Case(length=75, programs=1),
    "one channel": Case(channels=1, groups=1, length=150),
    "one group": Case(groups=1),
    "a group a channel": Case(groups=20),
    "groups wider than a block, 3 channels over": Case(channels=38, groups=2, length=21),
    "two batches": Case(batch=2, length=19),
    "strided": Case(batch=2, strided=True),
    "without FiLM": Case(film=False),
    "without activation": Case(silu=False),
    "neither": Case(film=False, silu=False, groups=4),
    "fp16": Case(dtype=torch.float16),
    "fp16 throughout": Case(dtype=torch.float16, parameters=torch.float16, batch=2),
    "single_launch": Case(positions=40),
    "single_launch, all channels in one block": Case(positions=40, block_c=32, batch=2),
    "single_launch, groups of 3 in blocks of 8": Case(positions=40, channels=21, groups=7, film=False),
    "single_launch, groups of 6 in blocks of 32": Case(positions=40, channels=54, groups=9, block_c=32, tile=128),
    "single_launch, one position": Case(positions=40, length=1, channels=4, groups=2),
    "single_launch, one channel": Case(positions=200, channels=1, groups=1, length=150),
    "single_launch, a group a channel, strided": Case(positions=40, groups=20, batch=2, strided=True),
    "single_launch, groups too wide": Case(positions=40, channels=38, groups=2, length=21),
    "single_launch, without activation, fp16": Case(positions=40, silu=False, dtype=torch.float16),
    "without groups": Case(groups=0, batch=2),
    "without groups and FiLM": Case(groups=0, film=False, length=50),
    "without groups and activation": Case(groups=0, silu=False, channels=70, length=9),
}
SANITIZED = (
    "partial tiles, chunks and channels",
    "groups wider than a block, 3 channels over",
    "strided",
    "fp16 throughout",
    "without groups",
)


def inputs(case, seed=0):
    """x, the parameters by name and the gradient of the output, in the dtypes of the case."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape, dtype=case.dtype):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    shape = case.batch, case.length, case.channels
    x, d_out = randn(*shape) + case.mean, randn(*shape)
    if case.strided:
        # Rows of a wider tensor, positions outermost; and a gradient expanded over the batch.
        wide = randn(case.length, case.batch, case.channels + 3).transpose(0, 1)
        wide[..., : case.channels] = x
        x, d_out = wide[..., : case.channels], d_out[:1].expand(shape)
    found = dict.fromkeys(PARAMETERS)
    if case.groups:
        found["weight"], found["bias"] = (randn(case.channels, dtype=case.parameters) for _ in range(2))
    if case.film:
        found["scale"], found["shift"] = randn(case.batch, 2 * case.channels, dtype=case.parameters).chunk(2, 1)
    return x, found, d_out


def oracle(x, parameters, d_out, case, dtype):
    """Output and gradients by plain torch, in the given dtype or, where that is the case's, as the case has them."""
    tensors = {"x": x, **{name: t for name, t in parameters.items() if t is not None}}
    wide = {name: t.to(dtype if dtype == torch.float64 else t.dtype) for name, t in tensors.items()}
    wide = {name: t.detach().clone().requires_grad_() for name, t in wide.items()}
    at = {name: wide.get(name) for name in PARAMETERS}
    out = reference(
        wide["x"], at["weight"], at["bias"], case.groups, scale=at["scale"], shift=at["shift"],
        activation="silu" if case.silu else None,
    )  # fmt: skip
    grads = torch.autograd.grad(out, wide.values(), d_out.to(dtype))
    return {"out": out.detach()} | {f"d_{name}": grad for name, grad in zip(wide, grads, strict=True)}


def run(x, parameters, d_out, case):
    at = {"groups": case.groups, "silu": case.silu}
    found, stats = {}, None
    if case.groups:
        found["out"], stats = norm.forward(x, **parameters, **at, eps=1e-5)
        assert stats.shape == (case.batch, case.groups, 3) and stats.dtype == torch.float32
    d_x, sums = norm.backward(d_out, x, **parameters, stats=stats, **at)
    assert sums.shape == (case.batch, case.channels, 2) and sums.dtype == torch.float32
    grads = zip(PARAMETERS, parameter_gradients(sums, **parameters), strict=True)
    return found | {"d_x": d_x} | {f"d_{name}": grad for name, grad in grads if grad is not None}


def assert_matches(case):
    x, parameters, d_out = inputs(case)
    exact, plain = (oracle(x, parameters, d_out, case, dtype) for dtype in (torch.float64, case.dtype))
    found = run(x, parameters, d_out, case)
    assert found.keys() == exact.keys() - (set() if case.groups else {"out"})
    for name, value in found.items():
        assert value.dtype == plain[name].dtype, name
        assert value.is_contiguous() or name in ("d_scale", "d_shift"), name
        # torch sums by pairs; sums by lanes round a few times more.
        rounding = 4.0 if value.dtype == torch.float32 else 1.0
        assert_close_to_fp64(value, exact[name], plain[name], name=name, rounding=rounding)


@pytest.fixture
def tiles(monkeypatch):
    def pin(case):
        config = {"TILE": case.tile, "BLOCK_C": case.block_c, "num_warps": 4}
        more = {kernel: {"PROGRAMS": case.programs} for kernel in OVER_TOKENS}
        more |= {"single_launch": {"POSITIONS": case.positions}, "merge": {}}
        monkeypatch.setattr(norm, "_config", lambda kernel, *_: {**config, **more[kernel]})

    return pin


@pytest.mark.parametrize("case", named(CASES, SANITIZED))
def test_forward_and_gradients(case, tiles):
    tiles(case)
    assert_matches(case)


@pytest.mark.gpu  # the default tiles are large, and the interpreter slow
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
@pytest.mark.parametrize(
    "channels, groups",
    ((1, 1), (20, 5), pytest.param(128, 32, marks=pytest.mark.sanitize), (384, 32), (1024, 32), (192, 1)),
)
def test_default_configurations(channels, groups, dtype):
    assert_matches(Case(length=1601, channels=channels, groups=groups, batch=2, dtype=dtype))


@pytest.mark.parametrize("positions", (0, 200))
@pytest.mark.parametrize("groups", (5, 20))
@pytest.mark.parametrize("mean", (1e3, 1e4, 1e6))
def test_a_mean_far_from_zero(mean, groups, positions, tiles):
    case = Case(mean=mean, length=150, groups=groups, positions=positions)
    tiles(case)
    x, parameters, d_out = inputs(case)
    exact, plain = (oracle(x, parameters, d_out, case, dtype) for dtype in (torch.float64, torch.float32))
    for name, value in run(x, parameters, d_out, case).items():
        assert_close_to_fp64(value, exact[name], plain[name], name=name, rounding=4.0)


@pytest.mark.parametrize("positions", (0, 400))
def test_statistics_of_a_mean_far_from_zero(positions, tiles):
    tiles(Case(positions=positions))
    x = torch.randn(2, 301, 12, generator=torch.Generator().manual_seed(0)).to(DEVICE) + 1e3
    weight, bias = torch.ones(12, device=DEVICE), torch.zeros(12, device=DEVICE)
    _, stats = norm.forward(x, weight, bias, None, None, groups=4, silu=False, eps=0.0)
    grouped = x.double().unflatten(-1, (4, 3))
    exact = torch.stack([grouped.mean((1, 3)), grouped.var((1, 3), correction=0).rsqrt()], -1)
    mean, rstd, remainder = stats.double().unbind(-1)
    assert relative_error(mean + remainder, exact[..., 0]) < 1e-10
    torch.testing.assert_close(torch.stack((mean, rstd), -1), exact, rtol=3e-7, atol=0)


def test_two_runs_are_bitwise_equal(tiles):
    case = CASES["partial tiles, chunks and channels"]
    tiles(case)
    one, two = (run(*inputs(case), case) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("positions", (0, 40))
def test_gradient_may_overwrite_its_input(positions, tiles):
    """The convolution's backward turns the gradient of its prologue's output into that of its input in place."""
    case = Case(batch=2, length=19, positions=positions)
    tiles(case)
    x, parameters, d_out = inputs(case)
    _, stats = norm.forward(x, **parameters, groups=case.groups, silu=True, eps=1e-5)
    apart, sums = norm.backward(d_out, x, **parameters, stats=stats, groups=case.groups, silu=True)
    affine = norm.coefficients(x, **parameters, stats=stats, groups=case.groups)
    again = norm.gradient(
        d_out, x, parameters["weight"], parameters["scale"], stats, affine, groups=case.groups, silu=True, d_x=d_out
    )
    assert torch.equal(d_out, apart) and torch.equal(sums, again)


def test_parameters_of_any_strides(tiles):
    case = CASES["two batches"]
    tiles(case)
    x, parameters, d_out = inputs(case)
    strided = {name: torch.stack([t, t], -1)[..., 0] for name, t in parameters.items()}
    one, two = (run(x, p, d_out, case) for p in (parameters, strided))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_empty_batch():
    case = Case(batch=0)
    found = run(*inputs(case), case)
    assert found["out"].shape == found["d_x"].shape == (0, 37, 20)
    assert not found["d_weight"].any()


def test_every_configuration_is_complete():
    for device_name in norm._config.tables:
        for kernel in KERNELS:
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                config = norm._config(kernel, dtype, device_name)
                more = {"single_launch": {"POSITIONS"}, "merge": set()}.get(kernel, {"PROGRAMS"})
                assert config.keys() - {"maxnreg"} == {"TILE", "BLOCK_C", "num_warps"} | more


@pytest.mark.ahead_of_time
@pytest.mark.parametrize("target", targets("norm"))
def test_compiles_ahead_of_time(target):
    rows = ahead_of_time("--op", "norm", target)
    assert {row["kernel"] for row in rows} == {*KERNELS, "coefficients", "backward_merge", "backward_single_launch"}
    for row in rows:
        assert row["shared"] <= SHARED_LIMIT[target] and row["spills"] <= SPILLS, row
        if target != "gfx942" and row["kernel"] in (*OVER_TOKENS, "single_launch", "backward_single_launch"):
            assert row["wide_loads"] > 0 and row["registers"] <= 128, row


@pytest.mark.ahead_of_time
@pytest.mark.xdist_group("norm sm_90")
def test_kept_launches_are_those_of_triton():
    assert ahead_of_time("--op", "norm", "--relaunches") == [{"op": "norm", "launches": 10, "same": True}]


@pytest.mark.ahead_of_time
def test_length_and_batch_compile_nothing_anew():
    assert ahead_of_time("--op", "norm", "--recompiles") == [{"op": "norm", "first": 9, "changed": []}]
