# SPDX-License-Identifier: MIT
"""Checkpoints of the published MM-Diffusion code: their keys, their configuration, reading and writing them."""

from __future__ import annotations

import functools
import inspect
import os
import pathlib
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from mmattn import DilatedConvBlock, RandomShiftAttention
from mmdiffusion._files import (
    check_regular,
    read_safetensors,
    safetensors_header,
    save_safetensors,
    save_torch,
    whole_file,
)
from mmdiffusion.clips import FRAME_RATE, SAMPLE_RATE
from mmdiffusion.model.blocks import AudioHead, FirstLayer, ResidualBlock, VideoHead
from mmdiffusion.model.config import has_middle_cross_attention
from mmdiffusion.model.superres import ImageAttention, ImageBlock, ImageHead

if TYPE_CHECKING:
    from mmdiffusion.model.superres import SuperResolutionUNet
    from mmdiffusion.model.unet import CoupledUNet

UNet = TypeVar("UNet", "CoupledUNet", "SuperResolutionUNet")

_LANDSCAPE: dict[str, Any] = {
    "video_size": (16, 3, 64, 64),
    "audio_size": (1, 25600),
    "model_channels": 128,
    "video_out_channels": 3,
    "audio_out_channels": 1,
    "num_res_blocks": 2,
    "cross_attention_resolutions": (2, 4, 8),
    "cross_attention_windows": (1, 4, 8),
    "cross_attention_shift": True,
    "video_attention_resolutions": (2, 4, 8),
    "audio_attention_resolutions": (-1,),
    "dropout": 0.1,
    "channel_mult": (1, 2, 3, 4),
    "num_heads": 4,
    "num_head_channels": 64,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "middle_cross_attention": True,
    "frame_rate": FRAME_RATE,
    "sample_rate": SAMPLE_RATE,
}

# The published code's own, of a model of another shape.
_DEFAULT_HEADS = {"num_heads": 1, "num_head_channels": -1}

# The published 64x64 models; dropout is that of their training.
PRESETS: dict[str, dict[str, Any]] = {
    "landscape": _LANDSCAPE,
    "aist++": _LANDSCAPE,
    # To try things: a clip in a second or two on a CPU.
    "tiny": {
        **_LANDSCAPE,
        "video_size": (16, 3, 32, 32),
        "model_channels": 32,
        "num_res_blocks": 1,
        "num_head_channels": 32,
    },
    # What is trained on the synthetic clips on a CPU. Its windows are not shifted: each frame and the sound of its own
    # time see each other at every step, which a short training needs.
    "small": {
        **_LANDSCAPE,
        "video_size": (16, 3, 16, 16),
        "audio_size": (1, 5120),
        "model_channels": 32,
        "channel_mult": (1, 1, 2, 4),
        "num_res_blocks": 1,
        "cross_attention_resolutions": (2, 4),
        "cross_attention_windows": (2, 4),
        "cross_attention_shift": False,
        "video_attention_resolutions": (-1,),
        "num_head_channels": 32,
        "dropout": 0.0,
        "sample_rate": 3200,
        "prediction_type": "v_prediction",
    },
}

SUPERRES_PRESETS: dict[str, dict[str, Any]] = {
    "landscape": {},  # the published network, which is the default of SuperResolutionUNet
    # What is trained on frames of the synthetic world on a CPU: 16 x 16 to 64 x 64.
    "small": {
        "image_size": 64,
        "model_channels": 32,
        "out_channels": 3,
        "num_res_blocks": 1,
        "attention_resolutions": (-1,),
        "channel_mult": (1, 1, 2),
        "prediction_type": "v_prediction",
    },
}
"""Of super-resolution networks, under the names of the coupled networks whose clips they make larger."""

_RANDOM = "random_weights"  # a checkpoint's note, beside the tensors, that they were never trained
_MAX_LEVELS = 16  # of which each halves height and width

