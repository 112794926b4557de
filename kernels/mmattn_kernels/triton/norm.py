# SPDX-License-Identifier: MIT
"""Group normalisation of tokens with FiLM and SiLU behind it (Wu and He, arXiv 1803.08494), forward and backward.

    h = (x - mean) * rstd,  z = (h * weight + bias) * (1 + scale) + shift = (x - mean) * factor + offset,
    out = silu(z) or z

mean and rstd = 1 / sqrt(variance + eps) per batch and group, over the group's channels and all positions. Layout
[B, L, C] with C contiguous; statistics [B, groups, 2] are (mean, rstd) in fp32. Without groups h is x.

A program of the kernels over tokens owns a chunk of positions of a block of channels, and walks it tile by tile. A
reduction leaves partials [B, chunks, 2, C], which one program per batch and group merges in the order of the chunks:
every element has one writer, no atomics, the same bits each time. How many chunks depends on the shape alone. Means
and centred sums of squares are kept, relative to x at the first position, and merged by Chan's rule; what a float
cannot hold of the mean goes into the offset. So a mean far from zero costs no accuracy.

Per batch and channel (mean, factor, offset) are `coefficients` [B, 3, C]. The convolution, whose prologue this is,
uses them, `statistics`, `reduce` and `gradient` too.
"""

import functools
import json
import pathlib

import torch
import triton
import triton.language as tl

from mmattn_kernels.triton import _host

# Changing the batch or the length must not compile anew, not even for a value of 1 or a multiple of 16.
_RUNTIME = ("length", "chunk", "chunks", "eps")


@triton.jit
def pointers(p_base, o_rows, stride, o_c):
    # The only place that multiplies a position by a stride: 64 bits here are 64 bits everywhere.
    return p_base + o_rows.to(tl.int64)[:, None] * stride + o_c[None, :]


@triton.jit
def _chunk(length, channels, chunk, chunks, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr):
    """What a program owns: batch, chunk, its first position, its end, its channels. Neighbours read the same rows."""
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    i_chunk = tl.program_id(0) // channel_blocks
    i_c = tl.program_id(0) % channel_blocks
    i_n = i_chunk % chunks
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    first = i_n * chunk
    return i_chunk // chunks, i_n, first, tl.minimum(first + chunk, length), o_c, o_c < channels


@triton.jit
def sigmoid(x, DTYPE: tl.constexpr):
    """Of x in fp32, for a result that is rounded to DTYPE."""
    if DTYPE.primitive_bitwidth == 32:
        return tl.sigmoid(x)
    else:
        # One instruction each, to 2e-7: the exponential and the division above have eight more around them.
        r = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
        return r * r


@triton.jit
def load_coefficients(coefficients, i_b, channels, o_c, m_c):
    """(mean, factor, offset), each [len(o_c)]."""
    p = coefficients + i_b.to(tl.int64) * 3 * channels + o_c
    b_mean = tl.load(p, mask=m_c, other=0.0)
    b_factor = tl.load(p + channels, mask=m_c, other=0.0)
    return b_mean, b_factor, tl.load(p + 2 * channels, mask=m_c, other=0.0)


@triton.jit
def _store_coefficients(
    coefficients, b_mean, b_rstd, remainder, weight, bias, scale, shift, scale_sb, shift_sb, i_b, channels, o_c, m_c
):
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
    p = coefficients + i_b.to(tl.int64) * 3 * channels + o_c
    tl.store(p, b_mean, mask=m_c)
    tl.store(p + channels, b_factor, mask=m_c)
    tl.store(p + 2 * channels, b_offset, mask=m_c)


