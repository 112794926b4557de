# SPDX-License-Identifier: MIT
"""Super-resolution: the network and its checkpoints, the pipeline, the command, degradations, and the loss."""

import json
import math
import pathlib
import re
import sys

import pytest
import torch
from helpers import DEVICES, SMALL_UNET, fill, filled
from torch.nn import functional

diffusers = pytest.importorskip("diffusers")
safetensors = pytest.importorskip("safetensors")
av = pytest.importorskip("av")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

import mmattn  # noqa: E402
from mmattn.testing import relative_error  # noqa: E402
from mmdiffusion import CoupledUNet, SuperResolutionPipeline, SuperResolutionUNet, _files, checkpoints, cli, media  # noqa: E402
from mmdiffusion.clips import ClipFormat  # noqa: E402
from mmdiffusion.data import SyntheticClips, degrade  # noqa: E402
from mmdiffusion.data.items import joined  # noqa: E402
from mmdiffusion.diffusion.process import GaussianDiffusion  # noqa: E402
from mmdiffusion.diffusion.schedulers import make_scheduler, prepared  # noqa: E402
from mmdiffusion.runs.trained import frames_of  # noqa: E402
from mmdiffusion.training import Recipe, train  # noqa: E402
from mmdiffusion.training.losses import denoising_losses  # noqa: E402
from mmdiffusion.training.superres import FrameNetwork, Frames, small_images  # noqa: E402

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "bench"))

import published_superres  # noqa: E402

# numpy's about torch's tensors.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")
DATA = pathlib.Path(__file__).parent / "data"
FULL = json.loads((DATA / "sr_full_keys.json").read_text())
SMALL = {
    "image_size": 16,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 2),
    "num_heads": 2,
}


@pytest.fixture(autouse=True)
def one_thread(threads):
    """These sizes are too small to share, and whoever waits for a second core waits long."""
    threads(1)


def reference(name):
    with safetensors.safe_open(DATA / f"superres_{name}.safetensors", "pt") as file:
        found = file.metadata()
        metadata = {key: json.loads(found[key]) for key in ("config", "state_dict", "fill_seed")}
        return metadata, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def network_of(metadata):
    state = filled(metadata["state_dict"], metadata["fill_seed"])
    return SuperResolutionUNet.from_published(state, **metadata["config"])


def small(**options):
    """A small model whose every parameter matters: it is born with outputs of zero."""
    return fill(SuperResolutionUNet(**{**SMALL, **options})).eval()


def images(size=16, batch=2, channels=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, channels, size, size, generator=generator)
    return x, torch.randn(batch, channels, 5, 4, generator=generator), torch.tensor([3, 700])[:batch]


@pytest.mark.parametrize("device", DEVICES)
def test_published_values(device):
    metadata, tensors = reference("unet")
    unet = network_of(metadata).to(device)
    with torch.no_grad():
        out = unet(*(tensors[name].to(device) for name in ("x", "low_res", "timesteps")))
    assert relative_error(out.cpu(), tensors["out"]) < 3e-5


def test_published_values_at_a_step_of_sampling():
    """Other widths and attention than those of the other reference, and low_res of a quarter of the size."""
    metadata, tensors = reference("sampling")
    noise = tensors["noise"].expand(2, -1, -1, -1)
    with torch.no_grad():
        out = network_of(metadata)(noise, tensors["low_res"], 960)
    assert relative_error(out, tensors["model_out_t960"]) < 3e-5


def published_network(unet):
    """The same network in plain torch."""
    peer = published_superres.PublishedSuperResolutionUNet(**unet.config)
    peer.load_state_dict(unet.to_published())
    return peer


OPTIONS = {
    "as is": {},
    "no attention but in the middle": {"attention_resolutions": (-1,)},
    "attention at every level": {"attention_resolutions": (1, 2, 64)},
    "embedding added": {"use_scale_shift_norm": False},
    "noise alone": {"out_channels": 3},
    "one channel": {"in_channels": 1, "out_channels": 2},
    "two blocks a level": {"num_res_blocks": 2},
    "one level": {"channel_mult": (1,), "num_heads": 1},
    "three levels, a wide one": {"channel_mult": (1, 3, 2)},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options, device):
    """Each against the network in plain torch, its checkpoint back, and no parameter is without a gradient."""
    unet = small(**options).to(device)
    inputs = [x.to(device) for x in images(channels=unet.config["in_channels"])]
    expected = published_network(unet).to(device)(*inputs)
    found = unet(*inputs)
    assert found.is_contiguous()
    assert found.shape[1] == unet.config["out_channels"]
    assert relative_error(found, expected) < 1e-5
    found.square().sum().backward()
    assert all(x.grad is not None and x.grad.abs().max() > 0 for x in unet.parameters())
    again = SuperResolutionUNet.from_published(unet.to_published(), image_size=16, num_heads=unet.config["num_heads"])
    wanted = {**public(unet.config), "attention_resolutions": public(again.config)["attention_resolutions"]}
    assert public(again.config) == wanted
    assert torch.equal(again.to(device)(*inputs), found)


def public(config):
    return {name: list(x) if isinstance(x, tuple) else x for name, x in config.items() if not name.startswith("_")}


def test_gradients_are_those_of_the_published_network():
    unet = small()
    peer = published_network(unet)
    for network in (unet, peer):
        network(*images()).square().sum().backward()
    expected = {key: x.grad for key, x in peer.named_parameters()}
    found = {x.data_ptr(): x.grad for x in unet.parameters()}
    size = torch.stack([x.norm() for x in expected.values()]).norm()
    for key, x in unet.to_published().items():
        # A bias in front of a normalisation of each channel has no gradient but rounding.
        difference = (found[x.data_ptr()].view(x.shape) - expected[key]).norm()
        assert difference < 2e-5 * expected[key].norm() + 1e-6 * size, key


def test_the_tuned_peer_is_the_same_network():
    unet = small()
    peer = published_superres.tuned(published_network(unet))
    assert relative_error(peer(*images()), unet(*images())) < 1e-5


