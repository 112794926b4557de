# SPDX-License-Identifier: MIT
"""The configuration of the coupled U-Net: what its arguments may be, and what the published code makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mmdiffusion.clips import STREAMS

NORM_GROUPS = 32
PREDICTION_TYPES = ("epsilon", "v_prediction")
# By which a level is coarser than the one above it: video in height and width, audio in time.
VIDEO_RATE, AUDIO_RATE = 2, 4

_MAX_BLOCKS = 1000
"""Residual blocks a level, so that a broken configuration is refused instead of built for hours."""
_MAX_PARAMETERS = 4e9
"""Thirteen times the largest released network; 16 GB in float32."""
_MAX_ELEMENTS = 2**31
"""Of one stream of a clip, or of an image; 8 GiB in float32."""


def has_middle_cross_attention(cross_attention_windows: Sequence[int]) -> bool:
    """Whether the published code attends across the streams in the middle: it takes that from the windows alone."""
    return tuple(cross_attention_windows) == (1, 4, 8)


def check_divisible(name: str, what: str, sizes: Sequence[int], divisor: int) -> None:
    """Refuse sizes that the levels cannot halve."""
    if any(size % divisor for size in sizes):
        values = ", ".join(map(str, sizes))
        raise ValueError(
            f"{name} has {what} {values}; expected multiples of {divisor}, the downsampling of the last level"
        )


def check_config(config: Mapping[str, Any]) -> int:
    """Refuse a configuration that no network can have, and return how many parameters it has at least.

    Raises:
        ValueError: naming the argument, its value and what was expected.
    """
    _check_numbers(config)
    _check_attention(config)
    levels = len(config["channel_mult"])
    if "video" in config["streams"]:
        check_divisible("video_size", "height and width", config["video_size"][2:], VIDEO_RATE ** (levels - 1))
    if "audio" in config["streams"]:
        check_divisible("audio_size", "length", config["audio_size"][1:], AUDIO_RATE ** (levels - 1))
    taps = {"video": 9 + 3 + 1, "audio": 3 + 1}  # of the convolutions of a residual block, at its narrower end
    ends = {"video_size": 9 * config["video_size"][1], "audio_size": 3 * config["audio_size"][0]}
    ends |= {"video_out_channels": 27 * config["video_out_channels"]}
    ends |= {"audio_out_channels": 3 * config["audio_out_channels"]}
    ends = {name: count for name, count in ends.items() if name.split("_")[0] in config["streams"]}
    fewest = _check_parameters(config, sum(taps[stream] for stream in config["streams"]), ends)
    _check_elements(config, "video_size", math.prod(config["video_size"]))
    _check_elements(config, "audio_size", math.prod(config["audio_size"]))
    return fewest


def check_image_config(config: Mapping[str, Any]) -> int:
    """Refuse a configuration that no super-resolution network can have, and return the same of it.

    Raises:
        ValueError: naming the argument, its value and what was expected.
    """
    for name in ("channel_mult", "attention_resolutions"):
        if not isinstance(config[name], (list, tuple)):
            _refuse(config, name, "a sequence")
    counts = ("image_size", "in_channels", "model_channels", "out_channels", "num_res_blocks", "num_heads", "scale")
    _check_network(config, counts)
    if config["out_channels"] not in (config["in_channels"], 2 * config["in_channels"]):
        _refuse(config, "out_channels", f"in_channels = {config['in_channels']}, or twice that with learned sigma")
    _check_rates(config, "attention_resolutions")
    widths = _widths(config)
    _check_heads(config, widths, [rate for rate in config["attention_resolutions"] if rate in widths] + [max(widths)])
    divisor = VIDEO_RATE ** (len(widths) - 1)
    check_divisible("image_size", "height and width", [config["image_size"]], divisor)
    if config["image_size"] % config["scale"]:
        _refuse(config, "scale", f"a divisor of image_size = {config['image_size']}")
    fewest = _check_parameters(config, 9 + 9, {"in_channels": 18 * config["in_channels"]})
    _check_elements(config, "image_size", config["in_channels"] * config["image_size"] ** 2)
    return fewest


def refuse_too_large(network: Callable[..., nn.Module], config: Mapping[str, Any], fewest: int) -> None:
    """Refuse a network by its exact number of parameters, built without memory, where there are not `fewest` by far.

    Raises:
        ValueError: naming the number and what was expected.
    """
    if fewest < _MAX_PARAMETERS / 100 or torch.get_default_device().type == "meta":
        return
    with torch.device("meta"):
        made = network(**{name: value for name, value in config.items() if not name.startswith("_")})
    if (count := sum(x.numel() for x in made.parameters())) > _MAX_PARAMETERS:
        expected = f"a network of at most {_MAX_PARAMETERS:.3g} parameters, where this has {count:.3g}"
        _refuse(config, "model_channels", expected)


def refuse_unpublished(config: Mapping[str, Any]) -> None:
    """Refuse a network that published checkpoints cannot describe.

    Raises:
        ValueError: naming what it predicts.
    """
    if config["prediction_type"] != "epsilon":
        _refuse(config, "prediction_type", "'epsilon', as published checkpoints cannot say another")


def _refuse(config: Mapping[str, Any], name: str, expected: str) -> None:
    raise ValueError(f"{name} is {config[name]!r}; expected {expected}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_numbers(config: Mapping[str, Any]) -> None:
    sequences = [name for name in config if name.endswith(("_resolutions", "_windows", "_size"))]
    for name in (*sequences, "channel_mult", "streams"):
        if not isinstance(config[name], (list, tuple)):
            _refuse(config, name, "a sequence")
    for name, letters in (("video_size", "(F, C, H, W)"), ("audio_size", "(C, T)")):
        if len(config[name]) != letters.count(",") + 1 or not all(map(_is_count, config[name])):
            _refuse(config, name, f"{letters}, positive ints")
    counts = ("model_channels", "video_out_channels", "audio_out_channels", "num_res_blocks", "num_heads")
    _check_network(config, (*counts, "sample_rate"))
    if not _is_number(config["frame_rate"]) or config["frame_rate"] <= 0:
        _refuse(config, "frame_rate", "a positive number of frames a second")
    for name in ("middle_cross_attention", "random_weights"):
        if not isinstance(config[name], bool):
            _refuse(config, name, "True or False")
    if tuple(config["streams"]) not in (STREAMS, *((stream,) for stream in STREAMS)):
        _refuse(config, "streams", "('video', 'audio'), ('video',) or ('audio',)")


def _check_network(config: Mapping[str, Any], counts: Sequence[str]) -> None:
    """What every U-Net has, and the names of its positive numbers."""
    for name in counts:
        if not _is_count(config[name]):
            _refuse(config, name, "a positive int")
    if config["num_res_blocks"] > _MAX_BLOCKS:
        _refuse(config, "num_res_blocks", f"at most {_MAX_BLOCKS}")
    if not config["channel_mult"] or any(
        not _is_number(factor) or factor <= 0 or config["model_channels"] * factor % NORM_GROUPS
        for factor in config["channel_mult"]
    ):
        expected = f"factors that make model_channels = {config['model_channels']} multiples of {NORM_GROUPS}"
        _refuse(config, "channel_mult", expected)
    if not _is_number(config["dropout"]) or not 0 <= config["dropout"] < 1:
        _refuse(config, "dropout", "0 <= dropout < 1")
    if config["resblock_updown"] is not True:
        _refuse(config, "resblock_updown", "True: levels are resampled inside residual blocks")
    if config["prediction_type"] not in PREDICTION_TYPES:
        _refuse(config, "prediction_type", f"one of {', '.join(map(repr, PREDICTION_TYPES))}")


def _check_parameters(config: Mapping[str, Any], taps: int, ends: Mapping[str, int]) -> int:
    """Refuse what has too many, and return how many there are at least: of the time embedding, the convolutions of the
    residual blocks, and what is before and behind.

    Args:
        taps: of the convolutions of a residual block.
        ends: taps times channels by the argument that says how many, for each channel of the first level.
    """
    widths = _widths(config).values()
    blocks = taps * (2 * config["num_res_blocks"] + 1) * sum(width**2 for width in widths)
    blocks += 20 * config["model_channels"] ** 2
    if sum(widths) > _MAX_PARAMETERS:  # not squared, since some would be more than a float can be
        _refuse(
            config,
            "channel_mult",
            f"widths, times model_channels = {config['model_channels']}, that a network can have",
        )
    counts = {name: count * next(iter(widths)) for name, count in ends.items()} | {"model_channels": blocks}
    largest = max(counts, key=counts.__getitem__)
    if (total := sum(counts.values())) > _MAX_PARAMETERS:
        others = f" with channel_mult {config['channel_mult']!r} and num_res_blocks {config['num_res_blocks']}"
        expected = f"a network of at most {_MAX_PARAMETERS:.3g} parameters, where this has {float(total):.3g} or more"
        _refuse(config, largest, expected + (others if largest == "model_channels" else ""))
    return total


def _check_elements(config: Mapping[str, Any], name: str, count: int) -> None:
    if count > _MAX_ELEMENTS:
        _refuse(config, name, f"at most {_MAX_ELEMENTS} elements, where these are {count}")


def _check_rates(config: Mapping[str, Any], *names: str) -> None:
    for name in names:
        if any(rate != -1 and (not _is_count(rate) or rate & (rate - 1)) for rate in config[name]):
            _refuse(config, name, "downsamplings 1, 2, 4, ..., or -1 for none")


def _check_heads(config: Mapping[str, Any], widths: Mapping[int, int], attended: Sequence[int]) -> None:
    if any(widths[rate] % config["num_heads"] for rate in attended):
        expected = f"a divisor of the widths with self-attention, {sorted({widths[r] for r in attended})}"
        _refuse(config, "num_heads", expected)


def _widths(config: Mapping[str, Any]) -> dict[int, int]:
    """Channels of the level of each downsampling."""
    return {2**level: int(config["model_channels"] * factor) for level, factor in enumerate(config["channel_mult"])}


def _check_attention(config: Mapping[str, Any]) -> None:
    resolutions = ("cross_attention_resolutions", "video_attention_resolutions", "audio_attention_resolutions")
    _check_rates(config, *resolutions)
    windows, frames = config["cross_attention_windows"], config["video_size"][0]
    if len(windows) != len(config["cross_attention_resolutions"]):
        _refuse(config, "cross_attention_windows", "one window for each of cross_attention_resolutions")
    widths = _widths(config)
    middle = max(widths)
    crossed = {
        rate: s for rate, s in zip(config["cross_attention_resolutions"], windows, strict=True) if rate in widths
    }
    is_coupled = len(config["streams"]) == 2
    if is_coupled and not all(_is_count(window) and window <= frames for window in crossed.values()):
        _refuse(config, "cross_attention_windows", f"1..F = 1..{frames} frames each, with the F of video_size")
    attended = [rate for name in resolutions[1:] for rate in config[name] if rate in widths] + [middle]
    _check_heads(config, widths, attended)
    coupled = [*crossed, *([middle] if is_coupled and config["middle_cross_attention"] else [])]
    channels = config["num_heads"] if config["num_head_channels"] == -1 else config["num_head_channels"]
    if not _is_count(channels) or any(widths[rate] % channels for rate in coupled):
        expected = f"-1, or a divisor of the widths with cross-attention, {sorted({widths[r] for r in coupled})}"
        _refuse(config, "num_head_channels", expected)