@triton.jit(do_not_specialize=_RUNTIME)
def _statistics_kernel(
    x, partials, x_sb, x_sl, length, channels, chunk, chunks, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Per chunk and channel of x - x[:, 0]: the mean, and the sum of squares around it."""
    i_b, i_n, first, end, o_c, m_c = _chunk(length, channels, chunk, chunks, BLOCK_L, BLOCK_C)
    p_x = x + i_b.to(tl.int64) * x_sb
    b_first = tl.load(p_x + o_c, mask=m_c, other=0.0).to(tl.float32)  # [BC]
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
    p_partial = partials + (i_b.to(tl.int64) * chunks + i_n) * 2 * channels + o_c
    tl.store(p_partial, b_merged, mask=m_c)
    tl.store(p_partial + channels, tl.sum(b_squares + b_n * b_d * b_d, 0), mask=m_c)


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
    p_stats = stats + (i_b.to(tl.int64) * groups + i_g) * 2
    tl.store(p_stats, mean)
    tl.store(p_stats + 1, rstd)
    for i_c in range(0, size, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        b_one = tl.full([BLOCK_C], 1.0, tl.float32)
        _store_coefficients(
            coefficients, b_one * mean, b_one * rstd, remainder, weight, bias, scale, shift, scale_sb, shift_sb,
            i_b, channels, i_g * size + o_c, o_c < size,
        )  # fmt: skip


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
        p_stats = stats + (i_b.to(tl.int64) * groups + o_c // (channels // groups)) * 2
        b_mean = tl.load(p_stats, mask=m_c, other=0.0)
        b_rstd = tl.load(p_stats + 1, mask=m_c, other=0.0)
    else:
        b_mean = tl.zeros([BLOCK_C], tl.float32)
        b_rstd = tl.full([BLOCK_C], 1.0, tl.float32)
    _store_coefficients(
        coefficients, b_mean, b_rstd, 0.0, weight, bias, scale, shift, scale_sb, shift_sb, i_b, channels, o_c, m_c
    )


@triton.jit(do_not_specialize=_RUNTIME)
def _forward_kernel(
    x, coefficients, out, x_sb, x_sl, length, channels, chunk, chunks,
    SILU: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i_b, _, first, end, o_c, m_c = _chunk(length, channels, chunk, chunks, BLOCK_L, BLOCK_C)
    p_x = x + i_b.to(tl.int64) * x_sb
    p_out = out + i_b.to(tl.int64) * length * channels
    b_mean, b_factor, b_offset = load_coefficients(coefficients, i_b, channels, o_c, m_c)
    for i_l in range(first, end, BLOCK_L):
        o_l = i_l + tl.arange(0, BLOCK_L)
        m_x = (o_l < end)[:, None] & m_c[None, :]
        b_x = tl.load(pointers(p_x, o_l, x_sl, o_c), mask=m_x, other=0.0).to(tl.float32)  # [BL, BC]
        b_z = (b_x - b_mean[None, :]) * b_factor[None, :] + b_offset[None, :]
        if SILU:
            b_z *= sigmoid(b_z, x.dtype.element_ty)
        tl.store(pointers(p_out, o_l, channels, o_c), b_z.to(out.dtype.element_ty), mask=m_x)


@triton.jit
def _d_z(b_d_out, b_centred, b_factor, b_offset, SILU: tl.constexpr, DTYPE: tl.constexpr):
    """The gradient of z; b_centred is x - mean."""
    if SILU:
        b_z = b_centred * b_factor[None, :] + b_offset[None, :]
        b_sigmoid = sigmoid(b_z, DTYPE)
        return b_d_out * b_sigmoid * (1.0 + b_z * (1.0 - b_sigmoid))
    else:
        return b_d_out


@triton.jit(do_not_specialize=_RUNTIME)
def _backward_sums_kernel(
    d_out, x, coefficients, partials, d_out_sb, d_out_sl, x_sb, x_sl, length, channels, chunk, chunks,
    SILU: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Per chunk and channel: sum dz and sum dz * (x - mean)."""
    i_b, i_n, first, end, o_c, m_c = _chunk(length, channels, chunk, chunks, BLOCK_L, BLOCK_C)
    p_d_out = d_out + i_b.to(tl.int64) * d_out_sb
    p_x = x + i_b.to(tl.int64) * x_sb
    b_mean, b_factor, b_offset = load_coefficients(coefficients, i_b, channels, o_c, m_c)
    b_sum = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
    b_sum_x = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
    for i_l in range(first, end, BLOCK_L):
        o_l = i_l + tl.arange(0, BLOCK_L)
        m_x = (o_l < end)[:, None] & m_c[None, :]
        b_d_out = tl.load(pointers(p_d_out, o_l, d_out_sl, o_c), mask=m_x, other=0.0).to(tl.float32)  # [BL, BC]
        b_x = tl.load(pointers(p_x, o_l, x_sl, o_c), mask=m_x, other=0.0).to(tl.float32)  # [BL, BC]
        b_centred = b_x - b_mean[None, :]
        b_d_z = _d_z(b_d_out, b_centred, b_factor, b_offset, SILU, x.dtype.element_ty)
        b_sum += b_d_z
        b_sum_x += b_d_z * b_centred
    p_partial = partials + (i_b.to(tl.int64) * chunks + i_n) * 2 * channels + o_c
    tl.store(p_partial, tl.sum(b_sum, 0), mask=m_c)
    tl.store(p_partial + channels, tl.sum(b_sum_x, 0), mask=m_c)


@triton.jit(do_not_specialize=_RUNTIME)
def _backward_merge_kernel(
    partials, sums, corrections, stats, weight, scale, scale_sb, length, channels, groups, size, chunks,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sums = (sum dz, sum dz * h) of `size` channels: of one group, or without groups of any.

    For a group also what d_x takes off: rstd * (mean(dh) + h * mean(dh * h)) = (x - mean) * slope + level, the means
    over the group. corrections [B, 2, C] are (slope, level).
    """
    i_b = tl.program_id(0) // groups
    i_g = tl.program_id(0) % groups
    rstd = 1.0
    if stats is not None:
        rstd = tl.load(stats + (i_b.to(tl.int64) * groups + i_g) * 2 + 1)
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
        b_d_z_h = tl.sum(b_sum_x, 0) * rstd  # [BC]
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
        level = rstd * (tl.sum(b_sum_dh) / count)
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
    """d_x = dz * factor - (x - mean) * slope - level; d_x may be d_out."""
    i_b, _, first, end, o_c, m_c = _chunk(length, channels, chunk, chunks, BLOCK_L, BLOCK_C)
    p_d_out = d_out + i_b.to(tl.int64) * d_out_sb
    p_x = x + i_b.to(tl.int64) * x_sb
    p_d_x = d_x + i_b.to(tl.int64) * length * channels
    b_mean, b_factor, b_offset = load_coefficients(coefficients, i_b, channels, o_c, m_c)
    if corrections is not None:
        p_corrections = corrections + i_b.to(tl.int64) * 2 * channels + o_c
        b_slope = tl.load(p_corrections, mask=m_c, other=0.0)
        b_level = tl.load(p_corrections + channels, mask=m_c, other=0.0)
    for i_l in range(first, end, BLOCK_L):
        o_l = i_l + tl.arange(0, BLOCK_L)
        m_x = (o_l < end)[:, None] & m_c[None, :]
        b_d_out = tl.load(pointers(p_d_out, o_l, d_out_sl, o_c), mask=m_x, other=0.0).to(tl.float32)  # [BL, BC]
        b_x = tl.load(pointers(p_x, o_l, x_sl, o_c), mask=m_x, other=0.0).to(tl.float32)  # [BL, BC]
        b_centred = b_x - b_mean[None, :]
        b_d_x = _d_z(b_d_out, b_centred, b_factor, b_offset, SILU, x.dtype.element_ty) * b_factor[None, :]
        if corrections is not None:
            b_d_x -= b_centred * b_slope[None, :] + b_level[None, :]
        tl.store(pointers(p_d_x, o_l, channels, o_c), b_d_x.to(d_x.dtype.element_ty), mask=m_x)


@functools.cache
def _tables():
    return json.loads(pathlib.Path(__file__).with_suffix(".json").read_text())


def _config(kernel, dtype, device_name):
    """Elements of a tile, channels across it, programs worth having, warps and stages of one kernel."""
    return dict(_host.lookup(_tables(), kernel, dtype, device_name))


def _cut(kernel, x):
    """Chunks and blocks of a kernel over tokens, and the rest of its configuration; how many programs that makes."""
    batch, length, channels = x.shape
    config = _config(kernel, x.dtype, _host.device_name(x.device))
    block_c = min(config.pop("BLOCK_C"), triton.next_power_of_2(channels))
    block_l = config.pop("TILE") // block_c
    columns = batch * triton.cdiv(channels, block_c)
    chunk = block_l * triton.cdiv(triton.cdiv(length, block_l), max(config.pop("PROGRAMS") // columns, 1))
    chunks = triton.cdiv(length, chunk)
    cut = {"length": length, "channels": channels, "chunk": chunk, "chunks": chunks}
    return columns * chunks, cut | {"BLOCK_L": block_l, "BLOCK_C": block_c} | config


def _merge_blocks(x, size):
    config = _config("merge", x.dtype, _host.device_name(x.device))
    block_c = min(config.pop("BLOCK_C"), triton.next_power_of_2(size))
    return {"BLOCK_N": config.pop("TILE") // block_c, "BLOCK_C": block_c} | config


def _rows(**tensors):
    """Tensors [B, L, C] and their strides."""
    strides = {f"{name}_s{axis}": t.stride(i) for name, t in tensors.items() for i, axis in enumerate("bl")}
    return tensors | strides


def _parameters(**tensors):
    """Parameters [C] or [B, C], C contiguous, or None, and the batch strides of those named scale and shift."""
    tensors = {name: t if t is None or t.stride(-1) == 1 else t.contiguous() for name, t in tensors.items()}
    film = {name: t for name, t in tensors.items() if name in ("scale", "shift")}
    return tensors | {f"{name}_sb": 0 if t is None else t.stride(0) for name, t in film.items()}


def _partials(x, cut):
    return x.new_empty((x.shape[0], cut["chunks"], 2, x.shape[2]), dtype=torch.float32)


def statistics(x, weight, bias, scale, shift, *, groups, eps):
    """(stats [B, groups, 2], coefficients [B, 3, C]) of x [B, L, C], none of its axes empty."""
    batch, length, channels = x.shape
    programs, cut = _cut("statistics", x)
    partials = _partials(x, cut)
    stats = x.new_empty((batch, groups, 2), dtype=torch.float32)
    affine = x.new_empty((batch, 3, channels), dtype=torch.float32)
    with _host.on_device(x):
        _statistics_kernel[(programs,)](partials=partials, **_rows(x=x), **cut)
        _merge_kernel[(batch * groups,)](
            x=x, x_sb=x.stride(0), partials=partials, stats=stats, coefficients=affine,
            **_parameters(weight=weight, bias=bias, scale=scale, shift=shift),
            length=length, channels=channels, groups=groups, chunk=cut["chunk"], chunks=cut["chunks"], eps=float(eps),
            **_merge_blocks(x, channels // groups),
        )  # fmt: skip
    return stats, affine


def coefficients(x, weight, bias, scale, shift, stats, *, groups):
    """[B, 3, C] for x [B, L, C], as `statistics` returned them; without groups of FiLM alone."""
    batch, _, channels = x.shape
    affine = x.new_empty((batch, 3, channels), dtype=torch.float32)
    block_c = min(256, triton.next_power_of_2(channels))
    with _host.on_device(x):
        _coefficients_kernel[(batch * triton.cdiv(channels, block_c),)](
            stats=stats if groups else None, coefficients=affine,
            **_parameters(weight=weight, bias=bias, scale=scale, shift=shift),
            channels=channels, groups=groups, BLOCK_C=block_c,
        )  # fmt: skip
    return affine


def reduce(d_out, x, weight, scale, stats, affine, *, groups, silu):
    """(sums [B, C, 2], corrections [B, 2, C], without groups None); `affine` as by `coefficients`."""
    batch, length, channels = x.shape
    programs, cut = _cut("backward_sums", x)
    partials = _partials(x, cut)
    sums = x.new_empty((batch, channels, 2), dtype=torch.float32)
    corrections = x.new_empty((batch, 2, channels), dtype=torch.float32) if groups else None
    size = channels // groups if groups else min(channels, 32)
    merges = groups or triton.cdiv(channels, size)
    film = _parameters(weight=weight, scale=scale)
    with _host.on_device(x):
        _backward_sums_kernel[(programs,)](
            coefficients=affine, partials=partials, SILU=silu, **_rows(d_out=d_out, x=x), **cut
        )
        _backward_merge_kernel[(batch * merges,)](
            partials=partials, sums=sums, corrections=corrections, stats=stats if groups else None, **film,
            length=length, channels=channels, groups=merges, size=size, chunks=cut["chunks"], **_merge_blocks(x, size),
        )  # fmt: skip
    return sums, corrections


def gradient(d_out, x, weight, scale, stats, affine, *, groups, silu, d_x):
    """Writes d_x [B, L, C], contiguous, which may be d_out, and returns sums."""
    sums, corrections = reduce(d_out, x, weight, scale, stats, affine, groups=groups, silu=silu)
    programs, cut = _cut("backward", x)
    with _host.on_device(x):
        _backward_kernel[(programs,)](
            coefficients=affine, corrections=corrections, d_x=d_x, SILU=silu, **_rows(d_out=d_out, x=x), **cut
        )
    return sums


def forward(x, weight, bias, scale, shift, *, groups, silu, eps):
    """(out [B, L, C] contiguous, stats [B, groups, 2] fp32 = (mean, rstd)).

    x [B, L, C] in any batch and position strides with C contiguous; weight, bias [C]; scale, shift [B, C] or None.
    Each parameter is in the dtype of x or float32.
    """
    out = x.new_empty(x.shape)
    if not x.numel():
        return out, x.new_empty((x.shape[0], groups, 2), dtype=torch.float32)
    stats, affine = statistics(x, weight, bias, scale, shift, groups=groups, eps=eps)
    programs, cut = _cut("forward", x)
    with _host.on_device(x):
        _forward_kernel[(programs,)](coefficients=affine, out=out, SILU=silu, **_rows(x=x), **cut)
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
