# SPDX-License-Identifier: MIT
"""The ops of mmattn as torch modules, in the field's shapes: video [B, F, C, H, W], audio [B, C, T]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmattn._library import is_autocast
from mmattn.attention import draw_shift, random_shift_attention

# Our submodules under the names of the published block, with the trailing dimensions of its 1x1 convolutions.
_PUBLISHED = {
    "video_norm": ("v_norm.GroupNorm", 0),
    "audio_norm": ("a_norm.GroupNorm", 0),
    "video_qkv": ("v_qkv", 1),
    "audio_qkv": ("a_qkv", 1),
    "video_out": ("video_proj_out.video_conv", 3),
    "audio_out": ("audio_proj_out.audio_conv", 1),
}


class RandomShiftAttention(nn.Module):
    """Residual cross-attention between video and audio over a randomly shifted window (RS-MMA).

    `x + project(attention(qkv(group_norm(x))))` on each stream, the keys and values coming from the other one; see
    `mmattn.random_shift_attention` for the windows. From MM-Diffusion, arXiv 2212.09478, section 3.2. The output
    projections begin at zero, so a new module is the identity.

    Args:
        channels: C of both streams.
        num_heads: number of heads; channels / head_dim if None.
        head_dim: channels of a head, used where num_heads is None.
        window: S, 1..F, in frames.
        random_shift: draw the shift R of each call, uniform over 0..F-S; otherwise R is 0.
        norm_groups: groups of the two group normalisations.

    Raises:
        ValueError: if channels is not a multiple of the heads or of the groups, or an argument is below 1.

    Example:
        >>> block = RandomShiftAttention(128, window=4)
        >>> video, audio = block(torch.randn(1, 16, 128, 8, 8), torch.randn(1, 128, 400))
    """

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int | None = None,
        head_dim: int = 64,
        window: int = 1,
        random_shift: bool = True,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("head_dim", head_dim), ("window", window)):
            if value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        if num_heads is None:
            if channels % head_dim:
                raise ValueError(f"channels is {channels}; expected a multiple of head_dim = {head_dim}, or num_heads")
            num_heads = channels // head_dim
        elif num_heads < 1 or channels % num_heads:
            raise ValueError(f"num_heads is {num_heads}; expected a divisor of channels = {channels}")
        if norm_groups < 1 or channels % norm_groups:
            raise ValueError(f"norm_groups is {norm_groups}; expected a divisor of channels = {channels}")
        self.channels = channels
        self.num_heads = num_heads
        self.window = window
        self.random_shift = random_shift
        self.video_norm = nn.GroupNorm(norm_groups, channels)
        self.audio_norm = nn.GroupNorm(norm_groups, channels)
        self.video_qkv = nn.Linear(channels, 3 * channels)  # rows: all q, all k, all v; heads contiguous inside each
        self.audio_qkv = nn.Linear(channels, 3 * channels)
        self.video_out = nn.Linear(channels, channels)
        self.audio_out = nn.Linear(channels, channels)
        for layer in (self.video_out, self.audio_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.register_load_state_dict_pre_hook(_rename_published)

    def forward(
        self,
        video: Tensor,
        audio: Tensor,
        *,
        shift: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend across the streams and add to them.

        Args:
            video: [B, F, C, H, W], any strides. Channels last in memory, [B, F, H, W, C], saves a transposing pass.
            audio: [B, C, T], T >= F, same dtype and device. [B, T, C] in memory saves a transposing pass.
            shift: R, 0..F-S, an int or an integer tensor of one element on the device of video. None: drawn if
                random_shift, else 0.
            generator: source of that draw, at the price of a synchronisation where it lives on an accelerator; not
                under torch.compile. None: drawn on the device of video by torch's default generator, which
                torch.utils.checkpoint replays as long as it preserves the RNG state, as it does by default. Under any
                other checkpointing give the shift: `shift=mmattn.draw_shift(frames, window)`.

        Returns:
            (video, audio) in the shapes and memory formats given.

        Raises:
            ValueError: on a shape, device or shift outside the ranges above, naming it, its value and the range.
            TypeError: on a mix of dtypes, or a shift that is not an integer.
            RuntimeError: if a generator is given where a checkpoint recomputes this call: it cannot be rewound.
        """
        self._check(video, audio)
        batch, frames, channels, height, width = video.shape
        if shift is None:
            shift = self._draw(frames, generator, video.device)
        video_tokens = video.permute(0, 1, 3, 4, 2).reshape(batch, frames * height * width, channels).contiguous()
        audio_tokens = audio.transpose(1, 2).contiguous()
        video_heads, audio_heads = random_shift_attention(
            *self._heads(video_tokens, self.video_norm, self.video_qkv),
            *self._heads(audio_tokens, self.audio_norm, self.audio_qkv),
            frames=frames,
            window=self.window,
            shift=shift,
        )
        video_update = self.video_out(video_heads.flatten(2)).view(batch, frames, height, width, channels)
        audio_update = self.audio_out(audio_heads.flatten(2))
        # The first operand of an addition decides the memory format of the sum.
        return video + video_update.permute(0, 1, 4, 2, 3), audio + audio_update.transpose(1, 2)

    @classmethod
    def from_published(cls, block: nn.Module) -> RandomShiftAttention:
        """Make the module that computes what a cross-attention block of the published code does, on its weights.

        The parameters are views of the block's memory: make the optimizer afterwards. Dtypes, device, requires_grad,
        train or eval state, and the groups and eps of the norms are the block's; its hooks are not carried over.

        Raises:
            TypeError: if `block` lacks attributes of the published block, with their names.
        """
        lacking = missing_published_attributes(block)
        if lacking:
            raise TypeError(
                f"block is a {type(block).__name__} without {', '.join(lacking)}; expected a published block"
            )
        published: Any = block
        norm = published.v_norm.GroupNorm
        with torch.device("meta"):
            module = cls(
                published.channels,
                num_heads=published.num_heads,
                window=published.local_window,
                random_shift=bool(published.window_shift),
                norm_groups=norm.num_groups,
            )
        for ours, (theirs, trailing) in _PUBLISHED.items():
            source: Any = block.get_submodule(theirs)
            target: Any = module.get_submodule(ours)
            for name in ("weight", "bias"):
                parameter = getattr(source, name)
                data = parameter.detach()
                data = data.flatten(1) if trailing and name == "weight" else data
                setattr(target, name, nn.Parameter(data, requires_grad=parameter.requires_grad))
            if isinstance(target, nn.GroupNorm):
                target.num_groups, target.eps = source.num_groups, source.eps
        return module.train(block.training)

    def extra_repr(self) -> str:
        return f"{self.channels}, num_heads={self.num_heads}, window={self.window}, random_shift={self.random_shift}"

    def _heads(self, tokens: Tensor, norm: nn.GroupNorm, projection: nn.Linear) -> tuple[Tensor, ...]:
        """q, k, v [B, L, H, D] of tokens [B, L, C]: views of one packed projection."""
        packed = projection(_group_norm(tokens, norm))
        return packed.unflatten(-1, (3, self.num_heads, -1)).unbind(2)

    def _draw(self, frames: int, generator: torch.Generator | None, device: torch.device) -> int | Tensor:
        if not self.random_shift:
            return 0
        if generator is None:
            # A tensor: drawing it waits for no device, and neither a CUDA graph nor a compiled graph freezes it.
            return torch.randint(frames - self.window + 1, (1,), dtype=torch.int32, device=device)
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "generator is given while a checkpoint recomputes this call in backward, where it would draw another "
                "shift; draw it once outside: shift=mmattn.draw_shift(frames, window, generator=generator)"
            )
        return draw_shift(frames, self.window, generator=generator)

    def _check(self, video: Tensor, audio: Tensor) -> None:
        for name, stream in (("video", video), ("audio", audio)):
            if not isinstance(stream, Tensor):
                raise TypeError(f"{name} is a {type(stream).__name__}; expected a tensor")
        if video.dim() != 5:
            raise ValueError(f"video has shape {list(video.shape)}; expected five dimensions [B, F, C, H, W]")
        if audio.dim() != 3:
            raise ValueError(f"audio has shape {list(audio.shape)}; expected three dimensions [B, C, T]")
        batch, frames, channels = video.shape[:3]
        if channels != self.channels:
            raise ValueError(f"video has shape {list(video.shape)}; expected {self.channels} channels in dimension 2")
        if audio.shape[1] != self.channels:
            raise ValueError(f"audio has shape {list(audio.shape)}; expected {self.channels} channels in dimension 1")
        if audio.shape[0] != batch:
            raise ValueError(f"audio has shape {list(audio.shape)}; expected batch {batch}, as in video")
        if frames < self.window:
            raise ValueError(f"video has {frames} frames; expected at least window = {self.window}")
        if audio.dtype != video.dtype:
            raise TypeError(f"audio has dtype {audio.dtype}; expected {video.dtype}, the dtype of video")
        own = self.video_qkv.weight.dtype
        if video.dtype != own and not is_autocast(video.device.type):
            raise TypeError(f"video has dtype {video.dtype}; expected {own}, the dtype of the module's projections")
        if audio.device != video.device:
            raise ValueError(f"audio is on {audio.device}; expected {video.device}, the device of video")


