# SPDX-License-Identifier: MIT
"""Dance to music: several clips of unequal length lie behind each other, and each looks at its own music alone.

Before: a block-diagonal mask that every call builds anew from the lengths. After: `mmattn.Windows.blocks`, whose values
are replaced in place. `python examples/dance.py`
"""

import torch
from side_by_side import compare, parse
from torch import Tensor, nn
from torch.nn import functional

import mmattn


class DancersLookAtMusic(nn.Module):
    """Cross-attention of poses [1, Lq, C] to music [1, Lk, C] of the same clips; int bounds [clips + 1] of both."""

    def __init__(self, channels: int, heads: int, pose_bounds: Tensor, music_bounds: Tensor) -> None:
        super().__init__()
        self.heads, self.pose_bounds, self.music_bounds = heads, pose_bounds, music_bounds
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(channels, 2 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, poses: Tensor, music: Tensor) -> Tensor:
        q = self.q(poses).unflatten(-1, (self.heads, -1))
        k, v = self.kv(music).unflatten(-1, (2, self.heads, -1)).unbind(2)
        return self.out(self.attend(q, k, v).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.zeros(q.shape[1], k.shape[1], dtype=torch.bool)
        for i in range(len(self.pose_bounds) - 1):
            own, read = (slice(*bounds[i : i + 2].tolist()) for bounds in (self.pose_bounds, self.music_bounds))
            mask[own, read] = True
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)


class InWindows(DancersLookAtMusic):
    """The same by ranges."""

    windows: mmattn.Windows | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        new = mmattn.Windows.blocks(self.pose_bounds, self.music_bounds, keys=k.shape[1])
        # In place, for a graph that has been recorded or compiled with these tables.
        if self.windows is None or self.windows.description != new.description:
            self.windows = new
        return mmattn.segmented_attention(q, k, v, self.windows.copy_(new))


if __name__ == "__main__":
    small = parse(__doc__).small
    torch.manual_seed(0)
    clips, channels, heads = ([(24, 12), (40, 20)], 32, 2) if small else ([(512, 256), (896, 448), (640, 320)], 256, 4)
    poses, music = (torch.tensor([0, *lengths]).cumsum(0) for lengths in zip(*clips, strict=True))
    print(f"{len(clips)} clips of {int(poses[-1])} poses and {int(music[-1])} tokens of music in all")
    inputs = torch.randn(1, int(poses[-1]), channels), torch.randn(1, int(music[-1]), channels)
    sizes = channels, heads, poses, music
    compare(DancersLookAtMusic(*sizes), InWindows(*sizes), *inputs)
