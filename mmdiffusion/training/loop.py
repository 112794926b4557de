# SPDX-License-Identifier: MIT
"""Training of the coupled U-Net (MM-Diffusion, arXiv 2212.09478): one loop, which yields its state after each step."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

import mmattn
from mmdiffusion.clips import STREAMS
from mmdiffusion.data import Batches, FilmError, Item, to_clip
from mmdiffusion.diffusion.process import GaussianDiffusion
from mmdiffusion.training.losses import denoising_losses, loss_weights
from mmdiffusion.training.recipe import Recipe
from mmdiffusion.training.state import State
from mmdiffusion.training.timesteps import UniformTimesteps

Given: TypeAlias = Callable[[Item, Sequence[torch.Generator]], Mapping[str, Tensor]]

_QUARTERS = 4  # of the timesteps, whose losses are told apart
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def train(
    unet: Any,
    data: Any,
    recipe: Recipe,
    *,
    given: Given | None = None,
    state: State | None = None,
    workers: int = 0,
    accelerator: Any = None,
) -> Iterator[State]:
    """Train a network for ever; whoever iterates stops when it is enough, and saves, samples or logs in between.

    What a step does follows from the recipe's seed and the step's number: the clips, t, the noise, the shifts and the
    dropout. So a state that is saved, loaded and given here goes on as if nothing had been.

    Args:
        unet: a CoupledUNet, of one or both streams, float32; or a `FrameNetwork` (`mmdiffusion.training.superres`).
        data: of `mmdiffusion.data`.
        recipe: how.
        given: f(batch, generators) -> what the network takes by name besides, tensors [B, ...] on the CPU; there is a
            generator for each clip.
        state: where to go on; None begins. It is changed in place, and yielded.
        workers: processes that read clips ahead; 0 reads them here.
        accelerator: an Accelerator of accelerate, for several processes that share each step; all of them have the
            same network, state and data. None is this one alone.

    Raises:
        ValueError: if the clips of a step cannot be shared evenly, or the data have none.
        FilmError: if a clip cannot be read, by all processes, before the step changes anything.
        FloatingPointError: if a loss or a gradient is not finite, naming the step and the clips, before it reaches a
            parameter; in float16 such a step is skipped and counted instead.
    """
    # Long by its docstring; the loop is kept in one place, where a reader sees all that a step does in its order.
    diffusion = GaussianDiffusion()
    state = State(unet, recipe, len(diffusion)) if state is None else state
    device = next(unet.parameters()).device
    predicted = {"prediction_type": unet.config["prediction_type"]}
    rank, count = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    network = accelerator.prepare_model(unet) if accelerator else unet
    size, micro_batches = _shares(recipe, count)
    batches = Batches(data, size, seed=recipe.seed, workers=workers, rank=rank, count=count)
    batches.load_state_dict({**batches.state_dict(), "position": state.step * recipe.batch_size})
    autocast = functools.partial(
        torch.autocast, device.type, _DTYPES[recipe.precision], enabled=recipe.precision != "float32"
    )
    state.optimizer.zero_grad(set_to_none=True)  # of a step that was not finished
    batch: Item | None = None
    while True:
        clock = _Clock(state)
        unread: FilmError | None = None
        names: list[str] = []
        drawn: list[_Seen] = []
        torch.manual_seed(_seed(recipe.seed, state.step, "dropout", rank))
        for micro in range(micro_batches):
            is_first = batch is None
            try:
                batch = next(batches)
            except FilmError as error:
                # The others are in the sums of this step already: it is done with the clips before, and refused by all.
                unread = error
            if is_first or not accelerator:
                _refuse_unread(unread, accelerator)
            assert batch is not None
            clock.lap("data")
            clip = to_clip(batch, device)
            clips = {name: getattr(clip, name) for name in unet.config["streams"]}
            number = micro * count + rank
            draws = draw(recipe, state.step, number, clips, state.timesteps, unet.shift_ranges())
            options: dict[str, Any] = {"shifts": draws.shifts or None}
            if given is not None:
                generators = _generators(recipe, state.step, "given", number, len(batch.name))
                options |= {name: x.to(device) for name, x in given(batch, generators).items()}
            with autocast():
                losses = denoising_losses(
                    network, diffusion, clips, draws.noises, draws.t.to(device), **predicted, **options
                )
            weights = draws.weights * loss_weights(
                recipe.weighting, diffusion, draws.t, gamma=recipe.min_snr_gamma, **predicted
            )
            total = (weights.to(device) * sum(losses[name] for name in clips)).mean()
            clock.lap("forward")
            is_last = micro == micro_batches - 1
            with accelerator.no_sync(network) if accelerator and not is_last else contextlib.nullcontext():
                state.scaler.scale(total / micro_batches).backward()
            clock.lap("backward")
            names += batch.name
            drawn.append((draws.t, {name: x.detach() for name, x in losses.items()}, total.detach()))
        _refuse_unread(unread, accelerator)
        state.names = names
        _record(state, _of_all(drawn, accelerator), diffusion)
        _apply(state, clock)
        state.step += 1
        clock.stop()
        yield state


_Seen: TypeAlias = tuple[Tensor, dict[str, Tensor], Tensor]
"""Of a micro-batch: t, the losses of each sample, and what was differentiated."""


class Draws(NamedTuple):
    """What is drawn for a micro-batch."""

    t: Tensor
    """[B] int64."""
    weights: Tensor
    """[B] of the losses, for t that is not uniform."""
    noises: dict[str, Tensor]
    shifts: list[int]


def draw(
    recipe: Recipe,
    step: int,
    micro: int,
    clips: Mapping[str, Tensor],
    timesteps: UniformTimesteps,
    ranges: Sequence[int],
) -> Draws:
    """Of the seed, the step, and the clip's number in the step alone, whatever shares the step."""
    count = len(next(iter(clips.values())))
    generators = _generators(recipe, step, "clip", micro, count)
    drawn = [timesteps.draw(generator) for generator in generators]
    noises = {
        name: torch.stack([torch.randn(clips[name].shape[1:], generator=x) for x in generators]).to(clips[name].device)
        for name in STREAMS
        if name in clips
    }
    shift_source = torch.Generator().manual_seed(_seed(recipe.seed, step, "shifts", micro))
    return Draws(
        torch.tensor([t for t, _ in drawn]),
        torch.tensor([weight for _, weight in drawn]),
        noises,
        [mmattn.draw_shift(largest + 1, 1, generator=shift_source) for largest in ranges],
    )


