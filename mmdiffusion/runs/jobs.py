# SPDX-License-Identifier: MIT
"""The jobs behind the subcommands of `mmdiffusion`, each with its options; the module of each says how it is done.

Neither torch nor anything built on it is imported here, so that help and refused arguments take no time.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import TYPE_CHECKING, Any, ClassVar

from mmdiffusion.clips import ClipFormat
from mmdiffusion.runs.options import SEEDS, check, option, refuse_unused

if TYPE_CHECKING:
    from mmdiffusion.training import Recipe

_WEIGHTS = pathlib.Path(__file__).resolve().parent.parent / "weights"

PACKAGED = _WEIGHTS / "small"
"""The model that comes with the package: of the synthetic world, a directory of its pipeline."""

PACKAGED_SUPERRES = _WEIGHTS / "small-superres"
"""The super-resolution network for that model's frames, 16 x 16 to 64 x 64, a directory of its pipeline."""

DTYPES = ("float32", "bfloat16", "float16")

FORMATS = ("mp4", "wav", "png")
"""What a clip is written as: film, sound, and contact sheet."""

WAYS = {"joint": None, "video-from-audio": "audio", "audio-from-video": "video"}
"""How synchrony samples clips, and the stream that is given."""

GUIDANCES = ("replacement", "gradient")

FIXED = {"clips": 2048, "frames": 16, "size": 64, "fps": 10.0, "sample_rate": 16000}
"""Options of eval as the published script has them."""

# Names of what torch and diffusers are needed for; a test compares them with the tables that they are keys of.
PRESETS = ("landscape", "aist++", "tiny", "small")
SUPERRES_PRESETS = ("landscape", "small")
SCHEDULERS = ("ddpm", "ddim", "dpmsolver++", "dpmsolver", "unipc")
WEIGHTINGS = ("uniform", "min-snr")
TIMESTEPS = ("uniform", "loss-second-moment")

TRACKERS = ("tensorboard", "wandb", "none")
"""Those of accelerate whose curve is known to go on as the run does."""

