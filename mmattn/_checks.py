# SPDX-License-Identifier: MIT
"""What stands in front of the kernels: every argument of every op, forward and backward, whoever calls it.

Kernels get pointers, sizes and strides, and trust them. So the public functions check what they are given, and what is
registered with torch.library checks it again, as it can be called directly; backward is checked where it computes,
since hooks may have put other tensors in the place of the saved ones.

Python reads shape, strides, dtype and device of seven tensors in some 5 us. So a call that was found right is kept, as
one of torch's own guards and the size of each storage, and `is_known` says in some 2 us whether another is like it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from operator import mul
from typing import Any

import torch
from torch import Tensor

ATTENTION_TENSORS = ("video_q", "video_k", "video_v", "audio_q", "audio_k", "audio_v")
_VIDEO, _AUDIO = "[B, F*P, H, D]", "[B, T, H, D]"
_COUNTS = {1: "one dimension", 2: "two dimensions", 3: "three dimensions", 4: "four dimensions"}
_dispatch_keys = torch._C._dispatch_keys
_plain_keys: set[int] = set()
_WITHOUT_STORAGE = ("ZeroTensor", "Python", "Functionalize", "FuncTorchBatched", "FuncTorchGradWrapper")
_INDIRECT = ("Negative", "Conjugate", *_WITHOUT_STORAGE)
PLAIN_TYPES = {Tensor, torch.nn.Parameter}
_KEYS, _CALLS_OF_A_KEY = 4096, 8
Guard = tuple[Callable[..., bool], list[Any]]
_known: dict[Any, list[Guard]] = {}
_offset, _storage, _nbytes = Tensor.storage_offset, Tensor.untyped_storage, torch.UntypedStorage.nbytes


def is_known(key: tuple[Any, ...], tensors: Sequence[Any]) -> bool:
    """Whether a call like this one was found right by its checks: the key is equal, and each tensor alike.

    Alike in type, dispatch keys, dtype, device, whether it wants gradients, shape, strides, offset and bytes of the
    storage: all that the checks look at, and that makes a tensor plain. So a known call has plain tensors. What else
    they look at belongs into the key, numbers with their types, as True is equal to 1. What has no hash is not known,
    nor a call with one tensor twice, which torch's guards refuse.
    """
    if torch.compiler.is_compiling():
        return False
    try:
        calls = _known.get((key, len(tensors), tensors[0].shape), ())
    except (AttributeError, TypeError):
        return False
    return any(map(is_like, itertools.repeat(tensors), calls))


def remember(key: tuple[Any, ...], tensors: Sequence[Any]) -> None:
    """Make a call known that its checks have found right, if its tensors are plain."""
    if torch.compiler.is_compiling() or (found := guard_of(tensors)) is None:
        return
    if len(_known) >= _KEYS:
        _known.clear()
    calls = _known.setdefault((key, len(tensors), tensors[0].shape), [])
    if len(calls) >= _CALLS_OF_A_KEY:
        calls.clear()
    calls.append(found)


def guard_of(tensors: Sequence[Any]) -> Guard | None:
    """What `is_like` compares with; None if not all are plain and different, or torch has no guards."""
    if len(set(map(id, tensors))) < len(tensors) or not all(type(t) in PLAIN_TYPES and is_plain(t) for t in tensors):
        return None
    try:
        guards = torch._C._dynamo.guards.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    except (AttributeError, TypeError):  # not torch's public interface: without it, each call is checked in full
        return None
    return guards.check, [*map(_offset, tensors), *map(_nbytes, map(_storage, tensors))]


def is_like(tensors: Sequence[Any], guard: Guard) -> bool:
    """Whether tensors are like those that a guard was made of, as `is_known` says it."""
    check, storages = guard
    return check(*tensors) and [*map(_offset, tensors), *map(_nbytes, map(_storage, tensors))] == storages


def is_plain(t: Tensor) -> bool:
    """Whether the memory of a tensor is its value: no lazy sign or conjugate, no subclass that computes for itself.

    Nor one whose storage was freed or cut short. What torch dispatches a tensor by tells the rest; the combinations
    that were found plain are kept.
    """
    keys = _dispatch_keys(t)
    if keys.raw_repr() in _plain_keys:
        return _is_within_storage(t)
    indirect = any(keys.has(getattr(torch._C.DispatchKey, name)) for name in _INDIRECT)
    if indirect or t.layout is not torch.strided or t.is_nested or t.is_quantized or t.is_meta or _is_batched(t):
        return False
    _plain_keys.add(keys.raw_repr())
    return is_plain(t)


def _is_batched(t: Tensor) -> bool:
    """Whether the vmap of before torch.func holds it, as is_grads_batched does; its dispatch key has no name here."""
    return "Batched" in str(_dispatch_keys(t))


def plain(op: Any, args: Sequence[Any]) -> None:
    """Refuse tensors among the arguments of an op whose memory is not their value."""
    for at, t in enumerate(args):
        if isinstance(t, Tensor) and not is_plain(t):
            name = op._schema.arguments[at].name
            _refuse_layout(name, t)
            stored(name, t)
            raise ValueError(f"{name} is {torch._C._dispatch_keys(t)}; expected a tensor whose memory is its value")


def lazy(op: Any, args: Sequence[Any]) -> None:
    """Refuse among the arguments of an op what torch would read past the end of to materialise a lazy sign."""
    for at, t in enumerate(args):
        if isinstance(t, Tensor) and t.is_neg():
            stored(op._schema.arguments[at].name, t)


def stored(name: str, t: Any) -> None:
    """Refuse a tensor of which torch, which does not look either, would read past the end of its storage.

    For what torch itself reads in front of the kernels: to materialise a lazy sign, to cast for autocast, and in the
    reference. A trace has no storage to look at.
    """
    if type(t) not in (Tensor, torch.nn.Parameter) or torch.compiler.is_compiling() or t.layout is not torch.strided:
        return
    keys = _dispatch_keys(t)
    if t.is_meta or t.is_nested or any(keys.has(getattr(torch._C.DispatchKey, name)) for name in _WITHOUT_STORAGE):
        return
    if not _is_within_storage(t):
        found = f"{list(t.shape)} on a storage of {t.untyped_storage().nbytes()} bytes"
        raise ValueError(f"{name} is {found}; expected memory that has not been freed or cut short")


def all_stored(names: Sequence[str], tensors: Sequence[Any]) -> None:
    """The same of each, in front of an op's reference."""
    for name, t in zip(names, tensors, strict=True):
        stored(name, t)


