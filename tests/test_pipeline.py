# SPDX-License-Identifier: MIT
"""Sampling: against reference values of the published diffusion, on toys with known answers, and as a pipeline."""

import itertools
import math
import pathlib

import numpy as np
import pytest
import torch
from helpers import SMALL_UNET, fill

diffusers = pytest.importorskip("diffusers")
safetensors = pytest.importorskip("safetensors.torch")

from diffusers.schedulers import scheduling_ddpm  # noqa: E402

from mmattn.testing import relative_error  # noqa: E402
from mmdiffusion import CoupledUNet, MMDiffusionPipeline  # noqa: E402
from mmdiffusion.diffusion import pipelines  # noqa: E402
from mmdiffusion.diffusion.sampling import sample  # noqa: E402
from mmdiffusion.diffusion.schedulers import SCHEDULERS, for_streams, make_scheduler  # noqa: E402

REFERENCE = safetensors.load_file(pathlib.Path(__file__).parent / "data" / "diffusion.safetensors")
STREAMS = ("video", "audio")
X_T = [REFERENCE[f"x_T_{name}"] for name in STREAMS]
# diffusers' about the published kind of solver, and ours about fp16 on a CPU.
pytestmark = pytest.mark.filterwarnings("ignore:.*algorithm_type:FutureWarning", "ignore:mmattn computes")
OTHERS = {
    "Euler": diffusers.EulerDiscreteScheduler,
    "Euler, ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "Heun": diffusers.HeunDiscreteScheduler,
    "DEIS": diffusers.DEISMultistepScheduler,
    "PNDM": diffusers.PNDMScheduler,
    "DPM-Solver++, stochastic": lambda: diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
}


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


@pytest.fixture
def no_fresh_noise(monkeypatch):
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda shape, **_: torch.zeros(shape))


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def published_toy(video, audio, t):
    weight = 1 - float(t) / 2000
    mean_video, mean_audio = video.mean((1, 2, 3, 4)), audio.mean((1, 2))
    return (
        weight * (0.6 * video + 0.1 * mean_audio[:, None, None, None, None]),
        weight * (0.7 * audio + 0.1 * mean_video[:, None, None]),
    )


def published_alphas_cumprod():
    return np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))


# The schedulers against the published diffusion


@pytest.mark.parametrize("t", (0, 1, 250, 999))
def test_published_step(t, no_fresh_noise):
    schedulers = for_streams(make_scheduler("ddpm"), 1000)
    for name, scheduler, x, noise in zip(STREAMS, schedulers, X_T, published_toy(*X_T, t), strict=True):
        step = scheduler.step(noise, t, x)
        assert relative_error(step.prev_sample, REFERENCE[f"ddpm.t{t}.mean.{name}"]) < 1e-5
        assert relative_error(step.pred_original_sample, REFERENCE[f"ddpm.t{t}.pred_xstart.{name}"]) < 1e-5
        # The published code lists the posterior variance of t = 1 for t = 0, where neither adds noise.
        variance = scheduler._get_variance(t) if t else scheduler._get_variance(1, variance_type="fixed_small")
        expected = REFERENCE[f"ddpm.t{t}.log_variance.{name}"]
        assert relative_error(variance.log().float().expand_as(expected), expected) < 1e-5


def test_published_tables():
    for name in SCHEDULERS:
        scheduler, _ = for_streams(make_scheduler(name), 10)
        assert relative_error(scheduler.betas, REFERENCE["betas"]) < 1e-6
        noise = 1 - scheduler.alphas_cumprod, 1 - REFERENCE["alphas_cumprod"]
        assert ((noise[0] - noise[1]) / noise[1]).abs().max() < 1e-6


def test_published_timesteps():
    """ "25" and "ddim50" of the published code, as its own tables list them."""
    with safetensors.safe_open(pathlib.Path(__file__).parent / "data" / "diffusion.safetensors", "pt") as file:
        metadata = file.metadata()
    for name, steps, key in (("ddpm", 25, "timestep_map_25"), ("ddim", 50, "timestep_map_ddim50")):
        timesteps = for_streams(make_scheduler(name), steps)[0].timesteps.flip(0).tolist()
        assert str(timesteps) == metadata[key]


def test_published_ddim():
    found = sample(published_toy, X_T, for_streams(make_scheduler("ddim"), 50))
    for name, x in zip(STREAMS, found, strict=True):
        assert relative_error(x, REFERENCE[f"ddim50.{name}"]) < 1e-5


