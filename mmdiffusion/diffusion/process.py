# SPDX-License-Identifier: MIT
"""The Gaussian diffusion that MM-Diffusion is trained with: q(x_t | x_0), its posterior, and what follows of x_0."""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 1000
"""Timesteps of training."""

BETA_START, BETA_END = 1e-4, 2e-2
"""Of the linear schedule."""


def _by_timestep(values: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """values[t] for each sample, to multiply x [B, ...] with."""
    picked = values.to(x.device)[t.to(x.device)].to(x.dtype if x.dtype == torch.float64 else torch.float32)
    return picked.view(-1, *(1,) * (x.dim() - 1))


class GaussianDiffusion:
    """q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, 1 - alpha_bar_t) and its posterior (arXiv 2006.11239).

    Args:
        betas: [T], float64; the published linear schedule if None.

    Attributes:
        betas, alphas_cumprod: [T] float64.
        posterior_variance: [T] float64, of q(x_{t-1} | x_t, x_0); 0 at t = 0.
        posterior_log_variance: [T] float64, its logarithm, at t = 0 that of t = 1.
        snr: [T] float64, alpha_bar / (1 - alpha_bar).
    """

    def __init__(self, betas: Tensor | None = None) -> None:
        linear = torch.linspace(BETA_START, BETA_END, STEPS, dtype=torch.float64)
        self.betas = linear if betas is None else betas.double()
        if self.betas.dim() != 1 or len(self.betas) < 2 or not bool(((self.betas > 0) & (self.betas <= 1)).all()):
            raise ValueError(f"betas has shape {list(self.betas.shape)}; expected [T], at least 2, each in (0, 1]")
        self.alphas_cumprod = (1 - self.betas).cumprod(0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
        self.posterior_variance = self.betas * (1 - before) / (1 - self.alphas_cumprod)
        self.posterior_log_variance = torch.cat([self.posterior_variance[1:2], self.posterior_variance[1:]]).log()
        self.snr = self.alphas_cumprod / (1 - self.alphas_cumprod)
        self._of_start = self.betas * before.sqrt() / (1 - self.alphas_cumprod)
        self._of_state = (1 - before) * (1 - self.betas).sqrt() / (1 - self.alphas_cumprod)

    def __len__(self) -> int:
        return len(self.betas)

    def diffuse(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t of x_0 = x [B, ...] and noise of its shape, at t [B]."""
        signal = _by_timestep(self.alphas_cumprod.sqrt(), t, x)
        return signal * x + _by_timestep((1 - self.alphas_cumprod).sqrt(), t, x) * noise

    def start_of(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_0 of x_t [B, ...] and the noise in it, at t [B]."""
        deviation = _by_timestep((1 / self.alphas_cumprod - 1).sqrt(), t, x_t)
        return _by_timestep(self.alphas_cumprod.rsqrt(), t, x_t) * x_t - deviation * noise

    def velocity(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """v = sqrt(alpha_bar_t) noise - sqrt(1 - alpha_bar_t) x_0, all [B, ...], at t [B] (arXiv 2202.00512)."""
        return self.diffuse(noise, t, -x)

    def noise_of(self, x_t: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
        """The noise in x_t [B, ...], of its velocity, at t [B]."""
        return self.diffuse(velocity, t, x_t)

    def posterior_mean(self, x: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0 = x), all [B, ...], at t [B]."""
        return _by_timestep(self._of_start, t, x_t) * x + _by_timestep(self._of_state, t, x_t) * x_t

    def learned_log_variance(self, share: Tensor, t: Tensor) -> Tensor:
        """Of p(x_{t-1} | x_t), from a network's share [B, ...]: -1 is the posterior's, 1 is log beta_t.

        (arXiv 2102.09672, equation 15.)
        """
        upper = _by_timestep(self.betas.log(), t, share)
        lower = _by_timestep(self.posterior_log_variance, t, share)
        return lower + (share + 1) / 2 * (upper - lower)