def _is_within_storage(t: Tensor) -> bool:
    """Whether the last element is: a storage can be resized, also to nothing, under the tensors that lie in it."""
    size = t.untyped_storage().nbytes()
    if t.is_contiguous():
        return t.storage_offset() * t.itemsize + t.nbytes <= size or not t.nbytes
    strides = t.stride()
    return (t.storage_offset() + 1 + sum(map(mul, t.shape, strides)) - sum(strides)) * t.itemsize <= size


def integer(name: str, value: Any, minimum: int | None = None) -> None:
    """Refuse what is not an int, or below the minimum."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} is {value!r}; expected an int")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} is {value}; expected at least {minimum}")


def activation(value: str | None) -> None:
    """Refuse an activation that the kernels do not have."""
    if value not in (None, "silu"):
        raise ValueError(f"activation is {value!r}; expected None or 'silu'")


def window(frames: int, size: int) -> None:
    """Refuse a window that is not 1..frames."""
    integer("frames", frames, 1)
    integer("window", size)
    if not 1 <= size <= frames:
        raise ValueError(f"window is {size}; expected 1..frames = 1..{frames}")


def random_shift_attention(tensors: Sequence[Tensor], frames: int, size: int, shift: int | Tensor) -> int | Tensor:
    """The arguments of random-shift attention; returns the shift, as an int where it can be read."""
    video_q, video_k, video_v, audio_q, audio_k, audio_v = tensors
    _sequence("video_q", video_q, _VIDEO, 4)
    _sequence("audio_q", audio_q, _AUDIO, 4)
    video_shape, audio_shape = video_q.shape, audio_q.shape
    batch, video_len, heads, dim = video_shape
    audio_len = audio_shape[1]
    _contiguous_channels("video_q", video_q)
    _like("video_k", video_k, video_shape, _VIDEO, video_q, "video_q")
    _like("video_v", video_v, video_shape, _VIDEO, video_q, "video_q")
    _like("audio_q", audio_q, audio_shape, _AUDIO, video_q, "video_q")
    _like("audio_k", audio_k, audio_shape, _AUDIO, video_q, "video_q")
    _like("audio_v", audio_v, audio_shape, _AUDIO, video_q, "video_q")
    if audio_shape != (batch, audio_len, heads, dim):
        found = list(audio_shape)
        raise ValueError(f"audio_q has shape {found}; expected [{batch}, T, {heads}, {dim}] to match video_q")
    if heads < 1 or dim < 1:
        raise ValueError(f"video_q has shape {list(video_q.shape)}; expected at least one head and one channel")
    window(frames, size)
    if video_len < frames or video_len % frames:
        raise ValueError(f"frames is {frames}; expected a divisor of the number of video tokens, {video_len}")
    if audio_len < frames:
        raise ValueError(f"audio_q has {audio_len} positions; expected at least one for each of the {frames} frames")
    return shift_in_range(shift, frames - size, video_q)


def self_attention(q: Tensor, k: Tensor, v: Tensor, segments: int) -> None:
    """The arguments of self-attention in segments."""
    _sequence("q", q, "[B, L, H, D]", 4)
    if min(q.shape[1:]) < 1:
        raise ValueError(f"q has shape {list(q.shape)}; expected [B, L, H, D], none of L, H, D zero")
    _contiguous_channels("q", q)
    _like("k", k, q.shape, "[B, L, H, D]", q, "q")
    _like("v", v, q.shape, "[B, L, H, D]", q, "q")
    integer("segments", segments)
    if segments < 1 or q.shape[1] % segments:
        raise ValueError(f"segments is {segments}; expected a divisor of the number of tokens, {q.shape[1]}")


def segmented_attention(q: Tensor, k: Tensor, v: Tensor, tables: Sequence[Tensor]) -> None:
    """The arguments of attention in segments; not the values of the tables, which whoever reads them checks."""
    _sequence("q", q, "[B, Lq, H, D]", 4)
    _sequence("k", k, "[B, Lk, H, D]", 4)
    for name, x in (("q", q), ("k", k)):
        if min(x.shape[1:]) < 1:
            raise ValueError(f"{name} has shape {list(x.shape)}; expected [B, L, H, D], none of L, H, D zero")
    _contiguous_channels("q", q)
    batch, _, heads, dim = q.shape
    _like("k", k, (batch, k.shape[1], heads, dim), "[B, Lk, H, D]", q, "q")
    _like("v", v, k.shape, "[B, Lk, H, D]", q, "q")
    query_bounds, key_begin, key_length = tables
    _table("key_begin", key_begin, None, q)
    _table("query_bounds", query_bounds, key_begin.shape[0] + 1, q)
    _table("key_length", key_length, key_begin.shape[0], q)


def _table(name: str, t: Any, length: int | None, q: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} is a {type(t).__name__}; expected a tensor")
    if t.layout is not torch.strided:
        _refuse_layout(name, t)
    if t.dtype != torch.int32:
        raise TypeError(f"{name} has dtype {t.dtype}; expected torch.int32")
    if t.dim() != 1 or not t.shape[0] or (length is not None and t.shape[0] != length):
        expected = (
            "one dimension and at least one segment" if length is None else f"[{length}], of key_begin's segments"
        )
        raise ValueError(f"{name} has shape {list(t.shape)}; expected {expected}")
    if t.device != q.device:
        raise ValueError(f"{name} is on {t.device}; expected {q.device}, the device of q")
    _contiguous(name, t, "as Windows makes it")


def attention_results(names: Sequence[str], tensors: Sequence[Any], q: Tensor) -> None:
    """What the backward of an attention op is given of each stream: d_out, out, lse and, where there is one, d_lse.

    `names` are those of d_out, out, lse and q.
    """
    batch, length, heads, _ = q.shape
    for name, t in zip(names[:2], tensors[:2], strict=True):
        _result(name, t, q.shape, f"the shape of {names[3]},", q.dtype, q)
    _, out, lse, d_lse = tensors
    _contiguous_channels(names[1], out)
    for name, t in ((names[2], lse), (f"d_{names[2]}", d_lse)):
        if t is not None or name == names[2]:
            _result(name, t, (batch, heads, length), "[B, H, L]", torch.float64, q)
            _contiguous(name, t)


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, groups: int, eps: float
) -> None:
    """The arguments of a group normalisation."""
    _tokens("x", x)
    _normalisation(x, weight, bias, groups)
    _film(x, scale, shift)
    _eps(eps)


def group_norm_gradients(d_out: Tensor, x: Tensor, stats: Tensor, groups: int) -> None:
    """What the backward of a group normalisation is given besides `group_norm`'s arguments."""
    _result("d_out", d_out, tuple(x.shape), "[B, L, C]", x.dtype, x)
    _result("stats", stats, (x.shape[0], groups, 3), "[B, groups, 3]", torch.float32, x)
    _contiguous("stats", stats)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prologue: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    residual: Tensor | None,
    groups: int | None,
    dilation: int,
    height: int,
    width: int,
    eps: float,
) -> None:
    """The arguments of a convolution; prologue: norm's weight and bias, scale, shift. groups: None is no norm."""
    _tokens("x", x)
    _weight(x, weight)
    if bias is not None:
        _parameter("bias", bias, (weight.shape[0],), "[Cout]", x)
    integer("dilation", dilation, 1)
    if weight.shape[2] == 9 and not (height == 0 and width == 0):
        _frames(x, height, width)
    elif height or width:
        raise ValueError(f"weight has shape {list(weight.shape)}; expected nine taps for a height and a width")
    if residual is not None:
        _sequence("residual", residual, "[B, L, Cout]", 3)
        _like("residual", residual, (x.shape[0], x.shape[1], weight.shape[0]), "[B, L, Cout]", x, "x")
    norm_weight, norm_bias, scale, shift = prologue
    if groups is not None:
        _normalisation(x, norm_weight, norm_bias, groups, "norm's ")
    _film(x, scale, shift, "film's ")
    _eps(eps)