def test_full_size_checkpoint():
    """Every key of the published network and no other, at its configuration though none is given."""
    state = {key: torch.empty(shape, device="meta") for key, shape in FULL["state_dict"].items()}
    unet = SuperResolutionUNet.from_published({f"module.{key}": x for key, x in state.items()})
    with torch.device("meta"):
        assert public(unet.config) == public(SuperResolutionUNet().config)
    assert {key: list(x.shape) for key, x in unet.to_published().items()} == FULL["state_dict"]
    assert unet.num_parameters() == FULL["parameters"] == 311_027_910
    assert not unet.training


@pytest.mark.parametrize("suffix", (".pt", ".safetensors"))
def test_published_round_trip(suffix, tmp_path):
    metadata, tensors = reference("unet")
    state = filled(metadata["state_dict"])
    path = tmp_path / f"published{suffix}"
    torch.save(state, path) if suffix == ".pt" else safetensors.torch.save_file(state, path)
    unet = SuperResolutionUNet.from_published(path, **metadata["config"])
    written = unet.to_published()
    assert written.keys() == state.keys()
    assert all(torch.equal(x, state[key]) for key, x in written.items())
    unet.save_pretrained(tmp_path / "ours")
    again = SuperResolutionUNet.from_pretrained(tmp_path / "ours", low_cpu_mem_usage=False)
    assert public(again.config) == public(unet.config)
    inputs = tensors["x"], tensors["low_res"], tensors["timesteps"]
    assert torch.equal(again(*inputs), unet(*inputs))


def test_checkpoints_that_do_not_fit():
    state = small().to_published()
    load = SuperResolutionUNet.from_published
    refused = {
        r"1 missing: out\.2\.bias$": {key: x for key, x in state.items() if key != "out.2.bias"},
        r"1 unknown: label_emb\.weight$": {**state, "label_emb.weight": torch.zeros(3)},
        r"1 of another shape: middle_block\.1\.qkv\.bias \[5\] instead of \[192\]$": {
            **state,
            "middle_block.1.qkv.bias": torch.zeros(5),
        },
        r"no input_blocks\.0\.0\.weight among its 1 keys; expected the published super-resolution": {
            "x": torch.zeros(3)
        },
        r"out\.2\.weight has shape \[\]": {**state, "out.2.weight": torch.tensor(1.0)},
        r"input_blocks\.0\.0\.weight has shape \[64, 5, 3, 3\]; expected an even number": {
            **state,
            "input_blocks.0.0.weight": torch.zeros(64, 5, 3, 3),
        },
    }
    for message, tensors in refused.items():
        with pytest.raises(ValueError, match=message):
            load(tensors, image_size=16, num_heads=2)
    with pytest.raises(TypeError, match="a list under the key 'x'; expected a state dict"):
        load({"x": [1]})


REFUSED = {
    "image_size is 0; expected a positive int": {"image_size": 0},
    "image_size has height and width 17; expected multiples of 2": {"image_size": 17},
    "model_channels is 1.5": {"model_channels": 1.5},
    "out_channels is 5; expected in_channels = 3, or twice": {"out_channels": 5},
    "num_res_blocks is 1000000000; expected at most": {"num_res_blocks": 10**9},
    "attention_resolutions is": {"attention_resolutions": (3,)},
    "attention_resolutions is None; expected a sequence": {"attention_resolutions": None},
    "channel_mult is": {"channel_mult": (1, 1.25)},
    "num_heads is 3; expected a divisor of the widths": {"num_heads": 3},
    "dropout is nan": {"dropout": float("nan")},
    "resblock_updown is False; expected True": {"resblock_updown": False},
    "scale is 3; expected a divisor of image_size = 16": {"scale": 3},
    "model_channels is 32; expected a network of at most": {"channel_mult": (1, 10**6)},
    "in_channels is 1000000000000; expected a network of at most": {"in_channels": 10**12, "out_channels": 10**12},
    "image_size is 1099511627776; expected at most 2147483648 elements": {"image_size": 2**40},
}


@pytest.mark.parametrize("message", REFUSED)
def test_configurations_that_are_refused(message):
    with pytest.raises(ValueError, match=message):
        SuperResolutionUNet(**{**SMALL, **REFUSED[message]})


def test_inputs_that_are_refused():
    unet = small()
    x, low_res, timesteps = images()
    refused = {
        r"x has shape \[2, 3, 16\]; expected \[B, C, H, W\] with C = 3": (x[..., 0], low_res, timesteps),
        r"x has height and width 16, 15; expected multiples of 2": (x[..., :15], low_res, timesteps),
        r"low_res has shape \[2, 1, 5, 4\]": (x, low_res[:, :1], timesteps),
        r"low_res has shape \[2, 3, 0, 4\]": (x, low_res[:, :, :0], timesteps),
        r"low_res has batch 1; expected 2": (x, low_res[:1], timesteps),
        r"timesteps has shape \[3\]; expected \[B\] = \[2\]": (x, low_res, torch.arange(3)),
        r"low_res is on meta; expected cpu": (x, low_res.to("meta"), timesteps),
    }
    for message, inputs in refused.items():
        with pytest.raises(ValueError, match=message):
            unet(*inputs)
    with pytest.raises(TypeError, match=re.escape("x has dtype torch.float64; expected torch.float32")):
        unet(x.double(), low_res, timesteps)
    with pytest.raises(TypeError, match="low_res is a NoneType; expected a tensor"):
        unet(x, None, timesteps)


def test_inputs_of_any_strides():
    unet = small()
    x, low_res, timesteps = images()
    expected = unet(x, low_res, timesteps)
    found = unet(
        x.transpose(2, 3).contiguous().transpose(2, 3), low_res.contiguous(memory_format=torch.channels_last), timesteps
    )
    assert torch.equal(found, expected)
    assert torch.equal(unet(x, low_res, 3), unet(x, low_res, torch.tensor([3, 3])))


