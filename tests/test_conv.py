# SPDX-License-Identifier: MIT
"""The dilated convolution: its definition, the CPU kernels against it, and the function around both."""

import dataclasses
import functools
import gc
import math
import os

import numpy
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DEVICE,
    DTYPES,
    FAR,
    GPU_DTYPES,
    INSTRUCTION_SETS,
    ON_DEVICE,
    REFERENCE_AND_AUTO,
    REFERENCE_AND_CPU,
    enough_memory,
    far_apart,
    largest_error,
    needs_extension,
    on_a_side_stream,
    on_device,
    replays,
    strided,
    with_gradients,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import mmattn
from mmattn.testing import assert_close_to_fp64, relative_error

NAMES = ("x", "weight", "bias", "norm_weight", "norm_bias", "scale", "shift", "residual")


@dataclasses.dataclass(frozen=True)
class Case:
    length: int = 37
    channels: tuple = (32, 32)
    taps: int = 3
    dilation: int = 2
    batch: int = 1
    groups: int = 0
    film: bool = False
    silu: bool = False
    residual: bool = False
    bias: bool = True
    strided: bool = False
    fp32_parameters: bool = False
    mean: float = 0.2
    frame: tuple = ()  # height and width, for 3x3 taps

    @property
    def options(self):
        where = dict(zip(("height", "width"), self.frame, strict=True)) if self.frame else {"dilation": self.dilation}
        return {"activation": "silu" if self.silu else None, **where}

    @property
    def kernel(self):
        return (3, 3) if self.frame else (self.taps,)

    @property
    def geometry(self):
        return (1, *self.frame) if self.frame else (self.dilation, 0, 0)

    @property
    def function(self):
        return mmattn.spatial_conv2d if self.frame else mmattn.dilated_conv1d


def frames(count, height, width, **options):
    return Case(length=count * height * width, frame=(height, width), **options)


BLOCK = {"groups": 8, "film": True, "silu": True, "residual": True}
CASES = {
    "one position": Case(length=1),
    "one position, everything": Case(length=1, dilation=1, batch=2, **BLOCK),
    "one channel": Case(channels=(1, 1), batch=2),
    "one channel in": Case(channels=(1, 64), dilation=1),
    "one channel out": Case(channels=(64, 1), dilation=1, groups=32, silu=True),
    "channels 3 to 20": Case(channels=(3, 20)),
    "channels 20 to 3": Case(channels=(20, 3), residual=True, strided=True),
    "channels 33 to 48": Case(channels=(33, 48), groups=11, silu=True, batch=2),
    "channels 48 to 33": Case(channels=(48, 33), **BLOCK),
    "channels 64 to 64": Case(channels=(64, 64), length=70, **BLOCK),
    "channels 20 to 64": Case(channels=(20, 64), groups=4, silu=True),
    "channels 160 to 130": Case(channels=(160, 130), length=67, **BLOCK),
    "projection": Case(taps=1, dilation=1, batch=2),
    "projection, everything": Case(taps=1, dilation=1, channels=(48, 20), batch=2, strided=True, **BLOCK),
    "projection, one position": Case(taps=1, length=1, channels=(33, 3)),
    "projection with a dilation": Case(taps=1, dilation=7, channels=(20, 33)),
    "five taps": Case(taps=5, channels=(20, 33), groups=4, silu=True),
    "seven taps": Case(taps=7, dilation=3, channels=(33, 20), residual=True, batch=2),
    "dilation 1": Case(dilation=1, length=50, **BLOCK),
    "dilation 16": Case(dilation=16, length=70, batch=2, **BLOCK),
    "dilation 37": Case(dilation=37, length=100, channels=(20, 48), residual=True),
    "dilation below the length": Case(dilation=36, **BLOCK),
    "dilation of the length": Case(dilation=37, **BLOCK),
    "dilation above the length": Case(dilation=38, batch=2, **BLOCK),
    "dilation far above the length": Case(dilation=100_000, length=20, batch=2, groups=8, silu=True),
    "five taps, the outer ones outside": Case(taps=5, dilation=20, length=33, batch=2),
    "length 15": Case(length=15, dilation=1, batch=2, **BLOCK),
    "length 16": Case(length=16, dilation=1, **BLOCK),
    "length 17": Case(length=17, dilation=1, **BLOCK),
    "length 31": Case(length=31, dilation=5),
    "length 32": Case(length=32, dilation=5, batch=2),
    "length 33": Case(length=33, dilation=5),
    "several blocks": Case(length=1500, channels=(20, 16), groups=4, silu=True),
    "several blocks, everything": Case(length=1543, channels=(16, 20), batch=2, strided=True, **BLOCK),
    "several blocks, dilation 100": Case(length=1500, dilation=100, channels=(16, 33), **BLOCK),
    "several blocks, dilation 512": Case(length=1100, dilation=512, channels=(20, 16), batch=2, silu=True),
    "several blocks, projection": Case(length=1500, taps=1, channels=(33, 20), residual=True),
    "nothing": Case(bias=False),
    "nothing, strided": Case(bias=False, batch=2, strided=True, channels=(20, 33)),
    "norm alone": Case(groups=32, batch=2),
    "film alone": Case(film=True, batch=2),
    "silu alone": Case(silu=True, batch=2, strided=True),
    "film and silu": Case(film=True, silu=True),
    "norm and silu": Case(groups=8, silu=True, bias=False, batch=2),
    "norm, film, silu, residual, no bias": Case(bias=False, batch=2, **BLOCK),
    "residual alone, strided": Case(residual=True, strided=True, batch=2),
    "fp32 parameters": Case(fp32_parameters=True, batch=2, **BLOCK),
    "fp32 parameters, no prologue": Case(fp32_parameters=True, channels=(20, 48)),
    "frames of one pixel": frames(3, 1, 1, batch=2, **BLOCK),
    "frames of one line": frames(2, 1, 7, channels=(20, 33)),
    "frames of one column": frames(3, 5, 1, batch=2, residual=True),
    "frames of 4 x 6": frames(3, 4, 6, channels=(48, 33), batch=2, strided=True, **BLOCK),
    "frames of 8 x 8": frames(5, 8, 8, channels=(48, 32), **BLOCK),
    "frames of 3 x 16": frames(3, 3, 16, channels=(40, 48), **BLOCK),
    "frames of 16 x 16": frames(2, 16, 16, channels=(32, 20), batch=2, strided=True, **BLOCK),
    "frames of 5 x 32": frames(1, 5, 32, groups=8, silu=True),
    "frames of 20 x 48": frames(2, 20, 48, channels=(16, 20), silu=True),
    "frames of 17 x 64": frames(1, 17, 64, channels=(16, 16), residual=True),
    "frames of 30 x 30": frames(2, 30, 30, channels=(16, 20), film=True),
    "frames of 16 x 16, wide": frames(1, 16, 16, channels=(32, 32), silu=True),
    "frames of 8 x 8, several a block": frames(9, 8, 8, channels=(64, 48), batch=2, **BLOCK),
    "frames of 17 x 19, wide": frames(2, 17, 19, channels=(40, 33), batch=2, strided=True, **BLOCK),
    "frames of 2 x 131, wide": frames(1, 2, 131, channels=(33, 70), residual=True),
    "frames of 40 x 27, wide": frames(1, 40, 27, channels=(80, 130), groups=8, silu=True),
    "frames of three channels": frames(2, 16, 16, channels=(3, 32)),
    "frames, fp32 parameters": frames(2, 6, 16, fp32_parameters=True, **BLOCK),
}  # fmt: skip


