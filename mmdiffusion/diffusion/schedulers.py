# SPDX-License-Identifier: MIT
"""diffusers' schedulers, set up for the diffusion MM-Diffusion was trained with (arXiv 2212.09478)."""

from __future__ import annotations

import copy
import warnings
from typing import Any, TypeAlias

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_dpmsolver_singlestep import DPMSolverSinglestepScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

# from_pretrained of a pipeline asks the module of a scheduler's class for the base classes it can load.
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401
from torch import Tensor

Scheduler: TypeAlias = Any
"""A SchedulerMixin of diffusers, which declares nothing of what schedulers have in common."""


class _UniformLogSNR:
    """Steps uniform in logSNR, from the last timestep of training to the first (DPM-Solver, arXiv 2206.00927).

    Timesteps are real numbers here. diffusers rounds them, and then the model is told of another noise than there is,
    and two of many steps can coincide. A singlestep solver has its groups of up to three calls uniform, and the calls
    of a group, as in the published sampler.
    """

    def set_timesteps(self: Any, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        super().set_timesteps(num_inference_steps, device)  # type: ignore[misc]
        is_to_zero = self.config.final_sigmas_type == "zero"
        orders = getattr(self, "order_list", [1] * num_inference_steps)
        ends = [i for i, order in enumerate(orders) if order == 1] + ([] if is_to_zero else [len(orders)])
        shares = np.interp(np.arange(ends[-1] + 1), ends, np.linspace(0, 1, len(ends)))
        trained = (1 / self.alphas_cumprod.double() - 1).log().numpy() / 2
        log_sigmas = trained[-1] + shares * (trained[0] - trained[-1])
        sigmas = np.append(np.exp(log_sigmas), [0.0] * is_to_zero)
        timesteps = np.interp(log_sigmas[:num_inference_steps], trained, np.arange(len(trained)))
        self.sigmas = torch.from_numpy(sigmas).float()
        self.timesteps = torch.from_numpy(timesteps).to(device)

    def _threshold_sample(self: Any, sample: Tensor) -> Tensor:
        # With a maximum of 1 the dynamic threshold of diffusers is 1; its quantile refuses more than 2^24 elements.
        return sample.clamp(-self.config.sample_max_value, self.config.sample_max_value)


class LogSNRDPMSolverMultistepScheduler(_UniformLogSNR, DPMSolverMultistepScheduler):  # type: ignore[misc]
    """DPM-Solver++ (arXiv 2211.01095), multistep, in steps uniform in logSNR; x0 is clipped, not thresholded."""


class LogSNRDPMSolverSinglestepScheduler(_UniformLogSNR, DPMSolverSinglestepScheduler):  # type: ignore[misc]
    """DPM-Solver (arXiv 2206.00927), singlestep, in steps uniform in logSNR as in the published sampler."""


class LogSNRUniPCMultistepScheduler(_UniformLogSNR, UniPCMultistepScheduler):  # type: ignore[misc]
    """UniPC (arXiv 2302.04867) in steps uniform in logSNR; x0 is clipped, not thresholded."""


SCHEDULERS: dict[str, tuple[type[Scheduler], dict[str, Any]]] = {
    "ddpm": (DDPMScheduler, {"variance_type": "fixed_large", "timestep_spacing": "linspace"}),
    "ddim": (DDIMScheduler, {"timestep_spacing": "leading"}),
    "dpmsolver++": (LogSNRDPMSolverMultistepScheduler, {"solver_order": 2, "thresholding": True}),
    "dpmsolver": (
        LogSNRDPMSolverSinglestepScheduler,
        {
            "algorithm_type": "dpmsolver",
            "solver_order": 3,
            "lower_order_final": True,
            "final_sigmas_type": "sigma_min",
        },
    ),
    "unipc": (LogSNRUniPCMultistepScheduler, {"solver_order": 2, "thresholding": True}),
}
"""The schedulers known by name: diffusers' class, and its settings beside those of the published diffusion."""


def make_scheduler(name: str, *, has_learned_variance: bool = False, prediction_type: str = "epsilon") -> Scheduler:
    """Make a scheduler for the published diffusion: 1000 steps, betas linear from 1e-4 to 2e-2.

    - "ddpm" (arXiv 2006.11239): variance "fixed large"; N timesteps round(i 999/(N-1)), as of the published "N".
    - "ddim" (arXiv 2010.02502), eta 0: stride 1000//N from 0, as of the published "ddimN", whose N divide 1000.
    - "dpmsolver++" (arXiv 2211.01095): multistep of order 2, N steps uniform in logSNR, the last to the clean clip.
    - "dpmsolver" (arXiv 2206.00927): singlestep of order 3, the published default with N = 20. It ends at the noise of
      timestep 0, a standard deviation of 0.01, as published.
    - "unipc" (arXiv 2302.04867): order 2 with its corrector, steps as of "dpmsolver++".

    x0 is clipped to [-1, 1] at every step, but by "dpmsolver", which has no estimate of x0; nor is it published
    otherwise.

    Args:
        has_learned_variance: "ddpm" takes the variance that the network has learned instead (arXiv 2102.09672).
        prediction_type: what the network predicts, as of its configuration.

    Raises:
        ValueError: if the name is not among SCHEDULERS, listing them.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler is {name!r}; expected one of {', '.join(map(repr, SCHEDULERS))}")
    scheduler_class, settings = SCHEDULERS[name]
    if has_learned_variance and "variance_type" in settings:
        settings = {**settings, "variance_type": "learned_range"}
    with warnings.catch_warnings():
        # The published solver is of the kind that diffusers advises against.
        warnings.filterwarnings("ignore", ".*algorithm_type", FutureWarning)
        return scheduler_class(
            num_train_timesteps=1000,
            beta_start=1e-4,
            beta_end=2e-2,
            beta_schedule="linear",
            prediction_type=prediction_type,
            **settings,
        )


def for_streams(scheduler: Scheduler, num_inference_steps: int) -> tuple[Scheduler, Scheduler]:
    """Two copies of a scheduler, for video and audio, as `prepared`."""
    scheduler = prepared(scheduler, num_inference_steps)
    return scheduler, copy.deepcopy(scheduler)


def prepared(scheduler: Scheduler, num_inference_steps: int) -> Scheduler:
    """A copy of a scheduler ready for that many steps; the original is left as it is.

    It holds alphas_cumprod in fp64. diffusers computes 1 - alphas_cumprod in fp32, where it is 2e-4 off at the first
    timestep, and the mean of DDPM's last steps is 5e-5 off for it.
    """
    scheduler = copy.deepcopy(scheduler)
    if isinstance(getattr(scheduler, "betas", None), Tensor) and not scheduler.config.get("rescale_betas_zero_snr"):
        scheduler.alphas = 1 - scheduler.betas.double()
        scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    scheduler.set_timesteps(num_inference_steps)
    return scheduler
