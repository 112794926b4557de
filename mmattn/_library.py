# SPDX-License-Identifier: MIT
"""What the ops share between torch.library and their kernels."""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import FunctionMeta, _SingleLevelFunction
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from mmattn import _checks, dispatch

_library = torch.library.Library("mmattn", "IMPL")
_functions: dict[str, tuple[Callable[..., tuple[Tensor, ...]], Callable[..., None], Callable[..., Any]]] = {}
_flop_formulas: dict[str, Callable[..., int]] = {}
_differentiable: dict[str, type[torch.autograd.Function]] = {}


def can_skip_dispatcher(*tensors: Tensor | None, known: bool = False) -> bool:
    """Whether kernels may be called directly: no trace, mode, transform or profiler, and tensors that are memory.

    A small call spends half its time in the dispatcher. What only looks like memory (`_checks.is_plain`) torch
    materialises there. `known`: by `_checks.is_known`, so the tensors are plain.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if torch._C._len_torch_dispatch_stack():
        _tell_flop_counters()
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if forward_ad._current_level >= 0 or torch.autograd.profiler._is_profiler_enabled:
        return False
    for t in () if known else tensors:
        if t is None:
            continue
        if type(t) not in _checks.PLAIN_TYPES or not _checks.is_plain(t):
            return False
    return True


def wants_gradients(*tensors: Tensor | None) -> bool:
    """Whether a graph is to be recorded for a call on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def call(name: str, tensors: tuple[Tensor | None, ...], *args: Any, known: bool = False) -> tuple[Tensor, ...]:
    """The op `name` on checked arguments, `tensors` among them: past `can_skip_dispatcher` where that may be."""
    if not can_skip_dispatcher(*tensors, known=known):
        return getattr(torch.ops.mmattn, name)(*args)
    return _apply(name, None, *args) if wants_gradients(*tensors) else _functions[name][0](*args)


