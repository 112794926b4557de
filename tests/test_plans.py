# SPDX-License-Identifier: MIT
"""How even the work of the CPU kernels is over many threads, counted from their plans: no kernel runs."""

import itertools

import pytest
import torch
from helpers import DTYPES, INSTRUCTION_SETS, needs_extension

import mmattn
from mmattn_kernels import CircularWindows, TableWindows

pytestmark = needs_extension

# A number that is packed, normalised or summed takes about as long as so many multiply-adds of a product: 3.3 ns for a
# vector of 16 after SiLU, where a thread does 85 multiply-adds a ns (docs/perf-notes.md).
OF_NUMBER = 16
THREADS = (8, 32, 64)
SERIAL = 0.02  # of the work, at most


def loops(pieces):
    """Of the pieces of a plan: (loop, whether its threads take ranges, the costs of its pieces), loop by loop."""
    for (name, is_static), found in itertools.groupby(pieces, lambda piece: piece[:2]):
        yield name, is_static, [products + OF_NUMBER * numbers for _, _, products, numbers in found]


def most_of_a_thread(costs, is_static, threads):
    loads = [0.0] * threads
    if is_static:  # as OpenMP cuts a loop: neighbours, the first threads one more
        each, more = divmod(len(costs), threads)
        ends = [each * (t + 1) + min(t + 1, more) for t in range(threads)]
        return max(sum(costs[lo:hi]) for lo, hi in zip([0, *ends], ends, strict=False))
    for cost in costs:
        loads[loads.index(min(loads))] += cost
    return max(loads)


def balance(plan):
    """(time of the slowest threads over the mean, share of the work that is serial) of a plan."""
    threads, pieces = plan
    longest = total = serial = 0.0
    for _, is_static, costs in loops(pieces):
        longest += most_of_a_thread(costs, is_static, threads)
        total += sum(costs)
        serial += sum(costs) if len(costs) == 1 else 0
    return longest * threads / total, serial / total


def norm_plans(is_bf16, threads):
    from mmattn_kernels.cpu import extension

    for channels, length in ((128, 65536), (256, 16384), (128, 25600), (512, 1024)):
        for backward in (False, True):
            plan = extension().group_norm_work(backward, 32, 1, length, channels, is_bf16, threads)
            yield f"{channels}, {length} {'backward' if backward else 'forward'}", plan, 0


# In channels, out channels, length, taps, dilation, height, width: bench/conv.py's with K = 3 and 1, over the frames of
# a video, and in frames.
LINES = [(128, 128, 25600, 2), (256, 256, 6400, 16), (256, 256, 6400, 512), (384, 384, 1600, 128), (512, 512, 400, 1)]
LINES += [(768, 384, 1600, 64), (1024, 512, 400, 2)]
CONVOLUTIONS = [
    *((*sizes, taps, d if taps == 3 else 1, 0, 0) for *sizes, d in LINES for taps in (3, 1)),
    (256, 256, 16 * 1024, 3, 1024, 0, 0),
    *((c, c, 16 * side * side, 9, 1, side, side) for c, side in ((128, 64), (256, 32), (384, 16), (512, 8))),
]


def conv_plans(is_bf16, threads):
    from mmattn_kernels.cpu import extension

    for cin, cout, length, taps, dilation, height, width in CONVOLUTIONS:
        sizes = 1, length, cin, cout, taps, dilation, height, width, is_bf16, threads
        for what in ("forward", "d_x", "d_weight", "d_bias"):
            plan = extension().conv_work(what, 32 if what == "forward" else 0, sizes)
            of_taps = (
                length * taps
                if width or taps == 1
                else sum(length - min(abs(k), length) for k in (-dilation, 0, dilation))
            )
            yield (
                f"{cin}, {cout}, {length} K={taps} d={dilation} {what}",
                plan,
                of_taps * cin * cout if what != "d_bias" else 0,
            )


PUBLISHED = [(4, 1024, 6400, 1), (6, 256, 1600, 4), (8, 64, 400, 8), (8, 64, 400, 16)]  # H, P, T, S
BLOCKS = {  # of bench/segments.py: queries, keys, heads, dim, bounds of queries and of keys
    "a": (6144, 126, 32, 64, (0, 1536, 2688, 3840, 4992, 6144), (26, 51, 76, 101, 126)),
    "b": (126, 6144, 32, 64, (0, 26, 51, 76, 101, 126), (1536, 2688, 3840, 4992, 6144)),
    "c": (126, 126, 32, 64, (0, 26, 51, 76, 101, 126), (26, 51, 76, 101, 126)),
    "d": (6144, 6144, 32, 128, (0, 1536, 2688, 3840, 4992, 6144), (1536, 2688, 3840, 4992, 6144)),
}


