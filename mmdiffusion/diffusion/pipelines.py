# SPDX-License-Identifier: MIT
"""Sampling as a diffusers pipeline: video and sound together, one from the other, and longer than a window."""

# No `from __future__ import annotations`: diffusers reads those of the pipeline's constructor.

import contextlib
import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import diffusers
import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

import mmattn
from mmdiffusion.clips import STREAMS, ClipFormat, StreamWindow
from mmdiffusion.diffusion.sampling import PUBLISHED_SCALE, sample
from mmdiffusion.diffusion.schedulers import Scheduler, for_streams, make_scheduler
from mmdiffusion.model.unet import CoupledUNet


@dataclasses.dataclass
class MMDiffusionOutput(BaseOutput):  # type: ignore[misc]
    """Clips, fp32, in [-1, 1]: video [B, F, C, H, W] and audio [B, C, T]; tensors on the model's device, or arrays."""

    video: Tensor | np.ndarray
    audio: Tensor | np.ndarray


class MMDiffusionPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Samples video and sound from a CoupledUNet (MM-Diffusion, arXiv 2212.09478).

    Args:
        unet: the model, of both streams. Where its outputs have twice the channels of its inputs (learned sigma), the
            first half is the noise, and the rest is not used.
        scheduler: any of diffusers, of the network's `prediction_type`; `schedulers.make_scheduler` makes the published
            ones.

    Example:
        >>> pipeline = MMDiffusionPipeline(CoupledUNet(model_channels=64), make_scheduler("dpmsolver++"))
        >>> video, audio = pipeline(num_inference_steps=10, return_dict=False)
    """

    model_cpu_offload_seq = "unet"  # type: ignore[assignment]
    _callback_tensor_inputs: ClassVar = list(STREAMS)

    def __init__(self, unet: CoupledUNet, scheduler: SchedulerMixin) -> None:
        super().__init__()
        if len(unet.config["streams"]) != 2:
            raise ValueError(f"unet has streams {tuple(unet.config['streams'])}; expected ('video', 'audio')")
        for name, channels in (("video", unet.config["video_size"][1]), ("audio", unet.config["audio_size"][0])):
            found = unet.config[f"{name}_out_channels"]
            if found not in (channels, 2 * channels):
                raise ValueError(
                    f"unet has {name}_out_channels {found}; expected {channels}, or {2 * channels} with learned sigma"
                )
        self.register_modules(unet=unet, scheduler=scheduler)
        self._recorded: tuple[Any, list[int], Callable[..., Any]] | None = None

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 20,
        *,
        scheduler: str | Scheduler | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        shift_seed: int = 0,
        audio: Tensor | None = None,
        video: Tensor | None = None,
        guidance: Literal["replacement", "gradient"] = "replacement",
        guidance_scale: float | None = None,
        seconds: float | None = None,
        overlap: float = 0.5,
        output_type: Literal["pt", "np"] = "pt",
        callback_on_step_end: Callable[..., dict[str, Tensor] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = STREAMS,
        return_dict: bool = True,
    ) -> MMDiffusionOutput | tuple[Any, Any]:
        """Sample clips of the sizes in the model's configuration, or longer ones.

        Args:
            batch_size: B.
            num_inference_steps: calls of the model, of each window.
            scheduler: a name of `schedulers.SCHEDULERS`, or an object, in place of the pipeline's own.
            generator: a list of B, one for each sample: then a sample is the same in a batch of any size, but for
                rounding. One for a batch of 1 is that of the sample; of more, each sample in turn draws the seed of its
                own from it. None is torch's default, from which seeds are drawn.
            shift_seed: seed of the shifts of random-shift attention, which the samples of a batch share. They are drawn
                from it alone, so that they are the same in every call.
            audio: [B or 1, C, T], floating point, in [-1, 1]: sound to find the video of, without training. It is
                returned as it is.
            video: [B or 1, F, C, H, W], likewise: video to find the sound of. Not both.
            guidance: how what is given acts (zero-shot transfer in the paper): "replacement", or "gradient" beside it,
                which differentiates the model.
            guidance_scale: weight of the gradient of the paper's squared norm, a sum. None is the published one, 3 of a
                mean, for each sample: 3 over the elements of what is given (`published_scales`), of the published model
                1.2e-4 from audio and 1.5e-5 from video. The published code divides by the batch too.
            seconds: length of the clips, in whole frames, an hour at most; a window of the model if None. Longer ones
                are made of windows, each given the end of what there is as its beginning, by `guidance`. What is given
                in audio or video has this length then, or that of a window if that is longer.
            overlap: share of a window that is the end of the one before; more where the last one would reach beyond
                the clip.
            output_type: "pt" for tensors, "np" for arrays of the same shapes.
            callback_on_step_end: f(pipeline, step, t, {"video": x_t, "audio": x_t}) after each step, counted through
                all windows; it may return a dictionary of those to go on with.
            return_dict: False for a tuple (video, audio).

        Raises:
            ValueError, TypeError: on an argument outside of what is above, naming it, its value and what was expected.
        """
        # Long by its arguments, which are said and checked once, and by a callback that shares the loop's state.
        scheduler = self.check_inputs(
            batch_size,
            num_inference_steps,
            scheduler=scheduler,
            guidance=guidance,
            guidance_scale=guidance_scale,
            seconds=seconds,
            overlap=overlap,
            output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        if audio is not None and video is not None:
            raise ValueError("audio and video are both given; expected one of them, to find the other")
        streams = self.clip_format.streams(batch_size)
        frames, starts = self.clip_format.windows(seconds, overlap)
        given = [
            None if clip is None else self._checked(clip, stream, None if seconds is None else frames)
            for stream, clip in zip(streams, (video, audio), strict=True)
        ]
        generators = generators_of(generator, batch_size)
        is_guided = guidance == "gradient"
        scales = [0.0, 0.0]
        if is_guided:
            of_stream = next((x.name for x, clip in zip(streams, given, strict=True) if clip is not None), None)
            published = self.published_scales(of_stream, seconds, overlap)
            scales = [published.get(x, 0.0) if guidance_scale is None else guidance_scale for x in STREAMS]
        device = self._execution_device
        clips: list[Any] = [torch.empty(stream.resized(0), device=device) for stream in streams]
        schedulers = for_streams(scheduler, num_inference_steps)
        calls = len(starts) * len(schedulers[0].timesteps)
        with frozen(self.unet), self.progress_bar(total=calls) as progress_bar:
            model = self._model(shift_seed, is_recorded=self._is_recorded and not is_guided)
            steps = itertools.count()

            def on_step(_: int, t: Tensor, states: list[Tensor]) -> list[Tensor]:
                progress_bar.update()
                named = dict(zip(STREAMS, states, strict=True))
                if callback_on_step_end is not None:
                    seen = {name: named[name] for name in callback_on_step_end_tensor_inputs}
                    returned = callback_on_step_end(self, next(steps), t, seen) or {}
                    refuse_unknown("callback_on_step_end returned", returned, STREAMS)
                    named.update(returned)
                return [named["video"], named["audio"]]

            for start in starts:
                known = [
                    stream.window(clip if given_clip is None else given_clip, start)
                    for stream, clip, given_clip in zip(streams, clips, given, strict=True)
                ]
                sampled = sample(
                    model,
                    [randn_tensor(stream.shape, generators, device, torch.float32) for stream in streams],
                    copy.deepcopy(schedulers),
                    known=known,
                    generators=generators,
                    guidance_scale=scales,
                    on_step=on_step,
                )
                # A window begins with what is there already.
                clips = [
                    torch.cat([stream.before(clip, start), x.clamp(-1, 1)], stream.axis)
                    for stream, clip, x in zip(streams, clips, sampled, strict=True)
                ]
        self.maybe_free_model_hooks()
        if seconds is not None:
            clips = [stream.before(clip, frames) for stream, clip in zip(streams, clips, strict=True)]
        if output_type == "np":
            clips = [x.cpu().numpy() for x in clips]
        return MMDiffusionOutput(*clips) if return_dict else (clips[0], clips[1])

    def check_inputs(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 20,
        *,
        scheduler: str | Scheduler | None = None,
        guidance: str = "replacement",
        guidance_scale: float | None = None,
        seconds: float | None = None,
        overlap: float = 0.5,
        output_type: str = "pt",
        callback_on_step_end_tensor_inputs: Sequence[str] = STREAMS,
    ) -> Scheduler:
        """Refuse what a call with these arguments would refuse before it begins, and return its scheduler.

        Raises:
            ValueError, TypeError: naming the argument, its value and what was expected.
        """
        if isinstance(scheduler, str):
            scheduler = make_scheduler(scheduler, prediction_type=self.unet.config["prediction_type"])
        scheduler = self.scheduler if scheduler is None else scheduler
        check_count("batch_size", batch_size)
        check_scheduler(scheduler, num_inference_steps, self.unet.config["prediction_type"])
        _check_options(guidance, guidance_scale, output_type)
        refuse_unknown("callback_on_step_end_tensor_inputs is", callback_on_step_end_tensor_inputs, STREAMS)
        self.clip_format.windows(seconds, overlap)
        return scheduler

    def published_scales(
        self, given: str | None, seconds: float | None = None, overlap: float = 0.5
    ) -> dict[str, float]:
        """The `guidance_scale` None of a call, by stream: 3 over the elements of a sample that a window has given.

        Args:
            given: "video" or "audio", or None for neither.
            seconds, overlap: of the call. In a clip of several windows each is given the end of the one before, of both
                streams, as much as the second one is.

        Raises:
            ValueError: on a length or an overlap that the call refuses.
        """
        elements = self.clip_format.given(given, seconds, overlap)
        return {stream: PUBLISHED_SCALE / count for stream, count in elements.items()}

    @property
    def clip_format(self) -> ClipFormat:
        """Sizes and rates of the clips of the model."""
        return ClipFormat.of(self.unet.config)

    @property
    def _is_recorded(self) -> bool:
        """Whether the model runs as a CUDA graph; one that is moved to and fro has no place of its own."""
        return self.device.type == "cuda" and not hasattr(self.unet, "_hf_hook")

    def _checked(self, clip: Tensor, stream: StreamWindow, frames: int | None) -> Tensor:
        """What is given for clips of that many frames, as large as the batch, where and in what they are sampled."""
        window = stream.shape[stream.axis]
        expected = stream.resized(window if frames is None else max(window, frames * stream.unit))
        name = stream.name
        if not isinstance(clip, Tensor) or not clip.is_floating_point():
            found = clip.dtype if isinstance(clip, Tensor) else type(clip).__name__
            raise TypeError(f"{name} is {found}; expected a tensor of floating point")
        if clip.dim() != len(expected) or clip.shape[0] not in (1, expected[0]) or clip.shape[1:] != expected[1:]:
            raise ValueError(
                f"{name} has shape {list(clip.shape)}; expected {list(expected)}, or 1 in place of the batch; seconds "
                "sets the length"
            )
        largest = float(clip.abs().max())
        if not largest <= 1:
            raise ValueError(f"{name} has values up to {largest}; expected -1 to 1")
        return clip.to(self._execution_device, torch.float32).expand(expected)

    def _model(
        self, shift_seed: int, *, is_recorded: bool
    ) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
        """The model of `sampling.sample`; its shifts come from a seed of their own."""
        unet = self.unet
        shift_source = torch.Generator().manual_seed(shift_seed)
        ranges = unet.shift_ranges()

        def model(video: Tensor, audio: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            shifts = [mmattn.draw_shift(largest + 1, 1, generator=shift_source) for largest in ranges]
            timesteps = t.to(video.device, torch.float32).expand(len(video))
            inputs = video.to(unet.dtype), audio.to(unet.dtype), timesteps
            network = self._record(*inputs) if is_recorded else unet
            video_noise, audio_noise = network(*inputs, shifts=shifts)
            return video_noise[:, :, : video.shape[2]], audio_noise[:, : audio.shape[1]]

        return model

    def _record(self, *inputs: Tensor) -> Callable[..., Any]:
        """The model as a CUDA graph, recorded anew where the inputs' shapes or the memory of the parameters changed."""
        shapes = [(x.shape, x.dtype) for x in inputs]
        if self._recorded is None or self._recorded[:2] != (shapes, self._memory()):
            self._recorded = None  # frees the memory of the one before
            network = self.unet.capture(*inputs)
            self._recorded = shapes, self._memory(), network  # which the capture may have moved
        return self._recorded[2]

    def _memory(self) -> list[int]:
        return [x.data_ptr() for x in self.unet.parameters()]


