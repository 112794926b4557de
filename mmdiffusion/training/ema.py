# SPDX-License-Identifier: MIT
"""Exponential moving averages of parameters, at several rates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn


class EMA:
    """average = rate average + (1 - rate) parameter after each step, from the parameters' initial values on.

    Args:
        parameters: as of `nn.Module.named_parameters`.
        rates: one set of averages for each.

    Attributes:
        averages: {rate: {name: average, float32, where the parameter is}}.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], rates: Sequence[float]) -> None:
        self._parameters = dict(parameters)
        self.averages = {
            rate: {name: x.detach().float().clone() for name, x in self._parameters.items()} for rate in rates
        }

    @torch.no_grad()
    def update(self) -> None:
        """After a step of the optimizer."""
        parameters = [x.detach().float() for x in self._parameters.values()]
        for rate, averages in self.averages.items():
            torch._foreach_lerp_(list(averages.values()), parameters, 1 - rate)

    @torch.no_grad()
    def copy_to(self, module: nn.Module, rate: float) -> None:
        """Set the parameters of a module with the same names to the averages of a rate."""
        for name, x in module.named_parameters():
            x.copy_(self.averages[rate][name])