def inputs(case, dtype=torch.float32, seed=0):
    """What there is of the tensors in NAMES, and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    (c_in, c_out), own = case.channels, torch.float32 if case.fp32_parameters else dtype
    rows = strided if case.strided else lambda t: t
    film = (0.5 * draw(case.batch, 2 * c_in)).to(own).chunk(2, 1)
    tensors = {
        "x": rows((case.mean + draw(case.batch, case.length, c_in)).to(dtype)),
        "weight": (draw(c_out, c_in, *case.kernel) / (c_in * math.prod(case.kernel)) ** 0.5).to(own),
        "bias": draw(c_out).to(own) if case.bias else None,
        "norm_weight": (1 + 0.3 * draw(c_in)).to(own) if case.groups else None,
        "norm_bias": (0.3 * draw(c_in)).to(own) if case.groups else None,
        "scale": film[0] if case.film else None,
        "shift": film[1] if case.film else None,
        "residual": rows(draw(case.batch, case.length, c_out).to(dtype)) if case.residual else None,
    }
    d_out = draw(case.batch, case.length, c_out).to(dtype)
    return {name: x for name, x in tensors.items() if x is not None}, rows(d_out)


def plain_torch(case, tensors):
    """Independent of the definition in mmattn."""
    y = tensors["x"].transpose(1, 2)
    if case.groups:
        y = F.group_norm(y, case.groups, tensors["norm_weight"], tensors["norm_bias"])
    if case.film:
        y = y * (1 + tensors["scale"][..., None]) + tensors["shift"][..., None]
    if case.silu:
        y = F.silu(y)
    weight, bias = tensors["weight"], tensors.get("bias")
    if case.frame:
        images = y.unflatten(2, (-1, *case.frame)).transpose(1, 2).flatten(0, 1)
        out = F.conv2d(images, weight, bias, padding=1).unflatten(0, (case.batch, -1)).transpose(1, 2).flatten(2)
        out = out.transpose(1, 2)
    else:
        padding = case.dilation * (case.taps // 2)
        out = F.conv1d(y, weight, bias, padding=padding, dilation=case.dilation).transpose(1, 2)
    return out + tensors["residual"] if case.residual else out


def convolve(case, tensors, impl="cpu", **overrides):
    norm = (tensors["norm_weight"], tensors["norm_bias"], case.groups) if "norm_weight" in tensors else None
    film = (tensors["scale"], tensors["shift"]) if "scale" in tensors else None
    options = {**case.options, "norm": norm, "film": film, "residual": tensors.get("residual"), "impl": impl}
    return case.function(tensors["x"], tensors["weight"], tensors.get("bias"), **{**options, **overrides})


@functools.cache
def expected(case, dtype, device="cpu"):
    """In fp64 by plain torch, and by the reference in dtype, on the same inputs."""
    tensors, d_out = inputs(case, dtype) if device == "cpu" else device_inputs(case, dtype)
    exact = with_gradients(lambda t: plain_torch(case, t), tensors, d_out, torch.float64)
    return exact, with_gradients(lambda t: convolve(case, t, "reference"), tensors, d_out)


def outputs(case, dtype, impl="cpu"):
    tensors, d_out = inputs(case, dtype)
    return with_gradients(lambda t: convolve(case, t, impl), tensors, d_out)


def assert_close(found, exact, plain):
    assert found["out"].is_contiguous() and found.keys() == exact.keys()
    for name, x in found.items():
        assert x.dtype == plain[name].dtype, name
        # torch sums by pairs; sums by lanes round a few times more.
        rounding = 4.0 if x.dtype == torch.float32 else 1.0
        assert_close_to_fp64(x, exact[name], plain[name], name=name, rounding=rounding)


def assert_within_budget(found, case, dtype):
    assert_close(found, *expected(case, dtype, found["out"].device.type))


@pytest.mark.parametrize("name", CASES)
def test_reference_is_the_definition(name):
    tensors, d_out = inputs(CASES[name], torch.float64)
    found = with_gradients(lambda t: convolve(CASES[name], t, "reference"), tensors, d_out, torch.float64)
    exact = with_gradients(lambda t: plain_torch(CASES[name], t), tensors, d_out, torch.float64)
    for key in exact:
        assert (found[key] - exact[key]).abs().max() < 1e-11 * max(1.0, float(exact[key].abs().max())), key


def test_reference_against_the_sum():
    """Tap by tap and position by position, as the docstring writes it."""
    case = Case(length=9, channels=(2, 3), taps=5, dilation=3)
    tensors, _ = inputs(case, torch.float64)
    x, weight, bias = (tensors[name] for name in ("x", "weight", "bias"))
    expected_out = torch.zeros(1, 9, 3, dtype=torch.float64) + bias
    for position in range(9):
        for tap in range(5):
            read = position + (tap - 2) * 3
            if 0 <= read < 9:
                expected_out[0, position] += weight[:, :, tap] @ x[0, read]
    assert relative_error(convolve(case, tensors, "reference"), expected_out) < 1e-14


def test_gradcheck_of_the_reference():
    case = Case(length=3, channels=(4, 2), dilation=1, groups=2, film=True, silu=True, residual=True)
    tensors, _ = inputs(case, torch.float64)
    leaves = [x.clone().requires_grad_() for x in tensors.values()]

    def call(*values):
        return convolve(case, dict(zip(tensors, values, strict=True)), "reference")

    assert torch.autograd.gradcheck(call, leaves) and torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name, isa, dtype, instruction_set, poisoned_memory):
    instruction_set(isa)
    assert_within_budget(outputs(CASES[name], dtype), CASES[name], dtype)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_small_shape(isa, instruction_set, poisoned_memory):
    """Bounds are where off-by-ones live: short lengths around every dilation, and channels around a vector."""
    instruction_set(isa)
    for length in (2, 3, 5, 8):
        for dilation in (1, 2, 3, 5, 7, 9):
            case = Case(length=length, dilation=dilation, channels=(3, 5), groups=1, silu=True, batch=2)
            assert_within_budget(outputs(case, torch.float32), case, torch.float32)
    for width in (15, 16, 17, 31, 32, 33, 34, 63, 65):
        case = Case(length=width + 1, channels=(width, 98 - width), dilation=1, groups=width, silu=True)
        for dtype in DTYPES.values():
            assert_within_budget(outputs(case, dtype), case, dtype)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_the_convolution_over_frames(isa, instruction_set, poisoned_memory):
    """Over tokens [B, F*P, C], frames outermost, dilation P is Conv1d over the frames of each pixel."""
    instruction_set(isa)
    batch, frames, pixels, channels = 2, 5, 12, 20
    video = torch.randn(batch, frames, pixels, channels)
    layer = nn.Conv1d(channels, 33, 3, padding=1)
    rows = video.permute(0, 2, 3, 1).reshape(batch * pixels, channels, frames)
    over_frames = layer(rows).view(batch, pixels, 33, frames).permute(0, 3, 1, 2)
    found = mmattn.dilated_conv1d(video.flatten(1, 2), layer.weight, layer.bias, dilation=pixels, impl="cpu")
    assert relative_error(found.view_as(over_frames), over_frames) < 1e-6


@pytest.mark.parametrize("isa", ("reference", *INSTRUCTION_SETS))
def test_a_mean_far_from_zero(isa, instruction_set):
    if isa != "reference":
        instruction_set(isa)
    case = Case(length=1500, mean=1e3, groups=8, silu=True)
    found = outputs(case, torch.float32, "reference" if isa == "reference" else "cpu")
    exact, _ = expected(case, torch.float32)
    for name, x in found.items():
        assert relative_error(x, exact[name]) < 2e-4, name


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_two_runs_are_bitwise_equal(dtype, poisoned_memory):
    names = "several blocks, everything", "several blocks, dilation 100", "channels 160 to 130", "frames of 20 x 48"
    for name in names:
        one, two = outputs(CASES[name], dtype), outputs(CASES[name], dtype)
        assert all(torch.equal(one[key], two[key]) for key in one), name


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("count", (1, 2, 3, 4))
def test_any_number_of_threads(count, dtype, threads, poisoned_memory):
    threads(count)
    for name in ("several blocks, everything", "channels 160 to 130", "one position, everything", "projection"):
        assert_within_budget(outputs(CASES[name], dtype), CASES[name], dtype)


# Of so much work that as many threads as that are given it, and of so few positions that the usual cut is too coarse.
SHARED = {
    "few positions": Case(length=400, channels=(256, 192), dilation=1, **BLOCK),
    "dilation 64": Case(length=800, channels=(160, 192), dilation=64, **BLOCK),
    "dilation 300": Case(length=700, channels=(192, 160), dilation=300, batch=2, **BLOCK),
    "projection": Case(length=400, channels=(512, 256), taps=1, **BLOCK),
    "frames of 8 x 8": frames(6, 8, 8, channels=(192, 160), **BLOCK),
    "frames of 4 x 32": frames(5, 4, 32, channels=(96, 320), **BLOCK),
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("name", SHARED)
def test_cut_finer_for_many_threads(name, isa, dtype, instruction_set, threads, poisoned_memory):
    """Within the budget, and the same bits each time."""
    instruction_set(isa)
    threads(48)
    one, two = outputs(SHARED[name], dtype), outputs(SHARED[name], dtype)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert_within_budget(one, SHARED[name], dtype)


@pytest.mark.parametrize("channels", [(32, 48), (64, 64), (96, 130), (160, 40), (256, 64)], ids=str)
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_fewer_products_keep_the_budget(isa, channels, instruction_set):
    """Winograd's, of which a sum over few channels is the least exact; with a large mean as well."""
    instruction_set(isa)
    for mean in (0, 10):
        for case in (
            frames(3, 14, 13, channels=channels, mean=mean, batch=2),
            Case(length=403, dilation=5, channels=channels, mean=mean),
        ):
            for dtype in DTYPES.values():
                assert_within_budget(outputs(case, dtype), case, dtype)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_how_large_errors_of_fewer_products_are(isa, instruction_set, threads):
    """Relative to the result's norm, as the budget goes by torch's errors, which are this CPU's."""
    instruction_set(isa)
    most = {"out": 7e-7, "d_x": 9e-7, "d_weight": 9e-7}
    for case in (frames(3, 14, 13, channels=(96, 130), batch=2), Case(length=403, dilation=5, channels=(96, 130))):
        exact, _ = expected(case, torch.float32)
        for count in (1, 2, 3):
            threads(count)
            found = outputs(case, torch.float32)
            for name, limit in most.items():
                assert (found[name].double() - exact[name]).norm() < limit * exact[name].norm(), (case, count, name)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("mean", (0, 10))
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_how_large_the_error_of_the_weight_of_frames_is(isa, mean, dtype, instruction_set):
    """Its gradient in float32, where that of the output has a mean, as that of a sum has."""
    instruction_set(isa)
    for size in (16, 4):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 1024, 96, generator=generator).to(dtype)
        d_out = (torch.randn(1, 1024, 97, generator=generator) + mean).to(dtype)

        def gradient(function, wide, x=x, d_out=d_out, size=size):
            weight = torch.zeros(97, 96, 3, 3, dtype=wide, requires_grad=True)
            out = function(x.to(wide) if wide == torch.float64 else x, weight, height=size, width=size)
            return torch.autograd.grad(out, weight, d_out.to(out.dtype))[0]

        exact = gradient(functools.partial(mmattn.spatial_conv2d, impl="reference"), torch.float64)
        found = gradient(functools.partial(mmattn.spatial_conv2d, impl="cpu"), torch.float32)
        assert (found.double() - exact).norm() < 3e-6 * exact.norm(), size


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_a_nan_or_an_infinity_reaches_whoever_reads_it(isa, instruction_set):
    """And nobody else, but for the outputs that Winograd makes together: what pads the input is no copy of it."""
    instruction_set(isa)
    case = Case(length=50, dilation=7, batch=2, channels=(96, 64))
    readers, together = [13, 20, 27], [6, 13, 20, 27]  # four positions a dilation apart, from 6 on
    for dtype in DTYPES.values():
        for value in (float("nan"), float("inf")):
            tensors, _ = inputs(case, dtype)
            clean = convolve(case, tensors)
            tensors["x"][1, 20, 5] = value
            found = convolve(case, tensors)
            assert not torch.isfinite(found[1, readers]).any()
            found[1, together] = clean[1, together]
            assert torch.equal(found, clean)
        for name in ("weight", "bias"):
            tensors, _ = inputs(case, dtype)
            tensors[name][3] = float("nan")
            found = convolve(case, tensors)
            assert torch.isnan(found[:, :, 3]).all() and torch.isfinite(found[:, :, 4:]).all(), name
        tensors, _ = inputs(case, dtype)
        tensors["weight"][:, :, 0] = float("inf")  # the first tap reads padding at the first positions: inf * 0 is NaN
        assert not torch.isfinite(convolve(case, tensors)[:, 7:]).any()


