# SPDX-License-Identifier: MIT
"""The job behind `mmdiffusion train`: a run in a folder, which goes on where it was stopped."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import pathlib
import platform
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

import mmattn
from mmdiffusion._files import alone_in, digest, remove_parts
from mmdiffusion.data import FilmError
from mmdiffusion.runs import published
from mmdiffusion.runs.convert import save_pipeline
from mmdiffusion.runs.jobs import Train
from mmdiffusion.runs.models import settings_of
from mmdiffusion.runs.processes import Processes, refuse_other_precision, told_to_stop
from mmdiffusion.runs.sample import versions
from mmdiffusion.runs.trackers import Trackers
from mmdiffusion.runs.trained import TrainedClips, TrainedFrames
from mmdiffusion.training import Recipe, State, States, train
from mmdiffusion.training.log import Log, plot, row_of, summary, time_left


def run(job: Train) -> str:
    """Train until `steps`, or until the process is told to stop; what was trained is kept."""
    refuse_other_precision(job.recipe.precision)
    processes = Processes(job.device)
    if processes.device.type == "cpu":
        mmattn.keep_freed_memory()
    processes.refuse_if_different("code", code_digest()[:12])
    processes.refuse_if_different("versions of torch", torch.__version__)
    trackers = Trackers(job.trackers if processes.rank == 0 else ("none",), _say)
    recipe = job.recipe
    trained = TrainedFrames(job) if job.superres else TrainedClips(job)
    torch.nn.Module.to(trained.network, processes.device, torch.float32)
    if job.gradient_checkpointing:
        trained.enable_gradient_checkpointing()
    data = trained.data()
    alone = alone_in(job.out, "trained in") if processes.rank == 0 else contextlib.nullcontext()
    with alone, told_to_stop() as signals, contextlib.closing(trackers):
        return _Run(job, recipe, trained, data, processes, trackers).go(signals)


@functools.cache
def code_digest() -> str:
    """SHA-256 of our sources, those of the kernels too, as they were when this was first asked."""
    total = hashlib.sha256()
    for package in ("mmattn", "mmattn_kernels", "mmdiffusion"):
        spec = importlib.util.find_spec(package)
        folders = spec.submodule_search_locations if spec else None
        for file in sorted(x for folder in folders or () for x in pathlib.Path(folder).rglob("*")):
            if file.suffix in (".py", ".cpp", ".h"):
                total.update(file.read_bytes())
    return total.hexdigest()


class _Run:
    """One sitting of a run."""

    def __init__(
        self,
        job: Train,
        recipe: Recipe,
        trained: TrainedClips | TrainedFrames,
        data: Any,
        processes: Processes,
        trackers: Trackers,
    ) -> None:
        self.job, self.recipe, self.trained, self.data, self.processes = job, recipe, trained, data, processes
        self.trackers = trackers
        self.is_first = processes.rank == 0
        begun_from = job.init or job.resume
        settings = {
            "data": job.data,
            "begun_from": digest(begun_from) if job.init and begun_from else str(begun_from) if begun_from else None,
            "clips": len(data),
            "config": settings_of(trained.config),
            **recipe.settings(),
            **({"flip": True} if job.flip else {}),
        }
        for name, value in {**settings, "steps": job.steps}.items():
            processes.refuse_if_different(f"settings, {name}", json.dumps(value))
        self.states = States(job.out / "states", settings, keep=job.keep)
        self.log = Log(job.out / "log.jsonl")
        self.previewed = trained.copy().to(processes.device).eval().requires_grad_(False)
        self.state = State(trained.network, recipe, 1000)
        self.notes = {
            "versions": versions(),
            "machine": f"{platform.machine()}, {processes.device}, {torch.get_num_threads()} threads",
            "processes": processes.count,
            "code": code_digest(),
        }
        self.saved = self.begun = -1  # steps

    def go(self, signals: list[int]) -> str:
        job, state, processes = self.job, self.state, self.processes
        self._begin()
        options = {"workers": job.workers, "accelerator": processes.accelerator(), "given": self.trained.given}
        try:
            if state.step < job.steps:
                for _ in train(state.unet, self.data, self.recipe, state=state, **options):
                    if self.is_first:
                        self._after_step()
                    if processes.any(bool(signals)) or state.step >= job.steps:
                        break
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}; the last good state is {self.states.files()[0]}") from error
        except FilmError:  # raised by all, between two steps, so the state is whole
            if self.is_first and self.saved < state.step:
                self._save()
            processes.wait()  # a launcher ends all when one has ended
            raise
        if not self.is_first:
            return ""
        if self.saved < state.step:
            self._save()
        stopped = f"stopped by {signal.Signals(signals[0]).name}" if signals else "done"
        again = "; the same command goes on from there" if state.step < job.steps else ""
        return f"{job.out}: {stopped} at step {state.step}, after {state.seconds / 3600:.2f} hours of training{again}"

    def _begin(self) -> None:
        """Load the newest state, or keep the first."""
        state = self.state
        if self.is_first:
            remove_parts(self.job.out)
        path, broken = self.states.load(state)
        self.processes.refuse_if_different("states to go on from", str(path and path.name))
        if path is None and self.job.resume:
            published.load(state, self.job.resume)
        self.begun = state.step
        self.processes.wait()  # until all have read what the first one now goes on to write
        if not self.is_first:
            return
        for sentence in broken:
            _say(f"passed over: {sentence}")
        self.trackers.begin(self.job.out, self.states.settings, None if path is None else state.step)
        self.log.begin(state.step)
        if path is None:
            self._save()  # a folder that cannot hold it is better known now
        else:
            self.saved = state.step
            _say(f"goes on from {path}")
        for sentence in self._announced() if state.step < self.job.steps else ():
            _say(sentence)

    def _announced(self) -> list[str]:
        """What is trained, by what, on what and how far."""
        job, recipe, device = self.job, self.recipe, self.processes.device
        count = sum(x.numel() for x in self.state.unet.parameters())
        by = [str(device), *([f"{torch.get_num_threads()} threads"] if device.type == "cpu" else [])]
        by += [f"{self.processes.count} processes"] if self.processes.count > 1 else []
        clips = "synthetic clips" if job.data == "synthetic" else f"{len(self.data)} clips of {job.data}"
        refused = getattr(getattr(self.data, "clips", self.data), "refused", ())
        clips += f" ({len(refused)} files are of no use: see mmdiffusion data check)" if refused else ""
        is_whole = recipe.micro_batch in (None, recipe.batch_size)
        parts = "" if is_whole else f" in micro-batches of {recipe.micro_batch}"
        return [
            f"trains {count / 1e6:.2f} M parameters in {recipe.precision} on {', '.join(by)}",
            f"{clips}, {recipe.batch_size} a step{parts}, into {job.out} from step {self.state.step} to {job.steps}",
        ]

    def _after_step(self) -> None:
        job, state = self.job, self.state
        if state.step == self.begun + 1 < job.steps:  # the log's first line may be hours away
            _say(f"step {state.step} is done: {time_left(state, job.steps)} at this speed")
        if state.step % job.log_every == 0:
            row, left = row_of(state), time_left(state, job.steps)
            state.meter.clear()
            with self._going_on("the line of the log"):
                self.log.add(row)
            self.trackers.log(row)
            _say(summary(row, left))
            if self.saved < state.step - job.checkpoint_every:  # one failed, on a full disk
                self._try_to_save()
        if state.step % job.checkpoint_every == 0:
            self._try_to_save()
        if job.preview_every and state.step % job.preview_every == 0:
            with self._going_on("the preview"):
                self._preview()

    @contextlib.contextmanager
    def _going_on(self, what: str) -> Iterator[None]:
        """What was trained is in memory, and worth more than what is written of it: the run goes on without."""
        try:
            yield
        except Exception as error:
            _say(f"{what} of step {self.state.step} is not kept, and the run goes on: {error}")

    def _try_to_save(self) -> None:
        """The next line of the log tries again."""
        with self._going_on("the state"):
            self._save_state()
        if self.saved == self.state.step:
            with self._going_on("the model"):
                self._save_model()

    def _save(self) -> None:
        self._save_state()
        self._save_model()

    def _save_state(self) -> None:
        self.states.save(self.state, self.notes)
        self.saved = self.state.step

    def _save_model(self) -> None:
        """What samples are made of, and the plot."""
        state = self.state
        state.ema.copy_to(self.previewed, self.recipe.ema_rates[0])
        pipeline = self.trained.pipeline(self.previewed)
        if pipeline is not None:
            save_pipeline(pipeline, self.job.out / "model")
        plot(self.log.read(), self.job.out / "loss.png")

    def _preview(self) -> None:
        """What the averaged parameters make."""
        state, folder = self.state, self.job.out / "previews"
        state.ema.copy_to(self.previewed, self.recipe.ema_rates[0])
        pipeline = self.trained.pipeline(self.previewed)
        if pipeline is not None:
            folder.mkdir(exist_ok=True)
            pipeline.set_progress_bar_config(disable=True)
            self.trained.preview(pipeline, self.data, folder, state.step)


def _say(sentence: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {sentence}", file=sys.stderr, flush=True)  # noqa: T201
