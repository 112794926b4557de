# SPDX-License-Identifier: MIT
"""Group normalisation of tokens [B, L, C], with FiLM and SiLU fused behind it.

`group_norm` is the public function, `reference` its definition in plain torch. The fused kernels of the same name live
in `mmattn_kernels`; both are registered here behind one torch.library op.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mmattn import _checks, dispatch
from mmattn._library import (
    below_autograd,
    call,
    can_skip_dispatcher,
    gradients_of,
    is_autocast,
    register,
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
        [B, L, C], contiguous, in the dtype of x, which autocast does not change; parameters may be in any of its dtypes
        then. Differentiable once in all tensors.

    Raises:
        TypeError: on a dtype other than those above.
        ValueError: on any other argument outside the ranges above, naming it, its value and what was expected.
        RuntimeError: if the named `impl` cannot run here, with the reason.
    """
    if isinstance(x, Tensor) and is_autocast(x.device.type):
        parameters = {"weight": weight, "bias": bias, "scale": scale, "shift": shift}
        weight, bias, scale, shift = (_readable_beside(x, name, p) for name, p in parameters.items())
    given = (x, weight, bias) if scale is None and shift is None else (x, weight, bias, scale, shift)
    key = "group_norm", type(groups), type(eps), groups, eps, activation
    if not (known := _checks.is_known(key, given)):
        _checks.group_norm(x, weight, bias, scale, shift, groups, eps)
        _checks.activation(activation)
        _checks.remember(key, given)
    chosen = dispatch.choose("group_norm", impl, x)
    if chosen == "reference":
        _checks.all_stored(("x", "weight", "bias", "scale", "shift"), (x, weight, bias, scale, shift))
        return reference(x, weight, bias, groups, scale=scale, shift=shift, activation=activation, eps=eps)
    tensors, silu, eps = (x, weight, bias, scale, shift), activation == "silu", float(eps)
    return call("group_norm", tensors, *tensors, groups, silu, eps, chosen, known=known)[0]


def _readable_beside(x: Tensor, name: str, p: Any) -> Any:
    """Autocast's FiLM beside an x that it left alone: in float32, exactly, where it has another dtype than x."""
    is_narrow = isinstance(p, Tensor) and p.dtype in (torch.float16, torch.bfloat16)
    if not is_narrow or p.dtype == x.dtype:
        return p
    _checks.stored(name, p)
    return p.float()


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
    sums: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    impl: str = "reference",
) -> Sequence[Tensor | None]:
    """Gradients of weight, bias, scale and shift from `sums` [B, C, 2], what the kernels reduce over the positions.

    With z the argument of the activation, dz its gradient and h the normalised x: sums = (sum dz, sum dz*h) over L, and
    z = (h * weight + bias) * (1 + scale) + shift. `impl` is what made the sums.
    """
    if impl == "cpu" and not torch.is_grad_enabled():
        # Fourteen ops of torch on tensors this small take longer than all else of a small gradient.
        parameters = weight, bias, scale, shift
        given = [t for t in (sums, *parameters) if t is not None]
        key = "parameter_gradients", *[p is None for p in parameters]
        known = _checks.is_known(key, given)
        if can_skip_dispatcher(*given, known=known):
            if not known:
                _checks.remember(key, given)
            return dispatch.kernels("group_norm", impl, sums).parameter_gradients(sums, *parameters)
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


_PARAMETERS = "Tensor weight, Tensor bias, Tensor? scale, Tensor? shift"

torch.library.define(_OP, f"(Tensor x, {_PARAMETERS}, int groups, bool silu, float eps, str impl) -> (Tensor, Tensor)")
torch.library.define(
    _BACKWARD_OP,
    f"(Tensor d_out, Tensor x, {_PARAMETERS}, Tensor stats, int groups, bool silu, str impl) -> (Tensor, Tensor)",
)


class _Arguments(NamedTuple):
    """Those of the op, as its schema has them; or the gradient of each."""

    x: Any
    weight: Any
    bias: Any
    scale: Any
    shift: Any
    groups: Any
    silu: Any
    eps: Any
    impl: Any

    @property
    def parameters(self) -> tuple[Any, Any, Any, Any]:
        return self.weight, self.bias, self.scale, self.shift


class _GradientArguments(NamedTuple):
    """Those of the backward op."""

    d_out: Tensor
    x: Tensor
    weight: Tensor
    bias: Tensor
    scale: Tensor | None
    shift: Tensor | None
    stats: Tensor
    groups: int
    silu: bool
    impl: str

    @property
    def parameters(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.weight, self.bias, self.scale, self.shift


_NO_GRADIENTS = _Arguments(*[None] * len(_Arguments._fields))


def _check(*args: Any) -> None:
    own = _Arguments._make(args)
    _checks.group_norm(own.x, *own.parameters, own.groups, own.eps)


def _check_gradients(*args: Any) -> None:
    own = _GradientArguments._make(args)
    _checks.group_norm(own.x, *own.parameters, own.groups, 0.0)
    _checks.group_norm_gradients(own.d_out, own.x, own.stats, own.groups)


def _compute(*args: Any) -> tuple[Tensor, Tensor]:
    own = _Arguments._make(args)
    forward = dispatch.kernels("group_norm", own.impl, own.x).forward
    return forward(own.x, *own.parameters, groups=own.groups, silu=own.silu, eps=own.eps)


def _compute_gradients(*args: Any) -> tuple[Tensor, Tensor]:
    own = _GradientArguments._make(args)
    d_out = own.d_out if own.d_out.stride(-1) == 1 else own.d_out.contiguous()
    backward = dispatch.kernels("group_norm", own.impl, own.x).backward
    return backward(d_out, own.x, *own.parameters, own.stats, groups=own.groups, silu=own.silu)


register("group_norm", _check, _compute, _check_gradients, _compute_gradients)


@torch.library.register_fake(_OP)
def _fake_forward(*args: Any) -> tuple[Tensor, Tensor]:
    _check(*args)
    own = _Arguments._make(args)
    stats = own.x.new_empty((own.x.shape[0], own.groups, 3), dtype=torch.float32)
    return own.x.new_empty(own.x.shape), stats


@torch.library.register_fake(_BACKWARD_OP)
def _fake_backward(*args: Any) -> tuple[Tensor, Tensor]:
    _check_gradients(*args)
    x = _GradientArguments._make(args).x
    return x.new_empty(x.shape), x.new_empty((x.shape[0], x.shape[2], 2), dtype=torch.float32)


_gradients = gradients_of("group_norm")


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> tuple[Tensor, ...]:
        out, stats = below_autograd("group_norm", keyset, *args)
        own = _Arguments._make(args)
        ctx.save_for_backward(own.x, *own.parameters, stats)
        ctx.options = own.groups, own.silu, own.impl
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)  # zeros for the statistics
        return out, stats

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, _: None) -> tuple[Any, ...]:
        if d_out is None:
            return (None,) * len(ctx.needs_input_grad)
        x, *parameters, stats = ctx.saved_tensors  # once: checkpointing refuses a second look
        d_x, sums = _gradients(d_out, x, *parameters, stats, *ctx.options)
        d_weight, d_bias, d_scale, d_shift = parameter_gradients(sums, *parameters, impl=ctx.options[-1])
        return None, *_NO_GRADIENTS._replace(x=d_x, weight=d_weight, bias=d_bias, scale=d_scale, shift=d_shift)


register_autograd("group_norm", _GroupNorm)
