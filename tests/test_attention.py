# SPDX-License-Identifier: MIT
"""Random-shift attention: its definition, the CPU kernels against it, and the public function around both."""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DEVICE,
    DTYPES,
    FAR,
    GPU_DTYPES,
    INSTRUCTION_SETS,
    ON_DEVICE,
    REFERENCE_AND_AUTO,
    REFERENCE_AND_CPU,
    enough_memory,
    far_apart,
    largest_error,
    needs_extension,
    on_a_side_stream,
    on_device,
    replays,
)

import mmattn
import mmattn.info
import mmattn_kernels.cpu
from mmattn import dispatch
from mmattn.attention import reference
from mmattn.testing import assert_close_to_fp64, relative_error

DATA = pathlib.Path(__file__).parent / "data"
NAMES = ("video_q", "video_k", "video_v", "audio_q", "audio_k", "audio_v")
GRADS = tuple(f"d_{name}" for name in NAMES)


@dataclasses.dataclass(frozen=True)
class Case:
    frames: int = 4
    pixels: int = 5
    audio_len: int = 24
    window: int = 2
    shift: int = 1
    head_dim: int = 16
    heads: int = 2
    batch: int = 1
    packed: bool = True
    scale: float | None = None
    magnitude: float = 1.0

    @property
    def at(self):
        return {"frames": self.frames, "window": self.window, "shift": self.shift}

    @property
    def exact_scale(self):
        return self.head_dim**-0.5 if self.scale is None else self.scale


CASES = {
    "one frame, one token": Case(frames=1, pixels=1, audio_len=1, window=1, shift=0, heads=1),
    "one head": Case(heads=1),
    "three heads, two batches": Case(heads=3, batch=2),
    "separate tensors": Case(packed=False, batch=2),
    "n of 1": Case(frames=6, pixels=1, audio_len=6, window=2, shift=3),
    "n of 25": Case(frames=4, pixels=16, audio_len=100, window=3, shift=1),
    "window of one": Case(frames=5, pixels=6, audio_len=35, window=1, shift=2),
    "window of all frames": Case(frames=4, pixels=9, audio_len=40, window=4, shift=0),
    "window of all frames, left-over": Case(frames=4, pixels=6, audio_len=39, window=4, shift=0),
    "window wraps": Case(frames=8, pixels=5, audio_len=64, window=5, shift=3),
    "odd T": Case(frames=3, pixels=7, audio_len=21, window=2, shift=1),
    "left-over, no wrap": Case(frames=4, pixels=4, audio_len=19, window=2, shift=0),
    "left-over read by a wrapping window": Case(frames=4, pixels=9, audio_len=19, window=3, shift=1),
    "left-over, window of one": Case(frames=7, pixels=2, audio_len=34, window=1, shift=6),
    "left-over, one position a segment": Case(frames=9, pixels=2, audio_len=17, window=2, shift=7),
    "head_dim 20": Case(frames=3, pixels=7, audio_len=25, head_dim=20, batch=2),
    "head_dim 48": Case(frames=3, pixels=7, audio_len=25, head_dim=48),
    "head_dim 64": Case(frames=2, pixels=33, audio_len=70, window=1, head_dim=64),
    "head_dim 80": Case(frames=3, pixels=17, audio_len=52, head_dim=80, heads=1),
    "head_dim 128": Case(frames=2, pixels=9, audio_len=22, head_dim=128, window=1),
    "head_dim 256": Case(frames=2, pixels=9, audio_len=22, head_dim=256, window=2, shift=0, heads=1),
    "several blocks of queries and keys": Case(frames=2, pixels=160, audio_len=700, window=1, heads=1),
    "several blocks, partial and wrapping": Case(frames=3, pixels=141, audio_len=487, window=2, heads=1, head_dim=64),
    "blocks of whole tiles": Case(frames=2, pixels=128, audio_len=512, window=1, heads=1, head_dim=32),
    "one past a tile on each axis": Case(frames=2, pixels=33, audio_len=130, window=1, head_dim=33, heads=1),
    "one short of a tile on each axis": Case(frames=2, pixels=31, audio_len=126, window=1, head_dim=31, heads=1),
    "scale below zero": Case(frames=3, pixels=11, audio_len=50, scale=-0.3),
    "scale of zero": Case(frames=3, pixels=11, audio_len=50, scale=0.0),
    "large scores": Case(frames=3, pixels=11, audio_len=50, magnitude=30.0),
    "scores of thousands": Case(frames=3, pixels=11, audio_len=50, magnitude=1e3),
    "scores of thousands, many blocks": Case(frames=2, pixels=160, audio_len=700, window=2, shift=0, magnitude=1e3),
}  # fmt: skip


def inputs(case, dtype=torch.float32, seed=0):
    """q, k, v of video then audio, and the gradients of both outputs, all rounded to dtype."""
    generator = torch.Generator().manual_seed(seed)
    qkv, d_out = [], []
    for length in (case.frames * case.pixels, case.audio_len):
        shape = case.batch, length, case.heads, case.head_dim
        if case.packed:
            stream = torch.randn(case.batch, length, 3, case.heads, case.head_dim, generator=generator).to(dtype)
            stream[:, :, 0] *= case.magnitude
            qkv += stream.unbind(2)
        else:
            stream = torch.randn(3, case.batch, case.heads, length, case.head_dim, generator=generator).to(dtype)
            qkv += stream.transpose(2, 3).unbind()
        d_out.append(torch.randn(shape, generator=generator).to(dtype))
    return qkv, d_out


