# SPDX-License-Identifier: MIT
"""Worker processes that read films."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset


def read_by(workers: int, dataset: Dataset[Any], order: Iterable[Any] | None = None, **options: Any) -> Iterator[Any]:
    """The items of a data set in order, as they are, read ahead by so many processes.

    A worker that is forked inherits the films that are open here, but not their decoders' threads, for which it would
    wait for ever if it closed one. So what is garbage goes before, and a worker never collects what it inherits.
    """
    if workers:
        gc.collect()
        _refuse_without_shared_memory(workers)
    loader = DataLoader(
        dataset,
        sampler=order,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_keep_what_is_inherited,
        # Its own: a loader draws from torch's at every start, and what follows would depend on restarts.
        generator=torch.Generator().manual_seed(0),
        **options,
    )
    return iter(loader)


def _refuse_without_shared_memory(workers: int) -> None:
    """The first thing that workers need; without it, a loader that is half made says more as it goes."""
    try:
        torch.multiprocessing.Lock()
    except OSError as error:
        found = f"workers is {workers}, and there is no shared memory for them ({error.strerror or error})"
        raise OSError(error.errno, f"{found}; expected 0, or a /dev/shm that can be written") from error


def _as_it_is(found: Any) -> Any:
    return found


def _keep_what_is_inherited(worker: int) -> None:
    gc.freeze()
