# SPDX-License-Identifier: MIT
"""Dilated 1-D convolution of tokens, with normalisation, FiLM and SiLU in front of it, forward and backward.

    out[b, l, o] = bias[o] + residual[b, l, o] + sum_{k, c} weight[o, c, k] * y[b, l + (k - K//2) * dilation, c]

y = prologue(x) is 0 outside 0 .. L-1; the prologue is that of norm.py, (x - mean) * factor + offset and SiLU in fp32,
rounded to the dtype of x. Layout [B, L, C] with C contiguous, and weights [taps, to, from] in the dtype of x, packed in
each call: [Cout, Cin, K] would be read one element in K.

`_convolve_kernel` is an implicit matrix product over taps and input channels: a program owns BLOCK_M positions of
BLOCK_N output channels, and applies the prologue to each tile of x as it loads it. No y, no columns. The gradient of y
is the same product of d_out, with the taps reversed and the weight's channels exchanged; norm.py turns it into that of
x. `_backward_weight_kernel` owns BLOCK_M x BLOCK_N output and input channels of one tap over a range of positions, and
`_merge_weight_kernel` adds up the ranges in their order. Every element has one writer: no atomics, the same bits each
time. Sums are fp32.
"""

import functools
import json
import pathlib

import torch
import triton
import triton.language as tl

from mmattn_kernels.triton import _host, norm
from mmattn_kernels.triton.norm import load_coefficients, pointers, sigmoid

# Changing the batch, the length or the dilation must not compile anew, not even for a value of 1 or a multiple of 16.
_RUNTIME = ("length", "dilation", "tiles", "blocks", "chunk", "splits")


@triton.jit
def _load(p_x, m_l, coefficients, i_b, o_c, channels, SILU: tl.constexpr, PADDED: tl.constexpr):
    """Rows of y, [len(m_l), len(o_c)], in the dtype of x. Masked ones are 0 if PADDED, else what y is where x is 0."""
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
            if PADDED:
                # One multiplication; a choice between rounded values takes two instructions an element.
                b_y *= m_l.to(tl.float32)[:, None]
        if SILU:
            b_y *= sigmoid(b_y, b_x.dtype)
        return b_y.to(b_x.dtype)