# DiffusionPipeline.from_pretrained looks here for the class that a directory names; its other way runs code out of the
# directory.
diffusers.MMDiffusionPipeline = MMDiffusionPipeline  # type: ignore[attr-defined]


def generators_of(generator: torch.Generator | list[torch.Generator] | None, batch_size: int) -> list[torch.Generator]:
    """One for each sample."""
    if isinstance(generator, torch.Generator) and batch_size == 1:
        return [generator]
    if generator is None or isinstance(generator, torch.Generator):
        device = torch.device("cpu") if generator is None else generator.device
        seeds = [int(torch.randint(2**63 - 1, (), generator=generator, device=device)) for _ in range(batch_size)]
        return [torch.Generator(device).manual_seed(seed) for seed in seeds]
    if not isinstance(generator, list) or not all(isinstance(x, torch.Generator) for x in generator):
        raise TypeError(f"generator is a {type(generator).__name__}; expected a torch.Generator, or a list of them")
    if len(generator) != batch_size:
        raise ValueError(f"generator has {len(generator)} elements; expected batch_size = {batch_size}")
    return generator


@contextlib.contextmanager
def frozen(unet: torch.nn.Module) -> Iterator[None]:
    """Without dropout, and without the gradients of parameters that differentiating by the inputs would compute."""
    was_training = unet.training
    trained = [x for x in unet.parameters() if x.requires_grad]
    unet.eval().requires_grad_(False)
    try:
        yield
    finally:
        unet.train(was_training)
        for x in trained:
            x.requires_grad_()


