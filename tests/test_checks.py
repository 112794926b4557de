# SPDX-License-Identifier: MIT
"""What reaches the kernels: every way in which a tensor may not be what it was, or not be its memory."""

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import INSTRUCTION_SETS, needs_extension
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import flop_counter
from torch.utils._pytree import tree_map

import mmattn
from mmattn import _checks, dispatch
from mmattn_kernels import Question, up_to

pytestmark = needs_extension


def _random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@dataclasses.dataclass(frozen=True)
class Op:
    """A public function of its tensors alone, with an impl, and the multiplications and additions of its forward."""

    function: Callable[..., torch.Tensor]
    shapes: tuple[tuple[int, ...], ...]
    flops: int = 0
    backward_flops: int = 0

    def tensors(self):
        return [_random(*shape) for shape in self.shapes]

    def __call__(self, *tensors, impl="cpu"):
        return self.function(*tensors, impl=impl)

    def gradients(self, *tensors, d_out=None):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = self(*leaves)
        return torch.autograd.grad(out, leaves, torch.ones_like(out) if d_out is None else d_out)


def _attention(*tensors, impl):
    out = mmattn.random_shift_attention(*tensors, frames=4, window=2, shift=1, impl=impl)
    return torch.cat([x.flatten() for x in out])


def _self_attention(q, k, v, impl):
    return mmattn.self_attention(q, k, v, segments=2, impl=impl)


def _segmented_attention(q, k, v, impl):
    windows = mmattn.Windows.prefix([0, 3, 8], [5, 13], keys=13)
    if isinstance(q, FakeTensor):
        windows = tree_map(q.fake_mode.from_tensor, windows)
    return mmattn.segmented_attention(q, k, v, windows, impl=impl)


def _group_norm(x, weight, bias, scale, shift, impl):
    return mmattn.group_norm(x, weight, bias, 8, scale=scale, shift=shift, activation="silu", impl=impl)


def _dilated_conv1d(x, weight, bias, norm_weight, norm_bias, impl):
    return mmattn.dilated_conv1d(x, weight, bias, dilation=2, norm=(norm_weight, norm_bias, 8), impl=impl)


def _spatial_conv2d(x, weight, bias, norm_weight, norm_bias, impl):
    options: dict[str, Any] = {"height": 2, "width": 3, "norm": (norm_weight, norm_bias, 8), "activation": "silu"}
    return mmattn.spatial_conv2d(x, weight, bias, impl=impl, **options)


VIDEO, AUDIO, TOKENS = (2, 8, 2, 16), (2, 13, 2, 16), (2, 12, 32)
ATTENTION_FLOPS = 2 * 2 * 2 * 2 * 16 * (8 * 2 * 3 + 13 * 2 * 2)  # 2 a product, 2 products, B, H, D, queries of keys
MASKED_FLOPS = 2 * 2 * 2 * 16 * 8 * 13  # of a product; all keys are counted, as of attention with a mask
CONV_FLOPS = 2 * 2 * 12 * 32 * 32
OPS = {
    "random_shift_attention": Op(_attention, (VIDEO,) * 3 + (AUDIO,) * 3, ATTENTION_FLOPS, ATTENTION_FLOPS * 5 // 2),
    "self_attention": Op(_self_attention, (VIDEO,) * 3, 2 * 2 * 2 * 2 * 16 * 8 * 4, 5 * 2 * 2 * 2 * 16 * 8 * 4),
    "segmented_attention": Op(_segmented_attention, (VIDEO, AUDIO, AUDIO), 2 * MASKED_FLOPS, 5 * MASKED_FLOPS),
    "group_norm": Op(_group_norm, (TOKENS, (32,), (32,), (2, 32), (2, 32))),
    "dilated_conv1d": Op(_dilated_conv1d, (TOKENS, (32, 32, 3), *((32,),) * 3), 3 * CONV_FLOPS, 6 * CONV_FLOPS),
    "spatial_conv2d": Op(_spatial_conv2d, (TOKENS, (32, 32, 3, 3), *((32,),) * 3), 9 * CONV_FLOPS, 18 * CONV_FLOPS),
}


@pytest.fixture(params=OPS)
def op(request):
    return OPS[request.param]


def test_saved_tensors_of_another_dtype_are_refused(op):
    leaves = [t.requires_grad_() for t in op.tensors()]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.bfloat16(), lambda t: t):
        out = op(*leaves)
    with pytest.raises((ValueError, TypeError), match="expected"):
        out.sum().backward()