@pytest.mark.parametrize("guidance", ("replacement", "gradient"))
@pytest.mark.parametrize("direction", ("audio_to_video", "video_to_audio"))
def test_published_conditioning(direction, guidance, no_fresh_noise):
    given = direction.split("_")[0]
    condition = REFERENCE[f"condition_{given}"]
    sampled = sample(
        published_toy,
        X_T,
        for_streams(make_scheduler("ddpm"), 25),
        known=[condition if name == given else None for name in STREAMS],
        # The published scale is 3, of a mean over elements and batch.
        guidance_scale=3 / condition.numel() if guidance == "gradient" else 0.0,
    )
    for name, x in zip(STREAMS, sampled, strict=True):
        # Of the stream that is given the published code returns what its last step leaves.
        expected = condition if name == given else REFERENCE[f"{direction}.{guidance}.{name}"]
        assert relative_error(x, expected) < 1e-5


# Solvers on a Gaussian, whose noise and trajectory are known

MEAN, DEVIATION = 0.3, 0.2


def karras_sigma(t):
    sigmas = np.sqrt(1 / published_alphas_cumprod() - 1)
    return float(np.exp(np.interp(float(t), np.arange(1000), np.log(sigmas))))


def gaussian_level(t):
    """alpha, and the deviations of the noise and of x_t."""
    alpha = 1 / math.hypot(1, karras_sigma(t))
    sigma = karras_sigma(t) * alpha
    return alpha, sigma, math.hypot(alpha * DEVIATION, sigma)


def gaussian(video, audio, t):
    """The exact noise, -sigma grad log p(x_t)."""
    alpha, sigma, deviation = gaussian_level(t)
    return tuple(sigma * (x - alpha * MEAN) / deviation**2 for x in (video, audio))


def solver_error(name, steps):
    """Against the exact flow from where the steps begin to t = 0, and there the best guess of x0 where it is taken."""
    scheduler = make_scheduler(name)
    schedulers = for_streams(scheduler, steps)
    noise = torch.linspace(-2, 2, 9)
    found, _ = sample(gaussian, [noise.view(1, 1, 1, 3, 3), noise.view(1, 1, 9)], schedulers)
    alpha, _, deviation = gaussian_level(schedulers[0].timesteps[0])
    z = (noise.double() - alpha * MEAN) / deviation
    alpha, sigma, deviation = gaussian_level(0)
    expected = alpha * MEAN + deviation * z
    if name != "dpmsolver":
        expected = (expected - sigma * sigma * (expected - alpha * MEAN) / deviation**2) / alpha
    return relative_error(found.flatten(), expected)


ORDERS = {
    "ddim": (1, (20, 40, 80)),
    "dpmsolver++": (2, (20, 40, 80)),
    # Numbers of calls whose last group is of order 2, as of the published 20.
    "dpmsolver": (3, (47, 95, 191)),
    "unipc": (3, (20, 40, 80)),
}


@pytest.mark.parametrize("name", ORDERS)
def test_order(name):
    order, steps = ORDERS[name]
    errors = [solver_error(name, n) for n in steps]
    for (n, error), (more, smaller) in itertools.pairwise(zip(steps, errors, strict=True)):
        assert math.log(error / smaller, more / n) > order - 0.3


# Guidance by gradient


def test_guidance_in_closed_form():
    """The toy is linear, so the gradient of each step of DDIM is known; in fp64, without clipping."""
    scale, steps, alphas = 0.02, 10, torch.from_numpy(published_alphas_cumprod())
    noise = [x.double() for x in X_T]
    condition = REFERENCE["condition_audio"].double()
    schedulers = for_streams(diffusers.DDIMScheduler(clip_sample=False), steps)
    found, _ = sample(published_toy, noise, schedulers, known=(None, condition), guidance_scale=scale)

    def step(x, e, t, previous):
        x0 = (x - (1 - alphas[t]).sqrt() * e) / alphas[t].sqrt()
        return alphas[previous].sqrt() * x0 + (1 - alphas[previous]).sqrt() * e if previous >= 0 else x0

    def diffused(t):
        return alphas[t].sqrt() * condition + (1 - alphas[t]).sqrt() * noise[1]

    video = noise[0]
    for t in range(900, -1, -100):
        previous = t - 100
        audio = diffused(t)
        video_noise, audio_noise = published_toy(video, audio, t)
        next_video = step(video, video_noise, t, previous)
        if previous >= 0:
            by_noise = step(0, torch.tensor(1.0), t, previous)
            by_video = by_noise * (1 - t / 2000) * 0.1 / video[0].numel()
            difference = (step(audio, audio_noise, t, previous) - diffused(previous)).sum((1, 2))
            next_video -= scale * alphas[t].sqrt() * 2 * difference[:, None, None, None, None] * by_video
        video = next_video
    assert relative_error(found, video) < 1e-6


