# SPDX-License-Identifier: MIT
"""Attention by ranges of keys: windows and their masks, the definition, the CPU kernels against it, merging."""

import dataclasses
import random

import pytest
import torch
from helpers import DTYPES, INSTRUCTION_SETS, assert_as_exact, largest_error, needs_extension, with_gradients

import mmattn
from mmattn.testing import relative_error


@dataclasses.dataclass(frozen=True)
class Case:
    bounds: tuple[int, ...]
    begin: tuple[int, ...]
    length: tuple[int, ...]
    keys: int
    batch: int = 1
    heads: int = 2
    dim: int = 32

    @property
    def queries(self):
        return self.bounds[-1]

    def windows(self):
        return mmattn.Windows.from_ranges(self.bounds, self.begin, self.length, keys=self.keys)

    def inputs(self, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)
        sizes = {"q": self.queries, "k": self.keys, "v": self.keys, "d_out": self.queries}
        shape = {name: (self.batch, n, self.heads, self.dim) for name, n in sizes.items()}
        tensors = {name: torch.randn(size, generator=generator).to(dtype) for name, size in shape.items()}
        return tensors, tensors.pop("d_out")


CASES = {
    "one query, one key": Case((0, 1), (0,), (1,), 1, dim=1),
    "prefixes": Case((0, 150, 260, 300), (0, 0, 0), (26, 51, 126), 126),
    "long prefixes": Case((0, 26, 51, 90), (0, 0, 0), (150, 420, 700), 700, dim=64),
    "centred, cut off": Case((0, 64, 128, 192), (0, 5, 14), (14, 17, 9), 23, dim=128),
    "blocks": Case((0, 40, 100, 133), (0, 33, 50), (33, 17, 60), 110, batch=2),
    "wraps around": Case((0, 20, 50, 90), (80, 90, 5), (40, 60, 30), 100),
    "all wrap around all": Case((0, 20, 50), (80, 30), (99, 100), 100),
    "back and forth": Case((0, 10, 30, 37, 80), (90, 0, 40, 10), (30, 10, 20, 5), 130, batch=2, dim=48),
    "keys that nobody reads": Case((0, 9, 30), (10, 60), (20, 35), 200),
    "nobody reads any": Case((0, 9, 30), (10, 60), (0, 0), 200),
    "some read none": Case((0, 9, 30, 70, 75), (3, 10, 60, 0), (0, 20, 0, 77), 77),
    "empty segments": Case((0, 0, 30, 30, 41, 41), (0, 0, 7, 20, 4), (5, 9, 0, 13, 3), 40),
    "nested": Case((0, 33, 66, 99), (10, 20, 30), (90, 60, 10), 128, dim=40),
    "widest head": Case((0, 7, 20), (0, 40), (50, 33), 80, heads=1, dim=256),
    "one query a segment": Case(tuple(range(41)), tuple(range(40)), (37,) * 40, 77, dim=17),
}


def attend(case, tensors, impl="cpu", **options):
    return mmattn.segmented_attention(*tensors.values(), case.windows(), impl=impl, **options)


def by_segment(case, tensors):
    """Independent of the definition in mmattn: (out, lse), the keys of each segment by index."""
    q, k, v = tensors.values()
    outs, lses = [], []
    for i, (lo, hi) in enumerate(zip(case.bounds, case.bounds[1:], strict=False)):
        index = (torch.arange(case.length[i]) + case.begin[i]) % case.keys
        scores = torch.einsum("bqhd,bkhd->bhqk", q[:, lo:hi] * case.dim**-0.5, k[:, index])
        outs.append(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v[:, index]))
        lses.append(scores.logsumexp(-1))
    return torch.cat(outs, 1), torch.cat(lses, 2)


