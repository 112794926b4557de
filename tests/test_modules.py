# SPDX-License-Identifier: MIT
"""The module around random-shift attention, and its swap into models of the published code."""

import contextlib
import copy
import gc
import json
import pathlib

import pytest
import torch
from helpers import DTYPES, REFERENCE_AND_CPU
from published import PublishedBlock, fill
from torch import nn
from torch.utils.checkpoint import checkpoint

import mmattn
from mmattn import RandomShiftAttention
from mmattn.testing import relative_error

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
    sum((x * torch.randn(x.shape, generator=weights)).sum() for x in out).backward()
    return [x.detach() for x in out], [x.grad.clone() for x in (*leaves, *made.parameters())]


@pytest.mark.parametrize("impl", REFERENCE_AND_CPU)
@pytest.mark.parametrize("case", (0, 1))
def test_published_values(case, impl, monkeypatch):
    safetensors = pytest.importorskip("safetensors")
    monkeypatch.setenv("MMATTN_IMPL", impl)
    with safetensors.safe_open(DATA / "attention_block.safetensors", "pt") as file:
        config = json.loads(file.metadata()["cases"])[case]
        tensors = {key.removeprefix(f"{case}."): file.get_tensor(key) for key in file.keys() if key[0] == str(case)}  # noqa: SIM118
    made = RandomShiftAttention(config["C"], num_heads=config["heads"], window=config["S"])
    parameters = {key.removeprefix("param."): x for key, x in tensors.items() if key.startswith("param.")}
    made.load_state_dict(parameters)
    video, audio = tensors["video"].requires_grad_(), tensors["audio"].requires_grad_()
    out = made(video, audio, shift=config["R"])
    torch.autograd.backward(out, (tensors["video_out_grad"], tensors["audio_out_grad"]))
    found = {"video_out": out[0], "audio_out": out[1], "video_grad": video.grad, "audio_grad": audio.grad}
    for name, x in found.items():
        assert relative_error(x, tensors[name]) < 1e-5, name
    # The names of the gradients go through the same renaming as those of the parameters.
    wanted = RandomShiftAttention(config["C"], num_heads=config["heads"])
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
        assert all(torch.equal(a, b) for a, b in zip(x, contiguous, strict=True))


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
    norm = mmattn.modules.group_norm
    monkeypatch.setattr(
        mmattn.modules,
        "group_norm",
        lambda x, *args, **options: (pointers.append(x.data_ptr()), norm(x, *args, **options))[1],
    )
    video, audio = channels_last(*streams())
    made(video, audio, shift=0)
    assert pointers == [video.data_ptr(), audio.data_ptr()]
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


@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpoint_replays_the_drawn_shift(reentrant):
    made = module(window=1, random_shift=True)
    video, audio = streams(frames=9, audio_len=31)
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
        self.blocks = nn.ModuleList([fill(PublishedBlock(64, 2, 2), 1), nn.Identity()])
        self.level = nn.ModuleDict({"deep": nn.Sequential(nn.Identity(), fill(PublishedBlock(64, 1, 4, False), 2))})
        self.shared = fill(PublishedBlock(64, 4, 1, groups=16), 3)
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
    for parameter in host.shared.v_qkv.parameters():
        parameter.requires_grad_(False)
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


def test_swap_keeps_what_the_block_had():
    host, video, audio, _ = swapped_host()
    blocks = host.blocks[0], host.level["deep"][1], host.shared
    assert all(type(block) is RandomShiftAttention for block in blocks) and host.again is host.shared
    assert [(b.num_heads, b.window, b.random_shift, b.training) for b in blocks] == [
        (2, 2, True, False),
        (1, 4, False, False),
        (4, 1, True, False),
    ]
    assert host.shared.video_norm.num_groups == 16 and host.shared.video_norm.eps == 1e-3
    assert host.shared.audio_norm.eps == 1e-5
    frozen = {name for name, p in host.named_parameters() if not p.requires_grad}
    assert frozen == {"shared.video_qkv.weight", "shared.video_qkv.bias"}
    assert mmattn.swap(host) == 0 and mmattn.swap(nn.Linear(2, 2)) == 0
    sum(x.sum() for x in host.train()(video, audio)).backward()
    assert all(p.grad is not None for n, p in host.named_parameters() if p.requires_grad and not n.startswith("head"))


