# SPDX-License-Identifier: MIT
"""The processes that share a job, and their devices."""

from __future__ import annotations

import os
from typing import Any

import torch


class Processes:
    """This process among those that `accelerate launch` started, or alone.

    Args:
        device: "cpu", "cuda" or "cuda:N"; None is CUDA where there is one.

    Attributes:
        rank, count: the number of this process, and how many there are.
        device: of this process.

    Raises:
        ValueError: if there is no such device.
    """

    def __init__(self, device: str | None) -> None:
        wanted = _checked(device)
        self._state: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            self._state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
        self.rank = self._state.process_index if self._state else 0
        self.count = self._state.num_processes if self._state else 1
        own = self._state.device if self._state else torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.device = own if wanted is None or device == own.type else wanted

    def wait(self) -> None:
        """Until all are here."""
        if self._state:
            self._state.wait_for_everyone()


def _checked(device: str | None) -> torch.device | None:
    if device is None:
        return None
    expected = f"device is {device!r}; expected cpu, cuda or cuda:N"
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(expected) from error
    if found.type not in ("cpu", "cuda"):
        raise ValueError(expected)
    if found.type == "cuda" and not (found.index or 0) < torch.cuda.device_count():
        raise ValueError(f"{expected}, of which torch finds {torch.cuda.device_count()}")
    return found
