# SPDX-License-Identifier: MIT
"""Self-attention inside segments: its definition, the CPU kernels against it, and the function around both."""

import dataclasses

import pytest
import torch
from helpers import (
    DEVICE,
    DTYPES,
    GPU_DTYPES,
    INSTRUCTION_SETS,
    assert_as_exact,
    needs_extension,
    on_a_side_stream,
    on_device,
    replays,
    with_gradients,
)

import mmattn
from mmattn.testing import assert_close_to_fp64, relative_error


@dataclasses.dataclass(frozen=True)
class Case:
    segments: int
    tokens: int  # of a segment
    batch: int = 1
    heads: int = 2
    dim: int = 32
    scale: float | None = None
    apart: bool = False  # q, k and v are tensors of their own, not views of a packed projection

    @property
    def length(self):
        return self.segments * self.tokens


CASES = {
    "one token": Case(1, 1),
    "segments of one token": Case(5, 1, batch=2),
    "one segment": Case(1, 37, batch=2),
    "one head, one channel": Case(3, 7, heads=1, dim=1),
    "frames of 33 tokens": Case(4, 33, batch=2, dim=48),
    "frames of 100 tokens": Case(2, 100, dim=96),
    "sixteen frames of many pixels": Case(60, 16, heads=4, dim=64),
    "eight frames of many pixels": Case(70, 8, batch=2, dim=20),
    "three frames of many pixels": Case(33, 3, dim=128),
    "seventeen frames": Case(9, 17, heads=3, dim=40),
    "a scale": Case(2, 20, scale=0.7),
    "tensors apart": Case(3, 12, batch=2, apart=True),
    "widest head": Case(2, 9, heads=1, dim=256),
}


def inputs(case, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, case.length, 3, case.heads, case.dim)
    qkv = torch.randn(shape, generator=generator).to(dtype)
    d_out = torch.randn(shape[:2] + shape[3:], generator=generator).to(dtype)
    return dict(zip("qkv", qkv.unbind(2), strict=True)) if case.apart else {"qkv": qkv}, d_out


def attend(case, tensors, impl="cpu", **overrides):
    q, k, v = tensors["qkv"].unbind(2) if "qkv" in tensors else tensors.values()
    options = {"segments": case.segments, "scale": case.scale, "impl": impl, **overrides}
    return mmattn.self_attention(q, k, v, **options)


def segment_by_segment(case, tensors):
    """Independent of the definition in mmattn."""
    q, k, v = tensors["qkv"].unbind(2) if "qkv" in tensors else tensors.values()
    scale = case.dim**-0.5 if case.scale is None else case.scale
    pieces = []
    for first in range(0, case.length, case.tokens):
        own = slice(first, first + case.tokens)
        weights = torch.einsum("bqhd,bkhd->bhqk", q[:, own] * scale, k[:, own]).softmax(-1)
        pieces.append(torch.einsum("bhqk,bkhd->bqhd", weights, v[:, own]))
    return torch.cat(pieces, 1)


@pytest.mark.parametrize("name", CASES)
def test_reference_is_the_definition(name):
    case = CASES[name]
    tensors, d_out = inputs(case, torch.float64)
    found = with_gradients(lambda t: attend(case, t, "reference"), tensors, d_out)
    exact = with_gradients(lambda t: segment_by_segment(case, t), tensors, d_out)
    assert all(torch.allclose(found[key], exact[key], rtol=1e-10, atol=1e-12) for key in exact)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name, isa, dtype, instruction_set, poisoned_memory):
    instruction_set(isa)
    case = CASES[name]
    tensors, d_out = inputs(case, dtype)
    assert_as_exact(lambda t: attend(case, t), lambda t: segment_by_segment(case, t), tensors, d_out)


@needs_extension
def test_scores_far_from_zero(poisoned_memory):
    """Softmax is of differences: a constant added to all scores of a row changes nothing."""
    case = Case(6, 16, dim=64)
    tensors, _ = inputs(case)
    tensors["qkv"][..., 0] = 0
    plain = attend(case, tensors)
    tensors["qkv"][:, :, :2, :, 0] = 30.0  # 900 / 8 on every score
    shifted = attend(case, tensors)
    assert relative_error(shifted[..., 1:], plain[..., 1:]) < 2e-5


@needs_extension
@pytest.mark.parametrize("name", ("sixteen frames of many pixels", "frames of 100 tokens"))
def test_two_runs_are_bitwise_equal(name, poisoned_memory):
    case = CASES[name]
    tensors, d_out = inputs(case)
    one, two = (with_gradients(lambda t: attend(case, t), tensors, d_out) for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)


def on_the_device(case, tensors):
    """Output and gradients of a dict of the tensors and d_out."""
    tensors = dict(tensors)
    d_out = tensors.pop("d_out")
    return with_gradients(lambda t: attend(case, t, "auto"), tensors, d_out)


def device_tensors(case, dtype=torch.float32):
    tensors, d_out = inputs(case, dtype)
    return {name: on_device(x) for name, x in {**tensors, "d_out": d_out}.items()}


