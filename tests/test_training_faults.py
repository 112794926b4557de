# SPDX-License-Identifier: MIT
"""What goes wrong in mid-run: the run keeps what it trained, says what it was, and the same command goes on."""

import errno
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("av")
pytest.importorskip("matplotlib")
pytest.importorskip("accelerate")

from test_training import (  # noqa: F401, the fixture
    RECIPE,
    ROOT,
    TINY,
    Clips,
    after,
    launched,
    read,
    rows,
    same,
    small_and_here,
    unet,
    weights,
)

from mmdiffusion import cli
from mmdiffusion.clips import ClipFormat
from mmdiffusion.data import ClipDataset, FilmError, pack
from mmdiffusion.media import write_video
from mmdiffusion.runs import train as job
from mmdiffusion.training import State, train
from mmdiffusion.training.log import Log

FORMAT = ClipFormat.of(TINY)
OPTIONS = "--steps 8 --log-every 2 --preview-every 0 --trackers none --checkpoint-every 100"


@pytest.fixture
def films(monkeypatch, tmp_path):
    """A folder of some, of which one at a time is open."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("mmdiffusion.data.films._OPEN_FILMS", 1)
    for number in range(4):
        write_film(f"films/{number}.mp4", number)
    return pathlib.Path("films")


def write_film(path, number, frames=10):
    source = torch.Generator().manual_seed(number)
    video = torch.rand(frames, 3, 16, 16, generator=source) * 2 - 1
    pathlib.Path(path).parent.mkdir(exist_ok=True)
    write_video(pathlib.Path(path), video, torch.rand(1, frames * 1600, generator=source) - 0.5)


def run(data="films", out="run", options=OPTIONS):
    cli.main(["train", str(data), "--out", out, *shlex.split(options)])


def refused(capsys, **options):
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        run(**options)
    return capsys.readouterr().err.splitlines()[-1]


def at(monkeypatch, step, do):
    """Once a run has taken that step."""
    after_step = job._Run._after_step

    def then(self):
        after_step(self)
        if self.state.step == step:
            monkeypatch.setattr(job._Run, "_after_step", after_step)
            do()

    monkeypatch.setattr(job._Run, "_after_step", then)


def same_run(one="run", other="whole"):
    found, expected = read(weights(one)), read(weights(other))
    return (
        rows(one) == rows(other)
        and found.keys() == expected.keys()
        and all(torch.equal(x, expected[name]) for name, x in found.items())
    )


def vanish():
    os.rename("films/2.mp4", "away.mp4")


def grow():
    vanish()
    write_film("films/2.mp4", 9, frames=14)


def shorten():
    vanish()
    write_film("films/2.mp4", 9, frames=6)


@pytest.mark.parametrize(
    ("spoil", "said"),
    ((vanish, "No such file"), (grow, "has changed since it was looked at"), (shorten, "has changed since")),
    ids=("vanishes", "longer", "shorter"),
)
def test_a_film_in_mid_run(monkeypatch, capsys, films, spoil, said):
    """The state of the step before is kept, and no clip of another film is trained on."""
    run(out="whole")
    at(monkeypatch, 3, spoil)
    message = refused(capsys)
    assert said in message and "films/2.mp4" in message
    kept = weights().read_bytes()
    assert 3 <= int(weights().stem.split("-")[1]) < 8
    assert re.search(r"states of other settings: clips \d+ instead of \d+", refused(capsys))
    os.replace("away.mp4", "films/2.mp4")
    assert weights().read_bytes() == kept
    run()
    assert same_run()


def test_a_packed_file_that_is_cut_off_in_mid_run(monkeypatch, capsys, films):
    pack(ClipDataset(films, FORMAT), "films.pack")
    run("films.pack", "whole")
    content = pathlib.Path("films.pack").read_bytes()
    at(monkeypatch, 3, lambda: os.truncate("films.pack", len(content) // 3))
    assert "films.pack has changed since it was written, in " in refused(capsys, data="films.pack")
    assert weights().name == "step-00000003.safetensors"
    assert "films.pack is cut off" in refused(capsys, data="films.pack")
    pathlib.Path("films.pack").write_bytes(content)
    run("films.pack")
    assert same_run()


def test_an_index_that_is_gone(films):
    """It is made again."""
    run(out="whole")
    run(options=OPTIONS.replace("--steps 8", "--steps 3"))
    shutil.rmtree("cache")
    run()
    assert same_run()


def test_a_configuration_that_changes_between_two_sittings(capsys, films):
    pathlib.Path("config.json").write_text("{}")
    options = f"{OPTIONS} --config config.json"
    run(options=options.replace("--steps 8", "--steps 2"))
    kept = weights().read_bytes()
    pathlib.Path("config.json").write_text('{"dropout": 0.3}')
    assert re.search(r"other settings: config .* instead of ", refused(capsys, options=options))
    assert weights().read_bytes() == kept


def test_a_step_that_was_not_finished_leaves_nothing():
    """Its gradients are not those of the next one: a micro-batch was done, and the clip of the second is not there."""

    class Gone(Clips):
        is_gone = True

        def __getitem__(self, i):
            self.asked = getattr(self, "asked", 0) + 1
            if self.is_gone and self.asked == 3:
                raise OSError("gone")
            return super().__getitem__(i)

    data, state = Gone(), State(unet(), RECIPE, 1000)
    with pytest.raises(FilmError, match="gone"):
        next(train(state.unet, data, RECIPE, state=state))
    assert state.step == 0
    data.is_gone = False
    assert same(after(2, state=state, data=data), after(2))


def test_a_line_of_the_log_is_whole_or_not_there(tmp_path, small_files):
    log = Log(tmp_path / "log.jsonl")
    log.add({"step": 1})
    with small_files(40), pytest.raises(OSError):
        log.add({"step": 2, "loss": "x" * 100})
    log.add({"step": 3})
    assert [row["step"] for row in log.read()] == [1, 3]


@pytest.mark.parametrize(
    ("where", "what"),
    (
        ("Log.add", "the line of the log of step 2"),
        ("_Run._preview", "the preview of step 2"),
        ("save_pipeline", "the model of step 2"),
        ("plot", "the model of step 2"),
        ("States.save", "the state of step 2"),
    ),
)
def test_what_is_written_beside_the_training_does_not_end_it(monkeypatch, capsys, where, what):
    """A full disk, once, and in the end all is there."""
    options = "--steps 4 --log-every 2 --checkpoint-every 2 --preview-every 2 --preview-clips 1 --trackers none"
    owner, name = (job, where) if "." not in where else (getattr(job, where.split(".")[0]), where.split(".")[1])
    whole = getattr(owner, name)

    def full(*arguments, **more):
        monkeypatch.setattr(owner, name, whole)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def break_it():
        monkeypatch.setattr(owner, name, full)

    at(monkeypatch, 1, break_it)
    run("synthetic", options=options)
    captured = capsys.readouterr()
    assert f"{what} is not kept, and the run goes on: [Errno 28]" in captured.err and "done at step 4" in captured.out
    assert weights().name == "step-00000004.safetensors"
    assert [row["step"] for row in rows()] == ([4] if where == "Log.add" else [2, 4])
    assert pathlib.Path("run/loss.png").exists() and pathlib.Path("run/previews/step-00000004.png").exists()


def small_options(data, out, steps):
    pathlib.Path("config.json").write_text(json.dumps({**TINY, "dropout": 0.1}))
    options = f"--config config.json --steps {steps} --batch-size 4 --micro-batch 1 --lr 0.001 --precision float32"
    return [
        "train",
        data,
        *shlex.split(options),
        *shlex.split("--device cpu --preview-every 0 --trackers none"),
        "--out",
        out,
    ]


def test_a_film_of_several_processes(monkeypatch, tmp_path):
    """One of them cannot read it: all stop before the step, the state is kept, and the run goes on to the bit."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for number in range(20):  # more than stay open
        write_film(f"films/{number}.mp4", number, frames=5)
    launcher = "torch.distributed.run --nproc_per_node 2 -m -- mmdiffusion"
    status, said = launched(launcher, *small_options("films", "whole", 16))
    assert status == 0, said
    running = subprocess.Popen(
        [sys.executable, "-m", *shlex.split(launcher), *small_options("films", "run", 16), "--log-every", "1"],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    log = pathlib.Path("run/log.jsonl")
    while running.poll() is None and not (log.exists() and log.read_text().count("\n")):
        time.sleep(0.005)
    os.rename("films", "away")
    _, said = running.communicate()
    assert running.returncode != 0 and re.search(r"No such file or directory: 'films/\d+\.mp4'", said), said
    assert 0 < int(weights().stem.split("-")[1]) < 16
    os.rename("away", "films")
    status, said = launched(launcher, *small_options("films", "run", 16))
    assert status == 0 and "goes on from run/states/step-" in said, said
    expected = read(weights("whole"))
    assert all(torch.equal(x, expected[name]) for name, x in read(weights()).items())


@pytest.mark.parametrize("what", ("code", "settings"))
def test_processes_that_differ(tmp_path, what):
    """Two copies of the package, or two values of an option: both refuse, before anything is written."""
    copy = tmp_path / "copy"
    for name in ("mmattn", "mmdiffusion"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("weights", "__pycache__"))
    (copy / "mmdiffusion" / "weights").mkdir()
    if what == "code":
        with open(copy / "mmattn" / "conv.py", "a") as file:
            file.write("# another version\n")
    (tmp_path / "one.py").write_text(
        "import os, sys\n"
        f"is_second = os.environ['RANK'] == '1'\n"
        f"sys.path[:0] = [{str(copy)!r}] if is_second else []\n"
        "from mmdiffusion import cli\n"
        f"assert ({str(copy)!r} in cli.__file__) == is_second\n"
        f"cli.main([*sys.argv[1:], '--lr', '0.5'] if is_second and {what == 'settings'} else sys.argv[1:])\n"
    )
    launcher = f"torch.distributed.run --nproc_per_node 2 {tmp_path / 'one.py'}"
    status, said = launched(launcher, *small_options("synthetic", "run", 2))
    expected = {
        "code": r"different code: \w+, \w+; expected the same",
        "settings": r"different settings, lr: 0\.001, 0\.5; ",
    }
    assert status != 0 and re.search(f"mmdiffusion train: the processes have {expected[what]}", said), said
    assert not pathlib.Path("run/states").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="finds threads in /proc")
def test_processes_end_with_no_thread_of_gloo(tmp_path):
    """One that drops a tensor of the last collective while the interpreter goes would abort the process."""
    (tmp_path / "one.py").write_text(
        "import atexit, os, pathlib\n"
        "def count(when):\n"
        "    names = [x.read_text() for x in pathlib.Path('/proc/self/task').glob('*/comm')]\n"
        "    pathlib.Path(f'{when}-' + os.environ['RANK']).write_text(str(sum('gloo' in x for x in names)))\n"
        "atexit.register(count, 'after')\n"  # the first that is registered is called last
        "from mmdiffusion.runs.processes import Processes\n"
        "assert Processes('cpu').gathered([3]) == [3, 3]\n"
        "count('before')\n"
    )
    status, said = launched(f"torch.distributed.run --nproc_per_node 2 {tmp_path / 'one.py'}")
    assert status == 0, said
    before, after = ([pathlib.Path(f"{when}-{rank}").read_text() for rank in (0, 1)] for when in ("before", "after"))
    assert "0" not in before and after == ["0", "0"], (before, after)
