# SPDX-License-Identifier: MIT
"""The job behind `mmdiffusion train`: a run in a folder, which goes on where it was stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import pathlib
import platform
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import torch

import mmattn
import mmdiffusion
from mmdiffusion import checkpoints
from mmdiffusion._files import alone_in, digest, remove_parts
from mmdiffusion.clips import Clip, ClipFormat
from mmdiffusion.data import FilmError, open_dataset
from mmdiffusion.media import contact_sheet, write_image, write_video
from mmdiffusion.model.unet import CoupledUNet
from mmdiffusion.runs import published
from mmdiffusion.runs.convert import save_pipeline
from mmdiffusion.runs.models import ModelJob, load, pipeline_of, read_config, settings_of
from mmdiffusion.runs.options import SEEDS, option
from mmdiffusion.runs.processes import Processes
from mmdiffusion.runs.sample import clip_seed, versions
from mmdiffusion.training import Recipe, State, States, train
from mmdiffusion.training.log import Log, plot, row_of, summary
from mmdiffusion.training.recipe import PRECISIONS, RECIPES, TIMESTEPS, WEIGHTINGS

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_OF_PRESET = "; by default that of the preset"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(ModelJob):
    """Train a network on clips, in a folder: states/ to go on from, model/ to sample from, log.jsonl, loss.png and
    previews/. The same command again goes on where the run was stopped, to the bit; a state of other settings is
    refused. --preset small, the default, is a network for the synthetic clips that a CPU can train; landscape is the
    published one, trained as in the paper.
    """

    summary: ClassVar = "a network on clips of a folder, or on synthetic ones"
    examples: ClassVar = (
        "train synthetic --out run",
        "train films --preset landscape --micro-batch 2 --precision bfloat16 --out run",
        "sample --model run/model --out clips",
    )

    data: str = option("a folder of films, packed clips, or `synthetic`", is_positional=True)
    out: pathlib.Path = option("the folder of the run; made if it is not there")
    steps: int = option("at which the run ends", default=100_000, minimum=1)
    batch_size: int | None = option("clips of a step" + _OF_PRESET, default=None, minimum=1)
    micro_batch: int | None = option("clips of one call of the network" + _OF_PRESET, default=None, minimum=1)
    lr: float | None = option("learning rate" + _OF_PRESET, default=None, minimum=0)
    warmup: int | None = option("steps over which it grows from 0" + _OF_PRESET, default=None, minimum=0)
    weight_decay: float | None = option("of AdamW" + _OF_PRESET, default=None, minimum=0)
    clip_norm: float | None = option("largest norm of the gradients, 0 for any" + _OF_PRESET, default=None, minimum=0)
    ema_rates: tuple[float, ...] | None = option("of the averages of the parameters" + _OF_PRESET, default=None)
    weighting: str | None = option("of the loss by t" + _OF_PRESET, default=None, choices=WEIGHTINGS)
    min_snr_gamma: float | None = option("of min-snr" + _OF_PRESET, default=None, minimum=0)
    timesteps: str | None = option("how t is drawn" + _OF_PRESET, default=None, choices=TIMESTEPS)
    precision: str | None = option("what the network computes in" + _OF_PRESET, default=None, choices=PRECISIONS)
    seed: int = option("of the weights and of all that is drawn", default=0, **SEEDS)
    device: str | None = option("cpu, cuda, cuda:1; by default CUDA where there is one", default=None)
    flip: bool = option("films mirrored as well", default=False)
    init: pathlib.Path | None = option(
        "begin with the weights of a published checkpoint, or of a directory of save_pretrained", default=None
    )
    resume: pathlib.Path | None = option(
        "begin where a run of the published code stopped: a folder of its model*.pt, ema_*.pt and opt*.pt", default=None
    )
    gradient_checkpointing: bool = option(
        "compute each block again in backward, for a third of the memory", default=False
    )
    workers: int = option("processes that read clips ahead", default=0, minimum=0)
    log_every: int = option("steps of a line in the log", default=50, minimum=1)
    checkpoint_every: int = option("steps between states that are kept", default=1000, minimum=1)
    keep: int = option("states that are kept, the newest", default=3, minimum=1)
    preview_every: int = option("steps between previews, 0 for none", default=1000, minimum=0)
    preview_clips: int = option("clips of a preview", default=4, minimum=1)

    @property
    def recipe(self) -> Recipe:
        """That of the preset, with what is given here in its place."""
        preset = RECIPES.get(self.model_preset or "", Recipe())
        names = [field.name for field in dataclasses.fields(Recipe)]
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return dataclasses.replace(preset, **given)

    @property
    def model_preset(self) -> str | None:
        """That of the recipe, and of the network where it does not come from a file."""
        return self.preset or (None if self.init or self.resume else "small")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init and self.resume:
            raise ValueError(f"init is {self.init} and resume {self.resume}; expected one of them")


def run(job: Train) -> str:
    """Train until `steps`, or until the process is told to stop; what was trained is kept."""
    recipe = job.recipe
    processes = Processes(job.device)
    if processes.device.type == "cpu":
        mmattn.keep_freed_memory()
    processes.refuse_if_different("code", code_digest()[:12])
    unet = _network(job)
    torch.nn.Module.to(unet, processes.device, torch.float32)
    if job.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    data = open_dataset(job.data, ClipFormat.of(unet.config), job.seed, flip=job.flip)
    alone = alone_in(job.out, "trained in") if processes.rank == 0 else contextlib.nullcontext()
    with alone, _told_to_stop() as signals:
        return _Run(job, recipe, unet, data, processes).go(signals)


def _network(job: Train) -> CoupledUNet:
    """To begin with."""
    torch.manual_seed(job.seed)
    weights = published.newest(job.resume)[0] if job.resume else job.init
    if weights is None:
        return CoupledUNet(**{**checkpoints.PRESETS[str(job.model_preset)], **read_config(job.config)})
    # A directory has its own configuration, so that a preset is that of the recipe alone.
    unet = load(weights, dataclasses.replace(job, preset=None) if weights.is_dir() else job)
    unet.register_to_config(random_weights=False)  # no longer, once they are trained
    return unet


@functools.cache
def code_digest() -> str:
    """SHA-256 of the sources of mmattn and mmdiffusion, as they were when this was first asked."""
    total = hashlib.sha256()
    for package in (mmattn, mmdiffusion):
        for file in sorted(pathlib.Path(str(package.__file__)).parent.rglob("*.py")):
            total.update(file.read_bytes())
    return total.hexdigest()


class _Run:
    """One sitting of a run."""

    def __init__(self, job: Train, recipe: Recipe, unet: CoupledUNet, data: Any, processes: Processes) -> None:
        self.job, self.data, self.recipe, self.processes = job, data, recipe, processes
        self.is_first = processes.rank == 0
        begun_from = job.init or job.resume
        settings = {
            "data": job.data,
            "begun_from": digest(begun_from) if job.init and begun_from else str(begun_from) if begun_from else None,
            "clips": len(data),
            "config": settings_of(unet.config),
            **recipe.settings(),
            **({"flip": True} if job.flip else {}),
        }
        self.states = States(job.out / "states", settings, keep=job.keep)
        self.log = Log(job.out / "log.jsonl")
        self.previewed = CoupledUNet.from_config(unet.config).to(unet.device).eval().requires_grad_(False)
        self.state = State(unet, recipe, 1000)
        self.notes = {
            "versions": versions(),
            "machine": f"{platform.machine()}, {unet.device}, {torch.get_num_threads()} threads",
            "processes": processes.count,
            "code": code_digest(),
        }
        self.saved = -1

    def go(self, signals: list[int]) -> str:
        job, state, processes = self.job, self.state, self.processes
        self._begin()
        options = {"workers": job.workers, "accelerator": processes.accelerator()}
        try:
            if state.step < job.steps:
                for _ in train(state.unet, self.data, self.recipe, state=state, **options):
                    if self.is_first:
                        self._after_step()
                    if processes.any(bool(signals)) or state.step >= job.steps:
                        break
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}; the last good state is {self.states.files()[0]}") from error
        except FilmError:  # raised between two steps, so the state is whole
            if self.is_first and self.saved < state.step:
                self._save()
            raise
        if not self.is_first:
            return ""
        if self.saved < state.step:
            self._save()
        stopped = f"stopped by {signal.Signals(signals[0]).name}" if signals else "done"
        return f"{job.out}: {stopped} at step {state.step}, after {state.seconds / 3600:.2f} hours of training"

    def _begin(self) -> None:
        """Load the newest state, or keep the first."""
        state = self.state
        if self.is_first:
            remove_parts(self.job.out)
        path, broken = self.states.load(state)
        if path is None and self.job.resume:
            published.load(state, self.job.resume)
        self.processes.wait()  # until all have read what the first one now goes on to write
        if not self.is_first:
            return
        for sentence in broken:
            _say(f"passed over: {sentence}")
        self.log.begin(state.step)
        if path is None:
            self._save()  # a folder that cannot hold it is better known now
        else:
            self.saved = state.step
            _say(f"goes on from {path}")

    def _after_step(self) -> None:
        job, state = self.job, self.state
        if state.step % job.log_every == 0:
            row = row_of(state)
            state.meter.clear()
            self.log.add(row)
            _say(summary(row))
            if self.saved < state.step - job.checkpoint_every:  # one failed, on a full disk
                self._try_to_save()
        if state.step % job.checkpoint_every == 0:
            self._try_to_save()
        if job.preview_every and state.step % job.preview_every == 0:
            self._preview()

    def _try_to_save(self) -> None:
        """What was trained is in memory: the run goes on without this state, and tries again."""
        try:
            self._save()
        except OSError as error:
            _say(f"the state of step {self.state.step} is not kept, and the run goes on: {error}")

    def _save(self) -> None:
        state = self.state
        self.states.save(state, self.notes)
        self.saved = state.step
        state.ema.copy_to(self.previewed, self.recipe.ema_rates[0])
        if len(self.previewed.config["streams"]) == 2:
            save_pipeline(pipeline_of(self.previewed), self.job.out / "model")
        plot(self.log.read(), self.job.out / "loss.png")

    def _preview(self) -> None:
        """Clips of the averaged parameters, with seeds of their own, the same at each step."""
        state, folder = self.state, self.job.out / "previews"
        if len(self.previewed.config["streams"]) < 2:
            return
        folder.mkdir(exist_ok=True)
        state.ema.copy_to(self.previewed, self.recipe.ema_rates[0])
        pipeline = pipeline_of(self.previewed)
        pipeline.set_progress_bar_config(disable=True)
        seeds = [clip_seed(self.job.seed, number) for number in range(self.job.preview_clips)]
        made: Any = pipeline(
            len(seeds), 20, generator=[torch.Generator().manual_seed(x) for x in seeds], shift_seed=self.job.seed
        )
        clips = [Clip(video.cpu(), audio.cpu()) for video, audio in zip(made.video, made.audio, strict=True)]
        rates: dict[str, Any] = {
            "fps": pipeline.clip_format.frame_rate,
            "sample_rate": pipeline.clip_format.sample_rate,
        }
        name = f"step-{state.step:08d}"
        titles = [f"step {state.step}, clip {number}" for number in range(len(clips))]
        write_image(folder / f"{name}.png", contact_sheet(clips, titles, **rates))
        for number, (video, audio) in enumerate(clips):
            assert video is not None
            write_video(folder / f"{name}-{number}.mp4", video, audio, **rates)


def _say(sentence: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {sentence}", file=sys.stderr, flush=True)  # noqa: T201


@contextlib.contextmanager
def _told_to_stop() -> Iterator[list[int]]:
    """The first SIGINT or SIGTERM is put on a list, for the end of the step; a second one acts as ever."""
    signals: list[int] = []
    before: dict[int, Any] = {number: signal.getsignal(number) for number in _SIGNALS}

    def note(number: int, _: Any) -> None:
        signals.append(number)
        signal.signal(number, before[number])

    try:
        for number in before:
            signal.signal(number, note)
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
