# SPDX-License-Identifier: MIT
"""What is minimised: the mean squared error of the noise or of v, and the variational bound where sigma is learned."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mmdiffusion.clips import STREAMS
from mmdiffusion.diffusion.process import GaussianDiffusion

_CHANNEL_AXES = {"video": 2, "audio": 1}
_HALF_LEVEL = 1 / 255  # of 8-bit values in [-1, 1]
_DARKEST, _BRIGHTEST = -0.999, 0.999
_SMALLEST = 1e-12  # probability, before its logarithm


def denoising_losses(
    network: Callable[..., tuple[Tensor | None, Tensor | None]],
    diffusion: GaussianDiffusion,
    clips: Mapping[str, Tensor],
    noises: Mapping[str, Tensor],
    t: Tensor,
    *,
    prediction_type: str = "epsilon",
    **options: Any,
) -> dict[str, Tensor]:
    """The loss of each sample in each stream, its mean over the elements; their sum is the published loss.

    Args:
        network: f(video, audio, t, **options) -> (video, audio), None for a stream that is not in `clips`. An output
            of twice the channels of its input is what is predicted, then the share of `learned_log_variance`; the
            variational bound is then added to the loss (arXiv 2102.09672, section 3.1), and is also returned by itself.
        clips: "video" [B, F, C, H, W] and "audio" [B, C, T], or one of them, in [-1, 1].
        noises: standard normal, of the same shapes.
        t: [B], of `diffusion`, the same for both streams.
        prediction_type: what the network predicts, "epsilon" or "v_prediction".

    Returns:
        {stream: [B] float32}, and {stream_vb: [B]} where sigma is learned.
    """
    states = {name: diffusion.diffuse(x, t, noises[name]) for name, x in clips.items()}
    outputs = network(*(states.get(name) for name in STREAMS), t, **options)
    losses: dict[str, Tensor] = {}
    for name, out in zip(STREAMS, outputs, strict=True):
        if out is None or name not in clips:
            continue
        out, axis = out.float(), _CHANNEL_AXES[name]
        channels = clips[name].shape[axis]
        predicted = out.narrow(axis, 0, channels)
        is_noise = prediction_type == "epsilon"
        expected = noises[name] if is_noise else diffusion.velocity(clips[name], t, noises[name])
        losses[name] = (predicted - expected).square().flatten(1).mean(1)
        if out.shape[axis] == 2 * channels:
            share, predicted = out.narrow(axis, channels, channels), predicted.detach()
            noise = predicted if is_noise else diffusion.noise_of(states[name], t, predicted)
            bound = variational_bound(diffusion, noise, share, clips[name], states[name], t)
            losses[name], losses[f"{name}_vb"] = losses[name] + bound, bound
    return losses


def variational_bound(
    diffusion: GaussianDiffusion, noise: Tensor, share: Tensor, x: Tensor, x_t: Tensor, t: Tensor
) -> Tensor:
    """Term of the variational bound at t for each sample, [B], in bits an element, where sigma is learned.

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)); at t = 0 the likelihood of x in 8-bit levels under a discretised
    Gaussian (arXiv 2006.11239, section 3.3). Give the noise detached, so that it reaches the variance alone.

    Args:
        noise, share: [B, ...], what the network says of x_t.
        x, x_t: [B, ...], x_0 in [-1, 1], and x_t.
        t: [B].
    """
    mean = diffusion.posterior_mean(diffusion.start_of(x_t, t, noise), x_t, t)
    log_variance = diffusion.learned_log_variance(share, t)
    true_mean = diffusion.posterior_mean(x, x_t, t)
    true_log_variance = diffusion.posterior_log_variance.to(t.device)[t].float().view(-1, *(1,) * (x.dim() - 1))
    divergence = 0.5 * (
        log_variance
        - true_log_variance
        + (true_log_variance - log_variance).exp()
        + (true_mean - mean).square() * (-log_variance).exp()
        - 1
    )
    at_zero = -_log_likelihood(x, mean, 0.5 * log_variance)
    is_zero = (t == 0).view(-1, *(1,) * (x.dim() - 1))
    return torch.where(is_zero, at_zero, divergence).flatten(1).mean(1) / math.log(2)


def _log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Of 8-bit levels under a Gaussian, whose tails belong to the first and the last level."""
    centred, scale = x - mean, (-log_scale).exp()
    below, above = (_normal_cdf(scale * (centred + edge)) for edge in (-_HALF_LEVEL, _HALF_LEVEL))
    inside = (above - below).clamp(min=_SMALLEST).log()
    outside = torch.where(x < _DARKEST, above.clamp(min=_SMALLEST).log(), (1 - below).clamp(min=_SMALLEST).log())
    return torch.where((x < _DARKEST) | (x > _BRIGHTEST), outside, inside)


def _normal_cdf(x: Tensor) -> Tensor:
    """The approximation by tanh that published likelihoods are computed with."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def loss_weights(
    weighting: str, diffusion: GaussianDiffusion, t: Tensor, *, gamma: float = 5.0, prediction_type: str = "epsilon"
) -> Tensor:
    """lambda_t [B] at t [B]: 1, or for "min-snr" min(SNR, gamma) / SNR, of predicted v min(SNR, gamma) / (SNR + 1).

    (arXiv 2303.09556.)
    """
    if weighting == "uniform":
        return torch.ones(len(t), device=t.device)
    snr = diffusion.snr.to(t.device)[t]
    return (snr.clamp(max=gamma) / (snr if prediction_type == "epsilon" else snr + 1)).float()
