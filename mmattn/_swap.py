# SPDX-License-Identifier: MIT
"""Compute the cross-attention blocks of a model by our kernels, in place and back again."""

from __future__ import annotations

import copyreg
import functools
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmattn._layers import dtype_of, has_own_hooks
from mmattn.modules import (
    PUBLISHED_ATTRIBUTES,
    Stream,
    check_streams,
    cross_attend,
    draw,
    missing_published_attributes,
    refuse_look_alike,
)


def swap(model: nn.Module) -> int:
    """Compute each cross-attention block of the published MM-Diffusion code in `model` as `RandomShiftAttention` does.

    The block stays the object it was, with its submodules, parameters, names and shapes; its computation alone is
    replaced. So checkpoints, averaged copies, optimizers, `convert_to_fp16`, copying and pickling work as before, made
    before or after. A block that checkpoints its activations goes on doing so, and its recomputation uses the shift of
    its forward, where the published code draws another. `shift` and `generator` are further arguments of the block, as
    of `RandomShiftAttention.forward`.

    A block is known by its attributes, not by its class, and everything in it is compared with the published one. What
    is not seen is what its code does otherwise with the same parts: another factor, or a forward of a subclass.

    Args:
        model: the model that holds the blocks, at any depth, or a block.

    Returns:
        The number of different blocks whose computation was replaced by this call. Where it is 0, and the model has no
        block that was replaced before, a warning says which attributes were looked for.

    Raises:
        TypeError: if `model` is no torch.nn.Module.
        ValueError: if a block has other submodules, parameters or buffers than the published one, a projection with
            other dimensions, with a kernel larger than 1 or without bias, or a forward of its own, naming the place;
            nothing is replaced then.

    Example:
        >>> replaced = mmattn.swap(unet)  # doctest: +SKIP
    """
    _check_model(model)
    blocks = {
        name: module
        for name, module in model.named_modules()
        if not isinstance(module, _Swapped) and not missing_published_attributes(module)
    }
    for name, block in blocks.items():
        refuse_look_alike(block, name)
    for block in blocks.values():
        block.__class__ = _swapped(type(block))  # type: ignore[assignment,arg-type]
    if not any(isinstance(module, _Swapped) for module in model.modules()):
        warnings.warn(
            f"model is a {type(model).__name__} and nothing in it was replaced; expected a cross-attention block of "
            f"the published MM-Diffusion code, which has the attributes {', '.join(PUBLISHED_ATTRIBUTES)}",
            stacklevel=2,
        )
    return len(blocks)


def unswap(model: nn.Module) -> int:
    """Give each block of `model` that `swap` has changed its own computation back; the number of them.

    Raises:
        TypeError: if `model` is no torch.nn.Module.
    """
    _check_model(model)
    blocks = [module for module in model.modules() if isinstance(module, _Swapped)]
    for block in blocks:
        block.__class__ = _host(block)  # type: ignore[assignment]
    return len(blocks)


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")


class _Swapped(nn.Module):
    """In front of the class of a published block."""

    def forward(
        self,
        video: Tensor,
        audio: Tensor,
        *,
        shift: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        host, attend = _host(self), _Attend(self, shift, generator)
        if hasattr(host, "_forward"):
            # The published forward checkpoints self._forward, in a way of its own.
            self.__dict__["_forward"] = attend
            try:
                return host.forward(self, video, audio)
            finally:
                del self.__dict__["_forward"]
        if getattr(self, "use_checkpoint", False) and torch.is_grad_enabled():
            return checkpoint(attend, video, audio, use_reentrant=False)
        return attend(video, audio)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A class made here cannot be found by name, as that of the host can.
        reduced: Any = super().__reduce_ex__(protocol)
        function, arguments, *state = reduced
        if function is copyreg.__newobj__:  # type: ignore[attr-defined]
            function, arguments = _new, (_host(self),)
        return function, arguments, *state


class _Attend:
    """The computation of a block. The shift is drawn by the first call and kept for a checkpoint's second one."""

    def __init__(self, block: Any, shift: int | Tensor | None, generator: torch.Generator | None) -> None:
        self.block, self.shift, self.generator = block, shift, generator

    def __call__(self, video: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        block = self.block
        for name in ("v_norm", "a_norm", "attention", "video_proj_out", "audio_proj_out"):
            if has_own_hooks(block.get_submodule(name)):
                raise RuntimeError(
                    f"{name} of a swapped {type(block).__name__} has hooks or a forward of its own, and is not called; "
                    "put them on the convolutions and norms in it, or on the block, or use mmattn.unswap(model)"
                )
        check_streams(video, audio, block.channels, block.local_window, dtype_of(block.v_qkv))
        if self.shift is None:
            is_random = bool(block.window_shift)
            self.shift = draw(video.shape[1], block.local_window, is_random, self.generator, video.device)
        return cross_attend(
            Stream(block.v_norm.GroupNorm, block.v_qkv, block.video_proj_out.video_conv),
            Stream(block.a_norm.GroupNorm, block.a_qkv, block.audio_proj_out.audio_conv),
            video,
            audio,
            num_heads=block.num_heads,
            window=block.local_window,
            shift=self.shift,
        )


@functools.cache
def _swapped(host: type[nn.Module]) -> type[nn.Module]:
    return type(host.__name__, (_Swapped, host), {"__module__": host.__module__, "__qualname__": host.__qualname__})


def _host(block: nn.Module) -> type[nn.Module]:
    return type(block).__mro__[2]


def _new(host: type[nn.Module]) -> nn.Module:
    swapped: Any = _swapped(host)  # type: ignore[arg-type]
    return swapped.__new__(swapped)
