# SPDX-License-Identifier: MIT
"""The super-resolution network of MM-Diffusion (arXiv 2212.09478, section 3.1), an ADM image U-Net (arXiv 2105.05233).

Images are tokens in channels-last memory here, videos [B, 1, H, W, C] of one frame, on the layers of the coupled U-Net.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config

# from_pretrained of a pipeline asks the module of a network's class for the base classes it can load.
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401
from torch import Tensor, nn
from torch.nn import functional

import mmattn
from mmattn import _layers
from mmattn._layers import convolve_frames, dtype_of, innermost
from mmattn._library import is_autocast
from mmdiffusion.model.blocks import (
    Resampling,
    SpatialAttention,
    convolve,
    embed_timesteps,
    embedded,
    pool_frames,
    repeat_frames,
    zeroed,
)
from mmdiffusion.model.config import (
    NORM_GROUPS,
    VIDEO_RATE,
    check_divisible,
    check_image_config,
    refuse_too_large,
    refuse_unpublished,
)
from mmdiffusion.model.network import Network

EMBEDDING_FACTOR = 4  # by which the time embedding is wider than its sinusoids


class SuperResolutionUNet(Network):
    """Predicts the noise of an image, and its variance, from the image and a smaller one of the same scene.

    The arguments carry the names of the published configuration, and the defaults are those of the published 64 -> 256
    network. New residual branches and the head begin at zero.

    Args:
        image_size: height and width of the images it is made for; others run as well.
        in_channels: C of an image.
        model_channels: width of the sinusoids of the time embedding and, times channel_mult, of each level. Multiple
            of 32.
        out_channels: of the output; twice in_channels where sigma is learned.
        num_res_blocks: residual blocks of a level of the encoder; the decoder has one more.
        attention_resolutions: downsamplings (1, 2, 4, ...) of the levels with self-attention; those of levels that do
            not exist are ignored, so (-1,) is none. The middle always has it.
        dropout: share of the values zeroed in training before the last convolution of a residual block.
        channel_mult: width of each level, in model_channels; its length is the number of levels.
        num_heads: heads of self-attention.
        use_scale_shift_norm: the time embedding scales and shifts the second norm of a residual block; otherwise it is
            added in front of it.
        resblock_updown: True: levels are resampled inside residual blocks, the one way there is.
        scale: how many times larger an image is than the smaller one it is made from; the network takes any, a pipeline
            needs to know.
        prediction_type: what the first in_channels of the output are: "epsilon", the noise, as in the paper, or
            "v_prediction", sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x (arXiv 2202.00512), of which a short training
            makes better images; where alpha_bar is small the small image says most of it.

    Raises:
        ValueError: on an argument outside the ranges above, naming it, its value and what was expected.

    Example:
        >>> unet = SuperResolutionUNet(model_channels=32, channel_mult=(1, 2), attention_resolutions=(2,))
        >>> noise_and_variance = unet(torch.randn(1, 3, 64, 64), torch.rand(1, 3, 16, 16), timesteps=500)
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        image_size: int = 256,
        in_channels: int = 3,
        model_channels: int = 192,
        out_channels: int = 6,
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (8, 16, 32),
        dropout: float = 0.0,
        channel_mult: Sequence[int] = (1, 1, 2, 2, 4, 4),
        num_heads: int = 4,
        use_scale_shift_norm: bool = True,
        resblock_updown: bool = True,
        scale: int = 4,
        prediction_type: str = "epsilon",
    ) -> None:
        # Long, since width and skips of a block follow from the blocks before it: one walk down and up.
        super().__init__()
        refuse_too_large(SuperResolutionUNet, self.config, check_image_config(self.config))
        widths = [int(model_channels * factor) for factor in channel_mult]
        self.levels = len(widths)
        self.gradient_checkpointing = False
        embedding_channels = EMBEDDING_FACTOR * model_channels

        def residual(channels: int, out_channels: int, resampling: Resampling = None) -> ImageBlock:
            return ImageBlock(
                channels,
                out_channels,
                embedding_channels=embedding_channels,
                resampling=resampling,
                dropout=dropout,
                use_scale_shift_norm=use_scale_shift_norm,
            )

        def attention_at(level: int) -> ImageAttention | None:
            return ImageAttention(widths[level], num_heads) if 2**level in attention_resolutions else None

        self.time_embedding = nn.Sequential(
            nn.Linear(model_channels, embedding_channels),
            nn.SiLU(),
            nn.Linear(embedding_channels, embedding_channels),
        )
        self.first = nn.Conv2d(2 * in_channels, widths[0], 3, padding=1)
        channels = widths[0]
        skips = [channels]
        self.encoder = nn.ModuleList()
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                self.encoder.append(ImageStage(residual(channels, width), attention_at(level)))
                channels = width
                skips.append(channels)
            if level < self.levels - 1:
                self.encoder.append(ImageStage(residual(channels, channels, "down")))
                skips.append(channels)
        middle = ImageStage(residual(channels, channels), ImageAttention(channels, num_heads))
        self.middle = nn.ModuleList([middle, ImageStage(residual(channels, channels))])
        self.decoder = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(num_res_blocks + 1):
                is_last = level > 0 and i == num_res_blocks
                up = residual(width, width, "up") if is_last else None
                self.decoder.append(ImageStage(residual(channels + skips.pop(), width), attention_at(level), up))
                channels = width
        self.head = ImageHead(channels, out_channels)

    def forward(self, x: Tensor, low_res: Tensor, timesteps: Tensor | float) -> Tensor:
        """Predict the noise of images and its variance.

        Args:
            x: [B, C, H, W], any strides, in the dtype of the parameters, or any under autocast. H and W are multiples
                of 2^(levels-1).
            low_res: [B, C, h, w], the same dtype and device, any h and w; it is resized bilinearly to the size of x.
            timesteps: [B], or one for all, those of the training process.

        Returns:
            [B, Cout, H, W], contiguous, in the dtype of the inputs or of autocast: what it predicts and, where Cout is
            2C, the share s of the log-variance in each element, (s+1)/2 log beta_t + (1-s)/2 log posterior variance.

        Raises:
            ValueError: on a shape or device outside the ranges above, naming it, its value and the range.
            TypeError: on a dtype other than those above.
        """
        self._check_inputs(x, low_res)
        device, dtype, batch = x.device, x.dtype, x.shape[0]
        if is_autocast(device.type) and dtype != torch.float64:
            # Once for all: between the layers nothing is in another dtype then.
            dtype = torch.get_autocast_dtype(device.type)
        channels = self.config["model_channels"]
        embedding = embed_timesteps(self.time_embedding, timesteps, channels, batch=batch, device=device, network=self)
        resized = functional.interpolate(low_res, x.shape[2:], mode="bilinear", align_corners=False)
        h = torch.cat([x.to(dtype), resized.to(dtype)], 1).permute(0, 2, 3, 1).contiguous().unsqueeze(1)
        h = convolve_frames(h, self.first)
        skips = [h]
        for stage in self.encoder:
            h = stage(h, embedding, self._run)
            skips.append(h)
        for stage in self.middle:
            h = stage(h, embedding, self._run)
        for stage in self.decoder:
            h = stage(torch.cat([h, skips.pop()], -1), embedding, self._run)
        return self.head(h).squeeze(1).permute(0, 3, 1, 2).contiguous()

    def working_bytes(self, height: int, width: int) -> int:
        """About the memory that one image of that size takes in the network without gradients, beside the parameters.

        The largest sum, over the residual blocks, of the skips that wait and of six tensors that a block works on.
        """
        pixels, largest = height * width, 0
        waiting = [self.first.out_channels * pixels]
        encoder: list[Any] = list(self.encoder)
        decoder: list[Any] = list(self.decoder)
        for stage in encoder:
            pixels //= VIDEO_RATE**2 if stage.block.resampling == "down" else 1
            waiting.append(stage.block.conv2.out_channels * pixels)
        for stage in decoder:
            conv1 = stage.block.conv1
            waiting.pop()
            largest = max(largest, sum(waiting) + (3 * conv1.in_channels + 3 * conv1.out_channels) * pixels)
            pixels *= 1 if stage.up is None else VIDEO_RATE**2
        return largest * self.dtype.itemsize

    @classmethod
    def from_published(
        cls, source: str | os.PathLike[str] | Mapping[str, Tensor], **config: Any
    ) -> SuperResolutionUNet:
        """Make the model of a checkpoint of the published code, in eval mode.

        Widths, levels, blocks, where self-attention is, the time embedding's way in, and the channels of input and
        output are read from the keys and shapes. Nothing in a checkpoint tells the heads, dropout, and the size and
        scale: these come from `config`, and otherwise are the defaults of this class, the published values.

        Args:
            source: a .pt or .safetensors file, or the state dict. Keys that begin with "module." are taken too. The
                tensors are copied, in their own dtype.
            config: arguments of this class, which override all of that.

        Raises:
            ValueError: if keys are missing or unknown or have another shape, naming them, or if the file cannot be read
                as a checkpoint; nothing is loaded then.
            TypeError: if the file holds no state dict.
        """
        from mmdiffusion import checkpoints

        return checkpoints.load_superres(cls, source, config)

    def to_published(self) -> dict[str, Tensor]:
        """The state dict under the published keys and in their shapes; the tensors share the parameters' memory.

        Raises:
            ValueError: if the network does not predict the noise, as published ones do.
        """
        from mmdiffusion import checkpoints

        refuse_unpublished(self.config)
        return checkpoints.state_dict(self)

    def _run(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(function, *args)
        return function(*args)

    def _check_inputs(self, x: Tensor, low_res: Tensor) -> None:
        own = dtype_of(self.time_embedding[0])
        # What is offloaded brings its weights to the device as it is called.
        device = None if own is None else innermost(self.time_embedding[0]).weight.device
        channels = self.config["in_channels"]
        for name, image in (("x", x), ("low_res", low_res)):
            if not isinstance(image, Tensor):
                raise TypeError(f"{name} is a {type(image).__name__}; expected a tensor [B, C, H, W]")
            if image.dim() != 4 or image.shape[1] != channels or 0 in image.shape:
                raise ValueError(
                    f"{name} has shape {list(image.shape)}; expected [B, C, H, W] with C = {channels}, none of them 0"
                )
            if not image.is_floating_point() or (own not in (None, image.dtype) and not is_autocast(image.device.type)):
                raise TypeError(f"{name} has dtype {image.dtype}; expected {own}, the dtype of the parameters")
            if device not in (None, image.device):
                raise ValueError(f"{name} is on {image.device}; expected {device}, the device of the parameters")
        if len(low_res) != len(x):
            raise ValueError(f"low_res has batch {len(low_res)}; expected {len(x)}, as in x")
        check_divisible("x", "height and width", x.shape[2:], VIDEO_RATE ** (self.levels - 1))


class ImageAttention(SpatialAttention):
    """Self-attention of the pixels of images; the rows of qkv are q, k and v of one head after another."""

    @staticmethod
    def _attend(qkv: Tensor, segments: int, num_heads: int) -> Tensor:
        q, k, v = qkv.unflatten(-1, (num_heads, 3, -1)).unbind(3)
        return mmattn.self_attention(q, k, v, segments=segments).flatten(2)


class ImageBlock(nn.Module):
    """Residual block of images under a time embedding.

    h = conv1(resampled(silu(norm1(x)))); skip(resampled x) + conv2(dropout(silu(norm2(h) * (1 + scale) + shift)))

    Args:
        channels, out_channels: of input and output.
        embedding_channels: E of the time embedding.
        resampling: "down", "up" or None.
        dropout: share of the values zeroed in training.
        use_scale_shift_norm: FiLM; otherwise the embedding is added to h before norm2.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        *,
        embedding_channels: int,
        resampling: Resampling = None,
        dropout: float = 0.0,
        use_scale_shift_norm: bool = True,
    ) -> None:
        super().__init__()
        self.resampling = resampling
        self.dropout = dropout
        self.is_film = use_scale_shift_norm
        self.norm1 = nn.GroupNorm(NORM_GROUPS, channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.embedding = nn.Linear(embedding_channels, (2 if use_scale_shift_norm else 1) * out_channels)
        self.norm2 = nn.GroupNorm(NORM_GROUPS, out_channels)
        self.conv2 = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = None if out_channels == channels else nn.Conv1d(channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Tokens [B, 1, H, W, Cout] from x [B, 1, H, W, C]; embedding [B, E] has its SiLU behind it already."""
        if self.resampling is None:
            h = convolve_frames(x, self.conv1, norm=self.norm1, activation="silu")
        else:
            resample = pool_frames if self.resampling == "down" else repeat_frames
            h = _layers.normalise_frames(x, self.norm1, activation="silu")
            h, x = convolve_frames(resample(h), self.conv1), resample(x)
        h, film = embedded(h, self.embedding(embedding), is_film=self.is_film)
        residual = x if self.skip is None else convolve(x, self.skip)
        prologue: dict[str, Any] = {"norm": self.norm2, "film": film, "activation": "silu"}
        if self.training and self.dropout:
            # The mask goes between the norm and the convolution, which are two calls then.
            h, prologue = functional.dropout(_layers.normalise_frames(h, **prologue), self.dropout), {}
        return convolve_frames(h, self.conv2, residual=residual, **prologue)


class ImageStage(nn.Module):
    """A residual block and what follows it at the same step: self-attention, and an up block."""

    def __init__(
        self, block: ImageBlock, attention: ImageAttention | None = None, up: ImageBlock | None = None
    ) -> None:
        super().__init__()
        self.block = block
        self.attention = attention
        self.up = up

    def forward(self, x: Tensor, embedding: Tensor, run: Callable[..., Tensor]) -> Tensor:
        """`run(part, *args)` calls the parts, under a checkpoint or not."""
        x = run(self.block, x, embedding)
        if self.attention is not None:
            x = run(self.attention, x)
        return x if self.up is None else run(self.up, x, embedding)


class ImageHead(nn.Module):
    """conv(silu(norm(x))) with a 3x3 convolution, from tokens [B, 1, H, W, C] to [B, 1, H, W, Cout]."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(NORM_GROUPS, channels)
        self.conv = zeroed(nn.Conv2d(channels, out_channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return convolve_frames(x, self.conv, norm=self.norm, activation="silu")
