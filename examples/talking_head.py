# SPDX-License-Identifier: MIT
"""A talking head: each latent frame of video looks at the sound around it, a window cut off at both ends.

Before: the sound of each frame is gathered, copied with its overlaps and padded, and the frames become the batch.
After: `mmattn.Windows.centered`, by which every frame reads the sound where it lies. `python examples/talking_head.py`

On a CPU that saves memory and no time (docs/embedding.md).
"""

import torch
from side_by_side import compare, parse
from torch import Tensor, nn
from torch.nn import functional

import mmattn


class FramesLookAtSound(nn.Module):
    """Cross-attention of video tokens [B, F*P, C] to sound tokens [B, La, C], the windows copied."""

    def __init__(self, channels: int, heads: int, centers: list[int], radius: int, pixels: int, keys: int) -> None:
        super().__init__()
        self.heads, self.frames = heads, len(centers)
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(channels, 2 * channels)
        self.out = nn.Linear(channels, channels)
        self.prepare(torch.tensor(centers), radius, pixels, keys)

    def prepare(self, centers: Tensor, radius: int, pixels: int, keys: int) -> None:
        index = centers[:, None] + torch.arange(-radius, radius + 1)  # [F, 2 * radius + 1]
        self.is_sound = ((index >= 0) & (index < keys))[:, None, None]  # [F, 1, 1, 2 * radius + 1]
        self.index = index.clamp(0, keys - 1)

    def forward(self, video: Tensor, sound: Tensor) -> Tensor:
        q = self.q(video).unflatten(-1, (self.heads, -1))
        k, v = self.kv(sound).unflatten(-1, (2, self.heads, -1)).unbind(2)
        return self.out(self.attend(q, k, v).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch = q.shape[0]
        q = q.unflatten(1, (self.frames, -1)).flatten(0, 1)
        k, v = (x[:, self.index].flatten(0, 1) for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = functional.scaled_dot_product_attention(q, k, v, self.is_sound.repeat(batch, 1, 1, 1))
        return out.transpose(1, 2).unflatten(0, (batch, self.frames)).flatten(1, 2)


class InWindows(FramesLookAtSound):
    """The same by ranges."""

    def prepare(self, centers: Tensor, radius: int, pixels: int, keys: int) -> None:
        self.windows = mmattn.Windows.centered(centers, radius, queries=len(centers) * pixels, keys=keys)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return mmattn.segmented_attention(q, k, v, self.windows)


if __name__ == "__main__":
    small = parse(__doc__).small
    torch.manual_seed(0)
    frames, pixels, keys, channels, heads = (5, 12, 40, 32, 2) if small else (21, 128, 173, 512, 8)
    centers = [round((frame + 0.5) * keys / frames) for frame in range(frames)]
    print(f"{frames} latent frames of {pixels} tokens look at 17 of {keys} tokens of sound each")
    sizes = channels, heads, centers, 8, pixels, keys
    video, sound = torch.randn(1, frames * pixels, channels), torch.randn(1, keys, channels)
    compare(FramesLookAtSound(*sizes), InWindows(*sizes), video, sound)
