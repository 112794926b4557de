# SPDX-License-Identifier: MIT
"""Which keys each query may attend to, as ranges: `Windows`, made once and passed to many calls."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree

from mmattn import _checks

Numbers = Sequence[int] | Tensor  # that many integers, [n]


class Description(NamedTuple):
    """What of `Windows` a cache may be keyed by: sizes alone, which stay when the values of the tables change."""

    segments: int
    queries: int
    keys: int
    device: torch.device


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """Segments of queries, and for each the circular range of keys that it reads.

    With n segments, Lq queries and Lk keys, queries query_bounds[i]..query_bounds[i+1]-1 attend to the keys
    (key_begin[i] + j) mod Lk, j = 0..key_length[i]-1. Ranges may overlap, nest, leave keys out or be empty, and so may
    segments; batch and heads share them.

    The constructors check values that are on the CPU or are no tensors: none waits for an accelerator. `copy_` replaces
    the values in place, of which neither a compiled graph nor a CUDA graph need know. A pytree of its three tables, so
    torch.compile takes it as an argument.

    Attributes:
        query_bounds: int32 [n+1], ascending from 0 to Lq.
        key_begin: int32 [n].
        key_length: int32 [n], 0..Lk.
        queries: Lq.
        keys: Lk.
    """

    query_bounds: Tensor
    key_begin: Tensor
    key_length: Tensor
    queries: int
    keys: int

    @classmethod
    def from_ranges(
        cls,
        query_bounds: Numbers,
        key_begin: Numbers,
        key_length: Numbers,
        *,
        keys: int,
        queries: int | None = None,
        device: torch.device | str | None = None,
    ) -> Windows:
        """Windows of any bounds and ranges.

        Args:
            query_bounds: n+1 integers, ascending from 0 to the number of queries; of an empty segment both are equal.
            key_begin: n integers, taken modulo `keys`.
            key_length: n integers, 0..keys.
            keys: Lk, at least 1.
            queries: Lq; needed where query_bounds is on an accelerator, else it is read from them.
            device: of the tables; that of query_bounds if it is a tensor, else the CPU.

        Raises:
            TypeError, ValueError: on an argument that is not so, naming it, its value and what was expected.
        """
        _checks.integer("keys", keys, 1)
        device = (query_bounds.device if isinstance(query_bounds, Tensor) else "cpu") if device is None else device
        names = ("query_bounds", "key_begin", "key_length")
        given = dict(zip(names, (query_bounds, key_begin, key_length), strict=True))
        tables = {name: _table(name, values, keys, torch.device(device)) for name, values in given.items()}
        segments = tables["query_bounds"].shape[0] - 1
        if segments < 1:
            raise ValueError(f"query_bounds has {segments + 1} elements; expected at least 2, of one segment")
        for name in names[1:]:
            if tables[name].shape[0] != segments:
                found = tables[name].shape[0]
                raise ValueError(
                    f"{name} has {found} elements; expected {segments}, one for each segment of query_bounds"
                )
        if queries is None:
            if not _is_readable(query_bounds):
                raise ValueError("queries is None; expected their number, as query_bounds is on an accelerator")
            queries = int(query_bounds[-1])
        _checks.integer("queries", queries, 1)
        if all(map(_is_readable, given.values())):
            bounds, _, lengths = map(_numbers, given.values())
            _check_values(bounds, lengths, queries, keys)
        return cls(**tables, queries=queries, keys=keys)

    @classmethod
    def circular(
        cls,
        segments: int,
        window: int,
        shift: int | Tensor,
        *,
        queries: int,
        keys: int,
        device: torch.device | str | None = None,
    ) -> Windows:
        """The windows of RS-MMA, of one direction: `random_shift_attention` has their formula.

        Segment i, of queries // segments queries, reads the `window` segments of keys // segments keys from i + shift
        on, modulo the number of keys. Queries that are left over belong to the last segment.

        Args:
            segments: F, at most the number of queries and of keys.
            window: S, 1..segments.
            shift: R, 0..segments-window, an int or a tensor of one integer, which is not read on an accelerator.
            queries: Lq.
            keys: Lk.
            device: of the tables; that of `shift` if it is a tensor, else the CPU.
        """
        _checks.integer("queries", queries, 1)
        _checks.integer("keys", keys, 1)
        _checks.integer("segments", segments, 1)
        if segments > min(queries, keys):
            raise ValueError(f"segments is {segments}; expected at most {min(queries, keys)}, as queries or keys")
        if not 1 <= window <= segments:
            raise ValueError(f"window is {window}; expected 1..segments = 1..{segments}")
        if device is None:
            device = shift.device if isinstance(shift, Tensor) else "cpu"
        if not isinstance(shift, Tensor) or _is_readable(shift):
            largest = segments - window
            if not 0 <= int(shift) <= largest:
                raise ValueError(f"shift is {int(shift)}; expected 0..segments-window = 0..{largest}")
        number = torch.arange(segments, device=device)
        step = keys // segments
        begin = (number + (shift.reshape(()) if isinstance(shift, Tensor) else shift)) * step % keys
        bounds = torch.cat([number * (queries // segments), number.new_full((1,), queries)])
        return cls(bounds.int(), begin.int(), torch.full_like(begin, window * step).int(), queries, keys)

    @classmethod
    def centered(
        cls,
        centers: Numbers,
        radius: int,
        *,
        queries: int,
        keys: int,
        device: torch.device | str | None = None,
    ) -> Windows:
        """Windows around a key each, cut off at the first and the last key: sound around each latent frame.

        Segment i, of queries // n queries, reads keys centers[i]-radius..centers[i]+radius, both included, as far as
        they are in 0..keys-1; a center may lie outside.

        Args:
            centers: n integers, n a divisor of `queries`.
            radius: keys on either side, at least 0.
        """
        _checks.integer("radius", radius, 0)
        _checks.integer("keys", keys, 1)
        _checks.integer("queries", queries, 1)
        at = centers if isinstance(centers, Tensor) else torch.tensor(centers, dtype=torch.int64)
        count = at.shape[0]
        if count < 1 or queries % count:
            raise ValueError(f"centers has {count} elements; expected a divisor of the number of queries, {queries}")
        at = at.to(at.device if device is None else device, torch.int64)
        begin, end = ((at + side).clamp(0, keys) for side in (-radius, radius + 1))
        bounds = torch.arange(count + 1, device=at.device) * (queries // count)
        return cls(bounds.int(), begin.int(), (end - begin).int(), queries, keys)

    @classmethod
    def prefix(
        cls, query_bounds: Numbers, key_ends: Numbers, *, keys: int, device: torch.device | str | None = None
    ) -> Windows:
        """Windows that all begin at key 0, as of causal blocks: segment i reads keys 0..key_ends[i]-1."""
        begins = torch.zeros_like(key_ends) if isinstance(key_ends, Tensor) else [0] * len(key_ends)
        return cls.from_ranges(query_bounds, begins, key_ends, keys=keys, device=device)

    @classmethod
    def blocks(
        cls, query_bounds: Numbers, key_bounds: Numbers, *, keys: int, device: torch.device | str | None = None
    ) -> Windows:
        """A block-diagonal mask: segment i reads keys key_bounds[i]..key_bounds[i+1]-1."""
        begins: Numbers
        lengths: Numbers
        if isinstance(key_bounds, Tensor):
            begins, lengths = key_bounds[:-1], key_bounds.diff()
        else:
            begins, lengths = key_bounds[:-1], [hi - lo for lo, hi in itertools.pairwise(key_bounds)]
        return cls.from_ranges(query_bounds, begins, lengths, keys=keys, device=device)

    @property
    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """query_bounds, key_begin and key_length."""
        return self.query_bounds, self.key_begin, self.key_length

    @property
    def description(self) -> Description:
        """Its sizes, hashable."""
        return Description(self.key_begin.shape[0], self.queries, self.keys, self.key_begin.device)

    def to(self, device: torch.device | str) -> Windows:
        """The same on another device, or itself."""
        if self.key_begin.device == torch.device(device):
            return self
        bounds, begin, length = (table.to(device) for table in self.tables)
        return Windows(bounds, begin, length, self.queries, self.keys)

    def copy_(self, other: Windows) -> Windows:
        """Take the values of other windows of the same sizes, in place; returns self."""
        for name in ("segments", "queries", "keys"):
            own, theirs = getattr(self.description, name), getattr(other.description, name)
            if own != theirs:
                raise ValueError(f"other has {theirs} {name}; expected {own}, as these windows have")
        for table, values in zip(self.tables, other.tables, strict=True):
            table.copy_(values)
        return self

    def of_queries(self) -> tuple[Tensor, Tensor]:
        """First key and number of keys of each query, int64 [Lq] both."""
        return ranges_of_queries(*self.tables, self.queries)

    def mask(self) -> Tensor:
        """The dense mask [Lq, Lk], true where a query reads a key, as scaled_dot_product_attention takes it."""
        return dense_mask(*self.tables, self.queries, self.keys)

    def block_mask(self, **options: Any) -> Any:
        """FlexAttention's `BlockMask` of these windows; `options` are those of its `create_block_mask`."""
        from torch.nn.attention.flex_attention import create_block_mask

        begin, length = self.of_queries()
        keys = self.keys

        def reads(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key - begin[query]) % keys < length[query]

        return create_block_mask(reads, None, None, self.queries, keys, device=begin.device, **options)


