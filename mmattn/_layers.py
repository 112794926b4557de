# SPDX-License-Identifier: MIT
"""What a layer multiplies by, or how to call it: the one place that knows what torch users do to layers.

A layer as torch made it gives its parameters to the fused op, and so does one whose weight is computed in front of each
call: pruning, weight and spectral norm, parametrizations, LoRA by peft. Of any other, that is with hooks, of another
class or quantised, with another padding, cast or offloaded around each call, only its own forward knows what it does:
it is called, on what the op's prologue would have given it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from mmattn import norm as norm_op
from mmattn._library import is_autocast
from mmattn.conv import dilated_conv1d, spatial_conv2d
from mmattn.norm import group_norm

Parameters = tuple[Tensor, Tensor | None]

_state = threading.local()

_CONVOLUTIONS = {nn.Conv1d, nn.Conv2d, nn.Conv3d}
PLAIN_LAYERS = {nn.Linear, nn.GroupNorm, *_CONVOLUTIONS}
_LORA = ("Linear", "Conv1d", "Conv2d", "Conv3d")
# Hooks that set the weight in front of a call, and do nothing else.
_WEIGHT_HOOKS = (BasePruningMethod, WeightNorm, SpectralNorm)


def parameters(layer: nn.Module) -> Parameters | None:
    """(weight, bias) that the layer's forward computes with, differentiable; None if only calling it tells."""
    if is_plain(layer):
        return layer.weight, layer.bias  # type: ignore[return-value]
    return _computed_parameters(layer)


def is_plain(layer: nn.Module) -> bool:
    """Whether the layer is one as torch made it, of stride 1 and padded with zeros to the same length."""
    return type(layer) in PLAIN_LAYERS and not has_hooks(layer) and _is_same_padded(layer)


def has_hooks(layer: nn.Module) -> bool:
    """Whether calling the layer does more, or something else, than the forward of its class."""
    return has_own_hooks(layer) or has_hooks_of_all()


def has_hooks_of_all() -> bool:
    """Whether there are hooks of all modules."""
    return bool(_has_any_global_hook()) and not getattr(_state, "ignores_hooks_of_all", False)


@contextlib.contextmanager
def ignoring_hooks_of_all() -> Iterator[None]:
    """For what is computed again of a call in which there were none, as under a mode that brings them."""
    _state.ignores_hooks_of_all = True
    try:
        yield
    finally:
        _state.ignores_hooks_of_all = False


def has_own_hooks(layer: nn.Module) -> bool:
    """The same, but for the hooks of all modules."""
    return bool(layer._forward_pre_hooks) or _changes_its_result(layer)


def _changes_its_result(layer: nn.Module) -> bool:
    """Whether hooks stand behind its forward or on its gradients, or another forward in its place."""
    return bool(
        layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks or "forward" in layer.__dict__
    )


def dtype_of(layer: nn.Module) -> torch.dtype | None:
    """The dtype that the layer computes in; None if only its forward knows."""
    layer = innermost(layer)
    return layer.weight.dtype if _kind(layer) in PLAIN_LAYERS and "forward" not in layer.__dict__ else None  # type: ignore[union-attr,return-value]


def innermost(layer: nn.Module) -> nn.Module:
    """The layer itself, out of the adapters of peft around it."""
    while (base := layer._modules.get("base_layer")) is not None:
        layer = base
    return layer


def convolve(
    x: Tensor,
    layer: nn.Module,
    *,
    size: tuple[int, ...] | None = None,
    interleaved: int = 1,
    norm: nn.Module | None = None,
    film: tuple[Tensor, Tensor] | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    overwrite_x: bool = False,
) -> Tensor:
    """`mmattn.dilated_conv1d` by a layer, at its dilation.

    Args:
        x: tokens [B, L, Cin].
        layer: of stride 1, that keeps the length.
        size: the dimensions that L consists of for the layer's own forward: (L,) if None, () for a linear layer.
        interleaved: sequences that alternate along L and are convolved each for itself, as the pixels of a video.
        norm, film, activation: in front of the convolution.
        residual: [B, L, Cout], added.
        overwrite_x: x is of no more use.
    """
    own = parameters(layer)
    options: dict[str, Any] = {"residual": residual}
    if own is not None:
        weight, options["dilation"] = _taps(own[0]), _dilation(layer, interleaved)
        prologue = _prologue(x, norm)
        if prologue is not None:
            options |= {**prologue, "film": film, "activation": activation, "overwrite_x": overwrite_x}
            return dilated_conv1d(x, weight, own[1], **options)
    scale, shift = film or (None, None)
    y = normalise(x, norm, scale=scale, shift=shift, activation=activation)
    if own is not None:
        return dilated_conv1d(y, weight, own[1], **options)
    adapters = _adapters(layer)
    if adapters is not None:
        base: Any = layer.base_layer
        out = convolve(y, base, size=size, interleaved=interleaved, residual=residual)
        return _add_adapters(out, y, adapters, _dilation(layer, interleaved))
    if size is not None:
        out = call(layer, y.unflatten(1, size) if size else y, is_linear=not size)
        out = out.flatten(1, -2)
    else:
        sequences = y.unflatten(1, (-1, interleaved)).transpose(1, 2).flatten(0, 1)
        out = call(layer, sequences).unflatten(0, (-1, interleaved)).transpose(1, 2).flatten(1, 2)
    return (out if residual is None else out + residual.to(out.dtype)).contiguous()