def test_swap_of_a_half_model_with_fp32_norms():
    """As the release's convert_to_fp16 leaves its blocks."""
    block = fill(PublishedBlock(64, 2, 2)).bfloat16()
    block.v_norm.float(), block.a_norm.float()
    block.fixed_shift = 1
    video, audio = streams(dtype=torch.bfloat16)
    before = block(video, audio)
    made = RandomShiftAttention.from_published(block)
    assert made.video_norm.weight.dtype == torch.float32 and made.video_qkv.weight.dtype == torch.bfloat16
    for x, y in zip(made(video, audio, shift=1), before, strict=True):
        assert x.dtype == torch.bfloat16 and relative_error(x, y) < 2e-2


def test_swap_of_a_block_itself():
    block = PublishedBlock(64)
    with pytest.raises(ValueError, match=r"model is itself .*PublishedBlock.*RandomShiftAttention.from_published"):
        mmattn.swap(block)
    made = RandomShiftAttention.from_published(block)
    assert made.training and made.video_qkv.weight.data_ptr() == block.v_qkv.weight.data_ptr()
    with pytest.raises(TypeError, match="block is a Linear without channels, num_heads"):
        RandomShiftAttention.from_published(nn.Linear(2, 2))


def test_published_names_nested_under_any_prefix():
    host = Host()
    published = {key: x.clone() for key, x in host.state_dict().items()}
    mmattn.swap(host)
    ours = {key: x.clone() for key, x in host.state_dict().items()}
    fresh = Host()
    mmattn.swap(fresh)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    fresh.load_state_dict(published)
    assert all(torch.equal(x, ours[key]) for key, x in fresh.state_dict().items())
    assert "blocks.0.v_qkv.weight" in published  # the caller's dictionary is the caller's
    fresh.load_state_dict(ours)
    with torch.device("meta"):
        empty = RandomShiftAttention(64, num_heads=2)
    prefix = "blocks.0."
    one = {key.removeprefix(prefix): x for key, x in published.items() if key.startswith(prefix)}
    empty.load_state_dict(one, assign=True)
    assert not any(p.is_meta for p in empty.parameters())


def test_strict_loading_reports_names():
    keys = PublishedBlock(64).state_dict()
    del keys["v_qkv.bias"]
    keys["a_qkv.extra"] = torch.zeros(1)
    holder = nn.Sequential(RandomShiftAttention(64))
    nested = {f"0.{key}": x for key, x in keys.items()}
    with pytest.raises(RuntimeError, match=r'Missing key.*"0.video_qkv.bias"(.|\n)*Unexpected key.*"0.a_qkv.extra"'):
        holder.load_state_dict(nested)
    result = holder.load_state_dict(nested, strict=False)
    assert result.missing_keys == ["0.video_qkv.bias"] and result.unexpected_keys == ["0.a_qkv.extra"]
    both = {**PublishedBlock(64).state_dict(), "video_qkv.bias": torch.zeros(192)}
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"v_qkv.bias"'):
        RandomShiftAttention(64).load_state_dict(both)
    with pytest.raises(RuntimeError, match=r"size mismatch for video_qkv.weight: .*\[384, 128\]"):
        RandomShiftAttention(64).load_state_dict(PublishedBlock(128).state_dict())


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
    published = fill(PublishedBlock(64, 2, 2))
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


def test_a_block_that_cannot_be_converted_leaves_the_model_whole():
    model = nn.ModuleList([PublishedBlock(64, 1, 1), PublishedBlock(64, 1, 1)])
    model[1].v_norm = nn.Identity()
    with pytest.raises(AttributeError):
        mmattn.swap(model)
    assert all(isinstance(block, PublishedBlock) for block in model)


@pytest.mark.parametrize(
    ("video", "message"),
    [(None, "video is a NoneType"), (torch.zeros(1, 4, 64, 1, 1, dtype=torch.bfloat16), "dtype torch.bfloat16")],
    ids=["none", "dtype"],
)
def test_inputs_the_projections_cannot_take_are_refused(video, message):
    with pytest.raises(TypeError, match=message):
        RandomShiftAttention(64)(video, torch.zeros(1, 64, 8, dtype=torch.bfloat16))