_UNSEEN_WORLD = 1000  # a seed that nobody trains with by chance; the packaged models have had those of 0 and 1
_SMALL = pathlib.Path("small")
_DATA_HELP = (
    "a folder of films, shards of WebDataset (.tar) in a folder or as a pattern ('films-{000..099}.tar'), a file "
    "of data pack, or `synthetic`, clips of bouncing balls that are made as they are needed"
)
_GUIDANCE_HELP = (
    "replacement puts it, with the noise of each step, in the place of what the model made of it; gradient also moves "
    "what is sampled, after each step, down the gradient of the distance between the two"
)
_SCALE_HELP = "weight of the gradient; if not given the published one, 3 over the elements of what is given"
_OF_PRESET = "; by default that of the preset"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelJob:
    """Options that all jobs with a model have."""

    preset: str | None = option(
        "configuration of the published models, or of a smaller one: tiny, to try things with, or small, of the "
        "model that comes with the package",
        default=None,
        choices=PRESETS,
    )
    config: pathlib.Path | None = option(
        "JSON with arguments of the network, over what is inferred", default=None, metavar="FILE"
    )

    def __post_init__(self) -> None:
        check(self)
        if self.preset and self.config:
            raise ValueError(f"preset is {self.preset} and config {self.config}; expected one of them")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample(ModelJob):
    """Sample clips into a folder: clip-0000.mp4 and on, a contact sheet of each, and samples.json with all settings,
    seeds, versions and seconds. The same command again makes what is missing, and --num can grow: a clip depends on the
    seed and its number alone.
    """

    summary: ClassVar = "clips of video and sound, or one from the other"
    examples: ClassVar = (
        "sample --out out    # of the small model that comes with the package",
        "sample --superres small --out large    # the same at 64 x 64",
        "sample --model landscape.pt --num 4 --steps 20 --seed 7 --out out",
        "sample --model landscape.pt --audio-from rain.mp4 --guidance gradient --out rain",
        "sample --model landscape.pt --superres sr.pt --out large",
        "sample --model landscape --seconds 8 --dtype bfloat16 --out long",
        "sample --model landscape.pt --out out    # by two: accelerate launch --multi_gpu --num_processes 2 -m ...",
    )

    model: pathlib.Path = option(
        "a published checkpoint, or a directory of save_pretrained; by default the small model of the package",
        default=PACKAGED,
    )
    out: pathlib.Path = option("the folder; made if it is not there")
    num: int = option("clips in the folder at the end", default=4, minimum=1, maximum=1_000_000)
    steps: int = option("calls of the model for each window of a clip", default=20, minimum=1)
    scheduler: str = option("how noise becomes clips", default="dpmsolver++", choices=SCHEDULERS)
    seed: int = option("of all clips", default=0, **SEEDS)
    seconds: float | None = option("length of a clip; by default that of the model, 1.6", default=None)
    overlap: float = option("share of a window that is the end of the one before, in longer clips", default=0.5)
    audio_from: pathlib.Path | None = option("find the video of this file's sound", default=None)
    video_from: pathlib.Path | None = option("find the sound of this file's video", default=None)
    start: float = option("where to begin in that file", default=0.0, minimum=0, maximum=1_000_000, metavar="SECONDS")
    guidance: str = option(
        f"how the stream that is given, or the window before, steers what is sampled: {_GUIDANCE_HELP}, and takes "
        "three times as long",
        default="replacement",
        choices=("replacement", "gradient"),
    )
    guidance_scale: float | None = option(_SCALE_HELP, default=None, metavar="SCALE")
    superres: pathlib.Path | None = option(
        "a super-resolution network, published or a directory, to make the clips larger by before they are written; "
        "small is the one that comes with the package, for the small model",
        default=None,
    )
    superres_steps: int = option("calls of the super-resolution network for each frame", default=25, minimum=1)
    batch_size: int = option("clips sampled together", default=1, minimum=1)
    dtype: str | None = option(
        "of the model: bfloat16 on CUDA, float32 on a CPU; with AMX bfloat16 is about 3 times as fast there too",
        default=None,
        choices=DTYPES,
    )
    device: str | None = option("cpu, cuda, cuda:1; by default CUDA where there is one", default=None)
    formats: tuple[str, ...] = option("files of a clip", default=("mp4", "png"), choices=FORMATS)
    force: bool = option("remove the clips in the folder first, and those of other settings", default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.audio_from and self.video_from:
            raise ValueError("audio_from and video_from are both given; expected one of them, to find the other")
        is_long, source = self.seconds is not None, "audio_from or video_from"
        refuse_unused(self, self.given_stream, source, "start")
        refuse_unused(self, is_long, "seconds", "overlap")
        refuse_unused(self, self.given_stream or is_long, f"{source} or seconds", "guidance")
        refuse_unused(self, self.guidance == "gradient", "guidance gradient", "guidance_scale")
        refuse_unused(self, self.superres, "superres", "superres_steps")

    @property
    def superres_source(self) -> pathlib.Path | None:
        """Where the super-resolution network is."""
        return PACKAGED_SUPERRES if self.superres == _SMALL and not _SMALL.exists() else self.superres

    @property
    def given_stream(self) -> str | None:
        """The stream that is read from a file."""
        return "audio" if self.audio_from else "video" if self.video_from else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuperResolve:
    """Make films larger by a super-resolution network, 64 x 64 to 256 x 256 by the published one: NAME.mp4 of each in a
    folder, at its own frame rate, with its sound copied as it is, and NAME.json with all settings. The same command
    again goes on where it was stopped: finished frames are kept as NAME.frames/*.png until their film is written.
    """

    summary: ClassVar = "films made larger, with their sound as it is"
    examples: ClassVar = (
        "superres clip.mp4 --model sr.pt --out large",
        "superres out/*.mp4 --model sr.pt --dtype bfloat16 --out large",
    )

    films: tuple[pathlib.Path, ...] = option("what is made larger", metavar="FILM", is_positional=True)
    model: pathlib.Path = option(
        "a published checkpoint, or a directory of save_pretrained; by default the small network of the package, for "
        "frames of its synthetic world",
        default=PACKAGED_SUPERRES,
    )
    out: pathlib.Path = option("the folder; made if it is not there")
    config: pathlib.Path | None = option(
        "JSON with arguments of SuperResolutionUNet, over what is inferred", default=None, metavar="FILE"
    )
    fit: str = option(
        "how a film of another shape becomes the network's: all of it with black bars, or its middle",
        default="letterbox",
        choices=("letterbox", "crop"),
    )
    steps: int = option("calls of the network for each frame", default=25, minimum=1)
    scheduler: str = option(
        "how noise becomes frames; ddpm has the learned variance", default="ddim", choices=SCHEDULERS
    )
    noise: str = option(
        "shared by the frames of a film, so that what does not move stays as it is, or each has its own",
        default="shared",
        choices=("shared", "fresh"),
    )
    seed: int = option("of all films", default=0, **SEEDS)
    frames_per_call: int | None = option(
        "frames that go through the network together; as many as fit by default", default=None, minimum=1
    )
    dtype: str | None = option(
        "of the network: bfloat16 on CUDA, float32 on a CPU; with AMX bfloat16 is several times as fast there too",
        default=None,
        choices=DTYPES,
    )
    device: str | None = option("cpu, cuda, cuda:1; by default CUDA where there is one", default=None)
    force: bool = option("make anew what is there", default=False)

    def __post_init__(self) -> None:
        check(self)
        names = [film.stem for film in self.films]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"films has {', '.join(twice)} more than once; expected names that differ in one folder")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(ModelJob):
    """Train a network on clips, in a folder: states/ to go on from, model/ to sample from, log.jsonl, loss.png and
    previews/. The same command again goes on where the run was stopped, to the bit; a state of other settings is
    refused. --preset small, the default, is a network for the synthetic clips that a CPU can train; landscape is the
    published one, trained as in the paper. With --superres it is a network that makes frames four times as large, of 16
    x 16 by default, with landscape the published one.
    """

    summary: ClassVar = "a network on clips of a folder, or on synthetic ones"
    examples: ClassVar = (
        "train synthetic --out run",
        "train films --preset landscape --micro-batch 2 --precision bfloat16 --out run",
        "train synthetic --superres --steps 2000 --out run-sr",
        "sample --model run/model --superres run-sr/model --out clips",
    )

    data: str = option(_DATA_HELP, is_positional=True)
    out: pathlib.Path = option("the folder of the run; made if it is not there")
    superres: bool = option("a super-resolution network instead, on single frames", default=False)
    steps: int = option("the step at which the run ends", default=100_000, minimum=1)
    batch_size: int | None = option("clips of a step" + _OF_PRESET, default=None, minimum=1)
    micro_batch: int | None = option("clips of one call of the network" + _OF_PRESET, default=None, minimum=1)
    lr: float | None = option("learning rate" + _OF_PRESET, default=None, minimum=0)
    warmup: int | None = option("steps over which the learning rate grows from 0" + _OF_PRESET, default=None, minimum=0)
    weight_decay: float | None = option("of AdamW" + _OF_PRESET, default=None, minimum=0)
    clip_norm: float | None = option("largest norm of the gradients, 0 for any" + _OF_PRESET, default=None, minimum=0)
    ema_rates: tuple[float, ...] | None = option("of the averages of the parameters" + _OF_PRESET, default=None)
    weighting: str | None = option("of the loss by t" + _OF_PRESET, default=None, choices=WEIGHTINGS)
    min_snr_gamma: float | None = option("gamma of the weighting min-snr" + _OF_PRESET, default=None, minimum=0)
    timesteps: str | None = option("how t is drawn" + _OF_PRESET, default=None, choices=TIMESTEPS)
    precision: str | None = option("what the network computes in" + _OF_PRESET, default=None, choices=DTYPES)
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
    trackers: tuple[str, ...] | None = option(
        "what shows the curve besides loss.png; tensorboard, where it is installed, if not given",
        default=None,
        choices=TRACKERS,
    )

    @property
    def recipe(self) -> Recipe:
        """That of the preset, with what is given here in its place."""
        from mmdiffusion.training.recipe import RECIPES, SUPERRES_RECIPES, Recipe

        preset = (SUPERRES_RECIPES if self.superres else RECIPES).get(self.model_preset or "landscape", Recipe())
        names = [field.name for field in dataclasses.fields(Recipe)]
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return dataclasses.replace(preset, **given)

    @property
    def model_preset(self) -> str | None:
        """That of the recipe, and of the network where it does not come from a file."""
        return self.preset or (None if self.init or self.resume else "small")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.superres and self.resume:
            raise ValueError(f"resume is {self.resume} and superres is given; expected init, of its weights alone")
        if self.superres and self.preset not in (None, *SUPERRES_PRESETS):
            expected = ", ".join(map(repr, SUPERRES_PRESETS))
            raise ValueError(f"preset is {self.preset!r}; expected one of {expected} with superres")
        if self.init and self.resume:
            raise ValueError(f"init is {self.init} and resume {self.resume}; expected one of them")
        refuse_unused(self, self.data != "synthetic", "films as data", "flip")
        refuse_unused(self, self.recipe.weighting == "min-snr", "weighting min-snr", "min_snr_gamma")
        refuse_unused(self, self.preview_every, "preview_every", "preview_clips")
        if "none" in (self.trackers or ()) and len(set(self.trackers or ())) > 1:
            raise ValueError(f"trackers is {' '.join(self.trackers or ())}; expected none alone, or others")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Compare folders of films, of any model, with a folder of real ones: Frechet and kernel distances of both streams
    and the agreement of motion and sound, each with its standard error. Silent films and sounds alone are measured by
    what they have. With published weights of I3D and AudioCLIP the distances are FVD, KVD and FAD; without them they
    are of low-level statistics, which docs/evaluation.md describes. What is measured of a film is kept by its content,
    so that the same command again goes on where it was stopped; processes of `accelerate launch` share the films.
    """

    summary: ClassVar = "films of models against real ones: distances, synchrony and memorisation"
    examples: ClassVar = (
        "eval --real films --fake ours theirs",
        "eval --real films --fake ours --i3d i3d.pt --audioclip AudioCLIP-Full-Training.pt --out table",
        "eval --real train --fake ours --i3d i3d.pt --audioclip AudioCLIP-Full-Training.pt --published",
        "eval --real held-out --fake ours --training train --out table    # does it repeat training films?",
    )

    real: pathlib.Path = option("folder of real films", metavar="DIR")
    fake: tuple[pathlib.Path, ...] = option("folders to compare with it", metavar="DIR")
    i3d: pathlib.Path | None = option("published weights of I3D", default=None)
    audioclip: pathlib.Path | None = option("published weights of AudioCLIP", default=None)
    published: bool = option(
        "all as the published script has it: 2048 clips, drawn of those that begin at every frame, the first channel "
        "of sound, FAD times 10,000; says where that script errs",
        default=False,
    )
    training: pathlib.Path | None = option(
        "folder of what the models were trained on: finds the nearest clip of it for each clip of --fake, beside those "
        "for the clips of --real, which no model may have seen then",
        default=None,
        metavar="DIR",
    )
    training_step: int = option(
        "frames between the beginnings of training clips that are compared", default=4, minimum=1, maximum=1000
    )
    out: pathlib.Path | None = option(
        "writes OUT.md, OUT.json and OUT.png; with --training OUT.nearest.png and OUT.pairs-N.png too, N of --fake",
        default=None,
    )
    clips: int = option("of a folder at most, the first of its films", default=2048, minimum=2, maximum=1_000_000)
    frames: int = option("of a clip", default=16, minimum=9, maximum=1000)
    size: int = option("height and width, to which pictures are letterboxed", default=64, minimum=8, maximum=1024)
    fps: float = option("frames a second", default=10.0, minimum=0.1, maximum=1000)
    sample_rate: int = option(
        "samples a second; AudioCLIP takes its own", default=16000, minimum=2000, maximum=1_000_000
    )
    cache: pathlib.Path | None = option(
        "folder of what is known of films; mmdiffusion in the user's cache if not given", default=None
    )
    device: str | None = option("cpu, cuda, cuda:1; by default CUDA where there is one", default=None)
    force: bool = option("overwrite what is there", default=False)

    def __post_init__(self) -> None:
        check(self)
        refuse_unused(self, self.out, "out", "force")
        refuse_unused(self, self.training, "training", "training_step")
        for name, value in FIXED.items() if self.published else ():
            if getattr(self, name) != value:
                raise ValueError(f"{name} is {getattr(self, name)}; expected {value:g}, as published fixes it")
        if self.published and not (self.i3d or self.audioclip):
            raise ValueError("published is given without weights; expected i3d, audioclip or both")
        for number, folder in enumerate(self.fake):
            if folder.resolve() in [x.resolve() for x in self.fake[:number]]:
                raise ValueError(f"fake has {folder} twice; expected each folder once")
        if self.training and self.training.resolve() == self.real.resolve():
            raise ValueError(f"training is {self.training}, as real is; expected films in real that no model has seen")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasureSynchrony(ModelJob):
    """Sample clips of a model that was trained on the synthetic world, and measure by their pixels and samples alone
    how many of the bounces seen are heard within one frame, and how many onsets have no bounce: of both streams made
    together, and of each made from the other's real clips. Real clips are the ceiling, and each with the sound of
    another one is the floor.
    """

    summary: ClassVar = "how far what a model of the synthetic world shows is what it lets hear"
    examples: ClassVar = (
        "synchrony",
        "synchrony --model run/model",
        "synchrony --model run/model --clips 32 --ways joint --dtype bfloat16",
        "synchrony --model run/model --steps 30 --out synchrony    # synchrony.md and synchrony.json",
    )

    model: pathlib.Path = option(
        "a published checkpoint, or a directory of save_pretrained; by default the small model of the package",
        default=PACKAGED,
    )
    clips: int = option("of each way", default=256, minimum=2, maximum=100_000)
    steps: int = option("calls of the model for a clip", default=20, minimum=1)
    ways: tuple[str, ...] = option(
        "what is sampled: joint is both streams together, the others one stream from real clips of the other",
        default=tuple(WAYS),
        choices=tuple(WAYS),
    )
    guidance: tuple[str, ...] = option(
        f"how the stream that is given steers the other: {_GUIDANCE_HELP}", default=GUIDANCES, choices=GUIDANCES
    )
    guidance_scale: float | None = option(_SCALE_HELP, default=None, metavar="SCALE")
    scheduler: str = option("how noise becomes clips", default="dpmsolver++", choices=SCHEDULERS)
    seed: int = option("of the noise", default=0, **SEEDS)
    world: int = option(
        "seed of the synthetic world that the real clips are of; a world that is not that of training, which is of its "
        "--seed, has clips that the model has not seen",
        default=_UNSEEN_WORLD,
        **SEEDS,
    )
    batch_size: int = option("clips sampled together", default=16, minimum=1)
    dtype: str | None = option(
        "of the model: bfloat16 on CUDA, float32 on a CPU, where with AMX bfloat16 is faster too",
        default=None,
        choices=DTYPES,
    )
    device: str | None = option("cpu, cuda, cuda:1; by default CUDA where there is one", default=None)
    out: pathlib.Path | None = option("writes OUT.md and OUT.json", default=None)
    force: bool = option("overwrite them", default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        is_given = any(WAYS[way] for way in self.ways)
        refuse_unused(self, is_given, "ways video-from-audio or audio-from-video", "guidance", "guidance_scale")
        refuse_unused(self, "gradient" in self.guidance, "guidance gradient", "guidance_scale")
        refuse_unused(self, self.out, "out", "force")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasurePsnr:
    """Make small images of frames that a super-resolution network was not trained on, make them large again by it and
    by bicubic resizing, and measure how near both come to the frames: the peak signal-to-noise ratio, 10 log10(255^2 /
    mean squared error) dB, mean over the frames. The small images are resized alone, and degraded as in training (with
    noise and JPEG, each in half of them).
    """

    summary: ClassVar = "how near a super-resolution network comes to real frames, beside bicubic resizing"
    examples: ClassVar = (
        "psnr synthetic",
        "psnr films --model sr.pt --frames 64 --dtype bfloat16 --out psnr    # psnr.md, psnr.json and psnr.png",
    )

    data: str = option(_DATA_HELP, is_positional=True)
    model: pathlib.Path = option(
        "a published checkpoint, or a directory of save_pretrained; by default the small network of the package, for "
        "frames of its synthetic world",
        default=PACKAGED_SUPERRES,
    )
    config: pathlib.Path | None = option(
        "JSON with arguments of SuperResolutionUNet, over what is inferred", default=None, metavar="FILE"
    )
    frames: int = option("that are measured", default=256, minimum=1, maximum=100_000)
    steps: int = option("calls of the network for each frame", default=25, minimum=1)
    scheduler: str = option("how noise becomes frames", default="ddim", choices=SCHEDULERS)
    seed: int = option("of the noise and the degradations", default=0, **SEEDS)
    world: int = option(
        "seed of the synthetic world that the frames are of; a world that is not that of training, which is of its "
        "--seed, has frames that the network has not seen",
        default=_UNSEEN_WORLD,
        **SEEDS,
    )
    batch_size: int = option("frames sampled together", default=16, minimum=1)
    dtype: str | None = option("of the network: bfloat16 on CUDA, float32 on a CPU", default=None, choices=DTYPES)
    device: str | None = option("cpu, cuda, cuda:1; by default CUDA where there is one", default=None)
    out: pathlib.Path | None = option("writes OUT.md, OUT.json and OUT.png, a row for a frame", default=None)
    force: bool = option("overwrite them", default=False)

    def __post_init__(self) -> None:
        check(self)
        refuse_unused(self, self.data == "synthetic", "synthetic as data", "world")
        refuse_unused(self, self.out, "out", "force")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert(ModelJob):
    """Convert a published checkpoint (.pt, .safetensors), of super-resolution too, into a directory that
    from_pretrained of MMDiffusionPipeline or SuperResolutionPipeline loads; a directory of save_pretrained back into a
    published checkpoint, or into another directory, of another dtype.
    """

    summary: ClassVar = "a published checkpoint into a directory of a pipeline, and back"
    examples: ClassVar = (
        "convert landscape.pt landscape --preset landscape",
        "convert ours.pt ours --config ours.json --dtype bfloat16",
        "convert landscape landscape.pt",
        "convert run/model half --dtype float16",
    )

    source: pathlib.Path = option("what is converted", metavar="IN", is_positional=True)
    target: pathlib.Path = option("what is written", metavar="OUT", is_positional=True)
    dtype: str | None = option(
        "of the result; if not given, that of a published checkpoint, float32 from a directory",
        default=None,
        choices=DTYPES,
    )
    force: bool = option("overwrite OUT", default=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomWeights(ModelJob):
    """Make a checkpoint in the published format with random weights, to try the other commands without a trained
    one. By default it has the size of the published models, 535 MB, with --superres 1.2 GB; --preset tiny is small
    and quick.
    """

    summary: ClassVar = "a checkpoint of random weights, to try the other commands"
    examples: ClassVar = ("random landscape.pt", "random tiny.pt --preset tiny", "random sr.pt --superres")

    target: pathlib.Path = option(".pt or .safetensors", metavar="OUT", is_positional=True)
    seed: int = option("of the weights", default=0, **SEEDS)
    superres: bool = option("a super-resolution network instead", default=False)
    force: bool = option("overwrite OUT", default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.superres and self.preset:
            raise ValueError(f"preset is {self.preset!r} and superres is given; expected one of them")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Info(ModelJob):
    """Print the configuration and the parameters of a directory of save_pretrained, or of a published checkpoint
    as it is inferred.
    """

    summary: ClassVar = "configuration and size of a model"
    examples: ClassVar = ("info", "info landscape", "info landscape.pt", "info sr.pt")

    path: pathlib.Path = option(
        "a published checkpoint, of super-resolution too, or a directory; by default the small model of the package",
        default=PACKAGED,
        is_positional=True,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FormatJob:
    """Options of a job with clips of a format."""

    frames: int = option("of a clip", default=16, minimum=1, maximum=100_000)
    size: int = option("height and width", default=64, minimum=1, maximum=4096)
    fps: float = option("frames a second", default=10.0, minimum=0.001, maximum=100_000)
    sample_rate: int = option("samples a second", default=16000, minimum=1, maximum=1_000_000)

    def __post_init__(self) -> None:
        check(self)

    @property
    def clip_format(self) -> ClipFormat:
        """Of the clips."""
        samples = round(self.frames * self.sample_rate / self.fps)
        return ClipFormat((self.frames, 3, self.size, self.size), (1, samples), self.fps, self.sample_rate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilmJob(FormatJob):
    """Options of a job with films."""

    fit: str = option(
        "how pictures become square: letterbox as the published models were trained",
        default="letterbox",
        choices=("letterbox", "crop"),
    )
    cache: pathlib.Path | None = option(
        "folder that keeps what is known of the films; mmdiffusion in the user's cache if not given", default=None
    )
    workers: int | None = option("films opened side by side; one for each CPU if not given", default=None, minimum=1)

    @property
    def options(self) -> dict[str, Any]:
        """Of ClipDataset."""
        return {"fit": self.fit, "cache": self.cache, "processes": self.workers, "progress": True}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckFilms(FilmJob):
    """Look at all files below a folder: how long each is, what its streams are, how many clips begin in it, or why it
    is of no use; with --sheet, read random clips too and draw them. Of a packed file, all of it is read and checked.
    What is known of a file is kept until the file changes; nothing is written to the folder.
    """

    summary: ClassVar = "what films a folder has, and why some are of no use"
    examples: ClassVar = (
        "data check films",
        "data check films --sheet films.png --frames 16 --size 64",
        "data check films.pack",
    )

    source: pathlib.Path = option("the folder, or a packed file", metavar="FOLDER", is_positional=True)
    sheet: pathlib.Path | None = option("picture of random clips, which are read for it", default=None, metavar="PNG")
    clips: int = option("random clips to draw", default=8, minimum=1, maximum=64)
    seed: int = option("of their choice", default=0, **SEEDS)
    force: bool = option("overwrite the sheet", default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_unused(self, self.sheet, "sheet", "clips", "seed", "force")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackFilms(FilmJob):
    """Decode all films of a folder, at one size and one rate, into one file to train on: a second of 64x64 at 10
    frames and 16 kHz takes 155 kB.
    """

    summary: ClassVar = "films of a folder, decoded, in one file"
    examples: ClassVar = ("data pack films films.pack", "data pack films small.pack --size 32 --sample-rate 4000")

    source: pathlib.Path = option("the folder", metavar="FOLDER", is_positional=True)
    target: pathlib.Path = option("the file", metavar="OUT", is_positional=True)
    force: bool = option("overwrite OUT", default=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteSynthetic(FormatJob):
    """Write clips of the synthetic world, as films to look at or to train on, with a contact sheet, and measure how
    synchronous its clips are by their pixels and samples: as they are, and each with the sound of another.
    """

    summary: ClassVar = "clips of the synthetic world, and how synchronous they are"
    examples: ClassVar = ("data synthetic balls", "data synthetic balls --clips 64 --size 32 --sample-rate 4000")

    out: pathlib.Path = option("the folder; made if it is not there", metavar="OUT", is_positional=True)
    clips: int = option("films to write", default=4, minimum=1, maximum=1_000_000)
    measured: int = option("clips to measure", default=256, minimum=2, maximum=100_000)
    seed: int = option("of the world", default=0, **SEEDS)
    force: bool = option("overwrite what is there", default=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MakeStudy:
    """Make the folder of a study: films under names that tell nothing, as they are unless no browser plays them, and
    the database of its votes. Each rater scores films of every folder, 1 to 5, for picture, sound and how they fit;
    then, of other films, half of them real, says which are real.
    """

    summary: ClassVar = "the folder of a study, from folders of films"
    examples: ClassVar = ("study make --real films --ours samples --other digan tats --out study",)

    real: pathlib.Path = option("folder of real films", metavar="DIR")
    ours: pathlib.Path = option("folder of films of the model in question", metavar="DIR")
    other: tuple[pathlib.Path, ...] = option("folders of other models' films", default=(), metavar="DIR")
    out: pathlib.Path = option("the study's folder")
    ratings: int = option("films of each folder that a rater scores", default=4, minimum=1, maximum=1000)
    guesses: int = option(
        "films of each model that a rater judges to be real or not, among as many real ones",
        default=3,
        minimum=1,
        maximum=1000,
    )
    seed: int | None = option(
        "of orders and choices; secret if not given, which a study should be", default=None, **SEEDS
    )

    def __post_init__(self) -> None:
        check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeStudy:
    """Serve the pages of a study and take its votes, until stopped; it goes on where it was. Only this machine reaches
    it unless --host says otherwise. Whoever does reach it can take part.
    """

    summary: ClassVar = "serve a study's pages and take votes"
    examples: ClassVar = ("study serve study", "study serve study --host 0.0.0.0 --port 8080")

    study: pathlib.Path = option("the study's folder", is_positional=True)
    host: str = option("address to listen at", default="127.0.0.1")
    port: int = option("0 for any that is free", default=8000, minimum=0, maximum=65535)

    def __post_init__(self) -> None:
        check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TallyStudy:
    """Count the votes of a study: means and shares with 95% intervals, and how far raters agree. A study that is being
    served can be counted too.
    """

    summary: ClassVar = "what the votes of a study say"
    examples: ClassVar = ("study tally study --out result",)

    study: pathlib.Path = option("the study's folder", is_positional=True)
    out: pathlib.Path | None = option("writes OUT.md, OUT.json and OUT.png", default=None)
    force: bool = option("overwrite what is there", default=False)

    def __post_init__(self) -> None:
        check(self)
        refuse_unused(self, self.out, "out", "force")