def conv_gradients(d_out: Tensor, x: Tensor, weight: Tensor, stats: Tensor, groups: int) -> None:
    """What the backward of a convolution is given besides `conv`'s arguments."""
    _result("d_out", d_out, (x.shape[0], x.shape[1], weight.shape[0]), "[B, L, Cout]", x.dtype, x)
    _result("stats", stats, (x.shape[0], groups, 3), "[B, groups, 3]", torch.float32, x)
    _contiguous("stats", stats)


def shift_in_range(shift: int | Tensor, largest: int, like: Tensor) -> int | Tensor:
    """Refuse a shift that is not 0..largest; returns it, as an int where it can be read."""
    if isinstance(shift, Tensor):
        if shift.numel() != 1 or shift.dtype not in (torch.int32, torch.int64):
            found = f"a {shift.dtype} tensor of shape {list(shift.shape)}"
            raise TypeError(f"shift is {found}; expected one int32 or int64 element")
        if shift.device != like.device:
            raise ValueError(f"shift is on {shift.device}; expected {like.device}, the device of video_q")
        # A trace has no value to read, and an accelerator would be waited for.
        if shift.device.type != "cpu" or torch.compiler.is_compiling() or type(shift) is not Tensor:
            return shift
        stored("shift", shift)
        shift = int(shift)
    elif isinstance(shift, bool) or not isinstance(shift, (int, torch.SymInt)):
        raise TypeError(f"shift is {shift!r}; expected an int or an integer tensor of one element")
    if not 0 <= shift <= largest:
        raise ValueError(f"shift is {shift}; expected 0..frames-window = 0..{largest}")
    return shift


