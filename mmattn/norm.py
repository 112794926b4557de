# SPDX-License-Identifier: MIT
"""Group normalisation of tokens [B, L, C], with FiLM and SiLU fused behind it.

`group_norm` is the public function, `reference` its definition in plain torch. The fused kernels of the same name live
in `mmattn_kernels`; both are registered here behind one torch.library op.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mmattn import dispatch
from mmattn._library import (
    below_autograd,
    call,
    gradients_of,
    kernels,
    register_autograd,
)

_OP = "mmattn::group_norm"
_BACKWARD_OP = "mmattn::group_norm_backward"


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    eps: float = 1e-5,
    impl: str = "auto",
) -> Tensor:
    """Normalise each group of channels over its channels and all positions (Wu and He, arXiv 1803.08494).

    `activation(norm(x) * (1 + scale) + shift)`, norm(x) = (x - mean) / sqrt(variance + eps) * weight + bias, computed
    in fp32 and rounded once. The variance is that of the centred values, so a mean far from zero costs no accuracy.

    Args:
        x: [B, L, C], any strides as long as C is contiguous: audio [B, T, C], or video frames [B, F*H*W, C].
        weight, bias: [C], in the dtype of x or float32.
        groups: number of groups, a divisor of C.
        scale, shift: [B, C] each, FiLM (Perez et al., arXiv 1709.07871), in the dtype of x or float32; None is 0.
        activation: None or "silu".
        eps: added to the variance.
        impl: "auto", "reference", "triton" or "cpu". A named one runs or raises; "auto" picks
            (see `python -m mmattn.info`), and MMATTN_IMPL in the environment sets what it means.

    Returns:
        [B, L, C], contiguous, in the dtype of x, which autocast does not change. Differentiable once in all tensors.

    Raises:
        TypeError: on a dtype other than those above.
        ValueError: on any other argument outside the ranges above, naming it, its value and what was expected.
        RuntimeError: if the named `impl` cannot run here, with the reason.
    """
    _check(x, weight, bias, groups, scale, shift)
    check_activation(activation)
    check_eps(eps)
    chosen = dispatch.choose("norm", impl, x)
    if chosen == "reference":
        return reference(x, weight, bias, groups, scale=scale, shift=shift, activation=activation, eps=eps)
    tensors, silu, eps = (x, weight, bias, scale, shift), activation == "silu", float(eps)
    return call("group_norm", tensors, *tensors, groups, silu, eps, chosen)[0]


def reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The definition of `group_norm` in plain torch: any device, any float dtype, any order of derivative.

    Without groups (0) it is FiLM and the activation alone, as the prologue of a convolution may be.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    z = x.to(wide)
    if groups:
        z = z.unflatten(-1, (groups, -1))  # [B, L, G, C/G]
        # A long sum of values far from zero is off by more than its rounding: what is left of the mean goes in a second
        # step. A constant changes nothing in the result, so the first needs no gradient.
        z = z - z.detach().mean((1, 3), keepdim=True)
        z = z - z.mean((1, 3), keepdim=True)
        z = z * (z.square().mean((1, 3), keepdim=True) + eps).rsqrt()
        z = z.flatten(2) * weight + bias
    if scale is not None:
        z = z * (1 + scale.to(wide).unsqueeze(1))
    if shift is not None:
        z = z + shift.to(wide).unsqueeze(1)
    if activation == "silu":
        z = functional.silu(z)
    return z.to(x.dtype).contiguous()


def parameter_gradients(
    sums: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of weight, bias, scale and shift from `sums` [B, C, 2], what the kernels reduce over the positions.

    With z the argument of the activation, dz its gradient and h the normalised x: sums = (sum dz, sum dz*h) over L, and
    z = (h * weight + bias) * (1 + scale) + shift.
    """
    d_z, d_z_h = sums.unbind(-1)  # [B, C]
    d_weight = d_bias = None
    if weight is not None and bias is not None:
        # Both at once: of tensors this small, the launches are the time.
        total = (sums if scale is None else sums * (1 + scale.float()).unsqueeze(-1)).sum(0)
        d_weight, d_bias = total[:, 1].to(weight.dtype).contiguous(), total[:, 0].to(bias.dtype).contiguous()
    if scale is None:
        d_scale = None
    elif weight is None or bias is None:
        d_scale = d_z_h.to(scale.dtype)
    else:
        d_scale = (d_z_h * weight.float() + d_z * bias.float()).to(scale.dtype)
    d_shift = None if shift is None else d_z.to(shift.dtype)
    return d_weight, d_bias, d_scale, d_shift