@pytest.mark.parametrize("dropout", (0.0, 0.3))
def test_checkpointing_changes_no_gradient(dropout):
    unet = small(dropout=dropout).train()

    def gradients():
        torch.manual_seed(1)
        unet.zero_grad()
        unet(*images()).square().sum().backward()
        return [x.grad for x in unet.parameters()]

    expected = gradients()
    unet.enable_gradient_checkpointing()
    calls = []
    checkpoint = unet._gradient_checkpointing_func
    unet._gradient_checkpointing_func = lambda *args: (calls.append(args[0]), checkpoint(*args))[1]
    assert all(torch.equal(a, b) for a, b in zip(gradients(), expected, strict=True))
    assert len(calls) == 14  # ten residual blocks, one of them up and one down; four of attention


def test_dropout_is_of_training_alone():
    unet, whole = small(dropout=0.5), small()
    assert torch.equal(unet(*images()), whole(*images()))
    assert not torch.equal(unet.train()(*images()), whole(*images()))


def test_half_precision():
    unet, exact = small(), small()(*images())
    with torch.autocast("cpu", torch.bfloat16):
        cast = unet(*images())
    x, low_res, timesteps = images()
    found = unet.to(torch.bfloat16)(x.bfloat16(), low_res.bfloat16(), timesteps)
    for out in (cast, found):
        assert out.dtype == torch.bfloat16
        assert relative_error(out, exact) < 0.03


def test_layers_with_hooks_are_called():
    """Only the layer's own forward knows what a hook makes of it; FiLM and the residual are ours."""
    unet, seen = small(), []
    expected = unet(*images())
    for layer in (unet.encoder[0].block.conv2, unet.decoder[0].block.norm2, unet.first):
        layer.register_forward_hook(lambda *args: seen.append(type(args[0]).__name__))
    assert relative_error(unet(*images()), expected) < 1e-5
    assert seen == ["Conv2d", "Conv2d", "GroupNorm"]


# The pipeline


def pipeline(scheduler="ddim", **options):
    made = SuperResolutionPipeline(small(**options), make_scheduler(scheduler))
    made.set_progress_bar_config(disable=True)
    return made


def clips(batch=2, frames=3, size=(4, 4)):
    return torch.rand(batch, frames, 3, *size, generator=torch.Generator().manual_seed(2)) * 2 - 1


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_published_sampling():
    """DDIM of 25 steps, with one noise image for both frames, at the steps that there are values of."""
    metadata, tensors = reference("sampling")
    sampler = SuperResolutionPipeline(network_of(metadata), make_scheduler("ddim"))
    sampler.set_progress_bar_config(disable=True)
    states = []

    def keep(_, step, t, tensors):
        states.append((int(t), tensors["frames"]))

    video = sampler(tensors["low_res"][None], noise=tensors["noise"], callback_on_step_end=keep).video
    assert [t for t, _ in states] == list(range(960, -1, -40))
    for step in (1, 2, 24):
        assert relative_error(states[step - 1][1], tensors[f"step{step}.sample"]) < 1e-4, step
    assert video.shape == (1, 2, 3, 64, 64)
    assert relative_error(video[0], tensors["sample"]) < 1e-4
    in_bytes = ((video[0] + 1) * 127.5).clamp(0, 255).to(torch.uint8)
    assert (in_bytes.int() - tensors["sample_uint8"].int()).abs().max() <= 1


def test_published_learned_variance():
    """diffusers' DDPM with the variance that the network has learned is the published respaced process."""
    metadata, tensors = reference("sampling")
    unet = network_of(metadata)
    scheduler = prepared(make_scheduler("ddpm", has_learned_variance=True), 25)
    scheduler.set_timesteps(timesteps=list(range(960, -1, -40)))
    assert scheduler.config["variance_type"] == "learned_range"
    noise, low_res = tensors["noise"], tensors["low_res"][:1]
    for index in (24, 12, 0):
        t = 40 * index
        with torch.no_grad():
            out = unet(noise, low_res, t)
        share = out[:, 3:]
        if index:  # no noise is added at the last step, of which diffusers has no variance
            found = scheduler._get_variance(t, predicted_variance=share).float()
            assert relative_error(found, tensors[f"p.{index}.log_variance"]) < 1e-4
        generator = torch.Generator().manual_seed(0)
        stepped = scheduler.step(out, t, noise, generator=generator).prev_sample
        if index:
            drawn = torch.randn(noise.shape, generator=torch.Generator().manual_seed(0))
            stepped = stepped - (0.5 * found).exp() * drawn
        assert relative_error(stepped, tensors[f"p.{index}.mean"]) < 1e-4, index


def test_the_learned_variance_is_used_where_a_scheduler_asks_for_it():
    low_res, unet = clips(batch=1), small()
    other = fill(SuperResolutionUNet(**SMALL)).eval()
    with torch.no_grad():
        other.head.conv.bias[3:] += 5
    found = {}
    for name, scheduler in {
        "ddim": make_scheduler("ddim"),
        "fixed": make_scheduler("ddpm"),
        "learned": make_scheduler("ddpm", has_learned_variance=True),
    }.items():
        samplers = [SuperResolutionPipeline(network, scheduler) for network in (unet, other)]
        for sampler in samplers:
            sampler.set_progress_bar_config(disable=True)
        found[name] = [sampler(low_res, 4, generator=seeded(3)).video for sampler in samplers]
    assert torch.equal(*found["ddim"])
    assert torch.equal(*found["fixed"])
    assert not torch.equal(*found["learned"])


