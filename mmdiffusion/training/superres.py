# SPDX-License-Identifier: MIT
"""A super-resolution network in the training loop of the coupled one (MM-Diffusion, arXiv 2212.09478, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from mmdiffusion.data.degrade import degraded, letterboxed
from mmdiffusion.data.items import Item
from mmdiffusion.model.superres import SuperResolutionUNet


class FrameNetwork(nn.Module):
    """A super-resolution network as `train` takes one: of video of one frame, which is given its small image.

    Attributes:
        unet: the network itself, which is trained.
    """

    def __init__(self, unet: SuperResolutionUNet) -> None:
        super().__init__()
        self.unet = unet
        self.config = {"streams": ("video",), "prediction_type": unet.config["prediction_type"]}

    def shift_ranges(self) -> list[int]:
        """It has no windows that shift."""
        return []

    def forward(
        self, video: Tensor, audio: None, timesteps: Tensor, *, low_res: Tensor, shifts: Any = None
    ) -> tuple[Tensor, None]:
        """Of video [B, 1, C, H, W] and low_res [B, C, h, w]: [B, 1, Cout, H, W]."""
        return self.unet(video[:, 0], low_res, timesteps)[:, None], None


class Frames(Dataset[Item]):
    """One frame of each clip, letterboxed to the size of a network; which one follows from the clip's number.

    Args:
        clips: map-style; an item has video [F, 3, H, W] uint8 and a name.
        size: height and width of the frames.
    """

    def __init__(self, clips: Any, size: int) -> None:
        self.clips, self.size = clips, size

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, i: int) -> Item:
        item = self.clips[i]
        at = int(torch.randint(len(item.video), (), generator=torch.Generator().manual_seed(i)))
        frame = letterboxed(item.video[at], self.size)
        return Item(frame[None], torch.zeros(1, 0, dtype=torch.int16), f"frame {at} of {item.name}")


def small_images(batch: Item, generators: Sequence[torch.Generator], scale: int = 4) -> dict[str, Tensor]:
    """What a `FrameNetwork` is given of a batch of `Frames`: low_res [B, 3, h, w] in [-1, 1], degraded as published."""
    pairs = zip(batch.video[:, 0], generators, strict=True)
    small = torch.stack([degraded(image, scale=scale, generator=generator) for image, generator in pairs])
    return {"low_res": small / 127.5 - 1}