# Our submodules of a module under their published names, with the trailing dimensions of size 1 that their weights have
# and ours have not.
_TABLES: dict[type[nn.Module], dict[str, tuple[str, int]]] = {
    nn.Sequential: {"0": ("0", 0), "2": ("2", 0)},
    FirstLayer: {
        "video_spatial": ("video_conv.video_conv_spatial", 0),
        "video_temporal": ("video_conv.video_conv_temporal", 0),
        "audio": ("audio_conv.audio_conv", 0),
    },
    ResidualBlock: {
        "embedding": DilatedConvBlock._published["embedding"],
        "video.norm1": ("video_in_layers.0.GroupNorm", 0),
        "video.spatial": ("video_in_layers.2.video_conv_spatial", 0),
        "video.temporal": ("video_in_layers.2.video_conv_temporal", 0),
        "video.norm2": ("video_out_layers.0.GroupNorm", 0),
        "video.conv2": ("video_out_layers.3.video_conv", 2),
        "video.skip": ("video_skip_connection.video_conv", 2),
        "video.spatial_attention.norm": ("spatial_attention_block.norm.GroupNorm", 0),
        "video.spatial_attention.qkv": ("spatial_attention_block.qkv", 0),
        "video.spatial_attention.out": ("spatial_attention_block.proj_out", 0),
        "video.temporal_attention.norm": ("temporal_attention_block.norm.GroupNorm", 0),
        "video.temporal_attention.qkv": ("temporal_attention_block.qkv", 0),
        "video.temporal_attention.out": ("temporal_attention_block.proj_out", 0),
        **{f"audio.{ours}": theirs for ours, theirs in DilatedConvBlock._published.items() if ours != "embedding"},
        "audio.attention.norm": ("audio_attention_block.norm.GroupNorm", 0),
        "audio.attention.qkv": ("audio_attention_block.qkv", 0),
        "audio.attention.out": ("audio_attention_block.proj_out", 0),
    },
    RandomShiftAttention: RandomShiftAttention._published,
    VideoHead: {"norm": ("0.GroupNorm", 0), "conv": ("2.video_conv", 0)},
    AudioHead: {"norm": ("0.GroupNorm", 0), "conv": ("2.audio_conv", 0)},
    nn.Conv2d: {"": ("", 0)},
    ImageBlock: {
        "embedding": ("emb_layers.1", 0),
        "norm1": ("in_layers.0", 0),
        "conv1": ("in_layers.2", 0),
        "norm2": ("out_layers.0", 0),
        "conv2": ("out_layers.3", 0),
        "skip": ("skip_connection", 1),
    },
    ImageAttention: {"norm": ("norm", 0), "qkv": ("qkv", 0), "out": ("proj_out", 0)},
    ImageHead: {"norm": ("0", 0), "conv": ("2", 0)},
}


# The published names of the middle, and of the heads by ours.
_MIDDLES = {False: "middle_blocks", True: "middle_block"}
_HEADS = {"video_head": "video_out", "audio_head": "audio_out", "head": "out"}


def _parts(unet: CoupledUNet | SuperResolutionUNet) -> Iterator[tuple[str, nn.Module]]:
    """The modules that have a table, under the published names of their places."""
    yield "time_embed", unet.time_embedding
    yield "input_blocks.0.0", unet.first
    places = [(f"input_blocks.{i}", stage) for i, stage in enumerate(unet.encoder, 1)]
    places += [(f"output_blocks.{i}", stage) for i, stage in enumerate(unet.decoder)]
    for place, stage in places:
        yield from ((f"{place}.{i}", part) for i, part in enumerate(_stage_parts(stage)))
    middle = [part for stage in unet.middle for part in _stage_parts(stage)]
    place = _MIDDLES[isinstance(unet.first, nn.Conv2d)]
    yield from ((f"{place}.{i}", part) for i, part in enumerate(middle))
    for ours, theirs in _HEADS.items():
        head = getattr(unet, ours, None)
        if head is not None:
            yield theirs, head


def _stage_parts(stage: nn.Module) -> list[nn.Module]:
    return [part for part in stage.children() if part is not None]