SCHEDULERS = {
    "ddim": None,
    "ddpm": None,
    "dpmsolver++": None,
    "unipc": None,
    "Euler, ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(),
    "PNDM": lambda: diffusers.PNDMScheduler(),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_frame_is_the_same_in_any_batch(name):
    scheduler = make_scheduler(name) if SCHEDULERS[name] is None else SCHEDULERS[name]()
    sampler, low_res = pipeline(), clips()
    together = sampler(low_res, 4, scheduler=scheduler, generator=seeded(1, 2)).video
    assert together.shape == (2, 3, 3, 16, 16)
    assert together.abs().max() <= 1
    alone = sampler(low_res[1:], 4, scheduler=scheduler, generator=seeded(2), frames_per_call=2).video
    assert relative_error(alone[0], together[1]) < 1e-4
    again = sampler(low_res, 4, scheduler=scheduler, generator=seeded(1, 2)).video
    assert torch.equal(again, together)


@pytest.mark.parametrize("name", ("ddim", "ddpm"))
def test_noise_is_shared_by_the_frames_or_fresh(name):
    """Equal frames stay equal with shared noise, also where a scheduler draws more of it at each step."""
    sampler, still = pipeline(name), clips(frames=1).expand(-1, 3, -1, -1, -1)
    shared = sampler(still, 3, generator=seeded(1, 2)).video
    assert relative_error(shared[:, 1], shared[:, 0]) < 1e-5
    fresh = sampler(still, 3, generator=seeded(1, 2), share_noise=False).video
    assert relative_error(fresh[:, 1], fresh[:, 0]) > 0.1
    assert relative_error(shared[0], shared[1]) > 0.1


def test_given_noise():
    sampler, low_res = pipeline(), clips()
    generator = torch.Generator().manual_seed(3)
    own = torch.randn(2, 3, 3, 16, 16, generator=generator)
    shared = own[:1, 0]
    of_all = shared.expand(2, 3, -1, -1, -1)
    assert torch.equal(sampler(low_res, 3, noise=shared).video, sampler(low_res, 3, noise=of_all).video)
    each = sampler(low_res, 3, noise=own).video
    one = sampler(low_res[1:, 2:], 3, noise=own[1:, 2:]).video
    assert relative_error(one[0, 0], each[1, 2]) < 1e-5


def test_progress_callback_and_outputs():
    sampler, low_res, seen = pipeline(), clips(), []

    def zeros(_, step, t, tensors):
        seen.append((step, int(t), list(tensors), tensors["frames"].shape))
        return {"frames": torch.zeros_like(tensors["frames"])} if t == 0 else None

    (video,) = sampler(low_res, 2, frames_per_call=4, callback_on_step_end=zeros, output_type="np", return_dict=False)
    assert video.shape == (2, 3, 3, 16, 16)
    assert not video.any()
    sizes = [(4, 3, 16, 16)] * 2 + [(2, 3, 16, 16)] * 2
    assert seen == [(i, t, ["frames"], size) for i, (t, size) in enumerate(zip((500, 0) * 2, sizes, strict=True))]
    assert not sampler.unet.training
    assert all(x.requires_grad for x in sampler.unet.parameters())


def test_frames_that_fit(monkeypatch):
    """As many as the memory holds, at least one, and more of smaller ones."""
    sampler, calls = pipeline(), []
    forward = sampler.unet.forward
    monkeypatch.setattr(sampler.unet, "forward", lambda *args: (calls.append(len(args[0])), forward(*args))[1])
    per_frame = sampler.unet.working_bytes(16, 16)
    assert sampler.unet.working_bytes(32, 16) == 2 * per_frame
    for frames, expected in ((4, [4, 2]), (0, [1] * 6), (50, [6])):
        calls.clear()
        monkeypatch.setattr("mmdiffusion.diffusion.superres._CPU_BYTES", frames * per_frame)
        sampler(clips(), 1)
        assert calls == expected


def test_saved_and_loaded(tmp_path):
    made = pipeline()
    made.save_pretrained(tmp_path)
    loaded = SuperResolutionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    found, expected = (x(clips(), 2, generator=seeded(1, 2)).video for x in (loaded, made))
    assert torch.equal(found, expected)


def test_half_precision_sampling():
    low_res, exact, half = clips(), pipeline(), pipeline()
    half.unet.to(torch.bfloat16)
    found, expected = (x(low_res, 3, generator=seeded(1, 2)).video for x in (half, exact))
    assert found.dtype == torch.float32
    assert relative_error(found, expected) < 0.1


def test_calls_that_are_refused():
    sampler, low_res = pipeline(), clips()
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    learned = diffusers.DDPMScheduler(variance_type="learned")
    refused = {
        r"low_res has shape \[2, 3, 1, 4, 4\]; expected \[B, F, 3, h, w\]": {"low_res": low_res[:, :, :1]},
        r"low_res has values that are not finite": {"low_res": low_res / 0},
        r"noise has shape \[1, 3, 16\]; expected \[1, 3, 16, 16\] or \[2, 3, 3, 16, 16\]": {
            "noise": torch.zeros(1, 3, 16)
        },
        "num_inference_steps is 0": {"num_inference_steps": 0},
        "num_inference_steps is 1001; expected at most the 1000": {"num_inference_steps": 1001},
        "frames_per_call is 0; expected an int of at least 1": {"frames_per_call": 0},
        "output_type is 'pil'": {"output_type": "pil"},
        "scheduler is 'fast'": {"scheduler": "fast"},
        "of another process than the model was trained with": {"scheduler": flow},
        "variance_type 'learned', the variance itself; expected 'learned_range'": {"scheduler": learned},
        "generator has 1 elements; expected batch_size = 2": {"generator": seeded(1)},
        "callback_on_step_end_tensor_inputs is 'video'; expected 'frames'": {
            "callback_on_step_end_tensor_inputs": ("video",)
        },
    }
    for message, options in refused.items():
        with pytest.raises(ValueError, match=message):
            sampler(**{"low_res": low_res, **options})
    with pytest.raises(TypeError, match=r"low_res is torch.uint8; expected a tensor of floating point"):
        sampler(low_res.byte())
    with pytest.raises(ValueError, match="expected sizes that are multiples of 8 when they are 4 times as large"):
        pipeline(image_size=32, channel_mult=(1, 2, 1, 1))(clips(size=(4, 3)))
    with pytest.raises(ValueError, match="variance_type 'learned_range' and unet out_channels 3; expected 6"):
        pipeline(out_channels=3)(low_res, scheduler=make_scheduler("ddpm", has_learned_variance=True))


# The command


@pytest.fixture
def here(monkeypatch, tmp_path):
    """In a folder with a small network, that enlarges 4 x 4 to 16 x 16, and a film of five frames with sound."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mmattn, "keep_freed_memory", lambda: True)
    small().save_pretrained("sr")
    torch.manual_seed(0)
    video = (torch.rand(5, 3, 4, 4) * 2 - 1).repeat_interleave(4, 2).repeat_interleave(4, 3)
    media.write_video("clip.mp4", video, 0.3 * torch.randn(1, 8000), fps=10)


def enlarge(*options, out="large", film="clip.mp4", steps=2):
    films = [film] if isinstance(film, str) else film
    cli.main(["superres", *films, "--model", "sr", "--out", out, "--steps", str(steps), *options])


def pictures(path):
    return media.read_clip(path, size=None, need=["video"]).video


def packets(path):
    """The bytes and the times of a film's sound as it is coded."""
    with av.open(path) as container:
        stream = container.streams.audio[0]
        found = [(bytes(x), x.pts * x.time_base) for x in container.demux(stream) if x.dts is not None]
        return stream.codec_context.name, found


def test_what_superres_writes(here, capsys):
    enlarge()
    assert sorted(x.name for x in pathlib.Path("large").iterdir()) == ["clip.json", "clip.mp4"]
    assert pictures("large/clip.mp4").shape == (5, 3, 16, 16)
    with av.open("large/clip.mp4") as container:
        assert container.streams.video[0].average_rate == 10
        assert container.streams.video[0].codec_context.name == "h264"
    assert packets("large/clip.mp4") == packets("clip.mp4")
    heard, expected = (media.read_clip(x, need=["audio"]).audio for x in ("large/clip.mp4", "clip.mp4"))
    assert torch.equal(heard, expected)
    record = json.loads(pathlib.Path("large/clip.json").read_text())
    assert record["frames"] == 5
    assert record["settings"]["steps"] == 2
    assert record["settings"]["config"]["model_channels"] == 32
    assert record["seconds_per_frame"] > 0
    captured = capsys.readouterr()
    assert captured.out == "large: 1 films of 16 pixels, 5 frames made now\n"
    assert "clip: 100%" in captured.err
    enlarge()
    assert capsys.readouterr().out == "large: 1 films of 16 pixels, 0 frames made now\n"


@pytest.mark.parametrize("noise", ("shared", "fresh"))
def test_superres_goes_on_where_it_was(here, monkeypatch, capsys, noise):
    """Frames that are there are not made again, and what comes out is what an uninterrupted run makes."""
    options = "--noise", noise, "--frames-per-call", "2", "--scheduler", "ddpm"
    enlarge(*options, out="whole")
    write, written = media.write_image, []

    def interrupted(path, picture):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path)
        write(path, picture)

    with monkeypatch.context() as patch:
        patch.setattr(media, "write_image", interrupted)
        with pytest.raises(SystemExit) as stopped:
            enlarge(*options)
    assert stopped.value.code == 130
    assert sorted(x.name for x in pathlib.Path("large/clip.frames").iterdir()) == [f"{i:06d}.png" for i in range(3)]
    capsys.readouterr()
    enlarge(*options)
    assert "2 frames made now" in capsys.readouterr().out
    assert sorted(x.name for x in pathlib.Path("large").iterdir()) == ["clip.json", "clip.mp4"]
    assert (pictures("large/clip.mp4") - pictures("whole/clip.mp4")).abs().max() <= 2 / 127.5


