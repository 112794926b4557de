# SPDX-License-Identifier: MIT
"""Causal video and sound: tokens come in blocks of unequal length, and a block looks at the blocks up to its own.

Before: a dense boolean mask of all video and sound tokens, of which the hidden part is computed all the same. After:
`mmattn.Windows.prefix`, which has one number for each block. `python examples/causal_av.py`
"""

import torch
from side_by_side import compare, parse
from torch import Tensor, nn
from torch.nn import functional

import mmattn


class VideoLooksAtSound(nn.Module):
    """Cross-attention of video tokens [B, Lv, C] to sound tokens [B, La, C], by a dense mask."""

    def __init__(self, channels: int, heads: int, video_blocks: list[int], sound_blocks: list[int]) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(channels, 2 * channels)
        self.out = nn.Linear(channels, channels)
        self.prepare(torch.tensor([0, *video_blocks]).cumsum(0), torch.tensor([0, *sound_blocks]).cumsum(0))

    def prepare(self, video_bounds: Tensor, sound_bounds: Tensor) -> None:
        block_of_query = torch.bucketize(torch.arange(int(video_bounds[-1])), video_bounds[1:], right=True)
        block_of_key = torch.bucketize(torch.arange(int(sound_bounds[-1])), sound_bounds[1:], right=True)
        self.mask = block_of_key <= block_of_query[:, None]

    def forward(self, video: Tensor, sound: Tensor) -> Tensor:
        q = self.q(video).unflatten(-1, (self.heads, -1))
        k, v = self.kv(sound).unflatten(-1, (2, self.heads, -1)).unbind(2)
        return self.out(self.attend(q, k, v).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return functional.scaled_dot_product_attention(q, k, v, self.mask).transpose(1, 2)


class InWindows(VideoLooksAtSound):
    """The same by ranges."""

    def prepare(self, video_bounds: Tensor, sound_bounds: Tensor) -> None:
        self.windows = mmattn.Windows.prefix(video_bounds, sound_bounds[1:], keys=int(sound_bounds[-1]))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return mmattn.segmented_attention(q, k, v, self.windows)


if __name__ == "__main__":
    small = parse(__doc__).small
    torch.manual_seed(0)
    video, sound = ([48, 36, 36], [8, 7, 7]) if small else ([768, 576, 576, 576, 576], [26, 25, 25, 25, 25])
    sizes = (32, 2) if small else (256, 4)
    tokens, audio = torch.randn(1, sum(video), sizes[0]), torch.randn(1, sum(sound), sizes[0])
    print(f"{sum(video)} video tokens look at {sum(sound)} of sound, in {len(video)} causal blocks")
    compare(VideoLooksAtSound(*sizes, video, sound), InWindows(*sizes, video, sound), tokens, audio)
    print(f"{sum(sound)} tokens of sound look at {sum(video)} of video")
    compare(VideoLooksAtSound(*sizes, sound, video), InWindows(*sizes, sound, video), audio, tokens)