def random_case(seed):
    draw = random.Random(seed)
    keys, segments = draw.choice((1, 5, 16, 33, 60, 130)), draw.randint(1, 7)
    bounds = [0, *sorted(draw.randint(0, 70) for _ in range(segments - 1)), 71]
    kind = draw.choice(("any", "monotone", "prefix", "long"))
    begin = [draw.randrange(keys) for _ in range(segments)]
    length = [draw.randint(0, keys) if draw.random() < 0.8 else draw.choice((0, 1, keys)) for _ in range(segments)]
    if kind == "monotone":
        begin.sort()
        length = [draw.randint(0, max(1, keys // 3)) for _ in range(segments)]
    elif kind == "prefix":
        begin, length = [0] * segments, sorted(length)
    elif kind == "long":
        length = [max(0, keys - draw.randint(0, 3)) for _ in range(segments)]
    return Case(tuple(bounds), tuple(begin), tuple(length), keys, draw.randint(1, 2), draw.randint(1, 2), 8)


@pytest.mark.parametrize("name", CASES)
def test_masks_are_the_ranges(name):
    case = CASES[name]
    mask = torch.zeros(case.queries, case.keys, dtype=torch.bool)
    for i in range(len(case.begin)):
        for j in range(case.length[i]):
            mask[case.bounds[i] : case.bounds[i + 1], (case.begin[i] + j) % case.keys] = True
    assert torch.equal(case.windows().mask(), mask)


@pytest.mark.parametrize("name", CASES)
def test_reference_is_the_definition(name):
    case = CASES[name]
    tensors, d_out = case.inputs(torch.float64)
    found = with_gradients(lambda t: attend(case, t, "reference"), tensors, d_out)
    exact = with_gradients(lambda t: by_segment(case, t)[0], tensors, d_out)
    assert all(torch.allclose(found[key], exact[key], rtol=1e-10, atol=1e-12) for key in exact)
    lse = attend(case, tensors, "reference", return_lse=True)[1]
    assert torch.allclose(lse, by_segment(case, tensors)[1])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name, isa, dtype, instruction_set, poisoned_memory):
    instruction_set(isa)
    case = CASES[name]
    tensors, d_out = case.inputs(dtype)
    assert_as_exact(lambda t: attend(case, t), lambda t: by_segment(case, t)[0], tensors, d_out)
    lse = attend(case, tensors, return_lse=True)[1]
    exact_lse = by_segment(case, {key: x.double() for key, x in tensors.items()})[1]
    assert torch.allclose(lse, exact_lse, atol=1e-5 if dtype == torch.float32 else 2e-2)


@needs_extension
@pytest.mark.parametrize("count", (1, 3, 16))
def test_thousands_of_tables(count, threads, poisoned_memory):
    """Against a dense mask, with more threads than there are heads, so that a head is cut into several pieces."""
    threads(count)
    for seed in range(700):
        case = random_case(1000 * count + seed)
        tensors, d_out = case.inputs()
        found = with_gradients(lambda t: attend(case, t), tensors, d_out)  # noqa: B023  called at once
        exact = with_gradients(lambda t: attend(case, t, "reference"), tensors, d_out, torch.float64)  # noqa: B023
        assert all((found[key] - exact[key]).abs().max() < 2e-5 for key in exact), (seed, case)
        unread = ~case.windows().mask().any(0)
        assert not found["d_k"][:, unread].any() and not found["d_v"][:, unread].any()


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("count", (1, 16))
@pytest.mark.parametrize("name", ("prefixes", "back and forth", "wraps around"))
def test_two_runs_are_bitwise_equal(name, count, dtype, threads, poisoned_memory):
    threads(count)
    case = CASES[name]
    tensors, d_out = case.inputs(dtype)
    one, two = (with_gradients(lambda t: attend(case, t), tensors, d_out) for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_gradients_by_differences():
    case = dataclasses.replace(CASES["some read none"], dim=3, batch=1, heads=1)
    tensors, _ = case.inputs(torch.float64)
    leaves = [x.requires_grad_() for x in tensors.values()]

    def function(*leaves):
        out, lse = mmattn.segmented_attention(*leaves, case.windows(), return_lse=True, impl="reference")
        return out, lse[torch.isfinite(lse)]

    assert torch.autograd.gradcheck(function, leaves)


@needs_extension
@pytest.mark.parametrize("name", ("some read none", "wraps around", "long prefixes"))
def test_gradients_of_the_log_sum_exp(name, poisoned_memory):
    case = CASES[name]
    tensors, d_out = case.inputs()

    def both(t, impl):
        out, lse = attend(case, t, impl, return_lse=True)
        return out + 0.3 * lse.masked_fill(lse.isneginf(), 0).transpose(1, 2)[..., None].float().sin()

    found = with_gradients(lambda t: both(t, "cpu"), tensors, d_out)
    exact = with_gradients(lambda t: both(t, "reference"), tensors, d_out, torch.float64)
    assert largest_error(found, exact) < 1e-5


@pytest.mark.parametrize("impl", ("reference", pytest.param("cpu", marks=needs_extension)))
def test_merging_is_attention_to_both(impl):
    """Of a cache of keys and a window, and where one or both have none."""
    case = CASES["some read none"]
    tensors, d_out = case.inputs()
    cut = 30
    whole = mmattn.Windows.from_ranges(case.bounds, (0,) * 4, (0, 20, 77, 77), keys=77)
    early = mmattn.Windows.from_ranges(case.bounds, (0,) * 4, (0, 20, cut, cut), keys=cut)
    late = mmattn.Windows.from_ranges(case.bounds, (0,) * 4, (0, 0, 77 - cut, 77 - cut), keys=77 - cut)

    def merged(t):
        q, k, v = t.values()
        one = mmattn.segmented_attention(q, k[:, :cut], v[:, :cut], early, return_lse=True, impl=impl)
        other = mmattn.segmented_attention(q, k[:, cut:], v[:, cut:], late, return_lse=True, impl=impl)
        return mmattn.merge_attention(*one, *other)

    found = with_gradients(lambda t: merged(t)[0], tensors, d_out)
    exact = with_gradients(
        lambda t: mmattn.segmented_attention(*t.values(), whole, impl="reference"), tensors, d_out, torch.float64
    )
    assert largest_error(found, exact) < 2e-6
    lse = mmattn.segmented_attention(*tensors.values(), whole, return_lse=True, impl=impl)[1]
    assert torch.allclose(merged(tensors)[1], lse, atol=1e-6) and lse[..., :9].isneginf().all()
    with pytest.raises(ValueError, match="other_out and other_lse have shapes"):
        mmattn.merge_attention(tensors["q"], lse, tensors["q"][:, :3], lse)
    with pytest.raises(ValueError, match=r"lse has shape .*; expected \[B, H, L\]"):
        mmattn.merge_attention(tensors["q"], lse.mT, tensors["q"], lse.mT)


def test_what_a_gpu_runs_is_the_definition():
    """By torch's attention with a dense mask, which is what "auto" is where there is no kernel."""
    from mmattn.segmented_attention import masked

    for case in CASES.values():
        tensors, d_out = case.inputs()
        found = with_gradients(lambda t: masked(*t.values(), case.windows(), scale=0.3), tensors, d_out)  # noqa: B023
        exact = with_gradients(
            lambda t: attend(case, t, "reference", scale=0.3),  # noqa: B023
            tensors,
            d_out,
            torch.float64,
        )
        assert all((found[key] - exact[key]).abs().max() < 1e-5 * exact[key].abs().max() + 1e-5 for key in exact), case


FACES = {  # of random_shift_attention: frames, pixels, audio length, window, shift
    "apart": (8, 9, 100, 1, 3),
    "overlapping": (8, 40, 203, 3, 2),
    "around the end": (8, 9, 403, 5, 3),
    "all, left-over": (4, 20, 83, 4, 0),
    "all": (4, 20, 84, 4, 0),
    "few keys one way, many the other": (4, 30, 24, 2, 1),
    "one frame": (1, 70, 33, 1, 0),
}


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("name", FACES)
def test_random_shift_attention_is_a_face_of_it(name, isa, dtype, instruction_set, threads, poisoned_memory):
    """Bit for bit, outputs and gradients, with `circular` windows and the same ranges by hand, for any threads."""
    instruction_set(isa)
    frames, pixels, length, window, shift = FACES[name]
    generator = torch.Generator().manual_seed(0)
    sizes = {"video": frames * pixels, "audio": length}
    streams = {s: torch.randn(4, 1, n, 3, 24, generator=generator).to(dtype) for s, n in sizes.items()}
    for count in (1, 2, 16):
        threads(count)
        leaves = {f"{s}_{t}": x for s, of in streams.items() for t, x in zip("qkv", of, strict=False)}
        leaves = {key: x.clone().requires_grad_() for key, x in leaves.items()}
        outs = mmattn.random_shift_attention(*leaves.values(), frames=frames, window=window, shift=shift, impl="cpu")
        torch.autograd.backward(outs, [streams["video"][3], streams["audio"][3]])
        for own, other, out in (("video", "audio", outs[0]), ("audio", "video", outs[1])):
            step = sizes[other] // frames
            bounds = [*range(0, frames * (sizes[own] // frames), sizes[own] // frames), sizes[own]]
            begins = [(i + shift) * step - sizes[other] for i in range(frames)]
            options = {"queries": sizes[own], "keys": sizes[other]}
            tensors = {"q": leaves[f"{own}_q"], "k": leaves[f"{other}_k"], "v": leaves[f"{other}_v"]}
            for windows in (
                mmattn.Windows.circular(frames, window, shift, **options),
                mmattn.Windows.from_ranges(bounds, begins, [window * step] * frames, **options),
            ):
                found = with_gradients(
                    lambda t: mmattn.segmented_attention(*t.values(), windows, impl="cpu"),  # noqa: B023
                    tensors,
                    streams[own][3],
                )
                assert torch.equal(found.pop("out"), out), (count, own)
                assert all(torch.equal(found[f"d_{t}"], x.grad) for t, x in tensors.items()), (count, own)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("segments", (1, 3, 90))
def test_self_attention_is_a_face_of_it(segments, isa, dtype, instruction_set, threads, poisoned_memory):
    instruction_set(isa)
    generator = torch.Generator().manual_seed(0)
    tensors = {t: torch.randn(2, 180, 3, 40, generator=generator).to(dtype) for t in ("q", "k", "v", "d_out")}
    d_out = tensors.pop("d_out")
    bounds = list(range(0, 181, 180 // segments))
    for windows in (
        mmattn.Windows.blocks(bounds, bounds, keys=180),
        mmattn.Windows.circular(segments, 1, 0, queries=180, keys=180),
    ):
        for count in (1, 2, 16):
            threads(count)
            one = with_gradients(
                lambda t: mmattn.self_attention(*t.values(), segments=segments, impl="cpu"), tensors, d_out
            )
            two = with_gradients(
                lambda t: mmattn.segmented_attention(*t.values(), windows, impl="cpu"),  # noqa: B023
                tensors,
                d_out,
            )
            assert all(torch.equal(one[key], two[key]) for key in one), count


def test_constructors():
    """The windows of a talking head: 81 frames in 21 latent frames, 173 sound tokens."""
    per_frame = 173 / 81
    centers = [-3, *(int(per_frame * (8 * i - 2) / 2) - 1 for i in range(1, 21))]
    windows = mmattn.Windows.centered(centers, 8, queries=21 * 1024, keys=173)
    ranges = [(b, b + n) for b, n in zip(windows.key_begin.tolist(), windows.key_length.tolist(), strict=True)]
    assert ranges[:4] == [(0, 6), (0, 14), (5, 22), (14, 31)] and ranges[-2:] == [(151, 168), (159, 173)]
    assert windows.query_bounds.tolist() == list(range(0, 21 * 1024 + 1, 1024))
    causal = mmattn.Windows.prefix([0, 4, 6], [3, 9], keys=10)
    assert causal.mask().int().sum(1).tolist() == [3] * 4 + [9] * 2 and causal.mask()[:, 0].all()
    dance = mmattn.Windows.blocks(torch.tensor([0, 4, 6]), torch.tensor([1, 3, 7]), keys=10)
    assert dance.mask().nonzero().tolist() == [[q, k] for q in range(6) for k in ((1, 2) if q < 4 else (3, 4, 5, 6))]
    circle = mmattn.Windows.circular(3, 2, 1, queries=7, keys=10)
    assert (circle.query_bounds.tolist(), circle.key_begin.tolist()) == ([0, 2, 4, 7], [3, 6, 9])
    assert mmattn.Windows.from_ranges([0, 2], [-3], [4], keys=10).key_begin.tolist() == [7]


def test_new_values_in_place():
    one, other = (mmattn.Windows.prefix([0, 4, 6], ends, keys=10) for ends in ([3, 9], [1, 10]))
    assert {one.description: 1}[other.description] == 1
    address = one.key_length.data_ptr()
    one.copy_(other)
    assert torch.equal(one.mask(), other.mask()) and one.key_length.data_ptr() == address
    with pytest.raises(ValueError, match="other has 11 keys; expected 10"):
        one.copy_(mmattn.Windows.prefix([0, 4, 6], [1, 2], keys=11))


@pytest.mark.parametrize("impl", ("reference", pytest.param("cpu", marks=needs_extension)))
def test_compiled_once_for_all_values(impl, fresh_dynamo):
    """As an argument, made inside, and with a shift that is a tensor: no value of a table is in the graph."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    case = CASES["blocks"]
    tensors, d_out = case.inputs()
    compiled = torch.compile(
        lambda t, w: mmattn.segmented_attention(*t.values(), w, impl=impl), fullgraph=True, backend=counter
    )
    for begin in ((0, 33, 50), (5, 1, 60), (100, 7, 9)):
        windows = dataclasses.replace(case, begin=begin).windows()
        found = with_gradients(lambda t: compiled(t, windows), tensors, d_out)  # noqa: B023
        plain = with_gradients(lambda t: mmattn.segmented_attention(*t.values(), windows, impl=impl), tensors, d_out)  # noqa: B023
        assert largest_error(found, plain) < 1e-6
    assert counter.frame_count == 1

    def shifted(t, shift):
        windows = mmattn.Windows.circular(7, 2, shift, queries=case.queries, keys=case.keys)
        return mmattn.segmented_attention(*t.values(), windows, impl=impl)

    compiled = torch.compile(shifted, fullgraph=True, backend=counter)
    for shift in (torch.tensor(0), torch.tensor(5)):
        assert relative_error(compiled(tensors, shift), shifted(tensors, shift)) < 1e-6
    assert counter.frame_count == 2


def test_a_pytree_of_its_tables():
    windows = CASES["blocks"].windows()
    leaves, spec = torch.utils._pytree.tree_flatten({"windows": windows})
    assert len(leaves) == 3 and torch.equal(
        torch.utils._pytree.tree_unflatten(leaves, spec)["windows"].mask(), windows.mask()
    )


def test_block_mask_is_the_mask():
    case = dataclasses.replace(
        CASES["wraps around"], bounds=(0, 200, 300, 384), begin=(200, 250, 5), length=(90, 60, 30), keys=256
    )
    windows = case.windows()
    block = windows.block_mask(BLOCK_SIZE=64)
    by_block = windows.mask().unflatten(0, (6, 64)).unflatten(2, (4, 64)).any(3).any(1)
    assert torch.equal(block.to_dense()[0, 0].bool(), by_block)
    q, k = torch.meshgrid(torch.arange(384), torch.arange(256), indexing="ij")
    assert torch.equal(block.mask_mod(torch.tensor(0), torch.tensor(0), q, k), windows.mask())


ONES = torch.ones(1, 12, 2, 8)
WINDOWS = mmattn.Windows.blocks([0, 5, 12], [0, 3, 9], keys=9)
BAD = {
    "not a tensor": ({"q": None}, TypeError, "q is a NoneType; expected a tensor"),
    "rank": ({"k": ONES[0]}, ValueError, r"k has shape \[12, 2, 8\]; expected four dimensions \[B, Lk, H, D\]"),
    "dtype": (
        {"k": ONES[:, :9].double()},
        TypeError,
        "k has dtype torch.float64; expected torch.float32, the dtype of q",
    ),
    "heads": ({"k": ONES[:, :9, :1]}, ValueError, r"k has shape \[1, 9, 1, 8\]; expected \[1, 9, 2, 8\]"),
    "shape": ({"v": ONES}, ValueError, r"v has shape \[1, 12, 2, 8\]; expected \[1, 9, 2, 8\]"),
    "stride": ({"q": ONES.mT.contiguous().mT}, ValueError, "q has stride 2 in its last dimension"),
    "windows": ({"windows": torch.ones(12, 9)}, TypeError, "windows is a Tensor; expected mmattn.Windows"),
    "queries": ({"q": ONES[:, :11]}, ValueError, "windows are of 12 queries; expected 11, as q has"),
    "keys": ({"k": ONES, "v": ONES}, ValueError, "windows are of 9 keys; expected 12, as k has"),
    "device": ({"windows": WINDOWS.to("meta")}, ValueError, "key_begin is on meta; expected cpu, the device of q"),
    "impl": ({"impl": "cuda"}, ValueError, "impl is 'cuda'"),
    "triton": (
        {"impl": "triton"},
        RuntimeError,
        "impl 'triton' cannot run segmented_attention here: the head dimension is 8, and it takes 16 to 128",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument(name):
    change, error, message = BAD[name]
    options = {"q": ONES, "k": ONES[:, :9], "v": ONES[:, :9], "windows": WINDOWS, **change}
    with pytest.raises(error, match=message):
        mmattn.segmented_attention(**options)


BAD_TABLES = {
    "first bound": (([1, 5], [0], [1]), ValueError, r"query_bounds\[0\] is 1; expected 0"),
    "descending": (
        ([0, 5, 3], [0, 0], [1, 1]),
        ValueError,
        r"query_bounds\[2\] is 3; expected at least query_bounds\[1\] = 5",
    ),
    "too long": (([0, 5], [0], [11]), ValueError, r"key_length\[0\] is 11; expected 0..keys = 0..10"),
    "negative": (([0, 5], [0], [-1]), ValueError, r"key_length\[0\] is -1; expected 0..keys = 0..10"),
    "counts": (([0, 5], [0, 1], [1]), ValueError, "key_begin has 2 elements; expected 1"),
    "no segment": (([0], [], []), ValueError, "query_bounds has 1 elements; expected at least 2"),
    "a float": (([0, 5], [0.5], [1]), TypeError, r"key_begin\[0\] is 0.5; expected an int"),
    "floats": (
        ([0, 5], torch.ones(1), [1]),
        TypeError,
        r"key_begin is a torch.float32 tensor of shape \[1\]; expected integers",
    ),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_table(name):
    tables, error, message = BAD_TABLES[name]
    with pytest.raises(error, match=message):
        mmattn.Windows.from_ranges(*tables, keys=10)


BAD_WINDOWS = {
    "keys": (lambda w: w.prefix([0, 4], [1], keys=0), "keys is 0; expected at least 1"),
    "queries": (
        lambda w: w.from_ranges([0, 4], [0], [1], keys=3, queries=5),
        r"query_bounds\[1\] is 4; expected queries = 5",
    ),
    "segments": (lambda w: w.circular(5, 1, 0, queries=9, keys=4), "segments is 5; expected at most 4"),
    "window": (lambda w: w.circular(4, 5, 0, queries=9, keys=4), "window is 5; expected 1..segments = 1..4"),
    "shift": (lambda w: w.circular(4, 3, 2, queries=9, keys=4), "shift is 2; expected 0..segments-window = 0..1"),
    "shift tensor": (
        lambda w: w.circular(4, 3, torch.tensor(2), queries=9, keys=4),
        "shift is 2; expected 0..segments",
    ),
    "centers": (
        lambda w: w.centered([1, 2], 1, queries=9, keys=4),
        "centers has 2 elements; expected a divisor of .* queries, 9",
    ),
    "radius": (lambda w: w.centered([1, 2], -1, queries=10, keys=4), "radius is -1; expected at least 0"),
    "meta": (
        lambda w: w.from_ranges(*(torch.ones(n, dtype=torch.int32, device="meta") for n in (2, 1, 1)), keys=4),
        "queries is None",
    ),
}


@pytest.mark.parametrize("name", BAD_WINDOWS)
def test_bad_windows(name):
    make, message = BAD_WINDOWS[name]
    with pytest.raises(ValueError, match=message):
        make(mmattn.Windows)


@needs_extension
@pytest.mark.parametrize(
    ("table", "value", "message"),
    [
        ("query_bounds", 20, r"query_bounds\[1\] is 20; expected 0..12"),
        ("query_bounds", -1, r"query_bounds\[1\] is -1; expected 0..12"),
        ("key_length", 10, r"key_length\[1\] is 10; expected 0..9"),
    ],
)
def test_values_spoilt_in_place_reach_no_kernel(table, value, message):
    windows = mmattn.Windows.blocks([0, 5, 12], [0, 3, 9], keys=9)
    getattr(windows, table)[1] = value
    with pytest.raises(ValueError, match=message):
        mmattn.segmented_attention(ONES, ONES[:, :9], ONES[:, :9], windows)
    windows = mmattn.Windows.blocks([0, 5, 12], [0, 3, 9], keys=9)
    windows.key_begin[1] = -6  # any number is one modulo the keys
    assert torch.isfinite(mmattn.segmented_attention(ONES, ONES[:, :9], ONES[:, :9], windows)).all()