def test_what_other_processes_did_meanwhile(here, monkeypatch, capsys):
    """One that makes the same film, one that emptied files, and one that left a frame of another network."""
    frames = pathlib.Path("large/clip.frames")
    with _files.alone_in(frames, "made"), pytest.raises(SystemExit):
        enlarge()
    assert "clip.frames is being made by another process; expected to be alone" in capsys.readouterr().err
    enlarge()
    pathlib.Path("large/clip.mp4").write_bytes(b"")
    frames.mkdir()
    (frames / "000002.png").write_bytes(b"")
    (frames / f".{16 * 'a'}.part").write_bytes(b"of a killed process")
    enlarge()
    assert "frames made now" in capsys.readouterr().out and len(pictures("large/clip.mp4")) == 5
    assert sorted(x.name for x in pathlib.Path("large").iterdir()) == ["clip.json", "clip.mp4"]
    pathlib.Path("large/clip.mp4").unlink()
    frames.mkdir()
    media.write_image(frames / "000001.png", torch.zeros(3, 8, 8))
    with pytest.raises(SystemExit):
        enlarge()
    assert "000001.png is of 8 x 8 pixels; expected 16 x 16, or no file" in capsys.readouterr().err


def test_sounds_that_are_copied(here):
    """Of other codecs, of a film that begins late, and none."""
    video = pictures("clip.mp4")
    media.write_video("silent.mp4", video)
    enlarge(film="silent.mp4")
    with av.open("large/silent.mp4") as container:
        assert not container.streams.audio
    for name, codec in (("mp3.avi", "mp3"), ("opus.mkv", "libopus"), ("ac3.mkv", "ac3")):
        film_with_sound(name, codec)
        enlarge(film=name)
        (_, copied), (_, own) = packets(f"large/{name[:-4]}.mp4"), packets(name)
        assert [x for x, _ in copied] == [x for x, _ in own], name
        assert max(abs(a - b) for (_, a), (_, b) in zip(copied, own, strict=True)) < 0.002, name


