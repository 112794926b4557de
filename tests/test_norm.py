# SPDX-License-Identifier: MIT
"""Group normalisation with FiLM and SiLU: its definition, the CPU kernels against it, and the function around both."""

import dataclasses
import functools

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
from torch.utils.checkpoint import checkpoint

import mmattn
from mmattn.norm import parameter_gradients
from mmattn.testing import assert_close_to_fp64, relative_error

FILM = ("scale", "shift")


@dataclasses.dataclass(frozen=True)
class Case:
    length: int = 37
    channels: int = 64
    groups: int = 32
    batch: int = 1
    film: tuple = FILM
    silu: bool = True
    eps: float = 1e-5
    mean: float = 0.3
    std: float = 1.0
    strided: bool = False
    fp32_parameters: bool = False

    @property
    def options(self):
        return {"activation": "silu" if self.silu else None, "eps": self.eps}


CASES = {
    "one position": Case(length=1),
    "one position, one group": Case(length=1, channels=20, groups=1),
    "two positions": Case(length=2, batch=2),
    "odd length, two batches": Case(length=41, batch=2),
    "one channel": Case(length=19, channels=1, groups=1),
    "channels 20": Case(channels=20, groups=5),
    "channels 48": Case(channels=48, groups=16, batch=2),
    "channels 33, groups of 3": Case(channels=33, groups=11),
    "groups 1": Case(channels=40, groups=1),
    "groups C": Case(channels=24, groups=24),
    "groups of 4, 8, 16 lanes wide": Case(channels=256, length=50),
    "groups of 17": Case(channels=34, groups=2, length=23),
    "several chunks of positions": Case(channels=32, length=5000, groups=8),
    "several chunks, one channel a group": Case(channels=32, length=4097, batch=2),
    "many channels, few positions": Case(channels=1024, length=3),
    "wide, fewer chunks than threads": Case(channels=256, length=1100, batch=2),
    "strided": Case(channels=48, groups=16, batch=2, strided=True),
    "strided, several chunks": Case(channels=20, groups=4, length=2111, batch=2, strided=True),
    "strided, one channel": Case(channels=1, groups=1, batch=2, strided=True),
    "plain": Case(film=(), silu=False, batch=2),
    "SiLU alone": Case(film=()),
    "FiLM alone": Case(silu=False, batch=2),
    "scale alone": Case(film=("scale",), batch=2),
    "shift alone": Case(film=("shift",), batch=2),
    "shift alone, no SiLU": Case(film=("shift",), silu=False),
    "fp32 parameters": Case(batch=2, fp32_parameters=True),
    "fp32 parameters, no FiLM": Case(film=(), fp32_parameters=True),
    "eps 0": Case(eps=0.0),
    "large eps": Case(eps=0.7),
    "small values": Case(std=1e-3, mean=0.0),
    "large values": Case(std=300.0, mean=100.0, length=200),
    "mean 1e4": Case(mean=1e4, length=600, groups=8, batch=2),
    "mean 1e4, plain": Case(mean=1e4, length=3000, groups=8, film=(), silu=False),
}  # fmt: skip