@pytest.mark.parametrize("alter", [lambda t: t[..., :-1], lambda t: t.to("meta")], ids=["shape", "device"])
def test_saved_tensors_of_another_shape_or_device_are_refused(op, alter):
    leaves = [t.requires_grad_() for t in op.tensors()]
    with torch.autograd.graph.saved_tensors_hooks(alter, lambda t: t):
        out = op(*leaves)
    with pytest.raises((ValueError, TypeError), match="expected"):
        out.sum().backward()


def test_saved_tensors_on_disk_are_the_same(op):
    """Hooks that give back what they were given, in other memory and other strides, change nothing."""
    leaves = [t.requires_grad_() for t in op.tensors()]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy().copy(), torch.from_numpy):
        out = op(*leaves)
    found = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert all(torch.equal(x, y) for x, y in zip(found, op.gradients(*leaves), strict=True))


@pytest.mark.parametrize("as_default", [True, False], ids=["default device", "context"])
def test_allocations_are_on_the_device_of_the_tensors(op, as_default):
    tensors = op.tensors()
    out, grads = op(*tensors), op.gradients(*tensors)
    ones = torch.ones_like(out)
    try:
        if as_default:
            torch.set_default_device("meta")
            found, found_grads = op(*tensors), op.gradients(*tensors, d_out=ones)
        else:
            with torch.device("meta"):
                found, found_grads = op(*tensors), op.gradients(*tensors, d_out=ones)
    finally:
        torch.set_default_device(None)
    assert torch.equal(found, out) and all(torch.equal(x, y) for x, y in zip(found_grads, grads, strict=True))


def test_lazy_signs_are_values(op):
    tensors = op.tensors()
    lazy = [torch._neg_view(-t) for t in tensors]
    assert all(t.is_neg() for t in lazy) and torch.equal(op(*lazy), op(*tensors))
    found = op.gradients(*lazy, d_out=torch._neg_view(-torch.ones_like(op(*tensors))))
    assert all(torch.equal(x, y) for x, y in zip(found, op.gradients(*tensors), strict=True))


def test_the_imaginary_part_of_a_conjugate_as_a_weight():
    x, w = _random(1, 20, 16), torch.complex(_random(8, 16, 3), _random(8, 16, 4)[..., :3]).conj().imag
    assert w.is_neg()
    expected = mmattn.dilated_conv1d(x, w.clone(), impl="cpu")
    assert torch.equal(mmattn.dilated_conv1d(x, w, impl="cpu"), expected)


def test_a_zero_tensor_as_a_gradient(op):
    tensors = op.tensors()
    zeros = torch._efficientzerotensor(op(*tensors).shape)
    assert all(not x.any() for x in op.gradients(*tensors, d_out=zeros))


def test_a_zero_tensor_is_refused_or_is_zero(op):
    first, *others = op.tensors()
    with pytest.raises(ValueError, match="has stride 0 in its last dimension"):
        op(torch._efficientzerotensor(first.shape), *others)


def test_each_tensor_on_another_device_is_refused(op):
    for at in range(len(op.shapes)):
        tensors = op.tensors()
        tensors[at] = tensors[at].to("meta")
        with pytest.raises(ValueError, match=r"is on (meta|cpu); expected (meta|cpu)"):
            op(*tensors)


@pytest.mark.filterwarnings("ignore:.*compressed.*")
def test_other_layouts_are_refused(op):
    first, *others = op.tensors()
    for other in (first.to_sparse(), first.to_mkldnn()):
        with pytest.raises(TypeError, match=r"is torch\.\w+; expected a dense tensor"):
            op(other, *others)
        with pytest.raises(TypeError, match=r"is torch\.\w+; expected a dense tensor"):
            op(*op.tensors()[:1], other, *op.tensors()[2:]) if op.shapes[0] == op.shapes[1] else op(other, *others)