def attention_shapes():
    """(name, [(queries, keys) of each direction], heads, dim, windows) of the calls that are measured."""
    for name, (queries, keys, heads, dim, bounds, ends) in BLOCKS.items():
        yield name, [(queries, keys)], heads, dim, mmattn.Windows.prefix(bounds, ends, keys=keys)
    centers = [-3, *(int(173 / 81 * (8 * i - 2) / 2) - 1 for i in range(1, 21))]
    yield "e", [(21504, 173)], 40, 128, mmattn.Windows.centered(centers, 8, queries=21504, keys=173)
    for keys in (32, 1024):
        windows = mmattn.Windows.blocks([0, 512, 1024], [0, keys // 2, keys], keys=keys)
        yield f"f{keys}", [(1024, keys)], 4, 64, windows
    for heads, pixels, length, window in PUBLISHED:
        windows, video = CircularWindows(16, window, (16 - window) // 2), 16 * pixels
        yield f"g video S={window}", [(video, length)], heads, 64, windows
        yield f"g audio S={window}", [(length, video)], heads, 64, windows
        yield f"RS-MMA S={window}", [(video, length), (length, video)], heads, 64, windows
    for heads, pixels in ((4, 1024), (6, 256), (8, 64)):
        yield f"self, {pixels} pixels", [(16 * pixels, 16 * pixels)], heads, 64, CircularWindows(16, 1, 0)
        yield f"self over frames, {pixels}", [(16 * pixels, 16 * pixels)], heads, 64, CircularWindows(pixels, 1, 0)


def attention_plans(is_bf16, threads):
    from mmattn_kernels.cpu import attention

    dtype = torch.bfloat16 if is_bf16 else torch.float32
    for name, directions, heads, dim, windows in attention_shapes():
        if isinstance(windows, CircularWindows):
            pairs = sum(q * windows.size * (k // windows.segments) for q, k in directions)
        else:
            pairs = int((windows.query_bounds.diff() * windows.key_length).sum())
            windows = TableWindows(*windows.tables)
        for backward in (False, True):
            plan = attention.work(directions, windows, 1, heads, dim, backward=backward, dtype=dtype, threads=threads)
            products = pairs * heads * dim * (5 if backward else 2)
            yield f"{name} {'backward' if backward else 'forward'}", plan, products


PLANS = {"attention": attention_plans, "convolution": conv_plans, "norm": norm_plans}
# By the last word of a case, for each of THREADS: the slowest thread over the mean, at most. The 400 positions of the
# last level are 13 units of 32 rows, which 64 threads share with ranges of channels; a norm's statistics have parts of
# a fixed size, so that its bits do not depend on the threads.
LIMITS = {
    "attention": {"forward": (1.1, 1.1, 1.1), "backward": (1.1, 1.1, 1.1)},
    "convolution": {
        "forward": (1.15, 1.35, 1.4),
        "d_x": (1.15, 1.35, 1.4),
        "d_weight": (1.15, 1.4, 1.75),
        "d_bias": (1.3, 1.3, 1.45),
    },
    "norm": {"forward": (1.1, 1.16, 1.16), "backward": (1.1, 1.1, 1.15)},
}
# A piece of attention has whole blocks of queries, of 48 on vectors and of 16 to 32 on tiles, and the first three and
# audio at S = 16 have 88, 88, 288 and 72 (on tiles 104) of them for 64 threads. Smaller blocks would balance the count,
# not the time: a piece packs all its keys first, 1024 of them for 9 queries at S = 16.
UNEVEN = {
    ("f32 forward", 64): 1.46,
    ("f1024 forward", 64): 1.46,
    ("g audio S=4 forward", 64): 1.12,
    ("g audio S=16 forward", 32): 1.34,
    ("g audio S=16 forward", 64): 1.77,
    ("RS-MMA S=16 forward", 64): 1.26,
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("op", PLANS)
def test_work_is_even_and_not_serial(op, isa, dtype, instruction_set):
    instruction_set(isa)
    for threads in THREADS:
        for name, plan, products in PLANS[op](dtype == torch.bfloat16, threads):
            slowest, serial = balance(plan)
            limit = LIMITS[op][name.split()[-1]][THREADS.index(threads)]
            what = f"{name}, {threads} threads: {slowest:.2f} times the mean, serial {serial:.1%}"
            assert slowest <= UNEVEN.get((name, threads), limit) and serial <= SERIAL, what
            # Rows that are computed in vain, of a block's last unit or between the lines of a frame, count as well; on
            # vectors, three taps along an axis have 6 products for 12 in forward and for d_x.
            planned = sum(of_products for _, _, of_products, _ in plan[1])
            most = products * (1 if op == "attention" else 1.3)
            if op == "convolution" and planned < products:
                least = {"K=9": 1 / 4, "K=3": 1 / 2}[next(word for word in name.split() if word.startswith("K="))]
                products, most = products * least, products * (0.3 if "K=9" in name else 0.8)
            assert products <= planned <= most, what


def test_the_count_of_a_loop():
    """Of 5 pieces on 2 threads: ranges of 3 and 2, or the next as a thread becomes free; and a serial part."""
    assert most_of_a_thread([1, 1, 1, 4, 1], True, 2) == 5
    assert most_of_a_thread([4, 1, 1, 1, 1], False, 2) == 4
    pieces = [("merge", True, 0, 1), *(("products", False, p, 0) for p in (64, 16, 16, 16, 16))]
    slowest, serial = balance((2, pieces))
    assert slowest == (16 + 64) * 2 / (16 + 128) and serial == 16 / (16 + 128)
