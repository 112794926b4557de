# SPDX-License-Identifier: MIT
"""The coupled U-Net: against reference values of the published network, its checkpoints, options, and training."""

import json
import pathlib

import pytest
import torch

pytest.importorskip("diffusers")
safetensors = pytest.importorskip("safetensors")

from mmattn.testing import relative_error  # noqa: E402
from mmdiffusion import CoupledUNet  # noqa: E402

DATA = pathlib.Path(__file__).parent / "data"
FULL = json.loads((DATA / "unet_full_keys.json").read_text())
SMALL = {
    "video_size": (4, 3, 8, 8),
    "audio_size": (1, 64),
    "model_channels": 32,
    "num_res_blocks": 1,
    "cross_attention_resolutions": (2,),
    "cross_attention_windows": (2,),
    "video_attention_resolutions": (2,),
    "channel_mult": (1, 2),
    "num_heads": 2,
    "num_head_channels": 32,
}


def filled(shapes, seed=0):
    """Parameters that all matter, by the rule of the reference values: keys in sorted order from one generator."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key in sorted(shapes):
        noise = torch.randn(shapes[key], generator=generator)
        if noise.dim() > 1:
            tensors[key] = noise / noise[0].numel() ** 0.5
        else:
            tensors[key] = 0.1 * noise + (1 if key.endswith("weight") else 0)
    return tensors


def reference(case):
    with safetensors.safe_open(DATA / f"unet_{case}.safetensors", "pt") as file:
        metadata = {name: json.loads(value) for name, value in file.metadata().items()}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return metadata, tensors


def small(seed=0, **options):
    """A small model whose every parameter matters: it is born with outputs of zero."""
    unet = CoupledUNet(**{**SMALL, **options})
    unet.load_state_dict(filled({name: x.shape for name, x in unet.named_parameters()}, seed))
    return unet.eval()


def clip(batch=2, frames=4, size=8, audio_len=64, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    video = torch.randn(batch, frames, 3, size, size, generator=generator)
    audio = torch.randn(batch, 1, audio_len, generator=generator)
    return video.to(dtype), audio.to(dtype), torch.tensor([3, 700][:batch])


@pytest.mark.parametrize("case", (0, 1))
def test_published_values(case):
    metadata, tensors = reference(case)
    state = filled(metadata["state_dict"], metadata["fill_seed"])
    unet = CoupledUNet.from_published(state, **metadata["config"])
    with torch.no_grad():
        video, audio = unet(tensors["video"], tensors["audio"], tensors["timesteps"], shifts=metadata["shifts"])
    assert relative_error(video, tensors["video_out"]) < 3e-5
    assert relative_error(audio, tensors["audio_out"]) < 3e-5


def test_full_size_has_the_published_keys():
    with torch.device("meta"):
        unet = CoupledUNet(**FULL["config"])
    assert {key: list(x.shape) for key, x in unet.to_published().items()} == FULL["state_dict"]
    assert round(unet.num_parameters() / 1e6, 2) == 133.68