def inputs(case, dtype=torch.float32, seed=0):
    """x, weight, bias and what there is of scale and shift, by name; and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    x = (case.mean + case.std * draw(case.batch, case.length, case.channels)).to(dtype)
    own = torch.float32 if case.fp32_parameters else dtype
    film = (0.5 * draw(case.batch, 2 * case.channels)).to(own)
    tensors = {
        "x": strided(x) if case.strided else x,
        "weight": (1 + 0.3 * draw(case.channels)).to(own),
        "bias": (0.3 * draw(case.channels)).to(own),
        **{name: half for name, half in zip(FILM, film.chunk(2, 1), strict=True) if name in case.film},
    }
    d_out = draw(case.batch, case.length, case.channels).to(dtype)
    return tensors, strided(d_out) if case.strided else d_out


def plain_torch(tensors, groups, activation, eps, group_norm=F.group_norm):
    """Independent of the definition in mmattn."""
    z = group_norm(tensors["x"].transpose(1, 2), groups, tensors["weight"], tensors["bias"], eps).transpose(1, 2)
    if "scale" in tensors:
        z = z * (1 + tensors["scale"][:, None])
    if "shift" in tensors:
        z = z + tensors["shift"][:, None]
    return F.silu(z) if activation else z


def normalise(case, tensors, impl="cpu", **overrides):
    tensors = dict(tensors)
    positional = [tensors.pop(name) for name in ("x", "weight", "bias")]
    return mmattn.group_norm(*positional, case.groups, **{**tensors, **case.options, "impl": impl, **overrides})


@functools.cache
def expected(case, dtype, device="cpu"):
    """In fp64 by plain torch, and by the reference in dtype, on the same inputs."""
    tensors, d_out = inputs(case, dtype) if device == "cpu" else device_inputs(case, dtype)
    exact = with_gradients(lambda t: plain_torch(t, case.groups, **case.options), tensors, d_out, torch.float64)
    return exact, with_gradients(lambda t: normalise(case, t, "reference"), tensors, d_out)


def outputs(case, dtype, impl="cpu", **overrides):
    tensors, d_out = inputs(case, dtype)
    return with_gradients(lambda t: normalise(case, t, impl, **overrides), tensors, d_out)


def assert_within_budget(found, case, dtype):
    exact, plain = expected(case, dtype, found["out"].device.type)
    assert found["out"].is_contiguous() and found.keys() == exact.keys()
    for name, x in found.items():
        assert x.dtype == plain[name].dtype, name
        # A gradient of x is of the size 1/std, and so are the terms of it that cancel.
        absolute = 1e-6 / min(1.0, case.std) if name == "d_x" else 1e-6
        # torch sums by pairs; sums by lanes round a few times more.
        rounding = 4.0 if x.dtype == torch.float32 and name not in ("out", "d_x") else 1.0
        assert_close_to_fp64(x, exact[name], plain[name], name=name, rounding=rounding, absolute=absolute)


@pytest.mark.parametrize("name", CASES)
def test_reference_is_the_definition(name):
    case = CASES[name]
    tensors, d_out = inputs(case, torch.float64)
    found = with_gradients(lambda t: normalise(case, t, "reference"), tensors, d_out, torch.float64)
    exact = with_gradients(lambda t: plain_torch(t, case.groups, **case.options), tensors, d_out, torch.float64)
    for key in exact:
        size = max(1.0, float(exact[key].abs().max()), 1 / case.std)
        assert (found[key] - exact[key]).abs().max() < 1e-11 * size, key


def test_gradcheck_of_the_reference():
    case = Case(length=3, channels=4, groups=2, batch=2)
    tensors, _ = inputs(case, torch.float64)
    leaves = [x.clone().requires_grad_() for x in tensors.values()]

    def call(*values):
        return normalise(case, dict(zip(tensors, values, strict=True)), "reference")

    assert torch.autograd.gradcheck(call, leaves) and torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name, isa, dtype, instruction_set, poisoned_memory):
    instruction_set(isa)
    assert_within_budget(outputs(CASES[name], dtype), CASES[name], dtype)


def by_squares(x, groups, weight, bias, eps):
    """The variance as E[x^2] - E[x]^2, in the dtype of x."""
    z = x.unflatten(1, (groups, -1))
    mean = z.mean((2, 3), keepdim=True)
    z = (z - mean) * (z.square().mean((2, 3), keepdim=True) - mean.square() + eps).rsqrt()
    return z.flatten(1, 2) * weight[:, None] + bias[:, None]


@pytest.mark.parametrize("isa", ("reference", *INSTRUCTION_SETS))
@pytest.mark.parametrize("length", (64, 5000))
def test_a_mean_far_from_zero(length, isa, instruction_set):
    if isa != "reference":
        instruction_set(isa)
    case = Case(length=length, mean=1e3, batch=2)
    tensors, d_out = inputs(case)
    found = outputs(case, torch.float32, "reference" if isa == "reference" else "cpu")
    exact, _ = expected(case, torch.float32)
    naive = with_gradients(lambda t: plain_torch(t, case.groups, **case.options, group_norm=by_squares), tensors, d_out)
    for name in ("out", "d_x", "d_weight"):
        error = relative_error(found[name], exact[name])
        naive_error = (naive[name] - exact[name]).norm() / exact[name].norm()  # NaN where the variance is below 0
        assert error < 2e-4 and not naive_error < 20 * error, f"{name}: {error:.1e}, by squares {naive_error:.1e}"


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_statistics_in_fp32(isa, instruction_set):
    """In bf16 an offset of 100 would swallow them."""
    instruction_set(isa)
    case = Case(length=500, mean=100.0, film=(), silu=False)
    assert_within_budget(outputs(case, torch.bfloat16), case, torch.bfloat16)
    assert relative_error(outputs(case, torch.bfloat16)["out"], expected(case, torch.bfloat16)[0]["out"]) < 4e-3


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_constant_input(isa, instruction_set, poisoned_memory):
    """The variance is 0: the output is the affine map's bias, and nothing is NaN."""
    instruction_set(isa)
    for value, dtype in ((0.0, torch.float32), (0.7, torch.float32), (1e3, torch.float32), (0.7, torch.bfloat16)):
        case = Case(std=0.0, mean=value, silu=False, film=(), length=130)
        found, exact = outputs(case, dtype), outputs(case, torch.float64, "reference")
        # A mean that is off by some roundings is divided by sqrt(eps).
        limit = 8 * value * torch.finfo(torch.float32).eps / case.eps**0.5 + torch.finfo(dtype).eps
        assert (found["out"].double() - exact["out"]).abs().max() <= limit
        assert all(torch.isfinite(x).all() for x in found.values())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_gradients_that_cancel(isa, dtype, instruction_set):
    """A constant x and equal gradients: d_x is 0, and 1 / sqrt(eps) multiplies what two ways to it differ by."""
    instruction_set(isa)
    for value in (-2.0, 0.0, 0.7, 3.0):
        x = torch.full((1, 700, 32), value, dtype=dtype, requires_grad=True)
        out = mmattn.group_norm(x, torch.ones(32), torch.full((32,), value), 4, activation="silu", impl="cpu")
        (d_x,) = torch.autograd.grad(out, x, torch.ones_like(out))
        assert d_x.abs().max() <= 1e-4


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_same_bits_from_any_number_of_threads(dtype, threads, poisoned_memory):
    names = "several chunks of positions", "strided, several chunks", "one position", "odd length, two batches"
    for name in (*names, "wide, fewer chunks than threads"):
        found = []
        for count in (2, 2, 1, 3, 5, 16):
            threads(count)
            found.append(outputs(CASES[name], dtype))
        for other in found[1:]:
            assert all(torch.equal(other[key], x) for key, x in found[0].items()), name


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_a_nan_or_an_infinity_is_not_swallowed(isa, instruction_set):
    """It spoils its group, in its sample, and nothing else."""
    instruction_set(isa)
    case = Case(channels=32, groups=4, batch=2, length=70)
    for dtype in DTYPES.values():
        for value in (float("nan"), float("inf"), -float("inf")):
            tensors, _ = inputs(case, dtype)
            clean = normalise(case, tensors)
            tensors["x"][1, 33, 9] = value
            found = normalise(case, tensors)
            assert torch.isnan(found[1, :, 8:16]).any() and not torch.isfinite(found[1, 33, 9])
            if value != value:
                assert torch.isnan(found[1, :, 8:16]).all()
            found[1, :, 8:16] = clean[1, :, 8:16]
            assert torch.equal(found, clean)
        for name in ("weight", "bias", *FILM):
            tensors, _ = inputs(case, dtype)
            tensors[name][..., 9] = float("nan")
            assert torch.isnan(normalise(case, tensors)[:, :, 9]).all(), name


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_silu_of_large_arguments(isa, instruction_set):
    """exp overflows, SiLU and its derivative do not."""
    instruction_set(isa)
    case = Case(film=(), length=50)
    for dtype in DTYPES.values():
        tensors, d_out = inputs(case, dtype)
        for size in (30.0, 3e4):
            tensors["weight"] = torch.full_like(tensors["weight"], size)
            found = with_gradients(lambda t: normalise(case, t), tensors, d_out)
            exact = with_gradients(lambda t: plain_torch(t, 32, **case.options), tensors, d_out, torch.float64)
            plain = with_gradients(lambda t: normalise(case, t, "reference"), tensors, d_out)
            for name in found:
                assert_close_to_fp64(found[name], exact[name], plain[name], name=name, absolute=1e-6 * size)