def _parameters(unet: CoupledUNet | SuperResolutionUNet) -> Iterator[tuple[str, nn.Parameter, tuple[int, ...]]]:
    """Every parameter with its published key and shape."""
    for place, part in _parts(unet):
        modules = dict(part.named_modules())
        for ours, (theirs, trailing) in _TABLES[type(part)].items():
            if ours not in modules:
                continue
            for name, parameter in modules[ours].named_parameters():
                if name not in ("weight", "bias"):
                    raise ValueError(
                        f"a {type(part).__name__} has a parameter {ours}.{name}, unknown to published checkpoints; "
                        "merge adapters (merge_and_unload of peft) and remove parametrizations and pruning first"
                    )
                shape = (*parameter.shape, *(1,) * trailing) if name == "weight" else tuple(parameter.shape)
                yield ".".join(filter(None, (place, theirs, name))), parameter, shape


def state_dict(unet: CoupledUNet | SuperResolutionUNet) -> dict[str, Tensor]:
    """The parameters under the published keys and in their shapes, as views."""
    return {key: parameter.detach().view(shape) for key, parameter, shape in _parameters(unet)}


def load(
    cls: type[CoupledUNet],
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    preset: str | None,
    config: dict[str, Any],
) -> CoupledUNet:
    """See `CoupledUNet.from_published`."""
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}; expected one of {', '.join(map(repr, PRESETS))}")
    tensors, is_random = _tensors(source)
    known = _infer(tensors) if preset is None else PRESETS[preset]
    is_released = all(_LANDSCAPE.get(name, value) == value for name, value in known.items())
    known = {**(_LANDSCAPE if is_released else _DEFAULT_HEADS), **known, _RANDOM: is_random}
    if preset is not None and "cross_attention_windows" in config:
        known["middle_cross_attention"] = has_middle_cross_attention(config["cross_attention_windows"])
    return _made_of(cls, {**known, **config}, tensors)