def _tokens(name: str, x: Tensor) -> None:
    _sequence(name, x, "[B, L, C]", 3)
    if x.shape[1] < 1 or x.shape[2] < 1:
        raise ValueError(f"{name} has shape {list(x.shape)}; expected at least one position and one channel")
    _contiguous_channels(name, x)


def _sequence(name: str, x: Tensor, letters: str, dimensions: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; expected a tensor {letters}")
    if x.layout is not torch.strided or x.is_nested:
        _refuse_layout(name, x)
    if x.dim() != dimensions:
        raise ValueError(f"{name} has shape {list(x.shape)}; expected {_COUNTS[dimensions]} {letters}")
    if not x.is_floating_point():
        raise TypeError(f"{name} has dtype {x.dtype}; expected a floating-point dtype")


def _refuse_layout(name: str, x: Tensor) -> None:
    if x.layout is not torch.strided or x.is_nested or x.is_quantized:
        what = "nested" if x.is_nested else "quantised" if x.is_quantized else str(x.layout)
        raise TypeError(f"{name} is {what}; expected a dense tensor, torch.strided")


def _like(name: str, t: Tensor, shape: Sequence[int], letters: str, first: Tensor, first_name: str) -> None:
    """Refuse what has not this shape, the dtype and device of `first`, and contiguous channels."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} is a {type(t).__name__}; expected a tensor {letters}")
    if t.dtype == first.dtype and t.device == first.device and t.shape == shape and t.layout is torch.strided:
        _contiguous_channels(name, t)
        return
    _refuse_layout(name, t)
    if t.dim() != len(shape):
        raise ValueError(f"{name} has shape {list(t.shape)}; expected {_COUNTS[len(shape)]} {letters}")
    if t.dtype != first.dtype:
        raise TypeError(f"{name} has dtype {t.dtype}; expected {first.dtype}, the dtype of {first_name}")
    if t.device != first.device:
        raise ValueError(f"{name} is on {t.device}; expected {first.device}, the device of {first_name}")
    raise ValueError(f"{name} has shape {list(t.shape)}; expected {list(shape)} for {letters}")


def _contiguous_channels(name: str, x: Tensor) -> None:
    if x.stride(-1) != 1 and x.shape[-1] > 1 and x.numel():  # .contiguous() leaves the strides of an empty tensor
        raise ValueError(f"{name} has stride {x.stride(-1)} in its last dimension; expected 1, as after .contiguous()")


def _contiguous(name: str, t: Tensor, source: str = "as forward returns it") -> None:
    if not t.is_contiguous():
        raise ValueError(f"{name} has strides {list(t.stride())}; expected a contiguous tensor, {source}")


def _parameter(name: str, t: Any, shape: tuple[int, ...], letters: str, x: Tensor) -> None:
    """Refuse what is not a tensor of this shape on the device of x, in its dtype or float32."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} is a {type(t).__name__}; expected a tensor {letters}")
    if t.shape != shape:
        raise ValueError(f"{name} has shape {list(t.shape)}; expected {letters} = {list(shape)}")
    if t.dtype != torch.float32 and t.dtype != x.dtype:
        raise TypeError(f"{name} has dtype {t.dtype}; expected {x.dtype}, the dtype of x, or torch.float32")
    if t.device != x.device:
        raise ValueError(f"{name} is on {t.device}; expected {x.device}, the device of x")
    if t.layout is not torch.strided:
        _refuse_layout(name, t)