def test_fake_tensors_outside_their_mode(op):
    mode = FakeTensorMode()
    fake = [mode.from_tensor(t) for t in op.tensors()]
    out = op(*fake)
    assert out.shape == op(*op.tensors()).shape and type(out) is type(fake[0])


def test_a_subclass_has_the_same_values(op):
    class Named(torch.Tensor):
        pass

    tensors = op.tensors()
    found = op(*(t.as_subclass(Named) for t in tensors))
    assert torch.equal(found.as_subclass(torch.Tensor), op(*tensors))


def _resized(t, size):
    t = t.clone()
    t.untyped_storage().resize_(size)
    return t


def _moved(t, offset):
    moved = torch.cat([t.flatten()[:offset], t.flatten()])[offset:].view(t.shape)
    moved.untyped_storage().resize_(t.nbytes)
    return moved


UNLIKE = {
    "a stride": lambda t: torch.stack([t, t], -1)[..., 0],
    "an offset": lambda t: torch.cat([t.flatten()[:3], t.flatten()])[3:].view(t.shape),
    "an offset in as much memory": lambda t: _moved(t, 3),
    "memory freed": lambda t: _resized(t, 0),
    "memory cut short": lambda t: _resized(t, t.nbytes - 4),
    "more memory": lambda t: _resized(t, 2 * t.nbytes)[...],
    "another size": lambda t: t[:-1],
    "another rank": lambda t: t[None],
    "no elements": lambda t: t[..., :0],
    "one element": lambda t: t.flatten()[:1].expand(t.shape),
    "a lazy sign": torch._neg_view,
    "a dtype": torch.Tensor.bfloat16,
    "integers": torch.Tensor.long,
    "no memory": lambda t: t.to("meta"),
    "no tensor": lambda t: t.numpy(),
    "nothing": lambda t: None,
    "sparse": torch.Tensor.to_sparse,
    "a parameter": torch.nn.Parameter,
}


def _outcome(call):
    try:
        return call().detach().bfloat16()
    except Exception as error:
        return type(error), str(error)


def _is_same(one, two):
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return one.shape == two.shape and one.device == two.device and (one.is_meta or one.equal(two))
    return one == two


@pytest.mark.parametrize("unlike", UNLIKE.values(), ids=UNLIKE)
def test_what_is_unlike_a_known_call_is_checked(op, unlike):
    good = op.tensors()
    for at in range(len(good)):
        tensors = [*good[:at], unlike(good[at]), *good[at + 1 :]]
        _checks._known.clear()
        expected = _outcome(lambda tensors=tensors: op(*tensors))
        op(*good)
        assert _is_same(_outcome(lambda tensors=tensors: op(*tensors)), expected), at
        assert _is_same(_outcome(lambda tensors=tensors: op(*tensors)), expected), at


def test_numbers_equal_to_those_of_a_known_call_are_checked():
    x, weight, c, d, e = _random(1, 12, 32), _random(32, 32, 1), _random(32), _random(32), _random(32)
    six = [_random(1, 8, 2, 16) for _ in range(6)]
    functions: dict[str, tuple[Callable[..., Any], Any]] = {
        "groups": (lambda value: mmattn.group_norm(x, c, d, value), 1),
        "eps": (lambda value: mmattn.group_norm(x, c, d, 4, eps=value), 1.0),
        "dilation": (lambda value: mmattn.dilated_conv1d(x, weight, c, dilation=value), 1),
        "norm's groups": (lambda value: mmattn.dilated_conv1d(x, weight, c, norm=(d, e, value)), 1),
        "segments": (lambda value: mmattn.self_attention(*six[:3], segments=value), 1),
        "frames": (lambda value: mmattn.random_shift_attention(*six, frames=value, window=1, shift=0), 1),
        "window": (lambda value: mmattn.random_shift_attention(*six, frames=2, window=value, shift=0), 1),
        "shift": (lambda value: mmattn.random_shift_attention(*six, frames=2, window=1, shift=value), 1),
    }
    for name, (function, value) in functions.items():
        function(value)
        function(value)
        for wrong in (True, 1.0 if name != "eps" else "1", [1], torch.tensor(1.0), 3 if name != "eps" else -1.0):
            if (name, wrong) != ("dilation", 3):
                with pytest.raises((TypeError, ValueError), match=f"^{name} is .*; expected"):
                    function(wrong)


