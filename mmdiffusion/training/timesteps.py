# SPDX-License-Identifier: MIT
"""How t is drawn in training."""

from __future__ import annotations

import torch
from torch import Tensor

_KEPT = 10  # losses of each timestep
_UNIFORM_SHARE = 0.001  # so that no timestep is forgotten


class UniformTimesteps:
    """t uniform over 0..count-1."""

    def __init__(self, count: int) -> None:
        self.count = count

    def draw(self, generator: torch.Generator) -> tuple[int, float]:
        """t, and the weight of its loss."""
        return int(torch.randint(self.count, (), generator=generator)), 1.0

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Losses [B] seen at t [B] change nothing."""

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state:
            raise ValueError(
                f"the state has {', '.join(sorted(state))} of timesteps; expected none, as they are uniform"
            )


class LossSecondMomentTimesteps(UniformTimesteps):
    """t in proportion to the root of its last losses' second moment (arXiv 2102.09672, section 3.3).

    Uniform until every timestep was seen ten times. The weight of a loss is 1 / (count p_t), so that the expectation is
    that of uniform t.
    """

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self._history = torch.zeros(count, _KEPT, dtype=torch.float64)
        self._seen = torch.zeros(count, dtype=torch.int64)

    def draw(self, generator: torch.Generator) -> tuple[int, float]:
        if bool((self._seen < _KEPT).any()):
            return super().draw(generator)
        moments = self._history.square().mean(1).sqrt()
        shares = moments / moments.sum() * (1 - _UNIFORM_SHARE) + _UNIFORM_SHARE / self.count
        t = int(torch.multinomial(shares, 1, generator=generator))
        return t, 1 / (self.count * float(shares[t]))

    def update(self, t: Tensor, losses: Tensor) -> None:
        for step, loss in zip(t.tolist(), losses.tolist(), strict=True):
            seen = int(self._seen[step])
            if seen == _KEPT:
                self._history[step, :-1] = self._history[step, 1:].clone()
            self._history[step, min(seen, _KEPT - 1)] = loss
            self._seen[step] = min(seen + 1, _KEPT)

    def state_dict(self) -> dict[str, Tensor]:
        return {"history": self._history, "seen": self._seen}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._history, self._seen = state["history"].clone(), state["seen"].clone()


def make_timesteps(name: str, count: int) -> UniformTimesteps:
    """Of a recipe's name."""
    return {"uniform": UniformTimesteps, "loss-second-moment": LossSecondMomentTimesteps}[name](count)
