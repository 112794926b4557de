# SPDX-License-Identifier: MIT
"""Training: the loss, the loop, and that a run that was stopped goes on as if it had not been."""

import dataclasses
import itertools
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import SMALL_UNET, fill, filled

pytest.importorskip("diffusers")
pytest.importorskip("av")
pytest.importorskip("matplotlib")
pytest.importorskip("accelerate")

import kill_resume
from safetensors import safe_open
from safetensors.torch import save_file

from mmattn.testing import relative_error
from mmdiffusion import CoupledUNet, checkpoints, cli
from mmdiffusion._files import alone_in, remove_parts
from mmdiffusion.data.items import Item
from mmdiffusion.diffusion.process import GaussianDiffusion
from mmdiffusion.diffusion.schedulers import make_scheduler
from mmdiffusion.runs import train as job
from mmdiffusion.runs.processes import Processes
from mmdiffusion.training import Recipe, State, States, train
from mmdiffusion.training.log import Log, time_left
from mmdiffusion.training.loop import _apply, _Clock
from mmdiffusion.training.losses import denoising_losses, loss_weights, variational_bound
from mmdiffusion.training.recipe import RECIPES
from mmdiffusion.training.state import read_state
from mmdiffusion.training.timesteps import LossSecondMomentTimesteps

TINY = {
    **checkpoints.PRESETS["landscape"],
    **SMALL_UNET,
    "audio_size": (1, 1600),
    "sample_rate": 4000,
    "channel_mult": (1,),
    "cross_attention_resolutions": (1,),
    "video_attention_resolutions": (-1,),
    "dropout": 0.1,
}
ROOT = pathlib.Path(__file__).resolve().parent.parent
SMALL_PRESET, SMALL_RECIPE = checkpoints.PRESETS["small"], RECIPES["small"]
RECIPE = Recipe(batch_size=4, micro_batch=2, lr=1e-3, ema_rates=(0.5, 0.9), seed=3)


class Clips:
    """Noise, each clip a function of its number."""

    def __init__(self, count=6):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        source = torch.Generator().manual_seed(i)
        video = torch.randint(256, TINY["video_size"], generator=source, dtype=torch.uint8)
        return Item(video, torch.randint(-9999, 9999, TINY["audio_size"], generator=source).short(), f"clip {i}")


def unet(**config):
    torch.manual_seed(0)
    return fill(CoupledUNet(**{**TINY, **config}))


def after(steps, *, state=None, recipe=RECIPE, data=None, **options):
    """The state after so many further steps."""
    own = unet() if state is None else state.unet
    return next(itertools.islice(train(own, data or Clips(), recipe, state=state, **options), steps - 1, None))


def same(a, b):
    """All of two states, to the bit, but for the times."""
    names = {"seconds", "meter"}
    numbers = [{name: x for name, x in state.numbers().items() if name not in names} for state in (a, b)]
    means = [{name: x for name, x in state.meter.sums.items() if not name.endswith("_s")} for state in (a, b)]
    tensors = a.tensors(), b.tensors()
    return (
        numbers[0] == numbers[1]
        and means[0] == means[1]
        and tensors[0].keys() == tensors[1].keys()
        and all(torch.equal(x, tensors[1][name]) for name, x in tensors[0].items())
    )


