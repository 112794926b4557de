# SPDX-License-Identifier: MIT
"""`mmdiffusion synchrony` measures what a pipeline makes, beside the ceiling and the floor of real clips."""

import json
import shlex

import pytest
import torch
from tqdm import tqdm

import mmattn
from mmdiffusion import CoupledUNet, cli
from mmdiffusion.clips import ClipFormat
from mmdiffusion.data import SyntheticClips, to_clip
from mmdiffusion.diffusion.schedulers import make_scheduler
from mmdiffusion.runs import synchrony
from mmdiffusion.runs.sample import clip_seed
from mmdiffusion.runs.synchrony import MeasureSynchrony, measure

FORMAT = ClipFormat((16, 3, 16, 16), (1, 5120), 10, 3200)
SMALL = {
    "video_size": (16, 3, 8, 8),
    "audio_size": (1, 5120),
    "model_channels": 32,
    "num_res_blocks": 1,
    "cross_attention_resolutions": (1,),
    "cross_attention_windows": (2,),
    "video_attention_resolutions": (-1,),
    "channel_mult": (1,),
    "num_heads": 2,
    "num_head_channels": 32,
    "middle_cross_attention": False,
    "sample_rate": 3200,
    "prediction_type": "v_prediction",
}


class Perfect:
    """Makes the real clips of a world as a model that had learned everything would, and notes what it is asked."""

    clip_format, scheduler = FORMAT, make_scheduler("dpmsolver++")

    def __init__(self, world=1000, spoil=None):
        self.world, self.spoil, self.calls = SyntheticClips(FORMAT, world), spoil, []

    def check_inputs(self, *_, **__):
        pass

    def set_progress_bar_config(self, **_):
        pass

    def __call__(
        self,
        count,
        steps,
        *,
        generator,
        shift_seed,
        return_dict,
        callback_on_step_end,
        video=None,
        audio=None,
        **guidance,
    ):
        for step in range(steps):
            callback_on_step_end(self, step, None, {})
        done = sum(call["count"] for call in self.calls) % 6
        clips = [to_clip(self.world[done + i]) for i in range(count)]
        seeds = [x.initial_seed() for x in generator]
        self.calls.append({"count": count, "steps": steps, "seeds": seeds, **guidance})
        made = torch.stack([x.video for x in clips]) if video is None else video
        sound = torch.stack([x.audio for x in clips]) if audio is None else audio
        return (made, sound) if self.spoil is None else self.spoil(made, sound)


def job(**options):
    return MeasureSynchrony(model="model", clips=6, batch_size=4, seed=3, **options)


def test_a_perfect_model_reaches_the_ceiling():
    pipeline = Perfect()
    rows = measure(pipeline, job())
    assert [row.name for row in rows] == [
        "real",
        "real, sound of another",
        "joint",
        "video-from-audio, replacement",
        "video-from-audio, gradient",
        "audio-from-video, replacement",
        "audio-from-video, gradient",
    ]
    for row in rows[:1] + rows[2:]:
        assert (row.clips, row.heard, row.unseen, row.clipped) == (6, 1.0, 0.0, 0.0) and row.bounces >= 12
    assert rows[1].heard < 0.7 < 1 and rows[1].unseen > 0.3
    assert [call["seeds"] for call in pipeline.calls[:2]] == [
        [clip_seed(3, i) for i in numbers] for numbers in (range(4), range(4, 6))
    ]
    assert [call.get("guidance") for call in pipeline.calls[::2]] == [
        None,
        "replacement",
        "gradient",
        "replacement",
        "gradient",
    ]


def test_the_bar_moves_with_each_step(monkeypatch):
    bars = []
    monkeypatch.setattr(synchrony, "tqdm", lambda **options: bars.append(tqdm(**options, disable=True)) or bars[-1])
    moved = []
    monkeypatch.setattr(tqdm, "update", lambda bar, clips: moved.append(clips))
    measure(Perfect(), job(ways=("joint",), steps=3))
    assert [bar.total for bar in bars] == [18] and moved == [4, 4, 4, 2, 2, 2]


def test_what_is_given_is_real_clips():
    """Made of another world, only what is given fits the real clips, so that both streams together do not."""
    rows = {row.name: row for row in measure(Perfect(world=2), job(guidance=("replacement",)))}
    assert rows["joint"].heard == 1
    given = rows["video-from-audio, replacement"], rows["audio-from-video, replacement"]
    assert all(row.heard < 0.7 for row in given)
    assert given[0].onsets == rows["real"].onsets and given[1].bounces == rows["real"].bounces


def test_full_scale_is_counted():
    loud = Perfect(spoil=lambda video, audio: (video, torch.where(torch.arange(5120) < 1280, 1.0, audio)))
    (*_, row) = measure(loud, job(ways=("joint",)))
    assert row.clipped == pytest.approx(0.25)


def test_clips_that_are_not_finite_are_refused():
    broken = Perfect(spoil=lambda video, audio: (video, audio.where(audio == 0, torch.nan)))
    with pytest.raises(FloatingPointError, match=r"model makes clips 0 to 3 \(joint\) not finite"):
        measure(broken, job())


def test_command(monkeypatch, tmp_path, capsys, threads):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mmattn, "keep_freed_memory", lambda: True)
    threads(1)
    CoupledUNet(**SMALL).save_pretrained("model")
    command = shlex.split("synchrony --model model --clips 2 --steps 2 --guidance gradient --out measured/table")
    cli.main(command)
    text = (tmp_path / "measured/table.md").read_text()
    assert capsys.readouterr().out == text and text.count("\n") == 7
    assert "| real | 2 |" in text and "| audio-from-video, gradient | 2 |" in text
    found = json.loads((tmp_path / "measured/table.json").read_text())
    assert [row["name"] for row in found["rows"]][2:] == [
        "joint",
        "video-from-audio, gradient",
        "audio-from-video, gradient",
    ]
    assert found["rows"][0]["heard"] == 1 and found["rows"][0]["unseen"] == 0
    assert found["config"]["prediction_type"] == "v_prediction" and found["steps"] == 2
    assert found["guidance_scale"] == {"video": 3 / (16 * 3 * 8 * 8), "audio": 3 / 5120}
    with pytest.raises(SystemExit, match="2"):
        cli.main(command)
    assert "measured/table.md exists; --force overwrites it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--clips 1", "clips is 1; expected 2 to 100000"),
        ("--guidance-scale -1", "guidance_scale is -1.0; expected 0 or more"),
        ("--model absent", "absent is not there; expected a checkpoint on a disk"),
        ("--model slow", "clip_format has sample_rate 2000; expected 3080 or more, for tones of 1400 Hz"),
        ("--config x.json", "model has its own configuration; expected neither --preset nor --config"),
    ],
)
def test_bad_input(monkeypatch, tmp_path, capsys, options, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mmattn, "keep_freed_memory", lambda: True)
    CoupledUNet(**SMALL).save_pretrained("model")
    CoupledUNet(**SMALL | {"sample_rate": 2000, "audio_size": (1, 3200)}).save_pretrained("slow")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["synchrony", "--model", "model", "--steps", "1", *shlex.split(options)])
    assert expected in capsys.readouterr().err