def film_with_sound(name, codec):
    """Half a second of black with noise."""
    with av.open(name, "w") as container:
        frames = container.add_stream("libx264", rate=10, options={"bf": "0"})
        frames.height, frames.width, frames.pix_fmt = 16, 16, "yuv420p"
        sound = container.add_stream(codec, rate=48000, layout="mono")
        for _ in range(5):
            black = av.VideoFrame.from_ndarray(torch.zeros(16, 16, 3, dtype=torch.uint8).numpy(), format="rgb24")
            container.mux(frames.encode(black))
        container.mux(frames.encode(None))
        resampler = av.AudioResampler(sound.codec_context.format, "mono", 48000, sound.codec_context.frame_size)
        tone = av.AudioFrame.from_ndarray((9000 * torch.randn(1, 24000)).short().numpy(), "s16", "mono")
        tone.sample_rate = 48000
        for piece in (*resampler.resample(tone), *resampler.resample(None)):
            container.mux(sound.encode(piece))
        container.mux(sound.encode(None))


def refusal(capsys, *options, **names):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        enlarge(*options, **names)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_superres_refuses(here, capsys):
    enlarge()
    others = refusal(capsys, steps=3)
    assert "large/clip.json is of other settings: steps 2 instead of 3; --force makes it anew" in others
    kept = pathlib.Path("large/clip.mp4").read_bytes()
    enlarge("--force", steps=3)
    assert pathlib.Path("large/clip.mp4").read_bytes() != kept
    assert "out is ., where clip.mp4 would be overwritten" in refusal(capsys, out=".")
    pathlib.Path("large/clip.json").unlink()
    assert "large/clip.mp4 exists, without a record beside it" in refusal(capsys)
    pathlib.Path("large/clip.json").write_text("[]")
    assert "large/clip.json is no record of a film" in refusal(capsys)
    assert "no media file" in refusal(capsys, film="sr/config.json")
    film_with_sound("odd.mkv", "wavpack")
    assert "odd.mkv has sound of wavpack, which MP4 does not hold" in refusal(capsys, film="odd.mkv", out="other")
    media.write_audio("clip.wav", torch.zeros(1, 100))
    assert "clip.wav has no video stream" in refusal(capsys, film="clip.wav", out="other")
    twice = "films has clip more than once; expected names that differ"
    assert twice in refusal(capsys, "--force", out="other", film=["clip.mp4", "sub/clip.mp4"])
    assert not pathlib.Path("other").exists()


def test_superres_of_a_published_checkpoint(here):
    torch.save(small().to_published(), "sr.pt")
    pathlib.Path("sr.json").write_text(json.dumps({"image_size": 16, "num_heads": 2}))
    enlarge(out="ours")
    cli.main(["superres", "clip.mp4", "--model", "sr.pt", "--config", "sr.json", "--steps", "2", "--out", "theirs"])
    assert torch.equal(pictures("theirs/clip.mp4"), pictures("ours/clip.mp4"))


def test_random_info_and_convert(here, capsys):
    """Of a super-resolution network, which the commands know by its keys or by its directory."""
    pathlib.Path("small.json").write_text(json.dumps(SMALL))
    cli.main(["random", "sr.pt", "--superres", "--config", "small.json"])
    cli.main(["convert", "sr.pt", "made", "--config", "small.json"])
    loaded = SuperResolutionPipeline.from_pretrained("made", low_cpu_mem_usage=False)
    assert loaded.scheduler.config["prediction_type"] == "epsilon"
    cli.main(["convert", "made", "back.safetensors"])
    found, expected = checkpoints.read(pathlib.Path("back.safetensors")), checkpoints.read(pathlib.Path("sr.pt"))
    assert found.keys() == expected.keys() and all(torch.equal(x, expected[name]) for name, x in found.items())
    capsys.readouterr()
    total = sum(x.numel() for x in expected.values()) / 1e6
    for source in ("sr.pt", "made"):
        cli.main(["info", source])
        out = capsys.readouterr().out
        assert "attention_resolutions" in out and f"total{total:32.2f} M parameters" in out
    for options, message in {
        "random new.pt --superres --preset tiny": "preset is 'tiny' and superres is given; expected one of them",
        "info sr.pt --preset tiny": "preset is 'tiny'; expected none, as sr.pt is a super-resolution network",
        "info made --config small.json": "made has its own configuration; expected no --config",
    }.items():
        with pytest.raises(SystemExit):
            cli.main(options.split())
        assert message in capsys.readouterr().err


def test_psnr(here, capsys):
    """The table is that of its definition, the same in batches of any size; what cannot be measured is refused."""
    command = "psnr synthetic --model sr --frames 3 --steps 2 --device cpu"
    cli.main([*command.split(), "--out", "found"])
    said, bars = capsys.readouterr()
    assert pathlib.Path("found.md").read_text() == said
    assert re.search(r"resized: .* 6/6 .*step", bars)  # of three frames, two steps each
    found = json.loads(pathlib.Path("found.json").read_text())
    resized, degraded = found["rows"]
    assert found["steps"] == 2 and degraded["small_images"] == "degraded as in training"
    data = frames_of("synthetic", small().config, seed=1000)
    expected = []
    for i in range(3):
        real = data[i].video.double()
        low_res = functional.interpolate(real, (4, 4), mode="bicubic").round().clamp(0, 255)
        error = functional.interpolate(low_res, (16, 16), mode="bicubic").clamp(0, 255) - real
        expected.append(10 * math.log10(255**2 / float(error.square().mean())))
    assert resized["bicubic"] == pytest.approx(sum(expected) / 3, abs=2e-3)
    assert resized["bicubic_error"] == pytest.approx(torch.tensor(expected).std().item() / 3**0.5, abs=2e-3)
    assert degraded["bicubic"] < resized["bicubic"] and resized["better"] == 0  # random weights
    picture = media.read_clip("found.png", size=None, need=["video"]).video[0]
    assert picture.shape[0] == 3 and picture.shape[1] * 4 == picture.shape[2] * 6
    cli.main([*command.split(), "--out", "again", "--batch-size", "1"])
    capsys.readouterr()
    cli.main([*command.replace("--frames 3", "--frames 1").split(), "--out", "one"])
    assert capsys.readouterr().out.count(" ± - ") == 4
    assert (
        json.loads(pathlib.Path("one.json").read_text(), parse_constant=pytest.fail)["rows"][0]["bicubic_error"] is None
    )
    for a, b in zip(found["rows"], json.loads(pathlib.Path("again.json").read_text())["rows"], strict=True):
        assert a["network"] == pytest.approx(b["network"], abs=2e-3)
    capsys.readouterr()
    for options, message in {
        "--out found": "found.md exists; --force overwrites it",
        "--frames 100001": "frames is 100001; expected 1 to 100000",
        "--steps 1001": "num_inference_steps is 1001; expected at most the 1000 of training",
    }.items():
        with pytest.raises(SystemExit):
            cli.main([*command.split(), *options.split()])
        assert message in capsys.readouterr().err