@pytest.fixture(autouse=True)
def small_and_here(monkeypatch, tmp_path, threads):
    """In an empty folder, with a small preset, and no process's memory changed for good."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(checkpoints.PRESETS, "small", TINY)
    monkeypatch.setitem(RECIPES, "small", RECIPE)
    monkeypatch.setattr(job.mmattn, "keep_freed_memory", lambda: True)
    threads(1)


@pytest.mark.parametrize(
    "changes", ({}, {"timesteps": "loss-second-moment"}, {"precision": "bfloat16"}), ids=("plain", "moments", "bf16")
)
def test_resumed_is_uninterrupted(tmp_path, changes):
    """To the bit: parameters, averages, optimizer, what is drawn, the clips' order past an epoch, the log's means."""
    recipe = dataclasses.replace(RECIPE, **changes)
    whole = after(5, recipe=recipe)
    first = after(2, recipe=recipe)
    States(tmp_path / "states", recipe.settings()).save(first, {})
    again = State(fill(CoupledUNet(**TINY), seed=9), recipe, 1000)
    States(tmp_path / "states", recipe.settings()).load(again)
    assert same(first, again) and not same(whole, again)
    assert same(whole, after(3, state=again, recipe=recipe))
    assert again.names == whole.names and len(whole.names) == 4


def test_what_is_drawn_before_does_not_matter():
    torch.manual_seed(5)
    assert same(after(2), after(2, workers=1))


def test_it_learns():
    losses = []
    for state in train(unet(), Clips(2), dataclasses.replace(RECIPE, lr=3e-3)):
        losses.append(state.meter.means()["loss"])
        state.meter.clear()
        if state.step == 30:
            break
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_parity():
    """As published: losses, gradients, three steps of AdamW and of the average (its rounding: 1e-7, 2e-6, 3e-4)."""
    with safe_open(ROOT / "tests/data/training.safetensors", "pt") as file:
        about = {name: json.loads(x) for name, x in file.metadata().items() if name != "grad_names"}
        expected = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    network = CoupledUNet.from_published(filled(about["state_dict"], about["fill_seed"]), **about["config"])
    recipe = Recipe(batch_size=4, micro_batch=4, lr=about["lr"], ema_rates=(about["ema_rate"],))
    state = State(network, recipe, 1000)
    clips = {name: expected[name] for name in ("video", "audio")}
    noises = {name: expected[f"noise_{name}"] for name in clips}

    def losses():
        return denoising_losses(network, GaussianDiffusion(), clips, noises, expected["t"], shifts=about["shifts"])

    def published(tensors):
        with torch.no_grad():
            twin = CoupledUNet.from_config(network.config)
            for name, x in twin.named_parameters():
                x.copy_(tensors[name])
        return twin.to_published()

    found = losses()
    for name in clips:
        assert relative_error(found[name], expected[f"mse_{name}"]) < 1e-6
    sum(found.values()).mean().backward()
    gradients = published({name: x.grad for name, x in network.named_parameters()})
    norms = torch.stack([gradients[key].norm() for key in sorted(gradients)])
    assert relative_error(norms, expected["grad_norms"].to(norms.dtype)) < 1e-5
    named = [key.removeprefix("grad.") for key in expected if key.startswith("grad.")]
    assert len(named) == 3 and all(relative_error(gradients[x], expected[f"grad.{x}"]) < 1e-5 for x in named)
    seen, begun = [], published({name: x.detach() for name, x in network.named_parameters()})
    begun = {name: x.clone() for name, x in begun.items()}
    for _ in range(about["steps"]):
        state.optimizer.zero_grad()
        total = sum(losses().values()).mean()
        total.backward()
        seen.append(total.detach())
        _apply(state, _Clock(state))
    seen.append(sum(losses().values()).mean().detach())
    assert relative_error(torch.stack(seen), expected["losses"].to(torch.float32)) < 1e-5
    after = {
        "param": published(dict(network.named_parameters())),
        "ema": published(state.ema.averages[about["ema_rate"]]),
    }
    changed = [key for key in expected if key.startswith(("param.", "ema."))]
    assert len(changed) == 4
    for key in changed:
        kind, name = key.split(".", 1)
        assert relative_error(after[kind][name] - begun[name], expected[key] - begun[name]) < 6e-4, key


def test_v_is_learned():
    """Its error is that of the noise, as large as the share of the clip makes it: the same minimum, another weight."""
    process, t = GaussianDiffusion(), torch.tensor([0, 250, 999])
    clips, noises = {"audio": torch.rand(3, 1, 8) * 2 - 1}, {"audio": torch.randn(3, 1, 8)}
    wrong = noises["audio"] + 0.1 * torch.randn(3, 1, 8)
    signal = process.alphas_cumprod.sqrt()[t].float().view(3, 1, 1)

    def loss(output, **options):
        return denoising_losses(lambda *_: (None, output), process, clips, noises, t, **options)["audio"]

    x_t = process.diffuse(clips["audio"], t, noises["audio"])
    velocity = (wrong - (1 - signal**2).sqrt() * x_t) / signal
    assert relative_error(process.noise_of(x_t, t, velocity), wrong) < 1e-6
    found, of_noise = loss(velocity, prediction_type="v_prediction"), loss(wrong)
    assert relative_error(found * signal.flatten() ** 2, of_noise) < 1e-4
    assert loss(process.velocity(clips["audio"], t, noises["audio"]), prediction_type="v_prediction").max() < 1e-12


def test_sigma_is_learned_beside_v():
    """The bound is one of the noise that v says."""
    process, t = GaussianDiffusion(), torch.tensor([1, 500])
    x, noise, share = torch.rand(2, 1, 8) * 2 - 1, torch.randn(2, 1, 8), torch.zeros(2, 1, 8)
    outputs = {"epsilon": noise, "v_prediction": process.velocity(x, t, noise)}
    bounds = [
        denoising_losses(
            lambda *_, out=out: (None, torch.cat([out, share], 1)),
            process,
            {"audio": x},
            {"audio": noise},
            t,
            prediction_type=name,
        )["audio_vb"]
        for name, out in outputs.items()
    ]
    assert relative_error(bounds[1], bounds[0]) < 1e-4


def test_sigma_is_learned():
    """Outputs of twice the channels: the bound is added to the loss and trains, and is told apart."""
    network = unet(video_out_channels=6, audio_out_channels=2)
    state = next(train(network, Clips(), RECIPE))
    means = state.meter.means()
    assert means["loss"] == pytest.approx(means["video"] + means["audio"], rel=1e-5)
    assert 0 < means["video_vb"] < means["video"] and "audio_vb" in means


@pytest.mark.parametrize("stream", ("video", "audio"))
def test_single_streams(stream):
    state = after(2, state=State(unet(streams=(stream,)), RECIPE, 1000))
    assert {"video", "audio"} & state.meter.means().keys() == {stream}


def test_gradient_checkpointing():
    """The same gradients, of the same dropout and the same shifts."""
    network = unet()
    network.enable_gradient_checkpointing()
    found, expected = after(1, state=State(network, RECIPE, 1000)), after(1)
    for name, x in found.tensors().items():
        assert (x - expected.tensors()[name]).abs().max() <= 1e-5, name


@pytest.mark.filterwarnings("ignore:mmattn computes .* by its slow reference")  # of float16, on a CPU
def test_a_step_that_overflows_is_skipped():
    """In float16: counted, the scale halved, nothing changed but the position; the next one is taken."""
    recipe = dataclasses.replace(RECIPE, precision="float16")
    state = State(unet(), recipe, 1000)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1, growth_factor=2.0**0.001)
    before = {name: x.clone() for name, x in state.tensors().items()}
    steps = train(state.unet, Clips(), recipe, state=state)
    next(steps)
    assert (state.step, state.skipped, state.scaler.get_scale()) == (1, 1, 2.0**126)
    assert all(torch.equal(x, before[name]) for name, x in state.tensors().items() if name in before)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    next(steps)
    assert (state.step, state.skipped) == (2, 1)
    assert not torch.equal(state.tensors()["model.video_head.conv.weight"], before["model.video_head.conv.weight"])


def test_broken_and_foreign_states(tmp_path):
    """The newest good one is found; a setting that differs is named; half-written files of a killed process go."""
    states = States(tmp_path, RECIPE.settings(), keep=2)
    for steps in (1, 2, 3):
        states.save(after(steps), {})
    assert [x.name for x in states.files()] == ["step-00000003.safetensors", "step-00000002.safetensors"]
    newest = states.files()[0]
    newest.write_bytes(newest.read_bytes()[:-100])
    (tmp_path / ".0123456789abcdef.part").write_text("half")
    (tmp_path / "notes.txt").write_text("mine")
    remove_parts(states.path)
    assert sorted(x.name for x in tmp_path.iterdir() if not x.name.startswith("step")) == ["notes.txt"]
    state = State(unet(), RECIPE, 1000)
    path, broken = states.load(state)
    assert state.step == 2 and path == states.files()[1] and "step-00000003.safetensors cannot be read" in broken[0]
    other = dataclasses.replace(RECIPE, lr=0.5)
    with pytest.raises(FileExistsError, match=r"other settings: lr 0\.001 instead of 0\.5; expected the same"):
        States(tmp_path, other.settings()).load(State(unet(), other, 1000))


SPOILT = {
    "a list": lambda x: [],
    "no step": lambda x: {name: value for name, value in x.items() if name != "step"},
    "a step that is a word": lambda x: {**x, "step": "one"},
    "settings are a list": lambda x: {**x, "settings": [1]},
    "another step": lambda x: {**x, "step": 2, "sha256": None},
    "other seconds": lambda x: {**x, "seconds": 5.0},
}


@pytest.mark.parametrize("spoil", [*SPOILT.values(), None], ids=[*SPOILT, "one bit"])
def test_a_state_that_was_changed_is_passed_over(tmp_path, spoil):
    states = States(tmp_path, RECIPE.settings())
    states.save(after(1), {})
    path = states.save(after(3), {"note": "kept"})
    with safe_open(path, "pt") as file:
        content, tensors = json.loads(file.metadata()["state"]), {x: file.get_tensor(x) for x in file.keys()}  # noqa: SIM118
    if spoil is None:
        tensors["model.first.audio.bias"].view(torch.int32)[3] ^= 1
    save_file(tensors, path, {"state": json.dumps(spoil(content) if spoil else content)})
    state = State(unet(), RECIPE, 1000)
    found, broken = states.load(state)
    assert state.step == 1 and found == states.files()[1] and "step-00000003.safetensors" in broken[0]


@pytest.mark.parametrize("name", ("model.first.audio.bias", "optimizer.exp_avg.first.audio.bias"))
def test_a_state_of_other_shapes_is_refused(name):
    one = after(1)
    for x in (torch.zeros(3), one.tensors()[name].double()):
        with pytest.raises(ValueError, match=rf"does not fit the network and its recipe: {name} is \[\d+\] torch"):
            State(unet(), RECIPE, 1000).load({**one.tensors(), name: x}, one.numbers())


def test_a_log_that_is_no_text_is_named(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'\xff\n{"step": 1}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl is no log: 'utf-8'"):
        Log(tmp_path / "log.jsonl").read()
    (tmp_path / "log.jsonl").write_text("[" * 100_000 + '\n{"step": 1}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl has a line 1 that is none of a log"):
        Log(tmp_path / "log.jsonl").read()


def test_a_setting_that_came_later_has_its_default(tmp_path):
    old = RECIPE.settings()
    del old["clip_norm"]
    States(tmp_path, old).save(after(1), {})
    state = State(unet(), RECIPE, 1000)
    States(tmp_path, RECIPE.settings()).load(state)
    assert state.step == 1


def run(*options, steps=4, out="run"):
    cli.main(["train", "synthetic", "--out", out, "--steps", str(steps), "--log-every", "2", *options])


def rows(out="run"):
    """The log, without times."""
    timed = {"seconds", "clips_per_s", "share"}
    return [
        {name: x for name, x in row.items() if name not in timed} for row in Log(pathlib.Path(out, "log.jsonl")).read()
    ]


def weights(out="run"):
    return sorted(pathlib.Path(out, "states").iterdir())[-1]


def read(path):
    return read_state(path)[1]


def test_command(capsys):
    run("--checkpoint-every", "2", "--preview-every", "3", "--keep", "2")
    out, err = capsys.readouterr()
    assert "done at step 4" in out
    for said in (
        r"trains \d\.\d\d M parameters in \w+ on cpu, \d+ threads\n",
        r"synthetic clips, 4 a step.*, into run from step 0 to 4\n",
        r"step 1 is done: \d+ s left at this speed\n",
        r"step 2: loss [\d.]+, video .* waiting for data [\d.%]+; \d+ s left\n",
        r"step 4: loss .* waiting for data [\d.%]+\n",
    ):
        assert re.search(said, err), said
    names = sorted(str(x.relative_to("run")) for x in pathlib.Path("run").rglob("*") if x.is_file())
    assert [x for x in names if not x.startswith(("model", "tensorboard"))] == [
        "log.jsonl",
        "loss.png",
        *(f"previews/step-00000003{x}" for x in ("-0.mp4", "-1.mp4", "-2.mp4", "-3.mp4", ".png")),
        "states/step-00000002.safetensors",
        "states/step-00000004.safetensors",
    ]
    assert [row["step"] for row in rows()] == [2, 4] and rows()[0]["clips"] == 8
    cli.main(shlex.split("sample --model run/model --out clips --num 1 --steps 1 --formats wav mp4"))
    assert pathlib.Path("clips/clip-0000.mp4").exists()


def test_command_goes_on():
    """As if it had not been stopped, also without the previews, and with a log that reaches beyond its last state."""
    run("--preview-every", "0", steps=6, out="whole")
    run("--preview-every", "1", "--preview-clips", "1", steps=2)
    with open("run/log.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 0}\n{"st')
    run(steps=6)
    assert rows() == rows("whole")
    expected = read(weights("whole"))
    assert all(torch.equal(x, expected[name]) for name, x in read(weights()).items())


def curve(out="run"):
    """Of TensorBoard, as it shows it: steps and values of the loss."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = reader.EventAccumulator(f"{out}/tensorboard")
    found.Reload()
    return [(event.step, pytest.approx(event.value, rel=1e-6)) for event in found.Scalars("loss")]


