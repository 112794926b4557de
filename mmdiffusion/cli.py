# SPDX-License-Identifier: MIT
"""The command `mmdiffusion`. A subcommand is a function of the parsed arguments and its entry in `_parser`."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors import SafetensorError

import mmattn
from mmdiffusion import CoupledUNet, MMDiffusionPipeline, checkpoints
from mmdiffusion.diffusion.schedulers import SCHEDULERS, make_scheduler

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a subcommand; what it refuses goes to stderr in one line, with exit status 2 (130 if interrupted)."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (OSError, ValueError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
        print(f"mmdiffusion {options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"mmdiffusion {options.command}: interrupted; what was finished is kept", file=sys.stderr)
        sys.exit(130)


class _Processes:
    """This process among those that `accelerate launch` started, or alone."""

    def __init__(self, device: str | None) -> None:
        self._state: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            self._state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
        self.rank = self._state.process_index if self._state else 0
        self.count = self._state.num_processes if self._state else 1
        own = self._state.device if self._state else torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.device = own if device in (None, own.type) else torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"--device is {device}; expected cpu, as torch finds no CUDA device")

    def wait(self) -> None:
        """Until all are here."""
        if self._state:
            self._state.wait_for_everyone()


def sample(options: argparse.Namespace) -> None:
    """Sample into a folder the clips that it lacks."""
    from mmdiffusion import media
    from mmdiffusion.runs import folder

    for name in ("num", "steps", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}; expected 1 or more")
    if options.audio_from and options.video_from:
        raise ValueError("--audio-from and --video-from are both given; expected one of them, to find the other")
    scheduler = make_scheduler(options.scheduler)
    processes = _Processes(options.device)
    if processes.device.type == "cpu":
        mmattn.keep_freed_memory()
    dtype = options.dtype or ("float32" if processes.device.type == "cpu" else "bfloat16")
    unet = _load(options.model, options.preset, options.config)
    pipeline = MMDiffusionPipeline(torch.nn.Module.to(unet, processes.device, _DTYPES[dtype]), scheduler)
    clips = pipeline.clip_format
    if clips.video_size[1] != 3 or clips.audio_size[0] > 2:
        raise ValueError(
            f"{options.model} makes video {list(clips.video_size)} and audio {list(clips.audio_size)}; expected 3 "
            "channels of video, and 1 or 2 of audio"
        )
    clips.check_rates()
    source, stream = options.audio_from or options.video_from, "audio" if options.audio_from else "video"
    length = max(clips.frames, clips.windows(options.seconds, options.overlap)[0])
    given = {}
    if source:
        clip = media.read_clip(
            source,
            num_frames=length,
            fps=clips.frame_rate,
            sample_rate=clips.sample_rate,
            size=(clips.video_size[2], clips.video_size[3]),
            start=options.start,
            need=[stream],
        )
        given[stream] = getattr(clip, stream)[None]
    settings = {
        "model": folder.digest(options.model),
        "config": {name: value for name, value in unet.config.items() if not name.startswith("_")},
        "dtype": dtype,
        "seed": options.seed,
        "steps": options.steps,
        "scheduler": options.scheduler,
        "seconds": options.seconds,
        "overlap": options.overlap,
        "guidance": options.guidance if source or options.seconds else None,
        "guidance_scale": options.guidance_scale if options.guidance == "gradient" else None,
        f"{stream}_from": folder.digest(source) if source else None,
        "start": options.start,
    }
    if options.force and processes.rank == 0:
        folder.Folder.clear(options.out)
    processes.wait()
    target = folder.Folder(
        options.out,
        settings,
        frame_rate=clips.frame_rate,
        sample_rate=clips.sample_rate,
        formats=options.formats,
        rank=processes.rank,
    )
    folder.fill(
        target,
        pipeline,
        range(processes.rank, options.num, processes.count),
        seed=options.seed,
        steps=options.steps,
        scheduler=scheduler,
        batch_size=options.batch_size,
        seconds=options.seconds,
        overlap=options.overlap,
        guidance=options.guidance,
        guidance_scale=options.guidance_scale,
        is_quiet=processes.rank > 0,
        **given,
    )
    processes.wait()
    if processes.rank == 0:
        target.merge()
        print(f"{options.out}: {options.num} clips")


def random(options: argparse.Namespace) -> None:
    """A checkpoint of random weights."""
    _refuse_to_overwrite(options.target, options.force)
    torch.manual_seed(options.seed)
    unet = CoupledUNet(**{**checkpoints.PRESETS[options.preset or "landscape"], **_read_config(options.config)})
    for parameter in unet.parameters():
        if parameter.dim() > 1 and not parameter.any():  # born as zero, and all that follows it too
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    checkpoints.write(unet.to_published(), options.target)
    print(f"{options.target}: random weights, of no use but to try things")


def convert(options: argparse.Namespace) -> None:
    """Between a published checkpoint and a directory of save_pretrained."""
    source, target = options.source, options.target
    _refuse_to_overwrite(target, options.force)
    is_back = source.is_dir()
    if is_back and (options.preset or options.config):
        raise ValueError(f"{source} has its own configuration; expected neither --preset nor --config")
    if is_back and target.suffix not in (".pt", ".safetensors"):
        raise ValueError(f"OUT is {target}; expected a .pt or .safetensors file, as IN is a directory")
    unet = _load(source, options.preset, options.config)
    if options.dtype:
        torch.nn.Module.to(unet, _DTYPES[options.dtype])  # that of diffusers warns of modules that are not here
    if is_back:
        checkpoints.write(unet.to_published(), target)
    else:
        _save(unet, target)
    print(f"{source} -> {target}")


def info(options: argparse.Namespace) -> None:
    """The configuration, and the parameters of each part."""
    unet = _load(options.path, options.preset, options.config)
    for name, value in unet.config.items():
        if not name.startswith("_"):
            print(f"{name:28} {json.dumps(value)}")
    print()
    counts = {name: sum(x.numel() for x in part.parameters()) for name, part in unet.named_children()}
    for name, count in {**counts, "total": sum(counts.values())}.items():
        print(f"{name:28} {count / 1e6:8.2f} M parameters")


def _load(source: pathlib.Path, preset: str | None, config: pathlib.Path | None) -> CoupledUNet:
    if source.is_dir():
        # A pipeline's directory has the model in one of its own. Without low_cpu_mem_usage=False accelerate is needed.
        folder = source / "unet" if (source / "model_index.json").exists() else source
        return CoupledUNet.from_pretrained(folder, low_cpu_mem_usage=False)
    return CoupledUNet.from_published(source, preset=preset, **_read_config(config))


def _save(unet: CoupledUNet, target: pathlib.Path) -> None:
    """save_pretrained, whose files are there whole or not at all."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as part:
        unet.save_pretrained(part)
        target.mkdir(exist_ok=True)
        for file in pathlib.Path(part).iterdir():
            file.replace(target / file.name)


