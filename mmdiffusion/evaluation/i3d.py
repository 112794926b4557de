# SPDX-License-Identifier: MIT
"""Inception-I3D of 400 classes for RGB (Carreira and Zisserman, 2017), whose logits are the features of FVD and KVD."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmdiffusion.evaluation._weights import Source, fill

_SIDE = 224
_POOLS = {"3x3": ((1, 3, 3), (1, 2, 2)), "4a": ((3, 3, 3), (2, 2, 2)), "5a": ((2, 2, 2), (2, 2, 2))}
_WIDTHS = {
    "3b": (64, 96, 128, 16, 32, 32),
    "3c": (128, 128, 192, 32, 96, 64),
    "4b": (192, 96, 208, 16, 48, 64),
    "4c": (160, 112, 224, 24, 64, 64),
    "4d": (128, 128, 256, 24, 64, 64),
    "4e": (112, 144, 288, 32, 64, 64),
    "4f": (256, 160, 320, 32, 128, 128),
    "5b": (256, 160, 320, 32, 128, 128),
    "5c": (384, 192, 384, 48, 128, 128),
}


class I3D(nn.Module):
    """Clips to the 400 logits of I3D, with the published preparation: the features of FVD and KVD.

    In memory the network is channels last, torch's fastest layout for it; `.to(torch.bfloat16)` computes in bf16.
    """

    name = "I3D"
    stream = "video"

    def __init__(self) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = _Unit(3, 64, 7, stride=2)
        self.MaxPool3d_2a_3x3 = _Pool(*_POOLS["3x3"])
        self.Conv3d_2b_1x1 = _Unit(64, 64, 1)
        self.Conv3d_2c_3x3 = _Unit(64, 192, 3)
        self.MaxPool3d_3a_3x3 = _Pool(*_POOLS["3x3"])
        width = 192
        for name, widths in _WIDTHS.items():
            if name == "4b":
                self.MaxPool3d_4a_3x3 = _Pool(*_POOLS["4a"])
            if name == "5b":
                self.MaxPool3d_5a_2x2 = _Pool(*_POOLS["5a"])
            self.add_module(f"Mixed_{name}", _Mixed(width, widths))
            width = widths[0] + widths[2] + widths[4] + widths[5]
        self.logits = _Unit(width, 400, 1, has_norm=False)

    @classmethod
    def from_published(cls, source: Source) -> I3D:
        """The network of a published file, loaded with weights_only, or of its state dict; every key is checked.

        Raises:
            OSError, TypeError, ValueError: if it cannot be read, or its keys or shapes are others.
        """
        made = cls()
        fill(made, source)
        return made.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    @staticmethod
    def prepare(video: Tensor) -> Tensor:
        """[B, F, 3, H, W] in bytes to [B, 3, F, 224, 224] in [-1, 1].

        The shorter side becomes 224, bilinearly without antialiasing, the longer one is rounded up; the centre is cut.
        """
        if video.dim() != 5 or video.shape[2] != 3 or 0 in video.shape or video.dtype != torch.uint8:
            raise ValueError(
                f"video is {str(video.dtype).removeprefix('torch.')} of shape {list(video.shape)}; expected uint8 "
                f"[B, F, 3, H, W]"
            )
        batch, _, _, height, width = video.shape
        short = min(height, width)
        size = -(-height * _SIDE // short), -(-width * _SIDE // short)
        frames = functional.interpolate(video.flatten(0, 1).float() / 255, size, mode="bilinear", align_corners=False)
        top, left = (x - _SIDE for x in size)
        frames = frames[:, :, top // 2 :, left // 2 :][:, :, :_SIDE, :_SIDE]
        return (2 * frames - 1).unflatten(0, (batch, -1)).transpose(1, 2)

    def forward(self, video: Tensor) -> Tensor:
        """Features of clips.

        Args:
            video: [B, F, 3, H, W] uint8; F of 9 or more, which is what the network's last pooling needs.

        Returns:
            [B, 400] float32, averaged over time.

        Raises:
            ValueError: on another shape or dtype.
        """
        x = self.prepare(video)
        if x.shape[2] < 9:
            raise ValueError(f"video has {x.shape[2]} frames; expected 9 or more")
        weight = self.logits.conv3d.weight
        x = x.to(weight.dtype).contiguous(memory_format=torch.channels_last_3d)
        for module in self.children():
            if module is not self.logits:
                x = module(x)
        pooled = functional.avg_pool3d(x.float(), (2, 7, 7), stride=1).to(x.dtype)  # CPUs have no bf16 of it
        return self.logits(pooled).flatten(2).float().mean(2)


class _Unit(nn.Module):
    """Convolution, BatchNorm, ReLU; or the convolution alone, with a bias."""

    def __init__(self, width: int, out: int, kernel: int, stride: int = 1, has_norm: bool = True) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(width, out, kernel, stride, bias=not has_norm)
        self.bn = nn.BatchNorm3d(out, eps=1e-5) if has_norm else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv3d(_padded(x, self.conv3d.kernel_size, self.conv3d.stride))
        return x if self.bn is None else functional.relu(self.bn(x), inplace=True)


class _Pool(nn.Module):
    def __init__(self, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        return functional.max_pool3d(_padded(x, self.kernel, self.stride), self.kernel, self.stride)


class _Mixed(nn.Module):
    """Four branches side by side."""

    def __init__(self, width: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.b0 = _Unit(width, widths[0], 1)
        self.b1a, self.b1b = _Unit(width, widths[1], 1), _Unit(widths[1], widths[2], 3)
        self.b2a, self.b2b = _Unit(width, widths[3], 1), _Unit(widths[3], widths[4], 3)
        self.b3a, self.b3b = _Pool((3, 3, 3), (1, 1, 1)), _Unit(width, widths[5], 1)

    def forward(self, x: Tensor) -> Tensor:
        branches = self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))
        return torch.cat(branches, dim=1)


def _padded(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    """TensorFlow's "same": the size rounded up by the stride, and where the zeros are odd the end has one more."""
    pads: list[int] = []
    for size, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        total = max(k - (size % s or s), 0)
        pads += [total // 2, total - total // 2]
    return functional.pad(x, pads) if any(pads) else x