@needs_extension
def test_expanded_and_transposed_output_gradients(poisoned_memory):
    case = Case(batch=2)
    tensors, d_out = inputs(case)
    for gradient in (
        torch.ones(()).expand_as(d_out),
        d_out[:, :1].expand_as(d_out),
        d_out[:1].expand_as(d_out),
        d_out.mT.contiguous().mT,
    ):
        exact = with_gradients(lambda t: plain_torch(t, 32, **case.options), tensors, gradient, torch.float64)
        plain = with_gradients(lambda t: normalise(case, t, "reference"), tensors, gradient)
        found = with_gradients(lambda t: normalise(case, t), tensors, gradient)
        for name in exact:
            assert_close_to_fp64(found[name], exact[name], plain[name], name=name)


@needs_extension
def test_x_may_be_expanded(poisoned_memory):
    """One sample for several embeddings: no stride between the batches; and one position repeated."""
    case = Case(batch=3)
    tensors, _ = inputs(case)
    for x in (tensors["x"][:1].expand(3, -1, -1), tensors["x"][:, :1].expand(-1, 37, -1)):
        found, definition = (normalise(case, {**tensors, "x": x}, impl) for impl in ("cpu", "reference"))
        assert relative_error(found, definition) < 1e-5


@needs_extension
def test_only_some_inputs_require_grad(poisoned_memory):
    case = Case(batch=2)
    tensors, d_out = inputs(case)
    exact, plain = expected(case, torch.float32)
    for wanted in (("x",), ("weight", "shift"), ("scale",), ("bias",)):
        leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in tensors.items()}
        normalise(case, leaves).backward(d_out)
        assert {name for name, x in leaves.items() if x.grad is not None} == set(wanted)
        for name in wanted:
            assert_close_to_fp64(leaves[name].grad, exact[f"d_{name}"], plain[f"d_{name}"], name=name)


