# SPDX-License-Identifier: MIT
"""Convolutions of tokens [B, L, C], with normalisation, FiLM and SiLU fused in front of them.

`dilated_conv1d` convolves along the positions and `spatial_conv2d` over the lines and columns of frames; `reference` is
the definition of both in plain torch. The fused kernels live in `mmattn_kernels`; all are registered here behind one
torch.library op.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mmattn import _checks, dispatch
from mmattn import norm as norm_op
from mmattn._library import (
    below_autograd,
    call,
    can_skip_dispatcher,
    count_flops,
    gradients_of,
    is_autocast,
    register,
    register_autograd,
    to_autocast,
    wants_gradients,
)

_OP = "mmattn::conv"
_BACKWARD_OP = "mmattn::conv_backward"


def dilated_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dilation: int = 1,
    norm: tuple[Tensor, Tensor, int] | None = None,
    film: tuple[Tensor, Tensor] | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    overwrite_x: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Convolve over the positions, padded with zeros to the same length, with everything around it fused.

    out[b, l, o] = bias[o] + residual[b, l, o] + sum_{k, c} weight[o, c, k] * y[b, l + (k - K//2) * dilation, c]

    y = activation(norm(x) * (1 + scale) + shift), computed in fp32 and 0 outside 0..L-1; see `mmattn.group_norm`. It is
    rounded to the dtype of x, except in front of kernels that multiply in fp32. Over video tokens [B, F*P, C], frames
    outermost, dilation P makes it the convolution over the frames; K = 1 makes it a projection.

    On a CPU without AMX, K = 3 and 96 channels or more have half the products where four outputs, a dilation apart, are
    made of their six inputs together (Winograd's F(4, 3), as in `spatial_conv2d`): errors go by the largest of the six,
    up to three times those of a sum over the taps in the gradient of x, and a NaN or infinity reaches all four.

    Args:
        x: [B, L, Cin], any strides as long as Cin is contiguous.
        weight: [Cout, Cin, K] as in torch.nn.Conv1d, K odd, in the dtype of x or float32, and rounded to that of x.
            On the CPU the result is that of the values it has at the call, however they were written: kernels keep a
            packed copy, and each call hashes all of the weight to see that it is the one that was packed (two contents
            have one hash with a probability below 2^-56). Those on a GPU read it in place where it has the dtype of x
            and Cin contiguous in memory, [Cout, K, Cin], and copy it in each call where not.
        bias: [Cout], in the dtype of x or float32, or None.
        dilation: distance between the taps in positions, at least 1; taps farther than L read zeros.
        norm: (weight [Cin], bias [Cin], groups) of a group normalisation of x, or None.
        film: (scale [B, Cin], shift [B, Cin]) or None.
        activation: None or "silu".
        residual: [B, L, Cout] in the dtype of x, Cout contiguous, added to the result; or None.
        eps: of the normalisation.
        overwrite_x: x is of no more use, so the result may take its memory. It does on the CPU for a contiguous x,
            K = 1 and Cout = Cin, where neither gradients nor a mode, trace, transform or profiler are in the way.
        impl: "auto", "reference", "triton" or "cpu". A named one runs or raises; "auto" picks
            (see `python -m mmattn.info`), and MMATTN_IMPL in the environment sets what it means.

    Returns:
        [B, L, Cout], contiguous, in the dtype of x, or in autocast's dtype under autocast. Differentiable once in all
        tensors.

    Raises:
        TypeError: on a dtype other than those above.
        ValueError: on any other argument outside the ranges above, naming it, its value and what was expected.
        RuntimeError: if the named `impl` cannot run here, with the reason.
    """
    prologue = norm, film, activation, eps
    return _convolve(x, weight, bias, *prologue, residual, impl, dilation=dilation, overwrite_x=overwrite_x)


