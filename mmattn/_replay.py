# SPDX-License-Identifier: MIT
"""Networks, or their parts, as one call of the CPU extension, where the kernels take less time than Python around them.

A part is a function of tensors and layers that consists of ops of mmattn, of views, and of what `note_sum` tells of.
The first call of its kind (of a network the second) runs it and notes its kernels; another one, of like tensors by
like layers, runs those alone (`mmattn_kernels.cpu.plan`), and its backward another call (`plan_gradients`). Everything
that could make the function compute something else is asked in each call. Where one answer is not the plain one
(autocast, a trace, a mode or transform of torch, a hook, saved tensors that are packed, a layer of another class, a
method that is not ours, large tensors), the function itself is called.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from mmattn import _checks, dispatch
from mmattn._layers import PLAIN_LAYERS, has_hooks_of_all, has_own_hooks, ignoring_hooks_of_all, is_plain
from mmattn._library import apply, can_skip_dispatcher, is_autocast, wants_gradients

LARGEST = 1 << 20  # bytes of a part's first tensor: of larger ones, the kernels take ten times as long as all else
_KEYS, _CALLS_OF_A_KEY, _NOTED = 1024, 8, 30_000  # a noted call takes some 4 KB, with its gradients 10
_OF_A_MODULE = frozenset(nn.Module().__dict__)
_DEEPEST = 32
_SETTINGS = {bool, int, float, str, type(None)}
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
_OPS = operator.itemgetter("dilated_conv1d", "group_norm", "random_shift_attention", "self_attention", "spatial_conv2d")
_state = threading.local()
# A network's plan takes as long as one to five calls of it: worth it where a shape comes again.
records_at_second_sight = True
_networks: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()
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
    is_asked = not is_recording() and not getattr(_state, "is_without_parts", False)
    found = _read(layers, inputs) if is_asked and is_worth_it(inputs[0]) else None
    if found is None or not _owner_is_plain(owner):
        return part(owner, *inputs, *options)
    settings, given = found
    records = torch.is_grad_enabled()
    key = part, type(owner), options, *map(type, options), settings, _machine(), records, len(given), inputs[0].shape
    plan, new = _look_up(key, given)
    if new is not None:
        return _record(new, given, lambda: part(owner, *inputs, *options), keeps=records)
    if plan is None:
        return part(owner, *inputs, *options)
    if records and wants_gradients(*given):
        call = _Call(
            lambda owner, *x: part(owner, *x, *options),
            owner,
            layers,
            lambda: (_read(layers, inputs) or (None,))[0] == settings,
            len(inputs),
        )
        return _with_gradients(plan, call, given)
    return _results(plan, given)


class Network(NamedTuple):
    """Modules as they are now."""

    roots: Sequence[nn.Module]
    modules: Any  # `Modules` of the extension
    settings: tuple[Any, ...]  # all that they compute by, besides tensors
    tensors: list[Tensor]
    layers: list[nn.Module]  # that have them


class _Kept(NamedTuple):
    """How modules were found, to see in a twentieth of the time whether they are as they were."""

    modules: Any  # `Modules` of the extension
    kinds: set[type]
    settings: tuple[Any, ...]


def network_of(owner: nn.Module, roots: Sequence[nn.Module], x: Tensor) -> Network | None:
    """The modules of a network in `roots` and below, for `replayed_network` on tokens like x.

    None where only calling the modules tells what they compute.
    """
    if not is_worth_it(x) or is_recording() or has_hooks_of_all():
        return None
    kept = _networks.get(owner)
    found = None if kept is None else kept.modules.parameters(roots)
    if kept is None or found is None:
        settings: list[Any] = []
        kinds: set[type] = set()
        if not all(_read_module(root, settings, kinds) for root in roots):
            _networks.pop(owner, None)
            return None
        from mmattn_kernels import cpu

        kept = _Kept(cpu.extension().Modules(roots), kinds - PLAIN_LAYERS, tuple(settings))
        _networks[owner] = kept
        found = kept.modules.parameters(roots)
    return Network(roots, kept.modules, kept.settings, *found) if all(map(_class_is_plain, kept.kinds)) else None


def replayed_network(
    part: Callable[..., Any],
    network: Network,
    inputs: tuple[Tensor, ...],
    shifts: Sequence[int],
    *options: Any,
    num_sufficient: int = 1,
) -> Any:
    """`part(network.roots, *inputs)`, a tensor or a tuple of tensors.

    Args:
        part: what it computes depends on the inputs, the network, the shifts and the options alone. Its first call of
            a kind runs it, the second is noted, and later ones are replayed.
        network: all modules that it uses, read since anything else has run.
        inputs: the first one the largest, and in the dtype of the results.
        shifts: of the random-shift attentions that it calls, in their order.
        options: have a hash.
        num_sufficient: so many results, the first ones, have gradients wherever any of the others has.
    """
    given, records = [*inputs, *network.tensors], torch.is_grad_enabled()
    key = part.__code__, options, network.settings, _machine(), records, len(given), *[x.shape for x in inputs[:2]]
    if records_at_second_sight and key not in _plans:
        _begin(key)
        with _without_parts():
            return part(network.roots, *inputs)
    plan, new = _look_up(key, given)
    if new is not None:
        return _record(new, given, lambda: part(network.roots, *inputs), keeps=records, num_sufficient=num_sufficient)
    if plan is None:
        return part(network.roots, *inputs)
    if records and wants_gradients(*given):
        roots, modules = network.roots, network.modules
        call = _Call(part, roots, network.layers, lambda: modules.parameters(roots) is not None, len(inputs))
        return _with_gradients(plan, call, given, shifts)
    return _results(plan, given, shifts)


@contextlib.contextmanager
def _without_parts() -> Iterator[None]:
    """No plans of parts are made or used while it is open: what is called may be of a shape that never comes again."""
    _state.is_without_parts = True
    try:
        yield
    finally:
        _state.is_without_parts = False


def _machine() -> tuple[Any, ...]:
    """What else decides what kernels are called with."""
    from mmattn_kernels import cpu

    return cpu.extension().instruction_set(), torch.get_num_threads(), dispatch.requested("auto")


def _look_up(key: tuple[Any, ...], given: Sequence[Tensor]) -> tuple[Any, list[Any] | None]:
    """The plan of a call, or None where it has none; and where it is new, what its plan is to be added to."""
    calls = _plans.get(key)
    if calls is None:
        calls = _begin(key)
    for guard, plan in calls:
        if _checks.is_like(given, guard):
            return plan, None
    return None, calls if len(calls) < _CALLS_OF_A_KEY else None


def _begin(key: tuple[Any, ...]) -> list[Any]:
    """What the plans of a new key are added to; all others are dropped where there are too many."""
    noted = sum(0 if plan is None else len(plan.calls) for of in list(_plans.values()) for _, plan in list(of))
    if len(_plans) >= _KEYS or noted >= _NOTED:
        _plans.clear()
    return _plans.setdefault(key, [])


class _Call(NamedTuple):
    """What a plan computes, by its function."""

    function: Callable[..., Any]  # of the owner and the inputs
    owner: Any  # a module, or modules
    layers: Sequence[nn.Module | None]  # whose parameters it uses, in the order in which the plan was given them
    is_as_it_was: Callable[[], bool]  # by its settings
    num_inputs: int


def _with_gradients(plan: Any, call: _Call, given: Sequence[Tensor], shifts: Sequence[int] = ()) -> Any:
    gradients = _gradients_of(plan, given)
    edges = [given[at] for at in (*gradients.made, *gradients.repeats)]  # one for each share of a gradient
    return apply(_Part, plan, gradients, call, shifts, given, *edges)


def _results(plan: Any, given: Sequence[Tensor], shifts: Sequence[int] = ()) -> Any:
    results, _ = plan.run(given, shifts)
    return results[0] if len(results) == 1 else tuple(results)


def note_sum(out: Tensor, to: Tensor, *terms: Tensor, scale: float = 1.0) -> None:
    """Tell the open recorder what torch has computed: see `mmattn_kernels.cpu.plan.note_sum`."""
    sys.modules["mmattn_kernels.cpu.plan"].note_sum(out, to, terms, scale)


def is_recording() -> bool:
    """Whether a call of a part is being noted in this thread; asked where the extension may not be there."""
    if torch.compiler.is_compiling():
        return False
    plan = sys.modules.get("mmattn_kernels.cpu.plan")
    return plan is not None and plan.is_recording()


def is_worth_it(x: Any) -> bool:
    """Whether the extension can be called directly, and it takes little time."""
    return bool(
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.is_cpu
        and 0 < x.nbytes <= LARGEST
        and can_skip_dispatcher(known=True)
        and not (torch.is_grad_enabled() and _packs_saved_tensors())
        and not torch._C._len_torch_function_stack()
        and not is_autocast("cpu")
        and dispatch.support("dilated_conv1d", "cpu", "cpu", x.dtype)
    )


def _packs_saved_tensors() -> bool:
    """Whether what a graph saves is given to hooks, as under a checkpoint, which counts it; so if torch cannot tell."""
    return _top_hooks is None or _top_hooks(True) is not None


def _owner_is_plain(owner: Any) -> bool:
    """Whether a module is of a class of ours, and nobody has replaced a method of it, or of its class, or an op."""
    kind: Any = type(owner)
    if not _class_is_plain(kind):
        return False
    return not isinstance(owner, nn.Module) or _code_of(kind).names.isdisjoint(owner.__dict__)  # type: ignore[union-attr]


def _class_is_plain(kind: type) -> bool:
    code = _code_of(kind)
    return code is not None and all(now == then for now, then in code.classes) and _ops() == code.ops


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
    if kind is not nn.ModuleList and any(name.partition(".")[0] not in ("mmattn", "mmdiffusion") for name in code):
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
        elif not _read_layer(layer, settings, tensors):
            return None
    return tuple(settings), tensors


def _read_layer(layer: nn.Module, settings: list[Any], tensors: list[Tensor]) -> bool:
    """The same of one layer; False if only calling it tells."""
    if not is_plain(layer):
        return False
    own = layer.__dict__
    weight, bias = map(own["_parameters"].get, ("weight", "bias"))  # half the time of the attributes
    if weight is None or "bias" not in own["_parameters"] or "weight" in own or "bias" in own:
        return False
    tensors += (weight,) if bias is None else (weight, bias)
    if type(layer) is nn.GroupNorm:
        groups, eps = own["num_groups"], own["eps"]
        settings += type(groups), groups, type(eps), eps
    elif type(layer) is nn.Linear:
        settings.append(bias is None)
    else:
        dilation = tuple(own["dilation"])
        settings += bias is None, tuple(own["kernel_size"]), dilation, *map(type, dilation)
    return True


def _read_module(module: nn.Module, settings: list[Any], kinds: set[type], depth: int = 0) -> bool:
    """The same of a module and all that lie in it, whose classes join `kinds`; False of one that lies in itself."""
    if depth > _DEEPEST:
        return False
    own = module.__dict__
    kind: Any = type(module)
    kinds.add(kind)
    settings.append(kind)
    if kind in PLAIN_LAYERS:
        values = [value for name, value in own.items() if name not in _OF_A_MODULE and not name.startswith("_")]
        values += [item for value in values if type(value) is tuple for item in value]
        is_fixed = all(type(value) in _SETTINGS or type(value) is tuple for value in values)
        return is_fixed and list(own["_parameters"]) == ["weight", "bias"] and _read_layer(module, settings, [])
    code = _code_of(kind)
    if code is None or not code.names.isdisjoint(own) or has_own_hooks(module) or own["_parameters"] or own["_buffers"]:
        return False
    settings.append(own["training"])
    for name, value in own.items():
        if name not in _OF_A_MODULE:
            if type(value) not in _SETTINGS:
                return False
            settings += name, type(value), value
    for name, child in own["_modules"].items():
        settings.append(name)
        if child is None:
            settings.append(None)
        elif not _read_module(child, settings, kinds, depth + 1):
            return False
    return True


def _record(
    calls: list[Any],
    tensors: list[Tensor],
    call: Callable[[], Any],
    *,
    keeps: bool,
    num_sufficient: int = 1,
) -> Any:
    """call(), noted."""
    from mmattn_kernels.cpu.plan import Plan, Recorder

    guard = _checks.guard_of(tensors)
    if guard is None:
        return call()
    with Recorder() as recorder:
        results = call()
    try:
        plan = Plan(recorder, tensors, (results,) if isinstance(results, Tensor) else results, keeps=keeps)
        if wants_gradients(*tensors):
            _check_gradients(plan, tensors, num_sufficient)
    except (TypeError, ValueError):
        plan = None
    calls.append((guard, plan))
    return results


def _gradients_of(plan: Any, tensors: Sequence[Tensor]) -> Any:
    return plan.gradients(tuple([t.requires_grad for t in tensors]), (True,) * len(plan.result_forms))


def _check_gradients(plan: Any, tensors: Sequence[Tensor], num_sufficient: int) -> None:
    """Refuse a plan of which a single node would not have the edges that the graph of the function has."""
    gradients, count = _gradients_of(plan, tensors), len(plan.result_forms)
    if num_sufficient == 1:
        others = [tuple([at == one for one in range(count)]) for at in range(count if count > 1 else 0)]
    else:
        others = [tuple([at < num_sufficient for at in range(count)])]
    for given in others:
        other = plan.gradients(gradients.wanted, given)
        if (other.made, sorted(other.repeats)) != (gradients.made, sorted(gradients.repeats)):
            raise ValueError("not all results depend on the same tensors, each by one call")


class _Part(torch.autograd.Function):
    """A plan, of the tensors that a part was given, as one node of a graph."""

    @staticmethod
    def forward(
        ctx: Any, plan: Any, gradients: Any, call: _Call, shifts: Sequence[int], tensors: list[Tensor], *_: Tensor
    ) -> Any:
        inputs = tensors[: call.num_inputs]
        results, between = plan.run(tensors, shifts)
        read = *[tensors[at] for at in gradients.reads], *[results[at] for at in gradients.reads_of_results]
        if gradients.guard is None:
            gradients.guard = _checks.guard_of((*read, between))
        ctx.plan, ctx.gradients, ctx.call, ctx.shifts = plan, gradients, call, shifts
        ctx.parameters = tensors[call.num_inputs :]
        ctx.versions = [p._version for p in ctx.parameters]
        others = [x for at, x in enumerate(inputs) if at not in gradients.reads]
        ctx.save_for_backward(*read, between, *others)
        ctx.set_materialize_grads(False)
        return results[0] if len(results) == 1 else tuple(results)

    @staticmethod
    def backward(ctx: Any, *d_results: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, places = ctx.saved_tensors, _places(ctx.gradients)  # once: checkpointing refuses a second look
        read = saved[: len(places) + 1]
        given = [d for d in d_results if d is not None]
        arguments = ctx.plan, ctx.gradients, ctx.shifts, len(d_results), *d_results, *read
        if torch.compiler.is_compiling():
            found = _untraced(_part_gradients, *arguments)
        elif can_skip_dispatcher(*given):
            recorded = torch.is_grad_enabled()
            found = apply(_Once, _part_gradients, *arguments) if recorded else _part_gradients(*arguments)
        else:
            of = dict(zip(places, read, strict=False))
            others = iter(saved[len(read) :])
            inputs = [of[at] if at in of else next(others) for at in range(ctx.call.num_inputs)]
            parameters = _unchanged(ctx.parameters, ctx.versions)
            arguments = ctx.call, parameters, ctx.gradients.wanted, *inputs, *d_results
            found = apply(_Once, _function_gradients, *arguments)
            found += (None,) * len(ctx.gradients.repeats)
        edges = ctx.gradients.made + list(range(len(ctx.plan.forms), len(found)))
        return None, None, None, None, None, *[found[at] for at in edges]


class _Once(torch.autograd.Function):
    """A function of gradients that refuses to be differentiated in its turn."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], *arguments: Any) -> tuple[Tensor | None, ...]:
        return function(*arguments)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("fused kernels are differentiable once; with MMATTN_IMPL=reference as often as wanted")


