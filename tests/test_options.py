# SPDX-License-Identifier: MIT
"""No option of a command is ignored in silence: in each mode it has an effect, or it is refused."""

import dataclasses
import pathlib
import shlex

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("av")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from mmdiffusion import SuperResolutionUNet, checkpoints, cli
from mmdiffusion.clips import ClipFormat
from mmdiffusion.data import ClipDataset, pack
from mmdiffusion.diffusion import schedulers
from mmdiffusion.media import write_video
from mmdiffusion.runs import jobs
from mmdiffusion.runs.options import refuse_unused
from mmdiffusion.training import recipe

UNUSED = {
    "sample --out o --start 1": "start is 1.0, which has no effect here; expected audio_from or video_from with it",
    "sample --out o --overlap 0.7": "overlap is 0.7, which has no effect here; expected seconds with it",
    "sample --out o --guidance gradient": "guidance is 'gradient', which has no effect here; expected audio_from or",
    "sample --out o --audio-from a.wav --guidance-scale 2": "guidance_scale is 2.0, which has no effect here; expected",
    "sample --out o --superres-steps 5": "superres_steps is 5, which has no effect here; expected superres with it",
    "sample --out o --preset tiny": "has its own configuration; expected neither --preset nor --config",
    "sample --out o --config c.json": "has its own configuration; expected neither --preset nor --config",
    "sample --out o --preset tiny --config c.json": "preset is tiny and config c.json; expected one of them",
    "superres film.mp4 --out o --model sr --config c.json": "sr has its own configuration; expected no --config",
    "train synthetic --out o --flip": "flip is True, which has no effect here; expected films as data with it",
    "train synthetic --out o --min-snr-gamma 3": "min_snr_gamma is 3.0, which has no effect here; expected weighting",
    "train synthetic --out o --preview-every 0 --preview-clips 2": "preview_clips is 2, which has no effect here",
    "train synthetic --out o --init sr --config c.json": "sr has its own configuration; expected neither --preset",
    "train synthetic --out o --init a --resume b": "init is a and resume b; expected one of them",
    "eval --real films --fake films --force": "force is True, which has no effect here; expected out with it",
    "eval --real films --fake films --training-step 2": "training_step is 2, which has no effect here",
    "synchrony --ways joint --guidance gradient": "guidance is ('gradient',), which has no effect here; expected ways",
    "synchrony --ways joint --guidance-scale 1": "guidance_scale is 1.0, which has no effect here; expected ways",
    "synchrony --guidance replacement --guidance-scale 1": "guidance_scale is 1.0, which has no effect here",
    "synchrony --force": "force is True, which has no effect here; expected out with it",
    "synchrony --preset tiny": "has its own configuration; expected neither --preset nor --config",
    "synchrony --config c.json": "has its own configuration; expected neither --preset nor --config",
    "psnr synthetic --force": "force is True, which has no effect here; expected out with it",
    "psnr films --world 2": "world is 2, which has no effect here; expected synthetic as data with it",
    "psnr synthetic --model sr --config c.json": "sr has its own configuration; expected no --config",
    "convert sr out --preset tiny": "preset is 'tiny'; expected none, as sr is a super-resolution network",
    "convert sr out --config c.json": "sr has its own configuration; expected no --config",
    "info sr --preset tiny": "preset is 'tiny'; expected none, as sr is a super-resolution network",
    "info --config c.json": "has its own configuration; expected neither --preset nor --config",
    "random r.pt --superres --preset tiny": "preset is 'tiny' and superres is given; expected one of them",
    "data check films.pack --size 16 --fit crop": "fit is 'crop', which has no effect here; expected a folder with it",
    "data check films.pack --size 16 --workers 2": "workers is 2, which has no effect here; expected a folder with it",
    "data check films.pack --size 16 --cache c": "which has no effect here; expected a folder with it",
    "data check films --size 16 --force": "force is True, which has no effect here; expected sheet with it",
    "data check films --size 16 --clips 2": "clips is 2, which has no effect here; expected sheet with it",
    "data check films --size 16 --seed 2": "seed is 2, which has no effect here; expected sheet with it",
    "study tally study --force": "force is True, which has no effect here; expected out with it",
}
"""By command line, what it says."""