def is_superres(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is that of a super-resolution network, whose first layer is one convolution of images."""
    return any(key.removeprefix("module.") == "input_blocks.0.0.weight" for key in tensors)


def load_superres(
    cls: type[SuperResolutionUNet],
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    config: dict[str, Any],
) -> SuperResolutionUNet:
    """See `SuperResolutionUNet.from_published`."""
    tensors, _ = _tensors(source)
    return _made_of(cls, {**_infer_superres(tensors), **config}, tensors)


def _tensors(source: str | os.PathLike[str] | Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """The state dict, and whether its parameters were never trained."""
    if isinstance(source, Mapping):
        _check_state_dict(source)
    tensors = source if isinstance(source, Mapping) else read(source)
    return {key.removeprefix("module."): tensor for key, tensor in tensors.items()}, _is_random(tensors)


def _made_of(cls: type[UNet], config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> UNet:
    """The network of a configuration with copies of these tensors, all of which it needs."""
    known = inspect.signature(cls).parameters
    if unknown := sorted(name for name in config if name not in known):
        raise TypeError(f"{cls.__name__} has no argument {unknown[0]!r}; expected some of {', '.join(known)}")
    with torch.device("meta"):
        unet = cls(**config)
    refuse_what_does_not_fit(
        {key: shape for key, _, shape in _parameters(unet)}, {key: tuple(x.shape) for key, x in tensors.items()}
    )
    names = {parameter: name for name, parameter in unet.named_parameters()}
    loaded = {names[p]: tensors[key].detach().clone().view(p.shape) for key, p, _ in _parameters(unet)}
    unet.load_state_dict(loaded, assign=True)
    return unet.eval()


def read(path: str | os.PathLike[str]) -> Mapping[str, Tensor]:
    """The state dict in a .safetensors file, or in a file of torch.save, which may run no code."""
    path = pathlib.Path(path)
    check_regular(path, "a checkpoint on a disk")
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ImportError):
        raise
    except Exception as error:  # of many kinds, for a file that is cut off, or something else
        raise _unreadable(path, error) from error
    try:
        _check_state_dict(tensors)
    except TypeError as error:
        raise TypeError(f"{path} holds {error}") from error
    return tensors


def shapes(path: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in a .safetensors file, which alone of it is read.

    Raises:
        OSError, ValueError: if it cannot be read.
    """
    try:
        return {key: shape for key, (_, shape, *_) in safetensors_header(path).tensors.items()}
    except ValueError as error:
        raise _unreadable(path, error) from error


def _read_safetensors(path: pathlib.Path) -> Mapping[str, Tensor]:
    found, notes = read_safetensors(path)
    return _marked(found) if notes.get(_RANDOM) == "true" else found


def _unreadable(path: pathlib.Path, error: Exception) -> ValueError:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    # Of what a pickle says torch advises to run it, or has a number for a reason.
    if path.suffix != ".safetensors" and not isinstance(error, (RuntimeError, EOFError)):
        reason = "it is broken, or holds more than tensors, which would run code; expected a state dict of tensors"
    return ValueError(f"{path} cannot be read as a checkpoint: {reason}")


def _check_state_dict(tensors: Any) -> None:
    expected = "expected a state dict, names to tensors"
    if not isinstance(tensors, Mapping):
        raise TypeError(f"a {type(tensors).__name__}; {expected}")
    for key, x in tensors.items():
        if not isinstance(key, str) or not isinstance(x, Tensor):
            raise TypeError(f"a {type(x).__name__} under the key {key!r}; {expected}")


def _is_random(tensors: Mapping[str, Tensor]) -> bool:
    notes = getattr(tensors, "_metadata", None)
    of_all = notes.get("") if isinstance(notes, Mapping) else None
    return isinstance(of_all, Mapping) and of_all.get(_RANDOM) is True


def _marked(tensors: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """With the note where torch itself keeps those of a state dict, so that the keys are the published ones."""
    marked = OrderedDict(tensors)
    marked._metadata = {"": {_RANDOM: True}}  # type: ignore[attr-defined]
    return marked


def write(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], *, is_random: bool = False, may_replace: bool = True
) -> None:
    """A state dict as .safetensors, or as a file of torch.save, which is there whole or not at all.

    Args:
        is_random: the file says that its parameters were never trained, which `read` and `load` see.
        may_replace: whether a file that is there goes.

    Raises:
        OSError: if it cannot be written; FileExistsError, if there is one that may not.
    """
    path = pathlib.Path(path)
    with whole_file(path, may_replace=may_replace) as part:
        if path.suffix == ".safetensors":
            metadata = {_RANDOM: "true"} if is_random else None
            save_safetensors({name: x.contiguous() for name, x in tensors.items()}, part, metadata)
        else:
            save_torch(_marked(tensors) if is_random else dict(tensors), part)


def _infer(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What keys and shapes tell of the configuration."""
    size = functools.partial(_size, tensors)
    streams = tuple(stream for stream in ("video", "audio") if f"{stream}_out.0.GroupNorm.weight" in tensors)
    stream = streams[0] if streams else "video"
    starts = _level_starts(tensors)
    model_channels = size("time_embed.0.weight", 1)
    widths = [size(f"{start}.0.{stream}_out_layers.0.GroupNorm.weight", 0) for start in starts.values()]
    embedded = size(f"{starts[1]}.0.emb_layers.1.weight", 0)

    def rates(key: str) -> tuple[int, ...]:
        return tuple(rate for rate, start in starts.items() if f"{start}.{key}" in tensors)

    config: dict[str, Any] = {
        "model_channels": model_channels,
        "channel_mult": _factors(widths, model_channels),
        "num_res_blocks": _decoder_blocks(tensors)[1] - 1,
        "use_scale_shift_norm": embedded == 2 * widths[0],
    }
    if "video" in streams:
        config["video_attention_resolutions"] = rates("0.spatial_attention_block.qkv.weight") or (-1,)
        channels = size("input_blocks.0.0.video_conv.video_conv_spatial.weight", 1)
        frames, _, *height_and_width = _LANDSCAPE["video_size"]
        config["video_size"] = (frames, channels, *height_and_width)
        config["video_out_channels"] = size("video_out.2.video_conv.weight", 0)
    if "audio" in streams:
        config["audio_attention_resolutions"] = rates("0.audio_attention_block.qkv.weight") or (-1,)
        config["audio_size"] = (size("input_blocks.0.0.audio_conv.audio_conv.weight", 1), _LANDSCAPE["audio_size"][1])
        config["audio_out_channels"] = size("audio_out.2.audio_conv.weight", 0)
    if len(streams) == 1:
        return config | {"streams": streams}
    crossed = rates("1.v_qkv.weight")
    config["cross_attention_resolutions"] = crossed
    config["middle_cross_attention"] = "middle_blocks.1.v_qkv.weight" in tensors
    return config if crossed else config | {"cross_attention_windows": ()}


def _infer_superres(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The same of the super-resolution network."""
    size = functools.partial(_size, tensors, network="super-resolution network")
    stacked = size("input_blocks.0.0.weight", 1)
    if stacked % 2:
        shape = list(tensors["input_blocks.0.0.weight"].shape)
        raise ValueError(f"input_blocks.0.0.weight has shape {shape}; expected an even number of input channels")
    model_channels = size("time_embed.0.weight", 1)
    starts = _level_starts(tensors)
    widths = [size(f"{start}.0.out_layers.0.weight", 0) for start in starts.values()]
    embedded = size(f"{starts[1]}.0.emb_layers.1.weight", 0)
    return {
        "in_channels": stacked // 2,
        "model_channels": model_channels,
        "out_channels": size("out.2.weight", 0),
        "num_res_blocks": _decoder_blocks(tensors)[1] - 1,
        "attention_resolutions": tuple(x for x, start in starts.items() if f"{start}.1.qkv.weight" in tensors) or (-1,),
        "channel_mult": _factors(widths, model_channels),
        "use_scale_shift_norm": embedded == 2 * widths[0],
    }


def _size(tensors: Mapping[str, Tensor], key: str, axis: int, *, network: str = "U-Net") -> int:
    if key not in tensors:
        raise ValueError(
            f"the checkpoint has no {key} among its {len(tensors)} keys; expected the published {network}'s"
        )
    shape = tensors[key].shape
    if axis >= len(shape) or shape[axis] == 0:
        raise ValueError(f"{key} has shape {list(shape)}; expected that of the published {network}'s")
    return shape[axis]


def _level_starts(tensors: Mapping[str, Tensor]) -> dict[int, str]:
    """The place of the first residual block of each level of the encoder, by downsampling."""
    blocks, per_level = _decoder_blocks(tensors)
    return {2**level: f"input_blocks.{1 + level * per_level}" for level in range(blocks // per_level)}


def _factors(widths: Sequence[int], model_channels: int) -> tuple[float, ...]:
    factors = [width / model_channels for width in widths]
    return tuple(int(factor) if factor.is_integer() else factor for factor in factors)


def _decoder_blocks(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """The residual blocks of the decoder, and those of a level, behind the last of which comes an up block."""
    decoder = [re.match(r"output_blocks\.(\d{1,9})\.(\d{1,9})\.(emb_layers)?", key) for key in tensors]
    places = sorted({(int(m[1]), int(m[2])) for m in decoder if m and m[3]})
    blocks = 1 + max((i for i, _ in places), default=0)
    per_level = min((i + 1 for i, j in places if j), default=blocks)
    if blocks > max(1, len({i for i, _ in places})):
        raise ValueError(f"the checkpoint has output_blocks up to {blocks - 1}, of which some have no keys")
    if blocks // per_level > _MAX_LEVELS:
        raise ValueError(f"the checkpoint has {blocks // per_level} levels; expected at most {_MAX_LEVELS}")
    return blocks, per_level


def refuse_what_does_not_fit(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse keys and shapes that are not those of a network, naming the first of them."""
    problems = {
        "missing": [key for key in expected if key not in found],
        "unknown": [key for key in found if key not in expected],
        "of another shape": [
            f"{key} {list(found[key])} instead of {list(shape)}"
            for key, shape in expected.items()
            if key in found and found[key] != shape
        ],
    }
    sentences = [
        f"{len(keys)} {what}: {', '.join(keys[:10])}{f' and {len(keys) - 10} more' if len(keys) > 10 else ''}"
        for what, keys in problems.items()
        if keys
    ]
    if sentences:
        raise ValueError(f"the checkpoint's keys do not fit the model; {'; '.join(sentences)}")