def frame_by_frame(q, k, v, *, frames, window, shift, scale):
    """One direction over index lists, independent of the definition in mmattn."""
    n_q, n_k = q.shape[1] // frames, k.shape[1] // frames
    pieces = []
    for i in range(frames):
        rows = q[:, i * n_q : (i + 1) * n_q if i < frames - 1 else None]
        read = [((i + shift) * n_k + j) % k.shape[1] for j in range(window * n_k)]
        scores = torch.einsum("bmhd,bnhd->bhmn", rows, k[:, read]) * scale
        pieces.append(torch.einsum("bhmn,bnhd->bmhd", scores.softmax(-1), v[:, read]))
    return torch.cat(pieces, 1)


def oracle(qkv, **at):
    return frame_by_frame(qkv[0], qkv[4], qkv[5], **at), frame_by_frame(qkv[3], qkv[1], qkv[2], **at)


def with_gradients(function, qkv, d_out, dtype):
    """Both outputs and all six gradients of `function`, by name."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in qkv]
    out = function(leaves)
    grads = torch.autograd.grad(out, leaves, [x.to(dtype) for x in d_out])
    return dict(zip(("video_out", "audio_out", *GRADS), (*(x.detach() for x in out), *grads), strict=True))


@functools.cache
def expected(case, dtype, device="cpu"):
    """In fp64 by the oracle, and by plain torch in dtype, on the same inputs."""
    qkv, d_out = ([x.to(device) for x in tensors] for tensors in inputs(case, dtype))
    at = {**case.at, "scale": case.exact_scale}
    exact = with_gradients(lambda x: oracle(x, **at), qkv, d_out, torch.float64)
    plain = with_gradients(lambda x: reference(*x, **at), qkv, d_out, dtype)
    return exact, plain


def attend(case, qkv, impl="cpu", **overrides):
    return mmattn.random_shift_attention(*qkv, **{**case.at, "scale": case.scale, "impl": impl, **overrides})


def device_inputs(case, dtype=torch.float32, seed=0):
    return [[on_device(x) for x in tensors] for tensors in inputs(case, dtype, seed)]


def packed_gradients(case, dtype, impl="cpu", make=inputs, **overrides):
    """Like `with_gradients`, on the inputs as they are: strided views keep their strides."""
    qkv, d_out = make(case, dtype)
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = attend(case, leaves, impl, **overrides)
    grads = torch.autograd.grad(out, leaves, d_out)
    return dict(zip(("video_out", "audio_out", *GRADS), (*(x.detach() for x in out), *grads), strict=True))


def assert_within_budget(found, case, dtype, isa=None):
    exact, plain = expected(case, dtype, found["video_out"].device.type)
    for name, x in found.items():
        assert x.dtype == dtype and (x.is_contiguous() or not name.endswith("_out")), name
        # Of a softmax over one key these are what is left of two equal products, times the other factor of the scores.
        # Scores in the thousands are rounded by three digits more, in an order of sums that is not torch's on tiles.
        rounding = 1.0 if case.magnitude < 100 else 4.0
        # The portable build has no fused multiply-add, as torch has: it rounds every product as well.
        factor = 4.0 if isa == "portable" and case.magnitude >= 100 else 2.0
        left = case.magnitude if name.endswith("_k") else 1.0
        assert_close_to_fp64(
            x, exact[name], plain[name], name=name, factor=factor, rounding=rounding, absolute=1e-6 * left
        )


@pytest.mark.parametrize("impl", (*REFERENCE_AND_CPU, pytest.param("auto", marks=pytest.mark.gpu)))
def test_published_values(impl, poisoned_memory):
    safetensors = pytest.importorskip("safetensors")
    device = DEVICE if impl == "auto" else "cpu"
    with safetensors.safe_open(DATA / "attention.safetensors", "pt", device=device) as file:
        cases = json.loads(file.metadata()["cases"])
        for i, case in enumerate(cases):
            # [B, 3*heads*D, F*P + T] -> q, k, v [B, L, heads, D] of each stream, D made contiguous
            packed = file.get_tensor(f"{i}.qkv").transpose(1, 2).contiguous()
            video_len = case["F"] * case["h"] * case["w"]
            heads = packed.unflatten(2, (3, case["heads"], case["head_dim"]))
            qkv = *heads[:, :video_len].unbind(2), *heads[:, video_len:].unbind(2)
            out = mmattn.random_shift_attention(*qkv, frames=case["F"], window=case["S"], shift=case["R"], impl=impl)
            for name, x in zip(("video_out", "audio_out"), out, strict=True):
                published = file.get_tensor(f"{i}.{name}").transpose(1, 2)
                error = relative_error(x.flatten(2), published)
                assert error < 1e-5, f"case {i} {case}, {name}: {error:.2e}"


@pytest.mark.parametrize("name", CASES)
def test_reference_is_the_definition(name):
    case = CASES[name]
    qkv, d_out = inputs(case, torch.float64)
    at = {**case.at, "scale": case.exact_scale}
    found = with_gradients(lambda x: attend(case, x, "reference"), qkv, d_out, torch.float64)
    exact = with_gradients(lambda x: oracle(x, **at), qkv, d_out, torch.float64)
    for key in exact:
        assert (found[key] - exact[key]).abs().max() < 1e-12 * max(1.0, float(exact[key].abs().max())), key


def test_reference_against_a_dense_mask():
    case = Case(frames=5, pixels=3, audio_len=23, window=3, shift=2)
    qkv, _ = inputs(case, torch.float64)
    outs = attend(case, qkv, "reference")
    for out, (q, k, v) in zip(outs, ((qkv[0], qkv[4], qkv[5]), (qkv[3], qkv[1], qkv[2])), strict=True):
        q_len, k_len = q.shape[1], k.shape[1]
        segment = (torch.arange(q_len) // (q_len // case.frames)).clamp(max=case.frames - 1)
        start = (segment + case.shift) * (k_len // case.frames)
        distance = (torch.arange(k_len) - start[:, None]) % k_len
        mask = distance < case.window * (k_len // case.frames)
        dense = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
        assert relative_error(out, dense.transpose(1, 2)) < 1e-14


TINY = {
    "left-over audio": Case(frames=3, pixels=1, audio_len=5, heads=1, head_dim=2),
    "window of all frames": Case(frames=2, pixels=2, audio_len=5, window=2, shift=0, heads=1, head_dim=2),
}


@pytest.mark.parametrize("case", TINY.values(), ids=TINY)
def test_gradcheck_of_the_reference(case):
    qkv, _ = inputs(case, torch.float64)
    leaves = [x.clone().requires_grad_() for x in qkv]
    assert torch.autograd.gradcheck(lambda *x: attend(case, x, "reference"), leaves)
    assert torch.autograd.gradgradcheck(lambda *x: attend(case, x, "reference"), leaves)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name, isa, dtype, instruction_set, poisoned_memory):
    instruction_set(isa)
    assert_within_budget(packed_gradients(CASES[name], dtype), CASES[name], dtype, isa)


@pytest.mark.parametrize("scale", (0.25, -0.25))
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_a_one_hot_softmax_of_enormous_scores_picks_its_value(isa, scale, instruction_set, poisoned_memory):
    """The greatest score weighs 1 exactly, where one scaled before it is taken off is rounded first."""
    instruction_set(isa)
    case = Case(frames=3, pixels=40, audio_len=150, magnitude=1e6, scale=scale)
    found = packed_gradients(case, torch.bfloat16)
    exact, _ = expected(case, torch.bfloat16)
    for name in ("video_out", "audio_out"):
        assert relative_error(found[name], exact[name]) < 1e-6, name
    for name in ("d_video_q", "d_audio_q"):
        assert found[name].abs().max() < 1e-2, name


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_small_window(isa, instruction_set, poisoned_memory):
    """All windows and shifts of two odd shapes: bounds are where off-by-ones live."""
    instruction_set(isa)
    for frames, audio_len in ((3, 20), (5, 24)):
        for window in range(1, frames + 1):
            for shift in range(frames - window + 1):
                case = Case(frames, 7, audio_len, window, shift, heads=1)
                for dtype in DTYPES.values():
                    assert_within_budget(packed_gradients(case, dtype), case, dtype)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_a_key_out_of_every_window_gets_zero_gradient(isa, instruction_set, poisoned_memory):
    instruction_set(isa)
    case = Case(frames=5, pixels=3, audio_len=24, window=1, shift=0)  # segments of 4: nobody reads 20..23
    for dtype in DTYPES.values():
        found = packed_gradients(case, dtype)
        for name in ("d_audio_k", "d_audio_v"):
            assert not found[name][:, 20:].any() and found[name][:, :20].any(-1).all(), name


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_two_runs_are_bitwise_equal(dtype, poisoned_memory):
    case = CASES["several blocks, partial and wrapping"]
    one, two = packed_gradients(case, dtype), packed_gradients(case, dtype)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_a_nan_is_not_swallowed(isa, instruction_set):
    """Whoever reads it shows it; video frame 0 reads the audio positions 6..11."""
    instruction_set(isa)
    case = Case(window=1)
    for dtype in DTYPES.values():
        for name, position in (("video_q", 2), ("audio_k", 7), ("audio_v", 7)):
            qkv = [x.clone() for x in inputs(case, dtype)[0]]
            qkv[NAMES.index(name)][:, position] = float("nan")
            read = attend(case, qkv)[0][:, 2 if name == "video_q" else slice(0, 5)]
            assert torch.isnan(read).all(), name


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("count", (1, 2, 5))
def test_any_number_of_threads(count, dtype, threads, poisoned_memory):
    threads(count)
    for name in ("several blocks, partial and wrapping", "left-over, window of one", "one frame, one token"):
        assert_within_budget(packed_gradients(CASES[name], dtype), CASES[name], dtype)


@needs_extension
def test_expanded_and_transposed_output_gradients(poisoned_memory):
    case = Case(frames=3, pixels=7, audio_len=25, head_dim=20)
    qkv, d_out = inputs(case)
    for gradients in (
        [torch.ones(()).expand_as(x) for x in d_out],
        [x.transpose(1, 3).contiguous().transpose(1, 3) for x in d_out],
    ):
        at = {**case.at, "scale": case.exact_scale}
        exact = with_gradients(lambda x, at=at: oracle(x, **at), qkv, gradients, torch.float64)
        plain = with_gradients(lambda x, at=at: reference(*x, **at), qkv, gradients, torch.float32)
        found = with_gradients(lambda x: attend(case, x), qkv, gradients, torch.float32)
        for name in exact:
            assert_close_to_fp64(found[name], exact[name], plain[name], name=name)


@needs_extension
@pytest.mark.parametrize("used", (0, 1), ids=("video alone", "audio alone"))
def test_only_one_output_is_used(used, poisoned_memory):
    case = Case(audio_len=27)
    qkv, _ = inputs(case)
    found = {}
    for impl in ("cpu", "reference"):
        leaves = [x.detach().requires_grad_() for x in qkv]
        attend(case, leaves, impl)[used].sum().backward()
        found[impl] = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
    read = (0, 4, 5) if used == 0 else (3, 1, 2)
    for i, (ours, definition) in enumerate(zip(found["cpu"], found["reference"], strict=True)):
        assert (ours - definition).abs().max() < 1e-5, NAMES[i]
        assert bool(ours.any()) == (i in read), NAMES[i]


@needs_extension
def test_only_some_inputs_require_grad(poisoned_memory):
    case = Case()
    qkv, d_out = inputs(case)
    exact, plain = expected(case, torch.float32)
    leaves = [x.detach().requires_grad_(i in (0, 4)) for i, x in enumerate(qkv)]
    torch.autograd.backward(attend(case, leaves), d_out)
    assert [x.grad is not None for x in leaves] == [True, False, False, False, True, False]
    for i in (0, 4):
        assert_close_to_fp64(leaves[i].grad, exact[GRADS[i]], plain[GRADS[i]], name=GRADS[i])


@pytest.mark.parametrize("impl", REFERENCE_AND_CPU)
def test_a_tensor_shift_is_an_int_shift(impl, poisoned_memory):
    case = Case(frames=5, audio_len=23, window=2, shift=3)
    as_int = packed_gradients(case, torch.float32, impl)
    for dtype in (torch.int32, torch.int64):
        for shift in (torch.tensor(3, dtype=dtype), torch.tensor([99, 3], dtype=dtype)[1:]):
            as_tensor = packed_gradients(case, torch.float32, impl, shift=shift)
            assert all(torch.equal(as_int[name], as_tensor[name]) for name in as_int)


@pytest.mark.filterwarnings("ignore:mmattn computes random_shift_attention by its slow reference")
@pytest.mark.parametrize("dtype", (torch.float64, torch.float16), ids=("fp64", "fp16"))
def test_other_dtypes_on_the_cpu_run_the_reference(dtype):
    case = Case(audio_len=27)
    found = packed_gradients(case, dtype, "auto")
    assert_within_budget(found, case, dtype)
    definition = packed_gradients(case, dtype, "reference")
    assert all(torch.equal(found[name], definition[name]) for name in found)


@needs_extension
def test_packed_projection_receives_one_gradient(poisoned_memory):
    """Gradients flow back through the views of one projection, as in the module."""
    case = Case()
    exact, plain = expected(case, torch.float32)
    (video_q, *_, audio_v), d_out = inputs(case)
    packed = [x._base.clone().requires_grad_() for x in (video_q, audio_v)]
    out = attend(case, (*packed[0].unbind(2), *packed[1].unbind(2)))
    torch.autograd.backward(out, d_out)
    for i, x in enumerate((*packed[0].grad.unbind(2), *packed[1].grad.unbind(2))):
        assert_close_to_fp64(x, exact[GRADS[i]], plain[GRADS[i]], name=GRADS[i])


@needs_extension
@pytest.mark.parametrize("requires_grad", (False, True), ids=("inference", "training"))
def test_opcheck_of_a_tensor_shift(requires_grad):
    qkv = [x.requires_grad_(requires_grad) for x in inputs(Case(packed=False))[0]]
    shift = torch.tensor(1, dtype=torch.int32)
    torch.library.opcheck(torch.ops.mmattn.random_shift_attention.default, (*qkv, 4, 2, 0, shift, 0.25, "cpu"))


def training_step(*args, **at):
    """A function of leaves and a shift that returns outputs and gradients, eager or compiled."""

    def step(qkv, shift, d_out):
        leaves = [x.detach().requires_grad_() for x in qkv]
        out = step.attend(leaves, shift)
        return *(x.detach() for x in out), *torch.autograd.grad(out, leaves, d_out)

    step.attend = lambda qkv, shift: mmattn.random_shift_attention(*qkv, shift=shift, **at)
    return step


@pytest.mark.parametrize("impl", REFERENCE_AND_AUTO)
def test_compile_with_a_tensor_shift(impl, fresh_dynamo):
    case = Case(audio_len=27)
    step = training_step(frames=4, window=2, impl=impl)
    qkv, d_out = inputs(case)
    shift = torch.tensor(case.shift)
    eager = step(qkv, shift, d_out)
    step.attend = torch.compile(step.attend, fullgraph=True, backend="aot_eager")
    for name, x, y in zip(("video_out", "audio_out", *GRADS), step(qkv, shift, d_out), eager, strict=True):
        assert (x - y).abs().max() < 1e-6, name


@needs_extension
def test_compile_with_inductor(fresh_dynamo):
    case = Case(audio_len=27)
    step = training_step(frames=4, window=2)
    qkv, d_out = inputs(case)
    eager = step(qkv, torch.tensor(1), d_out)
    step.attend = torch.compile(step.attend, fullgraph=True)
    for name, x, y in zip(("video_out", "audio_out", *GRADS), step(qkv, torch.tensor(1), d_out), eager, strict=True):
        assert (x - y).abs().max() < 1e-6, name


@needs_extension
@pytest.mark.parametrize("tensor_shift", (False, True), ids=("int shift", "tensor shift"))
def test_shifts_and_lengths_compile_nothing_anew(tensor_shift, fresh_dynamo):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = training_step(frames=6, window=2)
    eager = step.attend
    step.attend = torch.compile(step.attend, fullgraph=True, backend=counter)

    def check(case):
        qkv, d_out = inputs(case)
        shift = torch.tensor(case.shift, dtype=torch.int32) if tensor_shift else case.shift
        found = step(qkv, shift, d_out)
        for x, y in zip(found[:2], eager(qkv, case.shift), strict=True):
            assert (x - y).abs().max() < 1e-6

    base = Case(frames=6, pixels=4, audio_len=33, packed=False)
    for shift in (1, 2):
        check(dataclasses.replace(base, shift=shift))
    assert counter.frame_count <= (1 if tensor_shift else 2)
    before = counter.frame_count
    for shift in (3, 4, 0, 1):
        check(dataclasses.replace(base, shift=shift))
    assert counter.frame_count <= before + (0 if tensor_shift else 1)  # 0 is a number of its own to the compiler
    check(dataclasses.replace(base, pixels=7, audio_len=41))
    before = counter.frame_count
    for pixels, audio_len in ((9, 50), (5, 37), (8, 66)):
        check(dataclasses.replace(base, pixels=pixels, audio_len=audio_len, shift=3))
    assert counter.frame_count == before


@needs_extension
def test_a_compiled_shift_out_of_range_is_refused(fresh_dynamo):
    """While compiling its value is unknown; the kernel may not read past the keys for it."""
    qkv, _ = inputs(Case())
    compiled = torch.compile(training_step(frames=4, window=2).attend, fullgraph=True, backend="aot_eager")
    for shift in (-7, 3):
        with pytest.raises(Exception, match=f"shift is {shift}; expected 0..frames-window = 0..2"):
            compiled(qkv, torch.tensor(shift))


def change(name, function):
    return lambda qkv: [function(x) if n == name else x for n, x in zip(NAMES, qkv, strict=True)]


def same(qkv):
    return qkv


def audio(function):
    return lambda qkv: [*qkv[:3], *map(function, qkv[3:])]


BAD_TENSORS = {
    "rank": (change("video_k", lambda x: x[0]), ValueError, r"video_k has shape \[20, 2, 16\]"),
    "not a tensor": (change("audio_v", lambda x: None), TypeError, r"audio_v is a NoneType"),
    "not the first tensor": (change("video_q", lambda x: 3.0), TypeError, r"video_q is a float"),
    "dtypes": (change("audio_k", torch.Tensor.double), TypeError, r"audio_k has dtype torch.float64; expected torch.f"),
    "integers": (lambda qkv: [x.int() for x in qkv], TypeError, r"video_q has dtype torch.int32"),
    "devices": (change("audio_q", lambda x: x.to("meta")), ValueError, r"audio_q is on meta; expected cpu"),
    "lengths": (change("video_v", lambda x: x[:, 1:]), ValueError, r"video_v has shape \[1, 19, 2, 16\]; expected \[1"),
    "batches": (audio(lambda x: torch.cat([x, x])), ValueError, r"audio_q has shape \[2, 24, 2, 16\]; expected \[1, T"),
    "heads": (audio(lambda x: x[:, :, :1]), ValueError, r"audio_q has shape \[1, 24, 1, 16\]"),
    "head dims": (audio(lambda x: x[..., :8]), ValueError, r"audio_q has shape \[1, 24, 2, 8\]"),
    "no heads": (lambda qkv: [x[:, :, :0] for x in qkv], ValueError, r"video_q has shape \[1, 20, 0, 16\]"),
    "last stride": (change("audio_v", lambda x: x.mT.contiguous().mT), ValueError, r"audio_v has stride 2 in its last"),
    "too little audio": (audio(lambda x: x[:, :3]), ValueError, r"audio_q has 3 positions"),
    "no video": (lambda qkv: [*(x[:, :0] for x in qkv[:3]), *qkv[3:]], ValueError, r"frames is 4; expected a div.* 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensor(name):
    alter, error, message = BAD_TENSORS[name]
    with pytest.raises(error, match=message):
        attend(Case(), alter(inputs(Case())[0]), "auto")


BAD_ARGUMENTS = {
    "frames do not divide": ({"frames": 3, "shift": 0}, ValueError, "frames is 3; expected a divisor .* 20"),
    "no frames": ({"frames": 0}, ValueError, "frames is 0; expected at least 1"),
    "window of zero": ({"window": 0}, ValueError, "window is 0; expected 1..frames = 1..4"),
    "window past the frames": ({"window": 5}, ValueError, "window is 5; expected 1..frames = 1..4"),
    "shift below zero": ({"shift": -1}, ValueError, "shift is -1; expected 0..frames-window = 0..2"),
    "shift too large": ({"shift": 3}, ValueError, "shift is 3; expected 0..frames-window = 0..2"),
    "tensor shift too large": ({"shift": torch.tensor(3)}, ValueError, "shift is 3; expected 0..frames-window = 0..2"),
    "float shift": ({"shift": 1.0}, TypeError, "shift is 1.0; expected an int"),
    "bool shift": ({"shift": True}, TypeError, "shift is True; expected an int"),
    "float tensor shift": ({"shift": torch.tensor(1.0)}, TypeError, "shift is a torch.float32 tensor"),
    "two shifts": ({"shift": torch.tensor([1, 1])}, TypeError, r"shift is a torch.int64 tensor of shape \[2\]"),
    "shift elsewhere": ({"shift": torch.tensor(1, device="meta")}, ValueError, "shift is on meta; expected cpu"),
    "unknown impl": ({"impl": "cuda"}, ValueError, "impl is 'cuda'; expected one of 'auto', 'reference'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_argument(name):
    overrides, error, message = BAD_ARGUMENTS[name]
    with pytest.raises(error, match=message):
        attend(Case(), inputs(Case())[0], **{"impl": "auto", **overrides})


def test_a_named_impl_that_cannot_run_says_why(monkeypatch):
    qkv, _ = inputs(Case())
    with pytest.raises(RuntimeError, match=r"impl 'cpu' .* the head dimension is 257, and it takes up to 256"):
        attend(Case(head_dim=257), inputs(Case(head_dim=257))[0], "cpu")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r"impl 'triton' .* the tensors are on cpu"):
        attend(Case(), qkv, "triton")


def test_a_head_too_wide_for_the_kernels_runs_the_reference():
    case = Case(head_dim=257, heads=1)
    with pytest.warns(UserWarning, match="slow reference: .*the head dimension is 257, and it takes up to 256"):
        found = packed_gradients(case, torch.float32, "auto")
    assert_within_budget(found, case, torch.float32)


PUBLISHED = {
    f"level {level}": Case(16, pixels, audio_len, window, 3 % (17 - window), 64, heads)
    for level, (heads, pixels, audio_len, window) in enumerate(
        ((4, 1024, 6400, 1), (6, 256, 1600, 4), (8, 64, 400, 8), (8, 64, 400, 16)), start=1
    )
}
FEW = ("n of 25", "separate tensors", "several blocks, partial and wrapping", "head_dim 128")
MANY = (
    *FEW,
    "three heads, two batches",
    "left-over read by a wrapping window",
    "left-over, one position a segment",
    "window of all frames, left-over",
    "head_dim 20",
    "head_dim 64",
    "one past a tile on each axis",
    "scale below zero",
    "large scores",
)
INTERPRETED = (
    ("n of 25", "fp32"),
    ("left-over read by a wrapping window", "fp32"),
    ("three heads, two batches", "fp16"),
)
ON_GPU = [(name, dtype) for dtype in GPU_DTYPES for name in (*(MANY if dtype == "fp32" else FEW), *PUBLISHED)]


@pytest.mark.device
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[] if (name, dtype) in INTERPRETED else pytest.mark.gpu)
        for name, dtype in dict.fromkeys((*INTERPRETED, *ON_GPU))
    ],
)
def test_triton_through_the_public_function(name, dtype, poisoned_memory):
    case, dtype = {**CASES, **PUBLISHED}[name], GPU_DTYPES[dtype]
    assert_within_budget(packed_gradients(case, dtype, ON_DEVICE, device_inputs), case, dtype)
    expected.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("op", ("random_shift_attention", "group_norm", "dilated_conv1d"))
@pytest.mark.parametrize("dtype", GPU_DTYPES.values(), ids=GPU_DTYPES)
def test_triton_is_what_auto_chooses_on_a_gpu(op, dtype, recwarn):
    assert dispatch.explain(op, "auto", "cuda", dtype, 64) == ("triton", [])
    assert dispatch.choose(op, "auto", torch.empty(1, 1, 1, 64, dtype=dtype, device="cuda")) == "triton"
    assert not recwarn


DEVICE_CASE = Case(frames=6, pixels=7, audio_len=41, window=2, shift=3, head_dim=32)


def device_tensors(case, dtype=torch.float32, **more):
    qkv, d_out = device_inputs(case, dtype)
    return dict(zip((*NAMES, "d_video_out", "d_audio_out"), (*qkv, *d_out), strict=True)) | more


def outputs_and_gradients(case, tensors, impl=ON_DEVICE, **overrides):
    """Both outputs and all six gradients, of tensors as by `device_tensors`, by name."""
    leaves = [tensors[name].detach().requires_grad_() for name in NAMES]
    out = attend(case, leaves, impl, **({"shift": tensors["shift"]} if "shift" in tensors else {}), **overrides)
    grads = torch.autograd.grad(out, leaves, (tensors["d_video_out"], tensors["d_audio_out"]))
    return dict(zip(("video_out", "audio_out", *GRADS), (*(x.detach() for x in out), *grads), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
def test_graph_replays_with_changed_shifts(dtype):
    """The shift is read by the kernels, so one recorded graph serves all."""
    tensors = device_tensors(DEVICE_CASE, torch.bfloat16, shift=torch.zeros(1, dtype=dtype, device="cuda"))
    later = [
        device_tensors(DEVICE_CASE, torch.bfloat16, shift=torch.tensor([shift], device="cuda")) for shift in (4, 0, 1)
    ]
    found = replays(lambda t: outputs_and_gradients(DEVICE_CASE, t), tensors, later)
    for values, result in zip(later, found, strict=True):
        assert largest_error(result, outputs_and_gradients(DEVICE_CASE, values)) < 2e-3
    assert largest_error(found[0], found[1]) > 0.1


@pytest.mark.gpu
def test_side_stream():
    tensors = device_tensors(DEVICE_CASE)
    plain = outputs_and_gradients(DEVICE_CASE, tensors)
    found = on_a_side_stream(lambda t: outputs_and_gradients(DEVICE_CASE, t), tensors)
    assert largest_error(found, plain) < 1e-6


@pytest.mark.device
def test_a_shift_on_the_device_is_an_int_shift(poisoned_memory):
    case = dataclasses.replace(DEVICE_CASE, head_dim=16)
    plain = outputs_and_gradients(case, device_tensors(case))
    for dtype in (torch.int32, torch.int64):
        shift = torch.tensor([99, case.shift], dtype=dtype, device=DEVICE)[1:]
        assert largest_error(outputs_and_gradients(case, device_tensors(case, shift=shift)), plain) < 1e-6


@pytest.mark.gpu
def test_a_shift_on_the_device_out_of_range_reads_nothing_outside(poisoned_memory):
    for shift in (-(2**31), -7, 6, 2**31 - 1):
        found = outputs_and_gradients(DEVICE_CASE, device_tensors(DEVICE_CASE, shift=torch.tensor(shift).cuda()))
        assert all(torch.isfinite(x).all() for x in found.values())


@pytest.mark.device
def test_device_gradients_of_any_strides(poisoned_memory):
    case = Case()
    tensors = device_tensors(case)
    tensors["d_video_out"] = tensors["d_video_out"].mT.contiguous().mT
    tensors["d_audio_out"] = tensors["d_audio_out"][:, :1, :1].expand_as(tensors["d_audio_out"])
    dense = {name: x.contiguous() if name in ("d_video_out", "d_audio_out") else x for name, x in tensors.items()}
    assert largest_error(outputs_and_gradients(case, tensors), outputs_and_gradients(case, dense)) < 1e-6


@pytest.mark.device
@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpoint_on_the_device(reentrant):
    case = Case()
    tensors = device_tensors(case)
    plain = outputs_and_gradients(case, tensors)
    leaves = [tensors[name].detach().requires_grad_() for name in NAMES]
    out = torch.utils.checkpoint.checkpoint(lambda *x: attend(case, x, ON_DEVICE), *leaves, use_reentrant=reentrant)
    torch.autograd.backward(out, (tensors["d_video_out"], tensors["d_audio_out"]))
    assert all(torch.equal(x.grad, plain[name]) for name, x in zip(GRADS, leaves, strict=True))


@pytest.mark.device
@pytest.mark.parametrize("dtype", (torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)))
def test_autocast_on_the_device(dtype):
    case = Case(audio_len=27)
    qkv, _ = device_inputs(case)
    leaves = [x.detach().requires_grad_() for x in qkv]
    with torch.autocast(DEVICE, dtype):
        out = attend(case, leaves, ON_DEVICE)
        double = attend(case, [x.double() for x in qkv], "auto")
    assert all(x.dtype == dtype for x in out) and double[0].dtype == torch.float64
    expected_out = attend(case, [x.to(dtype) for x in qkv], ON_DEVICE)
    assert all(torch.equal(x, y) for x, y in zip(out, expected_out, strict=True))
    out[0].float().sum().backward()
    assert leaves[0].grad.dtype == torch.float32 and torch.isfinite(leaves[4].grad).all()


@pytest.mark.gpu
@pytest.mark.parametrize("tensor_shift", (False, True), ids=("int shift", "tensor shift"))
def test_inductor_on_the_device(tensor_shift, fresh_dynamo):
    """Forward and backward as one graph each; a changed shift compiles nothing anew."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    step = training_step(frames=6, window=2, impl=ON_DEVICE)
    eager, step.attend = step.attend, torch.compile(step.attend, fullgraph=True, backend=counter)
    qkv, d_out = device_inputs(DEVICE_CASE)
    counts = []
    for number in (1, 2, 3, 4):
        shift = torch.tensor(number, device=DEVICE) if tensor_shift else number
        found = step(qkv, shift, d_out)
        step.attend, compiled = eager, step.attend
        for name, x, y in zip(("video_out", "audio_out", *GRADS), found, step(qkv, shift, d_out), strict=True):
            assert relative_error(x, y) < 1e-6, name
        step.attend = compiled
        counts.append(counter.frame_count)
    assert counts[-1] == (1 if tensor_shift else counts[1]) <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("requires_grad", (False, True), ids=("inference", "training"))