@needs_extension
def test_expanded_and_transposed_output_gradients(poisoned_memory):
    case = Case(batch=2, **BLOCK)
    tensors, d_out = inputs(case)
    for gradient in (
        torch.ones(()).expand_as(d_out),
        d_out[:, :1].expand_as(d_out),
        d_out[:1].expand_as(d_out),
        d_out.mT.contiguous().mT,
    ):
        exact = with_gradients(lambda t: plain_torch(case, t), tensors, gradient, torch.float64)
        plain = with_gradients(lambda t: convolve(case, t, "reference"), tensors, gradient)
        assert_close(with_gradients(lambda t: convolve(case, t), tensors, gradient), exact, plain)


@needs_extension
def test_strided_and_expanded_parameters(poisoned_memory):
    case = Case(batch=3, channels=(32, 24), **BLOCK)
    tensors, d_out = inputs(case)
    tensors["x"] = tensors["x"][:1].expand(3, -1, -1)
    tensors["weight"] = tensors["weight"].permute(2, 1, 0).contiguous().permute(2, 1, 0)
    tensors["bias"] = torch.randn(48)[::2]
    tensors["norm_weight"] = torch.tensor(1.3).expand(32)
    tensors["scale"] = tensors["scale"][:1].expand(3, -1)
    plain = convolve(case, tensors, "reference")
    assert relative_error(convolve(case, tensors), plain) < 1e-6
    leaves = {name: tensors[name].detach().requires_grad_() for name in ("weight", "bias", "norm_weight", "scale")}
    found = {}
    for impl in ("cpu", "reference"):
        out = convolve(case, {**tensors, **leaves}, impl)
        found[impl] = torch.autograd.grad(out, list(leaves.values()), d_out)
    for name, x, y in zip(leaves, found["cpu"], found["reference"], strict=True):
        assert relative_error(x, y) < 1e-5, name


@needs_extension
def test_only_the_weights_require_grad_of_a_plain_convolution(poisoned_memory):
    case = Case(batch=2)
    tensors, d_out = inputs(case)
    exact, plain = expected(case, torch.float32)
    for wanted in (("weight",), ("bias",), ("x",), ("weight", "bias")):
        leaves = {key: x.detach().requires_grad_(key in wanted) for key, x in tensors.items()}
        convolve(case, leaves).backward(d_out)
        assert {key for key, x in leaves.items() if x.grad is not None} == set(wanted)
        for key in wanted:
            assert_close_to_fp64(leaves[key].grad, exact[f"d_{key}"], plain[f"d_{key}"], name=key, rounding=4.0)


class Packing:
    """A weight in use: the result is that of its current values, and it was packed as often as it should."""

    def __init__(self, monkeypatch):
        import mmattn_kernels.cpu.conv

        self.count = 0
        pack = mmattn_kernels.cpu.conv._pack

        def counted(*args, **options):
            self.count += 1
            return pack(*args, **options)

        monkeypatch.setattr(mmattn_kernels.cpu.conv, "_pack", counted)
        self.x = torch.randn(1, 40, 32)

    def check(self, weight, packed=None, x=None):
        """Without gradients: backward packs the weight its own way."""
        x, before = self.x if x is None else x, self.count
        with torch.no_grad():
            found = mmattn.dilated_conv1d(x, weight, dilation=2, impl="cpu")
            definition = mmattn.dilated_conv1d(x, weight, dilation=2, impl="reference")
        assert relative_error(found, definition) < (1e-6 if x.dtype == torch.float32 else 1e-2)
        assert packed is None or self.count - before == packed


