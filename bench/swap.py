# SPDX-License-Identifier: MIT
"""What the cross-attention blocks of the published U-Net keep for backward, swapped, with the host's checkpointing of
them and without: megabytes of one sample in float32.

    python bench/swap.py
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import published
import torch
from torch import Tensor, nn

import mmattn
from mmdiffusion import CoupledUNet, checkpoints


class Checkpointed(published.CrossAttention):
    """The published block as it is in the release, where every forward is computed again in backward."""

    use_checkpoint = True


def blocks() -> list[tuple[dict[str, Any], torch.Size, torch.Size]]:
    """Of each block of the published U-Net: its arguments, and the sizes of its video and audio in one sample."""
    found: list[tuple[dict[str, Any], torch.Size, torch.Size]] = []

    def note(block: Any, args: tuple[Tensor, ...]) -> None:
        options = {"num_heads": block.num_heads, "local_window": block.local_window}
        found.append(({"channels": block.channels, **options}, args[0].shape, args[1].shape))

    with torch.device("meta"):
        config = CoupledUNet(**checkpoints.PRESETS["landscape"]).config
    with torch.device("meta"), torch.no_grad():
        arguments = inspect.signature(published.PublishedUNet).parameters
        network = published.PublishedUNet(**{name: config[name] for name in arguments})
        own = [module for module in network.modules() if isinstance(module, published.CrossAttention)]
        for block in own:
            block.register_forward_pre_hook(note)
        streams = torch.empty(1, *config["video_size"]), torch.empty(1, *config["audio_size"])
        network(*streams, torch.zeros(1), [0] * len(own))
    return found


def kept_bytes(block: nn.Module, video: Tensor, audio: Tensor) -> int:
    """Of what backward needs and the block's caller does not hold: each storage once, without parameters."""
    held = {x.untyped_storage().data_ptr() for x in (*block.parameters(), video, audio)}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        results = block(video, audio)
    return sum(size for at, size in kept.items() if at not in held) * bool(results)


def main() -> int:
    totals = {"with": 0, "without": 0}
    found = blocks()
    for options, video_shape, audio_shape in found:
        video, audio = (torch.randn(shape, requires_grad=True) for shape in (video_shape, audio_shape))
        for name, kind in zip(totals, (Checkpointed, published.CrossAttention), strict=True):
            block = kind(**options)
            assert mmattn.swap(block) == 1
            totals[name] += kept_bytes(block, video, audio)
    inputs = sum(4 * (video.numel() + audio.numel()) for _, video, audio in found)
    print(f"{len(found)} blocks of one sample of the published size, float32, torch {torch.__version__}")
    for name, total in totals.items():
        print(f"held for backward {name} the host's checkpointing: {(inputs + total) / 1e6:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
