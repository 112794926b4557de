# SPDX-License-Identifier: MIT
"""Attention of segments of queries to circular ranges of keys, forward and backward.

    out[m] = sum_u softmax_u(scale * q[m] . k[u]) v[u],  u over the window of m's segment

By tables, segment i is queries bounds[i]..bounds[i+1]-1 and its window (begin[i] + j) mod L_k, 0 <= j < length[i]. In
random-shift attention between video and audio (RS-MMA, arXiv 2212.09478) it is g = min(m // n_q, F - 1), and its window
positions ((g + R) * n_k + j) mod L_k, 0 <= j < S * n_k, of the other modality: F frames, S window, R shift; L = F*P for
video, T for audio; n = L // F positions a segment (q: of the queries, k: of the keys). Positions past F*n belong, as
queries, to the last segment. Self-attention in segments is S = 1, R = 0.

Layout [B, L, H, D] with D contiguous; LSE is [B, H, L] in fp64: of logits in the thousands, fp32 would leave the
probabilities of backward three digits. What its kernels read of a row are three floats [3, B, H, L]: delta, and the LSE
in base 2 as the sum of two; by tables also first key and number of keys, [2, L].

One launch serves both directions: the first programs own audio tiles, the others video tiles. `_forward_kernel` and
`_backward_dq_kernel` own up to BLOCK_M consecutive queries and walk the union of their windows;
`_backward_dkdv_kernel` owns up to BLOCK_N keys, in RS-MMA consecutive after R is taken away, and walks the queries that
read them: one circular range of positions, in RS-MMA exactly, by tables the shortest that begins and ends with a
segment. Every output element has one writer: no atomics, the same bits each time. Scores and sums are fp32, the
exponential is base 2, P and dS are rounded to the input dtype for their product.
"""

import torch
import triton
import triton.language as tl

from mmattn_kernels import TableWindows, up_to
from mmattn_kernels.triton import _host
from mmattn_kernels.triton._device import LN_2, LOG2_E, pointers

_CHUNK = tl.constexpr(64)  # segments that a program of keys looks at together
# Changing a length or the shift must not compile anew, not even for a value of 1 or a multiple of 16.
_RUNTIME = (
    "audio_tiles", "video_tiles", "batch_heads", "heads", "audio_len", "video_len",
    "frames", "window", "shift", "scale",
)  # fmt: skip


@triton.jit
def _operand(is_audio, audio, audio_sb, audio_sl, audio_sh, video, video_sb, video_sl, video_sh, i_b, i_h):
    """First row of head i_h of batch i_b in the chosen modality, and the stride between its rows."""
    stride_b = tl.where(is_audio, audio_sb, video_sb)
    stride_h = tl.where(is_audio, audio_sh, video_sh)
    p_base = tl.where(is_audio, audio, video) + i_b.to(tl.int64) * stride_b + i_h.to(tl.int64) * stride_h
    return p_base, tl.where(is_audio, audio_sl, video_sl)