def test_tensorboard():
    """By default; a run that goes on from a state before its last line has each step once, and is no other run."""
    pytest.importorskip("tensorboard")
    run("--preview-every", "0", "--trackers", "none", steps=6, out="whole")
    assert not pathlib.Path("whole/tensorboard").exists()
    run(*shlex.split("--preview-every 0 --checkpoint-every 2 --log-every 1"), steps=5)
    assert [step for step, _ in curve()] == [1, 2, 3, 4, 5]
    weights().unlink()
    weights().unlink()
    run("--preview-every", "0", "--log-every", "2", steps=6)  # from step 2
    assert [step for step, _ in curve()] == [1, 2, 4, 6]
    assert curve() == [(row["step"], row["loss"]) for row in Log(pathlib.Path("run/log.jsonl")).read()]
    expected = read(weights("whole"))
    assert all(torch.equal(x, expected[name]) for name, x in read(weights()).items())


def test_a_tracker_that_is_missing(monkeypatch, capsys):
    """By default the run goes on without it; one that is named is refused before anything is written."""
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    for name in ("tensorboard", "wandb"):
        expected = f"tracker {name} needs a package that is missing; pip install {name}"
        assert expected in refused(capsys, "--trackers", name)
    assert "trackers is none wandb; expected none alone" in refused(capsys, "--trackers", "none", "wandb")
    assert not pathlib.Path("run").exists()
    run("--preview-every", "0", steps=2)
    assert "pip install tensorboard" in capsys.readouterr().err and not pathlib.Path("run/tensorboard").exists()