def test_guidance_does_not_depend_on_the_scaling_of_samples():
    """Euler's steps are DDIM's, of samples of another scale."""
    kinds = (
        diffusers.DDIMScheduler(clip_sample=False),
        diffusers.EulerDiscreteScheduler(beta_start=1e-4, beta_end=2e-2, timestep_spacing="leading"),
    )
    for scale in (0.0, 0.02):
        ddim, euler = (
            sample(
                published_toy,
                X_T,
                for_streams(kind, 10),
                known=(None, REFERENCE["condition_audio"]),
                guidance_scale=scale,
            )[0]
            for kind in kinds
        )
        assert relative_error(euler, ddim) < 1e-5


CORRELATION = 0.9


def correlated(video, audio, t):
    """The exact noise where each value of the video has one of the audio that it is correlated with."""
    alpha, sigma, deviation = gaussian_level(t)
    v, a = (x.flatten(1) - alpha * MEAN for x in (video, audio))
    own, shared = deviation**2, CORRELATION * (alpha * DEVIATION) ** 2
    noises = ((own * x - shared * y) * sigma / (own**2 - shared**2) for x, y in ((v, a), (a, v)))
    return tuple(e.view_as(x) for e, x in zip(noises, (video, audio), strict=True))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_guidance_draws_towards_what_is_given(name):
    """With every kind of solver, also with those that go on from an earlier sample."""
    condition = torch.full((64, 1, 64), MEAN + 1.5 * DEVIATION)
    distances = []
    for scale in (0.0, 0.5):
        noise = torch.randn(2, 64, 64, generator=seeded(1)[0])
        schedulers = for_streams(make_scheduler(name), 20)
        generators = seeded(*range(64))
        video, _ = sample(
            correlated,
            (noise[0].view(64, 1, 1, 8, 8), noise[1].view(64, 1, 64)),
            schedulers,
            known=(None, condition),
            generators=generators,
            guidance_scale=scale,
        )
        distances.append(abs(float(video.mean()) - (MEAN + CORRELATION * 1.5 * DEVIATION)))
    assert distances[1] < 0.9 * distances[0]


# The pipeline


def small(scheduler="dpmsolver++", **options):
    """A small pipeline whose every parameter matters."""
    unet = fill(CoupledUNet(**{**SMALL_UNET, **options}))
    pipeline = MMDiffusionPipeline(unet, make_scheduler(scheduler))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def clip_of(name, frames=4, batch=1):
    shape = (batch, frames, 3, 8, 8) if name == "video" else (batch, 1, 16 * frames)
    return torch.rand(shape, generator=torch.Generator().manual_seed(5)) * 2 - 1


@pytest.mark.parametrize("name", SCHEDULERS)
def test_same_seed_in_any_batch(name):
    pipeline = small(name)
    together = pipeline(3, 4, generator=seeded(1, 2, 3), return_dict=False)
    alone = pipeline(1, 4, generator=seeded(2), return_dict=False)
    again = pipeline(1, 4, generator=seeded(2), return_dict=False)
    other = pipeline(1, 4, generator=seeded(2), shift_seed=1, return_dict=False)
    for x, y, z, w in zip(together, alone, again, other, strict=True):
        assert relative_error(x[1:2], y) < 1e-4
        assert torch.equal(y, z) and not torch.equal(y, w)
        assert x.dtype == torch.float32 and x.abs().max() <= 1


def test_one_generator():
    pipeline = small()
    more = pipeline(3, 3, generator=torch.Generator().manual_seed(1))
    fewer = pipeline(2, 3, generator=torch.Generator().manual_seed(1))
    assert relative_error(more.video[:2], fewer.video) < 1e-4
    assert relative_error(more.video[0], more.video[1]) > 0.1
    own = pipeline(1, 3, generator=seeded(1)[0])
    assert torch.equal(own.video, pipeline(1, 3, generator=seeded(1)).video)  # one for one sample is that sample's
    torch.manual_seed(7)
    first = pipeline(1, 3)
    torch.manual_seed(7)
    assert torch.equal(first.audio, pipeline(1, 3).audio)