@needs_extension
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_parameter_gradients_of_the_kernels(dtype, poisoned_memory):
    """Against torch's ops on the same sums: of a norm, of FiLM as halves of an embedding, or of both."""
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator)
    sums, film = draw(3, 20, 2), draw(3, 40).to(dtype)
    norm = draw(20), draw(20).to(dtype)
    scale, shift = film.chunk(2, -1)
    for parameters in ((*norm, None, None), (None, None, scale, shift), (*norm, scale, None), (*norm, scale, shift)):
        with torch.no_grad():
            found = parameter_gradients(sums, *parameters, impl="cpu")
        exact = parameter_gradients(sums.double(), *(None if p is None else p.double() for p in parameters))
        for gradient, definition, parameter in zip(found, exact, parameters, strict=True):
            assert (gradient is None) == (parameter is None)
            if parameter is not None:
                assert gradient.dtype == parameter.dtype and gradient.is_contiguous()
                rounding = torch.finfo(parameter.dtype).eps
                torch.testing.assert_close(gradient.double(), definition, rtol=rounding, atol=1e-6, check_dtype=False)


def op_arguments(case, requires_grad=False):
    """As the op takes them, none a view of another: opcheck copies each by itself."""
    tensors, _ = inputs(case)
    tensors = {name: x.clone().requires_grad_(requires_grad) for name, x in tensors.items()}
    return tuple(map(tensors.get, ("x", "weight", "bias", *FILM)))


@needs_extension
@pytest.mark.parametrize("requires_grad", (False, True), ids=("inference", "training"))
def test_opcheck_without_film(requires_grad):
    tensors = op_arguments(Case(film=()), requires_grad)
    torch.library.opcheck(torch.ops.mmattn.group_norm.default, (*tensors, 32, True, 1e-5, "cpu"))


@needs_extension
def test_opcheck_of_the_backward_op_without_film():
    tensors = op_arguments(Case(film=()))
    _, stats = torch.ops.mmattn.group_norm(*tensors, 32, True, 1e-5, "cpu")
    d_out = inputs(Case())[1]
    torch.library.opcheck(torch.ops.mmattn.group_norm_backward.default, (d_out, *tensors, stats, 32, True, "cpu"))


