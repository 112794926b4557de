# SPDX-License-Identifier: MIT
"""The coupled U-Net: against reference values of the published network, its checkpoints, options, and training."""

import copy
import json
import pathlib
import re
import sys

import pytest
import torch
from helpers import DEVICES, GPU_DTYPES, SMALL_UNET, enough_memory, fill, filled
from torch.nn import functional

pytest.importorskip("diffusers")
safetensors = pytest.importorskip("safetensors")

from mmattn.testing import assert_close_to_fp64, relative_error  # noqa: E402
from mmdiffusion import CoupledUNet, MMDiffusionPipeline, checkpoints, cli  # noqa: E402
from mmdiffusion.diffusion.schedulers import make_scheduler  # noqa: E402
from mmdiffusion.model import blocks  # noqa: E402
from mmdiffusion.model.unet import _lay_out_weights  # noqa: E402

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "bench"))

import published  # noqa: E402

DATA = pathlib.Path(__file__).parent / "data"
FULL = json.loads((DATA / "unet_full_keys.json").read_text())


@pytest.fixture(autouse=True)
def one_thread(threads):
    """These sizes are too small to share, and whoever waits for a second core waits long."""
    threads(1)


def reference(case):
    with safetensors.safe_open(DATA / f"unet_{case}.safetensors", "pt") as file:
        metadata = {name: json.loads(value) for name, value in file.metadata().items()}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return metadata, tensors


def small(**options):
    """A small model whose every parameter matters: it is born with outputs of zero."""
    return fill(CoupledUNet(**{**SMALL_UNET, **options})).eval()


def clip(frames=4, size=8, audio_len=64, channels=(3, 1)):
    generator = torch.Generator().manual_seed(1)
    video = torch.randn(2, frames, channels[0], size, size, generator=generator)
    return video, torch.randn(2, channels[1], audio_len, generator=generator), torch.tensor([3, 700])


def gradients(unet, *inputs, **options):
    unet.zero_grad()
    out = [x for x in unet(*inputs, **options) if x is not None]
    weights = torch.Generator().manual_seed(2)
    sum((x * torch.randn(x.shape, generator=weights).to(x.device)).sum() for x in out).backward()
    return {name: x.grad for name, x in unet.named_parameters()}


def error(found, expected):
    return max(relative_error(a, b) for a, b in zip(found, expected, strict=True))


def is_equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", (0, 1))
def test_published_values(case, device):
    metadata, tensors = reference(case)
    tensors = {name: x.to(device) for name, x in tensors.items()}
    state = filled(metadata["state_dict"], metadata["fill_seed"])
    unet = CoupledUNet.from_published(state, **metadata["config"]).to(device)
    with torch.no_grad():
        video, audio = unet(tensors["video"], tensors["audio"], tensors["timesteps"], shifts=metadata["shifts"])
    assert relative_error(video, tensors["video_out"]) < 3e-5
    assert relative_error(audio, tensors["audio_out"]) < 3e-5


OPTIONS = {
    "as is": {},
    "no shift": {"cross_attention_shift": False},
    "windows of all frames": {"cross_attention_windows": (4,)},
    "published windows, attention in the middle": {
        "cross_attention_resolutions": (2, 16, 32),
        "cross_attention_windows": (1, 4, 8),
        "middle_cross_attention": True,
    },
    "no cross-attention": {"cross_attention_resolutions": (), "cross_attention_windows": ()},
    "cross-attention at the finest level": {
        "cross_attention_resolutions": (1, 2),
        "cross_attention_windows": (3, 1),
    },
    "self-attention at every level of both streams": {
        "video_attention_resolutions": (1, 2),
        "audio_attention_resolutions": (1, 2),
    },
    "self-attention in the middle alone": {"video_attention_resolutions": (-1,)},
    "embedding added": {"use_scale_shift_norm": False},
    "learned sigma": {"video_out_channels": 6, "audio_out_channels": 2},
    "other inputs": {"video_size": (4, 2, 8, 8), "audio_size": (2, 64)},
    "two blocks a level": {"num_res_blocks": 2},
    "heads of RS-MMA from num_heads": {"num_heads": 4, "num_head_channels": -1},
    "a wide finest level, three levels": {"channel_mult": (2, 1, 3), "num_heads": 1},
    "one level": {"channel_mult": (1,)},
}


