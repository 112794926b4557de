# SPDX-License-Identifier: MIT
"""The processes that share a job, their devices, and the signals that end it."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch

_DDP = "accelerate launch --multi_gpu, by which processes share each step"
_NOT_DONE = {
    "ACCELERATE_USE_FSDP": ("FSDP", _DDP),
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", _DDP),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", _DDP),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("a parallelism configuration", _DDP),
    "ACCELERATE_DYNAMO_BACKEND": ("torch.compile", "--dynamo_backend no"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("gradient accumulation", "--micro-batch of mmdiffusion train"),
}
"""Variables by which `accelerate launch` asks for what no job here does: what that is, and what is expected instead."""

_PRECISIONS = {"bf16": "bfloat16", "fp16": "float16"}
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


class Processes:
    """This process among those that `accelerate launch` started, or alone.

    Args:
        device: "cpu", "cuda" or "cuda:N"; None is CUDA where there is one, unless the launcher says --cpu.

    Attributes:
        rank, count: the number of this process, and how many there are.
        device: of this process.

    Raises:
        ValueError: if there is no such device, or the launcher asks for what is not done here.
    """

    def __init__(self, device: str | None) -> None:
        _refuse_what_is_not_done()
        if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
            if device not in (None, "cpu"):
                raise ValueError(f"device is {device!r} and the launcher says --cpu; expected one of them")
            device = "cpu"
        wanted = _checked(device)
        self._state: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            self._state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
            kind = self._state.distributed_type.value
            if kind not in ("MULTI_GPU", "MULTI_CPU"):
                raise ValueError(
                    f"WORLD_SIZE is {os.environ['WORLD_SIZE']} and accelerate finds {kind} here; expected MULTI_GPU or "
                    f"MULTI_CPU, as accelerate launch --multi_gpu makes them"
                )
            # Threads of gloo drop a collective's tensors after it has returned, and need the interpreter for that: one
            # that comes to it when the interpreter is on its way out aborts the process. This joins them before. Not
            # those of NCCL, whose end may wait for processes that have failed.
            if torch.distributed.get_backend() == "gloo":
                atexit.register(self._state.destroy_process_group)
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


def refuse_other_precision(precision: str) -> None:
    """
    Raises:
        ValueError: if the launcher asks for mixed precision of another kind.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower()
    if asked not in ("", "no") and _PRECISIONS.get(asked) != precision:
        raise ValueError(
            f"precision is {precision} and the launcher's --mixed_precision {asked}; expected the same, or none of the "
            f"launcher's"
        )


def _refuse_what_is_not_done() -> None:
    for name, (what, expected) in _NOT_DONE.items():
        value = os.environ.get(name, "")
        if value.lower() not in ("", "false", "no", "0", "1"):
            raise ValueError(
                f"the launcher asks for {what} ({name}={value}), which is not done here; expected {expected}"
            )
    if "WORLD_SIZE" in os.environ:
        return
    for name in _MPI_SIZES:
        if os.environ.get(name, "1") not in ("0", "1"):
            raise ValueError(
                f"{name} is {os.environ[name]}, of processes of MPI, which do not find each other here; expected "
                f"{_DDP}, or no {name}"
            )
    # Where it is not told to, and finds fewer than two GPUs, it starts one process, however many were asked for.
    if "ACCELERATE_DYNAMO_BACKEND" in os.environ and "MASTER_ADDR" in os.environ:
        raise ValueError(
            "the launcher has set MASTER_ADDR, as for several processes, and started one; expected accelerate launch "
            "--multi_gpu (on a CPU too), or --num_processes 1 and no MASTER_ADDR"
        )


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


@contextlib.contextmanager
def told_to_stop(wake: Callable[[], object] = lambda: None) -> Iterator[list[int]]:
    """The first SIGINT or SIGTERM is put on a list, and `wake` called; a second one acts as ever.

    That is so even where SIGINT was ignored, as it is by what a script starts in the background.
    """
    signals: list[int] = []
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _: Any) -> None:
        signals.append(number)
        signal.signal(number, before[number])
        wake()

    try:
        for number in before:
            signal.signal(number, note)
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