def _part_gradients(
    plan: Any, usual: Any, shifts: Sequence[int], count: int, *tensors: Any
) -> tuple[Tensor | None, ...]:
    """Those of the tensors of a plan's call, of `count` gradients of results and the saved tensors behind them.

    `usual` makes them where all results have a gradient.
    """
    d_results = [None if d is None else d.contiguous() for d in tensors[:count]]
    if all(d is None for d in d_results):
        return (None,) * (len(plan.forms) + len(usual.repeats))
    if usual.repeats:  # further results of the node, which other gradients would not have
        forms = zip(d_results, plan.result_forms, strict=True)
        d_results = [torch.zeros(form[0], dtype=form[1]) if d is None else d for d, form in forms]
    given, saved = tuple([d is not None for d in d_results]), tensors[count:]
    if usual.guard is None or not _checks.is_like(saved, usual.guard):
        _refuse_others(plan, usual, saved)
    gradients, read = usual, saved[:-1]
    if not all(given):
        gradients, of = plan.gradients(usual.wanted, given), dict(zip(_places(usual), read, strict=True))
        read = tuple([of[place] for place in _places(gradients)])
    return tuple(gradients.run(read, saved[-1], d_results, shifts))


def _places(gradients: Any) -> list[Any]:
    """What is read: indices of tensors, and of results by another name."""
    return [*gradients.reads, *[("result", at) for at in gradients.reads_of_results]]