def test_of_a_network_that_predicts_v(tmp_path):
    """It picks the scheduler of a name, refuses others, is saved with them, and cannot be written as published."""
    unet = small(prediction_type="v_prediction")
    pipeline = SuperResolutionPipeline(unet, make_scheduler("ddim", prediction_type="v_prediction"))
    low_res = torch.zeros(1, 1, 3, 4, 4)
    assert pipeline(low_res, 2, scheduler="dpmsolver++").video.isfinite().all()
    with pytest.raises(ValueError, match="with prediction_type 'epsilon'; expected 'v_prediction', what the model"):
        pipeline(low_res, 2, scheduler=make_scheduler("ddim"))
    pipeline.save_pretrained(tmp_path)
    loaded = SuperResolutionPipeline.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert loaded.unet.config["prediction_type"] == "v_prediction"
    again = loaded(low_res, 2, generator=torch.Generator().manual_seed(0)).video
    assert torch.equal(again, pipeline(low_res, 2, generator=torch.Generator().manual_seed(0)).video)
    with pytest.raises(ValueError, match="prediction_type is 'v_prediction'; expected 'epsilon', as published"):
        unet.to_published()
    with pytest.raises(ValueError, match="prediction_type is 'sample'; expected one of 'epsilon', 'v_prediction'"):
        small(prediction_type="sample")


def test_sample_with_superres(here):
    """The clips are larger, their sound is that of the same clips without, and other settings are other clips."""
    fill(CoupledUNet(**{**SMALL_UNET, "video_size": (4, 3, 8, 8), "audio_size": (1, 6400)})).save_pretrained("unet")
    arguments = ["sample", "--model", "unet", "--num", "2", "--steps", "2"]
    cli.main([*arguments, "--out", "plain", "--formats", "mp4", "wav"])
    larger = ["--superres", "sr", "--superres-steps", "2", "--formats", "mp4", "wav", "--out", "large"]
    cli.main([*arguments, *larger])
    for name in ("clip-0000", "clip-0001"):
        assert pictures(f"plain/{name}.mp4").shape == (4, 3, 8, 8)
        assert pictures(f"large/{name}.mp4").shape == (4, 3, 32, 32)
        assert packets(f"large/{name}.mp4") == packets(f"plain/{name}.mp4")
        assert pathlib.Path("large", f"{name}.wav").read_bytes() == pathlib.Path("plain", f"{name}.wav").read_bytes()
    settings = json.loads(pathlib.Path("large/samples.json").read_text())["settings"]
    assert settings["superres_steps"] == 2
    before = pathlib.Path("large/clip-0001.mp4").read_bytes()
    pathlib.Path("large/clip-0001.mp4").unlink()
    cli.main([*arguments, *larger])
    assert pathlib.Path("large/clip-0001.mp4").read_bytes() == before
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--out", "large"])


# Degradations


def picture(size=64):
    """Smooth, so that noise and compression show."""
    rows, columns = torch.meshgrid(torch.linspace(0, 200, size), torch.linspace(0, 55, size), indexing="ij")
    return torch.stack([rows + columns, 255 - rows, columns * 2]).byte()


def test_letterboxed():
    """All of it, black bars at both ends, and the pixels of an image of that size as they are."""
    image = picture(32)
    assert torch.equal(degrade.letterboxed(image, 32), image)
    wide = torch.full((3, 16, 32), 200, dtype=torch.uint8)
    boxed = degrade.letterboxed(wide, 64)
    assert boxed.shape == (3, 64, 64)
    assert not boxed[:, :16].any() and not boxed[:, 48:].any()
    assert (boxed[:, 16:48] == 200).all()
    high = degrade.letterboxed(wide.transpose(1, 2), 7)
    assert not high[:, :, :2].any() and (high[:, :, 2:5] == 200).all() and not high[:, :, 5:].any()


def test_degraded(monkeypatch):
    """Half are noisy, half compressed, each in the range that is published, and a seed is a result."""
    image = picture()
    clean = functional.interpolate(image[None].float(), (16, 16), mode="bicubic")[0].round().clamp(0, 255).byte()
    found = [degrade.degraded(image, generator=torch.Generator().manual_seed(seed)) for seed in range(200)]
    assert all(x.shape == (3, 16, 16) and x.dtype == torch.uint8 for x in found)
    assert torch.equal(found[7], degrade.degraded(image, generator=torch.Generator().manual_seed(7)))
    untouched = sum(torch.equal(x, clean) for x in found)
    assert 30 <= untouched <= 70  # a quarter of 200
    monkeypatch.setattr(degrade, "_compressed", lambda x, quality: x)
    found = [degrade.degraded(image, generator=torch.Generator().manual_seed(seed)) for seed in range(200)]
    deviations = torch.stack([(x.float() - clean.float()).std() for x in found])
    assert 75 <= int((deviations > 0).sum()) <= 125
    assert 18 < deviations.max() < 22
    assert 35 <= int((deviations > 10).sum()) <= 65


