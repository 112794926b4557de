# SPDX-License-Identifier: MIT
"""What a super-resolution network is trained on: images, and small ones of them as a sampler or a codec leaves them."""

from __future__ import annotations

import io

import numpy
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

_PROBABILITY = 0.5  # of noise, and of compression
_LARGEST_DEVIATION = 20.0  # of noise, in 8-bit units
_QUALITIES = (20, 80)  # of JPEG, both ends included


def letterboxed(image: Tensor, size: int) -> Tensor:
    """The whole image in a square with black bars, resized bicubically without antialiasing.

    Args:
        image: [3, H, W] uint8.
        size: height and width of the result.

    Returns:
        [3, size, size] uint8.
    """
    _check(image)
    height, width = image.shape[1:]
    largest = max(height, width)
    h, w = (max(1, side * size // largest) for side in (height, width))
    top, left = (size - h) // 2, (size - w) // 2
    return functional.pad(resized(image, (h, w)), (left, size - w - left, top, size - h - top))


def degraded(image: Tensor, *, scale: int = 4, generator: torch.Generator) -> Tensor:
    """A small image as a super-resolution network must expect it (MM-Diffusion, arXiv 2212.09478, appendix).

    Bicubic, without antialiasing; then with probability 1/2 Gaussian noise of a standard deviation uniform in 0..20
    8-bit units; then with probability 1/2 JPEG of a quality uniform in 20..80.

    Args:
        image: [3, H, W] uint8; H and W multiples of scale.
        generator: on the CPU; what is drawn of it does not depend on what comes of it.

    Returns:
        [3, H/scale, W/scale] uint8.

    Raises:
        ValueError: on another shape or dtype.
    """
    _check(image)
    height, width = image.shape[1:]
    if scale < 1 or height % scale or width % scale:
        raise ValueError(f"image has height and width {height}, {width}; expected multiples of scale = {scale}")
    small = resized(image, (height // scale, width // scale))
    is_noisy, is_compressed, share = torch.rand(3, generator=generator).tolist()
    noise = torch.randn(small.shape, generator=generator)
    quality = int(torch.randint(_QUALITIES[0], _QUALITIES[1] + 1, (), generator=generator))
    if is_noisy < _PROBABILITY:
        small = _to_bytes(small + share * _LARGEST_DEVIATION * noise)
    return _compressed(small, quality) if is_compressed < _PROBABILITY else small


def _check(image: Tensor) -> None:
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"image has shape {list(image.shape)} and dtype {image.dtype}; expected [3, H, W] uint8")


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """An image [C, H, W] uint8 at another height and width, bicubically without antialiasing."""
    if tuple(image.shape[1:]) == size:
        return image
    return _to_bytes(functional.interpolate(image[None].float(), size, mode="bicubic")[0])


def _to_bytes(image: Tensor) -> Tensor:
    return image.round().clamp(0, 255).byte()


def _compressed(image: Tensor, quality: int) -> Tensor:
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
    return torch.from_numpy(numpy.array(Image.open(file))).permute(2, 0, 1).contiguous()