@triton.jit(do_not_specialize=_RUNTIME)
def _convolve_kernel(
    x, weight, bias, residual, coefficients, out, x_sb, x_sl, residual_sb, residual_sl,
    length, in_channels, out_channels, dilation, tiles,
    TAPS: tl.constexpr, REVERSED: tl.constexpr, SILU: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
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
    p_w = pointers(weight, o_n, in_channels, o_k)

    b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    i_tap = tap
    i_k = 0
    for _ in range(0, taps * tl.cdiv(in_channels, BLOCK_K)):
        offset = (i_tap - TAPS // 2) * dilation
        m_l = (o_m + offset >= 0) & (o_m + offset < length)
        p_y = p_x + (offset.to(tl.int64) * x_sl + i_k)
        b_y = _load(p_y, m_l, coefficients, i_b, i_k + o_k, in_channels, SILU, True)  # [BM, BK]
        i_w = (TAPS - 1 - i_tap if REVERSED else i_tap).to(tl.int64) * out_channels
        m_w = m_n[:, None] & (i_k + o_k < in_channels)[None, :]
        b_w = tl.load(p_w + (i_w * in_channels + i_k), mask=m_w, other=0.0)  # [BN, BK]
        b_acc = tl.dot(b_y, tl.trans(b_w), b_acc, input_precision=PRECISION)
        is_last = i_tap == tap + taps - 1
        i_tap = tl.where(is_last, tap, i_tap + 1)
        i_k += tl.where(is_last, BLOCK_K, 0)
    m_out = (o_m < length)[:, None] & m_n[None, :]
    if bias is not None:
        b_acc += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        p_residual = residual + i_b.to(tl.int64) * residual_sb
        b_acc += tl.load(pointers(p_residual, o_m, residual_sl, o_n), mask=m_out, other=0.0).to(tl.float32)
    p_out = out + i_b.to(tl.int64) * length * out_channels
    tl.store(pointers(p_out, o_m, out_channels, o_n), b_acc.to(out.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=_RUNTIME)
def _backward_weight_kernel(
    d_out, x, coefficients, partials, d_out_sb, d_out_sl, x_sb, x_sl,
    length, in_channels, out_channels, dilation, tiles, blocks, chunk,
    TAPS: tl.constexpr, SILU: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
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
        p_y = pointers(x + i_b * x_sb, o_l, x_sl, o_n)
        # Where that is masked, d_out is 0.
        b_y = _load(p_y, m_k, coefficients, i_b, o_n, in_channels, SILU, False)  # [BK, BN]
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


@functools.cache
def _tables():
    return json.loads(pathlib.Path(__file__).with_suffix(".json").read_text())


def _config(kernel, channels, dtype, device_name):
    """Blocks, warps and stages by the number of output channels: of "backward_weight", or of the convolution, which
    with a "prologue" holds more in registers than the "plain" one.
    """
    bucket = str(min(max(triton.next_power_of_2(channels), 64), 512))
    return dict(_host.lookup(_tables(), kernel, dtype, device_name, bucket))


def _fit(config, **channels):
    """No block wider than its channels, nor narrower than a matrix instruction."""
    return config | {name: min(config[name], max(16, triton.next_power_of_2(n))) for name, n in channels.items()}


def _pack(weight, dtype):
    """[Cout, Cin, K] as [K, Cout, Cin]."""
    return weight.to(dtype).permute(2, 0, 1).contiguous()


def _convolve(x, weight, bias, residual, affine, out, *, dilation, silu, is_reversed):
    """out = bias + residual + convolution, with a packed weight."""
    batch, length, in_channels = x.shape
    taps, out_channels, _ = weight.shape
    name = "plain" if affine is None and not silu else "prologue"
    config = _config(name, out_channels, x.dtype, _host.device_name(x.device))
    config = _fit(config, BLOCK_N=out_channels, BLOCK_K=in_channels)
    tiles = triton.cdiv(length, config["BLOCK_M"])
    residual_sb, residual_sl = (0, 0) if residual is None else residual.stride()[:2]
    with _host.on_device(x):
        _convolve_kernel[(batch * tiles * triton.cdiv(out_channels, config["BLOCK_N"]),)](
            x=x, weight=weight, bias=None if bias is None else bias.contiguous(), residual=residual,
            coefficients=affine, out=out, x_sb=x.stride(0), x_sl=x.stride(1),
            residual_sb=residual_sb, residual_sl=residual_sl,
            length=length, in_channels=in_channels, out_channels=out_channels,
            # Taps farther than L read zeros, however far.
            dilation=min(dilation, length), tiles=tiles,
            TAPS=taps, REVERSED=is_reversed, SILU=silu, PRECISION=_host.precision(x.dtype), **config,
        )  # fmt: skip


def _weight_gradient(d_out, x, affine, d_weight, *, dilation, silu):
    batch, length, in_channels = x.shape
    out_channels, _, taps = d_weight.shape
    config = _config("backward_weight", out_channels, x.dtype, _host.device_name(x.device))
    programs = config.pop("PROGRAMS")
    config = _fit(config, BLOCK_M=out_channels, BLOCK_N=in_channels)
    owners = taps * triton.cdiv(out_channels, config["BLOCK_M"]) * triton.cdiv(in_channels, config["BLOCK_N"])
    tiles = triton.cdiv(length, config["BLOCK_K"])
    chunk = triton.cdiv(batch * tiles, max(programs // owners, 1))
    splits = triton.cdiv(batch * tiles, chunk)
    partials = x.new_empty((splits, taps, out_channels, in_channels), dtype=torch.float32)
    channels = {"in_channels": in_channels, "out_channels": out_channels}
    block_n, block_c = 16, 128
    with _host.on_device(x):
        _backward_weight_kernel[(owners * splits,)](
            d_out=d_out, x=x, coefficients=affine, partials=partials,
            d_out_sb=d_out.stride(0), d_out_sl=d_out.stride(1), x_sb=x.stride(0), x_sl=x.stride(1),
            length=length, dilation=min(dilation, length), tiles=tiles, blocks=batch * tiles, chunk=chunk,
            TAPS=taps, SILU=silu, PRECISION=_host.precision(x.dtype), **channels, **config,
        )  # fmt: skip
        _merge_weight_kernel[(triton.cdiv(d_weight.numel(), block_c),)](
            partials=partials, d_weight=d_weight, splits=splits, TAPS=taps, BLOCK_N=block_n, BLOCK_C=block_c, **channels
        )


def _bias_gradient(d_out):
    """[Cout] in fp32."""
    affine = norm.coefficients(d_out, None, None, None, None, None, groups=0)
    sums, _ = norm.reduce(d_out, d_out, None, None, None, affine, groups=0, silu=False)
    return sums[..., 0].sum(0)


def forward(x, weight, bias, norm_weight, norm_bias, scale, shift, residual, *, groups, dilation, silu, eps):
    """(out [B, L, Cout] contiguous, stats [B, groups, 2] fp32 = (mean, rstd)).

    x [B, L, Cin], residual [B, L, Cout] or None, in any batch and position strides with C contiguous; weight
    [Cout, Cin, K], K odd; bias [Cout] or None. norm_weight, norm_bias [Cin], None without groups; scale, shift [B, Cin]
    or None. Each parameter is in the dtype of x or float32.
    """
    batch, length, _ = x.shape
    out = x.new_empty((batch, length, weight.shape[0]))
    stats = x.new_empty((batch, groups, 2), dtype=torch.float32)
    if not x.numel():
        return out, stats
    affine = None
    if groups:
        stats, affine = norm.statistics(x, norm_weight, norm_bias, scale, shift, groups=groups, eps=eps)
    elif scale is not None or shift is not None:
        affine = norm.coefficients(x, None, None, scale, shift, None, groups=0)
    packed = _pack(weight, x.dtype)
    _convolve(x, packed, bias, residual, affine, out, dilation=dilation, silu=silu, is_reversed=False)
    return out, stats


def backward(
    d_out, x, weight, norm_weight, norm_bias, scale, shift, stats,
    *, groups, dilation, silu, need_x, need_weight, need_bias,
):  # fmt: skip
    """(d_x contiguous as x, d_weight, d_bias fp32, sums [B, Cin, 2] as in norm.py, if need_x and there is a prologue).

    What is not needed is empty, of shape (0,). stats are forward's.
    """
    has_affine = bool(groups) or scale is not None or shift is not None
    has_prologue = has_affine or silu
    d_x = x.new_empty(x.shape if need_x else (0,))
    d_weight = x.new_empty(weight.shape if need_weight else (0,), dtype=torch.float32)
    d_bias = x.new_empty(weight.shape[:1] if need_bias else (0,), dtype=torch.float32)
    sums = x.new_empty((x.shape[0], x.shape[2], 2) if need_x and has_prologue else (0,), dtype=torch.float32)
    if not x.numel():
        return d_x, d_weight.zero_(), d_bias.zero_(), sums
    affine = None
    if has_affine or (need_x and has_prologue):
        affine = norm.coefficients(x, norm_weight, norm_bias, scale, shift, stats, groups=groups)
    if need_weight:
        _weight_gradient(d_out, x, affine if has_affine else None, d_weight, dilation=dilation, silu=silu)
    if need_bias:
        d_bias = _bias_gradient(d_out)
    if need_x:
        packed = _pack(weight.transpose(0, 1), x.dtype)
        _convolve(d_out, packed, None, None, None, d_x, dilation=dilation, silu=False, is_reversed=True)
        if has_prologue:
            sums = norm.gradient(d_x, x, norm_weight, scale, stats, affine, groups=groups, silu=silu, d_x=d_x)
    return d_x, d_weight, d_bias, sums
