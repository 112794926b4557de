# SPDX-License-Identifier: MIT
"""Group normalisation of tokens with FiLM and SiLU behind it (Wu and He, arXiv 1803.08494), forward and backward.

    h = (x - mean) * rstd,  z = (h * weight + bias) * (1 + scale) + shift = (x - mean) * factor + offset,
    out = silu(z) or z

mean and rstd = 1 / sqrt(variance + eps) per batch and group, over the group's channels and all positions. Layout
[B, L, C] with C contiguous; statistics [B, groups, 3] are (mean, rstd, remainder) in fp32, the last what a float cannot
hold of the mean. Without groups h is x.

A program of the kernels over tokens owns a chunk of positions of a block of channels, and walks it tile by tile. A
reduction leaves partials [B, chunks, 2, C], which one program per batch and group merges in the order of the chunks:
every element has one writer, no atomics, the same bits each time. How many chunks depends on the shape alone. Means
and centred sums of squares are kept, relative to x at the first position, and merged by Chan's rule; the remainder of
the mean goes into the offset. So a mean far from zero costs no accuracy.

Short sequences are launches more than anything else: for them the single-launch kernels own all positions of a block of
whole groups, and do all steps in one launch, the second reading of the tokens out of the cache.

Per batch and channel (mean, factor, offset) are the coefficients [B, 3, C] of prologue.py. The convolution, whose
prologue this is, uses `statistics`, `apply` and `gradient` too.
"""

import math

import torch
import triton
import triton.language as tl

from mmattn_kernels import Support
from mmattn_kernels.triton import _host
from mmattn_kernels.triton._device import pointers
from mmattn_kernels.triton.prologue import (
    coefficients,
    d_activation,
    dense,
    factor_and_offset,
    film_of,
    load_coefficients,
    sigmoid,
    store_coefficients,
)

# Changing the batch or the length must not compile anew, not even for a value of 1 or a multiple of 16.
_RUNTIME = ("length", "chunk", "chunks", "eps")


@triton.jit
def _chunk(length, channels, chunk, chunks, BLOCK_C: tl.constexpr, REVERSED: tl.constexpr = False):
    """What a program owns: batch, chunk, its first position, its end, its channels. Neighbours read the same rows.

    A kernel that reads what another has just read goes the other way: the end of it is in the cache still.
    """
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    pid = tl.num_programs(0) - 1 - tl.program_id(0) if REVERSED else tl.program_id(0)
    i_chunk = pid // channel_blocks
    i_c = pid % channel_blocks
    i_n = i_chunk % chunks
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    first = i_n * chunk
    return i_chunk // chunks, i_n, first, tl.minimum(first + chunk, length), o_c, o_c < channels