def _untraced(function: Callable[..., Any], *arguments: Any) -> Any:
    """Dynamo, which traces a backward under compiled autograd, knows nothing of pointers to tensors."""
    return torch.compiler.disable(function)(*arguments)


def _unchanged(parameters: list[Tensor], versions: list[int]) -> list[Tensor]:
    """Refuse to compute again by what was written to since the forward pass."""
    for p, version in zip(parameters, versions, strict=True):
        if p._version != version:
            raise RuntimeError(
                f"a parameter {list(p.shape)} was modified in place between forward and backward; expected it as it "
                "was, where a mode or transform of torch looks at backward, for which forward is computed again"
            )
    return parameters


def _copied(owner: Any, parameters: dict[tuple[int, str], Tensor]) -> Any:
    """Modules that compute as the owner does, by other parameters: by identity of the layer, and name."""
    if isinstance(owner, tuple):
        copies = [_copied(one, parameters) for one in owner]
        return type(owner)(*copies) if hasattr(owner, "_fields") else tuple(copies)
    copy = object.__new__(type(owner))
    own = owner.__dict__
    copy.__dict__ = own | {
        "training": False,  # a replayed part draws no random numbers
        "_parameters": {name: parameters.get((id(owner), name), p) for name, p in own["_parameters"].items()},
        "_modules": {name: x if x is None else _copied(x, parameters) for name, x in own["_modules"].items()},
    }
    return copy


