# SPDX-License-Identifier: MIT
"""The coupled audio-video U-Net of MM-Diffusion (arXiv 2212.09478, section 3), on the ops of mmattn."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config

# from_pretrained of a pipeline asks the module of a network's class for the base classes it can load.
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401
from torch import Tensor, nn
from torch._dynamo.eval_frame import skip_code

import mmattn
from mmattn._layers import dtype_of, innermost
from mmattn._library import is_autocast
from mmdiffusion.clips import FRAME_RATE, SAMPLE_RATE, STREAMS
from mmdiffusion.model.blocks import (
    AudioHead,
    FirstLayer,
    ResidualBlock,
    Stage,
    Streams,
    VideoHead,
    embed_timesteps,
)
from mmdiffusion.model.config import (
    AUDIO_RATE,
    NORM_GROUPS,
    VIDEO_RATE,
    check_config,
    check_divisible,
    has_middle_cross_attention,
    refuse_too_large,
    refuse_unpublished,
)
from mmdiffusion.model.network import Network
from mmdiffusion.model.stages import run_stages

_DILATIONS = 10  # the audio dilation goes through 2^0..2^9


class CoupledUNet(Network):
    """Predicts the noise of a video and of its sound together, from both (MM-Diffusion, arXiv 2212.09478, section 3).

    Two U-Nets of the same depth under one time embedding, which attend to each other through random-shift attention.
    The arguments carry the names of the published configuration. New residual branches and heads begin at zero.

    Args:
        video_size: (F, C, H, W) of the clips it is made for; other sizes run as well. C is that of the input.
        audio_size: (C, T) of their sound; C is that of the input.
        model_channels: width of the time embedding and, times channel_mult, of each level. Multiple of 32.
        video_out_channels, audio_out_channels: C of the outputs; twice that of the input where sigma is learned.
        num_res_blocks: residual blocks of a level of the encoder; the decoder has one more.
        cross_attention_resolutions: downsamplings (1, 2, 4, ...) of the levels with random-shift attention; those of
            levels that do not exist are ignored, so (-1,) is none, here and below.
        cross_attention_windows: the window of each, in frames.
        cross_attention_shift: whether the windows are shifted at random.
        video_attention_resolutions: downsamplings of the levels with self-attention of the video, inside each frame
            and then over the frames of each pixel. The middle always has it.
        audio_attention_resolutions: the same for the audio, over its positions.
        dropout: share of the values zeroed in training before the last projection of a residual block.
        channel_mult: width of each level, in model_channels; its length is the number of levels.
        num_heads: heads of self-attention; of random-shift attention too where num_head_channels is -1. The published
            models have 4, and num_head_channels 64; the defaults are those of a configuration that names neither.
        num_head_channels: channels of a head of random-shift attention, or -1.
        use_scale_shift_norm: the time embedding scales and shifts the second norm of a residual block; otherwise it is
            added in front of it.
        resblock_updown: True: levels are resampled inside residual blocks, the one way there is.
        streams: ("video", "audio"), or one of the two: that stream alone, without cross-attention, as in the paper's
            ablation.
        middle_cross_attention: whether the streams attend to each other in the middle, across all frames, unshifted. In
            the published code that follows from the windows: it is so for (1, 4, 8) alone.
        frame_rate: frames a second of the clips it is trained on; the network does not depend on it, what is written
            does.
        sample_rate: positions of audio a second, likewise.
        prediction_type: what the outputs are: "epsilon", the noise, as in the paper, or "v_prediction",
            sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0 (arXiv 2202.00512): near the last t that is -x_0, where an
            error of the noise would be 150 times one of the clip.
        random_weights: says of the parameters that they were never trained; the command writes their sound quietly.

    Raises:
        ValueError: on an argument outside the ranges above, naming it, its value and what was expected.

    Example:
        >>> unet = CoupledUNet(model_channels=64)
        >>> noise = torch.randn(1, 8, 3, 32, 32), torch.randn(1, 1, 2048)
        >>> video, audio = unet(*noise, timesteps=500)
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        video_size: Sequence[int] = (16, 3, 64, 64),
        audio_size: Sequence[int] = (1, 25600),
        model_channels: int = 128,
        video_out_channels: int = 3,
        audio_out_channels: int = 1,
        num_res_blocks: int = 2,
        cross_attention_resolutions: Sequence[int] = (2, 4, 8),
        cross_attention_windows: Sequence[int] = (1, 4, 8),
        cross_attention_shift: bool = True,
        video_attention_resolutions: Sequence[int] = (2, 4, 8),
        audio_attention_resolutions: Sequence[int] = (-1,),
        dropout: float = 0.0,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        num_heads: int = 4,
        num_head_channels: int = 64,
        use_scale_shift_norm: bool = True,
        resblock_updown: bool = True,
        streams: Sequence[str] = STREAMS,
        middle_cross_attention: bool = True,
        frame_rate: float = FRAME_RATE,
        sample_rate: int = SAMPLE_RATE,
        random_weights: bool = False,
        prediction_type: str = "epsilon",
    ) -> None:
        # Long, since width, skips and dilation of a block follow from the blocks before it: one walk down and up.
        super().__init__()
        refuse_too_large(CoupledUNet, self.config, check_config(self.config))
        windows = dict(zip(cross_attention_resolutions, cross_attention_windows, strict=True))
        widths = [int(model_channels * factor) for factor in channel_mult]
        self.levels = len(widths)
        self.gradient_checkpointing = False
        is_coupled = len(streams) == 2

        def residual(channels: int, out_channels: int, counter: int, rate: int = 0, **options: Any) -> ResidualBlock:
            """A block at a downsampling; 0 stands for the resampling ones, which have no attention."""
            return ResidualBlock(
                channels,
                out_channels,
                embedding_channels=model_channels,
                streams=streams,
                dilation=2 ** (counter % _DILATIONS),
                dropout=dropout,
                use_scale_shift_norm=use_scale_shift_norm,
                **{
                    "video_heads": num_heads if rate in video_attention_resolutions else 0,
                    "audio_heads": num_heads if rate in audio_attention_resolutions else 0,
                    **options,
                },
            )

        def cross(channels: int, window: int | None, *, random_shift: bool) -> mmattn.RandomShiftAttention:
            return mmattn.RandomShiftAttention(
                channels,
                num_heads=num_heads if num_head_channels == -1 else None,
                head_dim=max(1, num_head_channels),
                window=window,
                random_shift=random_shift,
                norm_groups=NORM_GROUPS,
            )

        def cross_at(rate: int, channels: int) -> mmattn.RandomShiftAttention | None:
            is_here = is_coupled and rate in windows
            return cross(channels, windows[rate], random_shift=cross_attention_shift) if is_here else None

        self.time_embedding = nn.Sequential(
            nn.Linear(model_channels, model_channels), nn.SiLU(), nn.Linear(model_channels, model_channels)
        )
        self.first = FirstLayer(video_size[1], audio_size[0], widths[0], streams)
        channels, counter = widths[0], 1
        skips = [channels]
        self.encoder = nn.ModuleList()
        for level, width in enumerate(widths):
            rate = 2**level
            for _ in range(num_res_blocks):
                self.encoder.append(Stage(residual(channels, width, counter, rate), cross_at(rate, width)))
                channels, counter = width, counter + 1
                skips.append(channels)
            if level < self.levels - 1:
                self.encoder.append(Stage(residual(channels, channels, counter, resampling="down")))
                counter += 1
                skips.append(channels)
        heads = {"video_heads": num_heads, "audio_heads": num_heads}
        has_cross = is_coupled and middle_cross_attention
        full = cross(channels, None, random_shift=False) if has_cross else None
        self.middle = nn.ModuleList(
            [
                Stage(residual(channels, channels, counter, **heads), full),
                Stage(residual(channels, channels, counter, **heads)),
            ]
        )
        self.decoder = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            rate = 2**level
            for i in range(num_res_blocks + 1):
                counter -= 1
                block = residual(channels + skips.pop(), width, counter, rate)
                is_last = level > 0 and i == num_res_blocks
                up = residual(width, width, counter - 1, resampling="up") if is_last else None
                self.decoder.append(Stage(block, cross_at(rate, width), up))
                channels = width
        self.video_head = VideoHead(channels, video_out_channels) if "video" in streams else None
        self.audio_head = AudioHead(channels, audio_out_channels) if "audio" in streams else None

    def forward(
        self,
        video: Tensor | None,
        audio: Tensor | None,
        timesteps: Tensor | float,
        *,
        shifts: Sequence[int | Tensor] | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Streams:
        """Predict the noise of both streams.

        Args:
            video: [B, F, C, H, W], any strides, in the dtype of the parameters, or any under autocast; None where the
                model has no video. H and W are multiples of 2^(levels-1), F is at least the largest window.
            audio: [B, C, T], the same dtype and device; None where the model has no audio. T is a multiple of
                4^(levels-1), and need not be one of F.
            timesteps: [B], or one for all.
            shifts: one shift R for each random-shift block that shifts, in the order in which they run: ints or
                integer tensors of one element, or a tensor of them; 0..F-S each, see `shift_ranges`. None: drawn here,
                before anything a checkpoint computes again.
            generator: source of that draw, read on the host: in front of the graph where torch.compile is given the
                model, also with fullgraph=True; a larger function that is compiled draws shifts itself. None: torch's
                default generator on the device of video, without a synchronisation, as CUDA graphs need it.

        Returns:
            (video [B, F, Cout, H, W], audio [B, Cout, T]), contiguous, None for the stream that is not there, in the
            dtype of the inputs or of autocast.

        Raises:
            ValueError: on a shape, device, or shift outside the ranges above, naming it, its value and the range.
            TypeError: on a dtype other than those above.
        """
        if generator is not None and shifts is None:
            shifts = self._draw_on_the_host(video, audio, generator)
        return self._predict(video, audio, timesteps, shifts)

    # torch.compile has no way to take a generator into a graph, so it begins behind the frame of forward. Where a
    # larger function is compiled, forward is traced like all else.
    skip_code(forward.__code__)

    @torch.compiler.disable
    def _draw_on_the_host(self, video: Tensor | None, audio: Tensor | None, generator: torch.Generator) -> Tensor:
        self._check_inputs(video, audio)
        ranges = self.shift_ranges(0 if video is None else video.shape[1])
        drawn = [mmattn.draw_shift(largest + 1, 1, generator=generator) for largest in ranges]
        # A tensor, so that one graph takes all of them.
        return torch.tensor(drawn, dtype=torch.int32, device=None if video is None else video.device)

    def _predict(
        self,
        video: Tensor | None,
        audio: Tensor | None,
        timesteps: Tensor | float,
        shifts: Sequence[int | Tensor] | Tensor | None,
    ) -> Streams:
        self._check_inputs(video, audio)
        given = [x for x in (video, audio) if x is not None]
        batch, device, dtype = given[0].shape[0], given[0].device, given[0].dtype
        if is_autocast(device.type) and dtype != torch.float64:
            # Once for all: between the layers nothing is in another dtype then.
            dtype = torch.get_autocast_dtype(device.type)
        channels = self.config["model_channels"]
        embedding = embed_timesteps(self.time_embedding, timesteps, channels, batch=batch, device=device, network=self)
        if video is not None:
            video = video.to(dtype).permute(0, 1, 3, 4, 2).contiguous()
        if audio is not None:
            audio = audio.to(dtype).transpose(1, 2).contiguous()
        frames = 0 if video is None else video.shape[1]
        shifts = self._shifts(frames, shifts, device)
        video, audio = self.first(video, audio)
        video, audio = run_stages(self, video, audio, embedding, shifts, self._run)
        if video is not None and self.video_head is not None:
            video = self.video_head(video).permute(0, 1, 4, 2, 3).contiguous()
        if audio is not None and self.audio_head is not None:
            audio = self.audio_head(audio).transpose(1, 2).contiguous()
        return video, audio

    def shift_ranges(self, frames: int | None = None) -> list[int]:
        """The largest shift, F-S, of each random-shift block that shifts, in the order in which they run.

        Args:
            frames: F; that of video_size if None.

        Raises:
            ValueError: if a window is longer.
        """
        frames = self.config["video_size"][0] if frames is None else frames
        windows = [cross.window or frames for cross in self._shifting()]
        if windows and frames < max(windows):
            raise ValueError(f"video has {frames} frames; expected at least the largest window, {max(windows)}")
        return [frames - window for window in windows]

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **options: Any) -> Any:
        """As of diffusers; a configuration saved before middle_cross_attention was an argument follows its windows."""
        if isinstance(config, Mapping) and "middle_cross_attention" not in config:
            windows = config.get("cross_attention_windows")
            if windows is not None:
                config = {**config, "middle_cross_attention": has_middle_cross_attention(windows)}
        return super().from_config(config, return_unused_kwargs, **options)

    @classmethod
    def from_published(
        cls,
        source: str | os.PathLike[str] | Mapping[str, Tensor],
        *,
        preset: str | None = None,
        **config: Any,
    ) -> CoupledUNet:
        """Make the model of a checkpoint of the published code, in eval mode.

        Widths, levels, blocks, where attention is, the time embedding's way in, channels of inputs and outputs, and a
        missing stream are read from the keys and shapes. Nothing in a checkpoint tells the heads, the windows and
        whether they shift, the sizes, the rates, or dropout: these come from `config`, then `preset`, then, for a
        network of the published shape, the published values; otherwise they are the published code's defaults for
        heads, which are num_heads = 1 and num_head_channels = -1, and this class's for the rest.

        Args:
            source: a .pt or .safetensors file, or the state dict. Keys that begin with "module." are taken too. The
                tensors are copied, in their own dtype.
            preset: "landscape" or "aist++", the published 64x64 models; both are one configuration, and nothing is
                inferred then.
            config: arguments of this class, which override all of that.

        Raises:
            ValueError: if keys are missing or unknown or have another shape, naming them, or if the file cannot be read
                as a checkpoint; nothing is loaded then.
            TypeError: if the file holds no state dict.
        """
        from mmdiffusion import checkpoints

        return checkpoints.load(cls, source, preset, config)

    def to_published(self) -> dict[str, Tensor]:
        """The state dict under the published keys and in their shapes; the tensors share the parameters' memory.

        Raises:
            ValueError: if the network does not predict the noise, as published ones do.
        """
        from mmdiffusion import checkpoints

        refuse_unpublished(self.config)
        return checkpoints.state_dict(self)

    def capture(
        self, video: Tensor | None, audio: Tensor | None, timesteps: Tensor
    ) -> Callable[..., tuple[Tensor | None, Tensor | None]]:
        """Record the network as one CUDA graph for inputs of these shapes and dtypes, on these parameters.

        The weights of the convolutions are laid out anew in memory first, channels last, which changes nothing but
        their strides: the kernels then read them in place.

        Args:
            video, audio, timesteps: as of `forward`; timesteps [B] on the device.

        Returns:
            A function (video, audio, timesteps, shifts=None) -> (video, audio) that replays it: without gradients, in
            the train or eval state of now. Shifts are as of `forward`, and drawn anew by every call where None.

        Raises:
            RuntimeError: if the model or the inputs are not on a CUDA device.
        """
        # Long, since the replay shares all that the recording made: static inputs, shifts, outputs.
        device = next(self.parameters()).device
        tensors = [x for x in (video, audio, timesteps) if x is not None]
        if device.type != "cuda" or any(x.device != device for x in tensors):
            where = ", ".join(sorted({str(x.device) for x in tensors} | {str(device)}))
            raise RuntimeError(f"model and inputs are on {where}; expected all on one CUDA device to capture a graph")
        _lay_out_weights(self)
        statics = [None if x is None else x.clone() for x in (video, audio, timesteps)]
        ranges = self.shift_ranges(0 if video is None else video.shape[1])
        static_shifts = torch.zeros(len(ranges), dtype=torch.int32, device=device)
        # Autocast keeps casts of the parameters, which a graph must not find there: they live in nobody's pool.
        dtype, enabled = torch.get_autocast_dtype("cuda"), is_autocast("cuda")
        stream = torch.cuda.Stream(device)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.device(device), torch.autocast("cuda", dtype, enabled, cache_enabled=False):
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(3):  # what compiles, tunes and allocates at first use does so before the recording
                    self(*statics, shifts=static_shifts)
            torch.cuda.current_stream(device).wait_stream(stream)
            with torch.cuda.graph(graph):
                outputs = self(*statics, shifts=static_shifts)

        @torch.no_grad()
        def replay(
            video: Tensor | None,
            audio: Tensor | None,
            timesteps: Tensor,
            shifts: Sequence[int | Tensor] | Tensor | None = None,
        ) -> Streams:
            for name, static, x in zip(
                ("video", "audio", "timesteps"), statics, (video, audio, timesteps), strict=True
            ):
                found, expected = (None if y is None else tuple(y.shape) for y in (x, static))
                if found != expected:
                    raise ValueError(f"{name} has shape {found}; expected {expected}, as captured")
                if x is not None and static is not None:
                    static.copy_(x)
            frames = 0 if video is None else video.shape[1]
            for static, shift in zip(static_shifts, self._shifts(frames, shifts, device), strict=True):
                static.copy_(shift.view(())) if isinstance(shift, Tensor) else static.fill_(shift)
            graph.replay()
            video_out, audio_out = (None if x is None else x.clone() for x in outputs)
            return video_out, audio_out

        return replay

    def _run(self, function: Callable[..., Streams], *args: Any) -> Streams:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(function, *args)
        return function(*args)

    def _shifting(self) -> list[mmattn.RandomShiftAttention]:
        stages: list[Any] = [*self.encoder, *self.decoder]
        return [stage.cross for stage in stages if stage.cross is not None and stage.cross.random_shift]

    def _shifts(self, frames: int, shifts: Any, device: torch.device) -> list[int | Tensor]:
        ranges = self.shift_ranges(frames)
        if shifts is None:
            return [torch.randint(largest + 1, (1,), dtype=torch.int32, device=device) for largest in ranges]
        given = list(shifts.unbind() if isinstance(shifts, Tensor) else shifts)
        if len(given) != len(ranges):
            raise ValueError(
                f"shifts has {len(given)} elements; expected {len(ranges)}, one for each block that shifts"
            )
        for i, (shift, largest) in enumerate(zip(given, ranges, strict=True)):
            if isinstance(shift, int) and not 0 <= shift <= largest:
                raise ValueError(f"shifts[{i}] is {shift}; expected 0..F-S = 0..{largest}")
        return given

    def _check_inputs(self, video: Tensor | None, audio: Tensor | None) -> None:
        expected_sizes = {"video": self.config["video_size"][1], "audio": self.config["audio_size"][0]}
        own = dtype_of(self.time_embedding[0])
        # What is offloaded brings its weights to the device as it is called.
        device = None if own is None else innermost(self.time_embedding[0]).weight.device
        reference: Tensor | None = None
        for name, x, letters in (("video", video, "[B, F, C, H, W]"), ("audio", audio, "[B, C, T]")):
            if name not in self.config["streams"]:
                if x is not None:
                    raise ValueError(
                        f"{name} is given to a model with streams = {self.config['streams']}; expected None"
                    )
                continue
            if not isinstance(x, Tensor):
                raise TypeError(f"{name} is a {type(x).__name__}; expected a tensor {letters}")
            at, channels = (2, expected_sizes[name]) if name == "video" else (1, expected_sizes[name])
            if x.dim() != letters.count(",") + 1 or x.shape[at] != channels or 0 in x.shape:
                raise ValueError(
                    f"{name} has shape {list(x.shape)}; expected {letters} with C = {channels}, none of them 0"
                )
            is_cast = is_autocast(x.device.type)
            if not x.is_floating_point() or (own not in (None, x.dtype) and not is_cast):
                raise TypeError(f"{name} has dtype {x.dtype}; expected {own}, the dtype of the parameters")
            if device not in (None, x.device):
                raise ValueError(f"{name} is on {x.device}; expected {device}, the device of the parameters")
            if reference is not None and (
                x.shape[0] != reference.shape[0] or (x.dtype != reference.dtype and not is_cast)
            ):
                raise ValueError(
                    f"audio has batch {x.shape[0]} and dtype {x.dtype}; expected {reference.shape[0]} and "
                    f"{reference.dtype}, as in video"
                )
            reference = x
        if video is not None:
            check_divisible("video", "height and width", video.shape[3:], VIDEO_RATE ** (self.levels - 1))
        if audio is not None:
            check_divisible("audio", "length", audio.shape[2:], AUDIO_RATE ** (self.levels - 1))
        if video is not None and audio is not None:
            coarsest = audio.shape[2] // AUDIO_RATE ** (self.levels - 1)
            if coarsest < video.shape[1]:
                raise ValueError(
                    f"audio has {audio.shape[2]} positions, {coarsest} at the coarsest level; expected at least the "
                    f"{video.shape[1]} of the frames there"
                )


def _lay_out_weights(model: nn.Module) -> None:
    """Weights of convolutions channels last in memory, where kernels on a GPU read them in place."""
    for layer in model.modules():
        if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
            layer.weight.data = layer.weight.data.movedim(1, -1).contiguous().movedim(-1, 1)