def test_opcheck_on_the_device(requires_grad):
    qkv, _ = device_inputs(Case(packed=False))
    qkv = [x.clone().requires_grad_(requires_grad) for x in qkv]
    shift = torch.tensor(1, dtype=torch.int32, device="cuda")
    arguments = (*qkv, 4, 2, 0, shift, 0.25, "triton")
    torch.library.opcheck(torch.ops.mmattn.random_shift_attention.default, arguments)


@pytest.mark.gpu
@pytest.mark.xdist_group("memory")
def test_offsets_beyond_32_bits():
    """Rows of q, k, v and of the gradients so far apart that the last begin past 2^31 elements; and such an output."""
    enough_memory(24)
    case = Case(frames=2, pixels=20, audio_len=43, window=2, shift=0, head_dim=64, heads=1)
    dense = device_tensors(case, torch.bfloat16)
    found = outputs_and_gradients(case, far_apart(dense))
    assert largest_error(found, outputs_and_gradients(case, dense)) < 2e-3
    # All queries of a segment are one: so must be their outputs, at whatever position.
    heads, dim, frames, audio_len = 16, 128, 16, FAR // (16 * 128) + 32
    q = torch.randn(1, 1, heads, dim, dtype=torch.bfloat16, device="cuda").expand(1, audio_len, heads, dim)
    k, v = torch.randn(2, 1, frames * 4, heads, dim, dtype=torch.bfloat16, device="cuda")
    geometry = {"frames": frames, "window": 3, "shift": 5}
    few = mmattn.random_shift_attention(k, k, v, *(q[:, : 4 * frames],) * 3, **geometry)[1]
    many = mmattn.random_shift_attention(k, k, v, q, q, q, **geometry)[1]
    assert many.numel() > FAR
    segments = many.unflatten(1, (frames, -1))
    assert relative_error(segments[:, :, -1], few[:, 3::4]) < 5e-3
    for segment in segments.unbind(1):
        assert torch.equal(segment.amin(1), segment.amax(1))