def published_network(config, state):
    """The same network in plain torch, its window in the middle set by the number of frames in `config`."""
    names = [name for name in published.PublishedUNet.__init__.__annotations__ if name != "return"]
    peer = published.PublishedUNet(**{name: config[name] for name in names})
    peer.load_state_dict(state)
    return peer


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options, device):
    """Each against the network in plain torch, and no parameter is without a gradient."""
    unet = small(**options).to(device)
    channels = unet.config["video_size"][1], unet.config["audio_size"][0]
    video, audio, timesteps = (x.to(device) for x in clip(channels=channels))
    shifts = [largest // 2 + i % 2 for i, largest in enumerate(unet.shift_ranges())]
    shifts = [min(pair) for pair in zip(shifts, unet.shift_ranges(), strict=True)]
    found = unet(video, audio, timesteps, shifts=shifts)
    peer = published_network(unet.config, unet.to_published()).to(device)
    assert error(found, peer(video, audio, timesteps, shifts=shifts)) < 1e-5
    missing = [name for name, x in gradients(unet, video, audio, timesteps, shifts=shifts).items() if x is None]
    assert missing == []


CLIPS = {
    "audio no multiple of the frames": {"frames": 5, "audio_len": 72},
    "one position of audio a frame": {"frames": 6, "audio_len": 24},
    "more frames": {"frames": 7},
    "another size": {"size": 12},
}


@pytest.mark.parametrize("sizes", CLIPS.values(), ids=CLIPS)
def test_other_clips(sizes):
    """Clips of other sizes than the configured one; the middle then attends across all frames of the clip."""
    unet = small(
        cross_attention_resolutions=(2, 16, 32), cross_attention_windows=(1, 4, 8), middle_cross_attention=True
    )
    video, audio, timesteps = clip(**sizes)
    shifts = unet.shift_ranges(video.shape[1])
    config = {**unet.config, "video_size": video.shape[1:]}
    expected = published_network(config, unet.to_published())(video, audio, timesteps, shifts=shifts)
    assert error(unet(video, audio, timesteps, shifts=shifts), expected) < 1e-5


@pytest.mark.parametrize("stream", ("video", "audio"))
def test_single_stream(stream):
    """A stream alone: what it computes in a coupled model whose other stream cannot reach it, and no parameter more."""
    coupled = small(cross_attention_resolutions=(), cross_attention_windows=())
    state = {key: x for key, x in coupled.to_published().items() if not is_of_other_stream(key, stream)}
    unet = CoupledUNet.from_published(state, **{**SMALL_UNET, "cross_attention_windows": (2,)})
    assert unet.config["streams"] == (stream,) and unet.shift_ranges() == []
    video, audio, timesteps = clip()
    given = (video, None) if stream == "video" else (None, audio)
    found, expected = unet(*given, timesteps), coupled(video, audio, timesteps)
    mine = 0 if stream == "video" else 1
    assert found[1 - mine] is None and torch.equal(found[mine], expected[mine])
    assert all(x is not None for x in gradients(unet, *given, timesteps).values())
    with pytest.raises(ValueError, match=r"(video|audio) is given to a model with streams"):
        unet(video, audio, timesteps)


def is_of_other_stream(key, stream):
    if stream == "video":
        return "audio" in key
    return "video" in key or "spatial_attention" in key or "temporal_attention" in key


@pytest.mark.parametrize("block", ("video", "audio"))
def test_an_up_block_repeats_last_unless_it_drops(block):
    """The order matters to dropout's mask alone, which is drawn at the full resolution."""
    options = {"num_heads": 0, "resampling": "up"}
    x = torch.randn(2, 3, 4, 4, 32) if block == "video" else torch.randn(2, 12, 32)
    make = blocks.VideoBlock if block == "video" else blocks.AudioBlock
    options |= {} if block == "video" else {"dilation": 2}
    made = make(32, 32, dropout=1e-30, **options)
    fill(made)
    film = torch.randn(2, 64)
    repeated_first = made.train()(x, film, is_film=True)
    assert relative_error(made.eval()(x, film, is_film=True), repeated_first) < 1e-6
    made.dropout = 0.5
    out = made.train()(x, film, is_film=True)
    rows = out[:, :, 0::2] == out[:, :, 1::2] if block == "video" else out[:, 0::4] == out[:, 1::4]
    assert not rows.any(-1).all()


def test_a_down_block_pools_before_the_frames():
    """Against the published order: both convolutions, then the mean."""
    made = blocks.VideoBlock(32, 32, num_heads=0, resampling="down", dropout=0.0)
    fill(made)
    x, film = torch.randn(2, 3, 4, 6, 32), torch.randn(2, 64)
    channels_first = x.permute(0, 4, 1, 2, 3)  # [B, C, F, H, W]

    def half(h):
        return functional.avg_pool3d(h, (1, 2, 2))

    h = functional.silu(made.norm1(channels_first))
    h = functional.conv3d(h, made.spatial.weight[:, :, None], made.spatial.bias, padding=(0, 1, 1))
    h = half(functional.conv3d(h, made.temporal.weight[..., None, None], made.temporal.bias, padding=(1, 0, 0)))
    scale, shift = film[..., None, None, None].chunk(2, 1)
    h = functional.silu(made.norm2(h) * (1 + scale) + shift)
    expected = half(channels_first) + functional.conv3d(h, made.conv2.weight[..., None, None], made.conv2.bias)
    assert relative_error(made(x, film, is_film=True).permute(0, 4, 1, 2, 3), expected) < 1e-5


def test_dropout_is_of_training_alone():
    unet = small(dropout=0.5)
    inputs = clip()
    options = {"shifts": unet.shift_ranges()}
    assert is_equal(unet(*inputs, **options), small()(*inputs, **options))
    torch.manual_seed(5)
    first = unet.train()(*inputs, **options)
    assert not is_equal(unet(*inputs, **options), first)
    torch.manual_seed(5)
    assert is_equal(unet(*inputs, **options), first)


def test_deterministic_under_a_seed():
    unet = small()
    inputs = clip()
    draws = []
    for seed in (0, 0, 1, 2, 3):
        torch.manual_seed(seed)
        draws.append(unet(*inputs))
    assert is_equal(draws[0], draws[1])
    assert not all(is_equal(draws[0], other) for other in draws[2:])
    torch.manual_seed(0)
    shifts = torch.tensor([int(torch.randint(largest + 1, (1,))) for largest in unet.shift_ranges()])
    assert is_equal(unet(*inputs, shifts=shifts), draws[0])
    first, again = (unet(*inputs, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert is_equal(first, again)


def test_shifts_as_ints_and_tensors():
    unet = small()
    inputs = clip()
    assert unet.shift_ranges() == [2, 2, 2] and unet.shift_ranges(frames=9) == [7, 7, 7]
    given = [0, 2, 1]
    expected = unet(*inputs, shifts=given)
    assert is_equal(unet(*inputs, shifts=torch.tensor(given, dtype=torch.int32)), expected)
    assert is_equal(unet(*inputs, shifts=[0, torch.tensor([2]), torch.tensor(1)]), expected)
    assert not is_equal(unet(*inputs, shifts=[1, 2, 1]), expected)


def test_inputs_of_any_strides():
    unet = small()
    video, audio, timesteps = clip()
    expected = unet(video, audio, timesteps, shifts=[0, 1, 2])
    video = video.permute(0, 2, 1, 4, 3).contiguous().permute(0, 2, 1, 4, 3)
    audio = torch.stack([audio, audio], -1)[..., 1]
    found = unet(video, audio, timesteps, shifts=[0, 1, 2])
    assert is_equal(found, expected)
    assert all(x.is_contiguous() for x in found)
    assert is_equal(unet(video, audio, 3, shifts=[0, 1, 2]), unet(video, audio, torch.tensor([3, 3]), shifts=[0, 1, 2]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dropout", (0.0, 0.3))
def test_checkpointing_changes_no_gradient(dropout, device):
    """The shifts are drawn outside of what is computed again."""
    unet = small(dropout=dropout).train().to(device)
    inputs = [x.to(device) for x in clip()]
    torch.manual_seed(1)
    expected = gradients(unet, *inputs)
    unet.enable_gradient_checkpointing()
    calls = []
    checkpoint = unet._gradient_checkpointing_func
    unet._gradient_checkpointing_func = lambda *args: (calls.append(args[0]), checkpoint(*args))[1]
    torch.manual_seed(1)
    found = gradients(unet, *inputs)
    assert len(calls) == 13  # nine residual blocks, one of them up, and one down; three of RS-MMA
    # On a GPU the convolutions of others need not give the same bits twice.
    limit = 0 if device == "cpu" else 1e-5
    assert all(relative_error(found[name], expected[name]) <= limit for name in expected)
    unet.disable_gradient_checkpointing()
    gradients(unet, *inputs)
    assert len(calls) == 13


COMPILED = {
    "drawn": (None, "aot_eager"),
    "ints": ([0, 1, 2], "eager"),
    "tensor": (torch.tensor([0, 1, 2]), "eager"),
}


@pytest.mark.parametrize(("shifts", "backend"), COMPILED.values(), ids=COMPILED)
def test_compile(shifts, backend, fresh_dynamo):
    unet = small()
    inputs = clip()
    compiled = torch.compile(unet, fullgraph=True, backend=backend)
    torch.manual_seed(4)
    found = compiled(*inputs, shifts=shifts)
    torch.manual_seed(4)
    assert error(found, unet(*inputs, shifts=shifts)) < 1e-5


@pytest.mark.parametrize("how", ("torch.compile", "Module.compile"))
def test_compile_with_a_generator(how, fresh_dynamo):
    """One graph for all draws, which are those of the uncompiled model."""
    unet, inputs, graphs = small(), clip(), []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = copy.deepcopy(unet)
    if how == "torch.compile":
        compiled = torch.compile(compiled, fullgraph=True, backend=backend)
    else:
        compiled.compile(fullgraph=True, backend=backend)
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    outputs = [(compiled(*inputs, generator=generators[0]), unet(*inputs, generator=generators[1])) for _ in range(4)]
    outputs += [tuple(m(*inputs, generator=torch.Generator().manual_seed(6)) for m in (compiled, unet))]
    assert all(error(found, expected) < 1e-5 for found, expected in outputs)
    assert torch.equal(*(generator.get_state() for generator in generators))
    assert max(error(expected, outputs[0][1]) for _, expected in outputs) > 1e-3  # the shifts differ
    assert len(graphs) == 1


def test_half_precision():
    unet = small()
    inputs = clip()
    options = {"shifts": [0, 1, 2]}
    expected = unet(*inputs, **options)
    with torch.autocast("cpu", torch.bfloat16):
        found = unet(*inputs, **options)
    assert all(x.dtype == torch.bfloat16 for x in found) and error(found, expected) < 3e-2
    low = small().to(torch.bfloat16)
    video, audio, timesteps = inputs
    found = low(video.bfloat16(), audio.bfloat16(), timesteps, **options)
    assert all(x.dtype == torch.bfloat16 for x in found) and error(found, expected) < 3e-2
    assert all(
        x.dtype == torch.bfloat16 for x in gradients(low, video.bfloat16(), audio.bfloat16(), timesteps).values()
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert all(x.dtype == torch.float32 for x in gradients(unet, *inputs).values())


def test_double_precision(recwarn):
    unet = small().double()
    video, audio, timesteps = clip()
    options = {"shifts": [0, 1, 2]}
    found = unet(video.double(), audio.double(), timesteps, **options)
    assert error(small()(video, audio, timesteps, **options), found) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
def test_training_overfits_a_clip(device):
    """Thirty steps on the noise of one synthetic clip, a moving square and a tone that follows it."""
    torch.manual_seed(0)
    unet = CoupledUNet(**SMALL_UNET).train().to(device)
    video = torch.full((1, 4, 3, 8, 8), -1.0)
    for frame in range(4):
        video[:, frame, :, 2:5, frame : frame + 3] = 1.0
    audio = torch.sin(torch.arange(64) * torch.linspace(0.1, 0.6, 64))[None, None]
    noises = [torch.randn_like(x).to(device) for x in (video, audio)]
    video, audio = video.to(device), audio.to(device)
    noisy = [0.8 * x + 0.6 * noise for x, noise in zip((video, audio), noises, strict=True)]
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    losses = []
    for _ in range(30):
        predicted = unet(*noisy, timesteps=400)
        loss = sum(functional.mse_loss(x, noise) for x, noise in zip(predicted, noises, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - sum(noise.square().mean() for noise in noises)) < 1e-4  # it is born silent
    assert losses[-1] < 0.5 * losses[0]


def test_full_size_checkpoint():
    """Every key of the published models and no other, at their configuration though none is given."""
    state = {key: torch.empty(shape, device="meta") for key, shape in FULL["state_dict"].items()}
    unet = CoupledUNet.from_published(state)
    ours = {"middle_cross_attention": True, "frame_rate": 10, "sample_rate": 16000, "random_weights": False}
    config = {**FULL["config"], "dropout": 0.1, "prediction_type": "epsilon", **ours}
    assert public(unet.config) == {**config, "streams": ["video", "audio"]}
    assert {key: list(x.shape) for key, x in unet.to_published().items()} == FULL["state_dict"]
    assert round(unet.num_parameters() / 1e6, 2) == 133.68
    assert not unet.training
    for preset in ("landscape", "aist++"):
        assert CoupledUNet.from_published(state, preset=preset).config == unet.config
    assert CoupledUNet.from_published(state, num_heads=8).config["num_heads"] == 8
    for stream in ("video", "audio"):
        with torch.device("meta"):
            state = CoupledUNet(**FULL["config"], streams=(stream,)).to_published()
        expected = {**config, "streams": [stream]}
        assert public(CoupledUNet.from_published(state).config) == expected


def test_attention_in_the_middle_is_an_argument(tmp_path):
    """Whatever the windows; a checkpoint's keys tell, and a configuration saved before there was the argument."""
    for windows, resolutions in (((2,), (2,)), ((1, 4, 8), (2, 16, 32))):
        for has_it in (False, True):
            options = {"cross_attention_windows": windows, "cross_attention_resolutions": resolutions}
            unet = small(**options, middle_cross_attention=has_it)
            assert (unet.middle[0].cross is not None) is has_it
            told = {name: value for name, value in SMALL_UNET.items() if name != "middle_cross_attention"}
            again = CoupledUNet.from_published(unet.to_published(), **{**told, **options})
            assert again.config["middle_cross_attention"] is has_it
            unet.save_pretrained(tmp_path / "saved")
            config = json.loads((tmp_path / "saved" / "config.json").read_text())
            assert config.pop("middle_cross_attention") is has_it
            assert (config.pop("frame_rate"), config.pop("sample_rate")) == (10, 16000)
            (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
            if has_it == (windows == (1, 4, 8)):  # as the published code does
                old = CoupledUNet.from_pretrained(tmp_path / "saved", low_cpu_mem_usage=False)
                assert public(old.config) == public(unet.config)
                assert is_equal(old.parameters(), unet.parameters())


def as_list(value):
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("case", (0, 1))
def test_what_a_checkpoint_tells_is_inferred(case):
    metadata, _ = reference(case)
    config = metadata["config"]
    told = {
        name: config[name] for name in ("cross_attention_windows", "num_heads", "num_head_channels") if name in config
    }
    unet = CoupledUNet.from_published(filled(metadata["state_dict"]), **told)
    untold = {*told, "video_size", "audio_size", "cross_attention_shift", "cross_attention_resolutions"}
    untold |= {"video_attention_resolutions"}  # levels that do not exist leave no trace
    for name in set(config) - untold:
        assert as_list(unet.config[name]) == config[name], name


@pytest.mark.parametrize("suffix", (".pt", ".safetensors"))
def test_published_round_trip(suffix, tmp_path):
    metadata, tensors = reference(1)
    state = filled(metadata["state_dict"])
    path = tmp_path / f"published{suffix}"
    if suffix == ".pt":
        torch.save({f"module.{key}": x for key, x in state.items()}, path)  # as saved from DistributedDataParallel
    else:
        safetensors.torch.save_file(state, path)
    unet = CoupledUNet.from_published(path, **metadata["config"])
    written = unet.to_published()
    assert written.keys() == state.keys()
    assert all(torch.equal(x, state[key]) for key, x in written.items())
    loaded = CoupledUNet.from_published(state, **metadata["config"])
    next(loaded.parameters()).data.zero_()
    assert all(torch.equal(x, state[key]) for key, x in filled(metadata["state_dict"]).items())  # it has its own copy
    unet.save_pretrained(tmp_path / "ours")
    again = CoupledUNet.from_pretrained(tmp_path / "ours", low_cpu_mem_usage=False)
    assert public(again.config) == public(unet.config)
    assert all(torch.equal(x, state[key]) for key, x in again.to_published().items())
    inputs = tensors["video"], tensors["audio"], tensors["timesteps"]
    assert is_equal(again(*inputs), unet(*inputs))


def public(config):
    return {name: as_list(value) for name, value in config.items() if not name.startswith("_")}


def test_checkpoints_that_do_not_fit(tmp_path):
    metadata, _ = reference(1)
    state, config = filled(metadata["state_dict"]), metadata["config"]
    lacking = {key: x for key, x in state.items() if "temporal.bias" not in key}
    with pytest.raises(ValueError, match=r"\d+ missing: input_blocks\.0\.0\.\S*temporal\.bias.* and \d+ more$"):
        CoupledUNet.from_published(lacking, **config)
    with pytest.raises(ValueError, match=r"fit the model; 1 unknown: label_emb\.weight$"):
        CoupledUNet.from_published({**state, "label_emb.weight": torch.zeros(3)}, **config)
    wrong = {**state, "time_embed.2.bias": torch.zeros(5)}
    with pytest.raises(ValueError, match=r"1 of another shape: time_embed\.2\.bias \[5\] instead of \[32\]$"):
        CoupledUNet.from_published(wrong, **config)
    with pytest.raises(ValueError, match=r"missing: .*; \d+ unknown: .*; \d+ of another shape: "):
        CoupledUNet.from_published(state, preset="landscape")
    with pytest.raises(ValueError, match=r"no time_embed\.0\.weight among its 1 keys"):
        CoupledUNet.from_published({"x": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"preset is 'dance'; expected one of 'landscape', 'aist\+\+'"):
        CoupledUNet.from_published(state, preset="dance")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(TypeError, match=r"holds a list; expected a state dict"):
        CoupledUNet.from_published(tmp_path / "list.pt")


REFUSED = {
    "video_size is": {"video_size": (4, 3, 8)},
    "audio_size is": {"audio_size": (1, 0)},
    "model_channels is": {"model_channels": 0},
    "num_res_blocks is": {"num_res_blocks": 0},
    "video_out_channels is": {"video_out_channels": 1.5},
    "channel_mult is": {"channel_mult": (1, 1.25)},
    "video_attention_resolutions is": {"video_attention_resolutions": (3,)},
    r"cross_attention_windows is \(1, 2\); expected one window for each": {"cross_attention_windows": (1, 2)},
    r"cross_attention_windows is \(5,\); expected 1..F = 1..4": {"cross_attention_windows": (5,)},
    "num_heads is 3; expected a divisor": {"num_heads": 3},
    "num_head_channels is 48; expected -1, or a divisor": {"num_head_channels": 48},
    "dropout is 1.0; expected 0 <= dropout < 1": {"dropout": 1.0},
    "resblock_updown is False; expected True": {"resblock_updown": False},
    "streams is": {"streams": ("audio", "video")},
    "streams is None; expected a sequence": {"streams": None},
    "middle_cross_attention is 1; expected True or False": {"middle_cross_attention": 1},
    "frame_rate is nan; expected a positive number": {"frame_rate": float("nan")},
    "sample_rate is 0; expected a positive int": {"sample_rate": 0},
    "num_res_blocks is 1000000000; expected at most 1000": {"num_res_blocks": 10**9},
    "video_size has height and width 8, 9; expected multiples of 2": {"video_size": (4, 3, 8, 9)},
    "audio_size has length 66; expected multiples of 4": {"audio_size": (1, 66)},
    "model_channels is 32; expected a network of at most 4e.09 parameters.* channel_mult": {"channel_mult": (1, 10**6)},
    "model_channels is 1048576; expected a network of at most": {"model_channels": 2**20},
    r"model_channels is 3072; expected a network of at most 4e\+09 parameters, where this has 8\.75e\+09$": {
        "model_channels": 3072
    },
    "channel_mult is .1e.300,.; expected widths": {"channel_mult": (1e300,)},
    "video_out_channels is 1000000000000; expected a network of at most": {"video_out_channels": 10**12},
    r"video_size is \(4, 1000000000, 8, 8\); expected a network of at most": {"video_size": (4, 10**9, 8, 8)},
    "video_size is .*; expected at most 2147483648 elements": {"video_size": (4, 3, 2**20, 2**20)},
    "audio_size is .*; expected at most 2147483648 elements": {"audio_size": (1, 4**20)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_configurations_that_are_refused(message):
    with pytest.raises(ValueError, match=message):
        CoupledUNet(**{**SMALL_UNET, **REFUSED[message]})


def test_inputs_that_are_refused():
    unet = small()
    video, audio, timesteps = clip()
    refused = {
        r"video has shape \[2, 4, 3, 8\]; expected \[B, F, C, H, W\] with C = 3": (video[..., 0], audio, timesteps),
        r"video has shape \[2, 4, 2, 8, 8\]": (video[:, :, :2], audio, timesteps),
        r"audio has shape \[2, 64\]; expected \[B, C, T\]": (video, audio[:, 0], timesteps),
        r"video has height and width 8, 7; expected multiples of 2": (video[..., :7], audio, timesteps),
        r"audio has length 63; expected multiples of 4": (video, audio[..., :63], timesteps),
        r"audio has batch 1": (video, audio[:1], timesteps),
        r"video has 1 frames; expected at least the largest window, 2": (video[:, :1], audio, timesteps),
        r"audio has 12 positions, 3 at the coarsest level; expected at least the 4": (
            video,
            audio[..., :12],
            timesteps,
        ),
        r"timesteps has shape \[3\]; expected \[B\] = \[2\]": (video, audio, torch.arange(3)),
    }
    for message, inputs in refused.items():
        with pytest.raises(ValueError, match=message):
            unet(*inputs)
    with pytest.raises(TypeError, match="video is a NoneType; expected a tensor"):
        unet(None, audio, timesteps)
    with pytest.raises(
        TypeError, match=r"video has dtype torch.bfloat16; expected torch.float32, the dtype of the param"
    ):
        unet(video.bfloat16(), audio.bfloat16(), timesteps)
    with pytest.raises(TypeError, match=r"audio has dtype torch.int64"):
        unet(video, audio.long(), timesteps)
    with pytest.raises(ValueError, match=r"shifts has 2 elements; expected 3, one for each block that shifts"):
        unet(video, audio, timesteps, shifts=[0, 0])
    with pytest.raises(ValueError, match=r"shifts\[1\] is 3; expected 0..F-S = 0..2"):
        unet(video, audio, timesteps, shifts=[0, 3, 0])
    with pytest.raises(RuntimeError, match=r"model and inputs are on cpu; expected all on one CUDA device"):
        unet.capture(video, audio, timesteps)


@pytest.mark.skipif(torch.cuda.is_available(), reason="chosen there by itself")
def test_triton_kernels_interpreted(monkeypatch):
    pytest.importorskip("triton")
    unet = small(num_res_blocks=1)
    inputs = [x[:1] for x in clip()]
    found = {}
    for impl in ("reference", "triton"):
        monkeypatch.setenv("MMATTN_IMPL", impl)
        with torch.no_grad():
            found[impl] = unet(*inputs, shifts=[1] * len(unet.shift_ranges()))
    assert error(found["triton"], found["reference"]) < 5e-6


@pytest.mark.ahead_of_time
def test_every_kernel_of_a_training_step_compiles():
    """Not only those of the shapes that the tests of the kernels have: strides and what is absent decide as well."""
    common = pytest.importorskip("triton_common")  # imports Triton
    rows = common.ahead_of_time("--op", "unet", "sm_90")
    kernels = {"convolve", "backward_weight", "forward", "backward_dq", "backward_dkdv", "single_launch", "statistics"}
    assert {row["kernel"] for row in rows} > kernels
    for row in rows:
        assert row["spills"] <= common.SPILLS + 6 and row["shared"] <= common.SHARED_LIMIT["sm_90"], row
        assert row["kernel"] != "convolve" or row["mma"] == "wgmma", row
    # But for those of one or three channels, which have nothing to copy 16 bytes of.
    assert sum(row["wide_copies"] > 10 for row in rows if row["kernel"] == "convolve") >= 9


def test_weights_as_a_capture_lays_them_out(tmp_path):
    unet, inputs = small(), clip()
    expected = gradients(unet, *inputs, shifts=[0, 1, 2])
    _lay_out_weights(unet)
    assert unet.encoder[0].block.video.spatial.weight.is_contiguous(memory_format=torch.channels_last)
    found = gradients(unet, *inputs, shifts=[0, 1, 2])
    assert all(relative_error(found[name], x) < 1e-6 for name, x in expected.items())
    checkpoints.write(unet.to_published(), tmp_path / "model.safetensors")
    unet.save_pretrained(tmp_path / "model")
    for loaded in (
        CoupledUNet.from_published(tmp_path / "model.safetensors", **SMALL_UNET),
        CoupledUNet.from_pretrained(tmp_path / "model"),
    ):
        with torch.no_grad():
            assert is_equal(loaded(*inputs, shifts=[0, 1, 2]), unet(*inputs, shifts=[0, 1, 2]))


@pytest.mark.gpu
def test_captured_graph():
    unet = small().cuda()
    video, audio, timesteps = (x.cuda() for x in clip())
    with torch.no_grad():
        replay = unet.capture(torch.zeros_like(video), audio, timesteps)
        for shifts in ([0, 1, 2], torch.tensor([2, 0, 1], device="cuda")):
            found = replay(video, audio, timesteps, shifts)
            assert error(found, unet(video, audio, timesteps, shifts=shifts)) < 1e-5
        torch.manual_seed(0)
        drawn = [replay(video, audio, timesteps) for _ in range(8)]
    assert not all(is_equal(x, drawn[0]) for x in drawn)
    with pytest.raises(ValueError, match=r"audio has shape .*, as captured"):
        replay(video, audio[..., :32], timesteps)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("case", (0, 1))
def test_against_fp64_on_the_device(case, dtype, monkeypatch):
    """Outputs and gradients of the published configurations, plain torch in the same dtype being the budget."""
    metadata, tensors = reference(case)
    state = filled(metadata["state_dict"], metadata["fill_seed"])

    def run(dtype, impl):
        monkeypatch.setenv("MMATTN_IMPL", impl)
        unet = CoupledUNet.from_published(state, **metadata["config"]).to("cuda", rounded).to(dtype)
        video, audio = (tensors[name].to("cuda", rounded).to(dtype) for name in ("video", "audio"))
        inputs, options = (video, audio, tensors["timesteps"].cuda()), {"shifts": metadata["shifts"]}
        grads = gradients(unet, *inputs, **options)
        return *unet(*inputs, **options), torch.cat([x.flatten() for x in grads.values()])

    rounded = dtype
    found, plain, exact = run(dtype, "auto"), run(dtype, "reference"), run(torch.float64, "auto")
    for name, x, y, z in zip(("video", "audio", "gradients"), found, exact, plain, strict=True):
        assert_close_to_fp64(x, y, z, name=name, rounding=4.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GPU_DTYPES.values(), ids=GPU_DTYPES)
def test_half_precision_on_the_device(dtype):
    """Under autocast, and with parameters and inputs in the dtype; gradients are finite and in that of the weights."""
    unet = small().cuda()
    video, audio, timesteps = (x.cuda() for x in clip())
    options = {"shifts": [0, 1, 2]}
    expected = unet(video, audio, timesteps, **options)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        found = unet(video, audio, timesteps, **options)
        grads = gradients(unet, video, audio, timesteps)
    assert all(x.dtype == dtype for x in found) and error(found, expected) < 3e-2
    assert all(x.dtype == torch.float32 and torch.isfinite(x).all() for x in grads.values())
    low = small().to("cuda", dtype)
    found = low(video.to(dtype), audio.to(dtype), timesteps, **options)
    grads = gradients(low, video.to(dtype), audio.to(dtype), timesteps)
    assert all(x.dtype == dtype for x in found) and error(found, expected) < 3e-2
    assert all(x.dtype == dtype and torch.isfinite(x).all() for x in grads.values())


@pytest.mark.gpu
def test_inductor_on_the_device(fresh_dynamo):
    """Forward and backward without a break, at one level; changed shifts compile nothing anew."""
    unet = small(channel_mult=(1,), cross_attention_resolutions=(1,)).cuda()
    inputs = [x.cuda() for x in clip()]
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(unet, fullgraph=True, backend=counter)
    for shifts in ([0, 1, 2], [2, 2, 0]):
        shifts = torch.tensor(shifts[: len(unet.shift_ranges())], dtype=torch.int32, device="cuda")
        expected = gradients(unet, *inputs, shifts=shifts)
        assert error(compiled(*inputs, shifts=shifts), unet(*inputs, shifts=shifts)) < 1e-5
        unet.zero_grad()
        sum(x.square().sum() for x in compiled(*inputs, shifts=shifts)).backward()
        assert all(torch.isfinite(x.grad).all() for x in unet.parameters())
        assert expected.keys() == dict(unet.named_parameters()).keys()
    assert counter.frame_count == 1


@pytest.mark.gpu
def test_captured_graph_in_half_precision():
    unet = small().to("cuda", torch.bfloat16)
    video, audio, timesteps = (x.cuda() for x in clip())
    inputs = video.bfloat16(), audio.bfloat16(), timesteps
    replay = unet.capture(*inputs)
    for shifts in ([0, 1, 2], [2, 0, 1]):
        found = replay(*inputs, shifts)
        assert not any(x.requires_grad for x in found)
        with torch.no_grad():
            assert error(found, unet(*inputs, shifts=shifts)) < 5e-3


@pytest.mark.gpu
@pytest.mark.xdist_group("memory")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=("bf16", "fp32"))
def test_full_size_on_the_device(dtype, monkeypatch):
    """The published configuration at its full size, against the same in plain torch."""
    enough_memory(40)
    unet = fill(CoupledUNet(**FULL["config"])).eval().to("cuda", dtype)
    (frames, *sizes), audio_size = unet.config["video_size"], unet.config["audio_size"]
    generator = torch.Generator().manual_seed(1)
    video, audio = (
        torch.randn(1, *shape, generator=generator).to("cuda", dtype) for shape in ((frames, *sizes), audio_size)
    )
    inputs, shifts = (video, audio, torch.tensor([500]).cuda()), [x // 2 for x in unet.shift_ranges()]
    with torch.no_grad():
        found = unet(*inputs, shifts=shifts)
        assert error(unet.capture(*inputs)(*inputs, shifts), found) < 5e-3
    grads = gradients(unet, *inputs, shifts=shifts)
    assert all(torch.isfinite(x).all() for x in grads.values())
    monkeypatch.setenv("MMATTN_IMPL", "reference")
    with torch.no_grad():
        plain = unet(*inputs, shifts=shifts)
    assert error(found, plain) < (8e-2 if dtype == torch.bfloat16 else 1e-4)


def test_command_line(tmp_path, capsys):
    metadata, _ = reference(1)
    state = filled(metadata["state_dict"])
    torch.save(state, tmp_path / "in.pt")
    (tmp_path / "config.json").write_text(json.dumps(metadata["config"]))
    config = ["--config", str(tmp_path / "config.json")]
    cli.main(["convert", str(tmp_path / "in.pt"), str(tmp_path / "ours"), *config])
    pipeline = MMDiffusionPipeline.from_pretrained(tmp_path / "ours", low_cpu_mem_usage=False)
    assert all(torch.equal(x, state[key]) for key, x in pipeline.unet.to_published().items())
    assert type(pipeline.scheduler) is type(make_scheduler("dpmsolver++"))
    cli.main(["convert", str(tmp_path / "ours"), str(tmp_path / "out.pt")])
    written = torch.load(tmp_path / "out.pt", weights_only=True)
    assert written.keys() == state.keys() and all(torch.equal(x, state[key]) for key, x in written.items())
    with pytest.raises(SystemExit, match="2"):
        cli.main(["convert", str(tmp_path / "ours"), str(tmp_path / "out.pt")])
    assert re.search(r"mmdiffusion convert: .*out\.pt exists; --force overwrites it\n$", capsys.readouterr().err)
    half = ["--force", "--dtype", "bfloat16"]
    cli.main(["convert", str(tmp_path / "in.pt"), str(tmp_path / "ours"), *config, *half])
    saved = safetensors.torch.load_file(tmp_path / "ours" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(x.dtype == torch.bfloat16 for x in saved.values())
    capsys.readouterr()
    cli.main(["info", str(tmp_path / "in.pt"), *config])
    printed = capsys.readouterr().out
    count = sum(x.numel() for x in state.values()) / 1e6
    assert f"{count:.2f} M parameters" in printed.splitlines()[-1]
    assert "num_heads                    2" in printed
    with pytest.raises(SystemExit, match="2"):
        cli.main(["info", str(tmp_path / "absent.pt")])
    assert re.search(r"mmdiffusion info: .*absent.pt is not there; expected a checkpoint", capsys.readouterr().err)