def convolve_frames(video: Tensor, layer: nn.Module, **options: Any) -> Tensor:
    """`mmattn.spatial_conv2d` of video [B, F, H, W, Cin] by a 3x3 layer: [B, F, H, W, Cout].

    Options are those of `convolve_frames_by`.
    """
    own = parameters(layer)
    if own is not None and own[0].shape[2:] == (3, 3):
        return convolve_frames_by(video, *own, **options)
    residual = options.pop("residual", None)
    y = normalise_frames(video, **options)
    out = call(layer, y.flatten(0, 1)).unflatten(0, video.shape[:2])
    return (out if residual is None else out + residual.to(out.dtype)).contiguous()


def convolve_frames_by(
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    norm: nn.Module | None = None,
    film: tuple[Tensor, Tensor] | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The same by weight [Cout, Cin, 3, 3] and bias [Cout].

    Args:
        norm, film, activation: in front of the convolution.
        residual: [B, F, H, W, Cout], added.
    """
    tokens, (height, width) = video.flatten(1, 3), video.shape[2:4]
    options = _prologue(tokens, norm)
    if options is None:
        video = normalise_frames(video, norm=norm, film=film, activation=activation)
        tokens, options = video.flatten(1, 3), {}
    else:
        options |= {"film": film, "activation": activation}
    if residual is not None:
        options["residual"] = residual.flatten(1, 3)
    return spatial_conv2d(tokens, weight, bias, height=height, width=width, **options).unflatten(1, video.shape[1:4])


def normalise_frames(
    video: Tensor,
    norm: nn.Module | None = None,
    film: tuple[Tensor, Tensor] | None = None,
    activation: str | None = None,
) -> Tensor:
    """What `convolve_frames` convolves, [B, F, H, W, C]; statistics are those of all frames."""
    scale, shift = film or (None, None)
    tokens = normalise(video.flatten(1, 3), norm, scale=scale, shift=shift, activation=activation)
    return tokens.view(video.shape)


def normalise(
    x: Tensor,
    norm: nn.Module | None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """`mmattn.group_norm` of tokens x [B, L, C] by a layer, FiLM and activation behind it; without a layer those."""
    options: dict[str, Any] = {"scale": scale, "shift": shift, "activation": activation}
    prologue = _prologue(x, norm)
    if prologue:
        weight, bias, groups = prologue["norm"]
        return group_norm(x, weight, bias, groups, eps=prologue["eps"], **options)
    if norm is not None:
        x = norm(x.transpose(1, 2)).transpose(1, 2).to(x.dtype).contiguous()
    if scale is None and shift is None and activation is None:
        return x
    return norm_op.reference(x, None, None, 0, **options)


def call(layer: nn.Module, x: Tensor, *, is_linear: bool = False) -> Tensor:
    """The layer's own forward on x [N, ..., C], in the order of dimensions that it takes."""
    return layer(x) if is_linear else layer(x.movedim(-1, 1)).movedim(1, -1)


def _prologue(x: Tensor, norm: nn.Module | None) -> dict[str, Any] | None:
    """The arguments of an op that normalises by the layer first; None if the layer must be called."""
    if norm is None:
        return {}
    own = parameters(norm)
    if own is None or own[0] is None or own[1] is None:
        return None
    # Under autocast a module of half precision may be given float32.
    weight, bias = (p if p.dtype == x.dtype else p.float() for p in own if p is not None)
    return {"norm": (weight, bias, norm.num_groups), "eps": norm.eps}


def _is_same_padded(layer: Any) -> bool:
    """Whether a convolution is one of stride 1 that pads with zeros to the same length; True of any other layer."""
    if type(layer) not in _CONVOLUTIONS and _kind(layer) not in _CONVOLUTIONS:
        return True
    if layer.padding_mode != "zeros" or layer.groups != 1:
        return False
    padding = layer.padding
    for i, taps in enumerate(layer.kernel_size):
        padded = padding == "same" or (padding != "valid" and padding[i] == layer.dilation[i] * (taps // 2))
        if layer.stride[i] != 1 or taps % 2 == 0 or not padded:
            return False
    return True


def _dilation(layer: nn.Module, interleaved: int) -> int:
    convolution: Any = innermost(layer)
    taps = (1,) if type(convolution) is nn.Linear else getattr(convolution, "kernel_size", (1,))
    return convolution.dilation[0] * interleaved if taps[0] > 1 else 1


def _kind(layer: nn.Module) -> type[nn.Module]:
    """The class whose forward the layer has: torch.nn.utils.parametrize puts a class of its own in front of it."""
    is_parametrized = isinstance(layer._modules.get("parametrizations"), nn.ModuleDict)
    return type(layer).__mro__[1] if is_parametrized else type(layer)


def _computed_parameters(layer: nn.Module) -> Parameters | None:
    if type(layer).__module__ == "peft.tuners.lora.layer":
        return _adapted_parameters(layer)
    if _kind(layer) not in PLAIN_LAYERS or not _is_same_padded(layer):
        return None
    pre_hooks = list(layer._forward_pre_hooks.values())
    if not all(isinstance(hook, _WEIGHT_HOOKS) for hook in pre_hooks):
        return None
    if _changes_its_result(layer) or has_hooks_of_all():
        return None
    for hook in pre_hooks:
        hook(layer, ())
    return layer.weight, layer.bias  # type: ignore[return-value]


class _Adapter(NamedTuple):
    dropout: nn.Module
    down: Tensor
    up: Tensor
    bias: Tensor | None
    scaling: float


def _adapters(layer: Any) -> list[_Adapter] | None:
    """What a LoRA layer of peft adds to its base layer's product; None where it is another layer, or a variant.

    peft leaves the dilation of a convolution out of its factor A, which then fits no dilated layer: here A has it, as
    the merged weight has.
    """
    is_lora = type(layer).__module__ == "peft.tuners.lora.layer" and type(layer).__name__ in _LORA
    if not is_lora or has_hooks(layer) or (layer.disable_adapters and layer.merged):
        return None
    if layer.disable_adapters or layer.merged:
        return []
    found = []
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        down, up = layer.lora_A[name], layer.lora_B[name]
        if name in layer.lora_variant or layer.use_dora.get(name) or down.bias is not None:
            return None
        if any(type(factor) not in PLAIN_LAYERS or has_hooks(factor) for factor in (down, up)):
            return None
        found.append(_Adapter(layer.lora_dropout[name], down.weight, up.weight, up.bias, layer.scaling[name]))
    return found


def _adapted_parameters(layer: Any) -> Parameters | None:
    """W + scaling * B A, or None where a LoRA layer computes something else: under dropout, and in half precision, in
    which its factors are float32 and their product is added to the result."""
    own, adapters = parameters(layer.base_layer), _adapters(layer)
    if not adapters or own is None:
        return own if adapters is not None else None
    weight, bias = own
    if weight.dtype not in (torch.float32, torch.float64) or is_autocast(weight.device.type):
        return None
    for dropout, down, up, added, scaling in adapters:
        is_identity = type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and not dropout.training)
        if not is_identity or not down.dtype == up.dtype == weight.dtype:
            return None
        weight = weight + scaling * (up.flatten(1) @ down.flatten(1)).view(weight.shape)
        if added is not None:
            bias = scaling * added if bias is None else bias + scaling * added
    return weight, bias


def _add_adapters(out: Tensor, y: Tensor, adapters: list[_Adapter], dilation: int) -> Tensor:
    """The base layer's product of tokens y with those of its adapters added, in the dtype of that."""
    total = out
    for dropout, down, up, bias, scaling in adapters:
        z = dilated_conv1d(dropout(y.to(down.dtype)), _taps(down), dilation=dilation)
        total = total + scaling * dilated_conv1d(z.to(up.dtype), _taps(up), bias)
    return total.to(out.dtype)


def _taps(weight: Tensor) -> Tensor:
    """[Cout, Cin, K] of a layer's weight whose further dimensions are 1."""
    if weight.dim() == 3:
        return weight
    return weight.unsqueeze(-1) if weight.dim() == 2 else weight.flatten(2)