def _function_gradients(
    call: _Call, parameters: Sequence[Tensor], wanted: Sequence[bool], *tensors: Any
) -> tuple[Tensor | None, ...]:
    """The same by the function itself, computed again: for gradients that are no memory, and modes that look on."""
    inputs, d_results = tensors[: call.num_inputs], tensors[call.num_inputs :]
    names = [(layer, name) for layer in call.layers if layer is not None for name in ("weight", "bias")]
    places = [(id(layer), name) for layer, name in names if layer._parameters.get(name) is not None]
    with torch.autocast("cpu", enabled=False), ignoring_hooks_of_all():  # in forward there was neither
        if len(places) != len(parameters) or not call.is_as_it_was():
            raise RuntimeError(
                "a module was changed between forward and backward; expected its settings as they were, where a mode "
                "or transform of torch looks at backward, for which forward is computed again"
            )
        with torch.enable_grad(), _disable_current_modes():
            given = [x.view_as(x) for x in (*inputs, *parameters)]  # what is in front is not asked for gradients
            owner = _copied(call.owner, dict(zip(places, given[call.num_inputs :], strict=True)))
            results = call.function(owner, *given[: call.num_inputs])
        results = (results,) if isinstance(results, Tensor) else results
        pairs = [(x, d) for x, d in zip(results, d_results, strict=True) if d is not None]
        of = [t for t, is_wanted in zip(given, wanted, strict=True) if is_wanted]
        made = iter(torch.autograd.grad([x for x, _ in pairs], of, [d for _, d in pairs], allow_unused=True))
    return tuple([next(made) if is_wanted else None for is_wanted in wanted])


def _refuse_others(plan: Any, gradients: Any, saved: Sequence[Any]) -> None:
    """Hooks may have put other tensors in the place of the saved ones, or somebody has freed their memory."""
    forms = [plan.forms[at] for at in gradients.reads] + [plan.result_forms[at] for at in gradients.reads_of_results]
    for t, form in zip(saved, [*forms, (torch.Size([plan.bytes_between]), torch.uint8, (1,))], strict=True):
        if not _checks.is_plain(t) or not t.is_cpu or (t.shape, t.dtype, t.stride()) != form:
            found = f"{list(t.shape)} {t.dtype} with strides {t.stride()} on {t.device}"
            raise ValueError(f"a saved tensor is {found}; expected it as it was saved, {form}")