@triton.jit
def _moments(p_x, x_sl, b_first, first, end, o_c, m_c, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of x - b_first over the positions first .. end - 1: the mean, and the sum of squares around it, each [BC]."""
    o_r = tl.arange(0, BLOCK_L)
    # Each element of the tile keeps the statistics of its own positions: nothing crosses threads before the end.
    b_mean = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
    b_squares = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
    for i in range(0, tl.cdiv(end - first, BLOCK_L)):
        o_l = first + i * BLOCK_L + o_r
        m_x = (o_l < end)[:, None] & m_c[None, :]
        b_x = tl.load(pointers(p_x, o_l, x_sl, o_c), mask=m_x, other=0.0).to(tl.float32)  # [BL, BC]
        b_d = tl.where(m_x, b_x - b_first[None, :] - b_mean, 0.0)
        share = 1.0 / (i + 1)
        b_mean += b_d * share
        b_squares += b_d * b_d * (1.0 - share)
    b_n = tl.cdiv(tl.maximum(end - first - o_r, 0), BLOCK_L).to(tl.float32)[:, None]  # [BL, 1]
    b_merged = tl.sum(b_n * b_mean, 0) / (end - first).to(tl.float32)  # [BC]
    b_d = b_mean - b_merged[None, :]
    return b_merged, tl.sum(b_squares + b_n * b_d * b_d, 0)


@triton.jit(do_not_specialize=_RUNTIME)
def _statistics_kernel(
    x, partials, x_sb, x_sl, length, channels, chunk, chunks, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Per chunk and channel of x - x[:, 0]: the mean, and the sum of squares around it."""
    i_b, i_n, first, end, o_c, m_c = _chunk(length, channels, chunk, chunks, BLOCK_C)
    p_x = x + i_b.to(tl.int64) * x_sb
    b_first = tl.load(p_x + o_c, mask=m_c, other=0.0).to(tl.float32)  # [BC]
    b_mean, b_squares = _moments(p_x, x_sl, b_first, first, end, o_c, m_c, BLOCK_L, BLOCK_C)
    p_partial = partials + (i_b.to(tl.int64) * chunks + i_n) * 2 * channels + o_c
    tl.store(p_partial, b_mean, mask=m_c)
    tl.store(p_partial + channels, b_squares, mask=m_c)


@triton.jit
def _load_partials(
    p_partials, p_first, first, i_n, i_c, size, length, channels, chunk, chunks,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Numbers of positions, 0 where masked, means relative to `first`, and sums of squares, of chunks and channels."""
    o_n = i_n + tl.arange(0, BLOCK_N)
    o_c = i_c + tl.arange(0, BLOCK_C)
    m = (o_n < chunks)[:, None] & (o_c < size)[None, :]
    b_n = tl.where(m, tl.minimum(chunk, length - o_n * chunk).to(tl.float32)[:, None], 0.0)  # [BN, BC]
    p_mean = pointers(p_partials, o_n, 2 * channels, o_c)
    b_first = tl.load(p_first + o_c, mask=o_c < size, other=0.0).to(tl.float32)  # [BC]
    b_mean = tl.load(p_mean, mask=m, other=0.0) + (b_first - first)[None, :]  # [BN, BC]
    return b_n, b_mean, tl.load(p_mean + channels, mask=m, other=0.0)


@triton.jit(do_not_specialize=_RUNTIME)
def _merge_kernel(
    x, partials, stats, coefficients, weight, bias, scale, shift, x_sb, scale_sb, shift_sb,
    length, channels, groups, chunk, chunks, eps,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The statistics of one batch and group, and the coefficients of its channels."""
    i_b = tl.program_id(0) // groups
    i_g = tl.program_id(0) % groups
    size = channels // groups
    p_partials = partials + i_b.to(tl.int64) * chunks * 2 * channels + i_g * size
    p_first = x + i_b.to(tl.int64) * x_sb + i_g * size
    first = tl.load(p_first).to(tl.float32)
    count = length.to(tl.float32) * size
    # Chan's rule: the mean of the means, then squares within the chunks and between them.
    b_sum = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for i_n in range(0, chunks, BLOCK_N):
        for i_c in range(0, size, BLOCK_C):
            b_n, b_mean, _ = _load_partials(
                p_partials, p_first, first, i_n, i_c, size, length, channels, chunk, chunks, BLOCK_N, BLOCK_C
            )
            b_sum += b_n * b_mean
    deviation = tl.sum(b_sum) / count
    b_sum = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for i_n in range(0, chunks, BLOCK_N):
        for i_c in range(0, size, BLOCK_C):
            b_n, b_mean, b_squares = _load_partials(
                p_partials, p_first, first, i_n, i_c, size, length, channels, chunk, chunks, BLOCK_N, BLOCK_C
            )
            b_d = b_mean - deviation
            b_sum += b_squares + b_n * b_d * b_d
    mean = first + deviation
    remainder = first - mean + deviation
    rstd = 1.0 / tl.sqrt(tl.sum(b_sum) / count + eps)
    p_stats = stats + (i_b.to(tl.int64) * groups + i_g) * 3
    tl.store(p_stats, mean)
    tl.store(p_stats + 1, rstd)
    tl.store(p_stats + 2, remainder)
    for i_c in range(0, size, BLOCK_C):
        o_c = i_g * size + i_c + tl.arange(0, BLOCK_C)
        m_c = o_c < (i_g + 1) * size
        b_one = tl.full([BLOCK_C], 1.0, tl.float32)
        b_factor, b_offset = factor_and_offset(
            b_one * rstd, remainder, weight, bias, scale, shift, scale_sb, shift_sb, i_b, o_c, m_c
        )
        store_coefficients(coefficients, b_one * mean, b_factor, b_offset, i_b, channels, o_c, m_c)


@triton.jit
def _apply(
    p_x, p_out, x_sl, first, end, b_mean, b_factor, b_offset, channels, o_c, m_c,
    SILU: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    for i_l in range(first, end, BLOCK_L):
        o_l = i_l + tl.arange(0, BLOCK_L)
        m_x = (o_l < end)[:, None] & m_c[None, :]
        b_x = tl.load(pointers(p_x, o_l, x_sl, o_c), mask=m_x, other=0.0).to(tl.float32)  # [BL, BC]
        b_z = (b_x - b_mean[None, :]) * b_factor[None, :] + b_offset[None, :]
        if SILU:
            b_z *= sigmoid(b_z, p_out.dtype.element_ty)
        tl.store(pointers(p_out, o_l, channels, o_c), b_z.to(p_out.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=_RUNTIME)
def _forward_kernel(
    x, coefficients, out, x_sb, x_sl, length, channels, chunk, chunks,
    SILU: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i_b, _, first, end, o_c, m_c = _chunk(length, channels, chunk, chunks, BLOCK_C, True)
    p_x = x + i_b.to(tl.int64) * x_sb
    p_out = out + i_b.to(tl.int64) * length * channels
    b_mean, b_factor, b_offset = load_coefficients(coefficients, i_b, channels, o_c, m_c)
    _apply(p_x, p_out, x_sl, first, end, b_mean, b_factor, b_offset, channels, o_c, m_c, SILU, BLOCK_L)


@triton.jit
def _groups(channels, OWN: tl.constexpr, BLOCK_C: tl.constexpr):
    """Batch and channels of a program that owns OWN channels, whole groups, of a block of BLOCK_C."""
    blocks = tl.cdiv(channels, OWN)
    o_own = tl.arange(0, BLOCK_C)
    o_c = tl.program_id(0) % blocks * OWN + o_own
    return tl.program_id(0) // blocks, o_c, (o_own < OWN) & (o_c < channels)


@triton.jit
def _over_group(b_x, o_c, size):
    """For each channel the sum of b_x [BC] over its group."""
    m_same = (o_c // size)[:, None] == (o_c // size)[None, :]
    return tl.sum(tl.where(m_same, b_x[None, :], 0.0), 1)


@triton.jit(do_not_specialize=_RUNTIME)
def _single_launch_kernel(
    x, out, stats, coefficients, weight, bias, scale, shift, x_sb, x_sl, scale_sb, shift_sb,
    length, channels, size, eps,
    SILU: tl.constexpr, OWN: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Statistics of groups of `size` channels, their coefficients if given a place, and the output if given one."""
    i_b, o_c, m_c = _groups(channels, OWN, BLOCK_C)
    p_x = x + i_b.to(tl.int64) * x_sb
    b_first = tl.load(p_x + o_c, mask=m_c, other=0.0).to(tl.float32)  # [BC]
    b_mean, b_squares = _moments(p_x, x_sl, b_first, 0, length, o_c, m_c, BLOCK_L, BLOCK_C)
    # Chan's rule over the channels, relative to the first of the group.
    b_origin = _over_group(tl.where(o_c % size == 0, b_first, 0.0), o_c, size)
    b_mean += b_first - b_origin
    b_deviation = _over_group(b_mean, o_c, size) / size
    b_d = b_mean - b_deviation
    count = length.to(tl.float32) * size
    b_rstd = 1.0 / tl.sqrt(_over_group(b_squares + length * b_d * b_d, o_c, size) / count + eps)
    b_mean = b_origin + b_deviation
    b_remainder = b_origin - b_mean + b_deviation
    p_stats = stats + (i_b.to(tl.int64) * (channels // size) + o_c // size) * 3
    m_stats = m_c & (o_c % size == 0)
    tl.store(p_stats, b_mean, mask=m_stats)
    tl.store(p_stats + 1, b_rstd, mask=m_stats)
    tl.store(p_stats + 2, b_remainder, mask=m_stats)
    b_factor, b_offset = factor_and_offset(
        b_rstd, b_remainder, weight, bias, scale, shift, scale_sb, shift_sb, i_b, o_c, m_c
    )
    if coefficients is not None:
        store_coefficients(coefficients, b_mean, b_factor, b_offset, i_b, channels, o_c, m_c)
    if out is not None:
        p_out = out + i_b.to(tl.int64) * length * channels
        _apply(p_x, p_out, x_sl, 0, length, b_mean, b_factor, b_offset, channels, o_c, m_c, SILU, BLOCK_L)


@triton.jit
def _sums(
    p_d_out, p_x, d_out_sl, x_sl, first, end, b_mean, b_factor, b_offset, o_c, m_c,
    SILU: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Over the positions first .. end - 1: sum dz and sum dz * (x - mean), each [BC]."""
    b_sum = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
    b_sum_x = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
    for i_l in range(first, end, BLOCK_L):
        o_l = i_l + tl.arange(0, BLOCK_L)
        m_x = (o_l < end)[:, None] & m_c[None, :]
        b_d_out = tl.load(pointers(p_d_out, o_l, d_out_sl, o_c), mask=m_x, other=0.0).to(tl.float32)  # [BL, BC]
        b_x = tl.load(pointers(p_x, o_l, x_sl, o_c), mask=m_x, other=0.0).to(tl.float32)  # [BL, BC]
        b_centred = b_x - b_mean[None, :]
        b_d_z = d_activation(b_d_out, b_centred, b_factor, b_offset, SILU, p_x.dtype.element_ty)
        b_sum += b_d_z
        b_sum_x += b_d_z * b_centred
    return tl.sum(b_sum, 0), tl.sum(b_sum_x, 0)


@triton.jit
def _propagate(
    p_d_out, p_x, p_d_x, d_out_sl, x_sl, first, end, b_mean, b_factor, b_offset, b_slope, b_level, channels, o_c, m_c,
    SILU: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """d_x = dz * factor - (x - mean) * slope - level."""
    for i_l in range(first, end, BLOCK_L):
        o_l = i_l + tl.arange(0, BLOCK_L)
        m_x = (o_l < end)[:, None] & m_c[None, :]
        b_d_out = tl.load(pointers(p_d_out, o_l, d_out_sl, o_c), mask=m_x, other=0.0).to(tl.float32)  # [BL, BC]
        b_x = tl.load(pointers(p_x, o_l, x_sl, o_c), mask=m_x, other=0.0).to(tl.float32)  # [BL, BC]
        b_centred = b_x - b_mean[None, :]
        b_d_x = d_activation(b_d_out, b_centred, b_factor, b_offset, SILU, p_x.dtype.element_ty) * b_factor[None, :]
        if b_slope is not None:
            b_d_x -= b_centred * b_slope[None, :] + b_level[None, :]
        tl.store(pointers(p_d_x, o_l, channels, o_c), b_d_x.to(p_d_x.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=_RUNTIME)
def _backward_sums_kernel(
    d_out, x, coefficients, partials, d_out_sb, d_out_sl, x_sb, x_sl, length, channels, chunk, chunks,
    SILU: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Per chunk and channel: sum dz and sum dz * (x - mean)."""
    i_b, i_n, first, end, o_c, m_c = _chunk(length, channels, chunk, chunks, BLOCK_C)
    p_d_out = d_out + i_b.to(tl.int64) * d_out_sb
    p_x = x + i_b.to(tl.int64) * x_sb
    b_mean, b_factor, b_offset = load_coefficients(coefficients, i_b, channels, o_c, m_c)
    b_sum, b_sum_x = _sums(
        p_d_out, p_x, d_out_sl, x_sl, first, end, b_mean, b_factor, b_offset, o_c, m_c, SILU, BLOCK_L, BLOCK_C
    )
    p_partial = partials + (i_b.to(tl.int64) * chunks + i_n) * 2 * channels + o_c
    tl.store(p_partial, b_sum, mask=m_c)
    tl.store(p_partial + channels, b_sum_x, mask=m_c)


@triton.jit(do_not_specialize=_RUNTIME)
def _backward_merge_kernel(
    partials, sums, corrections, stats, weight, scale, scale_sb, length, channels, groups, size, chunks,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sums = (sum dz, sum dz * h) of `size` channels: of one group, or without groups of any.

    For a group also what d_x takes off: rstd * (mean(dh) + h * mean(dh * h)) = (x - mean) * slope + level, the means
    over the group, h of the mean with its remainder. corrections [B, 2, C] are (slope, level).
    """
    i_b = tl.program_id(0) // groups
    i_g = tl.program_id(0) % groups
    rstd = 1.0
    remainder = 0.0
    if stats is not None:
        p_stats = stats + (i_b.to(tl.int64) * groups + i_g) * 3
        rstd = tl.load(p_stats + 1)
        remainder = tl.load(p_stats + 2)
    p_partials = partials + i_b.to(tl.int64) * chunks * 2 * channels
    b_sum_dh = tl.zeros([BLOCK_C], tl.float32)
    b_sum_dh_h = tl.zeros([BLOCK_C], tl.float32)
    for i_c in range(0, size, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        m_c = (o_c < size) & (i_g * size + o_c < channels)
        o_c += i_g * size
        b_sum = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        b_sum_x = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        for i_n in range(0, chunks, BLOCK_N):
            o_n = i_n + tl.arange(0, BLOCK_N)
            m = (o_n < chunks)[:, None] & m_c[None, :]
            p_sum = pointers(p_partials, o_n, 2 * channels, o_c)
            b_sum += tl.load(p_sum, mask=m, other=0.0)  # [BN, BC]
            b_sum_x += tl.load(p_sum + channels, mask=m, other=0.0)  # [BN, BC]
        b_d_z = tl.sum(b_sum, 0)  # [BC]
        b_d_z_h = (tl.sum(b_sum_x, 0) - b_d_z * remainder) * rstd  # [BC]
        p_sums = sums + (i_b.to(tl.int64) * channels + o_c) * 2
        tl.store(p_sums, b_d_z, mask=m_c)
        tl.store(p_sums + 1, b_d_z_h, mask=m_c)
        if stats is not None:
            b_gain = tl.load(weight + o_c, mask=m_c, other=0.0).to(tl.float32)
            if scale is not None:
                p_scale = scale + i_b.to(tl.int64) * scale_sb + o_c
                b_gain *= 1.0 + tl.load(p_scale, mask=m_c, other=0.0).to(tl.float32)
            b_sum_dh += b_d_z * b_gain
            b_sum_dh_h += b_d_z_h * b_gain
    if stats is not None:
        count = length.to(tl.float32) * size
        slope = rstd * rstd * (tl.sum(b_sum_dh_h) / count)
        level = rstd * (tl.sum(b_sum_dh) / count) - remainder * slope
        for i_c in range(0, size, BLOCK_C):
            o_c = i_c + tl.arange(0, BLOCK_C)
            p_corrections = corrections + i_b.to(tl.int64) * 2 * channels + i_g * size + o_c
            b_one = tl.full([BLOCK_C], 1.0, tl.float32)
            tl.store(p_corrections, b_one * slope, mask=o_c < size)
            tl.store(p_corrections + channels, b_one * level, mask=o_c < size)


@triton.jit(do_not_specialize=_RUNTIME)
def _backward_kernel(
    d_out, x, coefficients, corrections, d_x, d_out_sb, d_out_sl, x_sb, x_sl, length, channels, chunk, chunks,
    SILU: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """d_x may be d_out."""
    i_b, _, first, end, o_c, m_c = _chunk(length, channels, chunk, chunks, BLOCK_C, True)
    p_d_out = d_out + i_b.to(tl.int64) * d_out_sb
    p_x = x + i_b.to(tl.int64) * x_sb
    p_d_x = d_x + i_b.to(tl.int64) * length * channels
    b_mean, b_factor, b_offset = load_coefficients(coefficients, i_b, channels, o_c, m_c)
    b_slope = None
    b_level = None
    if corrections is not None:
        p_corrections = corrections + i_b.to(tl.int64) * 2 * channels + o_c
        b_slope = tl.load(p_corrections, mask=m_c, other=0.0)
        b_level = tl.load(p_corrections + channels, mask=m_c, other=0.0)
    _propagate(
        p_d_out, p_x, p_d_x, d_out_sl, x_sl, first, end, b_mean, b_factor, b_offset, b_slope, b_level, channels,
        o_c, m_c, SILU, BLOCK_L,
    )  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME)
def _backward_single_launch_kernel(
    d_out, x, coefficients, stats, weight, scale, sums, d_x, d_out_sb, d_out_sl, x_sb, x_sl, scale_sb,
    length, channels, size, SILU: tl.constexpr, OWN: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sums and d_x, which may be d_out, of groups of `size` channels."""
    i_b, o_c, m_c = _groups(channels, OWN, BLOCK_C)
    p_d_out = d_out + i_b.to(tl.int64) * d_out_sb
    p_x = x + i_b.to(tl.int64) * x_sb
    b_mean, b_factor, b_offset = load_coefficients(coefficients, i_b, channels, o_c, m_c)
    b_sum, b_sum_x = _sums(
        p_d_out, p_x, d_out_sl, x_sl, 0, length, b_mean, b_factor, b_offset, o_c, m_c, SILU, BLOCK_L, BLOCK_C
    )
    p_stats = stats + (i_b.to(tl.int64) * (channels // size) + o_c // size) * 3
    b_rstd = tl.load(p_stats + 1, mask=m_c, other=0.0)
    b_remainder = tl.load(p_stats + 2, mask=m_c, other=0.0)
    b_sum_x -= b_sum * b_remainder
    p_sums = sums + (i_b.to(tl.int64) * channels + o_c) * 2
    tl.store(p_sums, b_sum, mask=m_c)
    tl.store(p_sums + 1, b_sum_x * b_rstd, mask=m_c)
    b_gain = tl.load(weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    if scale is not None:
        b_gain *= 1.0 + tl.load(scale + i_b.to(tl.int64) * scale_sb + o_c, mask=m_c, other=0.0).to(tl.float32)
    count = length.to(tl.float32) * size
    b_slope = b_rstd * b_rstd * b_rstd * (_over_group(b_sum_x * b_gain, o_c, size) / count)
    b_level = b_rstd * (_over_group(b_sum * b_gain, o_c, size) / count) - b_remainder * b_slope
    p_d_x = d_x + i_b.to(tl.int64) * length * channels
    _propagate(
        p_d_out, p_x, p_d_x, d_out_sl, x_sl, 0, length, b_mean, b_factor, b_offset, b_slope, b_level, channels,
        o_c, m_c, SILU, BLOCK_L,
    )  # fmt: skip


# Elements of a tile, channels across it, programs worth having, warps and stages of one kernel.
_config = _host.Configurations(__file__)

_OVER_TOKENS = {
    "statistics": _statistics_kernel, "forward": _forward_kernel,
    "backward_sums": _backward_sums_kernel, "backward": _backward_kernel,
}  # fmt: skip


@_host.cached
def _plan(name, shape, strides, dtype, device, **constants):
    """The launch of a kernel over tokens, and its chunk and number of chunks."""
    batch, length, channels = shape
    config = _config(name, dtype, _host.device_name(device))
    block_c = min(config.pop("BLOCK_C"), triton.next_power_of_2(channels))
    block_l = config.pop("TILE") // block_c
    columns = batch * triton.cdiv(channels, block_c)
    chunk = block_l * triton.cdiv(triton.cdiv(length, block_l), max(config.pop("PROGRAMS") // columns, 1))
    chunks = triton.cdiv(length, chunk)
    fixed = *strides, length, channels, chunk, chunks
    constants |= {"BLOCK_L": block_l, "BLOCK_C": block_c} | config
    return _host.Launch(_OVER_TOKENS[name], columns * chunks, fixed, constants), chunk, chunks


def _merge_blocks(size, dtype, device):
    config = _config("merge", dtype, _host.device_name(device))
    block_c = min(config.pop("BLOCK_C"), triton.next_power_of_2(size))
    return {"BLOCK_N": config.pop("TILE") // block_c, "BLOCK_C": block_c} | config


@_host.cached
def _merge_plan(shape, strides, groups, chunk, chunks, eps, dtype, device):
    batch, length, channels = shape
    fixed = *strides, length, channels, groups, chunk, chunks, eps
    return _host.Launch(_merge_kernel, batch * groups, fixed, _merge_blocks(channels // groups, dtype, device))


@_host.cached
def _backward_merge_plan(shape, scale_sb, groups, chunks, dtype, device):
    batch, length, channels = shape
    size = channels // groups if groups else min(channels, 32)
    merges = groups or triton.cdiv(channels, size)
    fixed = scale_sb, length, channels, merges, size, chunks
    return _host.Launch(_backward_merge_kernel, batch * merges, fixed, _merge_blocks(size, dtype, device))


@_host.cached
def _single_launch_plan(shape, strides, groups, dtype, device, silu, eps=None):
    """The launch that does everything, backward without eps; None where the sequence is long, or a group wide."""
    batch, length, channels = shape
    config = _config("single_launch", dtype, _host.device_name(device))
    positions = config.pop("POSITIONS")
    block_c = min(config.pop("BLOCK_C"), triton.next_power_of_2(channels))
    size = channels // groups if groups else channels
    if not groups or length > positions or size > block_c:
        return None
    # Blocks that begin at a multiple of 8 channels are read 16 bytes at a time.
    unit = math.lcm(size, 8)
    own = block_c // unit * unit or block_c // size * size
    fixed = *strides, length, channels, size, *(() if eps is None else (eps,))
    constants = {"SILU": silu, "OWN": own, "BLOCK_L": config.pop("TILE") // block_c, "BLOCK_C": block_c} | config
    kernel = _backward_single_launch_kernel if eps is None else _single_launch_kernel
    return _host.Launch(kernel, batch * triton.cdiv(channels, own), fixed, constants)


def statistics(x, weight, bias, scale, shift, *, groups, eps):
    """(stats [B, groups, 3], coefficients [B, 3, C]) of x [B, L, C], none of its axes empty."""
    batch, _, channels = x.shape
    film, film_strides = film_of(scale, shift)
    parameters = dense(weight), dense(bias), *film
    stats = x.new_empty((batch, groups, 3), dtype=torch.float32)
    affine = x.new_empty((batch, 3, channels), dtype=torch.float32)
    at = x.dtype, x.device
    single_launch = _single_launch_plan(x.shape, (*x.stride()[:2], *film_strides), groups, *at, False, float(eps))
    if single_launch is not None:
        with _host.on_device(x):
            single_launch(x, None, stats, affine, *parameters)
        return stats, affine
    launch, chunk, chunks = _plan("statistics", x.shape, x.stride()[:2], *at)
    merge = _merge_plan(x.shape, (x.stride(0), *film_strides), groups, chunk, chunks, float(eps), *at)
    partials = x.new_empty((batch, chunks, 2, channels), dtype=torch.float32)
    with _host.on_device(x):
        launch(x, partials)
        merge(x, partials, stats, affine, *parameters)
    return stats, affine


def apply(x, affine, *, silu):
    """The output [B, L, C], contiguous, by coefficients."""
    out = x.new_empty(x.shape)
    launch, _, _ = _plan("forward", x.shape, x.stride()[:2], x.dtype, x.device, SILU=silu)
    with _host.on_device(x):
        launch(x, affine, out)
    return out


def gradient(d_out, x, weight, scale, stats, affine, *, groups, silu, d_x):
    """Writes d_x [B, L, C], contiguous, which may be d_out, and returns sums [B, C, 2]; `affine` are coefficients."""
    batch, _, channels = x.shape
    sums = x.new_empty((batch, channels, 2), dtype=torch.float32)
    (scale, _), (scale_sb, _) = film_of(scale, None)
    strides = *d_out.stride()[:2], *x.stride()[:2]
    single_launch = _single_launch_plan(x.shape, (*strides, scale_sb), groups, x.dtype, x.device, silu)
    if single_launch is not None:
        with _host.on_device(x):
            single_launch(d_out, x, affine, stats, dense(weight), scale, sums, d_x)
        return sums
    at = x.shape, strides, x.dtype, x.device
    sum_up, _, chunks = _plan("backward_sums", *at, SILU=silu)
    partials = x.new_empty((batch, chunks, 2, channels), dtype=torch.float32)
    corrections = x.new_empty((batch, 2, channels), dtype=torch.float32) if groups else None
    merge = _backward_merge_plan(x.shape, scale_sb, groups, chunks, x.dtype, x.device)
    launch, _, _ = _plan("backward", *at, SILU=silu)
    with _host.on_device(x):
        sum_up(d_out, x, affine, partials)
        merge(partials, sums, corrections, stats if groups else None, dense(weight), scale)
        launch(d_out, x, affine, corrections, d_x)
    return sums


def supports(question):
    """Any number of channels."""
    return Support()


def forward(x, weight, bias, scale, shift, *, groups, silu, eps):
    """(out [B, L, C] contiguous, stats [B, groups, 3] fp32 = (mean, rstd, remainder)).

    x [B, L, C] in any batch and position strides with C contiguous; weight, bias [C]; scale, shift [B, C] or None.
    Each parameter is in the dtype of x or float32.
    """
    stats = x.new_empty((x.shape[0], groups, 3), dtype=torch.float32)
    if not x.numel():
        return x.new_empty(x.shape), stats
    film, strides = film_of(scale, shift)
    single_launch = _single_launch_plan(
        x.shape, (*x.stride()[:2], *strides), groups, x.dtype, x.device, silu, float(eps)
    )
    if single_launch is None:
        stats, affine = statistics(x, weight, bias, *film, groups=groups, eps=eps)
        return apply(x, affine, silu=silu), stats
    out = x.new_empty(x.shape)
    with _host.on_device(x):
        single_launch(x, out, stats, None, dense(weight), dense(bias), *film)
    return out, stats


def backward(d_out, x, weight, bias, scale, shift, stats, *, groups, silu):
    """(d_x [B, L, C] contiguous, sums [B, C, 2] fp32 = (sum dz, sum dz * h) over L); stats are forward's.

    With groups = 0, weight, bias and stats are not read and h is x.
    """
    d_x = x.new_empty(x.shape)
    if not x.numel():
        return d_x, x.new_empty((x.shape[0], x.shape[2], 2), dtype=torch.float32)
    affine = coefficients(x, weight, bias, scale, shift, stats, groups=groups)
    return d_x, gradient(d_out, x, weight, scale, stats, affine, groups=groups, silu=silu, d_x=d_x)