@pytest.fixture
def packing(monkeypatch, instruction_set):
    return Packing(monkeypatch)


def parameter(*shape):
    return nn.Parameter(torch.randn(shape) * 0.1)


def test_a_weight_is_packed_once(packing):
    weight = parameter(32, 32, 3)
    packing.check(weight, packed=1)
    for _ in range(3):
        packing.check(weight, packed=0)
    packing.check(weight, packed=1, x=packing.x.bfloat16())
    packing.check(weight, packed=0, x=packing.x.bfloat16())
    packing.check(weight, packed=0)
    packing.check(weight.detach(), packed=None)


def test_a_weight_is_packed_once_in_the_forward_of_training(packing):
    weight, x = parameter(32, 32, 3), packing.x
    mmattn.dilated_conv1d(x, weight, impl="cpu")
    before = packing.count
    mmattn.dilated_conv1d(x, weight, impl="cpu")
    assert packing.count == before


def test_a_weight_changed_in_place_is_packed_anew(packing):
    weight = parameter(32, 32, 3)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    packing.check(weight, packed=1)
    for _ in range(2):
        mmattn.dilated_conv1d(packing.x, weight, impl="cpu").square().sum().backward()
        optimizer.step()
        packing.check(weight)
        packing.check(weight, packed=0)
    for change in (
        lambda w: w.mul_(-1),
        lambda w: w.data.copy_(torch.randn(32, 32, 3)),
        lambda w: w.data.mul_(2),
        lambda w: w.data[31, 31, 2:].add_(3.0),
        lambda w: w.data[0, 0, :1].neg_(),
        lambda w: w.data.zero_(),
        lambda w: w.data.view(-1)[1].fill_(1e-3),
        lambda w: w.detach().numpy().__setitem__((5, 5, 1), 7.0),
        lambda w: setattr(w, "data", torch.randn(32, 32, 3)),
        lambda w: setattr(w, "data", torch.randn(3, 32, 32).permute(1, 2, 0)),
        lambda w: setattr(w, "data", torch.randn(32, 32, 5)),
        lambda w: nn.init.normal_(w),
    ):
        with torch.no_grad():
            change(weight)
        packing.check(weight, packed=1)
        packing.check(weight, packed=0)


def test_swapped_values_are_seen(packing):
    """What a sum or an exclusive or of the values would miss."""
    weight = parameter(32, 32, 3)
    packing.check(weight)
    for one, two in (((0, 0, 0), (0, 0, 1)), ((0, 0, 0), (31, 31, 2)), ((0, 0, 0), (16, 0, 0)), ((3, 1, 1), (4, 2, 0))):
        kept = weight.data[one].clone()
        weight.data[one] = weight.data[two]
        weight.data[two] = kept
        packing.check(weight, packed=1)
    weight.data.copy_(weight.data.flip(0))
    packing.check(weight, packed=1)


def test_adam_with_many_weights(packing):
    """The foreach and fused optimizers write in place as well."""
    for options in ({"foreach": True}, {"fused": True}):
        weights = [parameter(32, 32, 3) for _ in range(3)]
        optimizer = torch.optim.AdamW(weights, lr=0.1, **options)
        for _ in range(3):
            optimizer.zero_grad()
            x = packing.x
            for weight in weights:
                x = mmattn.dilated_conv1d(x, weight, impl="cpu")
            x.square().mean().backward()
            optimizer.step()
            for weight in weights:
                packing.check(weight)