@triton.jit
def _mask(m_rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    return m_rows[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]


@triton.jit
def _load(p_base, o_rows, stride, m_rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Rows [len(o_rows), BLOCK_D]; zeros where masked and past HEAD_DIM."""
    p_rows = pointers(p_base, o_rows, stride, tl.arange(0, BLOCK_D))
    if MASKED:
        return tl.load(p_rows, mask=_mask(m_rows, HEAD_DIM, BLOCK_D), other=0.0)
    elif BLOCK_D != HEAD_DIM:
        return tl.load(p_rows, mask=(tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(p_rows)


@triton.jit
def _store(p_base, o_rows, stride, m_rows, b_x, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    p_rows = pointers(p_base, o_rows, stride, tl.arange(0, BLOCK_D))
    tl.store(p_rows, b_x.to(p_base.dtype.element_ty), mask=_mask(m_rows, HEAD_DIM, BLOCK_D))


@triton.jit
def _wrap(x, length):
    """x mod length for 0 <= x < 2 * length."""
    return tl.where(x >= length, x - length, x)


@triton.jit
def _mod(x, length):
    """x mod length for any x: a shift read from the device is checked by nobody, and must be a shift all the same."""
    return (x % length + length) % length


@triton.jit
def _within(x, low, high, wrapped):
    """low <= x < high or x < wrapped: a range that begins at low and may end past the end of the circle."""
    return (x >= low) & (x < high) | (x < wrapped)


@triton.jit
def _result(is_audio, audio, video, length, heads, i_b, i_h, HEAD_DIM: tl.constexpr, PACKED: tl.constexpr = 1):
    """As _operand, for a contiguous [B, length, heads, HEAD_DIM], or for one of PACKED of them side by side."""
    offset = (i_b.to(tl.int64) * length * heads * PACKED + i_h) * HEAD_DIM
    return tl.where(is_audio, audio, video) + offset, heads * HEAD_DIM * PACKED


@triton.jit
def _block(i, head, n_full, MASKED: tl.constexpr):
    """The i-th of the blocks that need a mask, or of those that do not."""
    if MASKED:
        return tl.where(i < head, i, i + n_full)
    else:
        return head + i


@triton.jit
def _program(audio_tiles, video_tiles, batch_heads, heads):
    """Which tile of which head. Audio first: its windows are the longer ones, and a launch should end on short work."""
    pid = tl.program_id(0)
    is_audio = pid < batch_heads * audio_tiles
    i_tile = tl.where(is_audio, pid, pid - batch_heads * audio_tiles)
    n_tiles = tl.where(is_audio, audio_tiles, video_tiles)
    i_bh = i_tile // n_tiles
    return is_audio, i_tile % n_tiles, i_bh, i_bh // heads, i_bh % heads


@triton.jit
def _tile(i_tile, length, len_k, frames, window, BLOCK: tl.constexpr):
    """First position and end of a tile.

    A tile is a part of a segment, or as many whole segments as fit. One that straddled two segments would walk both
    their windows, and need a mask throughout. Only where a window is everything do segments not matter.
    """
    n = length // frames
    n_group = tl.where(window * (len_k // frames) == len_k, frames, tl.maximum(BLOCK // n, 1))
    last = tl.cdiv(frames, n_group) - 1
    in_group = tl.cdiv(n_group * n, BLOCK)
    i_group = tl.minimum(i_tile // in_group, last)
    first = i_group * n_group * n + (i_tile - i_group * in_group) * BLOCK
    group_end = tl.where(i_group == last, length, (i_group + 1) * n_group * n)
    return first, tl.minimum(first + BLOCK, group_end)


def _tile_count(length, len_k, frames, window, block):
    """How many tiles that makes."""
    n = length // frames
    n_group = frames if window * (len_k // frames) == len_k else max(block // n, 1)
    last = triton.cdiv(frames, n_group) - 1
    return last * triton.cdiv(n_group * n, block) + triton.cdiv(length - last * n_group * n, block)


@triton.jit
def _key_walk(i_m, len_q, len_k, frames, window, shift, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The keys a query tile reads: u = 0 .. n_keys - 1, counted from position `start`.

    Row m reads those u that are _within its low, high and wrapped. Every row reads all of the n_full blocks from `head`
    on, so they need no mask; n_masked is how many others there are, before and after them.
    """
    n_q = len_q // frames
    n_k = len_k // frames
    n_window = window * n_k
    first, end = _tile(i_m, len_q, len_k, frames, window, BLOCK_M)
    g_first = tl.minimum(first // n_q, frames - 1)
    g_last = tl.minimum((end - 1) // n_q, frames - 1)
    skew = (g_last - g_first) * n_k
    start = _mod((g_first + shift) * n_k, len_k)
    n_keys = tl.minimum(skew + n_window, len_k)
    head = tl.cdiv(tl.where(n_window == len_k, 0, skew), BLOCK_N)
    n_full = tl.maximum(n_window // BLOCK_N - head, 0)
    n_masked = tl.cdiv(n_keys, BLOCK_N) - n_full

    o_m = first + tl.arange(0, BLOCK_M)
    low = (tl.minimum(o_m // n_q, g_last) - g_first) * n_k
    high = tl.minimum(low + n_window, n_keys)
    return o_m, o_m < end, start, n_keys, head, n_full, n_masked, low, high, low + n_window - len_k


@triton.jit
def _readers(u_first, u_last, len_q, len_k, frames, window):
    """The queries that read any key of u_first .. u_last, a circular range: its first position and its length.

    Keys are numbered u = (position - shift * n_k) mod len_k: segment g reads the S * n_k from g * n_k on, mod len_k. So
    u is read by segments a = u // n_k - S + 1 .. u // n_k, and by the last ones, from b on, whose windows wrap. If any
    do, a begins at 0, and both are one range of the circle. With u_first and u_last exchanged: the queries that read
    all of those keys.
    """
    n_q = len_q // frames
    n_k = len_k // frames
    a_first = tl.maximum(u_first // n_k - window + 1, 0)
    a_last = tl.minimum(u_last // n_k, frames - 1)
    b_first = tl.maximum((u_first + len_k - window * n_k) // n_k + 1, a_last + 1)
    wraps = b_first < frames
    start = tl.where(wraps, b_first, a_first) * n_q
    end = tl.where(a_last == frames - 1, len_q, (a_last + 1) * n_q) + tl.where(wraps, len_q, 0)
    return start, tl.maximum(end - start, 0)


@triton.jit
def _query_walk(i_n, len_q, len_k, frames, window, shift, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The queries that read a key tile: r = 0 .. n_rows - 1, counted from position `start`. Else as _key_walk."""
    u_first, u_end = _tile(i_n, len_k, len_k, frames, window, BLOCK_N)
    u_last = u_end - 1
    start, n_rows = _readers(u_first, u_last, len_q, len_k, frames, window)
    begin, n_all = _readers(u_last, u_first, len_q, len_k, frames, window)
    reads_all = window * (len_k // frames) == len_k
    begin = tl.where(reads_all, 0, _mod(begin - start, len_q))
    end = tl.where(reads_all, n_rows, tl.minimum(begin + n_all, n_rows))
    blocks = tl.cdiv(n_rows, BLOCK_M)
    head = tl.minimum(tl.cdiv(begin, BLOCK_M), blocks)
    n_full = tl.maximum(end // BLOCK_M - head, 0)

    o_u = u_first + tl.arange(0, BLOCK_N)
    o_n = _wrap(o_u + _mod(shift * (len_k // frames), len_k), len_k)
    low, n_own = _readers(o_u, o_u, len_q, len_k, frames, window)
    low = _mod(low - start, len_q)
    high = tl.minimum(low + n_own, n_rows)
    return o_n, o_u < u_end, start, n_rows, head, n_full, blocks - n_full, low, high, low + n_own - len_q


@triton.jit
def _ranges(query_bounds, key_begin, key_length, o_m, m_m, len_k, segments):
    """First key and number of keys of each query, by tables. Those whose values are no ranges read some keys."""
    # Halved until one is left: how many of query_bounds[1:segments] are at most o_m.
    b_first = tl.zeros_like(o_m)
    b_last = b_first + segments - 1
    left = segments - 1
    while left > 0:
        b_middle = (b_first + b_last) // 2
        m_behind = tl.load(query_bounds + 1 + b_middle) <= o_m
        b_first = tl.where(m_behind, b_middle + 1, b_first)
        b_last = tl.where(m_behind, b_last, b_middle)
        left = left // 2
    b_segment = tl.minimum(b_first, segments - 1)
    b_length = tl.where(m_m, tl.minimum(tl.maximum(tl.load(key_length + b_segment), 0), len_k), 0)
    b_begin = tl.where(b_length == len_k, 0, _mod(tl.load(key_begin + b_segment), len_k))
    return b_begin, b_length


@triton.jit
def _key_walk_by_tables(
    i_m, query_bounds, key_begin, key_length, len_q, len_k, segments, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """As _key_walk; of a row that reads no key high is low. Behind it first key and number of keys of each row."""
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < len_q
    b_begin, b_length = _ranges(query_bounds, key_begin, key_length, o_m, m_m, len_k, segments)
    m_reads = b_length > 0
    # The union, if no range wraps around, and if ranges go on in order from the first row's; what neither covers
    # well, the second does as all keys.
    start = tl.min(tl.where(m_reads, b_begin, len_k))
    n_keys = tl.max(tl.where(m_reads, b_begin + b_length, 0)) - start
    first_row = tl.min(tl.where(m_reads & (b_length < len_k), o_m, len_q))
    origin = tl.sum(tl.where(o_m == first_row, b_begin, 0))
    b_ahead = tl.where(b_length == len_k, 0, _mod(b_begin - origin, len_k))
    n_in_order = tl.minimum(tl.max(tl.where(m_reads, b_ahead + b_length, 0)), len_k)
    in_order = (start + n_keys > len_k) | (n_in_order < n_keys)
    start = tl.where(in_order, origin, start)
    n_keys = tl.maximum(tl.where(in_order, n_in_order, n_keys), 0)

    low = tl.where(m_reads, tl.where(in_order, b_ahead, b_begin - start), 0)
    high = tl.minimum(low + b_length, n_keys)
    head = tl.cdiv(tl.max(low), BLOCK_N)
    n_full = tl.maximum(tl.min(tl.where(m_reads, high, n_keys)) // BLOCK_N - head, 0)
    n_masked = tl.cdiv(n_keys, BLOCK_N) - n_full
    wrapped = low + b_length - len_k
    return o_m, m_m, start, n_keys, head, n_full, n_masked, low, high, wrapped, b_begin, b_length


@triton.jit
def _query_walk_by_tables(
    i_n, query_bounds, key_begin, key_length, len_q, len_k, segments, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """As _query_walk, up to n_masked: which rows read which keys, the ranges of the rows say."""
    first = i_n * BLOCK_N
    count = tl.minimum(BLOCK_N, len_k - first)
    # Positions in front of and behind the segments that read any of the keys, those that read none; all, not all.
    b_any_lo, b_any_hi = tl.full([_CHUNK], 0, tl.int32) + len_q, tl.full([_CHUNK], 0, tl.int32)
    b_none_lo, b_none_hi, b_none = b_any_lo, b_any_hi, b_any_hi
    b_all_lo, b_all_hi, b_all = b_any_lo, b_any_hi, b_any_hi
    b_part_lo, b_part_hi = b_any_lo, b_any_hi
    for i in range(0, segments, _CHUNK):
        o_s = i + tl.arange(0, _CHUNK)
        m_s = o_s < segments
        b_lo = tl.minimum(tl.maximum(tl.load(query_bounds + o_s, mask=m_s, other=0), 0), len_q)
        b_hi = tl.minimum(tl.load(query_bounds + o_s + 1, mask=m_s, other=0), len_q)
        m_s = b_hi > b_lo
        b_length = tl.minimum(tl.maximum(tl.load(key_length + o_s, mask=m_s, other=0), 0), len_k)
        b_ahead = _mod(first - tl.load(key_begin + o_s, mask=m_s, other=0), len_k)  # of the keys, in the window
        m_all = m_s & ((b_ahead + count <= b_length) | (b_length == len_k))
        m_any = m_s & (b_length > 0) & ((b_ahead < b_length) | (b_ahead + count > len_k))
        m_none = m_s & (m_any == 0)
        b_any_lo, b_any_hi = _extend(b_any_lo, b_any_hi, m_any, b_lo, b_hi)
        b_none_lo, b_none_hi = _extend(b_none_lo, b_none_hi, m_none, b_lo, b_hi)
        b_all_lo, b_all_hi = _extend(b_all_lo, b_all_hi, m_all, b_lo, b_hi)
        b_part_lo, b_part_hi = _extend(b_part_lo, b_part_hi, m_s & (m_all == 0), b_lo, b_hi)
        b_none += tl.where(m_none, b_hi - b_lo, 0)
        b_all += tl.where(m_all, b_hi - b_lo, 0)
    start, end = tl.min(b_any_lo), tl.max(b_any_hi)
    n_rows = tl.maximum(end - start, 0)
    begin, n_all = tl.min(b_all_lo), tl.sum(b_all)
    n_all = tl.where(tl.max(b_all_hi) - begin == n_all, n_all, 0)
    # On the circle they may be what lies around the others.
    n_none, none_end = tl.sum(b_none), tl.max(b_none_hi)
    is_around = (none_end - tl.min(b_none_lo) == n_none) & (len_q - n_none < n_rows)
    start = tl.where(is_around, none_end, start)
    n_rows = tl.where(is_around, len_q - n_none, n_rows)
    part_end = tl.max(b_part_hi)
    n_around = len_q - part_end + tl.min(b_part_lo)
    is_around = (part_end > 0) & (n_around > n_all)
    begin = tl.where(is_around, part_end, begin)
    n_all = tl.where(is_around, n_around, n_all)

    begin = _mod(begin - start, len_q)
    blocks = tl.cdiv(n_rows, BLOCK_M)
    head = tl.minimum(tl.cdiv(begin, BLOCK_M), blocks)
    n_full = tl.maximum(tl.minimum(begin + n_all, n_rows) // BLOCK_M - head, 0)
    o_n = first + tl.arange(0, BLOCK_N)
    return o_n, o_n < len_k, start, n_rows, head, n_full, blocks - n_full


@triton.jit
def _extend(b_lo, b_hi, mask, b_new_lo, b_new_hi):
    """The least and the greatest position, of those masked in too."""
    return tl.where(mask, tl.minimum(b_lo, b_new_lo), b_lo), tl.where(mask, tl.maximum(b_hi, b_new_hi), b_hi)


@triton.jit(do_not_specialize=_RUNTIME)
def _forward_kernel(
    video_q, video_k, video_v, audio_q, audio_k, audio_v, video_out, audio_out, video_lse, audio_lse,
    query_bounds, key_begin, key_length, shift, scale,
    video_q_sb, video_q_sl, video_q_sh, video_k_sb, video_k_sl, video_k_sh, video_v_sb, video_v_sl, video_v_sh,
    audio_q_sb, audio_q_sl, audio_q_sh, audio_k_sb, audio_k_sl, audio_k_sh, audio_v_sb, audio_v_sl, audio_v_sh,
    audio_tiles, video_tiles, batch_heads, heads, audio_len, video_len, frames, window,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, SHIFT_IS_TENSOR: tl.constexpr,
):  # fmt: skip
    is_audio, i_m, i_bh, i_b, i_h = _program(audio_tiles, video_tiles, batch_heads, heads)
    len_q = tl.where(is_audio, audio_len, video_len)
    len_k = tl.where(is_audio, video_len, audio_len)
    p_q, q_sl = _operand(is_audio, audio_q, audio_q_sb, audio_q_sl, audio_q_sh,
                         video_q, video_q_sb, video_q_sl, video_q_sh, i_b, i_h)  # fmt: skip
    p_k, k_sl = _operand(is_audio, video_k, video_k_sb, video_k_sl, video_k_sh,
                         audio_k, audio_k_sb, audio_k_sl, audio_k_sh, i_b, i_h)  # fmt: skip
    p_v, v_sl = _operand(is_audio, video_v, video_v_sb, video_v_sl, video_v_sh,
                         audio_v, audio_v_sb, audio_v_sl, audio_v_sh, i_b, i_h)  # fmt: skip
    p_out, out_sl = _result(is_audio, audio_out, video_out, len_q, heads, i_b, i_h, HEAD_DIM)
    p_lse = tl.where(is_audio, audio_lse, video_lse) + i_bh.to(tl.int64) * len_q
    if SHIFT_IS_TENSOR:
        shift = _mod(tl.load(shift).to(tl.int32), frames)
    if query_bounds is not None:
        o_m, m_m, start, n_keys, head, n_full, n_masked, low, high, wrapped, _, _ = _key_walk_by_tables(
            i_m, query_bounds, key_begin, key_length, len_q, len_k, frames, BLOCK_M, BLOCK_N
        )
    else:
        o_m, m_m, start, n_keys, head, n_full, n_masked, low, high, wrapped = _key_walk(
            i_m, len_q, len_k, frames, window, shift, BLOCK_M, BLOCK_N
        )

    b_q = _load(p_q, o_m, q_sl, m_m, HEAD_DIM, BLOCK_D, True)  # [BM, BD]
    # With the sign in q the largest product is the largest score, and the scale joins the exponential's multiply-add.
    b_q = tl.where(scale < 0, -b_q, b_q)
    scale_log2 = tl.abs(scale) * LOG2_E
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    # Finite, so that a row whose first block is all masked (-inf) stays 0 and does not turn NaN.
    b_max = tl.full([BLOCK_M], -3.0e38, tl.float32)
    for MASKED in tl.static_range(2):
        for i in range(0, n_masked if MASKED else n_full):
            o_u = _block(i, head, n_full, MASKED) * BLOCK_N + tl.arange(0, BLOCK_N)
            o_n = _wrap(start + o_u, len_k)
            m_n = o_u < n_keys
            b_k = _load(p_k, o_n, k_sl, m_n, HEAD_DIM, BLOCK_D, MASKED)  # [BN, BD]
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
            if MASKED:
                m_s = _within(o_u[None, :], low[:, None], high[:, None], wrapped[:, None])
                b_s = tl.where(m_s, b_s * scale_log2, float("-inf"))
                b_new = tl.maximum(b_max, tl.max(b_s, 1))
                b_p = tl.exp2(b_s - b_new[:, None])
            else:
                b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale_log2)
                b_p = tl.exp2(b_s * scale_log2 - b_new[:, None])
            b_decay = tl.exp2(b_max - b_new)
            b_sum = b_sum * b_decay + tl.sum(b_p, 1)
            b_v = _load(p_v, o_n, v_sl, m_n, HEAD_DIM, BLOCK_D, MASKED)  # [BN, BD]
            b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_decay[:, None], input_precision=PRECISION)
            b_max = b_new
    b_out = b_acc / b_sum[:, None]
    b_lse = (b_max.to(tl.float64) + tl.log2(b_sum).to(tl.float64)) * LN_2
    if query_bounds is not None:
        b_out = tl.where((high > low)[:, None], b_out, 0.0)
        b_lse = tl.where(high > low, b_lse, float("-inf"))
    _store(p_out, o_m, out_sl, m_m, b_out, HEAD_DIM, BLOCK_D)
    tl.store(p_lse + o_m, b_lse, mask=m_m)


@triton.jit(do_not_specialize=_RUNTIME)
def _backward_dq_kernel(
    d_video_out, d_audio_out, video_q, video_k, video_v, audio_q, audio_k, audio_v,
    video_out, audio_out, video_lse, audio_lse, video_rows, audio_rows, d_video_q, d_audio_q, d_lse, ranges,
    query_bounds, key_begin, key_length, shift, scale,
    d_video_out_sb, d_video_out_sl, d_video_out_sh, d_audio_out_sb, d_audio_out_sl, d_audio_out_sh,
    video_q_sb, video_q_sl, video_q_sh, video_k_sb, video_k_sl, video_k_sh, video_v_sb, video_v_sl, video_v_sh,
    audio_q_sb, audio_q_sl, audio_q_sh, audio_k_sb, audio_k_sl, audio_k_sh, audio_v_sb, audio_v_sl, audio_v_sh,
    audio_tiles, video_tiles, batch_heads, heads, audio_len, video_len, frames, window,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, SHIFT_IS_TENSOR: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dS = P * (dO V^T - delta), dQ = scale * dS K; writes the rows for the other backward kernel too.

    delta = rowsum(dO * O) - dLSE.
    """
    # Long by its operands: a helper of Triton cannot be given a group of them, and would list them once more.
    is_audio, i_m, i_bh, i_b, i_h = _program(audio_tiles, video_tiles, batch_heads, heads)
    len_q = tl.where(is_audio, audio_len, video_len)
    len_k = tl.where(is_audio, video_len, audio_len)
    p_q, q_sl = _operand(is_audio, audio_q, audio_q_sb, audio_q_sl, audio_q_sh,
                         video_q, video_q_sb, video_q_sl, video_q_sh, i_b, i_h)  # fmt: skip
    p_k, k_sl = _operand(is_audio, video_k, video_k_sb, video_k_sl, video_k_sh,
                         audio_k, audio_k_sb, audio_k_sl, audio_k_sh, i_b, i_h)  # fmt: skip
    p_v, v_sl = _operand(is_audio, video_v, video_v_sb, video_v_sl, video_v_sh,
                         audio_v, audio_v_sb, audio_v_sl, audio_v_sh, i_b, i_h)  # fmt: skip
    p_do, do_sl = _operand(is_audio, d_audio_out, d_audio_out_sb, d_audio_out_sl, d_audio_out_sh,
                           d_video_out, d_video_out_sb, d_video_out_sl, d_video_out_sh, i_b, i_h)  # fmt: skip
    p_out, out_sl = _result(is_audio, audio_out, video_out, len_q, heads, i_b, i_h, HEAD_DIM)
    p_dq, dq_sl = _result(is_audio, d_audio_q, d_video_q, len_q, heads, i_b, i_h, HEAD_DIM, PACKED)
    p_lse = tl.where(is_audio, audio_lse, video_lse) + i_bh.to(tl.int64) * len_q
    p_rows = tl.where(is_audio, audio_rows, video_rows) + i_bh.to(tl.int64) * len_q
    plane = batch_heads.to(tl.int64) * len_q
    if SHIFT_IS_TENSOR:
        shift = _mod(tl.load(shift).to(tl.int32), frames)
    if query_bounds is not None:
        o_m, m_m, start, n_keys, head, n_full, n_masked, low, high, wrapped, b_begin, b_length = _key_walk_by_tables(
            i_m, query_bounds, key_begin, key_length, len_q, len_k, frames, BLOCK_M, BLOCK_N
        )
    else:
        o_m, m_m, start, n_keys, head, n_full, n_masked, low, high, wrapped = _key_walk(
            i_m, len_q, len_k, frames, window, shift, BLOCK_M, BLOCK_N
        )

    b_do = _load(p_do, o_m, do_sl, m_m, HEAD_DIM, BLOCK_D, True)  # [BM, BD]
    b_out = _load(p_out, o_m, out_sl, m_m, HEAD_DIM, BLOCK_D, True)  # [BM, BD]
    b_delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), 1)  # [BM]
    b_lse = tl.load(p_lse + o_m, mask=m_m, other=0.0) * LOG2_E  # [BM]
    if query_bounds is not None:
        if i_bh == 0:
            tl.store(ranges + o_m, b_begin, mask=m_m)
            tl.store(ranges + len_q + o_m, b_length, mask=m_m)
        b_lse = tl.where(high > low, b_lse, 0.0)
    if d_lse is not None:
        b_delta -= tl.load(d_lse + i_bh.to(tl.int64) * len_q + o_m, mask=m_m & (high > low), other=0.0).to(tl.float32)
    b_high = b_lse.to(tl.float32)
    b_low = (b_lse - b_high.to(tl.float64)).to(tl.float32)
    tl.store(p_rows + o_m, b_delta, mask=m_m)
    tl.store(p_rows + plane + o_m, b_high, mask=m_m)
    tl.store(p_rows + 2 * plane + o_m, b_low, mask=m_m)
    b_q = _load(p_q, o_m, q_sl, m_m, HEAD_DIM, BLOCK_D, True)  # [BM, BD]
    scale_log2 = scale * LOG2_E
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for MASKED in tl.static_range(2):
        for i in range(0, n_masked if MASKED else n_full):
            o_u = _block(i, head, n_full, MASKED) * BLOCK_N + tl.arange(0, BLOCK_N)
            o_n = _wrap(start + o_u, len_k)
            m_n = o_u < n_keys
            b_k = _load(p_k, o_n, k_sl, m_n, HEAD_DIM, BLOCK_D, MASKED)  # [BN, BD]
            b_v = _load(p_v, o_n, v_sl, m_n, HEAD_DIM, BLOCK_D, MASKED)  # [BN, BD]
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
            b_p = tl.exp2(b_s * scale_log2 - b_high[:, None] - b_low[:, None])
            if MASKED:
                m_s = _within(o_u[None, :], low[:, None], high[:, None], wrapped[:, None])
                b_p = tl.where(m_s, b_p, 0.0)
            b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)  # [BM, BN]
            b_ds = b_p * (b_dp - b_delta[:, None])
            b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    if query_bounds is not None:
        b_dq = tl.where((high > low)[:, None], b_dq, 0.0)
    _store(p_dq, o_m, dq_sl, m_m, b_dq * scale, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=_RUNTIME)
def _backward_dkdv_kernel(
    d_video_out, d_audio_out, video_q, video_k, video_v, audio_q, audio_k, audio_v,
    video_rows, audio_rows, d_video_k, d_video_v, d_audio_k, d_audio_v, ranges,
    query_bounds, key_begin, key_length, shift, scale,
    d_video_out_sb, d_video_out_sl, d_video_out_sh, d_audio_out_sb, d_audio_out_sl, d_audio_out_sh,
    video_q_sb, video_q_sl, video_q_sh, video_k_sb, video_k_sl, video_k_sh, video_v_sb, video_v_sl, video_v_sh,
    audio_q_sb, audio_q_sl, audio_q_sh, audio_k_sb, audio_k_sl, audio_k_sh, audio_v_sb, audio_v_sl, audio_v_sh,
    audio_tiles, video_tiles, batch_heads, heads, audio_len, video_len, frames, window,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, SHIFT_IS_TENSOR: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dV = P^T dO, dK = scale * dS^T Q for one tile of keys; scores are held transposed, [keys, queries]."""
    is_audio, i_n, i_bh, i_b, i_h = _program(audio_tiles, video_tiles, batch_heads, heads)
    len_k = tl.where(is_audio, audio_len, video_len)
    len_q = tl.where(is_audio, video_len, audio_len)
    p_q, q_sl = _operand(is_audio, video_q, video_q_sb, video_q_sl, video_q_sh,
                         audio_q, audio_q_sb, audio_q_sl, audio_q_sh, i_b, i_h)  # fmt: skip
    p_k, k_sl = _operand(is_audio, audio_k, audio_k_sb, audio_k_sl, audio_k_sh,
                         video_k, video_k_sb, video_k_sl, video_k_sh, i_b, i_h)  # fmt: skip
    p_v, v_sl = _operand(is_audio, audio_v, audio_v_sb, audio_v_sl, audio_v_sh,
                         video_v, video_v_sb, video_v_sl, video_v_sh, i_b, i_h)  # fmt: skip
    p_do, do_sl = _operand(is_audio, d_video_out, d_video_out_sb, d_video_out_sl, d_video_out_sh,
                           d_audio_out, d_audio_out_sb, d_audio_out_sl, d_audio_out_sh, i_b, i_h)  # fmt: skip
    p_dk, dk_sl = _result(is_audio, d_audio_k, d_video_k, len_k, heads, i_b, i_h, HEAD_DIM, PACKED)
    p_dv, dv_sl = _result(is_audio, d_audio_v, d_video_v, len_k, heads, i_b, i_h, HEAD_DIM, PACKED)
    p_rows = tl.where(is_audio, video_rows, audio_rows) + i_bh.to(tl.int64) * len_q
    plane = batch_heads.to(tl.int64) * len_q
    if SHIFT_IS_TENSOR:
        shift = _mod(tl.load(shift).to(tl.int32), frames)
    if query_bounds is not None:
        o_n, m_n, start, n_rows, head, n_full, n_masked = _query_walk_by_tables(
            i_n, query_bounds, key_begin, key_length, len_q, len_k, frames, BLOCK_M, BLOCK_N
        )
    else:
        o_n, m_n, start, n_rows, head, n_full, n_masked, low, high, wrapped = _query_walk(
            i_n, len_q, len_k, frames, window, shift, BLOCK_M, BLOCK_N
        )

    b_k = _load(p_k, o_n, k_sl, m_n, HEAD_DIM, BLOCK_D, True)  # [BN, BD]
    b_v = _load(p_v, o_n, v_sl, m_n, HEAD_DIM, BLOCK_D, True)  # [BN, BD]
    scale_log2 = scale * LOG2_E
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for MASKED in tl.static_range(2):
        for i in range(0, n_masked if MASKED else n_full):
            o_r = _block(i, head, n_full, MASKED) * BLOCK_M + tl.arange(0, BLOCK_M)
            o_m = _wrap(start + o_r, len_q)
            m_m = o_r < n_rows
            b_q = _load(p_q, o_m, q_sl, m_m, HEAD_DIM, BLOCK_D, MASKED)  # [BM, BD]
            b_do = _load(p_do, o_m, do_sl, m_m, HEAD_DIM, BLOCK_D, MASKED)  # [BM, BD]
            b_delta = tl.load(p_rows + o_m, mask=m_m, other=0.0)  # [BM]
            b_high = tl.load(p_rows + plane + o_m, mask=m_m, other=0.0)  # [BM]
            b_low = tl.load(p_rows + 2 * plane + o_m, mask=m_m, other=0.0)  # [BM]
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BN, BM]
            b_p = tl.exp2(b_s * scale_log2 - b_high[None, :] - b_low[None, :])
            if MASKED:
                if query_bounds is not None:
                    b_ahead = o_n[:, None] - tl.load(ranges + o_m, mask=m_m, other=0)[None, :]
                    b_ahead = tl.where(b_ahead < 0, b_ahead + len_k, b_ahead)
                    m_s = b_ahead < tl.load(ranges + len_q + o_m, mask=m_m, other=0)[None, :]
                else:
                    m_s = _within(o_r[None, :], low[:, None], high[:, None], wrapped[:, None])
                b_p = tl.where(m_s, b_p, 0.0)
            b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
            b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)  # [BN, BM]
            b_ds = b_p * (b_dp - b_delta[None, :])
            b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    _store(p_dk, o_n, dk_sl, m_n, b_dk * scale, HEAD_DIM, BLOCK_D)
    _store(p_dv, o_n, dv_sl, m_n, b_dv, HEAD_DIM, BLOCK_D)


# Blocks, warps and stages of "forward", "backward_dq" and "backward_dkdv" by the head dimension.
_config = _host.Configurations(__file__, sizes=(16, 128))


def _empty_lse(q):
    batch, length, heads, _ = q.shape
    return q.new_empty((batch, heads, length), dtype=torch.float64)


def _empty_rows(q):
    batch, length, heads, _ = q.shape
    return q.new_empty((3, batch, heads, length), dtype=torch.float32)


_KERNELS = {
    "forward": _forward_kernel, "backward_dq": _backward_dq_kernel, "backward_dkdv": _backward_dkdv_kernel
}  # fmt: skip


@_host.cached
def _plan(name, q_shape, k_len, strides, dtype, device, directions, segments, size, packed, is_device_shift, precision):
    """The launch of one kernel over the tiles of one or two directions, of queries or of keys.

    What the kernel calls video and audio are the queries and the keys of the first direction. `size` is None by tables.
    """
    batch, q_len, heads, head_dim = q_shape
    config = _config(name, dtype, _host.device_name(device), head_dim)

    def tiles(length, other, block):
        return triton.cdiv(length, block) if size is None else _tile_count(length, other, segments, size, block)

    if name == "backward_dkdv":
        audio_tiles = tiles(k_len, k_len, config["BLOCK_N"])
        video_tiles = 0 if directions == 1 else tiles(q_len, q_len, config["BLOCK_N"])
    else:
        audio_tiles = 0 if directions == 1 else tiles(k_len, q_len, config["BLOCK_M"])
        video_tiles = tiles(q_len, k_len, config["BLOCK_M"])
    strides = [stride for of_tensor in strides for stride in of_tensor[:3]]
    fixed = *strides, audio_tiles, video_tiles, batch * heads, heads, k_len, q_len, segments, size or 0
    constants = {"HEAD_DIM": head_dim, "BLOCK_D": max(triton.next_power_of_2(head_dim), 16)}
    constants |= {"PRECISION": precision, "SHIFT_IS_TENSOR": is_device_shift}
    if name != "forward":
        constants["PACKED"] = packed
    return _host.Launch(_KERNELS[name], batch * heads * (audio_tiles + video_tiles), fixed, constants | config)


def _launch(name, directions, d_out, others, windows, scale, packed=1):
    """`d_out`, and `others` behind the tensors whose strides the kernel takes: for both directions."""
    # A single direction stands in for the second, of which no tile is computed, for the types of its tensors alone.
    first, second = directions[0], directions[-1]
    inputs = *d_out, first.q, second.k, second.v, second.q, first.k, first.v
    if isinstance(windows, TableWindows):
        tables, segments, size, shift = windows, len(windows.key_begin), None, 0
    else:
        tables, (segments, size, shift) = (None, None, None), windows
    is_device_shift = isinstance(shift, torch.Tensor)
    launch = _plan(
        name, first.q.shape, first.k.shape[1], tuple([x.stride() for x in inputs]), first.q.dtype, first.q.device,
        len(directions), segments, size, packed, is_device_shift, _host.precision(first.q.dtype),
    )  # fmt: skip
    with _host.on_device(first.q):
        launch(*inputs, *others, *tables, shift if is_device_shift else int(shift), float(scale))


def supports(question):
    return up_to(question, 128, smallest=16)


def forward(directions, windows, scale):
    """(out, lse) of each direction: out contiguous as q, lse [B, H, Lq] fp64 of natural logarithms.

    `directions`: a Direction, or two whose lengths are each other's, all of one dtype; by tables one.
    """
    out, lse = [q.new_empty(q.shape) for q, _, _ in directions], [_empty_lse(q) for q, _, _ in directions]
    if directions[0].q.numel():
        _launch("forward", directions, (), (out[0], out[-1], lse[0], lse[-1]), windows, scale)
    return out, lse


def backward(directions, d_out, out, lse, windows, scale, gradients, d_lse=(None,)):
    """Writes the gradients of q, k and v of each direction; out and lse are forward's, d_lse of a single one."""
    first, second = gradients[0], gradients[-1]
    q = directions[0].q
    if not q.numel():
        return
    packed = first.q.stride(1) // (q.shape[2] * q.shape[3])
    d_out = [x if x.stride(-1) == 1 else x.contiguous() for x in d_out]
    rows = [_empty_rows(q) for q, _, _ in directions]
    d_out, out, lse, rows = ((x[0], x[-1]) for x in (d_out, out, lse, rows))
    ranges = q.new_empty((2, q.shape[1]), dtype=torch.int32) if isinstance(windows, TableWindows) else None
    of_queries = *out, *lse, *rows, first.q, second.q, d_lse[0], ranges
    _launch("backward_dq", directions, d_out, of_queries, windows, scale, packed)
    of_keys = *rows, second.k, second.v, first.k, first.v, ranges
    _launch("backward_dkdv", directions, d_out, of_keys, windows, scale, packed)
