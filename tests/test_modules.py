# SPDX-License-Identifier: MIT
"""The modules around the ops, and the swap of random-shift attention into models of the published code."""

import contextlib
import copy
import dataclasses
import gc
import io
import json
import pathlib
import pickle
import warnings

import pytest
import torch
from helpers import DEVICE, DEVICES, DTYPES, GPU_DTYPES, REFERENCE_AND_CPU, fill, on_a_side_stream, replays
from published import AudioBlock, CrossAttention
from torch import nn
from torch.utils.checkpoint import checkpoint

import mmattn
from mmattn import DilatedConvBlock, RandomShiftAttention
from mmattn.testing import assert_close_to_fp64, relative_error

DATA = pathlib.Path(__file__).parent / "data"


def streams(channels=64, frames=4, size=3, audio_len=27, batch=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    video = torch.randn(batch, frames, channels, size, size, generator=generator)
    return video.to(dtype), torch.randn(batch, channels, audio_len, generator=generator).to(dtype)


def module(channels=64, **options):
    """A module whose every parameter matters: it is born as the identity."""
    torch.manual_seed(3)
    made = RandomShiftAttention(channels, **{"num_heads": 2, "window": 2, **options})
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else channels**-0.5))
    return made


def channels_last(video, audio):
    video = video.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    return video, audio.transpose(1, 2).contiguous().transpose(1, 2)


def gradients(made, video, audio, call):
    """Gradients of every parameter and of both inputs, through call(module, video, audio)."""
    made.zero_grad()
    leaves = [video.detach().requires_grad_(), audio.detach().requires_grad_()]
    out = call(made, *leaves)
    weights = torch.Generator().manual_seed(4)
    sum((x * torch.randn(x.shape, generator=weights).to(x.device)).sum() for x in out).backward()
    grads = [x.grad for x in (*leaves, *made.parameters())]
    return [x.detach() for x in out], [None if x is None else x.clone() for x in grads]


@pytest.mark.parametrize("impl", (*REFERENCE_AND_CPU, pytest.param("auto", marks=pytest.mark.gpu)))
@pytest.mark.parametrize("case", (0, 1))
def test_published_values(case, impl, monkeypatch):
    safetensors = pytest.importorskip("safetensors")
    monkeypatch.setenv("MMATTN_IMPL", impl)
    device = DEVICE if impl == "auto" else "cpu"
    with safetensors.safe_open(DATA / "attention_block.safetensors", "pt", device=device) as file:
        config = json.loads(file.metadata()["cases"])[case]
        tensors = {key.removeprefix(f"{case}."): file.get_tensor(key) for key in file.keys() if key[0] == str(case)}  # noqa: SIM118
    made = RandomShiftAttention(config["C"], num_heads=config["heads"], window=config["S"]).to(device)
    parameters = {key.removeprefix("param."): x for key, x in tensors.items() if key.startswith("param.")}
    made.load_state_dict(parameters)
    video, audio = tensors["video"].requires_grad_(), tensors["audio"].requires_grad_()
    out = made(video, audio, shift=config["R"])
    torch.autograd.backward(out, (tensors["video_out_grad"], tensors["audio_out_grad"]))
    found = {"video_out": out[0], "audio_out": out[1], "video_grad": video.grad, "audio_grad": audio.grad}
    for name, x in found.items():
        assert relative_error(x, tensors[name]) < 1e-5, name
    # The names of the gradients go through the same renaming as those of the parameters.
    wanted = RandomShiftAttention(config["C"], num_heads=config["heads"]).to(device)
    wanted.load_state_dict({key: tensors[f"param_grad.{key}"] for key in parameters})
    for (name, parameter), grad in zip(made.named_parameters(), wanted.parameters(), strict=True):
        assert relative_error(parameter.grad, grad) < 1e-5, name


def test_a_new_module_is_the_identity():
    video, audio = streams(128)
    out = RandomShiftAttention(128, window=3)(video, audio)
    assert torch.equal(out[0], video) and torch.equal(out[1], audio)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_memory_formats(dtype):
    """Host code calls .view on what it gave contiguous; what is channels last stays so, and the values agree."""
    made = module().to(dtype)
    video, audio = streams(dtype=dtype)
    contiguous = made(video, audio, shift=1)
    contiguous[0].view(2, -1), contiguous[1].view(2, -1)
    last = made(*channels_last(video, audio), shift=1)
    assert last[0].permute(0, 1, 3, 4, 2).is_contiguous() and last[1].transpose(1, 2).is_contiguous()
    wide = torch.zeros(2, 4, 64, 3, 6, dtype=dtype)
    wide[..., ::2] = video
    strided = made(wide[..., ::2], audio.flip(2).flip(2), shift=1)
    for x in (last, strided):
        # One rounding less where the residual is added by the projection.
        errors = [relative_error(a, b) for a, b in zip(x, contiguous, strict=True)]
        assert max(errors) < torch.finfo(dtype).eps, errors


def test_a_window_of_all_frames():
    """Whatever clip comes; nothing is left to shift."""
    made = module(window=None)
    for frames in (1, 4):
        video, audio = streams()
        video = video[:, :frames]
        expected = module(window=frames)
        expected.load_state_dict(made.state_dict())
        found = made(video, audio)
        assert all(torch.equal(a, b) for a, b in zip(found, expected(video, audio, shift=0), strict=True))


def test_no_copy_of_channels_last(monkeypatch):
    """q of each stream is a view of one projection, and the tokens are a view of the input."""
    seen = {}
    attend = mmattn.modules.random_shift_attention

    def spy(*qkv, **options):
        seen["qkv"] = qkv
        return attend(*qkv, **options)

    monkeypatch.setattr(mmattn.modules, "random_shift_attention", spy)
    made = module()
    pointers = []
    convolve = mmattn._layers.dilated_conv1d

    def spy_on_convolution(x, *args, **options):
        pointers.extend([x.data_ptr()] if "norm" in options else [options["residual"].data_ptr()])
        return convolve(x, *args, **options)

    monkeypatch.setattr(mmattn._layers, "dilated_conv1d", spy_on_convolution)
    video, audio = channels_last(*streams())
    made(video, audio, shift=0)
    assert pointers == 2 * [video.data_ptr(), audio.data_ptr()]
    for i in (0, 3):
        q, k, v = seen["qkv"][i : i + 3]
        assert q._base is k._base is v._base and q.stride(-1) == 1 and q.stride(1) == 3 * 64