DEVICE_CASES = {
    **CASES,
    "frames of level 2": Case(16, 1024, heads=4, dim=64),
    "pixels of level 3": Case(256, 16, batch=2, heads=4, dim=96),
    "audio": Case(1, 400, heads=4, dim=128),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GPU_DTYPES.values(), ids=GPU_DTYPES)
@pytest.mark.parametrize("name", DEVICE_CASES)
def test_outputs_and_gradients_on_the_device(name, dtype, poisoned_memory):
    case = DEVICE_CASES[name]
    tensors = device_tensors(case, dtype)
    d_out = tensors["d_out"]
    found = on_the_device(case, tensors)
    del tensors["d_out"]
    exact = with_gradients(lambda t: segment_by_segment(case, t), tensors, d_out, torch.float64)
    plain = with_gradients(lambda t: segment_by_segment(case, t), tensors, d_out)
    assert found["out"].is_contiguous() and found.keys() == exact.keys()
    for key, x in found.items():
        assert_close_to_fp64(x, exact[key], plain[key], name=key, rounding=4.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GPU_DTYPES.values(), ids=GPU_DTYPES)
def test_more_segments_than_a_grid_has_rows(dtype):
    """As the frames of each pixel of a large batch are: 65535 is the most blocks along a grid's second axis."""
    case = Case(70_000, 4, heads=1, dim=32)
    tensors = device_tensors(case, dtype)
    found = on_the_device(case, tensors)
    some = slice(4 * 65_530, 4 * 65_600)
    part = {name: x[:, some].contiguous() for name, x in tensors.items()}
    expected = on_the_device(Case(70, 4, heads=1, dim=32), part)
    for key, x in expected.items():
        assert relative_error(found[key][:, some], x) < 4 * torch.finfo(dtype).eps, key


@pytest.mark.gpu
def test_graph_replays():
    case = CASES["frames of 33 tokens"]
    tensors = device_tensors(case, torch.bfloat16)
    later = [{name: x.flip(1) for name, x in tensors.items()}, tensors]
    for values, result in zip(later, replays(lambda t: on_the_device(case, t), tensors, later), strict=True):
        expected = on_the_device(case, values)
        assert all(relative_error(x, expected[key]) < 5e-3 for key, x in result.items())


@pytest.mark.gpu
def test_side_stream():
    case = CASES["frames of 33 tokens"]
    tensors = device_tensors(case)
    found, plain = on_a_side_stream(lambda t: on_the_device(case, t), tensors), on_the_device(case, tensors)
    assert all(relative_error(x, plain[key]) < 1e-6 for key, x in found.items())


@pytest.mark.gpu
def test_inductor_on_the_device(fresh_dynamo):
    case = CASES["frames of 33 tokens"]
    tensors = device_tensors(case)
    d_out = tensors.pop("d_out")
    compiled = torch.compile(lambda t: attend(case, t, "auto"), fullgraph=True)
    found, plain = (with_gradients(call, tensors, d_out) for call in (compiled, lambda t: attend(case, t, "auto")))
    assert all(relative_error(x, plain[key]) < 2e-6 for key, x in found.items())


@pytest.mark.gpu
def test_autocast_on_the_device():
    case = CASES["frames of 33 tokens"]
    tensors = device_tensors(case)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = attend(case, tensors, "auto")
    low = {name: x.bfloat16() for name, x in tensors.items()}
    assert found.dtype == torch.bfloat16 and relative_error(found, attend(case, low, "auto")) < 5e-3


ONES = torch.ones(1, 12, 2, 8)
BAD = {
    "not a tensor": ({"q": None}, TypeError, "q is a NoneType; expected a tensor"),
    "rank": ({"q": ONES[0]}, ValueError, r"q has shape \[12, 2, 8\]; expected four dimensions \[B, L, H, D\]"),
    "no tokens": ({"q": ONES[:, :0]}, ValueError, r"q has shape \[1, 0, 2, 8\]"),
    "integers": ({"q": ONES.int()}, TypeError, "q has dtype torch.int32; expected a floating-point"),
    "dtype": ({"k": ONES.double()}, TypeError, "k has dtype torch.float64; expected torch.float32, the dtype of q"),
    "device": ({"v": ONES.to("meta")}, ValueError, "v is on meta; expected cpu"),
    "shape": ({"v": ONES[..., :4]}, ValueError, r"v has shape \[1, 12, 2, 4\]; expected \[1, 12, 2, 8\]"),
    "stride": ({"k": ONES.mT.contiguous().mT}, ValueError, "k has stride 2 in its last dimension"),
    "segments": ({"segments": 5}, ValueError, "segments is 5; expected a divisor of the number of tokens, 12"),
    "no segments": ({"segments": 0}, ValueError, "segments is 0; expected a divisor"),
    "float segments": ({"segments": 3.0}, TypeError, "segments is 3.0; expected an int"),
    "impl": ({"impl": "cuda"}, ValueError, "impl is 'cuda'"),
    "triton": ({"impl": "triton"}, RuntimeError, "impl 'triton' cannot run self_attention here"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_argument(name):
    change, error, message = BAD[name]
    options = {"q": ONES, "k": ONES, "v": ONES, "segments": 3, **change}
    with pytest.raises(error, match=message):
        mmattn.self_attention(options.pop("q"), options.pop("k"), options.pop("v"), **options)