def test_a_tracker_that_fails(monkeypatch, capsys):
    """In mid-run it costs the run nothing; at the beginning the run has not begun either."""
    from accelerate import tracking

    class Failing(tracking.GeneralTracker):
        name, requires_logging_directory, tracker = "tensorboard", True, None

        def __init__(self, *args, **options):
            super().__init__()

        def log(self, values, step=None, **options):
            assert step == 2 and values["share/data"] >= 0
            raise OSError("no space")

        def finish(self):
            raise AssertionError

    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.TENSORBOARD])
    monkeypatch.setattr(tracking, "TensorBoardTracker", Failing)
    run("--preview-every", "0", steps=4)
    said = capsys.readouterr().err
    assert said.count("tracker tensorboard has failed, and the run goes on without it: no space") == 1
    assert [row["step"] for row in rows()] == [2, 4]
    monkeypatch.setattr(Failing, "start", Failing.finish)
    assert "tracker tensorboard does not begin: " in refused(capsys, out="other")
    assert not pathlib.Path("other/states").exists()


@pytest.mark.parametrize(
    "command",
    ("sample --model run --out out", "info run", "convert run run.pt", "train synthetic --init run --out next"),
)
def test_the_folder_of_a_run_is_no_model(capsys, command):
    run(steps=1)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        cli.main(command.split())
    expected = (
        "without config.json; expected one of save_pretrained; it is the folder of a run of training, whose model "
    )
    assert f"{expected}is in run/model" in capsys.readouterr().err


