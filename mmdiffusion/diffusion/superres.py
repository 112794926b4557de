# SPDX-License-Identifier: MIT
"""Super-resolution of sampled video as a diffusers pipeline, frame by frame (MM-Diffusion, arXiv 2212.09478)."""

# No `from __future__ import annotations`: diffusers reads those of the pipeline's constructor.

import copy
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import diffusers
import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from mmdiffusion.diffusion.pipelines import check_count, check_scheduler, frozen, generators_of, refuse_unknown
from mmdiffusion.diffusion.sampling import step_options
from mmdiffusion.diffusion.schedulers import Scheduler, make_scheduler, prepared
from mmdiffusion.model.superres import SuperResolutionUNet

_LEARNED = "learned_range"  # how diffusers calls a variance between two bounds, by the share that the network predicts
_CALLBACK_TENSORS = ("frames",)
_CPU_BYTES = 1 << 30  # for the frames of one call of the network; more at once are not faster on a CPU
_GPU_SHARE = 0.5  # of the memory that is free


@dataclasses.dataclass
class SuperResolutionOutput(BaseOutput):  # type: ignore[misc]
    """Video [B, F, C, H, W], fp32, in [-1, 1]; a tensor on the model's device, or an array."""

    video: Tensor | np.ndarray


class SuperResolutionPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Makes small video large by a SuperResolutionUNet, each frame by itself (MM-Diffusion, arXiv 2212.09478).

    Args:
        unet: the network. A variance that it has learned is used by a scheduler with variance_type "learned_range", of
            which diffusers' DDPMScheduler is one; any other takes the noise alone.
        scheduler: any of diffusers, of the network's `prediction_type`. The published one is
            `schedulers.make_scheduler("ddim")`.

    Example:
        >>> unet = SuperResolutionUNet(image_size=64, model_channels=32, channel_mult=(1, 2))
        >>> pipeline = SuperResolutionPipeline(unet, make_scheduler("ddim"))
        >>> video = pipeline(torch.zeros(1, 2, 3, 16, 16), num_inference_steps=5).video  # [1, 2, 3, 64, 64]
    """

    model_cpu_offload_seq = "unet"  # type: ignore[assignment]
    _callback_tensor_inputs: ClassVar = list(_CALLBACK_TENSORS)

    def __init__(self, unet: SuperResolutionUNet, scheduler: SchedulerMixin) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        low_res: Tensor,
        num_inference_steps: int = 25,
        *,
        scheduler: str | Scheduler | None = None,
        noise: Tensor | None = None,
        share_noise: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        frames_per_call: int | None = None,
        output_type: Literal["pt", "np"] = "pt",
        callback_on_step_end: Callable[..., dict[str, Tensor] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("frames",),
        return_dict: bool = True,
    ) -> SuperResolutionOutput | tuple[Any]:
        """Make videos `scale` times as high and wide, `scale` being that of the network's configuration.

        Args:
            low_res: [B, F, C, h, w], floating point, about [-1, 1]: what a sampler makes, not rounded, or read from a
                file.
            num_inference_steps: calls of the network for each frame.
            scheduler: a name of `schedulers.SCHEDULERS`, or an object, in place of the pipeline's own.
            noise: what sampling begins with, standard normal: [1, C, H, W] shared by all frames of all videos, or
                [B, F, C, H, W]. None: drawn from `generator`.
            share_noise: whether all that is drawn for a video, before the first step or at each, is the same in all its
                frames, as published, so that what does not move stays as it is; otherwise each frame has its own.
            generator: a list of B, one for each video, or one, as of `MMDiffusionPipeline`. A video is the same in a
                batch of any size, but for rounding.
            frames_per_call: frames that go through the network together. None: as many as 1 GiB holds on a CPU, and
                half of the free memory on a GPU, at least one.
            output_type: "pt" for a tensor, "np" for an array of the same shape.
            callback_on_step_end: f(pipeline, step, t, {"frames": x_t [N, C, H, W]}) after each step, counted through
                all calls, of the frames that go through the network together; it may return a dictionary of those to go
                on with.
            return_dict: False for a tuple (video,).

        Raises:
            ValueError, TypeError: on an argument outside of what is above, naming it, its value and what was expected.
        """
        # Long by its arguments, which are said and checked once, and by a callback that shares the loop's state.
        checked = self.check_inputs(
            low_res,
            num_inference_steps,
            scheduler=scheduler,
            noise=noise,
            frames_per_call=frames_per_call,
            output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        device, frames = self._execution_device, low_res.shape[1]
        generators = [
            source
            for one in generators_of(generator, len(low_res))
            for source in _of_frames(one, frames, is_shared=share_noise)
        ]
        size = self._size(low_res)
        images = low_res.flatten(0, 1).to(device, torch.float32)
        initial = None if noise is None else noise.to(device, torch.float32).expand(len(low_res), frames, *size)
        initial = None if initial is None else initial.flatten(0, 1)
        ready = prepared(checked, num_inference_steps)
        count = frames_per_call or self.frames_that_fit(*size[1:])
        pieces = [slice(first, first + count) for first in range(0, len(images), count)]
        steps, sampled = itertools.count(), []
        with frozen(self.unet), self.progress_bar(total=len(pieces) * len(ready.timesteps)) as progress_bar:

            def on_step(t: Tensor, x: Tensor) -> Tensor:
                progress_bar.update()
                if callback_on_step_end is None:
                    return x
                seen = dict.fromkeys(callback_on_step_end_tensor_inputs, x)
                returned = callback_on_step_end(self, next(steps), t, seen) or {}
                refuse_unknown("callback_on_step_end returned", returned, _CALLBACK_TENSORS)
                return returned.get("frames", x)

            for piece in pieces:
                own = generators[piece]
                x = randn_tensor((len(own), *size), own, device, torch.float32) if initial is None else initial[piece]
                sampled.append(self._sample(images[piece], x, copy.deepcopy(ready), own, on_step))
        self.maybe_free_model_hooks()
        video: Any = torch.cat(sampled).unflatten(0, low_res.shape[:2])
        if output_type == "np":
            video = video.cpu().numpy()
        return SuperResolutionOutput(video) if return_dict else (video,)

    def check_inputs(
        self,
        low_res: Tensor,
        num_inference_steps: int = 25,
        *,
        scheduler: str | Scheduler | None = None,
        noise: Tensor | None = None,
        frames_per_call: int | None = None,
        output_type: str = "pt",
        callback_on_step_end_tensor_inputs: Sequence[str] = ("frames",),
    ) -> Scheduler:
        """Refuse what a call with these arguments would refuse before it begins, and return its scheduler.

        Raises:
            ValueError, TypeError: naming the argument, its value and what was expected.
        """
        if isinstance(scheduler, str):
            scheduler = make_scheduler(scheduler, prediction_type=self.unet.config["prediction_type"])
        scheduler = self.scheduler if scheduler is None else scheduler
        check_scheduler(scheduler, num_inference_steps, self.unet.config["prediction_type"])
        self._check_variance(scheduler)
        if frames_per_call is not None:
            check_count("frames_per_call", frames_per_call)
        if output_type not in ("pt", "np"):
            raise ValueError(f"output_type is {output_type!r}; expected one of 'pt', 'np'")
        refuse_unknown("callback_on_step_end_tensor_inputs is", callback_on_step_end_tensor_inputs, _CALLBACK_TENSORS)
        _check_floating("low_res", low_res)
        channels = self.unet.config["in_channels"]
        if low_res.dim() != 5 or low_res.shape[2] != channels or 0 in low_res.shape:
            raise ValueError(f"low_res has shape {list(low_res.shape)}; expected [B, F, {channels}, h, w], none 0")
        size = self._size(low_res)
        divisor = 2 ** (self.unet.levels - 1)
        if size[1] % divisor or size[2] % divisor:
            raise ValueError(
                f"low_res has height and width {low_res.shape[3]}, {low_res.shape[4]}; expected sizes that are "
                f"multiples of {divisor} when they are {self.unet.config['scale']} times as large"
            )
        if noise is not None:
            _check_floating("noise", noise)
            shapes = (1, *size), (*low_res.shape[:2], *size)
            if tuple(noise.shape) not in shapes:
                raise ValueError(
                    f"noise has shape {list(noise.shape)}; expected {list(shapes[0])} or {list(shapes[1])}"
                )
        return scheduler

    def frames_that_fit(self, height: int, width: int) -> int:
        """How many frames of that size go through the network together where nothing says otherwise."""
        device = self._execution_device
        is_gpu = device.type == "cuda"
        free = int(torch.cuda.mem_get_info(device)[0] * _GPU_SHARE) if is_gpu else _CPU_BYTES
        return max(1, free // self.unet.working_bytes(height, width))

    def _check_variance(self, scheduler: Scheduler) -> None:
        config = self.unet.config
        found = scheduler.config.get("variance_type")
        if found == "learned":
            raise ValueError(
                f"scheduler has variance_type 'learned', the variance itself; expected {_LEARNED!r}, as the network "
                "predicts a share between two bounds, or one that is fixed"
            )
        if found == _LEARNED and config["out_channels"] == config["in_channels"]:
            raise ValueError(
                f"scheduler has variance_type {_LEARNED!r} and unet out_channels {config['out_channels']}; expected "
                f"{2 * config['in_channels']}, with learned sigma"
            )

    def _size(self, low_res: Tensor) -> tuple[int, int, int]:
        """[C, H, W] of what is made of it."""
        scale = self.unet.config["scale"]
        return low_res.shape[2], scale * low_res.shape[3], scale * low_res.shape[4]

    def _sample(
        self,
        low_res: Tensor,
        x: Tensor,
        scheduler: Scheduler,
        generators: list[torch.Generator],
        on_step: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Frames [N, C, H, W] in [-1, 1] from noise x, by a scheduler that is stepped."""
        unet, channels = self.unet, x.shape[1]
        is_learned = scheduler.config.get("variance_type") == _LEARNED
        options = step_options(scheduler, generators)
        low_res, x = low_res.to(unet.dtype), x * float(scheduler.init_noise_sigma)
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, t)
            timesteps = t.to(x.device, torch.float32).expand(len(x))
            out = unet(scaled.to(unet.dtype), low_res, timesteps).to(x.dtype)
            predicted = out if is_learned else out[:, :channels]
            x = on_step(t, scheduler.step(predicted, t, x, **options).prev_sample)
        return x.clamp(-1, 1)


# As of MMDiffusionPipeline: DiffusionPipeline.from_pretrained looks here for the class that a directory names.
diffusers.SuperResolutionPipeline = SuperResolutionPipeline  # type: ignore[attr-defined]


def _of_frames(generator: torch.Generator, frames: int, *, is_shared: bool) -> list[torch.Generator]:
    """A generator for each frame of a video, all of one seed or each of its own."""
    shape = (1 if is_shared else frames,)
    seeds = torch.randint(2**63 - 1, shape, generator=generator, device=generator.device).expand(frames)
    return [torch.Generator(generator.device).manual_seed(seed) for seed in seeds.tolist()]


def _check_floating(name: str, x: Any) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} is {found}; expected a tensor of floating point")
    if not bool(x.isfinite().all()):
        raise ValueError(f"{name} has values that are not finite; expected numbers")