def missing_published_attributes(module: nn.Module) -> list[str]:
    """The attributes that a cross-attention block of the published code has and this module does not."""
    names = (
        "channels num_heads local_window window_shift v_norm a_norm v_qkv a_qkv attention video_proj_out audio_proj_out"
    )
    return [name for name in names.split() if not hasattr(module, name)]


def _group_norm(tokens: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Group normalisation of tokens [B, L, C] with fp32 statistics over (C/groups, L)."""
    # Not F.group_norm on a channels_last view: on the CPU (torch 2.13) its backward crashes where the input needs no
    # gradient, and it takes the variance as E[x^2] - E[x]^2; on CUDA it copies.
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    groups = norm.num_groups, norm.num_channels // norm.num_groups
    mean = tokens.mean(1, dtype=dtype).unflatten(1, groups).mean(2, keepdim=True)  # [B, groups, 1]
    centered = tokens - mean.expand(-1, *groups).flatten(1).unsqueeze(1)
    variance = centered.square().mean(1).unflatten(1, groups).mean(2, keepdim=True)
    factor = (variance + norm.eps).rsqrt() * norm.weight.to(dtype).view(groups)
    return torch.addcmul(norm.bias.to(dtype), centered, factor.flatten(1).unsqueeze(1)).to(tokens.dtype)


def _rename_published(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename the published keys under `prefix` to ours, in place; torch reports whatever is then missing or unknown."""
    for ours, (theirs, trailing) in _PUBLISHED.items():
        for name in ("weight", "bias"):
            old, new = f"{prefix}{theirs}.{name}", f"{prefix}{ours}.{name}"
            if old not in state_dict or new in state_dict:
                continue
            value = state_dict.pop(old)
            is_convolution = trailing and name == "weight" and value.shape[2:] == (1,) * trailing
            state_dict[new] = value.flatten(1) if is_convolution else value
