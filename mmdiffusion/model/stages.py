# SPDX-License-Identifier: MIT
"""The stages of the coupled U-Net, one after another; or as few calls of the CPU extension as possible, where the
kernels take less time than Python around them: see `mmattn._replay`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmattn import _checks
from mmattn._replay import Network, is_worth_it, network_of, replayed_network
from mmdiffusion.model.blocks import AudioBlock, ResidualBlock, Stage, Streams, VideoBlock, concatenate, cross_attend

Run = Callable[..., Streams]  # of a function or module and its arguments


class Lists(NamedTuple):
    """The stages of a network."""

    encoder: nn.ModuleList
    middle: nn.ModuleList
    decoder: nn.ModuleList

    def stages(self) -> list[Any]:
        return [*self.encoder, *self.middle, *self.decoder]


def run_stages(
    unet: Any, video: Tensor | None, audio: Tensor | None, embedding: Tensor, shifts: Sequence[int | Tensor], run: Run
) -> Streams:
    """Tokens behind the decoder of a CoupledUNet from those of its first layer.

    Args:
        unet: has the lists of stages encoder, middle and decoder.
        video, audio: [B, F, H, W, C] and [B, T, C].
        embedding: [B, E] of the time.
        shifts: of the random-shift attentions that shift, in their order.
        run: calls the parts of a stage, under a checkpoint or not.
    """
    lists = Lists(unet.encoder, unet.middle, unet.decoder)
    is_checkpointed = unet.gradient_checkpointing and torch.is_grad_enabled()
    if video is not None and audio is not None and not is_checkpointed:
        network = network_of(unet, lists, video) if is_worth_it(audio) else None
        numbers = None if network is None or not _is_usual(lists) else _numbers(lists, shifts, video)
        if network is not None and numbers is not None:
            found = _AtOnce(lists, network, numbers, embedding).run(video, audio)
            if found is not None:
                return found
    remaining = iter(shifts)
    video, audio, skips = _encode(lists, video, audio, embedding, remaining, run)
    return _decode(lists.decoder, video, audio, skips, embedding, remaining, run)


def _is_usual(lists: Lists) -> bool:
    """Whether it has the stages of a U-Net, none of which draws random numbers, whose order is that of the blocks."""
    stages = lists.stages()
    if any(type(stage) is not Stage for stage in stages):
        return False
    for block in _blocks(stages):
        if type(block) is not ResidualBlock:
            return False
        if type(block.video) is not VideoBlock or type(block.audio) is not AudioBlock:
            return False
        if any(x.training and x.dropout for x in (block.video, block.audio)):
            return False
    return len(lists.encoder) + 1 == len(lists.decoder)


def _blocks(stages: Sequence[Any]) -> list[Any]:
    """The residual blocks in the order in which they run."""
    return [block for stage in stages for block in (stage.block, stage.up) if block is not None]


def _encode(
    lists: Lists,
    video: Tensor | None,
    audio: Tensor | None,
    embedding: Tensor,
    shifts: Iterator[int | Tensor],
    run: Run,
) -> tuple[Tensor | None, Tensor | None, list[Streams]]:
    """The streams behind the middle, and those that the decoder takes besides, the last ones first."""
    skips = [(video, audio)]
    for stage in lists.encoder:
        video, audio = stage(video, audio, embedding, shifts, run)
        skips.append((video, audio))
    for stage in lists.middle:
        video, audio = stage(video, audio, embedding, shifts, run)
    return video, audio, skips


def _decode(
    stages: Sequence[Stage] | nn.ModuleList,
    video: Tensor | None,
    audio: Tensor | None,
    skips: list[Streams],
    embedding: Tensor,
    shifts: Iterator[int | Tensor],
    run: Run,
) -> Streams:
    for stage in stages:
        video, audio = _joined((video, audio), skips.pop())
        video, audio = stage(video, audio, embedding, shifts, run)
    return video, audio


def _joined(streams: Streams, skips: Streams) -> Streams:
    (video, audio), (video_skip, audio_skip) = streams, skips
    return (
        None if video is None or video_skip is None else concatenate(video, video_skip),
        None if audio is None or audio_skip is None else concatenate(audio, audio_skip),
    )


def _numbers(lists: Lists, shifts: Sequence[int | Tensor], video: Tensor) -> list[int] | None:
    """The shift of each random-shift attention, 0 where it does not shift; None if one is not known on the CPU."""
    given, numbers = iter(shifts), []
    for stage in lists.stages():
        if stage.cross is None:
            continue
        frames = video.shape[1]
        shift = next(given) if stage.cross.random_shift else 0
        shift = _checks.shift_in_range(shift, frames - (stage.cross.window or frames), video)
        if not isinstance(shift, int):
            return None
        numbers.append(shift)
    return numbers


class _AtOnce:
    """The stages of a network whose modules are plain.

    Args:
        network: of all its stages.
        shifts: of all random-shift attentions.
    """

    def __init__(self, lists: Lists, network: Network, shifts: list[int], embedding: Tensor) -> None:
        self._lists, self._network, self._shifts, self._embedding = lists, network, shifts, embedding

    def run(self, video: Tensor, audio: Tensor) -> Streams | None:
        """One call without gradients.

        With them a node of the graph must not have results of which some depend on parameters that others do not. So
        there is one until the last attention across the streams, in front of which all parameters have gradients where
        one stream alone has a loss; that attention; and what follows of each stream.
        """
        decoder: list[Any] = list(self._lists.decoder)
        if not torch.is_grad_enabled():
            return self._all_until(len(decoder), video, audio)
        last = max((at for at, stage in enumerate(decoder) if stage.cross is not None), default=None)
        if last is None:
            return None
        first_skips = video, audio
        video, audio, *skips = self._all_until(last, video, audio)
        video, audio = cross_attend(decoder[last].cross, video, audio, self._shifts[-1])
        if last == len(decoder) - 1 and decoder[last].up is None:
            return video, audio
        films = self._films(_blocks(decoder[last:])[1:])
        skips = [*first_skips, *skips]
        return self._tail("video", last, video, skips[::2], films), self._tail("audio", last, audio, skips[1::2], films)

    def _films(self, blocks: Sequence[Any]) -> list[Tensor]:
        """What residual blocks make of the time's embedding."""
        return [block.embedding(self._embedding) for block in blocks]

    def _all_until(self, end: int, video: Tensor, audio: Tensor) -> Any:
        """Both streams in front of the attention across them of a stage of the decoder, or behind the decoder; and the
        streams that the rest of the decoder takes besides, but for those of the first layer."""
        embedding, numbers = self._embedding, self._shifts
        is_all = end == len(self._lists.decoder)

        def part(lists: Lists, video: Tensor, audio: Tensor, *films: Tensor) -> tuple[Tensor | None, ...]:
            stages: list[Any] = list(lists.decoder)
            crosses = [stage.cross for stage in lists.stages() if stage.cross is not None]
            shifts = iter([shift for shift, cross in zip(numbers, crosses, strict=True) if cross.random_shift])
            remaining = iter(films)

            def run(function: Any, *args: Any) -> Streams:
                if isinstance(function, ResidualBlock):
                    return function.transform(args[0], args[1], next(remaining))
                return function(*args)

            of_video, of_audio, skips = _encode(lists, video, audio, embedding, shifts, run)
            ends = _decode(stages[:end], of_video, of_audio, skips, embedding, shifts, run)
            if is_all:
                return ends
            ends = stages[end].block.transform(*_joined(ends, skips.pop()), next(remaining))
            return *ends, *[x for skip in skips[1:] for x in skip]

        stages = self._lists.stages()
        first = len(stages) - len(self._lists.decoder)
        blocks = _blocks(stages[: first + end]) + ([] if is_all else [stages[first + end].block])
        inputs = video, audio, *self._films(blocks)
        shifts = numbers if is_all else numbers[:-1]
        return replayed_network(part, self._network, inputs, shifts, num_sufficient=2)

    def _tail(self, name: str, at: int, x: Tensor, skips: list[Tensor], films: list[Tensor]) -> Tensor:
        """A stream behind the last attention across the streams, in the stage `at`."""

        def part(lists: Lists, x: Tensor, *others: Tensor) -> Tensor:
            first, *rest = list(lists.decoder)[at:]
            skips, films = list(others[: len(rest)]), iter(others[len(rest) :])

            def transformed(block: Any, x: Tensor) -> Any:
                return getattr(block, name)(x, next(films), is_film=block.is_film)

            x = x if first.up is None else transformed(first.up, x)
            for stage in rest:
                x = transformed(stage.block, concatenate(x, skips.pop()))
                x = x if stage.up is None else transformed(stage.up, x)
            return x

        return replayed_network(part, self._network, (x, *skips, *films), (), name)