def _apply(name: str, keyset: Any, *args: Any) -> tuple[Tensor, ...]:
    """Record the op in the graph, as the autograd kernels of torch's own ops do."""
    return apply(_differentiable[name], keyset, *args)


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply`, also inside a transform of torch.func.

    Of a Function that is called from outside, those want to make levels of their own. Here the dispatcher has come to
    one level already, where it is recorded as anywhere.
    """
    if torch._C._functorch.peek_interpreter_stack() is None:
        # That of its base: what torch lays over it is for torch.func alone, and takes half as long again.
        return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]
    with enable_single_level_autograd_function():
        return _of_one_level(function).apply(*args)


@functools.cache
def _of_one_level(function: type[torch.autograd.Function]) -> Any:
    """The Function as torch.func makes those of its levels: torch 2.15's `apply` tells them by their base."""
    members = {name: staticmethod(getattr(function, name)) for name in ("forward", "backward")}
    return FunctionMeta(function.__name__, (_SingleLevelFunction,), members)


def below_autograd(name: str, keyset: Any, *args: Any) -> Any:
    """From a Function's forward: the op `name` unrecorded; without a keyset, its function, past the dispatcher."""
    if keyset is None:
        return _functions[name][0](*args)
    if torch._C._functorch.peek_interpreter_stack() is None:
        return redispatch(name, keyset, *args)
    with torch.enable_grad():  # forward runs without, and the outer transforms of torch.func would record nothing
        return redispatch(name, keyset, *args)


def redispatch(op: str, keyset: Any, *args: Any) -> Any:
    """Call an op from its autograd kernel, for what is below it."""
    with torch._C._AutoDispatchBelowAutograd():
        overload = getattr(torch.ops.mmattn, op).default
        return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def register(
    name: str,
    check: Callable[..., Any],
    compute: Callable[..., tuple[Tensor, ...]],
    check_gradients: Callable[..., Any],
    compute_gradients: Callable[..., Any],
) -> None:
    """What the ops `name` and `{name}_backward` do on every device, behind their checks.

    `call` has its arguments from public functions, which have checked them, and calls `compute` alone. Backward is
    checked whoever calls it.
    """
    for op, refuse, function in (
        (name, check, compute),
        (f"{name}_backward", check_gradients, compute_gradients),
    ):
        packet = getattr(torch.ops.mmattn, op).default

        def implementation(*args: Any, packet: Any = packet, refuse: Any = refuse, function: Any = function) -> Any:
            _checks.plain(packet, args)
            refuse(*args)
            return function(*args)

        _library.impl(op, implementation, "CompositeExplicitAutograd")
    _functions[name] = compute, check_gradients, compute_gradients


def register_autograd(name: str, function: type[torch.autograd.Function]) -> None:
    """Make the op `name` differentiable by `function`, whose first argument is the dispatcher's keyset, or None.

    Registered under the op, not around it, so that torch.ops.mmattn's own entry is differentiable. Without a keyset,
    `function` calls what `register` was given past the dispatcher.
    """
    _differentiable[name] = function
    packet = getattr(torch.ops.mmattn, name).default

    def autograd(keyset: Any, *args: Any) -> tuple[Tensor, ...]:
        # A tangent carries no requires_grad; the Function, having no forward-mode rule, refuses it.
        in_forward_mode = forward_ad._current_level >= 0
        _checks.lazy(packet, args)
        wanted = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args)
        if in_forward_mode or wanted:
            return _apply(name, keyset, *args)
        return below_autograd(name, keyset, *args)

    _library.impl(name, autograd, "Autograd", with_keyset=True)


def count_flops(name: str, forward: Callable[..., int], backward: Callable[..., int]) -> None:
    """What torch.utils.flop_counter.FlopCounterMode counts for the op `name` and its backward, as functions of shapes.

    As of torch's own ops: two for a multiplication and an addition, of matrix products and convolutions alone.
    """
    _flop_formulas[name], _flop_formulas[f"{name}_backward"] = forward, backward


def _tell_flop_counters() -> None:
    """Register the formulas, also with the counters that count now, which have copied the registry before.

    Its module imports Triton, so it is not imported for those who do not count.
    """
    counting = sys.modules.get("torch.utils.flop_counter")
    if counting is None:
        return
    formulas = {getattr(torch.ops.mmattn, name): formula for name, formula in _flop_formulas.items()}
    if not formulas.keys() <= counting.flop_registry.keys():
        for packet, formula in formulas.items():
            counting.register_flop_formula(packet)(formula)
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", None)
        if isinstance(counter, counting.FlopCounterMode):
            for packet in formulas:
                counter.flop_registry.setdefault(packet, counting.flop_registry[packet])


def gradients_of(name: str) -> Callable[..., Any]:
    """The op `{name}_backward`, which refuses to be differentiated in its turn where a graph of gradients is wanted.

    torch's `once_differentiable` looks at the output gradients alone, and would silently leave out terms.
    """
    op = f"{name}_backward"

    class Gradients(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
            return below_autograd(op, keyset, *args)

        @staticmethod
        def backward(ctx: Any, *_: Any) -> Any:
            raise RuntimeError(f"{name} is differentiable once; impl='reference' as often as wanted")

    packet = getattr(torch.ops.mmattn, op).default

    def autograd(keyset: Any, *args: Any) -> Any:
        _checks.lazy(packet, args)
        if wants_gradients(*(t for t in args if isinstance(t, Tensor))):
            return apply(Gradients, keyset, *args)
        return redispatch(op, keyset, *args)

    _library.impl(op, autograd, "Autograd", with_keyset=True)

    is_tensor = [str(argument.type) in ("Tensor", "Optional[Tensor]") for argument in packet._schema.arguments]
    tensors_of, options_of = (
        operator.itemgetter(*(at for at, found in enumerate(is_tensor) if found is wanted)) for wanted in (True, False)
    )

    def compute(*args: Any) -> Any:
        if torch.is_grad_enabled():
            return packet(*args)
        tensors = tensors_of(args)
        given = [t for t in tensors if t is not None]
        which = len(given) == len(tensors) or tuple([t is None for t in tensors])
        key = op, which, options_of(args)
        known = _checks.is_known(key, given)
        if not can_skip_dispatcher(*given, known=known):
            return packet(*args)
        _, check_gradients, compute_gradients = _functions[name]
        if not known:
            check_gradients(*args)
            _checks.remember(key, given)
        return compute_gradients(*args)

    return compute


def is_autocast(device_type: str) -> bool:
    """Whether autocast is on for a device type; False for those that have none, such as meta."""
    has_autocast = device_type == "cpu" or device_type == "cuda" or _has_autocast(device_type)
    return has_autocast and torch.is_autocast_enabled(device_type)


@dispatch.constant_in_traces  # torch 2.11, for one, cannot trace the question
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def all_to_autocast(names: Sequence[str], tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """The tensors by `to_autocast`, where autocast is on for the device of the first one."""
    device_type = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if not is_autocast(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(to_autocast(name, t, dtype) for name, t in zip(names, tensors, strict=True))


def to_autocast(name: str, t: Any, dtype: torch.dtype) -> Any:
    """`t` in `dtype` if it is a floating-point tensor other than float64; anything else as it is."""
    if not isinstance(t, Tensor) or not t.is_floating_point() or t.dtype in (torch.float64, dtype):
        return t
    _checks.stored(name, t)
    return t.to(dtype)