def test_the_time_left_has_a_unit_that_fits():
    state = SimpleNamespace(step=10, meter=SimpleNamespace(sums={"step_s": [24.0, 2]}))
    for steps, expected in (
        (11, "12 s left"),
        (30, "4 min left"),
        (1000, "3 h left"),
        (10**5, "14 days left"),
        (10, ""),
    ):
        assert time_left(state, steps) == expected


def test_signal(monkeypatch, capsys):
    """SIGTERM ends the run after the step, with a state."""
    after_step = job._Run._after_step

    def stop(self):
        after_step(self)
        if self.state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(job._Run, "_after_step", stop)
    run(steps=9)
    said = r"stopped by SIGTERM at step [34], after 0\.\d\d hours of training; the same command goes on from there\n"
    assert re.search(said, capsys.readouterr().out)
    assert int(weights().stem.split("-")[1]) in (3, 4)


def refused(capsys, *options, **changes):
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        run(*options, **changes)
    return capsys.readouterr().err.splitlines()[-1]


def test_other_settings_are_refused(capsys):
    run(steps=2)
    before = weights().read_bytes()
    assert "run/states has states of other settings: lr 0.001 instead of 0.5" in refused(capsys, "--lr", "0.5")
    assert "seed 0 instead of 1" in refused(capsys, "--seed", "1")
    pathlib.Path("config.json").write_text('{"model_channels": 64}')
    assert "config " in refused(capsys, "--config", "config.json")
    assert weights().read_bytes() == before


