# SPDX-License-Identifier: MIT
"""Sampling: against reference values of the published diffusion, on toys with known answers, and as a pipeline."""

import itertools
import math
import pathlib

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")
safetensors = pytest.importorskip("safetensors.torch")

from diffusers.schedulers import scheduling_ddpm  # noqa: E402

from mmattn.testing import relative_error  # noqa: E402
from mmdiffusion.sampling import sample  # noqa: E402
from mmdiffusion.schedulers import SCHEDULERS, for_streams, make_scheduler  # noqa: E402

REFERENCE = safetensors.load_file(pathlib.Path(__file__).parent / "data" / "diffusion.safetensors")
STREAMS = ("video", "audio")
X_T = [REFERENCE[f"x_T_{name}"] for name in STREAMS]
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
        # The release lists the posterior variance of t = 1 for t = 0, where neither adds noise.
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
    """ "25" and "ddim50" of the release, as its own tables list them."""
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
        # The release's scale is 3, of a mean over elements and batch.
        guidance_scale=3 / condition.numel() if guidance == "gradient" else 0.0,
    )
    for name, x in zip(STREAMS, sampled, strict=True):
        # Of the stream that is given the release returns what its last step leaves.
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
    # Numbers of calls whose last group is of order 2, as of the release's 20.
    "dpmsolver": (3, (47, 95, 191)),
    "unipc": (3, (20, 40, 80)),
}


@pytest.mark.parametrize("name", ORDERS)
def test_order(name):
    order, steps = ORDERS[name]
    errors = [solver_error(name, n) for n in steps]
    for (n, error), (more, smaller) in itertools.pairwise(zip(steps, errors, strict=True)):
        assert math.log(error / smaller, more / n) > order - 0.3