def test_steps_are_joint():
    """One call of the model a step, of both streams, at the timesteps of the scheduler."""
    pipeline = small("dpmsolver")
    seen = []
    pipeline.unet.register_forward_hook(lambda _, inputs, __: seen.append(inputs))
    pipeline(2, 20)
    assert len(seen) == 20
    timesteps = [float(t[0]) for _, _, t in seen]
    assert timesteps[0] == 999 and timesteps == sorted(timesteps, reverse=True) and timesteps[-1] > 0
    # Six groups of three calls and one of two are uniform in logSNR, and so are the calls of each.
    steps = -np.diff([math.log(karras_sigma(t)) for t in (*timesteps, 0)])
    assert np.allclose(steps[:18], steps[0], rtol=1e-3) and np.allclose(steps[18:], 1.5 * steps[0], rtol=1e-3)


def last_states(pipeline, *args, **options):
    """The output, and the states [video, audio] after the last step, which are not clipped."""
    states = []
    found = pipeline(*args, callback_on_step_end=lambda *call: states.append(call[-1]), **options)
    return found, states[-1]


@pytest.mark.parametrize("guidance", ("replacement", "gradient"))
@pytest.mark.parametrize("kind", [*SCHEDULERS, *OTHERS])
def test_conditioning(kind, guidance):
    pipeline = small()
    scheduler = kind if kind in SCHEDULERS else OTHERS[kind]()
    _, free = last_states(pipeline, 2, 5, scheduler=scheduler, generator=seeded(1, 2))
    for name, other in (STREAMS, STREAMS[::-1]):
        given, options = clip_of(name), {"scheduler": scheduler, "guidance": guidance}
        found, states = last_states(pipeline, 2, 5, generator=seeded(1, 2), **options, **{name: given})
        assert torch.equal(found[name], given.expand(2, *given.shape[1:]))
        assert relative_error(states[other], free[other]) > 1e-4


def test_gradient_leaves_the_model_as_it_was():
    pipeline = small(dropout=0.5)
    pipeline.unet.train()
    frozen = next(pipeline.unet.parameters()).requires_grad_(False)
    found = pipeline(1, 3, generator=seeded(1), guidance="gradient", audio=clip_of("audio"))
    again = pipeline(1, 3, generator=seeded(1), guidance="gradient", audio=clip_of("audio"))
    assert torch.equal(found.video, again.video) and not found.video.requires_grad
    assert pipeline.unet.training and not frozen.requires_grad
    assert all(x.requires_grad and x.grad is None for x in pipeline.unet.parameters() if x is not frozen)


def test_the_published_scale_is_3_over_what_a_window_has_given(monkeypatch):
    pipeline = small()
    assert pipeline.published_scales("audio") == {"audio": 3 / 64}
    options = {"generator": seeded(1), "guidance": "gradient", "audio": clip_of("audio")}
    found = pipeline(1, 3, **options)
    named = pipeline(1, 3, **{**options, "generator": seeded(1)}, guidance_scale=3 / 64)
    other = pipeline(1, 3, **{**options, "generator": seeded(1)}, guidance_scale=6 / 64)
    assert torch.equal(found.video, named.video) and not torch.equal(found.video, other.video)
    seen = []

    def noted(*args, known, guidance_scale, **options):
        seen.append([(x is not None and scale * x[0].numel()) for x, scale in zip(known, guidance_scale, strict=True)])
        return sample(*args, known=known, guidance_scale=guidance_scale, **options)

    monkeypatch.setattr(pipelines, "sample", noted)
    pipeline(2, 3, generator=seeded(1, 2), guidance="gradient", seconds=1.0)
    assert seen == [[False, False], *[[pytest.approx(3)] * 2] * 3]
    seen.clear()
    pipeline(1, 3, generator=seeded(1), guidance="gradient", seconds=1.0, audio=clip_of("audio", 10))
    assert seen == [[False, pytest.approx(3)], *[[pytest.approx(3)] * 2] * 3]


def late_shift(pipeline):
    """What guidance adds to the video in one of the last of 1000 steps, where the gradient is small."""
    source = seeded(1)[0]
    noise = [torch.randn(1, *pipeline.unet.config[f"{name}_size"], generator=source) for name in STREAMS]
    states = []
    for scale in (1e4, 0.0):
        schedulers = for_streams(diffusers.DDPMScheduler(clip_sample=False), 1000)  # what is clipped has no gradient
        for scheduler in schedulers:
            scheduler.timesteps = scheduler.timesteps[-3:-1]
        sample(
            pipeline._model(0, is_recorded=False),
            noise,
            schedulers,
            known=(None, clip_of("audio")),
            generators=seeded(2),
            guidance_scale=scale,
            on_step=lambda i, t, streams: states.append(streams[0]) or streams,
        )
    return states[0] - states[2]


