# SPDX-License-Identifier: MIT
"""Batches without end from a data set, whose position is state."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy
from torch.utils.data import Dataset

from mmdiffusion.data.items import Item, joined
from mmdiffusion.data.workers import read_by


class FilmError(ValueError):
    """A clip that could not be read, in one sentence that names its film."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)


class Batches:
    """The items of a data set in batches: all of them shuffled, then all of them shuffled otherwise, and so on.

    The order is a function of the seed, and none of the workers. What is saved is the position of what was given out,
    not of what workers have read ahead: after `load_state_dict` the next batch is the one that would have come.

    Args:
        dataset: of known length, `dataset[i]` an Item; one of `open_dataset`.
        batch_size: of this process.
        seed: of the order.
        workers: processes that read ahead, two batches each; 0 reads here.
        rank, count: the number of this process among those that share each step, and how many there are.
        pin_memory: whether batches are in memory that a GPU reads from by itself.

    Attributes:
        waited: seconds that `next` took so far, all together.

    Raises:
        ValueError: on an empty data set, or a number out of range.
    """

    def __init__(
        self,
        dataset: Dataset[Item],
        batch_size: int,
        *,
        seed: int = 0,
        workers: int = 0,
        rank: int = 0,
        count: int = 1,
        pin_memory: bool = False,
    ) -> None:
        if batch_size < 1 or workers < 0 or not 0 <= rank < count:
            raise ValueError(
                f"batch_size is {batch_size}, workers {workers}, rank {rank} of {count}; expected 1 clip or more, 0 "
                f"workers or more, and a rank below the count"
            )
        self.length = len(dataset)  # type: ignore[arg-type]
        if self.length < 1:
            raise ValueError("dataset has no clips; expected 1 or more")
        self._dataset, self._batch_size, self._seed = dataset, batch_size, seed
        self._rank, self._count = rank, count
        self._workers, self._pin_memory = workers, pin_memory
        self._position = 0  # of the clips of all processes and all epochs
        self._loading: Iterator[Item | _Failure] | None = None
        self._order: tuple[int, numpy.ndarray] | None = None
        self.waited = 0.0

    @property
    def epoch(self) -> int:
        """How often all items were given out."""
        return self._position // self.length

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Item:
        """The next batch.

        Raises:
            FilmError: if one of its clips cannot be read; the position stays, and the next call tries again.
        """
        begin = time.perf_counter()
        if self._loading is None:
            numbers = self._numbers(self._position)
            self._loading = read_by(self._workers, _Loading(self._dataset), numbers, pin_memory=self._pin_memory)
        found = next(self._loading)
        self.waited += time.perf_counter() - begin
        if isinstance(found, _Failure):
            self.close()
            raise FilmError(found.sentence)
        self._position += self._batch_size * self._count
        return found

    def close(self) -> None:
        """End the workers; the next batch starts them anew."""
        self._loading = None

    def state_dict(self) -> dict[str, int]:
        """Where this is: the number of clips given out to all processes; the length and the seed, for the check."""
        return {"position": self._position, "length": self.length, "seed": self._seed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from a state, also with another batch size, other workers and other processes.

        Raises:
            ValueError: if it is that of another number of clips, or of another seed.
        """
        for name, ours in (("length", self.length), ("seed", self._seed)):
            if state[name] != ours:
                raise ValueError(
                    f"state has {name} {state[name]}, and the data have {ours}; expected the same data and seed"
                )
        self.close()
        self._position = int(state["position"])

    def _numbers(self, position: int) -> Iterator[list[int]]:
        while True:
            first = position + self._rank * self._batch_size
            yield [self._number(first + k) for k in range(self._batch_size)]
            position += self._batch_size * self._count

    def _number(self, position: int) -> int:
        epoch, at = divmod(position, self.length)
        if self._order is None or self._order[0] != epoch:
            random = numpy.random.default_rng((self._seed % 2**64, epoch))
            self._order = epoch, random.permutation(self.length)
        return int(self._order[1][at])


class _Failure(NamedTuple):
    """What a worker hands over instead of a batch; an error that it raised would come with its whole traceback."""

    sentence: str


class _Loading(Dataset[Any]):
    def __init__(self, dataset: Dataset[Item]) -> None:
        self._dataset = dataset

    def __getitem__(self, numbers: list[int]) -> Item | _Failure:
        try:
            return joined([self._dataset[i] for i in numbers])
        except (OSError, ValueError) as error:
            return _Failure(" ".join(str(error).split()))