def spatial_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    height: int,
    width: int,
    norm: tuple[Tensor, Tensor, int] | None = None,
    film: tuple[Tensor, Tensor] | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    impl: str = "auto",
) -> Tensor:
    """Convolve each frame of a video over its lines and columns, padded with zeros to the same size.

    The nine taps of a 3x3 kernel, on the prologue of `dilated_conv1d` and with its bias and residual; the normalisation
    takes its statistics over all frames. Stacked frames [B*F, height*width, C] have statistics of their own.

    On a CPU without AMX 4x4 outputs of 96 channels or more are made of their 6x6 inputs together in float32, with a
    quarter of the products, and 2x2 outputs of 32 channels or more of their 4x4 inputs, with 16 for 36 (Winograd's
    F(4x4, 3x3) and F(2x2, 3x3), arXiv 1509.09308; of bfloat16 where the CPU has AVX-512 BF16 the former alone, from 32
    tiles of a call on, so that a batch may differ from its clips by a rounding of bfloat16). Errors
    are within twice those of a sum over the taps on the whole, up to five times at the corner of a tile, and go by the
    largest of the inputs; a NaN or infinity of inputs or weights reaches all of the outputs (an infinity often as NaN),
    and so does an overflow in between, from inputs of about 1e37 on. The gradient of the weight is made so as well from
    96 channels on, of all nine taps together: its error in float32 is 1e-6 of it, 0.2 to 14 times that of torch, and it
    overflows from gradients of about 1e37 on.

    Args:
        x: [B, F*height*width, Cin], frames outermost and columns innermost, any strides as long as Cin is contiguous.
        weight: [Cout, Cin, 3, 3] as in torch.nn.Conv2d, in the dtype of x or float32.
        height, width: of a frame, in tokens.
        bias, norm, film, activation, residual, eps: as in `dilated_conv1d`.
        impl: "auto", "reference", "triton" or "cpu". "triton" is mmattn's normalisation followed by torch's
            convolution, which is cuDNN's, on channels-last memory.

    Returns:
        [B, F*height*width, Cout], contiguous, in the dtype of x, or in autocast's dtype under autocast. Differentiable
        once in all tensors.

    Raises:
        TypeError: on a dtype other than those above.
        ValueError: on any other argument outside the ranges above, naming it, its value and what was expected.
        RuntimeError: if the named `impl` cannot run here, with the reason.
    """
    if isinstance(weight, Tensor):
        if weight.dim() != 4 or weight.shape[2:] != (3, 3):
            raise ValueError(f"weight has shape {list(weight.shape)}; expected [Cout, Cin, 3, 3]")
        if not weight.is_contiguous():
            _checks.stored("weight", weight)  # the next may be a copy
        weight = weight.flatten(2)
    return _convolve(x, weight, bias, norm, film, activation, eps, residual, impl, height=height, width=width)


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dilation: int = 1,
    height: int = 0,
    width: int = 0,
    norm: tuple[Tensor, Tensor, int] | None = None,
    film: tuple[Tensor, Tensor] | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The definition in plain torch: any device, any float dtype, any order of derivative.

    With a height and a width, weight [Cout, Cin, 9] has the taps of a 3x3 kernel over the frames that x consists of.
    """
    y = _prologue(x, norm, film, activation, eps)
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if width:
        count = x.shape[0] * x.shape[1] // (height * width)
        frames = y.reshape(count, height, width, y.shape[2]).permute(0, 3, 1, 2)  # channels last in memory
        out = functional.conv2d(frames, weight.unflatten(2, (3, 3)), bias, padding=1)
        out = out.permute(0, 2, 3, 1).reshape(*x.shape[:2], weight.shape[0])
    else:
        dilation = _dilation_within(dilation, x.shape[1])
        padding = dilation * (weight.shape[2] // 2)
        out = functional.conv1d(y.transpose(1, 2), weight, bias, padding=padding, dilation=dilation).transpose(1, 2)
    return (out if residual is None else out + residual).contiguous()


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Any,
    film: Any,
    activation: str | None,
    eps: float,
    residual: Tensor | None,
    impl: str,
    *,
    dilation: int = 1,
    height: int = 0,
    width: int = 0,
    overwrite_x: bool = False,
) -> Tensor:
    """Both public functions; with a height and a width, weight [Cout, Cin, 9] has the taps of a 3x3 kernel."""
    x, weight, bias, norm, film, residual = _autocast(x, weight, bias, norm, film, residual)
    norm_weight, norm_bias, groups = (None, None, 0) if norm is None else _unpack("norm", norm, "weight, bias, groups")
    scale, shift = (None, None) if film is None else _unpack("film", film, "scale, shift")
    prologue = norm_weight, norm_bias, scale, shift
    given: tuple[Any, ...] = (x, weight) if bias is None else (x, weight, bias)
    if norm is not None:
        given += (norm_weight, norm_bias)
    if film is not None:
        given += film
    if residual is not None:
        given += (residual,)
    which = bias is None, norm is None, film is None, residual is None
    types = type(groups), type(dilation), type(height), type(width), type(eps)
    key = "conv", which, types, groups, dilation, height, width, eps, activation
    if not (known := _checks.is_known(key, given)):
        groups_or_none, geometry = None if norm is None else groups, (dilation, height, width)
        _checks.conv(x, weight, bias, prologue, residual, groups_or_none, *geometry, eps)
        _checks.activation(activation)
        _checks.remember(key, given)
    chosen = dispatch.choose("spatial_conv2d" if width else "dilated_conv1d", impl, x)
    if chosen == "triton" and width:
        if norm is not None:
            normalise: dict[str, Any] = {
                "scale": scale,
                "shift": shift,
                "activation": activation,
                "eps": eps,
                "impl": impl,
            }
            x, norm, film, activation = norm_op.group_norm(x, *norm, **normalise), None, None, None
        chosen = "reference"
    tensors = (x, weight, bias, *prologue, residual)
    if chosen == "reference":
        _checks.all_stored(_Arguments._fields[: len(tensors)], tensors)
        options: dict[str, Any] = {"norm": norm, "film": film, "activation": activation, "residual": residual}
        return reference(x, weight, bias, dilation=dilation, height=height, width=width, eps=eps, **options)
    arguments = *tensors, groups, dilation, height, width, activation == "silu", float(eps), chosen
    if overwrite_x and chosen == "cpu" and _may_overwrite(x, weight, tensors[1:], known):
        out = _compute(*arguments, out=x)[0]
        torch.autograd.graph.increment_version([x])  # whoever saved x for a backward is told, as by torch's own ops
        return out
    return call("conv", tensors, *arguments, known=known)[0]


def _may_overwrite(x: Tensor, weight: Tensor, others: tuple[Tensor | None, ...], known: bool) -> bool:
    """Whether the result may take the memory of x: it has the same shape, and nothing else reads or watches it."""
    if weight.shape[::2] != (x.shape[2], 1) or not x.is_contiguous():
        return False
    # In training `call` asks can_skip_dispatcher, so that it is not asked here; a trace knows no is_inference.
    if wants_gradients(x, *others) or not can_skip_dispatcher(x, *others, known=known) or x.is_inference():
        return False
    return not any(_shares_memory(x, t) for t in others if t is not None)


def _shares_memory(x: Tensor, other: Tensor) -> bool:
    """Whether anything of `other` may lie within a contiguous x."""
    if other.untyped_storage()._cdata != x.untyped_storage()._cdata or not other.numel():
        return False
    begin, first = x.storage_offset(), other.storage_offset()
    last = first + sum((size - 1) * stride for size, stride in zip(other.shape, other.stride(), strict=True))
    return x.dtype != other.dtype or (first < begin + x.numel() and begin <= last)


def _prologue(x: Tensor, norm: Any, film: Any, activation: str | None, eps: float) -> Tensor:
    if norm is None and film is None and activation is None:
        return x
    weight, bias, groups = norm or (None, None, 0)
    scale, shift = film or (None, None)
    return norm_op.reference(x, weight, bias, groups, scale=scale, shift=shift, activation=activation, eps=eps)


def _autocast(x: Any, weight: Any, bias: Any, norm: Any, film: Any, residual: Any) -> tuple[Any, ...]:
    device_type = x.device.type if isinstance(x, Tensor) else "cpu"
    if not is_autocast(device_type):
        return x, weight, bias, norm, film, residual
    dtype = torch.get_autocast_dtype(device_type)
    # Parameters in float32 stay so: kernels round them as they pack them, once for all calls.
    parameters = {"weight": weight, "bias": bias, "norm": norm, "film": film}
    cast = (_parameter_to_autocast(name, p, dtype) for name, p in parameters.items())
    return to_autocast("x", x, dtype), *cast, to_autocast("residual", residual, dtype)


def _parameter_to_autocast(name: str, p: Any, dtype: torch.dtype) -> Any:
    if isinstance(p, tuple):
        return tuple(_parameter_to_autocast(name, t, dtype) for t in p)
    return p if isinstance(p, Tensor) and p.dtype == torch.float32 else to_autocast(name, p, dtype)


def _unpack(name: str, value: Any, letters: str) -> Any:
    count = letters.count(",") + 1
    if not isinstance(value, tuple) or len(value) != count:
        what = f"{len(value)} values" if isinstance(value, tuple) else f"a {type(value).__name__}"
        raise TypeError(f"{name} is {what}; expected a tuple ({letters}) or None")
    return value


_PROLOGUE = "Tensor? norm_weight, Tensor? norm_bias, Tensor? scale, Tensor? shift"

_GEOMETRY = "SymInt dilation, SymInt height, SymInt width"

torch.library.define(
    _OP,
    f"(Tensor x, Tensor weight, Tensor? bias, {_PROLOGUE}, Tensor? residual, int groups, {_GEOMETRY}, bool silu, "
    "float eps, str impl) -> (Tensor, Tensor)",
)
torch.library.define(
    _BACKWARD_OP,
    f"(Tensor d_out, Tensor x, Tensor weight, {_PROLOGUE}, Tensor stats, int groups, {_GEOMETRY}, bool silu, "
    "bool need_x, bool need_weight, bool need_bias, str impl) -> (Tensor, Tensor, Tensor, Tensor)",
)


class _Arguments(NamedTuple):
    """Those of the op, as its schema has them; or what is asked or known of each."""

    x: Any
    weight: Any
    bias: Any
    norm_weight: Any
    norm_bias: Any
    scale: Any
    shift: Any
    residual: Any
    groups: Any
    dilation: Any
    height: Any
    width: Any
    silu: Any
    eps: Any
    impl: Any

    @property
    def prologue(self) -> tuple[Any, Any, Any, Any]:
        return self.norm_weight, self.norm_bias, self.scale, self.shift


class _GradientArguments(NamedTuple):
    """Those of the backward op."""

    d_out: Tensor
    x: Tensor
    weight: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    stats: Tensor
    groups: int
    dilation: int
    height: int
    width: int
    silu: bool
    need_x: bool
    need_weight: bool
    need_bias: bool
    impl: str

    @property
    def prologue(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        return self.norm_weight, self.norm_bias, self.scale, self.shift


_NO_GRADIENTS = (None,) * len(_Arguments._fields[8:])  # of what is no tensor


def _kernels(width: int, impl: str, x: Tensor) -> Any:
    return dispatch.kernels("spatial_conv2d" if width else "dilated_conv1d", impl, x)


def _dilation_within(dilation: int, length: int) -> int:
    """A dilation of the same result that any integer type holds: taps farther than L read zeros, however far."""
    return min(dilation, length)


def _options(x: Tensor, groups: int, dilation: int, height: int, width: int, silu: bool) -> dict[str, Any]:
    """What the kernels of both directions are told besides tensors; of frames, only those that know of them."""
    options = {"groups": groups, "dilation": _dilation_within(dilation, x.shape[1]), "silu": silu}
    return {**options, "height": height, "width": width} if width else options


def _compute(*args: Any, **out: Tensor) -> tuple[Tensor, Tensor]:
    x, *tensors, groups, dilation, height, width, silu, eps, impl = args
    options = _options(x, groups, dilation, height, width, silu)
    return _kernels(width, impl, x).forward(x, *tensors, eps=eps, **options, **out)


def _compute_gradients(*args: Any) -> tuple[Tensor, ...]:
    d_out, x, *tensors, groups, dilation, height, width, silu, need_x, need_weight, need_bias, impl = args
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    options = _options(x, groups, dilation, height, width, silu)
    needs = {"need_x": need_x, "need_weight": need_weight, "need_bias": need_bias}
    d_x, d_weight, d_bias, sums = _kernels(width, impl, x).backward(d_out, x, *tensors, **options, **needs)
    return d_x, d_weight.to(tensors[0].dtype), d_bias, sums


def _check(*args: Any) -> None:
    own = _Arguments._make(args)
    _check_given(own, own.bias, own.residual, own.eps)


def _check_gradients(*args: Any) -> None:
    own = _GradientArguments._make(args)
    _check_given(own, None, None, 0.0)
    _checks.conv_gradients(own.d_out, own.x, own.weight, own.stats, own.groups)


def _check_given(
    own: _Arguments | _GradientArguments, bias: Tensor | None, residual: Tensor | None, eps: float
) -> None:
    """The op's way of saying that there is no norm is three arguments."""
    has_norm = own.groups != 0 or own.norm_weight is not None or own.norm_bias is not None
    groups, geometry = own.groups if has_norm else None, (own.dilation, own.height, own.width)
    _checks.conv(own.x, own.weight, bias, own.prologue, residual, groups, *geometry, eps)


