# SPDX-License-Identifier: MIT
"""Sampling of two streams together, of which one, or a beginning, may be given (MM-Diffusion, arXiv 2212.09478)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmdiffusion.clips import TIME_AXES
from mmdiffusion.diffusion.schedulers import Scheduler

PUBLISHED_SCALE = 3.0
"""Of the gradient in the published code, whose squared norm is a mean over the elements of what is given."""


@torch.no_grad()
def sample(
    model: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    noise: Sequence[Tensor],
    schedulers: Sequence[Scheduler],
    *,
    known: Sequence[Tensor | None] = (None, None),
    generators: list[torch.Generator] | None = None,
    guidance_scale: float | Sequence[float] = 0.0,
    on_step: Callable[[int, Tensor, list[Tensor]], Sequence[Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Take both streams from noise to clips, with one call of the model for each step of the schedulers.

    What is known is given by replacement: before every step the known part x of a stream is set to q(x_t | x), with the
    same noise at all steps, that of `noise` in its place. With a guidance_scale there is, after each step but the last,
    also the gradient of the distance between what the step made of the known part and q(x_{t-1} | x):

        x_{t-1} -= guidance_scale sqrt(alpha_bar_t) grad_{x_t} ||x'_{t-1}[known] - q(x_{t-1} | x)||^2

    the paper's squared norm, a sum over the elements of a sample. The published code takes the mean over elements and
    batch: guidance_scale = PUBLISHED_SCALE / (elements of the known stream of a sample * batch).

    Args:
        model: f(video, audio, t) -> (video, audio), of each stream the noise, or what else the schedulers take it for,
            all of the shapes of `noise`; t is a tensor of no dimensions on the CPU, a real number for some schedulers.
        noise: standard normal (video [B, F, C, H, W], audio [B, C, T]), floating point, any device.
        schedulers: one for each stream, after set_timesteps (`schedulers.for_streams`); they are stepped. Any of
            diffusers; guidance is the same for those that scale the sample, as Euler's do.
            A solver's history takes no part in the gradient.
        known: for each stream None, or its beginning along time, up to all of it, in the dtype and device of noise.
        generators: one for each sample, for the noise of stochastic schedulers.
        guidance_scale: one, or that of each stream that is known; 0 is replacement alone.
        on_step: called after each step with its number, t, and the streams [video, audio]; returns those to go on with.

    Returns:
        (video, audio), in the dtype of noise; what is known is in its place, unchanged.
    """
    # Long by its docstring; the loop is the algorithm, in the order of the paper.
    timesteps = schedulers[0].timesteps
    scales = [guidance_scale] * 2 if isinstance(guidance_scale, (int, float)) else guidance_scale
    is_given = any(x is not None for x in known)
    levels = _levels(schedulers[0])
    options = [step_options(scheduler, generators) for scheduler in schedulers]

    def diffused(i: int) -> list[Tensor | None]:
        """q(x_t | known) at the i-th timestep."""
        signal, deviation = levels[i]
        return [
            None if x is None else signal * x + deviation * e.narrow(axis, 0, x.shape[axis])
            for x, e, axis in zip(known, noise, TIME_AXES, strict=True)
        ]

    streams = [x * float(scheduler.init_noise_sigma) for x, scheduler in zip(noise, schedulers, strict=True)]
    for i, t in enumerate(timesteps):
        streams = _with_beginnings(streams, diffused(i))
        is_guided = any(scales) and is_given and i + 1 < len(timesteps)
        with torch.set_grad_enabled(is_guided):
            inputs = [x.detach().requires_grad_(is_guided) for x in streams]
            scaled = [s.scale_model_input(x, t) for s, x in zip(schedulers, inputs, strict=True)]
            outputs = [e.to(x.dtype) for e, x in zip(model(scaled[0], scaled[1], t), streams, strict=True)]
            # One stream reaches the other through the model alone, so the schedulers' part is differentiated apart.
            noises = [e.detach().requires_grad_(is_guided) for e in outputs]
            streams = [
                scheduler.step(e, t, x, **option).prev_sample
                for scheduler, e, x, option in zip(schedulers, noises, streams, options, strict=True)
            ]
        if is_guided:
            gradients = _gradients(inputs, outputs, noises, streams, diffused(i + 1), scales)
            # Of samples scaled to a variance of 1, where the paper's equation holds.
            level = levels[i][0] / math.hypot(*levels[i + 1])
            streams = [x.detach() - level * gradient for x, gradient in zip(streams, gradients, strict=True)]
            for scheduler in schedulers:
                _detach(scheduler)
        if on_step is not None:
            streams = list(on_step(i, t, streams))
    video, audio = _with_beginnings(streams, known)
    return video, audio


def _levels(scheduler: Scheduler) -> list[tuple[float, float]]:
    """(signal, deviation) of x_t = signal x_0 + deviation noise at each timestep, in the scheduler's own scaling."""
    one = torch.ones(len(scheduler.timesteps), dtype=torch.float64)
    pairs = ((one, 0 * one), (0 * one, one))
    signals, deviations = (scheduler.add_noise(x, noise, scheduler.timesteps).tolist() for x, noise in pairs)
    return list(zip(signals, deviations, strict=True))


def step_options(scheduler: Scheduler, generators: list[torch.Generator] | None) -> dict[str, Any]:
    """What this scheduler's step takes of: the generators; and that DDIM's direction is that of the clipped x0."""
    options = {"generator": generators, "use_clipped_model_output": True}
    accepted = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in options.items() if name in accepted}


def _with_beginnings(streams: Sequence[Tensor], beginnings: Sequence[Tensor | None]) -> list[Tensor]:
    return [
        x
        if part is None
        else torch.cat([part, x.narrow(axis, part.shape[axis], x.shape[axis] - part.shape[axis])], axis)
        for x, part, axis in zip(streams, beginnings, TIME_AXES, strict=True)
    ]


def _gradients(
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    noises: Sequence[Tensor],
    streams: Sequence[Tensor],
    expected: Sequence[Tensor | None],
    scales: Sequence[float],
) -> list[Tensor]:
    """Of the squared distance of `streams`, functions of `noises`, from what is expected, each times its scale; by the
    model's inputs.
    """
    with torch.enable_grad():
        distances = [
            scale * (x.narrow(axis, 0, part.shape[axis]) - part).square().sum()
            for x, part, axis, scale in zip(streams, expected, TIME_AXES, scales, strict=True)
            if part is not None
        ]
    by_noise = torch.autograd.grad(distances, noises, materialize_grads=True)
    # A power of two, so that a model in fp16 neither loses small gradients nor changes what others get.
    size = 2.0 ** math.frexp(max(float(x.abs().max()) for x in by_noise))[1]
    by_input = torch.autograd.grad(outputs, inputs, [x / size for x in by_noise], materialize_grads=True)
    return [x * size for x in by_input]


def _detach(scheduler: Scheduler) -> None:
    """Free what a scheduler keeps for its next steps of the graph of this one."""
    for name, value in list(vars(scheduler).items()):
        if isinstance(value, list):
            setattr(scheduler, name, [x.detach() if isinstance(x, Tensor) else x for x in value])
        elif isinstance(value, Tensor):
            setattr(scheduler, name, value.detach())
