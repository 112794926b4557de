# SPDX-License-Identifier: MIT
"""The ops of mmattn as torch modules, in the field's shapes: video [B, F, C, H, W], audio [B, C, T]."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmattn import _checks
from mmattn._layers import convolve, dtype_of, innermost, normalise
from mmattn._library import is_autocast
from mmattn._replay import is_worth_it, replayed
from mmattn._streams import side_by_side
from mmattn.attention import draw_shift, random_shift_attention


class Stream(NamedTuple):
    """The layers of one stream of a cross-attention block."""

    norm: nn.Module
    qkv: nn.Module
    out: nn.Module


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
        check_streams(video, audio, self.channels, self.window, dtype_of(self.video_qkv))
        frames = video.shape[1]
        if shift is None:
            shift = draw(frames, self.window, self.random_shift, generator, video.device)
        return cross_attend(
            Stream(self.video_norm, self.video_qkv, self.video_out),
            Stream(self.audio_norm, self.audio_qkv, self.audio_out),
            video,
            audio,
            num_heads=self.num_heads,
            window=frames if self.window is None else self.window,
            shift=shift,
        )

    @classmethod
    def from_published(cls, block: nn.Module) -> RandomShiftAttention:
        """Make the module that computes what a cross-attention block of the published code does, on its weights.

        The parameters are views of the block's memory: make the optimizer afterwards. Dtypes, device, requires_grad,
        train or eval state, and the groups and eps of the norms are the block's; its hooks are not carried over.

        Raises:
            TypeError: if `block` lacks attributes of the published block, with their names.
            ValueError: if it has something that the published block has not, with its name; see `mmattn.swap`.
        """
        lacking = missing_published_attributes(block)
        if lacking:
            raise TypeError(
                f"block is a {type(block).__name__} without {', '.join(lacking)}; expected a published block"
            )
        refuse_look_alike(block)
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


def cross_attend(
    video_layers: Stream,
    audio_layers: Stream,
    video: Tensor,
    audio: Tensor,
    *,
    num_heads: int,
    window: int,
    shift: int | Tensor,
) -> tuple[Tensor, Tensor]:
    """What `RandomShiftAttention` computes, by layers that are linear or convolutions with kernels of 1."""
    video, audio = video.permute(0, 1, 3, 4, 2), audio.transpose(1, 2)  # channels last; in memory too, if all is well
    if isinstance(shift, Tensor) and is_worth_it(video):
        _checks.window(video.shape[1], window)
        shift = _checks.shift_in_range(shift, video.shape[1] - window, video)
    streams, options = (video_layers, audio_layers), (num_heads, window, shift)
    if type(shift) is not int or not video.is_contiguous() or not audio.is_contiguous():
        video, audio = _cross_attend(streams, video, audio, *options)
    elif torch.is_grad_enabled():
        # Without the projections, so that all parameters of the part have gradients where one stream alone has a loss.
        attending = *video_layers[:2], *audio_layers[:2]
        video, audio = _project(streams, video, audio, replayed(_attend, streams, attending, (video, audio), *options))
    else:
        layers = *video_layers, *audio_layers
        video, audio = replayed(_cross_attend, streams, layers, (video, audio), *options)
    return video.permute(0, 1, 4, 2, 3), audio.transpose(1, 2)


def _cross_attend(streams: tuple[Stream, Stream], video: Tensor, audio: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """The same of tokens, video [B, F, H, W, C] and audio [B, T, C]."""
    return _project(streams, video, audio, _attend(streams, video, audio, *options))


def _attend(
    streams: tuple[Stream, Stream], video: Tensor, audio: Tensor, num_heads: int, window: int, shift: int | Tensor
) -> tuple[Tensor, Tensor]:
    """What is projected of both streams, [B, F*H*W, heads, D] and [B, T, heads, D]."""
    video_layers, audio_layers = streams
    video_tokens, audio_tokens = video.flatten(1, 3).contiguous(), audio.contiguous()
    video_qkv, audio_qkv = side_by_side(
        lambda: _heads(video_tokens, video_layers, num_heads),
        lambda: _heads(audio_tokens, audio_layers, num_heads),
        video.device,
    )
    geometry: Any = {"frames": video.shape[1], "window": window, "shift": shift}
    return random_shift_attention(*video_qkv, *audio_qkv, **geometry)


def _project(
    streams: tuple[Stream, Stream], video: Tensor, audio: Tensor, heads: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    return side_by_side(
        lambda: _add_projection(video, heads[0], streams[0].out),
        lambda: _add_projection(audio, heads[1], streams[1].out),
        video.device,
    )


def draw(
    frames: int, window: int | None, is_random: bool, generator: torch.Generator | None, device: torch.device
) -> int | Tensor:
    """A shift of a call, 0..F-S, or 0 of what is not shifted."""
    if not is_random or window is None:
        return 0
    if generator is None:
        # A tensor: drawing it waits for no device, and neither a CUDA graph nor a compiled graph freezes it.
        return torch.randint(frames - window + 1, (1,), dtype=torch.int32, device=device)
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "generator is given while a checkpoint recomputes this call in backward, where it would draw another "
            "shift; draw it once outside: shift=mmattn.draw_shift(frames, window, generator=generator)"
        )
    return draw_shift(frames, window, generator=generator)


def check_streams(video: Tensor, audio: Tensor, channels: int, window: int | None, own: torch.dtype | None) -> None:
    """Refuse what a cross-attention block of these channels, window and dtype cannot take."""
    for name, stream in (("video", video), ("audio", audio)):
        if not isinstance(stream, Tensor):
            raise TypeError(f"{name} is a {type(stream).__name__}; expected a tensor")
    if video.dim() != 5:
        raise ValueError(f"video has shape {list(video.shape)}; expected five dimensions [B, F, C, H, W]")
    if audio.dim() != 3:
        raise ValueError(f"audio has shape {list(audio.shape)}; expected three dimensions [B, C, T]")
    batch, frames = video.shape[:2]
    if video.shape[2] != channels:
        raise ValueError(f"video has shape {list(video.shape)}; expected {channels} channels in dimension 2")
    if audio.shape[1] != channels:
        raise ValueError(f"audio has shape {list(audio.shape)}; expected {channels} channels in dimension 1")
    if audio.shape[0] != batch:
        raise ValueError(f"audio has shape {list(audio.shape)}; expected batch {batch}, as in video")
    if window is not None and frames < window:
        raise ValueError(f"video has {frames} frames; expected at least window = {window}")
    if not is_autocast(video.device.type):
        if audio.dtype != video.dtype:
            raise TypeError(f"audio has dtype {audio.dtype}; expected {video.dtype}, the dtype of video")
        if own not in (None, video.dtype):
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
        h = convolve(x, self.conv1, norm=self.norm1, activation="silu")
        return project_residual(self, h, x, scale_shift).transpose(1, 2)

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
            _check_vector("emb", emb, x, self.embedding_channels or 0, "E")
            own = dtype_of(self.embedding)
            if own not in (None, emb.dtype) and not is_autocast(emb.device.type):
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
        own = dtype_of(self.conv1)
        if not audio.is_floating_point() or (
            own not in (None, audio.dtype, torch.float32) and not is_autocast(audio.device.type)
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
    return [name for name in PUBLISHED_ATTRIBUTES if not hasattr(module, name)]


def refuse_look_alike(block: Any, place: str = "") -> None:
    """Refuse, by name, a block with the attributes of the published one that computes something else."""
    name = f"{place or 'block'} ({type(block).__name__})"
    prefix = f"{place}." if place else ""
    if "forward" in block.__dict__:
        raise ValueError(f"{name} has a forward of its own, as offloading gives it one; swap before that")
    layers = {path: (kind, rows) for path, kind, rows in _PUBLISHED_LAYERS}
    inner = tuple(f"{path}." for path in layers)
    known = {"", "attention", *layers, *(path.rpartition(".")[0] for path in layers)}
    outer = [path for path, _ in block.named_modules(remove_duplicate=False)]
    members = [
        *((path, "submodule") for path in outer if path not in known),
        *((path, "parameter") for path, _ in block.named_parameters(remove_duplicate=False)),
        *((path, "buffer") for path, _ in block.named_buffers(remove_duplicate=False)),
    ]
    for path, what in members:
        if not path.startswith(inner):
            raise ValueError(f"{name} has a {what} {prefix}{path}, which the published block has not")
    channels = block.channels
    if not isinstance(block.num_heads, int) or block.num_heads < 1 or channels % block.num_heads:
        raise ValueError(f"{name} has num_heads {block.num_heads!r}; expected a divisor of channels = {channels}")
    if not isinstance(block.local_window, int) or block.local_window < 1:
        raise ValueError(f"{name} has local_window {block.local_window!r}; expected an int, at least 1")
    for path, (kind, rows) in layers.items():
        if path not in outer:
            raise ValueError(f"{name} has no {prefix}{path}; expected a {kind.__name__}")
        layer = innermost(block.get_submodule(path))
        if problem := _not_as_published(layer, kind, rows * channels, channels):
            raise ValueError(f"{prefix}{path} of {name} is {problem}, as in the published block")


def _not_as_published(layer: Any, kind: type[nn.Module], rows: int, channels: int) -> str | None:
    """What a layer of a cross-attention block is, and what was expected, unless that is the same."""
    if not isinstance(layer, kind):
        return f"a {type(layer).__name__}; expected a {kind.__name__}"
    if isinstance(layer, nn.GroupNorm):
        if layer.num_channels != channels or layer.weight is None or layer.bias is None:
            return f"{layer}; expected {channels} channels with a weight and a bias"
        return None
    convolution: Any = layer
    sizes = {*convolution.kernel_size, *convolution.stride, convolution.groups}
    if sizes != {1} or not (convolution.padding in ("same", "valid") or set(convolution.padding) == {0}):
        return f"{layer}; expected a kernel of 1 without stride, padding or groups"
    if layer.bias is None:
        return f"{layer}; expected a bias"
    if convolution.weight.shape[:2] != (rows, channels):
        return f"{layer}; expected {rows} channels out of {channels}"
    return None


PUBLISHED_ATTRIBUTES = (
    *("channels", "num_heads", "local_window", "window_shift", "v_norm", "a_norm", "v_qkv", "a_qkv", "attention"),
    *("video_proj_out", "audio_proj_out"),
)
"""By which a cross-attention block of the published code is known."""

# Paths in a cross-attention block, the classes of the layers there, and their outputs in channels of the block.
_PUBLISHED_LAYERS: tuple[tuple[str, type[nn.Module], int], ...] = (
    ("v_norm.GroupNorm", nn.GroupNorm, 1),
    ("a_norm.GroupNorm", nn.GroupNorm, 1),
    ("v_qkv", nn.Conv1d, 3),
    ("a_qkv", nn.Conv1d, 3),
    ("video_proj_out.video_conv", nn.Conv3d, 1),
    ("audio_proj_out.audio_conv", nn.Conv1d, 1),
)


def project_residual(block: Any, h: Tensor, x: Tensor, film: tuple[Tensor, Tensor] | None) -> Tensor:
    """The second half of a residual block, skip(x) + conv2(dropout(silu(norm2(h) * (1 + scale) + shift))).

    `block` has norm2, conv2, skip (None is the identity), dropout and training; h [B, L, Cout] is of no more use.
    """
    residual = x if block.skip is None else convolve(x, block.skip)
    if not (block.training and block.dropout):
        return convolve(
            h, block.conv2, norm=block.norm2, film=film, activation="silu", residual=residual, overwrite_x=True
        )
    # The mask goes between the norm and the projection, which are two calls then.
    scale, shift = film or (None, None)
    y = normalise(h, block.norm2, scale=scale, shift=shift, activation="silu")
    return convolve(functional.dropout(y, block.dropout), block.conv2, residual=residual)


def _heads(tokens: Tensor, layers: Stream, num_heads: int) -> tuple[Tensor, ...]:
    """q, k, v [B, L, H, D] of tokens [B, L, C]: views of one packed projection."""
    packed = convolve(tokens, layers.qkv, size=_size(layers.qkv, tokens.shape[1:-1]), norm=layers.norm)
    return packed.unflatten(-1, (3, num_heads, -1)).unbind(2)


def _add_projection(x: Tensor, heads: Tensor, projection: nn.Module) -> Tensor:
    """x [B, ..., C] plus the projection of heads [B, L, H, D], in the dtype and memory format of x."""
    tokens, size = heads.flatten(2), _size(projection, x.shape[1:-1])
    if x.is_contiguous() and x.dtype == tokens.dtype:
        return convolve(tokens, projection, size=size, residual=x.view_as(tokens)).view_as(x)
    # The first operand of an addition decides the memory format of the sum.
    return x + convolve(tokens, projection, size=size).view_as(x)


def _size(layer: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The dimensions of a stream that its layer's own forward takes: a convolution all of them, a linear layer none."""
    is_linear = type(layer) is nn.Linear or not hasattr(innermost(layer), "kernel_size")
    return () if is_linear else tuple(shape)


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