def check_tokens(name: str, x: Tensor) -> None:
    """Refuse what is not a floating-point tensor [B, L, C] with C contiguous."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; expected a tensor [B, L, C]")
    if x.dim() != 3:
        raise ValueError(f"{name} has shape {list(x.shape)}; expected three dimensions [B, L, C]")
    if x.shape[1] < 1 or x.shape[2] < 1:
        raise ValueError(f"{name} has shape {list(x.shape)}; expected at least one position and one channel")
    if not x.is_floating_point():
        raise TypeError(f"{name} has dtype {x.dtype}; expected a floating-point dtype")
    if x.stride(-1) != 1 and x.shape[-1] > 1 and x.shape[0]:  # .contiguous() leaves the strides of an empty tensor
        raise ValueError(f"{name} has stride {x.stride(-1)} in its last dimension; expected 1, as after .contiguous()")


def check_parameter(name: str, value: Tensor, shape: tuple[int, ...], letters: str, x: Tensor) -> None:
    """Refuse what is not a tensor of this shape on the device of x, in its dtype or float32."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a tensor {letters}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {list(value.shape)}; expected {letters} = {list(shape)}")
    if value.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"{name} has dtype {value.dtype}; expected {x.dtype}, the dtype of x, or torch.float32")
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device}; expected {x.device}, the device of x")


def check_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, prefix: str = "") -> None:
    """Refuse an affine map or a number of groups that does not fit the channels of x."""
    channels = x.shape[-1]
    check_int(f"{prefix}groups", groups)
    if groups < 1 or channels % groups:
        raise ValueError(f"{prefix}groups is {groups}; expected a divisor of the number of channels, {channels}")
    check_parameter(f"{prefix}weight", weight, (channels,), "[C]", x)
    check_parameter(f"{prefix}bias", bias, (channels,), "[C]", x)


def check_film(x: Tensor, scale: Tensor | None, shift: Tensor | None, prefix: str = "") -> None:
    """Refuse a scale or a shift that is not [B, C]."""
    shape = (x.shape[0], x.shape[2])
    for name, value in (("scale", scale), ("shift", shift)):
        if value is not None:
            check_parameter(prefix + name, value, shape, "[B, C]", x)


def check_like(name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype, x: Tensor) -> None:
    """Refuse what is not of this shape and dtype on the device of x."""
    found, expected = (value.dtype, list(value.shape), value.device), (dtype, list(shape), x.device)
    if found != expected:
        raise ValueError("{} is {} {} on {}; expected {} {} on {}".format(name, *found, *expected))


def check_activation(activation: str | None) -> None:
    """Refuse an activation that the kernels do not have."""
    if activation not in (None, "silu"):
        raise ValueError(f"activation is {activation!r}; expected None or 'silu'")


def check_eps(eps: float) -> None:
    """Refuse an eps below zero."""
    if not eps >= 0:
        raise ValueError(f"eps is {eps}; expected at least 0")


def check_int(name: str, value: Any) -> None:
    """Refuse what is not an int."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} is {value!r}; expected an int")


_PARAMETERS = "Tensor weight, Tensor bias, Tensor? scale, Tensor? shift"

torch.library.define(_OP, f"(Tensor x, {_PARAMETERS}, int groups, bool silu, float eps, str impl) -> (Tensor, Tensor)")
torch.library.define(
    _BACKWARD_OP,
    f"(Tensor d_out, Tensor x, {_PARAMETERS}, Tensor stats, int groups, bool silu, str impl) -> (Tensor, Tensor)",
)


def _check(x: Tensor, weight: Tensor, bias: Tensor, groups: int, scale: Tensor | None, shift: Tensor | None) -> None:
    check_tokens("x", x)
    check_norm(x, weight, bias, groups)
    check_film(x, scale, shift)


def _compute(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *parameters, groups, silu, eps, impl = args
    return kernels("norm", impl, x).forward(x, *parameters, groups=groups, silu=silu, eps=eps)


def _compute_gradients(d_out: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *parameters, stats, groups, silu, impl = args
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    return kernels("norm", impl, x).backward(d_out, x, *parameters, stats, groups=groups, silu=silu)


# Arguments are checked again where the ops are called: that can be done directly, and kernels trust them.
@torch.library.impl(_OP, "CompositeExplicitAutograd")
def _forward(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    weight, bias, scale, shift, groups, *_ = args
    _check(x, weight, bias, groups, scale, shift)
    return _compute(x, *args)


@torch.library.impl(_BACKWARD_OP, "CompositeExplicitAutograd")
def _backward(d_out: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    weight, bias, scale, shift, stats, groups, *_ = args
    _check(x, weight, bias, groups, scale, shift)
    check_like("d_out", d_out, tuple(x.shape), x.dtype, x)
    check_like("stats", stats, (x.shape[0], groups, 3), torch.float32, x)
    return _compute_gradients(d_out, x, *args)


@torch.library.register_fake(_OP)
def _fake_forward(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.shape[0], args[4], 3), dtype=torch.float32)


@torch.library.register_fake(_BACKWARD_OP)
def _fake_backward(d_out: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.shape[0], x.shape[2], 2), dtype=torch.float32)


_gradients = gradients_of("group_norm")


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> tuple[Tensor, ...]:
        out, stats = below_autograd("group_norm", keyset, *args)
        ctx.save_for_backward(*args[:5], stats)
        ctx.groups, ctx.silu, _, ctx.impl = args[5:]
        ctx.mark_non_differentiable(stats)
        return out, stats

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # once: checkpointing refuses a second look
        d_x, sums = _gradients(d_out, *saved, ctx.groups, ctx.silu, ctx.impl)
        return None, d_x, *parameter_gradients(sums, *saved[1:5]), None, None, None, None


register_autograd("group_norm", _GroupNorm, _compute, _compute_gradients)
