# SPDX-License-Identifier: MIT
"""What the tests of the ops and of the modules share."""

import pathlib
import shutil
import sys

import pytest
import torch

import mmattn_kernels.cpu
from mmattn.testing import assert_close_to_fp64, relative_error

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "bench"))

from published import filled

INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GPU_DTYPES = {**DTYPES, "fp16": torch.float16}
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
# On a GPU what users get; on a CPU Triton's kernels, interpreted, run on request alone.
ON_DEVICE = "auto" if HAS_GPU else "triton"

needs_extension = pytest.mark.skipif(mmattn_kernels.cpu.missing() is not None, reason=str(mmattn_kernels.cpu.missing()))
needs_git = pytest.mark.skipif(
    shutil.which("git") is None or not (pathlib.Path(__file__).resolve().parent.parent / ".git").exists(),
    reason="needs a checkout of git, which a source distribution is not",
)
REFERENCE_AND_CPU = ("reference", pytest.param("cpu", marks=needs_extension))
REFERENCE_AND_AUTO = ("reference", pytest.param("auto", marks=needs_extension))


def with_gradients(function, tensors, d_out, dtype=None):
    """{"out": function(tensors), "d_<name>": gradient} for a dict of tensors, each used in its own dtype or in `dtype`.

    In their own dtype they keep their strides.
    """
    leaves = {name: x.detach() if dtype is None else x.detach().to(dtype) for name, x in tensors.items()}
    out = function({name: x.requires_grad_() for name, x in leaves.items()})
    out.backward(d_out.to(out.dtype))
    return {"out": out.detach(), **{f"d_{name}": x.grad for name, x in leaves.items()}}


def assert_as_exact(attend, oracle, tensors, d_out):
    """Output and gradients of an attention op are within the budget that its oracle has in fp64 and in their dtype."""
    exact, plain = with_gradients(oracle, tensors, d_out, torch.float64), with_gradients(oracle, tensors, d_out)
    found = with_gradients(attend, tensors, d_out)
    assert found["out"].is_contiguous() and found.keys() == exact.keys()
    for key, x in found.items():
        assert_close_to_fp64(x, exact[key], plain[key], name=key, rounding=4.0)


def on_device(x):
    """The same values, strides and offset on DEVICE; `.to` makes dense what is cut out of something wider."""
    if not x.numel():
        return x.to(DEVICE)
    count = x.untyped_storage().nbytes() // x.element_size()
    storage = x.detach().as_strided((count,), (1,), 0).to(DEVICE)
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


def replays(function, tensors, later):
    """{name: result} of function(tensors) recorded in a CUDA graph, replayed on each of the dicts in `later`."""
    static = {name: x.clone() for name, x in tensors.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles and allocates
            function(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(static)
    found = []
    for values in later:
        for name, x in values.items():
            static[name].copy_(x)
        graph.replay()
        found.append({name: x.clone() for name, x in out.items()})
    return found


def on_a_side_stream(function, tensors):
    """function(tensors) on a stream that has them late: whoever computes on another stream computes on NaNs."""
    function(tensors)  # compiled before, since that would take longer than the wait
    late = {name: torch.full_like(x, float("nan")) for name, x in tensors.items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles, some 50 ms
        for name, x in late.items():
            x.copy_(tensors[name])
        found = function(late)
    torch.cuda.current_stream().wait_stream(stream)
    return found


FAR = 2**31  # elements, past which an offset is no 32-bit number


def far_apart(tensors):
    """The same values in tensors [B, L, ...] whose last rows begin past FAR elements, interleaved in one of bf16."""
    rows, widths = (max(x.shape[:2].numel() for x in tensors.values()), [x[0, 0].numel() for x in tensors.values()])
    wide = torch.zeros(rows, FAR // (rows // 2), dtype=torch.bfloat16, device=DEVICE)
    found, first = {}, 0
    for (name, x), width in zip(tensors.items(), widths, strict=True):
        count = x.shape[:2].numel()
        found[name] = wide[:count, first : first + width].unflatten(1, x.shape[2:]).unflatten(0, x.shape[:2])
        found[name].copy_(x)
        first += width
    return found


def enough_memory(gigabytes):
    """Skips the test where that much is not free on the GPU, other processes' memory included."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GiB of the GPU, of which {free:.0f} are free")


def largest_error(found, expected):
    """Of results by name."""
    assert found.keys() == expected.keys()
    return max(relative_error(x, expected[name]) for name, x in found.items())


def strided(x):
    """The same values as a slice of something wider: other strides between batches and rows, and an odd offset."""
    batch, length, channels = x.shape
    wide = torch.full((2 * batch + 1, length + 3, channels + 11), float("nan"), dtype=x.dtype)
    wide[1::2, 2:-1, 5:-6] = x
    return wide[1::2, 2:-1, 5:-6]


# A coupled U-Net that has a little of everything; clips of it are video [B, 4, 3, 8, 8] and audio [B, 1, 64].
SMALL_UNET = {
    "video_size": (4, 3, 8, 8),
    "audio_size": (1, 64),
    "model_channels": 32,
    "num_res_blocks": 1,
    "cross_attention_resolutions": (2,),
    "cross_attention_windows": (2,),
    "video_attention_resolutions": (2,),
    "channel_mult": (1, 2),
    "num_heads": 2,
    "num_head_channels": 32,
    "middle_cross_attention": False,
}


def fill(module, seed=0):
    """The module with such parameters: published blocks are born as the identity, and networks with outputs of zero."""
    module.load_state_dict(filled({name: x.shape for name, x in module.named_parameters()}, seed))
    return module