register("conv", _check, _compute, _check_gradients, _compute_gradients)


@torch.library.register_fake(_OP)
def _fake_forward(*args: Any) -> tuple[Tensor, Tensor]:
    _check(*args)
    own = _Arguments._make(args)
    batch, length, _ = own.x.shape
    stats = own.x.new_empty((batch, own.groups, 3), dtype=torch.float32)
    return own.x.new_empty((batch, length, own.weight.shape[0])), stats


@torch.library.register_fake(_BACKWARD_OP)
def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    _check_gradients(*args)
    own = _GradientArguments._make(args)
    x, weight = own.x, own.weight
    has_prologue = own.groups or own.silu or own.scale is not None or own.shift is not None
    sums = (x.shape[0], x.shape[2], 2) if own.need_x and has_prologue else (0,)
    return (
        x.new_empty(x.shape if own.need_x else (0,)),
        weight.new_empty(weight.shape if own.need_weight else (0,)),
        x.new_empty(weight.shape[:1] if own.need_bias else (0,), dtype=torch.float32),
        x.new_empty(sums, dtype=torch.float32),
    )


_gradients = gradients_of("conv")


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> tuple[Tensor, ...]:
        out, stats = below_autograd("conv", keyset, *args)
        own = _Arguments._make(args)
        ctx.save_for_backward(own.x, own.weight, *own.prologue, stats)
        ctx.options = own.groups, own.dilation, own.height, own.width, own.silu
        ctx.impl, ctx.bias_dtype = own.impl, None if own.bias is None else own.bias.dtype
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)  # zeros for the statistics
        return out, stats

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, _: None) -> tuple[Any, ...]:
        if d_out is None:
            return (None,) * len(ctx.needs_input_grad)
        x, weight, *prologue, stats = ctx.saved_tensors
        _, need_x, need_weight, need_bias, *need_prologue, need_residual = ctx.needs_input_grad[:9]
        needs_prologue = any(need_prologue)
        needs = need_x or needs_prologue, need_weight, need_bias
        d_x, d_weight, d_bias, sums = _gradients(d_out, x, weight, *prologue, stats, *ctx.options, *needs, ctx.impl)
        d_prologue: Any = [None] * len(prologue)
        if needs_prologue:
            d_prologue = norm_op.parameter_gradients(sums, *prologue, impl=ctx.impl)
        return (
            None,
            d_x if need_x else None,
            d_weight if need_weight else None,
            d_bias.to(ctx.bias_dtype) if need_bias else None,
            *d_prologue,
            d_out if need_residual else None,
            *_NO_GRADIENTS,
        )


register_autograd("conv", _Conv)


def _flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    out_channels, in_channels, taps = weight
    return 2 * x[0] * x[1] * out_channels * in_channels * taps


def _gradient_flops(*args: Any, **_: Any) -> int:
    own = _GradientArguments._make(args)
    return (own.need_x + own.need_weight) * _flops(own.x, own.weight)


count_flops("conv", _flops, _gradient_flops)