HAVE_AN_EFFECT = {
    "sample": "model out num steps scheduler seed seconds audio_from video_from superres batch_size dtype device "
    "formats force",
    "superres": "films model out fit steps scheduler noise seed frames_per_call dtype device force",
    "train": "data out steps batch_size micro_batch lr warmup weight_decay clip_norm ema_rates weighting timesteps "
    "superres precision seed device gradient_checkpointing workers log_every checkpoint_every keep "
    "preview_every preset trackers",
    "eval": "real fake i3d audioclip published training out clips frames size fps sample_rate cache device",
    "synchrony": "model clips steps ways scheduler seed world batch_size dtype device out",
    "psnr": "data model frames steps scheduler seed batch_size dtype device out",
    "convert": "source target dtype force",
    "random": "config target seed force",
    "info": "path",
    "data check": "frames size fps sample_rate source sheet",
    "data pack": "frames size fps sample_rate fit cache workers source target force",
    "data synthetic": "frames size fps sample_rate out clips measured seed force",
    "study make": "real ours other out ratings guesses seed",
    "study serve": "study host port",
    "study tally": "study out",
}
"""Options that are used whatever the others are."""


def test_every_option_is_in_a_table():
    """A new one has to be thought about: does it have an effect in every mode, or is it refused?"""
    for command, (job, _) in cli.COMMANDS.items():
        names = {field.name for field in dataclasses.fields(job)}
        used = set(HAVE_AN_EFFECT[command].split())
        lines = " ".join(line for line in UNUSED if line.startswith(f"{command} "))
        refused = {name for name in names if f"--{name.replace('_', '-')}" in lines}
        assert names - used <= refused and used <= names, (command, names - used - refused, used - names)


def test_choices_are_all_that_there_is():
    """Those that are written out, so that help needs no torch."""
    assert tuple(checkpoints.PRESETS) == jobs.PRESETS and tuple(checkpoints.SUPERRES_PRESETS) == jobs.SUPERRES_PRESETS
    assert tuple(schedulers.SCHEDULERS) == jobs.SCHEDULERS
    assert (recipe.WEIGHTINGS, recipe.TIMESTEPS, recipe.PRECISIONS) == (jobs.WEIGHTINGS, jobs.TIMESTEPS, jobs.DTYPES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    top = tmp_path_factory.mktemp("options")
    (top / "films").mkdir()
    write_video(top / "films" / "one.mp4", torch.zeros(20, 3, 16, 16), torch.zeros(1, 32000))
    form = ClipFormat((16, 3, 16, 16), (1, 25600))
    pack(ClipDataset(top / "films", form, processes=1, cache=top / "cache"), top / "films.pack")
    SuperResolutionUNet(image_size=16, model_channels=32, num_res_blocks=1, channel_mult=(1,)).save_pretrained(
        top / "sr"
    )
    (top / "c.json").write_text("{}")
    return top


@pytest.mark.parametrize(("line", "expected"), UNUSED.items(), ids=UNUSED)
def test_an_option_without_effect_is_refused(folder, monkeypatch, capsys, line, expected):
    monkeypatch.chdir(folder)
    before = sorted(pathlib.Path().rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        cli.main(shlex.split(line))
    assert stopped.value.code == 2 and expected in capsys.readouterr().err
    assert sorted(pathlib.Path().rglob("*")) == before


def test_a_default_is_no_option_without_effect():
    @dataclasses.dataclass
    class Job:
        scale: float = 0.5

    refuse_unused(Job(0.5), False, "x", "scale")
    refuse_unused(Job(0.7), True, "x", "scale")
    with pytest.raises(ValueError, match=r"scale is 0\.7, which has no effect here; expected x with it"):
        refuse_unused(Job(0.7), False, "x", "scale")