def test_a_call_is_checked_once(op, monkeypatch):
    """And its backward: of those that follow, all that the checks look at is the same."""
    op.gradients(*op.tensors())
    monkeypatch.setattr(_checks, "remember", None)
    op.gradients(*op.tensors())


def test_known_calls_are_bounded(monkeypatch):
    monkeypatch.setattr(_checks, "_KEYS", 5)
    monkeypatch.setattr(_checks, "_CALLS_OF_A_KEY", 3)
    _checks._known.clear()
    for length in range(1, 40):
        for more in range(10):
            mmattn.group_norm(_random(1, length + more, 8)[:, :length], *[_random(8)] * 2, 4)
        assert len(_checks._known) <= 5 and all(len(calls) <= 3 for calls in _checks._known.values())


def test_what_is_plain():
    x = _random(3, 4)
    with torch.inference_mode():
        inferred = torch.ones(3)
    assert all(map(_checks.is_plain, (x, torch.nn.Parameter(x), x.mT, x.bfloat16(), inferred)))
    mode = FakeTensorMode()
    zero, fake = torch._efficientzerotensor((3,)), mode.from_tensor(x)
    others = [torch._neg_view(x), torch.complex(x, x).conj(), zero, fake, x.to("meta"), x.to_sparse(), x.to_mkldnn()]
    assert not any(map(_checks.is_plain, others))
    torch.func.grad(lambda y: (_refuse_plain(y), y.sum())[1])(x)
    torch.vmap(_refuse_plain)(x)


def _refuse_plain(x):
    assert not _checks.is_plain(x)
    return x


def test_transforms_of_torch_func(op):
    tensors = op.tensors()

    def loss(*tensors):
        return op(*tensors).square().sum()

    out = op(*tensors)
    expected = op.gradients(*tensors, d_out=2 * out)
    everything = tuple(range(len(tensors)))
    found = torch.func.grad(loss, argnums=everything)(*tensors)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    value, pull_back = torch.func.vjp(op, *tensors)
    assert torch.equal(value, out)
    assert all(torch.equal(x, y) for x, y in zip(pull_back(2 * out), expected, strict=True))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_and_gradients_under_it(op):
    several = [torch.stack([t, 2 * t]) for t in op.tensors()]
    found = torch.vmap(op)(*several)
    grads = torch.vmap(torch.func.grad(lambda *t: op(*t).sum()))(*several)
    for i in range(2):
        assert torch.equal(found[i], op(*(t[i] for t in several)))
        assert torch.equal(grads[i], op.gradients(*(t[i] for t in several))[0])


def test_a_second_derivative_by_torch_func_is_refused(op):
    first, *others = op.tensors()
    inner = torch.func.grad(lambda x: op(x, *others).square().sum())
    with pytest.raises(RuntimeError, match="is differentiable once"):
        torch.func.grad(lambda x: inner(x).square().sum())(first)


def test_flops_are_counted(op, monkeypatch):
    for name in [packet for packet in flop_counter.flop_registry if str(packet).startswith("mmattn.")]:
        monkeypatch.delitem(flop_counter.flop_registry, name)  # as in a process whose first call this is
    leaves = [t.requires_grad_() for t in op.tensors()]
    with flop_counter.FlopCounterMode(display=False) as counter:
        out = op(*leaves)
    assert counter.get_total_flops() == op.flops
    with flop_counter.FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == op.backward_flops


@pytest.mark.parametrize("first", [0, 1])
def test_autocast_of_mixed_dtypes(op, first):
    tensors = [t.bfloat16() if at % 2 == first else t for at, t in enumerate(op.tensors())]
    with torch.autocast("cpu", torch.bfloat16):
        found = op(*tensors)
        assert torch.equal(found, op(*tensors))
    expected = op(*(t.double() for t in tensors), impl="reference")
    assert (found - expected).abs().max() < 0.03 * expected.abs().max()