@pytest.mark.parametrize("dtype, tolerance", ((torch.bfloat16, 0.1), (torch.float16, 0.015)))
def test_gradient_in_half_precision(dtype, tolerance):
    """The scale means the same in every dtype, and fp16 loses nothing of a small gradient."""
    pipeline = small()
    exact = late_shift(pipeline)
    torch.nn.Module.to(pipeline.unet, dtype)
    assert relative_error(late_shift(pipeline), exact) < tolerance


@pytest.mark.parametrize("overlap, windows", ((0.5, 4), (0.25, 3), (0.75, 7)))
def test_continuation(overlap, windows):
    pipeline = small()
    calls, seen = [], []
    hook = pipeline.unet.register_forward_hook(lambda _, inputs, __: calls.append(inputs))
    found = pipeline(
        2,
        3,
        generator=seeded(1, 2),
        seconds=1.0,
        overlap=overlap,
        callback_on_step_end=lambda _, step, t, streams: seen.append(step),
    )
    hook.remove()
    assert found.video.shape == (2, 10, 3, 8, 8) and found.audio.shape == (2, 1, 160)
    assert len(calls) == 3 * windows and seen == list(range(3 * windows))
    # Its first window is the clip there would be without the others, and only the overlap depends on it.
    alone = pipeline(2, 3, generator=seeded(1, 2))
    assert torch.equal(found.video[:, :4], alone.video) and torch.equal(found.audio[..., :64], alone.audio)
    short = pipeline(2, 3, generator=seeded(1, 2), seconds=0.3)
    assert torch.equal(short.video, alone.video[:, :3]) and torch.equal(short.audio, alone.audio[..., :48])


def test_continuation_is_conditioned_on_the_overlap():
    """The model sees, at each step of the second window, the first one's end under one noise."""
    pipeline = small("ddim")
    calls = []
    pipeline.unet.register_forward_hook(lambda _, inputs, __: calls.append(inputs))
    found = pipeline(1, 4, generator=seeded(1), seconds=0.6)
    alphas, noises = torch.from_numpy(published_alphas_cumprod()), []
    for video, audio, t in calls[4:]:
        signal, deviation = (float(x.sqrt()) for x in (alphas[int(t)], 1 - alphas[int(t)]))
        noises.append(
            (
                (video[:, :2] - signal * found.video[:, 2:4]) / deviation,
                (audio[..., :32] - signal * found.audio[..., 32:64]) / deviation,
            )
        )
    for video, audio in noises[:-1]:  # at t = 0 there is little to divide by
        assert relative_error(video, noises[0][0]) < 1e-5 and relative_error(audio, noises[0][1]) < 1e-5
    assert noises[0][0].std() > 0.9


@pytest.mark.parametrize("guidance", ("replacement", "gradient"))
@pytest.mark.parametrize("name", STREAMS)
def test_continuation_of_a_given_stream(name, guidance):
    pipeline, given = small(), clip_of(name, 9)
    found = pipeline(1, 3, generator=seeded(1), seconds=0.9, guidance=guidance, **{name: given})
    assert torch.equal(found[name], given)
    assert found.video.shape[1] * 16 == found.audio.shape[2] == 144
    start = given.narrow(1 if name == "video" else 2, 0, 4 if name == "video" else 64)
    alone = pipeline(1, 3, generator=seeded(1), guidance=guidance, **{name: start})
    other = "audio" if name == "video" else "video"
    length = alone[other].shape[1 if other == "video" else 2]
    assert torch.equal(found[other].narrow(1 if other == "video" else 2, 0, length), alone[other])


def test_seconds_are_frames_of_the_model():
    pipeline = small(frame_rate=20)
    assert pipeline(1, 1, seconds=0.5).video.shape[1] == 10
    assert small()(1, 1, seconds=0.5).video.shape[1] == 5


def test_saved_and_loaded(tmp_path):
    for name in SCHEDULERS:
        pipeline = small(name)
        pipeline.save_pretrained(tmp_path / name)
        loaded = MMDiffusionPipeline.from_pretrained(tmp_path / name, low_cpu_mem_usage=False)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded.scheduler) is type(pipeline.scheduler) and not loaded.unet.training
        configs = [dict(x.scheduler.config) for x in (loaded, pipeline)]
        assert all(value == configs[0][key] for key, value in configs[1].items() if not key.startswith("_"))
        found, expected = (x(1, 3, generator=seeded(1)) for x in (loaded, pipeline))
        assert torch.equal(found.video, expected.video)