def test_a_folder_is_trained_in_once(capsys):
    with alone_in(pathlib.Path("run"), "trained in"):
        assert "run is being trained in by another process" in refused(capsys)


def test_a_loss_that_is_not_finite(monkeypatch, capsys):
    """Stops before a parameter is touched, and names the step, the clips and the last good state."""
    run(steps=2)

    def broken(*args, **options):
        losses = denoising_losses(*args, **options)
        return {name: x * float("nan") for name, x in losses.items()}

    from mmdiffusion.training import loop

    denoising_losses = loop.denoising_losses
    monkeypatch.setattr(loop, "denoising_losses", broken)
    message = refused(capsys)
    assert re.search(
        r"the loss is nan in step 2, of clips synthetic clip \d+ .*; the last good state is run/states/step-00000002",
        message,
    )
    assert sorted(x.name for x in pathlib.Path("run/states").iterdir()) == [
        "step-00000000.safetensors",
        "step-00000002.safetensors",
    ]


def test_full_disk(capsys, small_files):
    """The run goes on, and what it is at is kept as soon as there is space again; at the end it is an error."""
    run(steps=2)
    with small_files(100_000):
        assert re.search(r"No space|File too large: 'run/states/step-00000004", refused(capsys, "--preview-every", "0"))
    assert weights().name == "step-00000002.safetensors"
    run(steps=4)
    assert weights().name == "step-00000004.safetensors"


def test_init(capsys):
    """From weights: those of a published checkpoint, never trained before, and of another run."""
    checkpoints.write(unet().to_published(), "weights.pt", is_random=True)
    pathlib.Path("config.json").write_text(json.dumps(TINY))
    small = ("--batch-size", "2", "--micro-batch", "2", "--preview-every", "0")
    run("--init", "weights.pt", "--config", "config.json", *small, steps=1)
    begun = read(sorted(pathlib.Path("run/states").iterdir())[0])
    assert all(torch.equal(begun[f"model.{name}"], x) for name, x in unet().named_parameters())
    assert "begun_from" in refused(capsys, "--config", "config.json", *small)
    assert not CoupledUNet.from_pretrained("run/model/unet").config["random_weights"]
    run("--init", "run/model", *small, steps=1, out="again")
    averaged = read(weights())
    begun = read(sorted(pathlib.Path("again/states").iterdir())[0])
    name = "first.audio.weight"
    assert torch.equal(begun[f"model.{name}"], averaged[f"ema.0.9999.{name}"])
    run("--init", "run/model", "--preset", "small", *small, steps=1, out="by-recipe")
    begun = read(sorted(pathlib.Path("by-recipe/states").iterdir())[0])
    assert torch.equal(begun[f"model.{name}"], averaged[f"ema.0.9999.{name}"])
    assert f"ema.0.5.{name}" in begun  # the preset is that of the recipe


def test_a_published_run_goes_on(capsys):
    """With its averages and its AdamW, whose states are by number, in the order of the keys."""
    state = after(2)
    folder = pathlib.Path("published")
    folder.mkdir()
    published = state.unet.to_published()
    pointers = {x.data_ptr(): x for x in state.unet.parameters()}
    order = [pointers[x.data_ptr()] for x in published.values()]
    torch.save(published, folder / "model000002.pt")
    torch.save(published, folder / "model000001.pt")
    averaged = CoupledUNet.from_config(state.unet.config)
    state.ema.copy_to(averaged, 0.9)
    torch.save(averaged.to_published(), folder / "ema_0.9_000002.pt")
    states = {
        i: {k: v.view(shape.shape) if v.dim() else v for k, v in state.optimizer.state[x].items()}
        for i, (x, shape) in enumerate(zip(order, published.values(), strict=True))
    }
    torch.save({"state": states, "param_groups": []}, folder / "opt000002.pt")
    pathlib.Path("config.json").write_text(json.dumps(TINY))
    options = shlex.split("--resume published --config config.json --ema-rates 0.9 --batch-size 2 --micro-batch 2")
    run(*options, "--preview-every", "0", steps=3)
    found, expected = read(pathlib.Path("run/states/step-00000002.safetensors")), state.tensors()
    assert found.keys() == {name for name in expected if not name.startswith("ema.0.5")}
    assert all(torch.equal(x, expected[name]) for name, x in found.items())
    (folder / "opt000002.pt").write_bytes(b"broken")
    assert "opt000002.pt cannot be read as the state of an optimizer" in refused(capsys, *options, out="other")
    assert "other has no modelNNNNNN.pt" in refused(capsys, "--resume", "other", out="third")


