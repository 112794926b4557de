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

    def accelerator(self) -> Any:
        """What they train together with, an Accelerator; None for one process."""
        if not self._state:
            return None
        from accelerate import Accelerator

        return Accelerator(cpu=self.device.type == "cpu", mixed_precision="no")

    def any(self, flag: bool) -> bool:
        """Whether the flag of one of them is set; each has to ask."""
        if not self._state:
            return flag
        from accelerate.utils import reduce

        return bool(reduce(torch.tensor(float(flag), device=self.device)))

    def gathered(self, values: list[Any]) -> list[Any]:
        """The lists of all of them, one after the other, in each; each has to ask."""
        if not self._state:
            return values
        from accelerate.utils import gather_object

        return list(gather_object(values))

    def refuse_if_different(self, what: str, value: str) -> None:
        """
        Raises:
            RuntimeError: if a value is not the same in all of them.
        """
        values = self.gathered([value])
        if len(set(values)) > 1:
            raise RuntimeError(f"the processes have different {what}: {', '.join(values)}; expected the same in all")

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