def _attention_arguments():
    return [_random(*shape) for shape in OPS["random_shift_attention"].shapes], [4, 2, 1, None, 0.25, "cpu"]


WRONG_ATTENTION = {
    "short audio_v": (lambda t: [*t[:5], t[5][:, :2]], {}, r"audio_v has shape \[2, 2, 2, 16\]"),
    "audio_v of another rank": (lambda t: [*t[:5], t[5][0]], {}, "audio_v has shape .* expected four dimensions"),
    "less audio than frames": (lambda t: [*t[:3], *(x[:, :3] for x in t[3:])], {}, "audio_q has 3 positions"),
    "no heads": (lambda t: [x[:, :, :0] for x in t], {}, "at least one head"),
    "no channels": (lambda t: [x[..., :0] for x in t], {}, "at least one head and one channel"),
    "channels apart": (lambda t: [*t[:5], t[5].mT.contiguous().mT], {}, "audio_v has stride 2 in its last"),
    "frames of 2**62": (list, {0: 2**62}, "frames is 4611686018427387904; expected a divisor"),
    "window of 2**62": (list, {1: 2**62}, "window is 4611686018427387904; expected 1..frames"),
    "shift of 2**62": (list, {2: 2**62}, "shift is 4611686018427387904; expected 0"),
    "tensor shift": (list, {3: torch.tensor(3)}, "shift is 3; expected 0..frames-window = 0..2"),
    "float shift": (list, {3: torch.tensor(1.0)}, "shift is a torch.float32 tensor"),
    "implementation": (list, {5: "foo"}, "foo"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_ATTENTION)
def test_wrong_arguments_of_the_attention_op(name):
    alter, numbers, message = WRONG_ATTENTION[name]
    tensors, rest = _attention_arguments()
    for at, value in numbers.items():
        rest[at] = value
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        torch.ops.mmattn.random_shift_attention(*alter(tensors), *rest)


def _wrong_results(arguments, results, message):
    """Each of the named results shorter, in another dtype, and on another device."""
    for at in results:
        t = arguments[at]
        for wrong in (t[:, 1:], t.half(), t.to("meta")):
            changed = [*arguments]
            changed[at] = wrong
            yield changed, message


def test_backward_ops_refuse_what_forward_did_not_return():
    tensors, rest = _attention_arguments()
    out = torch.ops.mmattn.random_shift_attention(*tensors, *rest)
    arguments = [*map(torch.ones_like, out[:2]), *tensors, *out, *rest]
    for changed, message in _wrong_results(arguments, (0, 1, 8, 9, 10, 11), r"(d_|)(video|audio)_(out|lse) is"):
        with pytest.raises(ValueError, match=message):
            torch.ops.mmattn.random_shift_attention_backward(*changed)
    for at in (10, 11):
        with pytest.raises(ValueError, match=r"_lse has strides .* expected a contiguous"):
            changed = [*arguments]
            changed[at] = arguments[at][:1].expand(arguments[at].shape)
            torch.ops.mmattn.random_shift_attention_backward(*changed)
    q, k, v = OPS["self_attention"].tensors()
    out, lse = torch.ops.mmattn.self_attention(q, k, v, 2, 0.25, "cpu")
    arguments = [torch.ones_like(out), q, k, v, out, lse, 2, 0.25, "cpu"]
    for changed, message in _wrong_results(arguments, (0, 4, 5), r"(d_out|out|lse) is"):
        with pytest.raises(ValueError, match=message):
            torch.ops.mmattn.self_attention_backward(*changed)


def test_backward_ops_refuse_expanded_statistics():
    x, weight, bias, scale, shift = OPS["group_norm"].tensors()
    out, stats = torch.ops.mmattn.group_norm(x, weight, bias, scale, shift, 8, True, 1e-5, "cpu")
    expanded = stats[:1, :1].expand(stats.shape)
    with pytest.raises(ValueError, match=r"stats has strides .* expected a contiguous"):
        torch.ops.mmattn.group_norm_backward(out, x, weight, bias, scale, shift, expanded, 8, True, "cpu")
    w = _random(32, 32, 3)
    with pytest.raises(ValueError, match=r"stats has strides .* expected a contiguous"):
        torch.ops.mmattn.conv_backward(
            out, x, w, weight, bias, None, None, expanded, 8, 1, 0, 0, True, True, True, True, "cpu"
        )


@pytest.mark.parametrize("dilation", [2**31, 2**61, 2**62, 2**63 - 1, 2**64])
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_a_dilation_of_any_size(dilation, impl):
    x, w = _random(1, 20, 16).requires_grad_(), _random(16, 16, 3).requires_grad_()
    out = mmattn.dilated_conv1d(x, w, dilation=dilation, impl=impl)
    middle = mmattn.dilated_conv1d(x, w[..., 1:2], impl=impl)
    torch.testing.assert_close(out, middle)
    for found, expected in zip(
        torch.autograd.grad(out.sum(), (x, w)), torch.autograd.grad(middle.sum(), (x, w)), strict=True
    ):
        torch.testing.assert_close(found, expected)
    if dilation < 2**63:
        arguments = [x.detach(), w.detach(), *[None] * 6, 0, dilation, 0, 0, False, 1e-5, "cpu"]
        torch.testing.assert_close(torch.ops.mmattn.conv(*arguments)[0], middle)


def test_a_weight_whose_elements_are_far_apart(instruction_set):
    """Within a vector the AMX kernels reach the channels of a weight by 32-bit offsets."""
    far = torch.empty(16 * 150_000_000, dtype=torch.bfloat16).as_strided((16, 16, 1), (150_000_000, 1, 1))
    near = _random(16, 16, 1).bfloat16()
    far.copy_(near)
    x = _random(1, 20, 16).bfloat16()
    for isa in INSTRUCTION_SETS:
        instruction_set(isa)
        found, expected = [], []
        for weight, into in ((far, found), (near, expected)):
            leaf, w = x.clone().requires_grad_(), weight.detach().requires_grad_()
            out = mmattn.dilated_conv1d(leaf, w, impl="cpu")
            into += [out.detach(), torch.autograd.grad(out.sum(), leaf)[0]]
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_an_overwritten_x_raises_its_version():
    x, w, later = _random(1, 20, 16), _random(16, 16, 1), _random(1, 20, 16).requires_grad_()
    product = (later * x).sum()  # saves x
    with torch.no_grad():
        out = mmattn.dilated_conv1d(x, w, overwrite_x=True, impl="cpu")
    assert out.data_ptr() == x.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_x_is_not_overwritten_where_another_argument_reads_it():
    memory, w = _random(1, 21, 16), _random(16, 16, 1)
    x, residual = memory[:, :-1], memory[:, 1:]
    expected = mmattn.dilated_conv1d(x, w, residual=residual, impl="cpu")
    before = memory.clone()
    found = mmattn.dilated_conv1d(x, w, residual=residual, overwrite_x=True, impl="cpu")
    assert torch.equal(found, expected) and torch.equal(memory, before)
    with torch.inference_mode():
        inferred = x.clone()
    assert torch.equal(mmattn.dilated_conv1d(inferred, w, residual=residual, overwrite_x=True, impl="cpu"), expected)
    assert torch.equal(inferred, x)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_frames_of_an_empty_batch(impl):
    op = OPS["spatial_conv2d"]
    x, *others = op.tensors()
    leaves = [t.requires_grad_() for t in (x[:0], *others)]
    out = op(*leaves, impl=impl)
    assert out.shape == (0, 12, 32)
    assert all(not g.any() for g in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("eps", [float("nan"), float("inf"), -1.0, "1", None, True], ids=str)
def test_eps_is_a_finite_number(eps):
    x, w = _random(1, 20, 16), _random(16)
    with pytest.raises((ValueError, TypeError), match=r"eps is .*expected"):
        mmattn.group_norm(x, w, w, 4, eps=eps, impl="cpu")
    with pytest.raises((ValueError, TypeError), match=r"eps is .*expected"):
        mmattn.dilated_conv1d(x, _random(16, 16, 1), norm=(w, w, 4), eps=eps, impl="cpu")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("import no_such_setuptools", "triton does not load: no_such_setuptools is not installed"),
        ("raise ImportError('no libtriton')", "triton does not load (ImportError: no libtriton)"),
        ("raise RuntimeError('no driver')", "triton does not load (RuntimeError: no driver)"),
    ],
    ids=["something it imports is missing", "broken", "broken otherwise"],
)
def test_a_triton_that_does_not_load_is_a_reason(content, reason, tmp_path):
    (tmp_path / "triton.py").write_text(content)
    program = (
        "import sys, torch; from mmattn import dispatch; assert not {'triton', 'torch._dynamo'} & sys.modules.keys(); "
        "print(dispatch.support('random_shift_attention', 'triton', 'cuda', torch.float32, 64).reason); "
        "print(dispatch.explain('dilated_conv1d', 'auto', 'cuda', torch.float32)[0])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert reason in run.stdout and run.stdout.splitlines()[-1] == "reference"


def test_constants_of_traces_are_marked_as_torch_marks_them():
    def ours(): ...

    def theirs(): ...

    dispatch.constant_in_traces(ours)
    assert vars(ours) == vars(torch.compiler.assume_constant_result(theirs))


def _at_an_offset(t):
    return torch.cat([t[:1], t])[1:]


def _apart(t):
    return torch.stack([t, t], dim=1)[:, 0]


def _sliced(t):
    return torch.cat([t, t], dim=-1)[..., : t.shape[-1]]


LAYOUTS = {"dense": torch.clone, "offset": _at_an_offset, "apart": _apart, "sliced": _sliced}
UNSTORED = r"^{} is \[.*\] on a storage of \d+ bytes; expected memory that has not been freed or cut short"


def _cut(t, layout="dense", size=None):
    """The tensor on a storage that ends before its last element, or of that size."""
    cut = LAYOUTS[layout](t.detach())
    last = cut.storage_offset() + sum((n - 1) * step for n, step in zip(cut.shape, cut.stride(), strict=True))
    cut.untyped_storage().resize_(last * cut.element_size() + 1 if size is None else size)
    return cut


def _each_cut(op, layout="dense", size=None):
    for at in range(len(op.shapes)):
        tensors = op.tensors()
        tensors[at] = _cut(tensors[at], layout, size)
        yield tensors


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_a_storage_cut_short_is_refused_by_name(op, impl, layout):
    for size in (None, 0):
        for tensors in _each_cut(op, layout, size):
            with pytest.raises(ValueError, match=UNSTORED.format(r"\w+")):
                op(*tensors, impl=impl)
            with torch.inference_mode(), pytest.raises(ValueError, match=UNSTORED.format(r"\w+")):
                op(*tensors, impl=impl)


def test_a_storage_cut_short_is_refused_before_a_cast_or_a_sign(op):
    for layout in ("dense", "apart"):
        for tensors in _each_cut(op, layout):
            with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=UNSTORED.format(r"\w+")):
                op(*tensors)
            lazy = [torch._neg_view(t) for t in tensors]
            with pytest.raises(ValueError, match=UNSTORED.format(r"\w+")):
                op(*lazy)
    halves = [t.half() if t.dim() < 3 else t for t in OPS["group_norm"].tensors()]
    halves[1] = _cut(halves[1])
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=UNSTORED.format("weight")):
        OPS["group_norm"](*halves)


