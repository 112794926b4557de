# SPDX-License-Identifier: MIT
"""Dilated 1-D convolution of tokens, with normalisation, FiLM and SiLU in front of it, forward and backward.

    out[b, l, o] = bias[o] + residual[b, l, o] + sum_{k, c} weight[o, c, k] * y[b, l + (k - K//2) * dilation, c]

y is 0 outside 0 .. L-1, and inside what prologue.py makes of x: (x - mean) * factor + offset and SiLU in fp32,
rounded to the dtype of x. Layout [B, L, C] with C contiguous. A weight [Cout, Cin, K] is read in the dtype of x and
with Cin contiguous, as it is where K = 1 or its memory is [Cout, K, Cin]; any other is copied in each call.

`_convolve_kernel` is an implicit matrix product over taps and input channels: a program owns BLOCK_M positions of
BLOCK_N output channels, no columns. Where K = 1 and there are no more channels out than in, it applies the prologue to
each tile of x as it loads it; elsewhere each tap and block of output channels would compute it again, which takes
longer than writing y. The gradient of y is the same product of d_out, with the taps reversed and the weight's channels
exchanged; norm.py turns it into that of x. `_backward_weight_kernel` owns BLOCK_M x BLOCK_N output and input channels
of one tap over a range of positions, and `_merge_weight_kernel` adds up the ranges in their order. Every element has
one writer: no atomics, the same bits each time. Sums are fp32. Where K = 1 and there is nothing around it, the product
is torch's.
"""

import math

import torch
import triton
import triton.language as tl

from mmattn_kernels import Support
from mmattn_kernels.triton import _host, norm, prologue
from mmattn_kernels.triton._device import pointers
from mmattn_kernels.triton.prologue import load_coefficients, sigmoid

# Changing the batch, the length or the dilation must not compile anew, not even for a value of 1 or a multiple of 16.
_RUNTIME = ("length", "dilation", "tiles", "blocks", "chunk", "splits")


@triton.jit
def _load(p_x, m_l, coefficients, i_b, o_c, channels, SILU: tl.constexpr):
    """Rows of y, [len(m_l), len(o_c)], in the dtype of x; what y is where x is 0, where masked."""
    m_c = o_c < channels
    b_x = tl.load(p_x, mask=m_l[:, None] & m_c[None, :], other=0.0)
    if coefficients is None and not SILU:
        return b_x
    else:
        b_y = b_x.to(tl.float32)
        if coefficients is not None:
            # Past the last channel all three are 0, and so is y.
            b_mean, b_factor, b_offset = load_coefficients(coefficients, i_b, channels, o_c, m_c)
            b_y = (b_y - b_mean[None, :]) * b_factor[None, :] + b_offset[None, :]
        if SILU:
            b_y *= sigmoid(b_y, b_x.dtype)
        return b_y.to(b_x.dtype)


