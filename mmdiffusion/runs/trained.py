# SPDX-License-Identifier: MIT
"""What a run trains: the coupled network on clips, or a super-resolution network on frames."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from mmdiffusion import checkpoints
from mmdiffusion.clips import Clip, ClipFormat
from mmdiffusion.data import Item, open_dataset, to_clip
from mmdiffusion.data.items import joined
from mmdiffusion.diffusion.pipelines import MMDiffusionPipeline
from mmdiffusion.diffusion.superres import SuperResolutionPipeline
from mmdiffusion.media import contact_sheet, write_image, write_video
from mmdiffusion.model.superres import SuperResolutionUNet
from mmdiffusion.model.unet import CoupledUNet
from mmdiffusion.runs import published
from mmdiffusion.runs.models import load, load_superres_unet, pipeline_of, read_config, superres_pipeline_of
from mmdiffusion.runs.sample import clip_generators
from mmdiffusion.training.superres import FrameNetwork, Frames, small_images

if TYPE_CHECKING:
    from mmdiffusion.runs.jobs import Train

_SIZE_SHOWN = 128  # pixels of a frame of a preview, at least


class TrainedClips:
    """The coupled network, of one stream or of both.

    Attributes:
        network: what is trained.
        config: its configuration.
        given: of `train`.
    """

    given = None

    def __init__(self, job: Train) -> None:
        self._job = job
        torch.manual_seed(job.seed)
        weights = published.newest(job.resume)[0] if job.resume else job.init
        if weights is None:
            self.network = CoupledUNet(**{**checkpoints.PRESETS[str(job.model_preset)], **read_config(job.config)})
        else:
            # A directory has its own configuration, so that a preset is that of the recipe alone.
            self.network = load(weights, dataclasses.replace(job, preset=None) if weights.is_dir() else job)
            self.network.register_to_config(random_weights=False)  # no longer, once they are trained
        self.config: Mapping[str, Any] = self.network.config

    def data(self) -> Dataset[Item]:
        """The clips of the job."""
        job = self._job
        return open_dataset(job.data, ClipFormat.of(self.config), job.seed, flip=job.flip)

    def enable_gradient_checkpointing(self) -> None:
        self.network.enable_gradient_checkpointing()

    def copy(self) -> nn.Module:
        """A network of the same configuration, for averages."""
        return CoupledUNet.from_config(self.config)

    def pipeline(self, network: Any) -> MMDiffusionPipeline | None:
        """With the network of `copy`; None for one stream, which no pipeline samples."""
        return pipeline_of(network) if len(self.config["streams"]) == 2 else None

    def preview(self, pipeline: Any, data: Any, folder: pathlib.Path, step: int) -> None:
        """Clips with seeds of their own, the same at each step."""
        job = self._job
        generators = clip_generators(job.seed, range(job.preview_clips))
        made: Any = pipeline(job.preview_clips, 20, generator=generators, shift_seed=job.seed)
        clips = [Clip(video.cpu(), audio.cpu()) for video, audio in zip(made.video, made.audio, strict=True)]
        rates: dict[str, Any] = {
            "fps": pipeline.clip_format.frame_rate,
            "sample_rate": pipeline.clip_format.sample_rate,
        }
        name = f"step-{step:08d}"
        titles = [f"step {step}, clip {number}" for number in range(len(clips))]
        write_image(folder / f"{name}.png", contact_sheet(clips, titles, **rates))
        for number, (video, audio) in enumerate(clips):
            assert video is not None
            write_video(folder / f"{name}-{number}.mp4", video, audio, **rates)


class TrainedFrames:
    """A super-resolution network, of single frames and small images of them.

    Attributes:
        network: what is trained, as `train` takes it.
        config: of the SuperResolutionUNet in it.
    """

    def __init__(self, job: Train) -> None:
        self._job = job
        torch.manual_seed(job.seed)
        if job.init is None:
            preset = checkpoints.SUPERRES_PRESETS[str(job.model_preset)]
            unet = SuperResolutionUNet(**{**preset, **read_config(job.config)})
        else:
            unet = load_superres_unet(job.init, job.config)
        self.network = FrameNetwork(unet)
        self.config: Mapping[str, Any] = unet.config

    def data(self) -> Frames:
        """A frame of each clip of the job."""
        return frames_of(self._job.data, self.config, self._job.seed, flip=self._job.flip)

    def given(self, batch: Item, generators: Any) -> dict[str, Tensor]:
        """Of `train`: the small images, degraded as published."""
        return small_images(batch, generators, self.config["scale"])

    def enable_gradient_checkpointing(self) -> None:
        self.network.unet.enable_gradient_checkpointing()

    def copy(self) -> FrameNetwork:
        """A network of the same configuration, for averages."""
        return FrameNetwork(SuperResolutionUNet.from_config(self.config))

    def pipeline(self, network: Any) -> SuperResolutionPipeline:
        """With the network of `copy`."""
        return superres_pipeline_of(network.unet)

    def preview(self, pipeline: Any, data: Any, folder: pathlib.Path, step: int) -> None:
        """A picture with a row of each frame: the small image, that resized bicubically, what is made of it, and the
        frame itself.
        """
        count = min(self._job.preview_clips, len(data))
        batch = joined([data[i] for i in range(count)])
        generators = clip_generators(self._job.seed, range(count))
        low_res = small_images(batch, generators, self.config["scale"])["low_res"]
        made = pipeline(low_res[:, None], generator=generators).video[:, 0].cpu()
        real = to_clip(batch).video[:, 0]  # type: ignore[index]
        size = tuple(real.shape[2:])
        bicubic = functional.interpolate(low_res, size, mode="bicubic").clamp(-1, 1)
        write_image(folder / f"step-{step:08d}.png", compared(low_res, bicubic, made, real))


def compared(low_res: Tensor, *others: Tensor) -> Tensor:
    """A picture [3, H, W] with a row of each image of batches [B, 3, h, w], the first of which are small."""
    size = tuple(others[0].shape[2:])
    columns = [functional.interpolate(low_res, size), *others]
    picture = torch.cat([torch.cat(list(column), 1) for column in columns], 2)
    times = max(1, _SIZE_SHOWN // size[0])
    return picture.repeat_interleave(times, 1).repeat_interleave(times, 2)


def frames_of(source: str, config: Mapping[str, Any], seed: int = 0, *, flip: bool = False) -> Frames:
    """The frames that a super-resolution network of a configuration takes, of `open_dataset`'s sources.

    Raises:
        OSError, ValueError: of `open_dataset`; on a network that is not of colour.
    """
    size, channels = config["image_size"], config["in_channels"]
    if channels != 3:
        raise ValueError(f"in_channels is {channels}; expected 3, of colour")
    # A film's clip begins at each frame. The world is drawn in clips of 1.6 s, in shorter ones it would be another.
    count = 16 if source == "synthetic" else 1
    form = ClipFormat((count, 3, size, size), (1, count * 1600))
    return Frames(open_dataset(source, form, seed, flip=flip), size)
