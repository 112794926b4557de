# SPDX-License-Identifier: MIT
"""Attention along a list of directions: what all attention ops of mmattn are to torch, and what they run.

A direction is the queries of one stream against windows of keys and values, those of another stream or its own. The
directions of a call share batch, heads, windows and scale, and are computed by one launch: `random_shift_attention` is
two of them, `self_attention` one.

Each public function is an op of its own over this one implementation. One op of lists of tensors would be worse:
autograd tracks no tensor in a list, a refusal could not name the argument, and a profile not the function.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from mmattn import _checks, dispatch
from mmattn._library import below_autograd, count_flops, gradients_of, register, register_autograd
from mmattn_kernels import CircularWindows, Direction, Windows


class Arguments(Protocol):
    """Those of an op, a named tuple: q, k and v of each stream, then what its schema adds, then scale and impl."""

    @property
    def scale(self) -> float: ...

    @property
    def impl(self) -> str: ...

    def check(self) -> None:
        """Refuse what the kernels must not get."""

    def directions(self) -> tuple[Direction, ...]:
        """In the order of the streams, whose queries they are."""

    def windows(self) -> Windows:
        """Of all directions."""


class AttentionOp:
    """Registers `mmattn::{name}` and `mmattn::{name}_backward`.

    Args:
        name: of the public function.
        arguments: the class of its `Arguments`.
        streams: what begins the names of the tensors of each stream, such as "video_" of video_q.
        options: the schema between the tensors and scale.
        is_packed: the gradients are one tensor [B, L, 3, H, D], as a projection to q, k and v wants them.
        has_d_lse: the log-sum-exps are results as the outputs are, so backward takes their gradients, where they have.
    """

    def __init__(
        self,
        name: str,
        arguments: type[Any],
        streams: tuple[str, ...],
        options: str,
        *,
        is_packed: bool = False,
        has_d_lse: bool = False,
    ) -> None:
        self._name, self._arguments, self._streams = name, arguments, streams
        self._is_packed, self.has_d_lse = is_packed, has_d_lse
        self._tensors = arguments._fields[: 3 * len(streams)]
        tensors, options = _schema(*self._tensors), f"{options}, float scale, str impl"
        d_out, out, lse = (tuple(form.format(stream) for stream in streams) for form in ("d_{}out", "{}out", "{}lse"))
        self._result_names = tuple(zip(d_out, out, lse, (f"{stream}q" for stream in streams), strict=True))
        results = ", ".join(["Tensor"] * 2 * len(streams))
        gradients = "Tensor" if is_packed else f"({', '.join(['Tensor'] * len(self._tensors))})"
        torch.library.define(f"mmattn::{name}", f"({tensors}, {options}) -> ({results})")
        given = _schema(*d_out, *self._tensors, *out, *lse)
        if has_d_lse:
            given = f"{given}, {', '.join(f'Tensor? d_{name}' for name in lse)}"
        torch.library.define(f"mmattn::{name}_backward", f"({given}, {options}) -> {gradients}")
        register(name, self._check, self._compute, self._check_gradients, self._compute_gradients)
        torch.library.register_fake(f"mmattn::{name}", self._fake)
        torch.library.register_fake(f"mmattn::{name}_backward", self._fake_gradients)
        register_autograd(name, _function(self, gradients_of(name)))
        count_flops(name, self._flops, self._gradient_flops)

    def split(self, args: tuple[Any, ...]) -> tuple[Any, Any, Any, Any]:
        """d_out, out and (lse, d_lse) of each stream and the op's own arguments, from those of the backward op."""
        n, m = len(self._streams), len(self._tensors)
        end = m + (4 if self.has_d_lse else 3) * n
        own = self._arguments._make((*args[n : n + m], *args[end:]))
        d_lse = args[m + 3 * n : end] or (None,) * n
        lse = tuple(zip(args[m + 2 * n : m + 3 * n], d_lse, strict=True))
        return args[:n], args[n + m : m + 2 * n], lse, own

    def results(self, saved: tuple[Any, ...]) -> tuple[Any, ...]:
        """The outputs among tensors, outputs and log-sum-exps."""
        return saved[len(self._tensors) : len(self._tensors) + len(self._streams)]

    def options(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The op's arguments behind its tensors."""
        return args[len(self._tensors) :]

    def tensors(self, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        return args[: len(self._tensors)]

    def _check(self, *args: Any) -> None:
        self._arguments._make(args).check()

    def _check_gradients(self, *args: Any) -> None:
        d_out, out, lse, own = self.split(args)
        own.check()
        for at, (direction, names) in enumerate(zip(own.directions(), self._result_names, strict=True)):
            _checks.attention_results(names, (d_out[at], out[at], *lse[at]), direction.q)

    def _compute(self, *args: Any) -> tuple[Tensor, ...]:
        own = self._arguments._make(args)
        forward = dispatch.kernels(self._name, own.impl, args[0]).forward
        out, lse = forward(own.directions(), own.windows(), own.scale)
        return *out, *lse

    def _compute_gradients(self, *args: Any) -> Any:
        d_out, out, lse, own = self.split(args)
        gradients, of_tensors = self._empty_gradients(own)
        places = self._arguments._make((*of_tensors, *self.options(own))).directions()
        backward = dispatch.kernels(self._name, own.impl, own[0]).backward
        log_sum_exps, d_log_sum_exps = zip(*lse, strict=True)
        given = own.directions(), d_out, out, log_sum_exps, own.windows(), own.scale, places
        backward(*given, *([d_log_sum_exps] if self.has_d_lse else []))
        return gradients

    def _empty_gradients(self, own: Any) -> tuple[Any, tuple[Tensor, ...]]:
        """What the backward op returns, and the gradient of each tensor therein."""
        if self._is_packed:
            batch, length, heads, dim = own[0].shape
            packed = own[0].new_empty((batch, length, 3, heads, dim))
            return packed, packed.unbind(2)
        gradients = tuple([torch.empty_like(t, memory_format=torch.contiguous_format) for t in self.tensors(own)])
        return gradients, gradients

    def _fake(self, *args: Any) -> tuple[Tensor, ...]:
        self._check(*args)
        queries = [q for q, _, _ in self._arguments._make(args).directions()]
        log_sum_exps = [q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float64) for q in queries]
        return *(q.new_empty(q.shape) for q in queries), *log_sum_exps

    def _fake_gradients(self, *args: Any) -> Any:
        self._check_gradients(*args)
        return self._empty_gradients(self.split(args)[3])[0]

    def _flops(self, *args: Any, products: int = 2, **_: Any) -> int:
        own = self._arguments._make(args)
        windows = own.windows()
        total = 0
        for (batch, queries, heads, dim), k, _v in own.directions():
            # What tables hold is no shape: all keys are counted, as of torch's own attention with a mask.
            of_equal = isinstance(windows, CircularWindows)
            keys = windows.size * (k[1] // windows.segments) if of_equal else k[1]
            total += products * 2 * batch * heads * queries * keys * dim
        return total

    def _gradient_flops(self, *args: Any, **_: Any) -> int:
        return self._flops(*self.split(args)[3], products=5)  # scores again, then dV, dP, dQ, dK


def _schema(*names: str) -> str:
    return ", ".join(f"Tensor {name}" for name in names)


def _function(op: AttentionOp, gradients: Any) -> type[torch.autograd.Function]:
    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *args: Any) -> tuple[Tensor, ...]:
            results = below_autograd(op._name, keyset, *args)
            tensors, options = op.tensors(args), op.options(args)
            ctx.options = [None if isinstance(option, Tensor) else option for option in options]
            ctx.save_for_backward(*tensors, *results, *(t if isinstance(t, Tensor) else None for t in options))
            if not op.has_d_lse:
                ctx.mark_non_differentiable(*results[len(results) // 2 :])
            ctx.set_materialize_grads(False)
            return results

        @staticmethod
        def backward(ctx: Any, *d_results: Tensor | None) -> tuple[Any, ...]:
            saved = ctx.saved_tensors  # once: checkpointing refuses a second look
            count = len(ctx.options)
            options = [t if o is None else o for t, o in zip(saved[-count:], ctx.options, strict=True)]
            out = op.results(saved)
            d_out = [torch.zeros_like(o) if d is None else d for o, d in zip(out, d_results, strict=False)]
            d_lse = [d if d is None else d.contiguous() for d in d_results[len(out) :]] if op.has_d_lse else []
            d_tensors: Any = gradients(*d_out, *saved[:-count], *d_lse, *options)
            d_tensors = d_tensors.unbind(2) if isinstance(d_tensors, Tensor) else d_tensors
            return None, *d_tensors, *[None] * count

    return Attention