@triton.jit(do_not_specialize=_RUNTIME)
def _convolve_kernel(
    x, weight, bias, residual, coefficients, out, x_sb, x_sl, residual_sb, residual_sl,
    weight_sn, weight_sk, weight_st, length, in_channels, out_channels, dilation, tiles,
    TAPS: tl.constexpr, REVERSED: tl.constexpr, SILU: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # The zeros outside follow the prologue, so with one there is no outside.
    tl.static_assert(TAPS == 1 or (coefficients is None and not SILU))
    # Neighbours read the same positions.
    blocks_n = tl.cdiv(out_channels, BLOCK_N)
    i_n = tl.program_id(0) % blocks_n
    i_m = tl.program_id(0) // blocks_n % tiles
    i_b = tl.program_id(0) // blocks_n // tiles
    first = i_m * BLOCK_M
    o_m = first + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < out_channels
    # The taps that reach a position of the sequence from anywhere in the tile: the middle one, and some around it.
    tap = tl.maximum(TAPS // 2 - (tl.minimum(first + BLOCK_M, length) - 1) // dilation, 0)
    taps = tl.minimum(TAPS // 2 + (length - 1 - first) // dilation, TAPS - 1) - tap + 1
    # Rows are multiplied by strides here, once; from block to block the pointers move by what is one number for all.
    o_k = tl.arange(0, BLOCK_K)
    p_x = pointers(x + i_b.to(tl.int64) * x_sb, o_m, x_sl, o_k)
    # The weight is read along its contiguous axis: that of the backward's `out` channels is the weight's `in`.
    if REVERSED:
        p_w = weight + o_k[:, None] * weight_sk + o_n[None, :] * weight_sn  # [BK, BN]
    else:
        p_w = weight + o_n[:, None] * weight_sn + o_k[None, :] * weight_sk  # [BN, BK]

    # What is added begins the sum: behind it, it would need registers of its own.
    m_out = (o_m < length)[:, None] & m_n[None, :]
    b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if residual is not None:
        p_residual = residual + i_b.to(tl.int64) * residual_sb
        b_acc += tl.load(pointers(p_residual, o_m, residual_sl, o_n), mask=m_out, other=0.0).to(tl.float32)
    if bias is not None:
        b_acc += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    i_tap = tap
    i_k = 0
    for _ in range(0, taps * tl.cdiv(in_channels, BLOCK_K)):
        offset = (i_tap - TAPS // 2) * dilation
        m_l = (o_m + offset >= 0) & (o_m + offset < length)
        p_y = p_x + (offset.to(tl.int64) * x_sl + i_k)
        b_y = _load(p_y, m_l, coefficients, i_b, i_k + o_k, in_channels, SILU)  # [BM, BK]
        m_k = i_k + o_k < in_channels
        p_tap = p_w + i_k * weight_sk
        if TAPS > 1:  # else its stride is 1, which would hide that rows are aligned
            p_tap += (TAPS - 1 - i_tap if REVERSED else i_tap) * weight_st
        if REVERSED:
            b_w = tl.load(p_tap, mask=m_k[:, None] & m_n[None, :], other=0.0)
        else:
            b_w = tl.trans(tl.load(p_tap, mask=m_n[:, None] & m_k[None, :], other=0.0))
        b_acc = tl.dot(b_y, b_w, b_acc, input_precision=PRECISION)
        is_last = i_tap == tap + taps - 1
        i_tap = tl.where(is_last, tap, i_tap + 1)
        i_k += tl.where(is_last, BLOCK_K, 0)
    p_out = out + i_b.to(tl.int64) * length * out_channels
    tl.store(pointers(p_out, o_m, out_channels, o_n), b_acc.to(out.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=_RUNTIME)
def _backward_weight_kernel(
    d_out, y, partials, d_out_sb, d_out_sl, y_sb, y_sl,
    length, in_channels, out_channels, dilation, tiles, blocks, chunk,
    TAPS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partials [splits, TAPS, Cout, Cin]: each over `chunk` of the blocks of BLOCK_K positions of all batches."""
    blocks_n = tl.cdiv(in_channels, BLOCK_N)
    blocks_m = tl.cdiv(out_channels, BLOCK_M)
    i_n = tl.program_id(0) % blocks_n
    i_m = tl.program_id(0) // blocks_n % blocks_m
    i_tap = tl.program_id(0) // blocks_n // blocks_m % TAPS
    i_split = tl.program_id(0) // blocks_n // blocks_m // TAPS
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = o_m < out_channels
    b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(i_split * chunk, tl.minimum((i_split + 1) * chunk, blocks)):
        i_b = (i // tiles).to(tl.int64)
        o_k = i % tiles * BLOCK_K + tl.arange(0, BLOCK_K)
        o_l = o_k + (i_tap - TAPS // 2) * dilation
        m_k = (o_k < length) & (o_l >= 0) & (o_l < length)
        p_d_out = pointers(d_out + i_b * d_out_sb, o_k, d_out_sl, o_m)
        b_d_out = tl.load(p_d_out, mask=m_k[:, None] & m_m[None, :], other=0.0)  # [BK, BM]
        m_y = m_k[:, None] & (o_n < in_channels)[None, :]
        b_y = tl.load(pointers(y + i_b * y_sb, o_l, y_sl, o_n), mask=m_y, other=0.0)  # [BK, BN]
        b_acc = tl.dot(tl.trans(b_d_out), b_y, b_acc, input_precision=PRECISION)
    o_w = (i_split * TAPS + i_tap).to(tl.int64) * out_channels + o_m
    tl.store(pointers(partials, o_w, in_channels, o_n), b_acc, mask=m_m[:, None] & (o_n < in_channels)[None, :])


@triton.jit(do_not_specialize=_RUNTIME)
def _merge_weight_kernel(
    partials, d_weight, in_channels, out_channels, splits,
    TAPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """d_weight [Cout, Cin, TAPS]: the sum of the partials."""
    numel = TAPS * out_channels * in_channels
    o_w = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_w = o_w < numel
    b_sum = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for i in range(0, splits, BLOCK_N):
        o_s = i + tl.arange(0, BLOCK_N)
        m = (o_s < splits)[:, None] & m_w[None, :]
        b_sum += tl.load(pointers(partials, o_s, numel, o_w), mask=m, other=0.0)  # [BN, BC]
    o_oc = o_w % (out_channels * in_channels)
    tl.store(d_weight + o_oc * TAPS + o_w // (out_channels * in_channels), tl.sum(b_sum, 0), mask=m_w)


# Blocks, warps and stages by the number of output channels: of "backward_weight", or of the convolution: "taps", or
# "pointwise" where K = 1, which has more around the product.
_config = _host.Configurations(__file__, sizes=(64, 512))


def _fit(config, **channels):
    """No block wider than its channels, nor narrower than a matrix instruction."""
    return config | {name: min(config[name], max(16, triton.next_power_of_2(n))) for name, n in channels.items()}


def _dense(weight, dtype):
    """A weight [Cout, Cin, K] with Cin contiguous in memory and in this dtype: itself, or a copy."""
    if weight.dtype == dtype and weight.stride(1) == 1:
        return weight
    out_channels, in_channels, taps = weight.shape
    return weight.new_empty((taps, out_channels, in_channels), dtype=dtype).permute(1, 2, 0).copy_(weight)


@_host.cached
def _plan(shape, strides, weight_shape, weight_strides, dtype, device, dilation, silu, is_reversed, precision):
    """The launch of the convolution of x [B, L, Cin], by a weight [Cout, Cin, K] with all strides."""
    batch, length, in_channels = shape
    out_channels, _, taps = weight_shape
    if math.prod(weight_shape) >= 2**31:
        raise ValueError(f"weight has shape {list(weight_shape)}; expected fewer than 2^31 elements")
    config = _config("taps" if taps > 1 else "pointwise", dtype, _host.device_name(device), out_channels)
    config = _fit(config, BLOCK_N=out_channels, BLOCK_K=in_channels)
    tiles = triton.cdiv(length, config["BLOCK_M"])
    fixed = *strides, *weight_strides, length, in_channels, out_channels, dilation, tiles
    constants = {"TAPS": taps, "REVERSED": is_reversed, "SILU": silu, "PRECISION": precision} | config
    programs = batch * tiles * triton.cdiv(out_channels, config["BLOCK_N"])
    return _host.Launch(_convolve_kernel, programs, fixed, constants)


def _convolve(x, weight, bias, residual, affine, out, *, dilation, silu, is_reversed=False):
    """out = bias + residual + convolution, by a dense weight."""
    strides = *x.stride()[:2], *((0, 0) if residual is None else residual.stride()[:2])
    launch = _plan(
        x.shape, strides, weight.shape, weight.stride(), x.dtype, x.device, dilation, silu, is_reversed,
        _host.precision(x.dtype),
    )  # fmt: skip
    with _host.on_device(x):
        launch(x, weight, None if bias is None else bias.contiguous(), residual, affine, out)


def _multiply(y, weight, out, bias=None):
    """out [B, L, N] = bias + y @ weight, of [K, N] and in any dtype, by torch."""
    weight = weight.to(y.dtype)
    if bias is None:
        torch.matmul(y, weight, out=out)
    elif y.is_contiguous():
        torch.addmm(bias.to(y.dtype), y.flatten(0, 1), weight, out=out.flatten(0, 1))
    else:
        torch.matmul(y, weight, out=out).add_(bias)


@_host.cached
def _weight_plan(shape, weight_shape, strides, dtype, device, dilation, precision):
    """The launches of the partial sums and of their merge, and the number of parts."""
    batch, length, in_channels = shape
    out_channels, _, taps = weight_shape
    config = _config("backward_weight", dtype, _host.device_name(device), out_channels)
    programs = config.pop("PROGRAMS")
    config = _fit(config, BLOCK_M=out_channels, BLOCK_N=in_channels)
    owners = taps * triton.cdiv(out_channels, config["BLOCK_M"]) * triton.cdiv(in_channels, config["BLOCK_N"])
    tiles = triton.cdiv(length, config["BLOCK_K"])
    chunk = triton.cdiv(batch * tiles, max(programs // owners, 1))
    splits = triton.cdiv(batch * tiles, chunk)
    fixed = *strides, length, in_channels, out_channels, dilation, tiles, batch * tiles, chunk
    partial = _host.Launch(
        _backward_weight_kernel, owners * splits, fixed, {"TAPS": taps, "PRECISION": precision} | config
    )
    block_c = 128
    merges = triton.cdiv(out_channels * in_channels * taps, block_c)
    constants = {"TAPS": taps, "BLOCK_N": 16, "BLOCK_C": block_c}
    return partial, _host.Launch(_merge_weight_kernel, merges, (in_channels, out_channels, splits), constants), splits


def _weight_gradient(d_out, y, d_weight, *, dilation):
    strides = *d_out.stride()[:2], *y.stride()[:2]
    partial, merge, splits = _weight_plan(
        y.shape, d_weight.shape, strides, y.dtype, y.device, dilation, _host.precision(y.dtype)
    )
    out_channels, in_channels, taps = d_weight.shape
    partials = y.new_empty((splits, taps, out_channels, in_channels), dtype=torch.float32)
    with _host.on_device(y):
        partial(d_out, y, partials)
        merge(partials, d_weight)


def supports(question):
    """Any number of channels."""
    return Support()


def forward(x, weight, bias, norm_weight, norm_bias, scale, shift, residual, *, groups, dilation, silu, eps):
    """(out [B, L, Cout] contiguous, stats [B, groups, 3] fp32 as in norm.py).

    x [B, L, Cin], residual [B, L, Cout] or None, in any batch and position strides with C contiguous; weight
    [Cout, Cin, K], K odd; bias [Cout] or None. norm_weight, norm_bias [Cin], None without groups; scale, shift [B, Cin]
    or None. Each parameter is in the dtype of x or float32.
    """
    batch, length, in_channels = x.shape
    out_channels, _, taps = weight.shape
    out = x.new_empty((batch, length, out_channels))
    stats = x.new_empty((batch, groups, 3), dtype=torch.float32)
    if not x.numel():
        return out, stats
    affine, film = None, (scale, shift)
    is_unfused = taps > 1 or out_channels > in_channels
    if groups and is_unfused:
        x, stats = norm.forward(x, norm_weight, norm_bias, *film, groups=groups, silu=silu, eps=eps)
    elif groups:
        stats, affine = norm.statistics(x, norm_weight, norm_bias, *film, groups=groups, eps=eps)
    elif silu or scale is not None or shift is not None:
        affine = prologue.coefficients(x, None, None, *film, None, groups=0)
        if is_unfused:
            x, affine = norm.apply(x, affine, silu=silu), None
    if taps == 1 and affine is None and residual is None:
        _multiply(x, weight[:, :, 0].mT, out, bias)
    else:
        silu = silu and affine is not None
        _convolve(x, _dense(weight, x.dtype), bias, residual, affine, out, dilation=dilation, silu=silu)
    return out, stats


def backward(
    d_out, x, weight, norm_weight, norm_bias, scale, shift, stats,
    *, groups, dilation, silu, need_x, need_weight, need_bias,
):  # fmt: skip
    """(d_x contiguous as x, d_weight, d_bias fp32, sums [B, Cin, 2] as in norm.py, if need_x and there is a prologue).

    What is not needed is empty, of shape (0,). stats are forward's.
    """
    has_prologue = bool(groups) or scale is not None or shift is not None or silu
    d_x = x.new_empty(x.shape if need_x else (0,))
    d_weight = x.new_empty(weight.shape if need_weight else (0,), dtype=torch.float32)
    d_bias = x.new_empty(weight.shape[:1] if need_bias else (0,), dtype=torch.float32)
    sums = x.new_empty((x.shape[0], x.shape[2], 2) if need_x and has_prologue else (0,), dtype=torch.float32)
    if not x.numel():
        return d_x, d_weight.zero_(), d_bias.zero_(), sums
    affine = None
    if has_prologue and (need_x or need_weight):
        affine = prologue.coefficients(x, norm_weight, norm_bias, scale, shift, stats, groups=groups)
    if need_weight:
        # y lives no longer than this call.
        _weight_gradient(d_out, norm.apply(x, affine, silu=silu) if has_prologue else x, d_weight, dilation=dilation)
    if need_bias:
        torch.sum(d_out, (0, 1), dtype=torch.float32, out=d_bias)
    if need_x:
        if weight.shape[2] == 1:
            _multiply(d_out, weight[:, :, 0], d_x)
        else:
            flipped = _dense(weight, x.dtype).transpose(0, 1)
            _convolve(d_out, flipped, None, None, None, d_x, dilation=dilation, silu=False, is_reversed=True)
        if has_prologue:
            sums = norm.gradient(d_x, x, norm_weight, scale, stats, affine, groups=groups, silu=silu, d_x=d_x)
    return d_x, d_weight, d_bias, sums