def test_processes_share_a_step(monkeypatch):
    """Two of them take the steps of one, but for the order of sums."""
    pathlib.Path("config.json").write_text(json.dumps({**TINY, "dropout": 0.0, "prediction_type": "epsilon"}))
    options = "train synthetic --config config.json --steps 3 --batch-size 4 --micro-batch 2 --lr 0.001 --log-every 3"
    command = shlex.split(f"{options} --preview-every 0 --device cpu --out")
    status, said = launched("torch.distributed.run --nproc_per_node 2 -m -- mmdiffusion", *command, "two")
    assert status == 0, said
    monkeypatch.setitem(RECIPES, "small", SMALL_RECIPE)
    cli.main([*command, "one"])
    expected = read(weights("one"))
    found = read(weights("two"))
    assert found.keys() == expected.keys()
    assert all((x - expected[name]).abs().max() < 2e-3 for name, x in found.items())
    assert rows("two")[0]["loss"] == pytest.approx(rows("one")[0]["loss"], rel=1e-2)


ASKED = {
    "ACCELERATE_USE_FSDP=true": "the launcher asks for FSDP (ACCELERATE_USE_FSDP=true), which is not done here; e",
    "ACCELERATE_USE_DEEPSPEED=true": "asks for DeepSpeed (ACCELERATE_USE_DEEPSPEED=true), which is not done here",
    "ACCELERATE_USE_MEGATRON_LM=true": "the launcher asks for Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG=true": "the launcher asks for a parallelism configuration",
    "ACCELERATE_DYNAMO_BACKEND=INDUCTOR": "the launcher asks for torch.compile (ACCELERATE_DYNAMO_BACKEND=INDUCTOR)",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4": "asks for gradient accumulation (ACCELERATE_GRADIENT_ACCUMULATION_S",
    "ACCELERATE_MIXED_PRECISION=bf16": "precision is float32 and the launcher's --mixed_precision bf16; expected the",
    "ACCELERATE_MIXED_PRECISION=fp8": "precision is float32 and the launcher's --mixed_precision fp8",
    "ACCELERATE_USE_CPU=True": "device is 'cuda' and the launcher says --cpu; expected one of them",
    "OMPI_COMM_WORLD_SIZE=2": "OMPI_COMM_WORLD_SIZE is 2, of processes of MPI, which do not find each other here",
    "ACCELERATE_DYNAMO_BACKEND=NO MASTER_ADDR=127.0.0.1": "as for several processes, and started one; expected accele",
}


@pytest.mark.parametrize("variables", ASKED)
def test_what_the_launcher_asks_for(monkeypatch, capsys, variables):
    """By its variables: what would be ignored is refused before anything is written."""
    for variable in variables.split():
        monkeypatch.setenv(*variable.split("="))
    options = ("--device", "cuda") if "USE_CPU" in variables else ()
    assert ASKED[variables] in refused(capsys, *options)
    assert not pathlib.Path("run").exists()


def test_what_the_launcher_says_anyway(monkeypatch):
    """Its defaults, and what a run does as asked."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    run("--precision", "bfloat16", "--preview-every", "0", "--trackers", "none", steps=1)
    assert read_state(weights())[0]["notes"]["machine"].split(", ")[1] == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # not in the run, whose optimizer would use it
    assert Processes(None).device.type == "cpu"


def launched(launcher, *arguments, **variables):
    """A command in processes of a launcher: its exit status, and what it said on stderr."""
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(launcher), *arguments],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "options", ("--use_fsdp", "--multi_gpu --dynamo_backend eager", ""), ids=("fsdp", "dynamo", "none")
)
def test_launched_for_what_is_not_done(options):
    """By the launcher itself; without options it starts one process of two on a machine with fewer GPUs."""
    if not options and torch.cuda.device_count() > 1:
        pytest.skip("accelerate starts both")
    launcher = f"accelerate.commands.launch --num_processes 2 --main_process_port 0 {options} -m mmdiffusion"
    status, said = launched(launcher, "train", "synthetic", "--device", "cpu", "--out", "run")
    expected = {"": "and started one; expected accelerate launch --multi_gpu"}.get(options, "which is not done here")
    assert status != 0 and "mmdiffusion train: the launcher " in said and expected in said
    assert not pathlib.Path("run").exists()


def test_killed_in_the_middle(monkeypatch):
    """Once; tests/kill_resume.py does it twenty times."""
    monkeypatch.setitem(checkpoints.PRESETS, "small", SMALL_PRESET)
    monkeypatch.setitem(RECIPES, "small", SMALL_RECIPE)
    whole, killed = (pathlib.Path(x).absolute() for x in ("whole", "killed"))
    child = kill_resume.start(killed, 9)
    while not (killed / "states/step-00000003.safetensors").exists() and child.poll() is None:
        time.sleep(0.005)
    child.kill()
    child.communicate()
    assert weights(killed).name < "step-00000009"
    for folder in (killed, whole):
        cli.main(kill_resume.arguments(folder, 9))
    assert kill_resume.differences(whole, killed) == []


BAD = {
    "--lr nan": "lr is nan; expected 0 or more",
    "--batch-size 0": "batch_size is 0; expected 1 or more",
    "--batch-size 3": "batch_size is 3; expected a multiple of micro_batch = 2",
    "--ema-rates 0.9 1": "ema_rates is (0.9, 1.0); expected at least one rate, each in [0, 1)",
    "--steps 0": "steps is 0; expected 1 or more",
    "--device tpu": "device is 'tpu'; expected cpu, cuda or cuda:N",
}


@pytest.mark.parametrize("options", BAD)
def test_bad_input(capsys, options):
    assert BAD[options] in refused(capsys, *shlex.split(options))
    assert not pathlib.Path("run").exists()


def test_process():
    """Its numbers are those of the scheduler that samples."""
    process, scheduler = GaussianDiffusion(), make_scheduler("ddpm")
    assert (process.alphas_cumprod.float() - scheduler.alphas_cumprod).abs().max() < 1e-6
    x, noise, t = torch.randn(4, 3, 8), torch.randn(4, 3, 8), torch.tensor([0, 1, 500, 999])
    x_t = process.diffuse(x, t, noise)
    assert torch.allclose(x_t, scheduler.add_noise(x, noise, t), atol=1e-5)
    assert torch.allclose(process.start_of(x_t, t, noise)[:3], x[:3], atol=1e-3)
    assert process.posterior_variance[0] == 0 and process.posterior_log_variance[0] == process.posterior_log_variance[1]


def test_weights():
    process, t = GaussianDiffusion(), torch.tensor([0, 300, 999])
    assert loss_weights("uniform", process, t).tolist() == [1, 1, 1]
    found = loss_weights("min-snr", process, t, gamma=5.0)
    assert found[0] == pytest.approx(5 / float(process.snr[0])) and found[2] == 1
    of_v = loss_weights("min-snr", process, t, gamma=5.0, prediction_type="v_prediction")
    assert relative_error(of_v, found * process.snr[t] / (process.snr[t] + 1)) < 1e-6


def test_variational_bound():
    """0 where the network knows the noise and the posterior's variance; more anywhere else."""
    process, t = GaussianDiffusion(), torch.tensor([1, 250, 999])
    x, noise = torch.rand(3, 2, 5) * 2 - 1, torch.randn(3, 2, 5)
    x_t = process.diffuse(x, t, noise)
    known = variational_bound(process, noise, torch.full_like(x, -1), x, x_t, t)
    assert known.abs().max() < 1e-3
    assert (variational_bound(process, noise + 0.5, torch.full_like(x, -1), x, x_t, t) > known + 1e-4).all()
    assert (variational_bound(process, noise, torch.full_like(x, 1), x, x_t, t)[:1] > known[:1] + 1e-3).all()
    at_zero = variational_bound(process, noise, torch.zeros_like(x), x, x_t, torch.zeros(3, dtype=torch.int64))
    assert at_zero.isfinite().all() and (at_zero > 0).all()


def test_timesteps_by_loss():
    """Uniform at first; then those of larger losses more often, with weights that make up for it."""
    timesteps, source = LossSecondMomentTimesteps(4), torch.Generator().manual_seed(0)
    for _ in range(10):
        timesteps.update(torch.arange(4), torch.tensor([1.0, 1.0, 1.0, 5.0]))
    drawn = [timesteps.draw(source) for _ in range(2000)]
    assert 0.6 < sum(t == 3 for t, _ in drawn) / 2000 < 0.65 + 0.05
    assert sum(weight for _, weight in drawn) / 2000 == pytest.approx(1, abs=0.1)
    again = LossSecondMomentTimesteps(4)
    again.load_state_dict(timesteps.state_dict())
    assert again.draw(torch.Generator().manual_seed(1)) == timesteps.draw(torch.Generator().manual_seed(1))