def test_a_storage_that_just_reaches_is_enough(op):
    tensors = op.tensors()
    for layout in LAYOUTS.values():
        just = [layout(t) for t in tensors]
        for t in just:
            last = t.storage_offset() + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
            t.untyped_storage().resize_((last + 1) * t.element_size())
        assert torch.equal(op(*just), op(*tensors))
    nothing = torch.empty(4)[4:].expand(3, 0)
    nothing.untyped_storage().resize_(0)
    assert _checks.is_plain(nothing)


@pytest.mark.parametrize("size", [4, 0])
def test_a_shift_without_its_storage_is_refused_by_name(size):
    tensors = [_random(1, 6, 2, 16)] * 6
    for impl in ("cpu", "reference"):
        shift = torch.tensor(1)
        shift.untyped_storage().resize_(size)
        with pytest.raises(ValueError, match=UNSTORED.format("shift")):
            mmattn.random_shift_attention(*tensors, frames=3, window=1, shift=shift, impl=impl)
        with pytest.raises(ValueError, match=UNSTORED.format("shift(_tensor)?")):
            torch.ops.mmattn.random_shift_attention(*tensors, 3, 1, 0, shift, 0.25, impl)


def test_tables_without_their_storage_are_refused_by_name():
    tensors = [_random(*shape) for shape in OPS["segmented_attention"].shapes]
    for impl in ("cpu", "reference"):
        for name in ("query_bounds", "key_begin", "key_length"):
            windows = mmattn.Windows.prefix([0, 3, 8], [5, 13], keys=13)
            getattr(windows, name).untyped_storage().resize_(4)
            with pytest.raises(ValueError, match=UNSTORED.format(name)):
                mmattn.segmented_attention(*tensors, windows, impl=impl)