def _shares(recipe: Recipe, count: int) -> tuple[int, int]:
    """The clips of a micro-batch, and the micro-batches of each of so many processes."""
    size = recipe.micro_batch or max(1, recipe.batch_size // count)
    if recipe.batch_size % (size * count):
        raise ValueError(
            f"batch_size is {recipe.batch_size}; expected a multiple of {size * count}, {count} processes with "
            f"micro-batches of {size}"
        )
    return size, recipe.batch_size // (size * count)


def _of_all(drawn: Sequence[_Seen], accelerator: Any) -> Sequence[_Seen]:
    """What all processes have seen, the same in each."""
    if accelerator is None or accelerator.num_processes == 1:
        return drawn
    return [
        (accelerator.gather(t.to(total.device)).cpu(), *accelerator.gather((losses, total)))
        for t, losses, total in drawn
    ]


def _refuse_unread(unread: FilmError | None, accelerator: Any) -> None:
    """Raise what one of the processes could not read, in all of them."""
    if accelerator is None:
        if unread:
            raise unread
        return
    if float(accelerator.reduce(torch.tensor(float(unread is not None), device=accelerator.device))):
        from accelerate.utils import gather_object

        sentences = gather_object([str(unread)] if unread else [])
        raise FilmError("; ".join(dict.fromkeys(sentences)))


def _generators(recipe: Recipe, step: int, what: str, micro: int, count: int) -> list[torch.Generator]:
    """One for each clip of a micro-batch."""
    seeds = [_seed(recipe.seed, step, what, micro * count + i) for i in range(count)]
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _apply(state: State, clock: _Clock) -> None:
    """Of the gradients that are there: the step of the optimizer and of the averages."""
    recipe, parameters = state.recipe, list(state.unet.parameters())
    state.scaler.unscale_(state.optimizer)
    norm = nn.utils.clip_grad_norm_(parameters, recipe.clip_norm or math.inf)
    is_finite = math.isfinite(float(norm))
    if not is_finite and not state.scaler.is_enabled():
        _refuse(state, "norm of the gradients", float(norm))
    for group in state.optimizer.param_groups:
        group["lr"] = recipe.lr_at(state.step)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    clock.lap("optimizer")
    if is_finite:
        state.meter.add("grad_norm", float(norm))
        state.ema.update()
    else:
        state.skipped += 1
    clock.lap("ema")


def _record(state: State, drawn: Sequence[_Seen], diffusion: GaussianDiffusion) -> None:
    """Losses into the meter, in each stream and quarter of t; refuses those that are not finite."""
    for t, losses, total in drawn:
        if not bool(total.isfinite().all()) and not state.scaler.is_enabled():
            _refuse(state, "loss", float(total.mean()))
        by_stream = {name: x.detach().double().cpu() for name, x in losses.items()}
        unweighted = sum(x for name, x in by_stream.items() if name in STREAMS)
        assert isinstance(unweighted, Tensor)
        if not bool(unweighted.isfinite().all()):
            continue  # a step of float16 that is skipped
        state.timesteps.update(t, unweighted)
        quarters = (t * _QUARTERS // len(diffusion)).tolist()
        for name, x in {"loss": unweighted, **by_stream}.items():
            state.meter.add(name, float(x.sum()), len(x))
        for name, x in by_stream.items():
            for quarter, value in zip(quarters, x.tolist(), strict=True):
                state.meter.add(f"{name}_q{quarter + 1}", value)


def _refuse(state: State, what: str, value: float) -> None:
    raise FloatingPointError(
        f"the {what} is {value} in step {state.step}, of clips {', '.join(state.names)}; expected a finite number"
    )


class _Clock:
    """Seconds of a step by part, into the meter."""

    def __init__(self, state: State) -> None:
        self._state, self._begun = state, time.perf_counter()
        self._last = self._begun

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self._state.meter.add(f"{part}_s", now - self._last, 0)
        self._last = now

    def stop(self) -> None:
        self._state.seconds += time.perf_counter() - self._begun
        self._state.meter.add("step_s", time.perf_counter() - self._begun)


def _seed(seed: int, number: int, what: str, *more: int) -> int:
    """Of a generator of its own."""
    text = " ".join(map(str, (seed, number, what, *more)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