def changes_that_raise_no_version():
    """(name, change of a weight): ways past autograd's counter, and content that weak hashes confuse."""

    def fused(optimizer, **options):
        def step(weight):
            weight.grad = torch.zeros_like(weight)
            weight.grad[3, 5, 0] = 1.0
            optimizer([weight], lr=0.5, fused=True, **options).step()
            weight.grad = None

        return step

    def of_another_process(weight):
        values = weight.detach().view(torch.uint8).numpy()
        if (child := os.fork()) == 0:
            values.reshape(-1)[-2:] ^= 0x40
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0

    def mask(weight):
        flat = weight.data.view(-1)
        flat[torch.randperm(len(flat))[: max(len(flat) // 10_000, 1)]] = 0

    def exchange(weight):
        weight.data[0, 0, 0], weight.data[-1, -1, -1] = weight.data[-1, -1, -1].item(), weight.data[0, 0, 0].item()

    return {
        "SGD": fused(torch.optim.SGD),
        "SGD with momentum": fused(torch.optim.SGD, momentum=0.9),
        "Adam": fused(torch.optim.Adam),
        "AdamW": fused(torch.optim.AdamW, weight_decay=0.0),
        "Adagrad": fused(torch.optim.Adagrad),
        "one element": lambda w: w.data[7, 11, :1].add_(1),
        "the last element": lambda w: w.data[-1, -1, -1:].add_(1),
        "one input channel": lambda w: w.data[:, 3].neg_(),
        "every other input channel": lambda w: w.data[:, 1::2].neg_(),
        "every other output channel": lambda w: w.data[1::2].neg_(),
        "all": lambda w: w.data.neg_(),
        "the lowest bit": lambda w: w.detach().view(torch.uint8).view(-1)[:1].bitwise_xor_(1),
        "a sparse mask": mask,
        "two elements": exchange,
        "order": lambda w: w.data.copy_(w.data.flip(1)),
        "another process": of_another_process,
        "inference": lambda w: torch.inference_mode()(lambda: w.data[1].mul_(2))(),
    }


@pytest.mark.parametrize("shape, dtype", [((64, 64, 1), torch.float32), ((512, 512, 3), torch.float32),
                                          ((512, 512, 3), torch.bfloat16)], ids=str)  # fmt: skip
def test_no_change_of_a_weight_goes_unseen(instruction_set, shape, dtype):
    weight = nn.Parameter((torch.randn(shape) * 0.1).to(dtype).share_memory_())
    x = torch.randn(1, 3, shape[1], dtype=dtype)
    for name, change in changes_that_raise_no_version().items():
        with torch.no_grad():
            before = mmattn.dilated_conv1d(x, weight, impl="cpu")
        values = weight.detach().clone()
        change(weight)
        if dtype == torch.bfloat16 and name.startswith(
            "SGD"
        ):  # torch 2.13's fused SGD leaves weights of bf16 as they are
            continue
        assert not torch.equal(values, weight), name
        with torch.no_grad():
            found = mmattn.dilated_conv1d(x, weight, impl="cpu")
            assert torch.equal(found, mmattn.dilated_conv1d(x, weight.detach().clone(), impl="cpu")), name
        if dtype == torch.float32 and name != "the lowest bit":
            assert not torch.equal(found, before), name


def test_no_change_of_an_inference_tensor_goes_unseen(instruction_set):
    with torch.inference_mode():
        weight, x = torch.randn(512, 512, 3), torch.randn(1, 3, 512)
        for at in ((0, 0, 0), (200, 300, 1), (511, 511, 2)):
            mmattn.dilated_conv1d(x, weight, impl="cpu")
            weight[at] += 1
            found = mmattn.dilated_conv1d(x, weight, impl="cpu")
            assert torch.equal(found, mmattn.dilated_conv1d(x, weight.clone(), impl="cpu"))


def test_a_weight_written_while_it_is_packed_is_not_kept(packing, monkeypatch):
    """As another process may, which then restores the values that were hashed."""
    from mmattn_kernels.cpu import conv

    weight, values = parameter(32, 32, 3), torch.randn(32, 32, 3)
    first, pack = weight.detach().clone(), conv._pack

    def disturbed(*args):
        weight.data.copy_(values)
        return pack(*args)

    monkeypatch.setattr(conv, "_pack", disturbed)
    with torch.no_grad():
        mmattn.dilated_conv1d(packing.x, weight, impl="cpu")
    monkeypatch.setattr(conv, "_pack", pack)
    weight.data.copy_(first)
    packing.check(weight, packed=1)


def test_weights_that_do_not_fill_their_memory(packing):
    whole = parameter(48, 96, 3)
    views = (whole[:32, 32:64], whole[:32, :64:2], whole[0:1, :32].expand(32, 32, 3), whole[:32, 64:, 1:2])
    for _ in range(2):
        for view in views:
            packing.check(view, packed=1)
        whole.data[5, 40].neg_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_views_of_one_weight_keep_little(instruction_set, dtype):
    from mmattn_kernels.cpu import conv

    weight, x = nn.Parameter(torch.randn(4096, 64, 1).to(dtype)), torch.randn(1, 3, 64, dtype=dtype)
    with torch.no_grad():
        for i in range(0, 2048, 8):
            mmattn.dilated_conv1d(x, weight[i : i + 2048], impl="cpu")
    kept = sum(packed.numel() for _, packed in conv._packed[weight.untyped_storage()].values())
    assert 0 < kept <= 4 * weight.nbytes + (1 << 20)


def test_the_content_hash(instruction_set):
    """Every bit counts, wherever it is; all instruction sets agree; no byte behind the end is read as content."""
    from mmattn_kernels.cpu import extension

    def content(memory, size, threads=1):
        return extension().content_hash(memory.data_ptr(), size, threads)

    for size in (1, 8, 63, 4095, 4096, 4097, 12289):
        memory = torch.randint(256, (size + 8,), dtype=torch.uint8)
        seen = {content(memory, size)}
        flips = [(at, 1 << bit) for at in {0, size // 2, size - 1} for bit in range(8)]
        for at, bit in flips:
            memory[at] ^= bit
            seen.add(content(memory, size))
            memory[at] ^= bit
        assert len(seen) == len(flips) + 1
        memory[size:] ^= 255
        assert content(memory, size) in seen
        assert content(memory, size) != content(memory, size - 1)
    memory = torch.randint(256, (1 << 20,), dtype=torch.uint8)
    found = content(memory, len(memory))
    assert content(memory, len(memory), threads=2) == found
    extension().use_instruction_set("portable")
    assert content(memory, len(memory)) == found
    assert content(memory.roll(4096), len(memory)) != found


def test_a_new_weight_at_an_old_address(packing):
    """A tensor of its own in memory that another had, as an allocator hands it out again."""
    memory = numpy.empty((32, 32, 3), numpy.float32)
    for _ in range(3):
        memory[:] = torch.randn(32, 32, 3) / 10
        weight = nn.Parameter(torch.from_numpy(memory))
        packing.check(weight, packed=1)
        del weight


def test_the_packed_copy_goes_with_the_weight(packing):
    from mmattn_kernels.cpu import conv

    gc.collect()
    before = len(conv._packed)
    weights = [parameter(32, 32, 3) for _ in range(4)]
    linear = nn.Linear(32, 32)
    for weight in weights:
        packing.check(weight)
    packing.check(linear.weight.unsqueeze(-1))
    assert len(conv._packed) == before + 5
    del weights, weight, linear
    gc.collect()
    assert len(conv._packed) == before


def test_a_changed_weight_keeps_one_packed_copy(packing):
    """Otherwise training would fill the memory."""
    from mmattn_kernels.cpu import conv

    weight = parameter(32, 32, 3)
    for _ in range(5):
        packing.check(weight)
        with torch.no_grad():
            weight.add_(0.1)
    assert len(conv._packed[weight.untyped_storage()]) == 1


def test_a_weight_that_is_swapped(packing):
    """torch swaps no tensor that has weak references, as `Module.to` does with some and if asked to."""
    one, other = parameter(32, 32, 3), parameter(32, 32, 3)
    packing.check(one, packed=1)
    torch.utils.swap_tensors(one, other)
    packing.check(one, packed=1)
    packing.check(other, packed=0)
    block = mmattn.DilatedConvBlock(32)
    try:
        torch.__future__.set_swap_module_params_on_conversion(True)
        block(packing.x.transpose(1, 2))
        block.double().float().load_state_dict(mmattn.DilatedConvBlock(32).state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_views_of_a_parameter(packing):
    linear = nn.Linear(32, 48)
    packing.check(linear.weight.unsqueeze(-1), packed=1)
    packing.check(linear.weight.unsqueeze(-1), packed=0)
    with torch.no_grad():
        linear.weight.neg_()
    packing.check(linear.weight.unsqueeze(-1), packed=1)
    linear.weight.data.add_(1)
    packing.check(linear.weight.unsqueeze(-1), packed=1)
    halves = [linear.weight[:24].unsqueeze(-1), linear.weight[24:].unsqueeze(-1)]
    for _ in range(2):
        for half in halves:
            packing.check(half)
    packing.check(halves[0], packed=0)
    packing.check(halves[1], packed=0)
    square = parameter(32, 32)
    packing.check(square.unsqueeze(-1), packed=1)
    packing.check(square.t().unsqueeze(-1), packed=1)
    packing.check(square.unsqueeze(-1))


def test_weights_of_inference_mode(packing):
    with torch.inference_mode():
        weight = torch.randn(32, 32, 3)
        packing.check(weight, packed=1)
        packing.check(weight, packed=0)
        weight.mul_(3)
        packing.check(weight, packed=1)
        packing.check(weight[:16], packed=1)
    ordinary = parameter(32, 32, 3)
    packing.check(ordinary, packed=1)
    with torch.inference_mode():
        packing.check(ordinary)
        packing.check(ordinary, packed=0)


def test_another_instruction_set_packs_its_own_way(packing, instruction_set):
    import mmattn_kernels.cpu

    weight = parameter(48, 32, 3)
    for name in (*mmattn_kernels.cpu.extension().instruction_sets(), "portable"):
        instruction_set(name)
        for x in (packing.x, packing.x.bfloat16()):
            packing.check(weight, x=x)
            packing.check(weight, packed=0, x=x)


def test_weights_used_by_two_threads(packing):
    """As servers do: two Python threads, the same and different weights."""
    import concurrent.futures

    weights = [parameter(32, 32, 3) for _ in range(4)]

    def work(seed):
        for i in range(30):
            packing.check(weights[(i + seed) % 4])

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))


@pytest.mark.parametrize("impl", REFERENCE_AND_CPU)
def test_empty_batch_of_a_plain_convolution(impl, poisoned_memory):
    case = Case(batch=0, channels=(32, 20))
    found = outputs(case, torch.float32, impl)
    assert found.pop("out").shape == (0, 37, 20)
    assert all(found[f"d_{name}"].shape == x.shape for name, x in inputs(case)[0].items())
    assert not found["d_weight"].any() and not found["d_bias"].any()


def op_tensors(case, requires_grad=False):
    """As the op takes them, none a view of another: opcheck copies each by itself."""
    tensors = inputs(case)[0]
    tensors["weight"] = tensors["weight"].flatten(2)
    tensors = {name: x.clone().requires_grad_(requires_grad) for name, x in tensors.items()}
    return [tensors.get(name) for name in NAMES]


OPCHECKED = {
    "plain": Case(bias=False),
    "everything": Case(channels=(32, 20), **BLOCK),
    "frames": frames(2, 3, 4, channels=(32, 20), **BLOCK),
}


@needs_extension
@pytest.mark.parametrize("requires_grad", (False, True), ids=("inference", "training"))
def test_opcheck_of_a_plain_convolution(requires_grad):
    case = OPCHECKED["plain"]
    arguments = (*op_tensors(case, requires_grad), case.groups, *case.geometry, case.silu, 1e-5, "cpu")
    torch.library.opcheck(torch.ops.mmattn.conv.default, arguments)


def backward_arguments(case, needed=(True, True, True)):
    tensors = op_tensors(case)
    _, stats = torch.ops.mmattn.conv(*tensors, case.groups, *case.geometry, case.silu, 1e-5, "cpu")
    x, weight, _bias, *prologue, _residual = tensors
    return inputs(case)[1], x, weight, *prologue, stats, case.groups, *case.geometry, case.silu, *needed, "cpu"


@needs_extension
@pytest.mark.parametrize(
    "needed", ((True, True, True), (True, False, False), (False, True, False), (False, False, True))
)
@pytest.mark.parametrize("name", OPCHECKED)
def test_opcheck_of_the_backward_op(name, needed):
    arguments = backward_arguments(OPCHECKED[name], needed)
    torch.library.opcheck(torch.ops.mmattn.conv_backward.default, arguments)


BAD_OPS = {
    "shape of the gradient": (0, lambda t: t[:, 1:], ValueError, r"d_out is .*1, 36, 20"),
    "dtype of the gradient": (0, torch.Tensor.double, ValueError, "d_out is torch.float64"),
    "weight": (2, lambda t: t[:, 1:], ValueError, r"weight has shape \[20, 31, 3\]"),
    "norm's weight missing": (3, lambda t: None, TypeError, "norm's weight is a NoneType"),
    "scale": (5, lambda t: t[:, 1:], ValueError, r"film's scale has shape \[1, 31\]"),
    "statistics": (7, lambda t: t[:, 1:], ValueError, r"stats is .*1, 7, 3.* expected .*1, 8, 3"),
    "dilation": (9, lambda d: 0, ValueError, "dilation is 0"),
    "implementation": (-1, lambda _: "reference", RuntimeError, "plain torch"),
}  # fmt: skip


@needs_extension
@pytest.mark.parametrize("name", BAD_OPS)
def test_the_backward_op_refuses_what_kernels_would_trust(name):
    position, alter, error, message = BAD_OPS[name]
    arguments = list(backward_arguments(OPCHECKED["everything"]))
    arguments[position] = alter(arguments[position])
    with pytest.raises(error, match=message):
        torch.ops.mmattn.conv_backward(*arguments)


@needs_extension
def test_the_op_refuses_what_kernels_would_trust():
    tensors = op_tensors(OPCHECKED["everything"])
    for message, change in {
        "dilation is 0": {9: 0},
        "groups is 7": {8: 7},
        r"weight has shape \[20, 32, 2\]": {1: tensors[1][..., :2]},
        r"residual has shape \[1, 36, 20\]": {7: tensors[7][:, 1:]},
        "x has stride": {0: tensors[0].mT.contiguous().mT},
        "plain torch": {14: "reference"},
        "height is 0": {1: tensors[1].new_zeros(20, 32, 9), 11: 37},
        "whole frames": {1: tensors[1].new_zeros(20, 32, 9), 10: 6, 11: 6},
        "nine taps": {10: 1, 11: 37},
    }.items():
        arguments = [*tensors, 8, 2, 0, 0, True, 1e-5, "cpu"]
        for position, value in change.items():
            arguments[position] = value
        with pytest.raises((ValueError, RuntimeError), match=message):
            torch.ops.mmattn.conv(*arguments)


@pytest.mark.parametrize("impl", REFERENCE_AND_AUTO)
def test_compile(impl, fresh_dynamo):
    """And a new length or dilation compiles nothing anew, once the compiler has seen that they change."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    case = Case(batch=2, channels=(32, 24), **BLOCK)

    def call(tensors, dilation):
        return convolve(case, tensors, impl, dilation=dilation)

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    frames = []
    for length, dilation in ((37, 2), (50, 3), (23, 9), (61, 4), (70, 100)):
        tensors, d_out = inputs(dataclasses.replace(case, length=length))
        eager = with_gradients(lambda t, d=dilation: call(t, d), tensors, d_out)
        found = with_gradients(lambda t, d=dilation: compiled(t, d), tensors, d_out)
        for name, x in found.items():
            assert relative_error(x, eager[name]) < 2e-6, name
        frames.append(counter.frame_count)
    if impl == "auto":
        assert frames[2] == frames[-1]


@needs_extension
def test_compile_sees_a_changed_weight(fresh_dynamo):
    weight, x = parameter(32, 32, 3), torch.randn(1, 40, 32)
    compiled = torch.compile(lambda t: mmattn.dilated_conv1d(t, weight), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for _ in range(3):
            assert relative_error(compiled(x), mmattn.dilated_conv1d(x, weight, impl="reference")) < 1e-6
            weight.mul_(-2)


@needs_extension
@pytest.mark.parametrize("fp32_parameters", (False, True), ids=("in the dtype of x", "in fp32"))
def test_autocast(fp32_parameters):
    """x is rounded to autocast's dtype, and parameters in fp32 are rounded by whoever reads them."""
    case = Case(batch=2, channels=(32, 24), fp32_parameters=fp32_parameters, **BLOCK)
    tensors, d_out = inputs(case)
    low, _ = inputs(case, torch.bfloat16)
    low = {name: x if name in ("x", "residual") else tensors[name] for name, x in low.items()}
    plain = with_gradients(lambda t: convolve(case, t, "auto"), low, d_out)
    with torch.autocast("cpu", torch.bfloat16):
        out = convolve(case, tensors, "auto")
        found = with_gradients(lambda t: convolve(case, t, "auto"), tensors, d_out)
    assert out.dtype == torch.bfloat16 and torch.equal(found["out"], plain["out"])
    for name in tensors:
        assert found[f"d_{name}"].dtype == torch.float32
        assert relative_error(found[f"d_{name}"], plain[f"d_{name}"]) < 1e-6, name
    with torch.autocast("cpu", torch.bfloat16):
        double = convolve(case, {name: x.double() for name, x in tensors.items()}, "auto")
    assert double.dtype == torch.float64


def set_to(name, value):
    return lambda t: {**t, name: value(t[name]) if callable(value) else value}


BAD_TENSORS = {
    "rank": (set_to("x", lambda x: x[0]), ValueError, r"x has shape \[37, 32\]; expected three dimensions"),
    "not a tensor": (set_to("x", None), TypeError, "x is a NoneType; expected a tensor"),
    "integers": (set_to("x", torch.Tensor.int), TypeError, "x has dtype torch.int32; expected a floating"),
    "no positions": (set_to("x", lambda x: x[:, :0]), ValueError, r"x has shape \[1, 0, 32\]; expected at least"),
    "last stride": (set_to("x", lambda x: x.mT.contiguous().mT), ValueError, "x has stride 37 in its last dimension"),
    "weight missing": (set_to("weight", None), TypeError, r"weight is a NoneType; expected a tensor \[Cout"),
    "weight rank": (set_to("weight", lambda w: w[..., 0]), ValueError, r"weight has shape \[20, 32\]; expected \[Cout"),
    "weight channels": (set_to("weight", lambda w: w[:, 1:]), ValueError, r"weight has shape \[20, 31, 3\]; .* Cin"),
    "even taps": (set_to("weight", lambda w: w[..., 1:]), ValueError, r"weight has shape \[20, 32, 2\]; .* K odd"),
    "no taps": (set_to("weight", lambda w: w[..., :0]), ValueError, r"weight has shape \[20, 32, 0\]; .* K odd"),
    "no outputs": (set_to("weight", lambda w: w[:0]), ValueError, r"weight has shape \[0, 32, 3\]"),
    "weight dtype": (set_to("weight", torch.Tensor.half), TypeError, "weight has dtype torch.float16; expected"),
    "weight device": (set_to("weight", lambda w: w.to("meta")), ValueError, "weight is on meta; expected cpu"),
    "bias shape": (set_to("bias", lambda b: b[1:]), ValueError, r"bias has shape \[19\]; expected \[Cout\] = \[20\]"),
    "norm's weight": (set_to("norm_weight", lambda w: w[1:]), ValueError, r"norm's weight has shape \[31\]; expected"),
    "norm's bias": (set_to("norm_bias", None), TypeError, "norm's bias is a NoneType; expected a tensor"),
    "film's scale": (set_to("scale", lambda s: s[:, 1:]), ValueError, r"film's scale has shape \[1, 31\]; expected"),
    "film's shift": (set_to("shift", torch.Tensor.double), TypeError, "film's shift has dtype torch.float64"),
    "residual rank": (set_to("residual", lambda r: r[0]), ValueError, r"residual has shape \[37, 20\]; expected three"),
    "residual": (set_to("residual", lambda r: r[..., 1:]), ValueError, r"residual has shape \[1, 37, 19\]; expected"),
    "residual dtype": (set_to("residual", torch.Tensor.half), TypeError, "residual has dtype torch.float16; expected"),
    "residual device": (set_to("residual", lambda r: r.to("meta")), ValueError, "residual is on meta; expected cpu"),
    "residual stride": (set_to("residual", lambda r: r.mT.contiguous().mT), ValueError, "residual has stride 37"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensor(name):
    alter, error, message = BAD_TENSORS[name]
    case = Case(channels=(32, 20), **BLOCK)
    with pytest.raises(error, match=message):
        convolve(case, alter(inputs(case)[0]), "auto")


PAIR = (torch.ones(32), torch.zeros(32))
BAD_ARGUMENTS = {
    "dilation": ({"dilation": 0}, ValueError, "dilation is 0; expected at least 1"),
    "float dilation": ({"dilation": 2.0}, TypeError, "dilation is 2.0; expected an int"),
    "bool dilation": ({"dilation": True}, TypeError, "dilation is True; expected an int"),
    "norm as a list": ({"norm": [*PAIR, 8]}, TypeError, r"norm is a list; expected a tuple \(weight, bias, groups\)"),
    "norm without groups": ({"norm": PAIR}, TypeError, r"norm is 2 values; expected a tuple \(weight, bias, groups\)"),
    "norm's groups": ({"norm": (*PAIR, 5)}, ValueError, "norm's groups is 5; expected a divisor of .* 32"),
    "no groups": ({"norm": (*PAIR, 0)}, ValueError, "norm's groups is 0; expected a divisor"),
    "float groups": ({"norm": (*PAIR, 8.0)}, TypeError, "norm's groups is 8.0; expected an int"),
    "no groups, no norm": ({"norm": (None, None, 0)}, ValueError, "norm's groups is 0"),
    "film as a tensor": ({"film": torch.zeros(1, 64)}, TypeError, r"film is a Tensor; expected a tuple \(scale"),
    "film of three": ({"film": (None,) * 3}, TypeError, r"film is 3 values; expected a tuple \(scale, shift\)"),
    "activation": ({"activation": "relu"}, ValueError, "activation is 'relu'; expected None or 'silu'"),
    "eps": ({"eps": -1.0}, ValueError, "eps is -1.0; expected at least 0"),
    "impl": ({"impl": "cuda"}, ValueError, "impl is 'cuda'; expected one of 'auto', 'reference'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_argument(name):
    overrides, error, message = BAD_ARGUMENTS[name]
    with pytest.raises(error, match=message):
        convolve(Case(), inputs(Case())[0], **{"impl": "auto", **overrides})


BAD_FRAMES = {
    "height": ({"height": 0}, ValueError, "height is 0; expected at least 1"),
    "width": ({"width": -4}, ValueError, "width is -4; expected at least 1"),
    "float width": ({"width": 4.0}, TypeError, "width is 4.0; expected an int"),
    "not whole frames": (
        {"width": 5},
        ValueError,
        r"x has 24 positions; expected a multiple of height \* width = 3 \* 5",
    ),
}


@pytest.mark.parametrize("name", BAD_FRAMES)
def test_bad_frames(name):
    overrides, error, message = BAD_FRAMES[name]
    case = frames(2, 3, 4)
    with pytest.raises(error, match=message):
        convolve(case, inputs(case)[0], "auto", **overrides)


def test_bad_kernel_of_frames():
    case = frames(2, 3, 4)
    tensors, _ = inputs(case)
    for weight in (tensors["weight"].flatten(2), tensors["weight"][..., :2], tensors["weight"][:, 1:]):
        with pytest.raises(ValueError, match=r"weight has shape .*; expected \[Cout, Cin"):
            convolve(case, {**tensors, "weight": weight}, "auto")


@needs_extension
def test_channels_last_weights(poisoned_memory):
    """As a model in torch.channels_last has them."""
    case = frames(2, 6, 16, **BLOCK)
    tensors, _ = inputs(case)
    weight = tensors["weight"].contiguous(memory_format=torch.channels_last)
    assert torch.equal(convolve(case, {**tensors, "weight": weight}), convolve(case, tensors))


@needs_extension
@pytest.mark.parametrize("name", ("frames of 8 x 8", "frames of 16 x 16"))
def test_compiled_frames(name, fresh_dynamo):
    case = CASES[name]
    tensors, d_out = inputs(case)
    compiled = torch.compile(lambda t: convolve(case, t, "auto"), fullgraph=True, backend="aot_eager")
    found, plain = with_gradients(compiled, tensors, d_out), outputs(case, torch.float32)
    assert all(relative_error(found[key], plain[key]) < 1e-6 for key in plain)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_the_result_may_take_the_place_of_x(isa, dtype, instruction_set):
    """With more channels than one depth or range of out channels holds, and few positions for the threads."""
    instruction_set(isa)
    for batch, length, channels in ((1, 400, 512), (2, 70, 48), (1, 33, 1100)):
        generator = torch.Generator().manual_seed(length)
        x, residual = torch.randn(2, batch, length, channels, generator=generator).to(dtype)
        weight = (torch.randn(channels, channels, 1, generator=generator) / channels**0.5).to(dtype)
        bias = torch.randn(channels, generator=generator).to(dtype)
        options = {"norm": (bias, bias, 4), "activation": "silu", "residual": residual, "impl": "cpu"}
        expected = mmattn.dilated_conv1d(x, weight, bias, **options)
        found = mmattn.dilated_conv1d(x, weight, bias, overwrite_x=True, **options)
        assert found.data_ptr() == x.data_ptr()
        assert_equal_up_to_the_cut(found, expected)


def assert_equal_up_to_the_cut(found, expected):
    """Bits depend on how the work is cut, which writing over x forbids to do by out channels."""
    torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(found.dtype).eps, atol=1e-5)


def test_x_is_kept_where_it_is_needed():
    weight, x = torch.randn(32, 32, 1), torch.randn(1, 40, 32)
    before = x.clone()
    options = {"activation": "silu", "overwrite_x": True, "impl": "cpu"}
    for w, values in ((weight.clone().requires_grad_(), x), (torch.randn(16, 32, 1), x), (torch.randn(32, 32, 3), x)):
        mmattn.dilated_conv1d(values, w, **options)
        assert torch.equal(x, before)
    rows = torch.randn(1, 40, 64)
    expected = rows.clone()
    mmattn.dilated_conv1d(rows[..., :32], weight, **options)
    assert torch.equal(rows, expected)


PUBLISHED = {
    "audio, level 1": Case(length=25600, channels=(128, 128), dilation=16, groups=32, silu=True, fp32_parameters=True),
    "audio, level 2": Case(length=6400, channels=(384, 256), dilation=512, groups=32, silu=True, fp32_parameters=True),
    "audio, second half": Case(length=1600, channels=(384, 384), taps=1, dilation=1, fp32_parameters=True, **BLOCK),
    "audio, level 4, qkv": Case(length=400, channels=(512, 1536), taps=1, dilation=1, groups=32),
    "over frames, level 1": Case(length=16 * 32 * 32, channels=(256, 256), dilation=32 * 32, fp32_parameters=True),
    "first layer": Case(length=25600, channels=(1, 128), dilation=1, fp32_parameters=True),
    "head": Case(length=25600, channels=(128, 1), dilation=1, groups=32, silu=True, fp32_parameters=True),
    "frames, level 2": frames(16, 32, 32, channels=(128, 256), groups=32, silu=True, fp32_parameters=True),
    "frames, first layer": frames(16, 64, 64, channels=(3, 128), fp32_parameters=True),
}
MANY = (
    "one position, everything",
    "one channel in",
    "one channel out",
    "channels 33 to 48",
    "channels 160 to 130",
    "projection, everything",
    "seven taps",
    "dilation far above the length",
    "several blocks, everything",
    "several blocks, dilation 512",
    "nothing, strided",
    "norm alone",
    "film alone",
    "silu alone",
    "norm, film, silu, residual, no bias",
    "fp32 parameters",
    "frames of one pixel",
    "frames of 4 x 6",
    "frames of 16 x 16",
    "frames of three channels",
    "frames of 30 x 30",
)
FEW = ("channels 48 to 33", "fp32 parameters", "frames, fp32 parameters")
INTERPRETED = (
    ("channels 48 to 33", "fp32"),
    ("nothing, strided", "fp32"),
    ("fp32 parameters", "fp16"),
    ("frames of 4 x 6", "fp32"),
)
ON_GPU = [(name, dtype) for dtype in GPU_DTYPES for name in (*(MANY if dtype == "fp32" else FEW), *PUBLISHED)]
DEVICE_CASE = Case(batch=2, channels=(32, 24), fp32_parameters=True, **BLOCK)
DEVICE_CASES = {"positions": DEVICE_CASE, "frames": frames(3, 4, 6, channels=(32, 24), batch=2, **BLOCK)}


def device_inputs(case, dtype=torch.float32, seed=0):
    tensors, d_out = inputs(case, dtype, seed)
    return {name: on_device(x) for name, x in tensors.items()}, on_device(d_out)


def device_tensors(case, dtype=torch.float32, seed=0):
    tensors, d_out = device_inputs(case, dtype, seed)
    return {**tensors, "d_out": d_out}


def on_the_device(case, tensors):
    """Output and gradients of a dict of the tensors and d_out."""
    tensors = dict(tensors)
    d_out = tensors.pop("d_out")
    return with_gradients(lambda t: convolve(case, t, ON_DEVICE), tensors, d_out)


@pytest.mark.device
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[] if (name, dtype) in INTERPRETED else pytest.mark.gpu)
        for name, dtype in dict.fromkeys((*INTERPRETED, *ON_GPU))
    ],
)
def test_triton_through_the_public_function(name, dtype, poisoned_memory):
    case, dtype = {**CASES, **PUBLISHED}[name], GPU_DTYPES[dtype]
    assert_within_budget(on_the_device(case, device_tensors(case, dtype)), case, dtype)
    expected.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("name", DEVICE_CASES)
def test_graph_replays(name):
    case = DEVICE_CASES[name]
    static, *later = (device_tensors(case, torch.bfloat16, seed) for seed in range(3))
    for values, result in zip(later, replays(lambda t: on_the_device(case, t), static, later), strict=True):
        assert largest_error(result, on_the_device(case, values)) < 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("name", DEVICE_CASES)
def test_side_stream(name):
    case = DEVICE_CASES[name]
    tensors = device_tensors(case)
    found = on_a_side_stream(lambda t: on_the_device(case, t), tensors)
    assert largest_error(found, on_the_device(case, tensors)) < 2e-6


@pytest.mark.gpu
def test_inductor_on_the_device(fresh_dynamo):
    """Forward and backward as one graph each; lengths and dilations compile nothing anew, once known to change."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")

    def call(tensors, dilation):
        return convolve(DEVICE_CASE, tensors, ON_DEVICE, dilation=dilation)

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    counts = []
    for length, dilation in ((37, 2), (50, 3), (23, 9), (61, 4), (70, 100)):
        tensors, d_out = device_inputs(dataclasses.replace(DEVICE_CASE, length=length))
        eager = with_gradients(lambda t, d=dilation: call(t, d), tensors, d_out)
        found = with_gradients(lambda t, d=dilation: compiled(t, d), tensors, d_out)
        assert largest_error(found, eager) < 2e-6
        counts.append(counter.frame_count)
    assert counts[2] == counts[-1]


@pytest.mark.gpu
def test_inductor_of_frames_on_the_device(fresh_dynamo):
    case = DEVICE_CASES["frames"]
    tensors, d_out = device_inputs(case)
    compiled = torch.compile(lambda t: convolve(case, t, ON_DEVICE), fullgraph=True)
    eager = on_the_device(case, {**tensors, "d_out": d_out})
    assert largest_error(with_gradients(compiled, tensors, d_out), eager) < 2e-6


@pytest.mark.device
@pytest.mark.parametrize("name", DEVICE_CASES)
@pytest.mark.parametrize("dtype", (torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)))
def test_autocast_on_the_device(dtype, name):
    """x is rounded to autocast's dtype, and parameters in fp32 are rounded by whoever reads them."""
    case = DEVICE_CASES[name]
    tensors, d_out = device_inputs(case)
    low = {name: x.to(dtype) if name in ("x", "residual") else x for name, x in tensors.items()}
    plain = on_the_device(case, {**low, "d_out": d_out})
    with torch.autocast(DEVICE, dtype):
        found = on_the_device(case, {**tensors, "d_out": d_out})
        double = convolve(case, {name: x.double() for name, x in tensors.items()}, "auto")
    assert found["out"].dtype == dtype and torch.equal(found["out"], plain["out"]) and double.dtype == torch.float64
    for name in tensors:
        assert found[f"d_{name}"].dtype == torch.float32
        # A convolution of cuDNN's rounds the gradient of its weight, which it is given in autocast's dtype.
        assert relative_error(found[f"d_{name}"], plain[f"d_{name}"]) < 1e-3, name


@pytest.mark.gpu
@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpoint_on_the_device(reentrant):
    tensors, d_out = device_inputs(DEVICE_CASE)

    def call(*values):
        return convolve(DEVICE_CASE, dict(zip(tensors, values, strict=True)), ON_DEVICE)

    found = with_gradients(lambda t: checkpoint(call, *t.values(), use_reentrant=reentrant), tensors, d_out)
    assert largest_error(found, on_the_device(DEVICE_CASE, {**tensors, "d_out": d_out})) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", DEVICE_CASES)
def test_device_gradients_of_any_strides(name, poisoned_memory):
    case = dataclasses.replace(DEVICE_CASES[name], strided=True)
    tensors = device_tensors(case)
    dense = {name: x.contiguous() for name, x in tensors.items()}
    plain = on_the_device(case, dense)
    assert largest_error(on_the_device(case, tensors), plain) < 2e-6
    swapped = {**tensors, "d_out": dense["d_out"].mT.contiguous().mT}
    assert largest_error(on_the_device(case, swapped), plain) < 2e-6
    expanded = {**dense, "d_out": dense["d_out"][:1, :1].expand_as(dense["d_out"])}
    copied = {name: x.contiguous() for name, x in expanded.items()}
    assert largest_error(on_the_device(case, expanded), on_the_device(case, copied)) < 2e-6


@pytest.mark.gpu
@pytest.mark.parametrize("requires_grad", (False, True), ids=("inference", "training"))
def test_opcheck_on_the_device(requires_grad):
    arguments = [
        on_device(x).clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
        for x in op_tensors(dataclasses.replace(DEVICE_CASE, length=9), requires_grad)
    ]
    torch.library.opcheck(torch.ops.mmattn.conv.default, (*arguments, 8, 2, 0, 0, True, 1e-5, "triton"))


@pytest.mark.gpu
@pytest.mark.xdist_group("memory")
def test_offsets_beyond_32_bits():
    """Rows of x, of the residual and of the gradient so far apart that the last begin past 2^31 elements."""
    enough_memory(24)
    case = Case(length=40, fp32_parameters=True, **BLOCK)
    tensors = device_tensors(case, torch.bfloat16)
    apart = far_apart({name: tensors[name] for name in ("x", "residual", "d_out")})
    assert largest_error(on_the_device(case, {**tensors, **apart}), on_the_device(case, tensors)) < 5e-3
    # Of one position, over and over, the results are one but at the ends.
    channels, length = 512, FAR // 512 + 100
    x = torch.randn(1, 1, 32, dtype=torch.bfloat16, device="cuda").expand(1, length, 32)
    weight = torch.randn(channels, 32, 3, device="cuda")
    few = mmattn.dilated_conv1d(x[:, :64], weight, activation="silu")
    many = mmattn.dilated_conv1d(x, weight, activation="silu")
    assert many.numel() > FAR and relative_error(many[:, -32:], few[:, -32:]) < 2e-3
    assert torch.equal(many[:, 1:-1].amin(1), many[:, 1:-1].amax(1))