def test_loaded_by_the_class_of_all_pipelines(tmp_path):
    """Without trust in code of the directory: to import the class makes it known."""
    pipeline = small("unipc")
    pipeline.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.py"))
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert type(loaded) is MMDiffusionPipeline and type(loaded.unet) is CoupledUNet
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(loaded(1, 2, generator=seeded(1)).audio, pipeline(1, 2, generator=seeded(1)).audio)


def test_offload():
    """The sequence names every component that has weights, and no other; pieces that are elsewhere change no value."""
    accelerate = pytest.importorskip("accelerate")
    pipeline = small()
    names = pipeline.model_cpu_offload_seq.split("->")
    assert names == [name for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)]
    expected = pipeline(1, 2, generator=seeded(1))
    for name in names:
        accelerate.cpu_offload(getattr(pipeline, name), execution_device="cpu", offload_buffers=True)
        assert all(x.is_meta for x in getattr(pipeline, name).parameters())
    found = pipeline(1, 2, generator=seeded(1))
    assert all(relative_error(x, y) < 1e-4 for x, y in zip(found.values(), expected.values(), strict=True))
    assert all(x.is_meta for x in pipeline.unet.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("how", ("enable_model_cpu_offload", "enable_sequential_cpu_offload"))
def test_offload_on_the_device(how):
    pytest.importorskip("accelerate")
    pipeline = small()
    expected = pipeline(1, 2, generator=seeded(1))
    getattr(pipeline, how)()
    for _ in range(2):
        found = pipeline(1, 2, generator=seeded(1))
        assert all(relative_error(x.cpu(), y) < 2e-3 for x, y in zip(found.values(), expected.values(), strict=True))
        assert all(x.device.type in ("cpu", "meta") for x in pipeline.unet.parameters())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_v_makes_the_clips_that_noise_makes(name, no_fresh_noise):
    """Of one toy, which says the one or the other."""
    trained = np.log(1 / published_alphas_cumprod() - 1)

    def velocities(video, audio, t):
        ratio = math.exp(np.interp(float(t), np.arange(1000), trained) / 2)  # deviation / signal
        signal = 1 / math.hypot(1, ratio)
        noises = published_toy(video, audio, t)
        return tuple((e - signal * ratio * x) / signal for e, x in zip(noises, (video, audio), strict=True))

    found = sample(velocities, X_T, for_streams(make_scheduler(name, prediction_type="v_prediction"), 10))
    expected = sample(published_toy, X_T, for_streams(make_scheduler(name), 10))
    for x, y in zip(found, expected, strict=True):
        assert relative_error(x, y) < 1e-4


def test_the_network_says_what_it_predicts(tmp_path):
    """It picks the scheduler of a name, refuses others, and is saved with the network."""
    unet = fill(CoupledUNet(**SMALL_UNET, prediction_type="v_prediction"))
    pipeline = MMDiffusionPipeline(unet, make_scheduler("ddim", prediction_type="v_prediction"))
    assert pipeline(1, 2, scheduler="dpmsolver++").video.isfinite().all()
    with pytest.raises(ValueError, match="with prediction_type 'epsilon'; expected 'v_prediction', what the model"):
        pipeline(1, 2, scheduler=make_scheduler("ddim"))
    pipeline.save_pretrained(tmp_path)
    loaded = MMDiffusionPipeline.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert loaded.unet.config["prediction_type"] == "v_prediction"
    with pytest.raises(ValueError, match="prediction_type is 'sample'; expected one of 'epsilon', 'v_prediction'"):
        CoupledUNet(**SMALL_UNET, prediction_type="sample")
    with pytest.raises(ValueError, match="prediction_type is 'v_prediction'; expected 'epsilon', as published"):
        loaded.unet.to_published()


def test_learned_sigma():
    """The first half of the channels is the noise."""
    pipeline = small(video_out_channels=6, audio_out_channels=2)
    found = pipeline(1, 3, generator=seeded(1))
    assert found.video.shape == (1, 4, 3, 8, 8) and found.audio.shape == (1, 1, 64)
    with torch.no_grad():
        for head in (pipeline.unet.video_head, pipeline.unet.audio_head):
            last = list(head.parameters())[-1]
            last[len(last) // 2 :] += 1
    assert torch.equal(pipeline(1, 3, generator=seeded(1)).video, found.video)


def test_callback():
    pipeline = small()
    seen = []

    def silence(caller, step, t, streams):
        seen.append((step, float(t)))
        assert caller is pipeline and set(streams) == set(STREAMS)
        return {"audio": torch.zeros_like(streams["audio"])} if step == 2 else None

    found = pipeline(1, 3, callback_on_step_end=silence)
    assert [step for step, _ in seen] == [0, 1, 2] and seen[0][1] == 999
    assert found.audio.eq(0).all() and found.video.std() > 0


def test_callback_gets_what_it_asks_for():
    seen = []
    small()(
        1,
        1,
        callback_on_step_end=lambda *call: seen.append(set(call[-1])),
        callback_on_step_end_tensor_inputs=["audio"],
    )
    assert seen == [{"audio"}]


def test_outputs():
    pipeline = small()
    tensors, arrays = (pipeline(2, 3, generator=seeded(1, 2), output_type=kind) for kind in ("pt", "np"))
    assert isinstance(arrays.video, np.ndarray) and isinstance(arrays.audio, np.ndarray)
    assert np.array_equal(arrays.video, tensors.video) and np.array_equal(arrays.audio, tensors.audio)
    assert len(pipeline(1, 1, return_dict=False)) == 2


def test_the_schedulers_are_left_alone():
    pipeline = small()
    before = pipeline.scheduler.alphas_cumprod.clone()
    pipeline(1, 3)
    assert pipeline.scheduler.num_inference_steps is None and pipeline.scheduler.alphas_cumprod.dtype == before.dtype


def test_one_recording_for_one_model(monkeypatch):
    """The model is recorded again where a recording would be stale: other inputs, or parameters that moved."""
    pipeline, recorded = small(), []
    monkeypatch.setattr(CoupledUNet, "capture", lambda unet, *inputs: recorded.append(inputs) or unet)
    inputs = torch.zeros(1, 4, 3, 8, 8), torch.zeros(1, 1, 64), torch.zeros(1)
    twice = [torch.cat([x, x]) for x in inputs]
    for given, count in ((inputs, 1), (inputs, 1), (twice, 2), (twice, 2)):
        assert pipeline._record(*given) is pipeline.unet and len(recorded) == count
    for x in pipeline.unet.parameters():
        x.data = x.data.clone()
    assert pipeline._record(*twice) is pipeline.unet and len(recorded) == 3


@pytest.mark.gpu
def test_recorded_model(monkeypatch):
    pipeline = small().to("cuda")
    found = [pipeline(2, 4, generator=seeded(1, 2), seconds=0.6) for _ in range(2)]
    monkeypatch.setattr(pipeline, "_record", lambda *_: pipeline.unet)
    expected = pipeline(2, 4, generator=seeded(1, 2), seconds=0.6)
    for name in STREAMS:
        assert found[0][name].device.type == "cuda" and torch.equal(found[0][name], found[1][name])
        assert relative_error(found[0][name], expected[name]) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("guidance", ("replacement", "gradient"))
@pytest.mark.parametrize("name", SCHEDULERS)
def test_on_the_device_as_on_the_cpu(name, guidance):
    """From the same seeds, and from a given stream by both ways of guidance."""
    given = {"audio": clip_of("audio")} if guidance == "gradient" else {"video": clip_of("video", 10), "seconds": 1.0}
    on_cpu, on_gpu = small(name), small(name).to("cuda")
    for options in ({}, {**given, "guidance": guidance}):
        expected = on_cpu(2, 4, generator=seeded(1, 2), **options)
        found = on_gpu(2, 4, generator=seeded(1, 2), **options)
        for stream in STREAMS:
            assert found[stream].device.type == "cuda"
            assert relative_error(found[stream].cpu(), expected[stream]) < 2e-3, (stream, options.keys())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_on_the_device(dtype):
    pipeline = small().to("cuda", dtype)
    generator = torch.Generator("cuda").manual_seed(3)
    found = pipeline(2, 3, generator=generator, output_type="np", seconds=0.6)
    again = pipeline(2, 3, generator=generator.manual_seed(3), output_type="np", seconds=0.6)
    for name in STREAMS:
        assert isinstance(found[name], np.ndarray) and found[name].dtype == np.float32
        assert np.isfinite(found[name]).all() and np.abs(found[name] - again[name]).max() < 1e-2


REFUSED = {
    "batch_size is 0": {"batch_size": 0},
    "num_inference_steps is 0": {"num_inference_steps": 0},
    "num_inference_steps is 2.5": {"num_inference_steps": 2.5},
    "num_inference_steps is 1001; expected at most the 1000": {"num_inference_steps": 1001},
    "scheduler is 'fast'; expected one of 'ddpm', 'ddim', 'dpmsolver": {"scheduler": "fast"},
    "scheduler is a int": {"scheduler": 3},
    "scheduler is a DDIMScheduler with prediction_type 'v_prediction'": {
        "scheduler": diffusers.DDIMScheduler(prediction_type="v_prediction")
    },
    "scheduler is a FlowMatchEulerDiscreteScheduler, of another process": {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()
    },
    "scheduler is a EDMEulerScheduler, of another process": {"scheduler": diffusers.EDMEulerScheduler()},
    "scheduler is a EDMDPMSolverMultistepScheduler, of": {"scheduler": diffusers.EDMDPMSolverMultistepScheduler()},
    "scheduler is a UniPCMultistepScheduler, of another process": {
        "scheduler": diffusers.UniPCMultistepScheduler(use_flow_sigmas=True)
    },
    "callback_on_step_end_tensor_inputs is 'latents'; expected some of 'video', 'audio'": {
        "callback_on_step_end_tensor_inputs": ["video", "latents"]
    },
    "callback_on_step_end returned 'latents'; expected": {
        "callback_on_step_end": lambda *_: {"latents": torch.zeros(1)}
    },
    "guidance is 'none'; expected one of 'replacement', 'gradient'": {"guidance": "none"},
    "guidance_scale is -1": {"guidance_scale": -1},
    "guidance_scale is nan": {"guidance_scale": math.nan},
    "output_type is 'pil'": {"output_type": "pil"},
    "audio and video are both given": {"audio": clip_of("audio"), "video": clip_of("video")},
    r"audio has shape \[1, 1, 48\]; expected \[2, 1, 64\]": {"audio": clip_of("audio", 3), "batch_size": 2},
    r"video has shape \[3, 4, 3, 8, 8\]; expected \[2, 4": {"video": clip_of("video", batch=3), "batch_size": 2},
    r"audio has shape \[1, 1, 64\]; expected \[1, 1, 160\]": {"audio": clip_of("audio"), "seconds": 1.0},
    "audio has values up to 2.0; expected -1 to 1": {"audio": torch.full((1, 1, 64), 2.0)},
    "audio has values up to nan": {"audio": torch.full((1, 1, 64), math.nan)},
    "video is torch.uint8; expected": {"video": torch.zeros(1, 4, 3, 8, 8, dtype=torch.uint8)},
    "video is list": {"video": [0]},
    "generator has 1 elements; expected batch_size = 2": {"generator": seeded(1), "batch_size": 2},
    "generator is a int": {"generator": 7},
    "seconds is 0.0; expected": {"seconds": 0.0},
    "seconds is inf": {"seconds": math.inf},
    "seconds is 1000000000.0; expected .* at most 3600": {"seconds": 1e9},
    "overlap is 0.0; expected a share of 1 to 3 of the 4 frames": {"seconds": 1.0, "overlap": 0.0},
    "overlap is 1.0; expected a share of 1 to 3": {"seconds": 1.0, "overlap": 1.0},
    "overlap is inf; expected a share": {"seconds": 1.0, "overlap": math.inf},
    "overlap is nan; expected a share": {"seconds": 1.0, "overlap": math.nan},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    with pytest.raises((ValueError, TypeError), match=message):
        small()(**{"num_inference_steps": 1, **REFUSED[message]})


def test_refused_models():
    with pytest.raises(ValueError, match=r"unet has streams \('video',\)"):
        MMDiffusionPipeline(CoupledUNet(**SMALL_UNET, streams=("video",)), make_scheduler("ddim"))
    with pytest.raises(ValueError, match="unet has video_out_channels 4; expected 3, or 6 with learned sigma"):
        MMDiffusionPipeline(CoupledUNet(**SMALL_UNET, video_out_channels=4), make_scheduler("ddim"))
    pipeline = small(audio_size=(1, 72))
    assert pipeline(1, 1).audio.shape == (1, 1, 72)
    uneven = small(video_size=(5, 3, 8, 8))
    assert uneven(1, 1).audio.shape == (1, 1, 64)
    with pytest.raises(ValueError, match=r"seconds is 1.0, and unet has 64 positions of audio for 5 frames"):
        uneven(1, 1, seconds=1.0)
