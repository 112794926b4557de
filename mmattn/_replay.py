# SPDX-License-Identifier: MIT
"""Parts of a network as one call of the CPU extension each, where the kernels take less time than Python around them.

A part is a function of tensors and layers that consists of ops of mmattn and of views. The first call of its kind runs
it and notes its kernels; another one, of like tensors by like layers, runs those alone (`mmattn_kernels.cpu.plan`).
Everything that could make the function compute something else is asked in each call. Where one answer is not the plain
one (gradients, autocast, a trace, a mode or transform of torch, a hook, a layer of another class, a method that is not
ours, large tensors), the function itself is called.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmattn import _checks, dispatch
from mmattn._layers import is_plain
from mmattn._library import can_skip_dispatcher, is_autocast

LARGEST = 1 << 20  # bytes of a part's first tensor: of larger ones, the kernels take ten times as long as all else
_KEYS, _CALLS_OF_A_KEY = 1024, 8
_OPS = operator.itemgetter("dilated_conv1d", "group_norm", "random_shift_attention", "self_attention", "spatial_conv2d")
# Guards and plans by key; no plan where the part does not consist of forward kernels alone.
_plans: dict[Any, list[tuple[_checks.Guard, Any]]] = {}


def replayed(
    part: Callable[..., Any], owner: Any, layers: Sequence[nn.Module | None], inputs: tuple[Tensor, ...], *options: Any
) -> Any:
    """`part(owner, *inputs, *options)`, a tensor or a tuple of tensors.

    Args:
        part: what it computes depends on the inputs, the options, the class of the owner and the layers alone.
        owner: whatever has the layers.
        layers: all that the part uses.
        inputs: the first one the largest, and in the dtype of the results.
        options: that are equal where they are the same, and have a hash.
    """
    found = _read(layers, inputs) if is_worth_it(inputs[0]) else None
    if found is None or not _owner_is_plain(owner):
        return part(owner, *inputs, *options)
    settings, given = found
    from mmattn_kernels import cpu

    machine = cpu.extension().instruction_set(), torch.get_num_threads(), dispatch.requested("auto")
    key = part, type(owner), options, *map(type, options), settings, machine, len(given), inputs[0].shape
    calls = _plans.get(key)
    if calls is None:
        if len(_plans) >= _KEYS:
            _plans.clear()
        calls = _plans.setdefault(key, [])
    for guard, plan in calls:
        if _checks.is_like(given, guard):
            results = None if plan is None else plan.run(given)
            if results is None:
                break
            return results[0] if len(results) == 1 else tuple(results)
    else:
        new = _checks.guard_of(given) if len(calls) < _CALLS_OF_A_KEY else None
        if new is not None:
            return _record(calls, new, given, lambda: part(owner, *inputs, *options))
    return part(owner, *inputs, *options)


def is_worth_it(x: Any) -> bool:
    """Whether the extension can be called directly, and it takes little time."""
    return bool(
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and type(x) is Tensor
        and x.is_cpu
        and 0 < x.nbytes <= LARGEST
        and can_skip_dispatcher(known=True)
        and not torch._C._len_torch_function_stack()
        and not is_autocast("cpu")
        and dispatch.support("dilated_conv1d", "cpu", "cpu", x.dtype)
    )


def _owner_is_plain(owner: Any) -> bool:
    """Whether a module is of a class of ours, and nobody has replaced a method of it, or of its class, or an op."""
    kind: Any = type(owner)
    code = _code_of(kind)
    if code is None or any(now != then for now, then in code.classes) or _ops() != code.ops:
        return False
    return not isinstance(owner, nn.Module) or code.names.isdisjoint(owner.__dict__)


class _Code(NamedTuple):
    names: frozenset[str]  # of all attributes of a class
    classes: list[tuple[Any, dict[str, Any]]]  # the attributes that it and its bases have, and had when first seen
    ops: tuple[Any, ...]


@functools.cache
def _code_of(kind: type) -> _Code | None:
    """None where a part may run functions that are not ours."""
    bases = kind.__mro__[: kind.__mro__.index(nn.Module)] if issubclass(kind, nn.Module) else ()
    functions = [getattr(x, "__func__", x) for base in bases for x in vars(base).values()]
    code = [x.__globals__["__name__"] for x in (*functions, *_ops()) if isinstance(x, FunctionType)]
    if any(name.partition(".")[0] not in ("mmattn", "mmdiffusion") for name in code):
        return None
    return _Code(frozenset(dir(kind)), [(vars(base), dict(vars(base))) for base in bases], _ops())


def _ops() -> tuple[Any, ...]:
    return _OPS(sys.modules["mmattn"].__dict__)


def _read(layers: Sequence[nn.Module | None], inputs: Sequence[Tensor]) -> tuple[tuple[Any, ...], list[Tensor]] | None:
    """What a call by the layers depends on besides tensors, and all tensors; None if only calling the layers tells."""
    settings: list[Any] = []
    tensors = list(inputs)
    for layer in layers:
        if layer is None:
            settings.append(None)
            continue
        if not is_plain(layer):
            return None
        own = layer.__dict__
        weight, bias = map(own["_parameters"].get, ("weight", "bias"))  # half the time of the attributes
        if weight is None or "bias" not in own["_parameters"] or "weight" in own or "bias" in own:
            return None
        tensors += (weight,) if bias is None else (weight, bias)
        if type(layer) is nn.GroupNorm:
            groups, eps = own["num_groups"], own["eps"]
            settings += type(groups), groups, type(eps), eps
        elif type(layer) is nn.Linear:
            settings.append(bias is None)
        else:
            dilation = tuple(own["dilation"])
            settings += bias is None, tuple(own["kernel_size"]), dilation, *map(type, dilation)
    return tuple(settings), tensors


def _record(calls: list[Any], guard: Any, tensors: list[Tensor], call: Callable[[], Any]) -> Any:
    """call(), noted."""
    from mmattn_kernels.cpu.plan import Plan, Recorder, is_recording

    if is_recording():
        return call()
    with Recorder() as recorder:
        results = call()
    try:
        plan = Plan(recorder, tensors, (results,) if isinstance(results, Tensor) else results)
    except (TypeError, ValueError):
        plan = None
    calls.append((guard, plan))
    return results
