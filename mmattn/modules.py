# SPDX-License-Identifier: MIT
"""The ops of mmattn as torch modules, in the field's shapes: video [B, F, C, H, W], audio [B, C, T]."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmattn._library import is_autocast
from mmattn._streams import side_by_side
from mmattn.attention import draw_shift, random_shift_attention
from mmattn.conv import dilated_conv1d
from mmattn.norm import group_norm


class RandomShiftAttention(nn.Module):
    """Residual cross-attention between video and audio over a randomly shifted window (RS-MMA).

    `x + project(attention(qkv(group_norm(x))))` on each stream, the keys and values coming from the other one; see
    `mmattn.random_shift_attention` for the windows. From MM-Diffusion, arXiv 2212.09478, section 3.2. The output
    projections begin at zero, so a new module is the identity.

    Args:
        channels: C of both streams.
        num_heads: number of heads; channels / head_dim if None.
        head_dim: channels of a head, used where num_heads is None.
        window: S, 1..F, in frames; None is all frames of whatever comes.
        random_shift: draw the shift R of each call, uniform over 0..F-S; otherwise R is 0.
        norm_groups: groups of the two group normalisations.

    Raises:
        ValueError: if channels is not a multiple of the heads or of the groups, or an argument is below 1.

    Example:
        >>> block = RandomShiftAttention(128, window=4)
        >>> video, audio = block(torch.randn(1, 16, 128, 8, 8), torch.randn(1, 128, 400))
    """

    # Our submodules under their published names, with the trailing dimensions of the 1x1 convolutions.
    _published: ClassVar[dict[str, tuple[str, int]]] = {
        "video_norm": ("v_norm.GroupNorm", 0),
        "audio_norm": ("a_norm.GroupNorm", 0),
        "video_qkv": ("v_qkv", 1),
        "audio_qkv": ("a_qkv", 1),
        "video_out": ("video_proj_out.video_conv", 3),
        "audio_out": ("audio_proj_out.audio_conv", 1),
    }

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int | None = None,
        head_dim: int = 64,
        window: int | None = 1,
        random_shift: bool = True,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("head_dim", head_dim), ("window", window)):
            if value is not None and value < 1:
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
        video, audio = (
            video.permute(0, 1, 3, 4, 2),
            audio.transpose(1, 2),
        )  # channels last; in memory too, if all is well
        video_tokens = video.reshape(batch, frames * height * width, channels).contiguous()
        audio_tokens = audio.contiguous()
        video_qkv, audio_qkv = side_by_side(
            lambda: self._heads(video_tokens, self.video_norm, self.video_qkv),
            lambda: self._heads(audio_tokens, self.audio_norm, self.audio_qkv),
            video.device,
        )
        video_heads, audio_heads = random_shift_attention(
            *video_qkv,
            *audio_qkv,
            frames=frames,
            window=frames if self.window is None else self.window,
            shift=shift,
        )
        video, audio = side_by_side(
            lambda: _add_projection(video, video_heads, self.video_out),
            lambda: _add_projection(audio, audio_heads, self.audio_out),
            video.device,
        )
        return video.permute(0, 1, 4, 2, 3), audio.transpose(1, 2)

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
        for ours, (theirs, trailing) in cls._published.items():
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
        # Under autocast a module of half precision may be given float32.
        weight, bias = (p if p.dtype == tokens.dtype else p.float() for p in (norm.weight, norm.bias))
        parameters = projection.weight.unsqueeze(-1), projection.bias
        packed = dilated_conv1d(tokens, *parameters, norm=(weight, bias, norm.num_groups), eps=norm.eps)
        return packed.unflatten(-1, (3, self.num_heads, -1)).unbind(2)

    def _draw(self, frames: int, generator: torch.Generator | None, device: torch.device) -> int | Tensor:
        if not self.random_shift or self.window is None:
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
        if self.window is not None and frames < self.window:
            raise ValueError(f"video has {frames} frames; expected at least window = {self.window}")
        if audio.dtype != video.dtype:
            raise TypeError(f"audio has dtype {audio.dtype}; expected {video.dtype}, the dtype of video")
        own = self.video_qkv.weight.dtype
        if video.dtype != own and not is_autocast(video.device.type):
            raise TypeError(f"video has dtype {video.dtype}; expected {own}, the dtype of the module's projections")
        if audio.device != video.device:
            raise ValueError(f"audio is on {audio.device}; expected {video.device}, the device of video")


class DilatedConvBlock(nn.Module):
    """Residual block of a dilated convolution and a projection over audio, with FiLM between them.

    h = conv(silu(norm1(audio))), K = 3; skip(audio) + project(dropout(silu(norm2(h) * (1 + scale) + shift)))

    The audio half of MM-Diffusion's residual block, arXiv 2212.09478, on `mmattn.dilated_conv1d`. The projection begins
    at zero, so a new block is its skip: the identity, or a 1x1 convolution where the width changes. `load_state_dict`
    takes the published key names too (audio_in_layers.*, emb_layers.1.*, audio_out_layers.*, audio_skip_connection.*).

    Args:
        channels: C of the input.
        out_channels: Cout; C if None.
        dilation: distance between the taps of the first convolution, in positions.
        embedding_channels: E; the block then makes the FiLM itself, as Linear(silu(emb)). None: it is given.
        norm_groups: groups of the two group normalisations, a divisor of C and of Cout.
        dropout: share of the values zeroed before the projection, in training alone, 0 <= dropout < 1.

    Raises:
        ValueError: on an argument outside the ranges above.

    Example:
        >>> block = DilatedConvBlock(128, 256, dilation=4, embedding_channels=512)
        >>> audio = block(torch.randn(1, 128, 400), torch.randn(1, 512))
    """

    _published: ClassVar[dict[str, tuple[str, int]]] = {
        "norm1": ("audio_in_layers.0.GroupNorm", 0),
        "conv1": ("audio_in_layers.2.audio_conv", 0),
        "embedding": ("emb_layers.1", 0),
        "norm2": ("audio_out_layers.0.GroupNorm", 0),
        "conv2": ("audio_out_layers.3.audio_conv", 0),
        "skip": ("audio_skip_connection.audio_conv", 0),
    }

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        *,
        dilation: int = 1,
        embedding_channels: int | None = None,
        norm_groups: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        out_channels = channels if out_channels is None else out_channels
        embedding = 1 if embedding_channels is None else embedding_channels
        for name, value in (
            ("channels", channels),
            ("out_channels", out_channels),
            ("dilation", dilation),
            ("embedding_channels", embedding),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        for name, value in (("channels", channels), ("out_channels", out_channels)):
            if norm_groups < 1 or value % norm_groups:
                raise ValueError(f"norm_groups is {norm_groups}; expected a divisor of {name} = {value}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; expected 0 <= dropout < 1")
        self.channels = channels
        self.out_channels = out_channels
        self.dilation = dilation
        self.embedding_channels = embedding_channels
        self.dropout = dropout
        self.norm1 = nn.GroupNorm(norm_groups, channels)
        self.conv1 = nn.Conv1d(channels, out_channels, 3, padding=dilation, dilation=dilation)
        self.embedding = None if embedding_channels is None else nn.Linear(embedding_channels, 2 * out_channels)
        self.norm2 = nn.GroupNorm(norm_groups, out_channels)
        self.conv2 = nn.Conv1d(out_channels, out_channels, 1)
        self.skip = None if out_channels == channels else nn.Conv1d(channels, out_channels, 1)
        for parameter in self.conv2.parameters():
            nn.init.zeros_(parameter)
        self.register_load_state_dict_pre_hook(_rename_published)

    def forward(self, audio: Tensor, film: Tensor | None = None, *, emb: Tensor | None = None) -> Tensor:
        """Convolve the audio.

        Args:
            audio: [B, C, T], any strides, in the dtype of the convolutions, or another where those are float32; under
                autocast any. Channels last in memory, [B, T, C], is read in place; anything else is transposed once.
            film: [B, 2*Cout], scale before shift, in the dtype of audio or float32; None is no FiLM. Of a block with
                embedding_channels the second argument is emb instead.
            emb: [B, E], in the dtype of the embedding's weights, or any under autocast.

        Returns:
            [B, Cout, T] in the dtype of audio, or of autocast: a view of new memory [B, T, Cout], channels last
            whatever the input was.

        Raises:
            ValueError: on a shape other than those above, naming it and what was expected; if film and emb are both
                given, or emb is missing, or is given to a block without embedding_channels.
            TypeError: on a dtype other than those above.
        """
        self._check(audio)
        x = audio.transpose(1, 2)  # [B, T, C]
        is_cast = is_autocast(x.device.type) and x.dtype != torch.float64
        dtype = torch.get_autocast_dtype(x.device.type) if is_cast else x.dtype
        if x.dtype != dtype:
            x = x.to(dtype, memory_format=torch.contiguous_format)  # in one pass, for the convolution and the skip
        elif x.stride(-1) != 1 and self.channels > 1:
            x = x.contiguous()
        scale_shift = self._film(x, film, emb)
        residual = x if self.skip is None else dilated_conv1d(x, self.skip.weight, self.skip.bias)
        h = dilated_conv1d(
            x,
            self.conv1.weight,
            self.conv1.bias,
            dilation=self.dilation,
            norm=(self.norm1.weight, self.norm1.bias, self.norm1.num_groups),
            activation="silu",
            eps=self.norm1.eps,
        )
        if self.training and self.dropout:
            scale, shift = scale_shift or (None, None)
            h = _normalise(h, self.norm2, scale=scale, shift=shift, activation="silu")
            h = functional.dropout(h, self.dropout)
            return dilated_conv1d(h, self.conv2.weight, self.conv2.bias, residual=residual).transpose(1, 2)
        h = dilated_conv1d(
            h,
            self.conv2.weight,
            self.conv2.bias,
            norm=(self.norm2.weight, self.norm2.bias, self.norm2.num_groups),
            film=scale_shift,
            activation="silu",
            residual=residual,
            eps=self.norm2.eps,
            overwrite_x=True,
        )
        return h.transpose(1, 2)

    def extra_repr(self) -> str:
        return f"{self.channels}, {self.out_channels}, dilation={self.dilation}, dropout={self.dropout}"

    def _film(self, x: Tensor, film: Tensor | None, emb: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """(scale, shift), [B, Cout] each, for tokens x."""
        if self.embedding is None:
            if emb is not None:
                raise ValueError("emb is given to a block without embedding_channels; expected film, or neither")
            if film is None:
                return None
            _check_vector("film", film, x, 2 * self.out_channels, "2*Cout")
        else:
            if film is not None and emb is not None:
                raise ValueError("film and emb are both given to a block with embedding_channels; expected emb alone")
            emb = film if emb is None else emb
            if emb is None:
                raise ValueError(
                    f"emb is None; expected [B, E] with E = embedding_channels = {self.embedding_channels}"
                )
            _check_vector("emb", emb, x, self.embedding.in_features, "E")
            own = self.embedding.weight.dtype
            if emb.dtype != own and not is_autocast(emb.device.type):
                raise TypeError(f"emb has dtype {emb.dtype}; expected {own}, the dtype of the embedding's weights")
            film = self.embedding(functional.silu(emb))
        if film.dtype not in (x.dtype, torch.float32):
            if not is_autocast(x.device.type):
                raise TypeError(
                    f"film has dtype {film.dtype}; expected {x.dtype}, the dtype of audio, or torch.float32"
                )
            film = film.to(x.dtype)
        scale, shift = film.chunk(2, -1)
        return scale, shift

    def _check(self, audio: Tensor) -> None:
        if not isinstance(audio, Tensor):
            raise TypeError(f"audio is a {type(audio).__name__}; expected a tensor [B, C, T]")
        if audio.dim() != 3:
            raise ValueError(f"audio has shape {list(audio.shape)}; expected three dimensions [B, C, T]")
        if audio.shape[1] != self.channels:
            raise ValueError(f"audio has shape {list(audio.shape)}; expected {self.channels} channels in dimension 1")
        if audio.shape[2] < 1:
            raise ValueError(f"audio has shape {list(audio.shape)}; expected at least one position")
        own = self.conv1.weight.dtype
        if not audio.is_floating_point() or (
            own not in (audio.dtype, torch.float32) and not is_autocast(audio.device.type)
        ):
            raise TypeError(f"audio has dtype {audio.dtype}; expected {own}, the dtype of the convolutions")


def _check_vector(name: str, value: Tensor, x: Tensor, channels: int, letters: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a tensor [B, {letters}]")
    if tuple(value.shape) != (x.shape[0], channels):
        expected = [x.shape[0], channels]
        raise ValueError(f"{name} has shape {list(value.shape)}; expected [B, {letters}] = {expected}")


def missing_published_attributes(module: nn.Module) -> list[str]:
    """The attributes that a cross-attention block of the published code has and this module does not."""
    names = (
        "channels num_heads local_window window_shift v_norm a_norm v_qkv a_qkv attention video_proj_out audio_proj_out"
    )
    return [name for name in names.split() if not hasattr(module, name)]


def _add_projection(x: Tensor, heads: Tensor, projection: nn.Linear) -> Tensor:
    """x [B, ..., C] plus the projection of heads [B, L, H, D], in the dtype and memory format of x."""
    tokens, weight = heads.flatten(2), projection.weight.unsqueeze(-1)
    if x.is_contiguous() and x.dtype == tokens.dtype:
        return dilated_conv1d(tokens, weight, projection.bias, residual=x.view_as(tokens)).view_as(x)
    # The first operand of an addition decides the memory format of the sum.
    return x + dilated_conv1d(tokens, weight, projection.bias).view_as(x)


def _normalise(tokens: Tensor, norm: nn.GroupNorm, **options: Any) -> Tensor:
    # Under autocast a module of half precision may be given float32.
    weight, bias = (p if p.dtype == tokens.dtype else p.float() for p in (norm.weight, norm.bias))
    return group_norm(tokens, weight, bias, norm.num_groups, eps=norm.eps, **options)


def _rename_published(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename the published keys under `prefix` to ours, in place; torch reports whatever is then missing or unknown."""
    for ours, (theirs, trailing) in module._published.items():
        for name in ("weight", "bias"):
            old, new = f"{prefix}{theirs}.{name}", f"{prefix}{ours}.{name}"
            if old not in state_dict or new in state_dict:
                continue
            value = state_dict.pop(old)
            is_convolution = trailing and name == "weight" and value.shape[2:] == (1,) * trailing
            state_dict[new] = value.flatten(1) if is_convolution else value
