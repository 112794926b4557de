# SPDX-License-Identifier: MIT
"""What the ops share between torch.library and their kernels."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmattn import dispatch

_library = torch.library.Library("mmattn", "IMPL")
_functions: dict[str, tuple[Callable[..., tuple[Tensor, ...]], Callable[..., Any]]] = {}
_differentiable: dict[str, type[torch.autograd.Function]] = {}


def kernels(op: str, impl: str, like: Tensor) -> Any:
    """The module of kernels of `op`; RuntimeError where it cannot run on tensors like `like`."""
    reason = dispatch.unavailable(op, impl, like.device.type, like.dtype, like.shape[-1])
    if impl == "reference" or reason is not None:
        raise RuntimeError(f"impl {impl!r} has no kernel here: {reason or 'it is plain torch'}")
    return importlib.import_module(f"mmattn_kernels.{impl}.{op}")


def unwatched(*tensors: Tensor | None) -> bool:
    """Whether nobody looks at a call on these tensors: no trace, mode, transform or profiler.

    Its kernels may then be called without the dispatcher, in which a small call spends half its time.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if forward_ad._current_level >= 0 or torch.autograd.profiler._is_profiler_enabled:
        return False
    return all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in tensors)


def wants_gradients(*tensors: Tensor | None) -> bool:
    """Whether a graph is to be recorded for a call on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def call(name: str, tensors: tuple[Tensor | None, ...], *args: Any) -> tuple[Tensor, ...]:
    """The op `name` on checked arguments, `tensors` among them: past the dispatcher where nobody watches."""
    if not unwatched(*tensors):
        return getattr(torch.ops.mmattn, name)(*args)
    return _differentiable[name].apply(None, *args) if wants_gradients(*tensors) else _functions[name][0](*args)


def below_autograd(name: str, keyset: Any, *args: Any) -> tuple[Tensor, ...]:
    """Call the op `name` without recording a graph; without a keyset, its function, which nobody watches."""
    if keyset is None:
        return _functions[name][0](*args)
    with torch._C._AutoDispatchBelowAutograd():
        op = getattr(torch.ops.mmattn, name).default
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def register_autograd(
    name: str,
    function: type[torch.autograd.Function],
    forward: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., Any],
) -> None:
    """Make the op `name` differentiable by `function`, whose first argument is the dispatcher's keyset, or None.

    Registered under the op, not around it, so that torch.ops.mmattn's own entry is differentiable. `forward` and
    `backward` compute what the two ops do, on arguments that have been checked: without a keyset, `function` calls them
    past the dispatcher.
    """
    _functions[name], _differentiable[name] = (forward, backward), function

    def autograd(keyset: Any, *args: Any) -> tuple[Tensor, ...]:
        # A tangent carries no requires_grad; the Function, having no forward-mode rule, refuses it.
        in_forward_mode = forward_ad._current_level >= 0
        wanted = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args)
        if in_forward_mode or wanted:
            return function.apply(keyset, *args)
        return below_autograd(name, keyset, *args)

    _library.impl(name, autograd, "Autograd", with_keyset=True)


def gradients_of(name: str) -> Callable[..., tuple[Tensor, ...]]:
    """The op `{name}_backward`, which refuses to be differentiated in its turn where a graph of gradients is wanted.

    torch's `once_differentiable` looks at the output gradients alone, and would silently leave out terms.
    """

    class Gradients(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
            return getattr(torch.ops.mmattn, f"{name}_backward")(*args)

        @staticmethod
        def backward(ctx: Any, *_: Any) -> Any:
            raise RuntimeError(f"{name} is differentiable once; impl='reference' as often as wanted")

    def compute(*args: Any) -> Any:
        if torch.is_grad_enabled():
            return Gradients.apply(*args)
        if unwatched(*(x for x in args if isinstance(x, Tensor))):
            return _functions[name][1](*args)
        return getattr(torch.ops.mmattn, f"{name}_backward")(*args)

    return compute


def is_autocast(device_type: str) -> bool:
    """Whether autocast is on for a device type; False for those that have none, such as meta."""
    return _has_autocast(device_type) and torch.is_autocast_enabled(device_type)


@torch.compiler.assume_constant_result  # torch 2.11, for one, cannot trace the question
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def to_autocast(t: Any, dtype: torch.dtype) -> Any:
    """`t` in `dtype` if it is a floating-point tensor other than float64; anything else as it is."""
    eligible = isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
    return t.to(dtype) if eligible else t