def _result(name: str, t: Any, shape: tuple[int, ...], letters: str, dtype: torch.dtype, like: Tensor) -> None:
    """Refuse what is not of the shape, dtype and device of what forward returned, or of the gradient of it."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} is a {type(t).__name__}; expected a tensor {letters} {list(shape)}")
    if t.layout is not torch.strided:
        _refuse_layout(name, t)
    if t.dtype != dtype or t.device != like.device or t.shape != shape:
        found, expected = (t.dtype, list(t.shape), t.device), (dtype, letters, list(shape), like.device)
        raise ValueError("{} is {} {} on {}; expected {} {} {} on {}".format(name, *found, *expected))


def _weight(x: Tensor, weight: Any) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight is a {type(weight).__name__}; expected a tensor [Cout, Cin, K]")
    shape = weight.shape
    if len(shape) != 3 or shape[1] != x.shape[2] or shape[2] % 2 == 0 or shape[0] < 1:
        expected = f"[Cout, Cin, K] with Cin = {x.shape[2]}, as in x, K odd"
        raise ValueError(f"weight has shape {list(shape)}; expected {expected}")
    _parameter("weight", weight, shape, "[Cout, Cin, K]", x)


def _frames(x: Tensor, height: int, width: int) -> None:
    integer("height", height, 1)
    integer("width", width, 1)
    if x.shape[1] % (height * width):
        raise ValueError(
            f"x has {x.shape[1]} positions; expected a multiple of height * width = {height} * {width}, whole frames"
        )


def _normalisation(x: Tensor, weight: Any, bias: Any, groups: int, prefix: str = "") -> None:
    channels = x.shape[-1]
    integer(f"{prefix}groups", groups)
    if groups < 1 or channels % groups:
        raise ValueError(f"{prefix}groups is {groups}; expected a divisor of the number of channels, {channels}")
    _parameter(f"{prefix}weight", weight, (channels,), "[C]", x)
    _parameter(f"{prefix}bias", bias, (channels,), "[C]", x)


def _film(x: Tensor, scale: Tensor | None, shift: Tensor | None, prefix: str = "") -> None:
    if scale is not None:
        _parameter(f"{prefix}scale", scale, (x.shape[0], x.shape[2]), "[B, C]", x)
    if shift is not None:
        _parameter(f"{prefix}shift", shift, (x.shape[0], x.shape[2]), "[B, C]", x)


def _eps(eps: float) -> None:
    if isinstance(eps, bool) or not isinstance(eps, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"eps is {eps!r}; expected a number")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps is {eps}; expected at least 0, and finite")