def check_count(name: str, value: Any) -> None:
    """Refuse what is no int of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}; expected an int of at least 1")


def check_scheduler(scheduler: Scheduler, num_inference_steps: int, prediction_type: str = "epsilon") -> None:
    """Refuse a scheduler of another process than ours, that predicts something else, or has fewer steps."""
    check_count("num_inference_steps", num_inference_steps)
    if not isinstance(scheduler, SchedulerMixin):
        raise TypeError(f"scheduler is a {type(scheduler).__name__}; expected a name, or a scheduler of diffusers")
    config: Any = scheduler.config  # type: ignore[attr-defined]
    kind = type(scheduler).__name__
    predicted, trained = config.get("prediction_type"), config.get("num_train_timesteps", math.inf)
    # Flow matching and EDM give the model other inputs, and take its output for something else.
    if not isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor) or config.get("use_flow_sigmas"):
        raise ValueError(
            f"scheduler is a {kind}, of another process than the model was trained with; expected one with betas, that "
            "adds noise as sqrt(alpha_bar) x + sqrt(1 - alpha_bar) noise"
        )
    if predicted != prediction_type:
        raise ValueError(
            f"scheduler is a {kind} with prediction_type {predicted!r}; expected {prediction_type!r}, "
            "what the model predicts"
        )
    if num_inference_steps > trained:
        raise ValueError(f"num_inference_steps is {num_inference_steps}; expected at most the {trained} of training")


def _check_options(
    guidance: str,
    guidance_scale: float | None,
    output_type: str,
) -> None:
    if guidance_scale is not None and not 0 <= guidance_scale < math.inf:
        raise ValueError(f"guidance_scale is {guidance_scale}; expected 0 or more")
    for name, choice, choices in (
        ("guidance", guidance, ("replacement", "gradient")),
        ("output_type", output_type, ("pt", "np")),
    ):
        if choice not in choices:
            raise ValueError(f"{name} is {choice!r}; expected one of {', '.join(map(repr, choices))}")


def refuse_unknown(what: str, names: Iterable[str], known: Sequence[str]) -> None:
    """Raises ValueError if what a callback asks for or returns has other names."""
    unknown = [name for name in names if name not in known]
    if unknown:
        expected = f"{'some of ' if len(known) > 1 else ''}{', '.join(map(repr, known))}"
        raise ValueError(f"{what} {', '.join(map(repr, unknown))}; expected {expected}")
