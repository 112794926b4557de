# SPDX-License-Identifier: MIT
"""How close is close: comparisons used by our tests, and by whoever embeds the ops.

A tolerance chosen by hand either hides a fault or fails on another machine. Here it comes from plain torch itself: an
implementation may be twice as far from fp64 as the same computation by plain torch in the same dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`, in fp64; 0 where both are zero.

    Raises:
        AssertionError: if the shapes differ, or `actual` holds a NaN or an infinity.
    """
    _check(actual, expected, "actual")
    actual, expected = actual.detach().double(), expected.detach().double()
    difference, size = (actual - expected).norm(), expected.norm()
    return float(difference / size) if difference else 0.0


def assert_close_to_fp64(
    actual: Tensor,
    exact: Tensor,
    plain: Tensor,
    *,
    name: str = "actual",
    factor: float = 2.0,
    rounding: float = 1.0,
    absolute: float = 1e-6,
) -> None:
    """Assert that `actual` is about as close to `exact` as `plain` is.

    Both in the norm and at the worst element: error <= factor * (error of plain) + band. The band is one number for
    luck in plain's rounding, `rounding` * eps(dtype of actual) * (size of exact), and one for values that cancel:

    Args:
        actual: the result under test, of any float dtype.
        exact: the same computation in fp64, on the same inputs.
        plain: the same computation by plain torch, in the dtype of `actual`.
        name: what to call `actual` in the message.
        factor: how many times plain's error is allowed.
        rounding: how many roundings of the result are allowed besides; at the worst element, twice as many.
        absolute: error allowed in an element whatever its size, for sums of terms of order 1 that cancel, such as the
            gradient of a softmax over one key. At the worst element, ten times as much.

    Raises:
        AssertionError: with the error and what was allowed; if the shapes differ; on a NaN or an infinity.
    """
    _check(actual, exact, name)
    _check(plain, exact, "plain")
    if not actual.numel():
        return
    exact = exact.double()
    error, plain_error = (actual.double() - exact).abs(), (plain.double() - exact).abs()
    eps = torch.finfo(actual.dtype).eps
    norm_limit = factor * plain_error.norm() + rounding * eps * exact.norm() + absolute * exact.numel() ** 0.5
    assert error.norm() <= norm_limit, (
        f"{name}: the error against fp64 has norm {error.norm():.3e}, allowed {norm_limit:.3e}; "
        f"plain torch {plain_error.norm():.3e}, exact {exact.norm():.3e}"
    )
    worst_limit = factor * plain_error.max() + 2 * rounding * eps * exact.abs().max() + 10 * absolute
    assert error.max() <= worst_limit, (
        f"{name}: the largest error against fp64 is {error.max():.3e} at "
        f"{[int(i) for i in torch.unravel_index(error.argmax(), error.shape)]}, allowed {worst_limit:.3e}; "
        f"plain torch {plain_error.max():.3e}, exact {exact.abs().max():.3e}"
    )


def _check(actual: Tensor, expected: Tensor, name: str) -> None:
    assert actual.shape == expected.shape, f"{name} has shape {list(actual.shape)}; expected {list(expected.shape)}"
    finite = torch.isfinite(actual)
    assert finite.all(), f"{name}: {int((~finite).sum())} of {actual.numel()} elements are NaN or infinite"