BAD_OPS = {
    "groups": (lambda t: (*t, 7, True, "cpu"), ValueError, "groups is 7"),
    "shape of the gradient": (lambda t: (t[0][:, 1:], *t[1:7], 32, True, "cpu"), ValueError, r"d_out is .*1, 36, 64"),
    "dtype of the gradient": (lambda t: (t[0].double(), *t[1:7], 32, True, "cpu"), ValueError, "d_out is torch.fl.*64"),
    "statistics": (lambda t: (*t[:6], t[6][:, 1:], 32, True, "cpu"), ValueError, r"stats .* expected .*1, 32, 3"),
    "scale": (lambda t: (*t[:4], t[1][:, 0, 1:], *t[5:7], 32, True, "cpu"), ValueError, r"scale has shape \[1, 63\]"),
    "implementation": (lambda t: (*t[:7], 32, True, "reference"), RuntimeError, "plain torch"),
}  # fmt: skip


@needs_extension
@pytest.mark.parametrize("name", BAD_OPS)
def test_the_backward_op_refuses_what_kernels_would_trust(name):
    alter, error, message = BAD_OPS[name]
    tensors = op_arguments(Case())
    _, stats = torch.ops.mmattn.group_norm(*tensors, 32, True, 1e-5, "cpu")
    with pytest.raises(error, match=message):
        torch.ops.mmattn.group_norm_backward(*alter((inputs(Case())[1], *tensors, stats)))


@needs_extension
def test_the_op_refuses_what_kernels_would_trust():
    x, weight, bias, scale, shift = op_arguments(Case())
    for message, arguments in {
        "groups is 30": (x, weight, bias, scale, shift, 30, True, 1e-5, "cpu"),
        r"weight has shape \[63\]": (x, weight[1:], bias, scale, shift, 32, True, 1e-5, "cpu"),
        "x has stride": (x.mT.contiguous().mT, weight, bias, scale, shift, 32, True, 1e-5, "cpu"),
        "plain torch": (x, weight, bias, scale, shift, 32, True, 1e-5, "reference"),
    }.items():
        with pytest.raises((ValueError, RuntimeError), match=message):
            torch.ops.mmattn.group_norm(*arguments)


@needs_extension
def test_autocast():
    """It keeps the dtype of x, as normalisations do."""
    case = Case(batch=2, fp32_parameters=True)
    for dtype in DTYPES.values():
        tensors, d_out = inputs(case, dtype)
        plain = with_gradients(lambda t: normalise(case, t, "auto"), tensors, d_out)
        with torch.autocast("cpu", torch.bfloat16):
            found = with_gradients(lambda t: normalise(case, t, "auto"), tensors, d_out)
        assert all(torch.equal(x, plain[name]) and x.dtype == plain[name].dtype for name, x in found.items())


def set_to(name, value):
    return lambda t: {**t, name: value(t[name]) if callable(value) else value}


