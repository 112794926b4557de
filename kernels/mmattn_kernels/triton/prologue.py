# SPDX-License-Identifier: MIT
"""What the norm and the prologue of the convolution share: normalisation, FiLM and SiLU as one map per channel.

    y = silu(z) or z,  z = (x - mean) * factor + offset

Per batch and channel (mean, factor, offset) are `coefficients` [B, 3, C] in fp32, of statistics, weight, bias, scale
and shift, or without groups of FiLM alone. The remainder of the mean, what a float cannot hold of it, goes into the
offset.
"""

import torch
import triton
import triton.language as tl

from mmattn_kernels.triton import _host
from mmattn_kernels.triton._device import LOG2_E


@triton.jit
def sigmoid(x, DTYPE: tl.constexpr):
    """Of x in fp32, for a result that is rounded to DTYPE."""
    if DTYPE == tl.float32:  # noqa: SIM300 (a dtype is equal to no constexpr)
        return tl.sigmoid(x)
    else:
        # One instruction each, to 2e-7: the exponential and the division above have eight more around them.
        r = tl.rsqrt(1.0 + tl.exp2(x * -LOG2_E))
        return r * r


@triton.jit
def d_activation(b_d_out, b_centred, b_factor, b_offset, SILU: tl.constexpr, DTYPE: tl.constexpr):
    """The gradient of z; b_centred is x - mean."""
    if SILU:
        b_z = b_centred * b_factor[None, :] + b_offset[None, :]
        b_sigmoid = sigmoid(b_z, DTYPE)
        return b_d_out * b_sigmoid * (1.0 + b_z * (1.0 - b_sigmoid))
    else:
        return b_d_out


@triton.jit
def load_coefficients(coefficients, i_b, channels, o_c, m_c):
    """(mean, factor, offset), each [len(o_c)]."""
    p = coefficients + i_b.to(tl.int64) * 3 * channels + o_c
    b_mean = tl.load(p, mask=m_c, other=0.0)
    b_factor = tl.load(p + channels, mask=m_c, other=0.0)
    return b_mean, b_factor, tl.load(p + 2 * channels, mask=m_c, other=0.0)


@triton.jit
def factor_and_offset(b_rstd, remainder, weight, bias, scale, shift, scale_sb, shift_sb, i_b, o_c, m_c):
    """(factor, offset) of channels; `remainder` is what the mean as a float lacks."""
    b_factor = b_rstd
    b_offset = -remainder * b_rstd
    if weight is not None:
        b_weight = tl.load(weight + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_factor *= b_weight
        b_offset = b_offset * b_weight + tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    if scale is not None:
        b_scale = 1.0 + tl.load(scale + i_b.to(tl.int64) * scale_sb + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_factor *= b_scale
        b_offset *= b_scale
    if shift is not None:
        b_offset += tl.load(shift + i_b.to(tl.int64) * shift_sb + o_c, mask=m_c, other=0.0).to(tl.float32)
    return b_factor, b_offset


@triton.jit
def store_coefficients(coefficients, b_mean, b_factor, b_offset, i_b, channels, o_c, m_c):
    p = coefficients + i_b.to(tl.int64) * 3 * channels + o_c
    tl.store(p, b_mean, mask=m_c)
    tl.store(p + channels, b_factor, mask=m_c)
    tl.store(p + 2 * channels, b_offset, mask=m_c)


@triton.jit
def _coefficients_kernel(
    stats, coefficients, weight, bias, scale, shift, scale_sb, shift_sb, channels, groups, BLOCK_C: tl.constexpr
):
    """The coefficients of a block of channels, from statistics or, without groups, from FiLM alone."""
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    i_b = tl.program_id(0) // channel_blocks
    o_c = tl.program_id(0) % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    if stats is not None:
        p_stats = stats + (i_b.to(tl.int64) * groups + o_c // (channels // groups)) * 3
        b_mean = tl.load(p_stats, mask=m_c, other=0.0)
        b_rstd = tl.load(p_stats + 1, mask=m_c, other=0.0)
        b_remainder = tl.load(p_stats + 2, mask=m_c, other=0.0)
    else:
        b_mean = tl.zeros([BLOCK_C], tl.float32)
        b_rstd = tl.full([BLOCK_C], 1.0, tl.float32)
        b_remainder = tl.zeros([BLOCK_C], tl.float32)
    b_factor, b_offset = factor_and_offset(
        b_rstd, b_remainder, weight, bias, scale, shift, scale_sb, shift_sb, i_b, o_c, m_c
    )
    store_coefficients(coefficients, b_mean, b_factor, b_offset, i_b, channels, o_c, m_c)


@_host.cached
def _coefficients_plan(shape, strides, groups, device):
    batch, _, channels = shape
    block_c = min(256, triton.next_power_of_2(channels))
    fixed = *strides, channels, groups
    return _host.Launch(_coefficients_kernel, batch * triton.cdiv(channels, block_c), fixed, {"BLOCK_C": block_c})


def dense(parameter):
    """A parameter [C] or [B, C], or None, with C contiguous."""
    return parameter if parameter is None or parameter.stride(-1) == 1 else parameter.contiguous()


def film_of(scale, shift):
    """scale and shift, C contiguous, and their batch strides."""
    scale, shift = dense(scale), dense(shift)
    return (scale, shift), (0 if scale is None else scale.stride(0), 0 if shift is None else shift.stride(0))


def coefficients(x, weight, bias, scale, shift, stats, *, groups):
    """[B, 3, C] for x [B, L, C], as `norm.statistics` returned them; without groups of FiLM alone."""
    batch, _, channels = x.shape
    affine = x.new_empty((batch, 3, channels), dtype=torch.float32)
    film, strides = film_of(scale, shift)
    launch = _coefficients_plan(x.shape, strides, groups, x.device)
    with _host.on_device(x):
        launch(stats if groups else None, affine, dense(weight), dense(bias), *film)
    return affine
