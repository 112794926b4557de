# SPDX-License-Identifier: MIT
"""Attention of segments of queries to ranges of keys, ragged and overlapping as they may be: masks that are `Windows`.

`segmented_attention` is the public function, `reference` its definition in plain torch. The kernels are those of
`random_shift_attention`, one direction of them, with tables in the place of equal segments.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn import functional

from mmattn import _checks, dispatch
from mmattn._directions import AttentionOp
from mmattn._library import all_to_autocast, call
from mmattn.windows import Windows
from mmattn_kernels import Direction, TableWindows


@overload
def segmented_attention(
    q: Tensor, k: Tensor, v: Tensor, windows: Windows, *,
    scale: float | None = None, return_lse: Literal[False] = False, impl: str = "auto",
) -> Tensor: ...  # fmt: skip


@overload
def segmented_attention(
    q: Tensor, k: Tensor, v: Tensor, windows: Windows, *,
    scale: float | None = None, return_lse: Literal[True], impl: str = "auto",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def segmented_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: Windows,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from each segment of queries to its range of keys.

    Equivalent to `softmax(scale * q @ k.T + log(windows.mask())) @ v`, without the mask and without the work that it
    hides; a query with no keys gives 0, and keys that no query reads have gradients of 0.
    On the CPU equal windows give, bit for bit, what `random_shift_attention` and `self_attention` give.

    Args:
        q: [B, Lq, H, D]; any strides as long as D is contiguous, as of k and v.
        k, v: [B, Lk, H, D]; same shape, dtype and device.
        windows: of Lq queries and Lk keys, on the device of q.
        scale: factor on the scores; 1/sqrt(D) if None.
        return_lse: whether to return the log-sum-exp of each query's scores too, for `merge_attention`.
        impl: "auto", "reference", "triton" or "cpu". A named one runs or raises; MMATTN_IMPL in the environment sets
            what "auto" means. Where a GPU has no kernel (other dtypes, D under 16 or over 128), "auto" is "reference",
            there torch's scaled_dot_product_attention with a dense mask if no log-sum-exp is asked for. On a GPU
            nobody checks the values of the tables; what is no range reads some keys of these, and nothing else.

    Returns:
        out [B, Lq, H, D], contiguous, in the dtype of the inputs, or in autocast's dtype under autocast; with
        `return_lse`, (out, lse), lse [B, H, Lq] in float64, natural logarithm, -inf for a query with no keys. Both are
        differentiable, by the kernels once.

    Raises:
        TypeError: on a mix of dtypes, a dtype that is not floating point, or windows that are not `Windows`.
        ValueError: on any other argument outside the ranges above, naming it, its value and what was expected.
        RuntimeError: if the named `impl` cannot run here, with the reason.
    """
    q, k, v = all_to_autocast("qkv", (q, k, v))
    if not isinstance(windows, Windows):
        raise TypeError(f"windows is a {type(windows).__name__}; expected mmattn.Windows")
    arguments = q, k, v, *windows.tables
    if not (known := _checks.is_known(("segmented_attention",), arguments)):
        _checks.segmented_attention(q, k, v, windows.tables)
        _checks.remember(("segmented_attention",), arguments)
    if windows.queries != q.shape[1]:
        raise ValueError(f"windows are of {windows.queries} queries; expected {q.shape[1]}, as q has")
    if windows.keys != k.shape[1]:
        raise ValueError(f"windows are of {windows.keys} keys; expected {k.shape[1]}, as k has")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    chosen = dispatch.choose("segmented_attention", impl, q)
    if chosen == "reference":
        _checks.all_stored(_Arguments._fields[:6], arguments)
        if q.device.type == "cpu" or return_lse:
            out, lse = reference(q, k, v, windows, scale=scale)
        else:
            return masked(q, k, v, windows, scale=scale)
    else:
        out, lse = call("segmented_attention", arguments, *arguments, scale, chosen, known=known)
    return (out, lse) if return_lse else out


def reference(q: Tensor, k: Tensor, v: Tensor, windows: Windows, *, scale: float) -> tuple[Tensor, Tensor]:
    """The definition of `segmented_attention` in plain torch: any device, any float dtype, any order of derivative.

    Makes all scores [B, H, Lq, Lk], those that the mask hides too.
    """
    mask = windows.mask()
    scores = torch.einsum("bqhd,bkhd->bhqk", q * scale, k)
    # Rows of -inf alone would be NaN, and so would their gradients: they are as if they read all, with weights of 0.
    is_read = mask.any(1)
    scores = scores.masked_fill(~(mask | ~is_read[:, None]), -torch.inf)
    weights = scores.softmax(-1) * is_read[:, None].to(scores.dtype)
    lse = scores.double().logsumexp(-1).masked_fill(~is_read, -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).contiguous(), lse


def masked(q: Tensor, k: Tensor, v: Tensor, windows: Windows, *, scale: float) -> Tensor:
    """The same by torch's scaled_dot_product_attention with a dense mask; differentiable as often as that."""
    mask = windows.mask()
    is_read = mask.any(1)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, mask | ~is_read[:, None], scale=scale)
    return (out.transpose(1, 2) * is_read[:, None, None].to(out.dtype)).contiguous()


def merge_attention(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to two sets of keys from the attention to each: a window here and a cache there, for instance.

    Args:
        out, other_out: [B, L, H, D], of the same queries.
        lse, other_lse: [B, H, L], the natural logarithm of the sum of the exponentials of the scores, -inf for none, as
            `segmented_attention` and FlexAttention return it.

    Returns:
        (out [B, L, H, D] in the dtype of `out`, lse [B, H, L]) of the keys of both, which must not overlap; 0 and -inf
        where neither has any. Differentiable.
    """
    if out.shape != other_out.shape or lse.shape != other_lse.shape:
        found = f"{list(other_out.shape)} and {list(other_lse.shape)}"
        raise ValueError(
            f"other_out and other_lse have shapes {found}; expected {list(out.shape)} and {list(lse.shape)}"
        )
    if lse.shape != (out.shape[0], out.shape[2], out.shape[1]):
        raise ValueError(f"lse has shape {list(lse.shape)}; expected [B, H, L] of out, [B, L, H, D] {list(out.shape)}")
    both = torch.stack([lse, other_lse.to(lse.dtype)])
    # Where neither has keys the weights would be NaN, and so would their gradients.
    has_none = both.isneginf().all(0)
    weights = both.masked_fill(has_none, 0.0).softmax(0).masked_fill(has_none, 0.0)
    merged = both.masked_fill(has_none, 0.0).logsumexp(0).masked_fill(has_none, -torch.inf)
    own, others = weights.transpose(2, 3)[..., None]  # [B, L, H, 1]
    return (out * own + other_out * others).to(out.dtype), merged


class _Arguments(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    query_bounds: Tensor
    key_begin: Tensor
    key_length: Tensor
    scale: float
    impl: str

    def check(self) -> None:
        _checks.segmented_attention(self.q, self.k, self.v, self[3:6])

    def directions(self) -> tuple[Direction]:
        return (Direction(self.q, self.k, self.v),)

    def windows(self) -> TableWindows:
        return TableWindows(self.query_bounds, self.key_begin, self.key_length)


_OPTIONS = "Tensor query_bounds, Tensor key_begin, Tensor key_length"
AttentionOp("segmented_attention", _Arguments, ("",), _OPTIONS, has_d_lse=True)