def _read_config(path: pathlib.Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}; expected arguments of CoupledUNet by name")
    return config


def _refuse_to_overwrite(target: pathlib.Path, is_forced: bool) -> None:
    if target.exists() and not is_forced:
        raise FileExistsError(f"{target} exists; --force overwrites it")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("mmdiffusion", description="Joint diffusion of video and its sound.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    checkpoint = argparse.ArgumentParser(add_help=False)
    configuration = checkpoint.add_mutually_exclusive_group()
    configuration.add_argument("--preset", choices=list(checkpoints.PRESETS), help="configuration of a released model")
    configuration.add_argument(
        "--config", type=pathlib.Path, metavar="FILE", help="JSON with arguments of CoupledUNet, over what is inferred"
    )

    def add(name: str, run: Callable[[argparse.Namespace], None], **texts: Any) -> argparse.ArgumentParser:
        as_written = argparse.RawDescriptionHelpFormatter
        command: argparse.ArgumentParser = commands.add_parser(
            name, parents=[checkpoint], formatter_class=as_written, **texts
        )
        command.set_defaults(run=run)
        return command

    command = add(
        "sample",
        sample,
        help="clips of video and sound, or one from the other",
        description="Sample clips into a folder: clip-0000.mp4 and on, a contact sheet of each, and samples.json with\n"
        "all settings, seeds, versions and seconds. The same command again makes what is missing, and --num\n"
        "can grow: a clip depends on the seed and its number alone.",
        epilog="examples:\n"
        "  mmdiffusion sample --model landscape.pt --num 4 --steps 20 --seed 7 --out out\n"
        "  mmdiffusion sample --model landscape.pt --audio-from rain.mp4 --guidance gradient --out rain\n"
        "  mmdiffusion sample --model landscape --seconds 8 --dtype bfloat16 --out long\n"
        "  accelerate launch --multi_gpu --num_processes 2 -m mmdiffusion sample --model landscape.pt --out out",
    )
    path: dict[str, Any] = {"type": pathlib.Path, "metavar": "PATH"}
    command.add_argument(
        "--model", required=True, **path, help="a published checkpoint, or a directory of save_pretrained"
    )
    command.add_argument("--out", required=True, **path, help="the folder; made if it is not there")
    command.add_argument("--num", type=int, default=4, help="clips in the folder at the end (4)")
    command.add_argument("--steps", type=int, default=20, help="calls of the model for each window of a clip (20)")
    command.add_argument(
        "--scheduler", default="dpmsolver++", metavar="NAME", help=f"{', '.join(SCHEDULERS)} (dpmsolver++)"
    )
    command.add_argument("--seed", type=int, default=0, help="of all clips (0)")
    command.add_argument("--seconds", type=float, help="length of a clip; by default that of the model, 1.6")
    command.add_argument(
        "--overlap",
        type=float,
        default=0.5,
        help="share of a window that is the end of the one before, in longer clips (0.5)",
    )
    command.add_argument("--audio-from", **path, help="find the video of this file's sound")
    command.add_argument("--video-from", **path, help="find the sound of this file's video")
    command.add_argument("--start", type=float, default=0.0, metavar="SECONDS", help="where to begin in that file (0)")
    command.add_argument(
        "--guidance",
        choices=("replacement", "gradient"),
        default="replacement",
        help="how what is given acts; gradient follows it more closely and takes three times as long (replacement)",
    )
    command.add_argument(
        "--guidance-scale", type=float, default=1e-4, metavar="SCALE", help="weight of the gradient (1e-4)"
    )
    command.add_argument("--batch-size", type=int, default=1, help="clips sampled together (1)")
    command.add_argument(
        "--dtype",
        choices=list(_DTYPES),
        help="of the model: bfloat16 on CUDA, float32 on a CPU; with AMX bfloat16 is about 3 times as fast there too",
    )
    command.add_argument("--device", help="cpu, cuda, cuda:1; by default CUDA where there is one")
    command.add_argument(
        "--formats", nargs="+", choices=("mp4", "wav", "png"), default=["mp4", "png"], help="files of a clip (mp4 png)"
    )
    command.add_argument(
        "--force", action="store_true", help="remove the clips in the folder first, and those of other settings"
    )

    command = add(
        "convert",
        convert,
        help="a published checkpoint into a directory of save_pretrained, and back",
        description="Convert a published checkpoint (.pt, .safetensors) into a directory of save_pretrained; "
        "if IN is such a directory, back into a published checkpoint.",
        epilog="examples:\n"
        "  mmdiffusion convert landscape.pt landscape --preset landscape\n"
        "  mmdiffusion convert ours.pt ours --config ours.json --dtype bfloat16\n"
        "  mmdiffusion convert landscape landscape.pt",
    )
    command.add_argument("source", type=pathlib.Path, metavar="IN")
    command.add_argument("target", type=pathlib.Path, metavar="OUT")
    command.add_argument(
        "--dtype",
        choices=list(_DTYPES),
        help="of the result; if not given, that of a published checkpoint, float32 from a directory",
    )
    command.add_argument("--force", action="store_true", help="overwrite OUT")

    command = add(
        "random",
        random,
        help="a checkpoint of random weights, to try the other commands",
        description="Make a checkpoint in the published format with random weights, to try the other commands\n"
        "without a trained one. By default it has the size of the released models, 535 MB.",
        epilog="example:\n  mmdiffusion random landscape.pt",
    )
    command.add_argument("target", type=pathlib.Path, metavar="OUT", help=".pt or .safetensors")
    command.add_argument("--seed", type=int, default=0, help="of the weights (0)")
    command.add_argument("--force", action="store_true", help="overwrite OUT")

    command = add(
        "info",
        info,
        help="configuration and size of a model",
        description="Print the configuration and the parameters of a directory of save_pretrained, or of a published "
        "checkpoint as it is inferred.",
        epilog="examples:\n  mmdiffusion info landscape\n  mmdiffusion info landscape.pt",
    )
    command.add_argument("path", type=pathlib.Path, metavar="PATH")
    return parser