def ranges_of_queries(
    query_bounds: Tensor, key_begin: Tensor, key_length: Tensor, queries: int
) -> tuple[Tensor, Tensor]:
    """First key and number of keys of each query, int64 [Lq] both, from the tables."""
    positions = torch.arange(queries, device=query_bounds.device, dtype=torch.int32)
    segment = torch.searchsorted(query_bounds[1:], positions, right=True).clamp(max=key_begin.shape[0] - 1)
    return key_begin[segment].long(), key_length[segment].long()


def dense_mask(query_bounds: Tensor, key_begin: Tensor, key_length: Tensor, queries: int, keys: int) -> Tensor:
    """`Windows.mask` from the tables."""
    begin, length = ranges_of_queries(query_bounds, key_begin, key_length, queries)
    key = torch.arange(keys, device=begin.device)
    return (key - begin[:, None]) % keys < length[:, None]


def _is_readable(values: Numbers) -> bool:
    """Whether reading the values waits for no accelerator, and no trace lacks them."""
    if not isinstance(values, Tensor):
        return True
    return values.device.type == "cpu" and not torch.compiler.is_compiling() and type(values) is Tensor


def _numbers(values: Numbers) -> list[int]:
    return values.tolist() if isinstance(values, Tensor) else list(values)


def _table(name: str, values: Numbers, keys: int, device: torch.device) -> Tensor:
    """The values as an int32 tensor, begins modulo the number of keys."""
    if isinstance(values, Tensor):
        if values.dim() != 1 or values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise TypeError(f"{name} is a {values.dtype} tensor of shape {list(values.shape)}; expected integers, [n]")
        wide = values.to(device, torch.int64)
    else:
        for at, value in enumerate(values):
            _checks.integer(f"{name}[{at}]", value)
        wide = torch.tensor(list(values), dtype=torch.int64, device=device)
    return (wide % keys if name == "key_begin" else wide).int()


def _check_values(bounds: list[int], lengths: list[int], queries: int, keys: int) -> None:
    if bounds[0] != 0:
        raise ValueError(f"query_bounds[0] is {bounds[0]}; expected 0")
    for i, (lo, hi) in enumerate(itertools.pairwise(bounds)):
        if hi < lo:
            raise ValueError(f"query_bounds[{i + 1}] is {hi}; expected at least query_bounds[{i}] = {lo}")
    if bounds[-1] != queries:
        raise ValueError(f"query_bounds[{len(bounds) - 1}] is {bounds[-1]}; expected queries = {queries}")
    for i, length in enumerate(lengths):
        if not 0 <= length <= keys:
            raise ValueError(f"key_length[{i}] is {length}; expected 0..keys = 0..{keys}")


def _flatten(windows: Windows) -> tuple[list[Tensor], tuple[int, int]]:
    return list(windows.tables), (windows.queries, windows.keys)


def _unflatten(tables: Any, sizes: tuple[int, int]) -> Windows:
    bounds, begin, length = tables
    return Windows(bounds, begin, length, *sizes)


_pytree.register_pytree_node(Windows, _flatten, _unflatten, serialized_type_name="mmattn.Windows")