def test_draw_shift():
    generator = torch.Generator().manual_seed(1)
    drawn = [mmattn.draw_shift(5, 3, generator=generator) for _ in range(60)]
    assert set(drawn) == {0, 1, 2} and all(type(x) is int for x in drawn)
    generator.manual_seed(1)
    assert drawn == [mmattn.draw_shift(5, 3, generator=generator) for _ in range(60)]
    assert mmattn.draw_shift(4, 4) == 0
    torch.manual_seed(2)
    one = [mmattn.draw_shift(1000, 1) for _ in range(3)]
    torch.manual_seed(2)
    assert one == [mmattn.draw_shift(1000, 1) for _ in range(3)]
    for frames, window, message in ((0, 1, "frames is 0"), (4, 5, "window is 5"), (4, 0, "window is 0")):
        with pytest.raises(ValueError, match=message):
            mmattn.draw_shift(frames, window)


def in_a_fresh_process(program, *, command=("-c",), **environment):
    done = subprocess.run(
        [sys.executable, *command, *((program,) if program else ())],
        env={**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


BLOCK = "import sys; sys.modules['triton'] = sys.modules['mmattn_kernels._cpu'] = None\n"


def test_import_needs_torch_alone():
    """And without the compiled parts the function still runs, and a named implementation says what is missing."""
    out = in_a_fresh_process(
        BLOCK
        + """
import warnings
import torch, mmattn
assert not [m for m in sys.modules if m.startswith("mmattn_kernels.") and sys.modules[m] is not None]
qkv = [torch.randn(1, 4, 1, 16) for _ in range(6)]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        mmattn.random_shift_attention(*qkv, frames=2, window=1, shift=1)
print(*(w.message for w in caught), sep="\\n")
for impl in ("cpu", "triton"):
    try:
        mmattn.random_shift_attention(*qkv, frames=2, window=1, shift=1, impl=impl)
    except RuntimeError as error:
        print(error)
"""
    )
    warning, cpu, triton = out.splitlines()
    assert (
        "slow reference: cpu cannot run random_shift_attention: the extension mmattn_kernels._cpu is not built"
        in warning
    )
    assert (
        "impl 'cpu' cannot run random_shift_attention here: the extension mmattn_kernels._cpu is not built; install"
        in cpu
    )
    assert "impl 'triton' cannot run random_shift_attention here: the tensors are on cpu" in triton


def test_import_loads_nothing_compiled():
    out = in_a_fresh_process("import sys, mmattn; print([m for m in sys.modules if m.startswith('mmattn_kernels.')])")
    assert out.strip() == "[]"


@needs_extension
def test_info():
    out = in_a_fresh_process(None, command=("-m", "mmattn.info", "--verbose"), MMATTN_CPU_ISA="portable")
    for part in (
        f"mmattn            {mmattn.__version__}",
        torch.__version__,
        "portable is active",
        "MMATTN_CPU_ISA    portable",
        "random_shift_attention cpu float32: cpu\n    reference  on request\n    triton     no: the tensors are on cpu",
        "random_shift_attention cpu float64: reference",
        "cpu        no: the dtype is torch.float64",
    ):
        assert part in out, part


@needs_extension
def test_info_in_short(monkeypatch):
    """A line for each op, and each reason once."""
    monkeypatch.delenv("MMATTN_IMPL", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _, ops, reasons = (part.splitlines() for part in mmattn.info.report().split("\n\n"))
    assert len(ops) == len(mmattn.dispatch.OPS)
    assert "group_norm on cpu: cpu (float32, bfloat16), reference (float16, float64)" in ops
    assert sum("the tensors are on cpu, and it runs on CUDA devices" in line for line in reasons) == 1
    assert any(line.startswith("cpu: the dtype is torch.float64, and it computes") for line in reasons)


def test_info_without_the_compiled_parts():
    run = "import runpy; runpy.run_module('mmattn.info', run_name='__main__')"
    out = in_a_fresh_process(BLOCK + run)
    assert "cpu extension     no: the extension mmattn_kernels._cpu is not built; install" in out
    assert "random_shift_attention on cpu: reference (float32, bfloat16, float16, float64)" in out
    assert out.count("cpu: the extension mmattn_kernels._cpu is not built") == 1


@needs_extension
def test_info_of_a_chosen_implementation(monkeypatch):
    for requested, line in {
        "reference": "random_shift_attention cpu float32: reference\n    triton",
        "cpu": "random_shift_attention cpu float64: error: MMATTN_IMPL is 'cpu'\n    reference  on request",
        "fast": "random_shift_attention cpu float32: error: MMATTN_IMPL is 'fast'; expected 'auto', 'reference'",
    }.items():
        monkeypatch.setenv("MMATTN_IMPL", requested)
        text = mmattn.info.report(is_verbose=True)
        assert f"MMATTN_IMPL       {requested}\n" in text and line in text


@needs_extension
def test_info_with_an_instruction_set_that_is_not_here():
    out = in_a_fresh_process(None, command=("-m", "mmattn.info"), MMATTN_CPU_ISA="mmx")
    assert "'mmx'" in out and "this CPU and build run portable" in out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 0}, "frames is 0"),
        ({"window": 5}, "window is 5"),
        ({"shift": 9}, "shift is 9"),
        ({"impl": "reference"}, "plain torch"),
        ({"dim": 512}, "512"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_op_itself_refuses_what_kernels_would_trust(change, message):
    arguments = {"frames": 4, "window": 1, "shift": 0, "impl": "cpu", "dim": 16} | change
    tensors = [torch.randn(1, 8, 1, arguments["dim"]) for _ in range(6)]
    numbers = [arguments[name] for name in ("frames", "window", "shift")]
    with pytest.raises((ValueError, RuntimeError), match=message):
        torch.ops.mmattn.random_shift_attention(*tensors, *numbers, None, 1.0, arguments["impl"])


@pytest.mark.parametrize(
    ("change", "message"),
    [({"frames": 4.0}, "frames is 4.0"), ({"window": "1"}, "window is '1'"), ({"frames": True}, "frames is True")],
    ids=["float", "text", "bool"],
)
def test_numbers_that_are_no_ints_are_refused(change, message):
    tensors, geometry = _tiny()
    with pytest.raises(TypeError, match=message):
        mmattn.random_shift_attention(*tensors, **geometry | change)


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm of binutils")
def test_no_code_of_one_instruction_set_runs_or_is_linked_for_another():
    library = mmattn_kernels.cpu.extension().__file__
    symbols = subprocess.run(["nm", "-C", library], capture_output=True, text=True, check=True).stdout
    assert "_GLOBAL__sub_I_attention" not in symbols, "a static initialiser would run at import on every CPU"


def _tiny():
    tensors = [torch.randn(1, length, 1, 16) for length in (8, 8, 8, 12, 12, 12)]
    return tensors, {"frames": 4, "window": 2, "shift": 1}