def test_degradations_one_by_one(monkeypatch):
    image = picture()
    monkeypatch.setattr(degrade, "_PROBABILITY", 0.0)
    clean = degrade.degraded(image, scale=2, generator=torch.Generator())
    assert clean.shape == (3, 32, 32)
    best, worst = (degrade._compressed(clean, quality) for quality in (80, 20))
    assert 0 < (best.float() - clean).std() < (worst.float() - clean).std() < 12
    seen = []
    monkeypatch.setattr(degrade, "_compressed", lambda x, quality: (seen.append(quality), x)[1])
    monkeypatch.setattr(degrade, "_PROBABILITY", 1.0)
    for seed in range(400):
        degrade.degraded(image, generator=torch.Generator().manual_seed(seed))
    assert min(seen) == 20 and max(seen) == 80
    with pytest.raises(ValueError, match="height and width 64, 64; expected multiples of scale = 3"):
        degrade.degraded(image, scale=3, generator=torch.Generator())
    with pytest.raises(ValueError, match=r"image has shape \[3, 64, 64\] and dtype torch.float32"):
        degrade.degraded(image.float(), generator=torch.Generator())


# Training


def test_published_loss_terms():
    """MSE and the variational bound of each sample, two gradients, and the norm of all."""
    metadata, tensors = reference("sampling")
    unet = network_of(metadata)
    given = {name.removeprefix("train."): x for name, x in tensors.items() if name.startswith("train.")}
    losses = denoising_losses(
        FrameNetwork(unet),
        GaussianDiffusion(),
        {"video": given["x0"][:, None]},
        {"video": given["noise"][:, None]},
        given["t"],
        low_res=given["low_res"],
    )
    assert given["t"].tolist() == [0, 1, 250, 999]
    for i in range(4):
        assert relative_error(losses["video_vb"][i], given["vb"][i]) < 1e-5, i
        mse = losses["video"][i] - losses["video_vb"][i]
        assert relative_error(mse, given["mse"][i]) < 1e-5, i
        assert relative_error(losses["video"][i], given["loss"][i]) < 1e-5, i
    losses["video"].mean().backward()
    named = unet.to_published()
    gradients = {x.data_ptr(): x.grad for x in unet.parameters()}
    for key in ("input_blocks.0.0.weight", "out.2.weight"):
        assert relative_error(gradients[named[key].data_ptr()], given[f"grad.{key}"]) < 3e-5, key
    norm = torch.stack([x.grad.double().norm() for x in unet.parameters()]).norm()
    assert relative_error(norm, given["grad_norm"]) < 3e-5


def frames(count=4):
    return Frames(SyntheticClips(ClipFormat((4, 3, 24, 32), (1, 6400)), length=count), 16)


def test_frames_and_their_small_images():
    data = frames()
    item = data[1]
    assert len(data) == 4
    assert item.video.shape == (1, 3, 16, 16)
    assert not item.video[:, :, :2].any() and item.video[:, :, 2:14].any()
    assert torch.equal(item.video, data[1].video)
    batch = joined([data[i] for i in range(3)])
    small = small_images(batch, seeded(1, 2, 3))["low_res"]
    assert small.shape == (3, 3, 4, 4)
    assert small.abs().max() <= 1
    assert torch.equal(small[1:2], small_images(joined([data[1]]), seeded(2))["low_res"])


def test_training_in_the_loop():
    """The loss falls, a state goes on to the bit, and micro-batches change nothing but rounding."""

    def run(steps, state=None, **options):
        recipe = Recipe(**{"batch_size": 4, "micro_batch": None, "lr": 2e-3, "ema_rates": (0.9,), **options})
        torch.manual_seed(0)
        network = FrameNetwork(SuperResolutionUNet(**SMALL)) if state is None else state.unet
        made = train(network, frames(), recipe, given=small_images, state=state)
        return [next(made) for _ in range(steps)][-1]

    begun = run(2)
    losses = begun.meter.means()
    assert losses["video"] > losses["video_vb"] > 0
    begun.meter.clear()
    later = run(30, state=begun)
    assert later.step == 32
    assert later.meter.means()["video"] < 0.8 * losses["video"]
    again = run(32)
    assert all(torch.equal(a, b) for a, b in zip(again.unet.parameters(), later.unet.parameters(), strict=True))
    whole, halves = run(1), run(1, micro_batch=2)
    for (name, a), b in zip(whole.unet.named_parameters(), halves.unet.parameters(), strict=True):
        moved = whole.optimizer.state[a]["exp_avg"]
        assert relative_error(halves.optimizer.state[b]["exp_avg"], moved) < 1e-3 or moved.norm() < 1e-6, name


def test_train_command(tmp_path, monkeypatch, capsys):
    """Frames of the world; the run goes on where it was, previews are drawn, and what comes out makes films larger."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mmattn, "keep_freed_memory", lambda: True)
    pathlib.Path("small.json").write_text(json.dumps({**SMALL, "scale": 2}))
    command = "train synthetic --superres --batch-size 2 --device cpu --config small.json --preview-clips 2 --out run"
    cli.main([*command.split(), "--steps", "1", "--preview-every", "1"])
    cli.main([*command.split(), "--steps", "2"])
    assert "goes on from run/states/step-00000001.safetensors" in capsys.readouterr().err
    assert media.read_clip("run/previews/step-00000001.png", size=None, need=["video"]).video.shape == (1, 3, 256, 512)
    loaded = SuperResolutionPipeline.from_pretrained("run/model", low_cpu_mem_usage=False)
    assert loaded.unet.config["scale"] == 2 and loaded.unet.config["image_size"] == SMALL["image_size"]
    begun = command.replace("--config small.json", "--init run/model").replace("--out run", "--out begun")
    cli.main([*begun.split(), "--steps", "1"])
    for options, message in {
        "--preset tiny": "preset is 'tiny'; expected one of 'landscape', 'small' with superres",
        "--resume run": "resume is run and superres is given; expected init",
    }.items():
        with pytest.raises(SystemExit):
            cli.main(["train", "synthetic", "--superres", "--out", "other", *options.split()])
        assert message in capsys.readouterr().err
