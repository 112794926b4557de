# SPDX-License-Identifier: MIT
"""How a network is trained: all that the result of a step depends on, besides the network, the data and the state."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

WEIGHTINGS = ("uniform", "min-snr")
TIMESTEPS = ("uniform", "loss-second-moment")
PRECISIONS = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The defaults are those of the paper (arXiv 2212.09478).

    Attributes:
        batch_size: clips of a step, of all processes and micro-batches.
        micro_batch: clips of one call of the network, which share their shifts; None is all of a process.
        lr: learning rate, constant after the warm-up.
        warmup: steps over which it grows from 0.
        weight_decay: of AdamW, whose betas are 0.9 and 0.999.
        clip_norm: largest norm of all gradients together; 0 does not clip.
        ema_rates: one average of the parameters for each; samples are made of the first.
        weighting: lambda_t of the loss: "uniform", or "min-snr", min(SNR, min_snr_gamma) / SNR (arXiv 2303.09556).
        min_snr_gamma: gamma of that.
        timesteps: how t is drawn: "uniform", or "loss-second-moment" (arXiv 2102.09672, section 3.3).
        precision: "float32", or what autocast computes in; parameters and their averages are float32.
        seed: of t, noise, shifts, dropout and the order of clips.
    """

    batch_size: int = 128
    micro_batch: int | None = 4
    lr: float = 1e-4
    warmup: int = 0
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    ema_rates: tuple[float, ...] = (0.9999,)
    weighting: str = "uniform"
    min_snr_gamma: float = 5.0
    timesteps: str = "uniform"
    precision: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("micro_batch", 1), ("warmup", 0)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"{name} is {value!r}; expected an int, {least} or more")
        if self.batch_size % (self.micro_batch or 1):
            raise ValueError(
                f"batch_size is {self.batch_size}; expected a multiple of micro_batch = {self.micro_batch}"
            )
        for name in ("lr", "weight_decay", "clip_norm", "min_snr_gamma"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}; expected 0 or more")
        if not self.ema_rates or not all(0 <= rate < 1 for rate in self.ema_rates):
            raise ValueError(f"ema_rates is {self.ema_rates}; expected at least one rate, each in [0, 1)")
        if len(set(self.ema_rates)) < len(self.ema_rates):
            raise ValueError(f"ema_rates is {self.ema_rates}; expected no rate twice")
        for name, choices in (("weighting", WEIGHTINGS), ("timesteps", TIMESTEPS), ("precision", PRECISIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(map(repr, choices))}")

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return self.lr * min(1.0, (step + 1) / self.warmup) if self.warmup else self.lr

    def settings(self) -> dict[str, Any]:
        """By name, as they are kept with a state."""
        return dataclasses.asdict(self) | {"ema_rates": list(self.ema_rates)}


RECIPES = {
    "small": Recipe(
        batch_size=8,
        micro_batch=None,
        lr=1e-3,
        warmup=200,
        clip_norm=1.0,
        ema_rates=(0.999, 0.9995),
        precision="bfloat16",
    )
}
"""Of the presets that are not trained as the paper says."""

SUPERRES_RECIPES = {
    "landscape": Recipe(batch_size=6, micro_batch=None),  # of one GPU, as published
    "small": Recipe(batch_size=8, micro_batch=None, lr=1e-3, warmup=100, clip_norm=1.0, ema_rates=(0.995,)),
}
"""Of super-resolution networks, by preset."""