def test_shift_is_drawn_for_each_call():
    made = module()
    video, audio = streams()
    expected = [made(video, audio, shift=shift)[0] for shift in range(3)]

    def drawn(**options):
        out = made(video, audio, **options)[0]
        return next(shift for shift in range(3) if torch.equal(out, expected[shift]))

    torch.manual_seed(0)
    shifts = [drawn() for _ in range(24)]
    assert set(shifts) == {0, 1, 2}
    torch.manual_seed(0)
    assert shifts == [drawn() for _ in range(24)]
    generator = torch.Generator().manual_seed(7)
    state = torch.get_rng_state()
    shifts = [drawn(generator=generator) for _ in range(24)]
    assert set(shifts) == {0, 1, 2} and torch.equal(torch.get_rng_state(), state)
    generator.manual_seed(7)
    assert shifts == [mmattn.draw_shift(4, 2, generator=generator) for _ in range(24)]
    assert drawn(shift=torch.tensor([2])) == 2
    made.random_shift = False
    state = torch.get_rng_state()
    assert [drawn() for _ in range(8)] == [0] * 8 and drawn(shift=2) == 2
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpoint_replays_the_drawn_shift(reentrant, device):
    made = module(window=1, random_shift=True).to(device)
    video, audio = (x.to(device) for x in streams(frames=9, audio_len=31))
    for seed in range(3):
        torch.manual_seed(seed)
        plain = gradients(made, video, audio, lambda m, v, a: m(v, a))
        torch.manual_seed(seed)
        again = gradients(made, video, audio, lambda m, v, a: checkpoint(m, v, a, use_reentrant=reentrant))
        for x, y in zip((*plain[0], *plain[1]), (*again[0], *again[1]), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpoint_refuses_a_generator(reentrant):
    made = module()
    video, audio = streams()
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(RuntimeError, match=r"generator is given .* shift=mmattn.draw_shift"):
        gradients(
            made,
            video,
            audio,
            lambda m, v, a: checkpoint(lambda x, y: m(x, y, generator=generator), v, a, use_reentrant=reentrant),
        )
    shift = mmattn.draw_shift(4, 2, generator=generator)
    plain = gradients(made, video, audio, lambda m, v, a: m(v, a, shift=shift))[1]
    again = gradients(
        made,
        video,
        audio,
        lambda m, v, a: checkpoint(lambda x, y: m(x, y, shift=shift), v, a, use_reentrant=reentrant),
    )[1]
    assert all(torch.equal(x, y) for x, y in zip(plain, again, strict=True))


@pytest.mark.parametrize("shift", (None, 1, "tensor"), ids=("drawn", "int", "tensor"))
def test_compile(shift, fresh_dynamo):
    made = module()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    video, audio = channels_last(*streams())
    shift = torch.tensor(1) if shift == "tensor" else shift
    found = []
    for run in (made, compiled):
        torch.manual_seed(5)
        found.append(gradients(made, video, audio, lambda m, v, a, run=run: run(v, a, shift=shift)))
    for x, y in zip((*found[0][0], *found[0][1]), (*found[1][0], *found[1][1]), strict=True):
        assert relative_error(y, x) < 1e-5
    assert found[1][0][0].stride() == found[0][0][0].stride()


def test_a_compiled_module_draws_anew_each_time(fresh_dynamo):
    made = module(window=1)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(made, fullgraph=True, backend=counter)
    video, audio = streams()
    with torch.no_grad():
        outs = [compiled(video, audio)[0] for _ in range(20)]
        expected = [made(video, audio, shift=shift)[0] for shift in range(4)]
    assert {min(range(4), key=lambda i: float((x - expected[i]).norm())) for x in outs} == {0, 1, 2, 3}
    assert counter.frame_count == 1


@pytest.mark.parametrize("impl", REFERENCE_AND_CPU)
def test_autocast(impl, monkeypatch):
    monkeypatch.setenv("MMATTN_IMPL", impl)
    made = module()
    video, audio = streams()
    exact = made(video, audio, shift=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = made(video, audio, shift=1)
    for x, y in zip(found, exact, strict=True):
        assert x.dtype == torch.float32 and 0 < relative_error(x, y) < 2e-2


def test_meta_device_and_double():
    with torch.device("meta"):
        out = RandomShiftAttention(64, window=2)(*(x.to("meta") for x in streams()))
    assert out[0].shape == (2, 4, 64, 3, 3) and out[1].shape == (2, 64, 27)
    video, audio = streams()
    made = module()
    exact = made.double()(video.double(), audio.double(), shift=2)
    for x, y in zip(made.float()(video, audio, shift=2), exact, strict=True):
        assert relative_error(x, y) < 1e-6


class Host(nn.Module):
    """Blocks in a list, in a sequence of levels, and one registered twice."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([fill(CrossAttention(64, 2, 2), 1), nn.Identity()])
        self.level = nn.ModuleDict({"deep": nn.Sequential(nn.Identity(), fill(CrossAttention(64, 1, 4, False), 2))})
        self.shared = fill(CrossAttention(64, 4, 1, groups=16), 3)
        self.again = self.shared
        self.head = nn.Linear(4, 4)
        for block in (self.blocks[0], self.shared):
            block.fixed_shift = 2
        self.shared.v_norm.GroupNorm.eps = 1e-3

    def forward(self, video, audio, **shift):
        video, audio = self.blocks[0](video, audio, **shift)
        video, audio = self.level["deep"][1](video, audio)
        video, audio = self.shared(video, audio, **shift)
        return self.again(video, audio, **shift)


def swapped_host(dtype=torch.float32):
    host = Host().to(dtype).eval()
    video, audio = streams(dtype=dtype)
    with torch.no_grad():
        before = host(video, audio)
    assert mmattn.swap(host) == 3
    return host, video, audio, before


@pytest.mark.parametrize("impl", REFERENCE_AND_CPU)
def test_swap_computes_the_same(impl, monkeypatch):
    monkeypatch.setenv("MMATTN_IMPL", impl)
    host, video, audio, before = swapped_host()
    for x, y in zip(host(video, audio, shift=2), before, strict=True):
        assert relative_error(x, y) < 1e-5


def test_swap_in_bf16():
    host, video, audio, before = swapped_host(torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in host.parameters())
    for x, y in zip(host(video, audio, shift=2), before, strict=True):
        assert relative_error(x, y) < 2e-2


def test_swap_changes_nothing_but_the_computation():
    host = Host()
    modules, parameters = dict(host.named_modules()), dict(host.named_parameters())
    state = {key: x.clone() for key, x in host.state_dict().items()}
    shown, kinds = repr(host), [type(block) for block in modules.values()]
    assert mmattn.swap(host) == 3
    assert list(host.named_modules()) == list(modules.items()) and repr(host) == shown
    assert all(isinstance(block, kind) for block, kind in zip(modules.values(), kinds, strict=True))
    assert [key for key, _ in host.named_parameters()] == list(parameters)
    assert all(p is parameters[key] for key, p in host.named_parameters())
    assert list(host.state_dict()) == list(state)
    assert all(torch.equal(x, state[key]) for key, x in host.state_dict().items())
    assert mmattn.swap(host) == 0
    Host().load_state_dict(host.state_dict())
    host.load_state_dict(state)
    assert mmattn.unswap(host) == 3 and mmattn.unswap(host) == 0
    assert [type(block) for block in modules.values()] == kinds and list(host.named_modules()) == list(modules.items())


def test_a_swap_that_finds_no_block_warns():
    with pytest.warns(UserWarning, match=r"model is a Linear and nothing in it was replaced; expected .* window_shift"):
        assert mmattn.swap(nn.Linear(2, 2)) == 0


def test_gradients_of_a_swapped_host():
    """Of every parameter, which an optimizer made before the swap goes on with."""
    host, (video, audio) = Host(), streams()
    optimizer = torch.optim.AdamW(host.parameters(), lr=1e-2)
    wanted = gradients(host.blocks[0], video, audio, lambda m, v, a: m(v, a))
    assert mmattn.swap(host) == 3
    found = gradients(host.blocks[0], video, audio, lambda m, v, a: m(v, a, shift=2))
    for x, y in zip((*found[0], *found[1]), (*wanted[0], *wanted[1]), strict=True):
        assert relative_error(x, y) < 1e-5
    before = host.blocks[0].v_qkv.weight.clone()
    optimizer.step()
    assert not torch.equal(host.blocks[0].v_qkv.weight, before)


def test_training_goes_on_across_a_swap():
    """Optimizer and averaged copy made before it, saved, loaded into a host without it, and the other way round."""
    video, audio = streams()

    def step(host, optimizer, average, shift):
        optimizer.zero_grad()
        sum((x * x).mean() for x in host(video, audio, **shift)).backward()
        optimizer.step()
        with torch.no_grad():
            for target, source in zip(average.parameters(), host.parameters(), strict=True):
                target.lerp_(source, 0.1)

    def make():
        torch.manual_seed(0)
        host = Host()
        return host, torch.optim.SGD(host.parameters(), lr=1e-2, momentum=0.9), copy.deepcopy(host)

    plain = make()
    for _ in range(4):
        step(*plain, {})
    swapped = make()
    mmattn.swap(swapped[0])
    for _ in range(2):
        step(*swapped, {"shift": 2})
    file = io.BytesIO()
    torch.save([x.state_dict() for x in swapped], file)
    file.seek(0)
    resumed = make()
    for target, state in zip(resumed, torch.load(file), strict=True):
        target.load_state_dict(state)
    step(*resumed, {})  # as published
    mmattn.swap(resumed[0])
    step(*resumed, {"shift": 2})
    mmattn.unswap(resumed[0])
    for i in (0, 2):
        for key, x in plain[i].state_dict().items():
            assert relative_error(resumed[i].state_dict()[key], x) < 1e-5, key


@pytest.mark.parametrize("when", ("before", "after"))
def test_half_precision_of_a_swapped_host(when):
    """As the published code converts: the weights of convolutions, through `apply`, and not the norms."""

    def convert(layer):
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            layer.weight.data = layer.weight.data.bfloat16()
            layer.bias.data = layer.bias.data.bfloat16()

    exact, host = Host().eval(), Host().eval()
    host.apply(convert) if when == "before" else mmattn.swap(host)
    mmattn.swap(host) if when == "before" else host.apply(convert)
    assert host.shared.v_norm.GroupNorm.weight.dtype == torch.float32
    video, audio = streams(dtype=torch.bfloat16)
    for x, y in zip(host(video, audio, shift=2), exact(video.float(), audio.float()), strict=True):
        assert x.dtype == torch.bfloat16 and relative_error(x, y) < 2e-2


def test_copies_of_a_swapped_host():
    host, video, audio, before = swapped_host()
    file = io.BytesIO()
    torch.save(host, file)
    file.seek(0)
    for made in (copy.deepcopy(host), pickle.loads(pickle.dumps(host)), torch.load(file, weights_only=False)):
        assert made.again is made.shared and made.shared is not host.shared
        for x, y in zip(made(video, audio, shift=2), before, strict=True):
            assert relative_error(x, y) < 1e-5
        with torch.no_grad():
            made.shared.v_qkv.weight.zero_()
        assert host.shared.v_qkv.weight.any()
        assert mmattn.unswap(made) == 3 and type(made.shared) is CrossAttention


class PublishedCheckpoint(torch.autograd.Function):
    """Checkpointing as the published code does it, which preserves no state of a random generator."""

    @staticmethod
    def forward(ctx, function, length, *args):
        ctx.function, ctx.inputs, ctx.parameters = function, args[:length], args[length:]
        with torch.no_grad():
            return function(*ctx.inputs)

    @staticmethod
    def backward(ctx, *grads):
        inputs = [x.detach().requires_grad_() for x in ctx.inputs]
        with torch.enable_grad():
            out = ctx.function(*(x.view_as(x) for x in inputs))
        return None, None, *torch.autograd.grad(out, (*inputs, *ctx.parameters), grads, allow_unused=True)


class CheckpointedBlock(CrossAttention):
    def forward(self, video, audio):
        return PublishedCheckpoint.apply(self._forward, 2, video, audio, *self.parameters())

    def _forward(self, video, audio):
        return super().forward(video, audio)


class FlaggedBlock(CrossAttention):
    use_checkpoint = True

    def forward(self, video, audio):
        return checkpoint(super().forward, video, audio, use_reentrant=False)


@pytest.mark.parametrize("cls", (CheckpointedBlock, FlaggedBlock))
def test_swap_keeps_the_checkpointing_of_a_block(cls, monkeypatch):
    """Little is kept for backward, the block is computed twice, and the second time with the shift of the first."""
    block = fill(cls(64, 2, 1))
    plain = fill(CrossAttention(64, 2, 1))
    video, audio = streams(frames=9, audio_len=31)
    mmattn.swap(block)
    shifts, attend = [], mmattn.modules.random_shift_attention

    def spy(*args, shift, **options):
        shifts.append(int(shift))
        return attend(*args, shift=shift, **options)

    monkeypatch.setattr(mmattn.modules, "random_shift_attention", spy)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        out = block(video.requires_grad_(), audio.requires_grad_())
    assert sum(kept) <= video.numel() + audio.numel()
    for _ in range(3):
        torch.randn(1)  # whoever draws again draws another one
        shifts.clear()
        found = gradients(block, video, audio, lambda m, v, a: m(v, a))
        assert len(shifts) == 2 and shifts[0] == shifts[1]
        plain.fixed_shift = shifts[0]
        wanted = gradients(plain, video, audio, lambda m, v, a: m(v, a))
        for x, y in zip((*found[0], *found[1]), (*wanted[0], *wanted[1]), strict=True):
            assert relative_error(x, y) < 1e-5
    assert out[0].shape == video.shape
    given = block(video, audio, shift=torch.tensor(3)), block(video, audio, shift=3)
    assert all(torch.equal(x, y) for x, y in zip(*given, strict=True))


class ScaledFork(CrossAttention):
    def __init__(self, *args):
        super().__init__(*args)
        self.q_scale = nn.Parameter(torch.ones(1))


def replaced(path, layer):
    def alter(block):
        block.set_submodule(path, layer)

    return alter


LOOK_ALIKES = {
    "parameter": (lambda b: setattr(b, "q_scale", nn.Parameter(torch.ones(1))), "has a parameter 0.q_scale, which"),
    "buffer": (lambda b: b.register_buffer("bias_table", torch.ones(1)), "has a buffer 0.bias_table, which"),
    "submodule": (lambda b: b.add_module("dropout", nn.Dropout(0.1)), "has a submodule 0.dropout, which"),
    "inner submodule": (lambda b: b.attention.add_module("relative", nn.Identity()), "submodule 0.attention.relative"),
    "kernel": (replaced("v_qkv", nn.Conv1d(64, 192, 3, padding=1)), r"0.v_qkv of 0 .* expected a kernel of 1"),
    "stride": (replaced("a_qkv", nn.Conv1d(64, 192, 1, stride=2)), r"0.a_qkv of 0 .* expected a kernel of 1"),
    "groups": (replaced("a_qkv", nn.Conv1d(64, 192, 1, groups=2)), r"0.a_qkv of 0 .* expected a kernel of 1"),
    "bias": (replaced("v_qkv", nn.Conv1d(64, 192, 1, bias=False)), r"0.v_qkv of 0 .* expected a bias"),
    "2-D audio": (
        replaced("audio_proj_out.audio_conv", nn.Conv2d(64, 64, 1)),
        r"0.audio_proj_out.audio_conv of 0 .* is a Conv2d; expected a Conv1d",
    ),
    "rows": (replaced("v_qkv", nn.Conv1d(64, 128, 1)), "expected 192 channels out of 64"),
    "norm": (replaced("v_norm.GroupNorm", nn.GroupNorm(32, 64, affine=False)), "expected 64 channels with a weight"),
    "no norm": (replaced("v_norm", nn.Identity()), "has no 0.v_norm.GroupNorm; expected a GroupNorm"),
    "heads": (lambda b: setattr(b, "num_heads", 5), "has num_heads 5; expected a divisor of channels = 64"),
    "window": (lambda b: setattr(b, "local_window", 0), "has local_window 0; expected an int, at least 1"),
    "forward": (lambda b: setattr(b, "forward", b.forward), "has a forward of its own"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_a_look_alike_is_refused_and_leaves_the_model_whole(name):
    alter, message = LOOK_ALIKES[name]
    model = nn.ModuleList([CrossAttention(64, 1, 1), CrossAttention(64, 1, 1)])
    alter(model[0])
    with pytest.raises(ValueError, match=message):
        mmattn.swap(model)
    assert all(type(block) is CrossAttention for block in model)
    if name != "forward":
        with pytest.raises(ValueError, match=message.replace("0.", "").replace("of 0 ", "of block ")):
            RandomShiftAttention.from_published(model[0])


@pytest.mark.parametrize("function", (mmattn.swap, mmattn.unswap))
def test_what_is_no_module_is_refused(function):
    with pytest.raises(TypeError, match=r"model is a str; expected a torch\.nn\.Module"):
        function("landscape.pt")


def test_a_subclass_with_more_in_it_is_refused():
    with pytest.raises(ValueError, match=r"block \(ScaledFork\) has a parameter q_scale"):
        mmattn.swap(ScaledFork(64))


def test_hooks_of_what_a_swapped_block_does_not_call():
    block, (video, audio) = fill(CrossAttention(64, 2, 2)), streams()
    mmattn.swap(block)
    seen = []
    handle = block.v_norm.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"v_norm of a swapped CrossAttention has hooks .* mmattn.unswap"):
        block(video, audio)
    handle.remove()
    block.v_norm.GroupNorm.register_forward_hook(lambda *_: seen.append("norm"))
    block.video_proj_out.video_conv.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    block.register_forward_hook(lambda *_: seen.append("block"))
    block.fixed_shift = 1
    for x, y in zip(block(video, audio, shift=1), CrossAttention.forward(block, video, audio), strict=True):
        assert relative_error(x, y) < 1e-5
    assert seen[:3] == ["norm", (2, 64, 4, 3, 3), "block"]


def test_lora_of_a_swapped_block():
    """As peft computes it on the published one, before the swap and after it."""
    peft = pytest.importorskip("peft")
    block, (video, audio) = fill(CrossAttention(64, 2, 2)), streams()
    block.fixed_shift = 1
    config = peft.LoraConfig(r=2, target_modules=["v_qkv", "a_qkv", "video_conv", "audio_conv"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.inject_adapter_in_model(config, block)
    for key, parameter in block.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=0.1)
    wanted = gradients(block, video, audio, lambda m, v, a: m(v, a))
    mmattn.swap(block)
    found = gradients(block, video, audio, lambda m, v, a: m(v, a, shift=1))
    for x, y in zip((*found[0], *found[1]), (*wanted[0], *wanted[1]), strict=True):
        assert (x is None) == (y is None) and (x is None or relative_error(x, y) < 1e-5)


def test_swap_of_a_half_model_with_fp32_norms():
    """As the published convert_to_fp16 leaves its blocks."""
    block = fill(CrossAttention(64, 2, 2)).bfloat16()
    block.v_norm.float(), block.a_norm.float()
    block.fixed_shift = 1
    video, audio = streams(dtype=torch.bfloat16)
    before = block(video, audio)
    made = RandomShiftAttention.from_published(block)
    assert made.video_norm.weight.dtype == torch.float32 and made.video_qkv.weight.dtype == torch.bfloat16
    for x, y in zip(made(video, audio, shift=1), before, strict=True):
        assert x.dtype == torch.bfloat16 and relative_error(x, y) < 2e-2


def test_swap_of_a_block_itself():
    block, (video, audio) = fill(CrossAttention(64)), streams()
    made = RandomShiftAttention.from_published(block)
    assert mmattn.swap(block) == 1
    assert all(
        torch.equal(x, y) for x, y in zip(block(video, audio, shift=2), made(video, audio, shift=2), strict=True)
    )
    assert made.training and made.video_qkv.weight.data_ptr() == block.v_qkv.weight.data_ptr()
    with pytest.raises(TypeError, match="block is a Linear without channels, num_heads"):
        RandomShiftAttention.from_published(nn.Linear(2, 2))


def test_what_from_published_keeps():
    host = Host().eval()
    for parameter in host.shared.v_qkv.parameters():
        parameter.requires_grad_(False)
    blocks = host.blocks[0], host.level["deep"][1], host.shared
    made = [RandomShiftAttention.from_published(block) for block in blocks]
    assert [(m.num_heads, m.window, m.random_shift, m.training) for m in made] == [
        (2, 2, True, False),
        (1, 4, False, False),
        (4, 1, True, False),
    ]
    assert made[2].video_norm.num_groups == 16 and made[2].video_norm.eps == 1e-3
    assert made[2].audio_norm.eps == 1e-5
    assert {name for name, p in made[2].named_parameters() if not p.requires_grad} == {
        "video_qkv.weight",
        "video_qkv.bias",
    }


def test_published_names_nested_under_any_prefix():
    host = Host()
    published = {key: x.clone() for key, x in host.state_dict().items()}
    holder = nn.ModuleDict({"blocks": nn.ModuleList([RandomShiftAttention(64, num_heads=2, window=2)])})
    one = {key: x for key, x in published.items() if key.startswith("blocks.")}
    holder.load_state_dict(one)
    ours = RandomShiftAttention.from_published(host.blocks[0]).state_dict()
    assert all(torch.equal(x, ours[key]) for key, x in holder["blocks"][0].state_dict().items())
    assert "blocks.0.v_qkv.weight" in one  # the caller's dictionary is the caller's
    holder["blocks"][0].load_state_dict(ours)
    with torch.device("meta"):
        empty = RandomShiftAttention(64, num_heads=2)
    prefix = "blocks.0."
    one = {key.removeprefix(prefix): x for key, x in published.items() if key.startswith(prefix)}
    empty.load_state_dict(one, assign=True)
    assert not any(p.is_meta for p in empty.parameters())


def test_strict_loading_reports_names():
    keys = CrossAttention(64).state_dict()
    del keys["v_qkv.bias"]
    keys["a_qkv.extra"] = torch.zeros(1)
    holder = nn.Sequential(RandomShiftAttention(64))
    nested = {f"0.{key}": x for key, x in keys.items()}
    with pytest.raises(RuntimeError, match=r'Missing key.*"0.video_qkv.bias"(.|\n)*Unexpected key.*"0.a_qkv.extra"'):
        holder.load_state_dict(nested)
    result = holder.load_state_dict(nested, strict=False)
    assert result.missing_keys == ["0.video_qkv.bias"] and result.unexpected_keys == ["0.a_qkv.extra"]
    both = {**CrossAttention(64).state_dict(), "video_qkv.bias": torch.zeros(192)}
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"v_qkv.bias"'):
        RandomShiftAttention(64).load_state_dict(both)
    with pytest.raises(RuntimeError, match=r"size mismatch for video_qkv.weight: .*\[384, 128\]"):
        RandomShiftAttention(64).load_state_dict(CrossAttention(128).state_dict())


def test_state_dict_round_trip():
    made, other = module(), RandomShiftAttention(64, num_heads=2, window=2)
    layers = [f"{stream}_{layer}" for stream in ("video", "audio") for layer in ("norm", "qkv", "out")]
    names = {f"{layer}.{name}" for layer in layers for name in ("weight", "bias")}
    assert set(made.state_dict()) == names
    other.load_state_dict(made.state_dict())
    video, audio = streams()
    for x, y in zip(made(video, audio, shift=1), other(video, audio, shift=1), strict=True):
        assert torch.equal(x, y)


def test_a_copy_takes_published_names_too():
    """As the averaged copy of a model in training does, which outlives it."""
    copied = copy.deepcopy(RandomShiftAttention(64, num_heads=2, window=2))
    gc.collect()
    published = fill(CrossAttention(64, 2, 2))
    copied.load_state_dict(published.state_dict())
    video, audio = streams()
    for x, y in zip(copied(video, audio, shift=0), published(video, audio), strict=True):
        assert relative_error(x, y) < 1e-5


def test_repr_names_the_configuration():
    text = repr(RandomShiftAttention(128, window=4, random_shift=False))
    assert "RandomShiftAttention(\n  128, num_heads=2, window=4, random_shift=False\n" in text


BAD_OPTIONS = {
    "channels": ({"channels": 0}, "channels is 0; expected at least 1"),
    "head_dim": ({"channels": 96}, "channels is 96; expected a multiple of head_dim = 64"),
    "head_dim of zero": ({"channels": 64, "head_dim": 0}, "head_dim is 0; expected at least 1"),
    "heads": ({"channels": 64, "num_heads": 5}, "num_heads is 5; expected a divisor of channels = 64"),
    "no heads": ({"channels": 64, "num_heads": 0}, "num_heads is 0; expected a divisor"),
    "groups": ({"channels": 64, "norm_groups": 30}, "norm_groups is 30; expected a divisor of channels = 64"),
    "window": ({"channels": 64, "window": 0}, "window is 0; expected at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_option(name):
    options, message = BAD_OPTIONS[name]
    with pytest.raises(ValueError, match=message):
        RandomShiftAttention(**options)


BAD_STREAMS = {
    "video rank": (lambda v, a: (v[0], a), ValueError, r"video has shape \[4, 64, 3, 3\]; expected five"),
    "audio rank": (lambda v, a: (v, a[0]), ValueError, r"audio has shape \[64, 27\]; expected three"),
    "video channels": (lambda v, a: (v[:, :, 1:], a), ValueError, r"video has .* expected 64 channels in dimension 2"),
    "audio channels": (lambda v, a: (v, a.mT), ValueError, r"audio has shape .* expected 64 channels in dimension 1"),
    "batch": (lambda v, a: (v, a[:1]), ValueError, r"audio has shape \[1, 64, 27\]; expected batch 2"),
    "frames": (lambda v, a: (v[:, :1], a), ValueError, r"video has 1 frames; expected at least window = 2"),
    "dtype": (lambda v, a: (v, a.double()), TypeError, r"audio has dtype torch.float64; expected torch.float32"),
    "device": (lambda v, a: (v, a.to("meta")), ValueError, r"audio is on meta; expected cpu"),
    "too little audio": (lambda v, a: (v, a[..., :3]), ValueError, r"audio_q has 3 positions"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_STREAMS)
def test_bad_stream(name):
    alter, error, message = BAD_STREAMS[name]
    with pytest.raises(error, match=message):
        module()(*alter(*streams()))


@pytest.mark.parametrize("shift", (-1, 3, torch.tensor(3)), ids=str)
def test_bad_shift(shift):
    with pytest.raises(ValueError, match=rf"shift is {int(shift)}; expected 0..frames-window = 0..2"):
        module()(*streams(), shift=shift)


@pytest.mark.gpu
def test_cuda_graph_draws_anew_each_replay():
    made = module(window=1).cuda().bfloat16()
    video, audio = (x.cuda() for x in streams(frames=16, dtype=torch.bfloat16))
    with torch.no_grad():
        expected = [made(video, audio, shift=shift)[0] for shift in range(16)]
        made(video, audio)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = made(video, audio)[0]
        drawn = set()
        for _ in range(40):
            graph.replay()
            drawn.update(i for i in range(16) if torch.equal(out, expected[i]))
    assert len(drawn) > 4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GPU_DTYPES.values(), ids=GPU_DTYPES)
def test_against_the_published_block_on_the_device(dtype):
    """Outputs and all gradients against fp64, the published block in the same dtype being the budget."""
    block = fill(CrossAttention(64, 2, 2)).to("cuda", dtype)
    block.fixed_shift = 1
    exact, made = copy.deepcopy(block).double(), RandomShiftAttention.from_published(copy.deepcopy(block))
    video, audio = (x.cuda() for x in streams(dtype=dtype))
    found = gradients(made, video, audio, lambda m, v, a: m(v, a, shift=1))
    in_our_order = []
    for published, x, y in ((exact, video.double(), audio.double()), (block, video, audio)):
        out, grads = gradients(published, x, y, lambda m, v, a: m(v, a))
        by_name = under_our_names(published, grads[2:])
        in_our_order.append([*out, *grads[:2], *(by_name[name].view(p.shape) for name, p in made.named_parameters())])
    names = ["video", "audio", *(name for name, _ in made.named_parameters())]
    for name, x, wanted, plain in zip(
        ("video_out", "audio_out", *names), (*found[0], *found[1]), *in_our_order, strict=True
    ):
        assert_close_to_fp64(x, wanted, plain, name=name, rounding=4.0, absolute=1e-5)


def under_our_names(block, grads):
    """Gradients of a published block's parameters, in its order, by the names of ours."""
    state = dict(zip((name for name, _ in block.named_parameters()), grads, strict=True))
    return {
        f"{ours}.{name}": state[f"{theirs}.{name}"]
        for ours, (theirs, _) in RandomShiftAttention._published.items()
        for name in ("weight", "bias")
    }


@pytest.mark.gpu
@pytest.mark.parametrize("shift", (None, 1, "tensor"), ids=("drawn", "int", "tensor"))
def test_inductor_on_the_device(shift, fresh_dynamo):
    made = module().cuda()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(made, fullgraph=True, backend=counter)
    video, audio = (x.cuda() for x in channels_last(*streams()))
    for value in (1, 2):
        given = torch.tensor(value).cuda() if shift == "tensor" else shift and 1
        found = gradients(made, video, audio, lambda m, v, a, shift=given: compiled(v, a, shift=shift))
        shifts = range(3) if shift is None else (int(given),)
        plain = [gradients(made, video, audio, lambda m, v, a, r=r: m(v, a, shift=r)) for r in shifts]
        # Inductor draws other numbers than torch under the same seed.
        errors = [
            max(relative_error(y, x) for x, y in zip((*p[0], *p[1]), (*found[0], *found[1]), strict=True))
            for p in plain
        ]
        assert min(errors) < 1e-5
    assert counter.frame_count == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast_on_the_device(dtype):
    made = module().cuda()
    video, audio = (x.cuda() for x in streams())
    exact = gradients(made, video, audio, lambda m, v, a: m(v, a, shift=1))
    with torch.autocast(DEVICE, dtype):
        found = gradients(made, video, audio, lambda m, v, a: m(v, a, shift=1))
    for x, y in zip((*found[0], *found[1]), (*exact[0], *exact[1]), strict=True):
        assert x.dtype == torch.float32 and 0 < relative_error(x, y) < 4e-2


@pytest.mark.gpu
def test_side_stream():
    made = module().cuda()
    tensors = dict(zip(("video", "audio"), (x.cuda() for x in streams()), strict=True))

    def call(t):
        with torch.no_grad():
            return dict(zip(("video", "audio"), made(t["video"], t["audio"], shift=1), strict=True))

    found, plain = on_a_side_stream(call, tensors), call(tensors)
    assert all(relative_error(found[name], plain[name]) < 1e-6 for name in plain)


@pytest.mark.gpu
def test_forward_waits_for_no_device():
    made = module().cuda()
    video, audio = (x.cuda() for x in streams())
    made(video, audio)
    torch.cuda.set_sync_debug_mode("error")
    with contextlib.closing(contextlib.ExitStack()) as stack:
        stack.callback(torch.cuda.set_sync_debug_mode, "default")
        sum(x.sum() for x in made(video, audio)).backward()


def test_empty_batch():
    block = RandomShiftAttention(64)
    video, audio = block(torch.randn(0, 4, 64, 2, 2), torch.randn(0, 64, 16))
    assert video.shape == (0, 4, 64, 2, 2) and audio.shape == (0, 64, 16)


@pytest.mark.parametrize(
    ("video", "message"),
    [(None, "video is a NoneType"), (torch.zeros(1, 4, 64, 1, 1, dtype=torch.bfloat16), "dtype torch.bfloat16")],
    ids=["none", "dtype"],
)
def test_inputs_the_projections_cannot_take_are_refused(video, message):
    with pytest.raises(TypeError, match=message):
        RandomShiftAttention(64)(video, torch.zeros(1, 64, 8, dtype=torch.bfloat16))


@dataclasses.dataclass(frozen=True)
class AudioCase:
    channels: int = 64
    out_channels: int = 64
    dilation: int = 4
    embedding_channels: int | None = None
    film: bool = False
    groups: int = 32
    length: int = 53
    batch: int = 2

    @property
    def conditions(self):
        return 2 * self.out_channels if self.film else self.embedding_channels

    def published(self):
        options = {"embedding_channels": self.embedding_channels, "groups": self.groups}
        return fill(AudioBlock(self.channels, self.out_channels, self.dilation, **options))

    def block(self, **options):
        made = DilatedConvBlock(
            self.channels,
            self.out_channels,
            dilation=self.dilation,
            embedding_channels=self.embedding_channels,
            norm_groups=self.groups,
            **options,
        )
        made.load_state_dict(self.published().state_dict())
        return made

    def inputs(self, dtype=torch.float32):
        """Audio, and the FiLM or the embedding or neither, as a list."""
        generator = torch.Generator().manual_seed(1)
        shapes = [(self.batch, self.channels, self.length)]
        shapes += [(self.batch, self.conditions)] if self.conditions else []
        return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


AUDIO_CASES = {
    "neither film nor embedding": AudioCase(),
    "film": AudioCase(film=True),
    "embedding": AudioCase(embedding_channels=40),
    "wider": AudioCase(out_channels=96, film=True, dilation=1),
    "narrower, embedding": AudioCase(96, 64, embedding_channels=24),
    "few groups": AudioCase(20, 48, groups=4, film=True),
    "dilation past the length": AudioCase(length=30, dilation=64, embedding_channels=8),
    "one position": AudioCase(length=1, film=True, groups=8),
    "one channel": AudioCase(1, 1, groups=1, film=True),
    "one channel to many": AudioCase(1, 8, groups=1, embedding_channels=3),
}  # fmt: skip


def audio_gradients(block, inputs, call=None):
    """The output, and the gradients of the inputs and of every parameter."""
    block.zero_grad()
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = (block if call is None else call)(*leaves)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(out.dtype))
    return out.detach(), [x.grad for x in leaves], {name: p.grad for name, p in block.named_parameters()}


def as_channels_last(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("impl", REFERENCE_AND_CPU)
@pytest.mark.parametrize("name", AUDIO_CASES)
def test_audio_block_is_the_published_one(name, impl, monkeypatch, poisoned_memory):
    monkeypatch.setenv("MMATTN_IMPL", impl)
    case = AUDIO_CASES[name]
    out, input_grads, parameter_grads = audio_gradients(case.published(), case.inputs())
    block = case.block()
    found_out, found_input_grads, found_parameter_grads = audio_gradients(block, case.inputs())
    assert found_out.dtype == torch.float32 and relative_error(found_out, out) < 1e-5
    for x, y in zip(found_input_grads, input_grads, strict=True):
        assert relative_error(x, y) < 1e-5
    block.load_state_dict(parameter_grads)  # the gradients under our names
    for key, wanted in block.state_dict().items():
        # A sum of terms of order 1 may cancel, and does where a group is one value.
        assert (found_parameter_grads[key] - wanted).norm() < 1e-5 * max(1.0, float(wanted.norm())), key


def test_a_new_audio_block_is_its_skip():
    audio, film = AudioCase(film=True).inputs()
    assert torch.equal(DilatedConvBlock(64, dilation=4)(audio, film), audio)
    block = DilatedConvBlock(64, 32, dilation=4)
    assert relative_error(block(audio), nn.functional.conv1d(audio, block.skip.weight, block.skip.bias)) < 1e-6


def test_film_and_embedding_by_name_or_by_place():
    case = AudioCase(embedding_channels=40)
    block, (audio, emb) = case.block(), case.inputs()
    found = block(audio, emb)
    assert torch.equal(block(audio, emb=emb), found)
    inner = AudioCase(film=True).block()
    film = block.embedding(nn.functional.silu(emb))
    assert torch.equal(inner(audio, film), found) and torch.equal(inner(audio, film=film), found)
    assert torch.equal(inner(audio), inner(audio, torch.zeros_like(film)))
    assert not torch.equal(inner(audio), found)


def test_dropout_is_for_training_alone():
    case = AudioCase(film=True, length=400)
    inputs = case.inputs()
    block = case.block(dropout=0.3)
    with torch.no_grad():  # the projection as the identity, to look at what it is given
        block.conv2.weight.copy_(torch.eye(64).unsqueeze(-1))
        block.conv2.bias.zero_()
    clean = block.eval()(*inputs)
    state = torch.get_rng_state()
    assert torch.equal(block(*inputs), clean) and torch.equal(torch.get_rng_state(), state)
    block.train()
    first, second = block(*inputs), block(*inputs)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(block(*inputs), first)
    kept = (first - inputs[0]).abs() > 1e-6
    assert abs(float(kept.float().mean()) - 0.7) < 0.01
    assert relative_error((first - inputs[0])[kept], (clean - inputs[0])[kept] / 0.7) < 1e-5


@pytest.mark.parametrize("options", ({}, {"film": True}, {"embedding_channels": 24, "out_channels": 96}), ids=str)
def test_dropout_of_the_published_block(options):
    """The two halves in training, with the same values dropped."""
    case = AudioCase(**options)
    block, inputs = case.block(dropout=0.2).train(), case.inputs()
    published = case.published()
    drop = nn.functional.dropout
    published.audio_out_layers[2].forward = lambda h: drop(h.transpose(1, 2).contiguous(), 0.2).transpose(1, 2)
    torch.manual_seed(8)
    out, input_grads, parameter_grads = audio_gradients(published, inputs)
    torch.manual_seed(8)
    found, found_input_grads, found_parameter_grads = audio_gradients(block, inputs)
    assert relative_error(found, out) < 1e-5
    assert all(relative_error(x, y) < 1e-5 for x, y in zip(found_input_grads, input_grads, strict=True))
    block.load_state_dict(parameter_grads)
    for key, wanted in block.state_dict().items():
        assert relative_error(found_parameter_grads[key], wanted) < 1e-5, key


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("out_channels", (64, 96))
def test_audio_memory_formats(out_channels, dtype):
    case = AudioCase(film=True, out_channels=out_channels)
    block, (audio, film) = case.block().to(dtype), case.inputs(dtype)
    contiguous = block(audio, film)
    wide = torch.full((2, 60, 80), float("nan"), dtype=dtype)
    wide[:, 3:56, 9:73] = audio.transpose(1, 2)
    for x in (as_channels_last(audio), wide[:, 3:56, 9:73].transpose(1, 2), audio.flip(2).flip(2)):
        out = block(x, film)
        assert out.shape == (2, out_channels, 53) and out.transpose(1, 2).is_contiguous()
        assert torch.equal(out, contiguous)


@pytest.mark.parametrize("dropout", (0.0, 0.1))
def test_no_copy_of_channels_last_audio(dropout, monkeypatch):
    """The tokens and the skip are views of the input; a channels-first input is transposed once for both."""
    seen = []
    convolve = mmattn._layers.dilated_conv1d

    def spy(x, *args, **options):
        seen.append((x.data_ptr(), options.get("residual")))
        return convolve(x, *args, **options)

    monkeypatch.setattr(mmattn._layers, "dilated_conv1d", spy)
    block, (audio,) = AudioCase().block(dropout=dropout), AudioCase().inputs()
    for x in (as_channels_last(audio), as_channels_last(audio)[:, :, 3:]):
        seen.clear()
        block(x)
        (first, _), (_, residual) = seen
        assert first == x.data_ptr() == residual.data_ptr()
    seen.clear()
    block(audio)
    (first, _), (_, residual) = seen
    assert first == residual.data_ptr() != audio.data_ptr()


def test_published_audio_names_nested_under_any_prefix():
    case = AudioCase(out_channels=96, embedding_channels=24)
    published = nn.ModuleDict({"deep": nn.Sequential(nn.Identity(), case.published())})
    keys = published.state_dict()
    ours = nn.ModuleDict({"deep": nn.Sequential(nn.Identity(), DilatedConvBlock(64, 96, embedding_channels=24))})
    ours.load_state_dict(keys)
    assert all(key.startswith("deep.1.") for key in ours.state_dict())
    assert torch.equal(ours["deep"][1].conv1.weight, published["deep"][1].audio_in_layers[2].audio_conv.weight)
    assert "deep.1.emb_layers.1.weight" in keys  # the caller's dictionary is the caller's
    names = {
        f"{layer}.{x}"
        for layer in ("norm1", "conv1", "embedding", "norm2", "conv2", "skip")
        for x in ("weight", "bias")
    }
    assert {key.removeprefix("deep.1.") for key in ours.state_dict()} == names
    again = copy.deepcopy(DilatedConvBlock(64, 96, embedding_channels=24))
    gc.collect()
    again.load_state_dict(case.published().state_dict())
    again.load_state_dict(ours["deep"][1].state_dict())
    with torch.device("meta"):
        empty = DilatedConvBlock(64, 96, dilation=4, embedding_channels=24)
    empty.load_state_dict(case.published().state_dict(), assign=True)
    assert torch.equal(empty(*case.inputs()), case.block()(*case.inputs()))


def test_strict_loading_of_an_audio_block_reports_names():
    case = AudioCase(embedding_channels=24)
    keys = case.published().state_dict()
    del keys["audio_out_layers.0.GroupNorm.bias"]
    keys["audio_skip_connection.audio_conv.weight"] = torch.zeros(64, 64, 1)
    holder = nn.Sequential(DilatedConvBlock(64, embedding_channels=24))
    nested = {f"0.{key}": x for key, x in keys.items()}
    with pytest.raises(RuntimeError, match=r'Missing key.*"0.norm2.bias"(.|\n)*Unexpected key.*"0.skip.weight"'):
        holder.load_state_dict(nested)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"embedding.weight"'):
        DilatedConvBlock(64).load_state_dict(case.published().state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for conv1.weight: .*\[64, 64, 3\]"):
        DilatedConvBlock(96, embedding_channels=24).load_state_dict(case.published().state_dict())


@pytest.mark.parametrize("name", ("neither film nor embedding", "wider", "narrower, embedding"))
def test_compile_an_audio_block(name, fresh_dynamo):
    case = AUDIO_CASES[name]
    block, inputs = case.block(), case.inputs()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for audio in (inputs[0], as_channels_last(inputs[0])):
        out, input_grads, parameter_grads = audio_gradients(block, [audio, *inputs[1:]])
        found, found_input_grads, found_parameter_grads = audio_gradients(block, [audio, *inputs[1:]], compiled)
        assert relative_error(found, out) < 1e-5 and found.stride() == out.stride()
        for x, y in zip(
            (*found_input_grads, *found_parameter_grads.values()),
            (*input_grads, *parameter_grads.values()),
            strict=True,
        ):
            assert relative_error(x, y) < 1e-5
    training = torch.compile(case.block(dropout=0.2).train(), fullgraph=True, backend="aot_eager")
    assert torch.isfinite(training(*inputs)).all() and not torch.equal(training(*inputs), training(*inputs))


@pytest.mark.parametrize("reentrant", (False, True))
@pytest.mark.parametrize("dropout", (0.0, 0.3))
def test_checkpoint_an_audio_block(dropout, reentrant):
    case = AudioCase(embedding_channels=24, out_channels=96)
    block, inputs = case.block(dropout=dropout).train(), case.inputs()
    torch.manual_seed(3)
    plain = audio_gradients(block, inputs)
    torch.manual_seed(3)
    again = audio_gradients(block, inputs, lambda *x: checkpoint(block, *x, use_reentrant=reentrant))
    for x, y in zip((plain[0], *plain[1], *plain[2].values()), (again[0], *again[1], *again[2].values()), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("impl", REFERENCE_AND_CPU)
@pytest.mark.parametrize("dropout", (0.0, 1e-9), ids=("fused", "training path"))
@pytest.mark.parametrize("name", ("film", "narrower, embedding"))
def test_autocast_of_an_audio_block(name, dropout, impl, monkeypatch):
    monkeypatch.setenv("MMATTN_IMPL", impl)
    case = AUDIO_CASES[name]
    block, inputs = case.block(dropout=dropout), case.inputs()
    exact = audio_gradients(block, inputs)

    def call(*x):
        with torch.autocast("cpu", torch.bfloat16):
            return block(*x)

    for audio in (inputs[0], as_channels_last(inputs[0])):
        out, input_grads, parameter_grads = audio_gradients(block, [audio, *inputs[1:]], call)
        assert out.dtype == torch.bfloat16 and out.transpose(1, 2).is_contiguous()
        assert 0 < relative_error(out, exact[0]) < 2e-2
        for x, y in zip((*input_grads, *parameter_grads.values()), (*exact[1], *exact[2].values()), strict=True):
            assert x.dtype == torch.float32 and relative_error(x, y) < 4e-2
    half = case.block(dropout=dropout).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(half(*inputs), exact[0]) < 4e-2
        assert relative_error(half(inputs[0].bfloat16(), *inputs[1:]), exact[0]) < 4e-2


@pytest.mark.parametrize("impl", REFERENCE_AND_CPU)
@pytest.mark.parametrize("dropout", (0.0, 1e-9), ids=("fused", "training path"))
def test_audio_block_in_bf16(dropout, impl, monkeypatch):
    monkeypatch.setenv("MMATTN_IMPL", impl)
    case = AudioCase(film=True, out_channels=96)
    audio, film = case.inputs()
    exact = audio_gradients(case.block(dropout=dropout), [audio, film])
    half = case.block(dropout=dropout).bfloat16()
    mixed = case.block(dropout=dropout).bfloat16()  # as the published convert_to_fp16 leaves its blocks
    mixed.norm1.float(), mixed.norm2.float()
    for block in (half, mixed, case.block(dropout=dropout)):
        for condition in (film, film.bfloat16()):
            out, input_grads, parameter_grads = audio_gradients(block, [audio.bfloat16(), condition])
            assert out.dtype == torch.bfloat16 and relative_error(out, exact[0]) < 2e-2
            for x, y in zip((*input_grads, *parameter_grads.values()), (*exact[1], *exact[2].values()), strict=True):
                assert relative_error(x, y) < 4e-2


def test_audio_block_on_meta_and_in_double():
    case = AudioCase(embedding_channels=24, out_channels=96)
    with torch.device("meta"):
        block = DilatedConvBlock(64, 96, embedding_channels=24, dropout=0.1)
        assert block(*(x.to("meta") for x in case.inputs())).shape == (2, 96, 53)
    found = case.block()(*case.inputs())
    assert relative_error(found, case.block().double()(*case.inputs(torch.float64))) < 1e-6


@pytest.mark.parametrize("dropout", (0.0, 0.1))
def test_audio_block_of_an_empty_batch(dropout):
    case = AudioCase(embedding_channels=24, out_channels=96, batch=0)
    out, input_grads, parameter_grads = audio_gradients(case.block(dropout=dropout), case.inputs())
    assert out.shape == (0, 96, 53) and input_grads[0].shape == (0, 64, 53)
    assert not any(x.any() for x in parameter_grads.values())


def test_repr_of_an_audio_block():
    assert "DilatedConvBlock(\n  64, 96, dilation=4, dropout=0.1\n" in repr(
        DilatedConvBlock(64, 96, dilation=4, dropout=0.1)
    )


BAD_AUDIO_OPTIONS = {
    "channels": ({"channels": 0}, "channels is 0; expected at least 1"),
    "out_channels": ({"channels": 64, "out_channels": 0}, "out_channels is 0; expected at least 1"),
    "dilation": ({"channels": 64, "dilation": 0}, "dilation is 0; expected at least 1"),
    "embedding": ({"channels": 64, "embedding_channels": 0}, "embedding_channels is 0; expected at least 1"),
    "groups": ({"channels": 48}, "norm_groups is 32; expected a divisor of channels = 48"),
    "groups of the output": ({"channels": 64, "out_channels": 48}, "norm_groups is 32; .* of out_channels = 48"),
    "no groups": ({"channels": 64, "norm_groups": 0}, "norm_groups is 0; expected a divisor"),
    "dropout of one": ({"channels": 64, "dropout": 1.0}, "dropout is 1.0; expected 0 <= dropout < 1"),
    "dropout below zero": ({"channels": 64, "dropout": -0.1}, "dropout is -0.1; expected 0 <= dropout < 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_AUDIO_OPTIONS)
def test_bad_audio_option(name):
    options, message = BAD_AUDIO_OPTIONS[name]
    with pytest.raises(ValueError, match=message):
        DilatedConvBlock(**options)


WITH_FILM, WITH_EMBEDDING = AudioCase(film=True), AudioCase(embedding_channels=24)
BAD_AUDIO = {
    "not a tensor": (WITH_FILM, lambda a, f: {"audio": None}, TypeError, "audio is a NoneType; expected a tensor"),
    "rank": (WITH_FILM, lambda a, f: {"audio": a[0]}, ValueError, r"audio has shape \[64, 53\]; expected three"),
    "channels": (WITH_FILM, lambda a, f: {"audio": a.mT}, ValueError, r"audio has .* expected 64 channels in dim"),
    "length": (WITH_FILM, lambda a, f: {"audio": a[..., :0]}, ValueError, r"audio has .*64, 0\]; expected at"),
    "dtype": (WITH_FILM, lambda a, f: {"audio": a.int()}, TypeError, "audio has dtype torch.int32; expected tor"),
    "film channels": (WITH_FILM, lambda a, f: {"film": f[:, 1:]}, ValueError, r"film has .*127\]; expected .* \[2, 1"),
    "film batch": (WITH_FILM, lambda a, f: {"film": f[:1]}, ValueError, r"film has shape \[1, 128\]; expected"),
    "film rank": (WITH_FILM, lambda a, f: {"film": f[..., None]}, ValueError, r"film has shape \[2, 128, 1\]"),
    "film dtype": (WITH_FILM, lambda a, f: {"film": f.half()}, TypeError, "film has dtype torch.float16; expected to"),
    "film as a pair": (WITH_FILM, lambda a, f: {"film": f.chunk(2, 1)}, TypeError, "film is a tuple; expected a"),
    "emb without embedding": (WITH_FILM, lambda a, f: {"emb": f}, ValueError, "emb is given to a block without"),
    "neither": (WITH_EMBEDDING, lambda a, e: {}, ValueError, r"emb is None; expected \[B, E\] .* = 24"),
    "both": (WITH_EMBEDDING, lambda a, e: {"film": e, "emb": e}, ValueError, "film and emb are both given"),
    "emb channels": (WITH_EMBEDDING, lambda a, e: {"emb": e[:, 1:]}, ValueError, r"emb has .*23\]; expected .* \[2"),
    "emb dtype": (WITH_EMBEDDING, lambda a, e: {"emb": e.double()}, TypeError, "emb has dtype torch.float64; expected"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_AUDIO)
def test_bad_audio(name):
    case, alter, error, message = BAD_AUDIO[name]
    audio, condition = case.inputs()
    with pytest.raises(error, match=message):
        case.block()(**{"audio": audio, **alter(audio, condition)})


def test_audio_that_the_convolutions_cannot_take():
    block, (audio,) = AudioCase().block().bfloat16(), AudioCase().inputs()
    with pytest.raises(
        TypeError, match=r"audio has dtype torch.float32; expected torch.bfloat16, the dtype of the conv"
    ):
        block(audio)


@pytest.mark.gpu
@pytest.mark.parametrize("name", AUDIO_CASES)
def test_audio_block_on_the_device(name):
    """Outputs and all gradients against fp64, the published block in the same dtype being the budget."""
    case = AUDIO_CASES[name]
    for dtype in (torch.float32, torch.bfloat16):
        given = [x.cuda() for x in case.inputs(dtype)]
        found = audio_gradients(case.block().to("cuda", dtype), given)
        plain = audio_gradients(case.published().to("cuda", dtype), given)
        exact = audio_gradients(case.published().to("cuda", dtype).double(), [x.double() for x in given])
        for i, what in enumerate(("out", "inputs", "parameters")):
            values = [result[i] for result in (found, exact, plain)]
            if what == "parameters":
                for k in (1, 2):  # under our names
                    block = case.block().double().cuda()
                    block.load_state_dict(values[k])
                    values[k] = dict(block.named_parameters())
                assert values[0].keys() == values[1].keys()
                values = [list(x.values()) for x in values]
            # All in one: a sum that cancels in one number is a matter of luck.
            vectors = [torch.cat([x.flatten() for x in (v if isinstance(v, list) else [v])]) for v in values]
            assert_close_to_fp64(*vectors, name=f"{what}, {dtype}", rounding=4.0)


@pytest.mark.gpu
def test_audio_block_recorded_and_compiled(fresh_dynamo):
    case = AudioCase(embedding_channels=40, out_channels=96)
    block = case.block().cuda()
    audio, emb = (x.cuda() for x in case.inputs())
    tensors, later = {"audio": audio, "emb": emb}, [{"audio": audio.flip(2), "emb": -emb}]
    compiled = torch.compile(block, fullgraph=True)
    out, input_grads, parameter_grads = audio_gradients(block, [audio, emb])
    found, found_inputs, found_parameters = audio_gradients(block, [audio, emb], compiled)
    assert relative_error(found, out) < 1e-5
    assert all(relative_error(x, y) < 1e-5 for x, y in zip(found_inputs, input_grads, strict=True))
    assert all(relative_error(found_parameters[key], x) < 1e-5 for key, x in parameter_grads.items())
    with torch.no_grad():
        (replayed,) = replays(lambda t: {"out": block(t["audio"], t["emb"])}, tensors, later)
        assert relative_error(replayed["out"], block(*later[0].values())) < 1e-6


@pytest.mark.parametrize("dtypes", ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)), ids=str)
def test_autocast_takes_streams_of_different_dtypes(dtypes):
    """As the published block does."""
    made, block = module(), fill(CrossAttention(64, 2, 2))
    swapped = copy.deepcopy(block)
    mmattn.swap(swapped)
    video, audio = (x.to(dtype) for x, dtype in zip(streams(), dtypes, strict=True))
    for call, exact in (
        (lambda *x: made(*x, shift=0), lambda *x: made(*x, shift=0)),
        (lambda *x: swapped(*x, shift=0), block),
    ):
        expected = exact(video.float(), audio.float())
        with torch.autocast("cpu", torch.bfloat16):
            found = call(video, audio)
        for x, y, dtype in zip(found, expected, dtypes, strict=True):
            assert x.dtype == dtype and relative_error(x, y) < 2e-2
    with pytest.raises(TypeError, match=r"audio has dtype .*; expected .*, the dtype of video"):
        made(video, audio)