BAD_ARGUMENTS = {
    "rank": (set_to("x", lambda x: x[0]), {}, ValueError, r"x has shape \[37, 64\]; expected three dimensions"),
    "not a tensor": (set_to("x", None), {}, TypeError, "x is a NoneType; expected a tensor"),
    "integers": (set_to("x", torch.Tensor.int), {}, TypeError, "x has dtype torch.int32; expected a floating"),
    "no positions": (set_to("x", lambda x: x[:, :0]), {}, ValueError, r"x has shape \[1, 0, 64\]; expected at"),
    "no channels": (set_to("x", lambda x: x[..., :0]), {}, ValueError, r"x has shape \[1, 37, 0\]; expected at"),
    "last stride": (set_to("x", lambda x: x.mT.contiguous().mT), {}, ValueError, "x has stride 37 in its last"),
    "weight missing": (set_to("weight", None), {}, TypeError, r"weight is a NoneType; expected a tensor \[C\]"),
    "weight shape": (set_to("weight", lambda w: w[1:]), {}, ValueError, r"weight has shape \[63\]; expected \[C\]"),
    "bias shape": (set_to("bias", lambda w: w[None]), {}, ValueError, r"bias has shape \[1, 64\]; expected \[C\]"),
    "weight dtype": (set_to("weight", torch.Tensor.double), {}, TypeError, "weight has dtype torch.float64; exp"),
    "bias device": (set_to("bias", lambda b: b.to("meta")), {}, ValueError, "bias is on meta; expected cpu"),
    "scale shape": (set_to("scale", lambda s: s[0]), {}, ValueError, r"scale has shape \[64\]; expected \[B, C"),
    "shift batch": (set_to("shift", lambda s: s.repeat(2, 1)), {}, ValueError, r"shift has shape \[2, 64\]; expected"),
    "shift dtype": (set_to("shift", torch.Tensor.half), {}, TypeError, "shift has dtype torch.float16; expected"),
    "scale is a number": (set_to("scale", 0.5), {}, TypeError, "scale is a float; expected a tensor"),
    "groups": (dict, {"groups": 30}, ValueError, "groups is 30; expected a divisor of the number of channels, 64"),
    "groups of zero": (dict, {"groups": 0}, ValueError, "groups is 0; expected a divisor"),
    "float groups": (dict, {"groups": 32.0}, TypeError, "groups is 32.0; expected an int"),
    "activation": (dict, {"activation": "gelu"}, ValueError, "activation is 'gelu'; expected None or 'silu'"),
    "eps": (dict, {"eps": -1e-5}, ValueError, "eps is -1e-05; expected at least 0"),
    "NaN eps": (dict, {"eps": float("nan")}, ValueError, "eps is nan; expected at least 0"),
    "impl": (dict, {"impl": "cuda"}, ValueError, "impl is 'cuda'; expected one of 'auto', 'reference'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_argument(name):
    alter, overrides, error, message = BAD_ARGUMENTS[name]
    case = dataclasses.replace(Case(), groups=overrides.get("groups", 32))
    overrides = {key: value for key, value in overrides.items() if key != "groups"}
    with pytest.raises(error, match=message):
        normalise(case, alter(inputs(case)[0]), **{"impl": "auto", **overrides})


@pytest.mark.parametrize("impl", REFERENCE_AND_CPU)
def test_contiguous_whatever_the_strides(impl):
    x, w = torch.randn(3, 5, 32).transpose(0, 1), torch.ones(32)
    assert mmattn.group_norm(x, w, w, 8, impl=impl).is_contiguous()


PUBLISHED = {
    "video, level 1": Case(length=16 * 64 * 64, channels=128, film=()),
    "video, level 4": Case(length=16 * 8 * 8, channels=512),
    "audio, level 1": Case(length=25600, channels=128),
    "audio, level 4": Case(length=400, channels=512, film=(), silu=False),
}
MANY = (
    "one position",
    "one channel",
    "channels 33, groups of 3",
    "groups 1",
    "several chunks of positions",
    "many channels, few positions",
    "strided",
    "plain",
    "scale alone",
    "shift alone",
    "fp32 parameters",
    "eps 0",
    "small values",
    "large values",
)
FEW = ("fp32 parameters", "strided, several chunks")
INTERPRETED = (("channels 20", "fp32"), ("strided", "fp32"), ("fp32 parameters", "fp16"), ("shift alone", "fp32"))
ON_GPU = [(name, dtype) for dtype in GPU_DTYPES for name in (*(MANY if dtype == "fp32" else FEW), *PUBLISHED)]


def device_inputs(case, dtype=torch.float32, seed=0):
    tensors, d_out = inputs(case, dtype, seed)
    return {name: on_device(x) for name, x in tensors.items()}, on_device(d_out)


def on_the_device(case, tensors):
    """Output and gradients of a dict of the tensors and d_out."""
    tensors = dict(tensors)
    d_out = tensors.pop("d_out")
    return with_gradients(lambda t: normalise(case, t, ON_DEVICE), tensors, d_out)


def device_tensors(case, dtype=torch.float32, seed=0):
    tensors, d_out = device_inputs(case, dtype, seed)
    return {**tensors, "d_out": d_out}


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
def test_graph_replays():
    case = Case(batch=2)
    static, *later = (device_tensors(case, torch.bfloat16, seed) for seed in range(3))
    for values, result in zip(later, replays(lambda t: on_the_device(case, t), static, later), strict=True):
        assert largest_error(result, on_the_device(case, values)) < 2e-3


@pytest.mark.gpu
def test_side_stream():
    tensors = device_tensors(Case(batch=2))
    found = on_a_side_stream(lambda t: on_the_device(Case(), t), tensors)
    assert largest_error(found, on_the_device(Case(), tensors)) < 1e-6


@pytest.mark.gpu
def test_inductor_on_the_device(fresh_dynamo):
    """Forward and backward as one graph each; new lengths compile nothing anew, once they are known to change."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(lambda t: normalise(Case(), t, ON_DEVICE), fullgraph=True, backend=counter)
    for length in (37, 50, 23, 61):
        tensors, d_out = device_inputs(Case(length=length, batch=2))
        eager = with_gradients(lambda t: normalise(Case(), t, ON_DEVICE), tensors, d_out)
        assert largest_error(with_gradients(compiled, tensors, d_out), eager) < 1e-6
    assert counter.frame_count <= 2


@pytest.mark.device
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_autocast_on_the_device(dtype):
    """It keeps the dtype of x, as normalisations do."""
    case = Case(fp32_parameters=True)
    tensors = device_tensors(case, dtype)
    plain = on_the_device(case, tensors)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = on_the_device(case, tensors)
    assert all(torch.equal(x, plain[name]) and x.dtype == plain[name].dtype for name, x in found.items())


@pytest.mark.gpu
@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpoint_on_the_device(reentrant):
    def call(*values):
        return normalise(Case(), dict(zip(tensors, values, strict=True)), ON_DEVICE)

    tensors, d_out = device_inputs(Case())
    found = with_gradients(lambda t: checkpoint(call, *t.values(), use_reentrant=reentrant), tensors, d_out)
    assert largest_error(found, on_the_device(Case(), {**tensors, "d_out": d_out})) == 0


@pytest.mark.gpu
def test_device_gradients_of_any_strides(poisoned_memory):
    tensors = device_tensors(Case(batch=2, strided=True))
    dense = {name: x.contiguous() for name, x in tensors.items()}
    plain = on_the_device(Case(), dense)
    assert largest_error(on_the_device(Case(), tensors), plain) < 1e-6
    swapped = {**tensors, "d_out": dense["d_out"].mT.contiguous().mT}
    assert largest_error(on_the_device(Case(), swapped), plain) < 1e-6
    one = {**dense, "d_out": dense["d_out"][:1, :1]}
    expanded = {name: x.expand_as(dense["d_out"]) if name == "d_out" else x for name, x in one.items()}
    copied = {name: x.contiguous() for name, x in expanded.items()}
    assert largest_error(on_the_device(Case(), expanded), on_the_device(Case(), copied)) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("requires_grad", (False, True), ids=("inference", "training"))
def test_opcheck_on_the_device(requires_grad):
    leaves = [on_device(x).clone().requires_grad_(requires_grad) for x in inputs(Case(batch=2))[0].values()]
    torch.library.opcheck(torch.ops.mmattn.group_norm.default, (*leaves, 32, True, 1e-5, "triton"))


@pytest.mark.gpu
@pytest.mark.xdist_group("memory")
def test_offsets_beyond_32_bits():
    """Rows of x and of the gradient so far apart that the last begin past 2^31 elements; and so long a result."""
    enough_memory(24)
    case = Case(length=40, fp32_parameters=True)
    tensors = device_tensors(case, torch.bfloat16)
    found = on_the_device(case, {**tensors, **far_apart({name: tensors[name] for name in ("x", "d_out")})})
    assert largest_error(found, on_the_device(case, tensors)) < 2e-3
    # Of one position, over and over, statistics are those of the position alone, and so is each row.
    channels, length = 512, FAR // 512 + 100
    x = torch.randn(1, 1, channels, dtype=torch.bfloat16, device="cuda").expand(1, length, channels)
    weight, bias = torch.ones(2, channels, device="cuda")
    few = mmattn.group_norm(x[:, :8], weight, bias, 32, activation="silu")
    many = mmattn.group_norm(x, weight, bias, 32, activation="silu")
    assert many.numel() > FAR and relative_error(many[:, -8:], few) < 2e-3
    assert torch.equal(many.amin(1), many.amax(1))