def test_what_is_cut_short_before_backward_is_refused_by_name(op):
    for size in (1, 0):
        for at in range(len(op.shapes)):
            leaves = [t.requires_grad_() for t in op.tensors()]
            out = op(*leaves)
            leaves[at].untyped_storage().resize_(size)
            try:
                out.sum().backward()
            except ValueError as error:
                assert re.match(UNSTORED.format(r"\w+"), str(error))
            else:  # a bias of a convolution alone is not read
                assert op.shapes[at] == (32,) and at == 2


def test_results_and_their_gradients_cut_short_are_refused_by_name():
    q, k, v = OPS["self_attention"].tensors()
    out, lse = torch.ops.mmattn.self_attention(q, k, v, 2, 0.25, "cpu")
    arguments = [torch.ones_like(out), q, k, v, out, lse, 2, 0.25, "cpu"]
    for at, name in ((0, "d_out"), (4, "out"), (5, "lse")):
        changed = [*arguments]
        changed[at] = _cut(arguments[at])
        with pytest.raises(ValueError, match=UNSTORED.format(name)):
            torch.ops.mmattn.self_attention_backward(*changed)
    x, weight, bias, scale, shift = OPS["group_norm"].tensors()
    out, stats = torch.ops.mmattn.group_norm(x, weight, bias, scale, shift, 8, True, 1e-5, "cpu")
    with pytest.raises(ValueError, match=UNSTORED.format("stats")):
        torch.ops.mmattn.group_norm_backward(out, x, weight, bias, scale, shift, _cut(stats), 8, True, "cpu")
    x = x.requires_grad_()
    out = mmattn.group_norm(x, weight, bias, 8, impl="cpu")
    for layout in ("dense", "apart"):
        with pytest.raises(ValueError, match=UNSTORED.format("d_out")):
            torch.autograd.grad(out, x, _cut(torch.ones_like(out), layout), retain_graph=True)


def test_parameters_of_a_module_without_their_storage_are_refused():
    block = mmattn.DilatedConvBlock(32)
    for parameter in block.parameters():
        kept = parameter.detach().clone()
        parameter.untyped_storage().resize_(parameter.nbytes - 1)
        with pytest.raises(ValueError, match=UNSTORED.format(r"[a-z_' ]+")):
            block(_random(1, 32, 20))
        parameter.data = kept


def test_a_refusal_has_a_reason():
    question = Question("cpu", torch.float32, 300)
    for impl in ("cpu", "triton"):
        for op in dispatch.OPS:
            for device, dtype in (("cpu", torch.float32), ("cpu", torch.float64), ("cuda", torch.half), ("meta", None)):
                found = dispatch.support(op, impl, device, dtype, 64)
                assert bool(found) == (found.reason is None) and (found or len(found.reason) > 20)
    assert not up_to(question, 256) and up_to(question, 300) and not Question("cpu", None).channels
