# SPDX-License-Identifier: MIT
"""The gradients of what a `Plan` computes, by one call of the extension.

The plan's calls are taken in reverse, each giving way to the kernels of its gradients. The gradient of what lies at a
place lies at the same place of another block, so that views of a tensor have theirs without a thought. The first call
that makes a share of a gradient writes it there and what later ones make is added, as by torch's engine; but shares of
a tensor that the plan was given stay apart, so that the engine adds them, and others', in the order in which it would.
"""

from __future__ import annotations

import bisect
import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmattn_kernels.cpu import extension
from mmattn_kernels.cpu.plan import LINE, Plan, Region, offsets_of

# Of the gradients of a plan's blocks, one behind the other, where no memory is: kernels are told of them by addresses.
_FIRST, _OF_A_BLOCK = 1 << 62, 1 << 44
_NOWHERE = (0, 0, 0)

Calls = list[tuple[str, tuple[Any, ...]]]


class _View(NamedTuple):
    """Elements as a kernel reads or writes them."""

    pointer: int
    strides: tuple[int, ...]
    shape: tuple[int, ...]
    itemsize: int

    def at(self, pointer: int) -> tuple[int, ...]:
        """What the extension is told of the same view elsewhere; the last stride is 1."""
        return pointer, *self.strides[:-1]


def _view(told: Sequence[int], shape: tuple[int, ...], is_bf16: bool) -> _View:
    return _View(told[0], (*told[1:], 1), shape, 2 if is_bf16 else 4)


class Gradients:
    """The gradients of those of a plan's tensors that want them, made from those of its results.

    Args:
        plan: whose tensors and results they are.
        wanted: which of the tensors want a gradient.
        given: which of the results have one.

    Raises:
        ValueError: if they do not follow from the plan's calls.
    """

    def __init__(self, plan: Plan, wanted: Sequence[bool], given: Sequence[bool]) -> None:
        ways = _Ways(plan, wanted, given)
        self._between, self._first_result = plan.between, plan.first_result
        self._blocks = blocks = plan.between + 1  # their gradients have the numbers behind theirs
        self._count = len(plan.forms)
        # Index, shape, strides, and the dtypes in which it is made, and wanted: that of a bias is summed in float32.
        self._made = [
            (at, shape, strides, torch.float32 if at in ways.biases else dtype, dtype)
            for at, (shape, dtype, strides) in enumerate(plan.forms)
            if at in ways.made and at not in ways.passed_on
        ]
        self._passed_on = [(at, result, plan.forms[at][0]) for at, result in ways.passed_on.items()]
        self.repeats, self._shifts = ways.repeats, ways.shifts
        self._repeats = [plan.forms[at] for at in ways.repeats]
        ranges: list[tuple[int, ...]] = [*plan.regions]
        for at, shape, _, dtype, _ in self._made:
            ranges.append((_address(at), math.prod(shape) * dtype.itemsize, blocks + at, 0))
        for region in plan.regions:
            if plan.first_result <= region.block < plan.between:
                ranges.append((_address(region.block), region.size, blocks + region.block, 0))
        pieces, self._bytes = _memory_between(plan, ways)
        ranges += [(begin, size, blocks + plan.between, offset) for begin, size, offset in pieces]
        for at, (shape, dtype, _) in enumerate(self._repeats):
            ranges.append((_address(blocks + at), math.prod(shape) * dtype.itemsize, 2 * blocks + at, 0))
        self._plan = extension().Plan([tuple(one) for one in ranges])
        for kernel, arguments in ways.calls:
            getattr(self._plan, kernel)(*arguments)
        used = self._plan.blocks()
        if any(self._count <= at < plan.first_result for at in used):
            raise ValueError("a gradient depends on a packed weight")
        self.wanted, self.made = wanted, sorted(ways.made)
        self.reads = [at for at in range(self._count) if at in used]
        self.reads_of_results = [at for at in range(len(given)) if plan.first_result + at in used]
        self.guard: Any = None  # of these tensors and what lies between, for whoever keeps them for backward

    def run(
        self,
        read: Sequence[Tensor],
        between: Tensor,
        d_results: Sequence[Tensor | None],
        shifts: Sequence[int] = (),
    ) -> list[Tensor | None]:
        """The gradient of each of the plan's tensors, None where it is not wanted or depends on none that is given; and
        further shares of the gradients of the tensors at the indices `repeats`.

        Args:
            read: of tensors like the plan's those at the indices `reads`, of the results those at `reads_of_results`.
            between: what the plan's run has made on the way.
            d_results: contiguous, None where none is given.
            shifts: what the plan's run was given.
        """
        pointers = [0] * (2 * self._blocks + len(self._repeats))
        places = *self.reads, *[self._first_result + at for at in self.reads_of_results]
        for at, t in zip(places, read, strict=True):
            pointers[at] = t.data_ptr()
        pointers[self._between] = between.data_ptr()
        for at, d in enumerate(d_results, self._blocks + self._first_result):
            pointers[at] = 0 if d is None else d.data_ptr()
        found: list[Tensor | None] = [None] * self._count
        narrow = []
        for at, shape, strides, dtype, wanted in self._made:
            found[at] = made = between.new_empty_strided(shape, strides, dtype=dtype)
            pointers[self._blocks + at] = made.data_ptr()
            if dtype != wanted:
                narrow.append((at, made, wanted))
        for at, (shape, dtype, strides) in enumerate(self._repeats):
            found.append(made := between.new_empty_strided(shape, strides, dtype=dtype))
            pointers[2 * self._blocks + at] = made.data_ptr()
        of_between = between.new_empty(self._bytes)
        pointers[2 * self._blocks - 1] = of_between.data_ptr()
        self._plan.run(pointers, [shifts[at] for at in self._shifts] if shifts else ())
        for at, result, shape in self._passed_on:
            found[at] = d_results[result].view(shape)  # type: ignore[union-attr]
        for at, made, wanted in narrow:
            found[at] = made.to(wanted)
        return found


def _address(block: int) -> int:
    return _FIRST + block * _OF_A_BLOCK


def _memory_between(plan: Plan, ways: _Ways) -> tuple[list[tuple[int, int, int]], int]:
    """Begin, size and offset of each piece of what lies between that the calls use, and the size of all memory."""
    begin_of_all = _address(plan.between)
    sizes = {begin_of_all + region.offset: region.size for region in plan.regions if region.block == plan.between}
    sizes |= ways.new
    begins = sorted(sizes)
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for at, (_, arguments) in enumerate(ways.calls):
        for pointer in _addresses(arguments):
            begin = begins[bisect.bisect_right(begins, pointer) - 1] if pointer >= begin_of_all else 0
            if begin and pointer < begin + sizes[begin]:
                first.setdefault(begin, at)
                last[begin] = at
    offsets, total = offsets_of([(sizes[begin], first[begin], last[begin]) for begin in first])
    return [(begin, sizes[begin], offset) for begin, offset in zip(first, offsets, strict=True)], total


def _addresses(arguments: Any) -> Iterator[int]:
    """All those of gradients in the arguments of a call."""
    if isinstance(arguments, (tuple, list)):
        for one in arguments:
            yield from _addresses(one)
    elif isinstance(arguments, int) and arguments >= _FIRST:
        yield arguments


class _Ways:
    """The calls that lead from the gradients of a plan's results to those of its tensors.

    Attributes:
        calls: of the extension, in their order.
        made: the tensors that have a gradient then.
        biases: those of them whose gradient is made in float32.
        passed_on: those of them whose gradient is that of a result, with the number of that.
        repeats: a tensor for each share of its gradient behind the first one.
        shifts: which of those of a run the calls need, in their order.
        new: begin and size of what the calls need besides the gradients of what lies between.
    """

    def __init__(self, plan: Plan, wanted: Sequence[bool], given: Sequence[bool]) -> None:
        self.calls: Calls = []
        self.biases: set[int] = set()
        self.passed_on: dict[int, int] = {}
        self.repeats: list[int] = []
        self._sums: dict[Region, int] = {}  # where the gradient of a result lies that is not the given one alone
        self.shifts: list[int] = []
        self.new: dict[int, int] = {}
        self._shifts_left = sum(kernel == "attention_forward" and len(of[0]) == 2 for kernel, of in plan.calls)
        self._end = plan.bytes_between
        self._plan = plan
        self._begins = [region.begin for region in plan.regions]
        self._wanted: set[Region] = set()
        self._has: dict[Region, Tensor] = {}  # which of its elements have a gradient
        self._lies_at: dict[Region, tuple[tuple[int, ...], _View]] = {}  # a gradient that is another's, not copied yet
        of_tensors = [region for region in plan.regions if region.block < len(plan.forms)]
        self._wanted.update(region for region in of_tensors if wanted[region.block])
        for kernel, arguments in plan.calls:
            read, written = getattr(self, f"_places_of_{kernel}")(*arguments)
            if any(map(self._wants, read)):
                self._wanted.update(map(self._region, written))
        for region in plan.regions:
            if not plan.first_result <= region.block < plan.between:
                continue
            if given[region.block - plan.first_result]:
                self._has[region] = torch.ones(region.size // plan.forms[0][1].itemsize, dtype=torch.bool)
            else:
                self._sums[region] = self._new(region.size)
        for kernel, arguments in reversed(plan.calls):
            getattr(self, f"_reverse_{kernel}")(*arguments)
        for region in of_tensors:
            self._finish(region)
        self.made = {region.block for region in of_tensors if region in self._has}
        if any(not has.all() for has in self._has.values()):
            raise ValueError("a part of a tensor has no gradient")
        sizes = {region.block: region.size for region in of_tensors}
        if any(sizes[at] != math.prod(plan.forms[at][0]) * plan.forms[at][1].itemsize for at in self.made):
            raise ValueError("a tensor that wants a gradient has gaps")

    def _places_of_conv_forward(
        self, x: Any, out: Any, residual: Any, packed: int, bias: Any, norm: Any, _: Any
    ) -> Any:
        weight = self._plan.weight_arguments[packed][0]
        return [x[0], residual[0], weight, bias[0], *(p[0] for p in norm[0])], [out[0]]

    def _reverse_conv_forward(
        self, x: Any, out: Any, residual: Any, packed: int, bias: Any, norm: Any, sizes: tuple[Any, ...]
    ) -> None:
        batch, length, in_channels, out_channels, *_, is_bf16, _ = sizes
        d_out = self._to_read(_view(out, (batch, length, out_channels), is_bf16))
        if d_out is None:
            return
        if self._wants(residual[0]):
            self._pass_on(d_out, _view(residual, (batch, length, out_channels), is_bf16))
        weight = self._plan.weight_arguments[packed]
        shape = weight[5:]
        if weight[2:5] != (shape[1] * shape[2], shape[2], 1):
            raise ValueError("a weight is not contiguous")
        d_weight = self._of_parameter(_View(weight[0], (1,), (math.prod(shape),), 2 if weight[1] else 4))
        d_bias = 0
        if self._wants(bias[0]):
            d_bias = self._of_parameter(_View(bias[0], (1,), (out_channels,), 2 if bias[2] else 4))
            self.biases.add(self._region(bias[0]).block)
        parameters, _, groups, _, silu = norm
        d_x, sums, later = self._through_norm(_view(x, (batch, length, in_channels), is_bf16), parameters)
        if not (groups or silu or parameters[2][0] or parameters[3][0]):
            sums = 0
        self.calls.append(("conv_backward", (x, d_out, d_x, sums, weight, d_weight, d_bias, norm, sizes)))
        self._reverse_parameters(parameters, sums, batch, in_channels)
        self.calls += later

    def _places_of_group_norm_forward(self, x: Any, out: Any, norm: Any, *_: Any) -> Any:
        return [x[0], *(p[0] for p in norm[0])], [out[0]]

    def _reverse_group_norm_forward(
        self, x: Any, out: Any, norm: Any, batch: int, length: int, channels: int, is_bf16: bool, threads: int
    ) -> None:
        view = _view(x, (batch, length, channels), is_bf16)
        d_out = self._to_read(_view(out, view.shape, is_bf16))
        if d_out is None:
            return
        d_x, sums, later = self._through_norm(view, norm[0])
        sizes = batch, length, channels, is_bf16, threads
        self.calls.append(("group_norm_backward", (x, d_out, d_x, norm, sums, *sizes)))
        self._reverse_parameters(norm[0], sums, batch, channels)
        self.calls += later

    def _places_of_attention_forward(self, directions: Any, *_: Any) -> Any:
        matrices = [of for of, *_ in directions]
        return [m[0] for of in matrices for m in of[:3]], [of[3][0] for of in matrices]

    def _reverse_attention_forward(
        self, directions: Any, windows: Any, batch: int, heads: int, dim: int, scale: float, is_bf16: bool, threads: int
    ) -> None:
        def view(matrix: Sequence[int], length: int) -> _View:
            return _view(matrix, (batch, length, heads, dim), is_bf16)

        has_shift = len(directions) == 2
        self._shifts_left -= has_shift
        outs = [view(of[3], queries) for of, _, _, queries, _ in directions]
        d_outs = [self._to_read(out) for out in outs]
        if all(d_out is None for d_out in d_outs):
            return
        calls = []
        for (of, lse, _, queries, keys), out, d_out in zip(directions, outs, d_outs, strict=True):
            if d_out is None:
                d_out = self._zeros(out)
            d_matrices = []
            for matrix, length in zip(of[:3], (queries, keys, keys), strict=True):
                one = view(matrix, length)
                if self._wants(one.pointer):
                    self._begin(one)
                    d_matrices.append(one.at(self._gradient(one.pointer)))
                else:
                    d_matrices.append(self._new_like(one))
            calls.append(([*of, d_out, *d_matrices], lse, 0, queries, keys))
        self.shifts += [self._shifts_left] * has_shift
        self.calls.append(("attention_backward", (calls, windows, batch, heads, dim, scale, is_bf16, threads)))

    def _places_of_sum(self, to: Any, terms: Any, *_: Any) -> Any:
        return [pointer for pointer, _ in terms], [to[0]]

    def _reverse_sum(self, to: Any, terms: Any, shape: tuple[int, ...], scale: float, is_bf16: bool, _: Any) -> None:
        d_to = self._to_read(_rows(to, shape, is_bf16))
        if d_to is None:
            return
        for term in terms:
            if not self._wants(term[0]):
                continue
            # Where a term is the same for several elements, their gradients are summed.
            of = tuple([size if stride else 1 for size, stride in zip(shape, (*term[1], 1), strict=True)])
            each = itertools.product(*[range(size if one == 1 else 1) for size, one in zip(shape, of, strict=True)])
            offsets = [sum(map(operator.mul, at, (*d_to[1:], 1))) * (2 if is_bf16 else 4) for at in each]
            shares = [(d_to[0] + offset, *d_to[1:]) for offset in offsets]
            view = _rows(term, of, is_bf16)
            if len(shares) == 1 and scale == 1.0:
                self._pass_on(shares[0], view)
                continue
            later: Calls = []
            self.calls.append(_sum(self._to_write(view, later), shares, view, scale))
            self.calls += later

    def _through_norm(self, x: _View, parameters: Any) -> tuple[tuple[int, ...], int, Calls]:
        """Where the gradient of x goes that a norm stands in front of, where its sums do, and what has to follow."""
        later: Calls = []
        if self._wants(x.pointer):
            d_x = self._to_write(x, later)
        elif any(self._wants(p[0]) for p in parameters):
            d_x = self._new_like(x)
        else:
            return _NOWHERE, 0, later
        return d_x, self._new(8 * x.shape[0] * x.shape[2]), later

    def _reverse_parameters(self, parameters: Any, sums: int, batch: int, channels: int) -> None:
        if not any(self._wants(p[0]) for p in parameters):
            return
        places, strides = [], set()
        shares: dict[Region, list[int]] = {}  # of what has a gradient already: its address, and how much of it is made
        for at, (pointer, stride, is_bf16) in enumerate(parameters):
            place = 0
            if self._wants(pointer):
                of_film = _View(pointer, (stride, 1), (batch, channels), 2 if is_bf16 else 4)
                view = of_film if at > 1 else _View(pointer, (1,), (channels,), of_film.itemsize)
                place = self._gradient(pointer) if self._is_first(view) else self._share(view, shares)
                strides |= {stride} if at > 1 else set()
            places.append(place)
        if any(made != region.size for region, (_, made) in shares.items()):
            raise ValueError("a share of a gradient is of a part of a tensor")
        if len(strides) > 1:
            raise ValueError("scale and shift have different strides")
        film_batch = strides.pop() if strides else channels
        self.calls.append(("parameter_gradients", (parameters, sums, places, batch, channels, film_batch)))

    def _region(self, pointer: int) -> Region:
        region = self._plan.regions[bisect.bisect_right(self._begins, pointer) - 1]
        if not region.begin <= pointer < region.begin + region.size:
            raise ValueError("a call reads or writes memory that is in none of the tensors")
        return region

    def _wants(self, pointer: int) -> bool:
        return pointer != 0 and self._region(pointer) in self._wanted

    def _gradient(self, pointer: int) -> int:
        """The address of the gradient of what lies at an address."""
        region = self._region(pointer)
        begin = self._sums.get(region, _address(region.block) + region.offset)
        return begin + pointer - region.begin

    def _new(self, size: int) -> int:
        """The address of new memory."""
        at = _address(self._plan.between) + self._end
        self._end += -(-size // LINE) * LINE
        self.new[at] = size
        return at

    def _new_like(self, view: _View) -> tuple[int, ...]:
        """New memory for the elements of a view, contiguous."""
        strides = tuple(math.prod(view.shape[at + 1 :]) for at in range(len(view.shape)))
        return view._replace(strides=strides).at(self._new(math.prod(view.shape) * view.itemsize))

    def _begin(self, view: _View) -> None:
        """Note that the elements of a view have a gradient from now on, and had none."""
        if not self._is_first(view):
            raise ValueError("a gradient that is not of tokens is a sum")

    def _is_first(self, view: _View) -> bool:
        """Whether the elements of a view have had no gradient; they have one from now on."""
        region = self._region(view.pointer)
        has = self._has.get(region)
        if has is None:
            has = self._has[region] = torch.zeros(region.size // view.itemsize, dtype=torch.bool)
        part = has.as_strided(view.shape, view.strides, (view.pointer - region.begin) // view.itemsize)
        if part.all():
            if self._plan.first_result <= region.block < self._plan.between and region not in self._sums:
                self._begin_sum(region)
            return False
        if part.any():
            raise ValueError("views whose gradients are summed overlap")
        before = int(has.sum())
        part.fill_(True)
        if int(has.sum()) - before != part.numel():
            raise ValueError("elements of a view share memory")
        return True

    def _begin_sum(self, region: Region) -> None:
        """Have the gradient of a result where it can be added to: what is given is not ours."""
        given = _address(region.block)
        self._sums[region] = self._new(region.size)
        itemsize = self._plan.forms[0][1].itemsize
        tokens = _View(region.begin, (0, 0, 1), (1, 1, region.size // itemsize), itemsize)
        self.calls.append(_sum(tokens.at(self._sums[region]), [(given, 0, 0)], tokens))

    def _of_parameter(self, view: _View) -> int:
        """The address of its gradient, which one call makes; 0 where it is not wanted."""
        if not self._wants(view.pointer):
            return 0
        self._begin(view)
        return self._gradient(view.pointer)

    def _to_read(self, view: _View) -> tuple[int, ...] | None:
        """Where the gradient lies of what a call has written; None where there is none, or none is wanted."""
        region = self._region(view.pointer)
        if region not in self._has or region not in self._wanted:
            return None
        if region in self._lies_at:
            lies_at, of = self._lies_at[region]
            found = _viewed(lies_at, of, view)
            if found is not None:
                return found
        self._copy(region)
        return view.at(self._gradient(view.pointer))

    def _to_write(self, tokens: _View, later: Calls) -> tuple[int, ...]:
        """Where a call shall write a share of a gradient; the calls that add it to other shares join `later`."""
        region, is_first = self._region(tokens.pointer), self._is_first(tokens)
        place = tokens.at(self._gradient(tokens.pointer))
        if is_first:
            return place
        if region.block < len(self._plan.forms):
            return self._repeat_all(region, tokens)
        other = None
        if region in self._lies_at and self._lies_at[region][1] == tokens:
            other = self._lies_at.pop(region)[0]
        else:
            self._copy(region)
        written = self._new_like(tokens) if other is None else place
        later.append(_sum(place, (place, written if other is None else other), tokens))
        return written

    def _pass_on(self, gradient: tuple[int, ...], tokens: _View) -> None:
        """A share of the gradient of `tokens` is another tensor's."""
        region = self._region(tokens.pointer)
        if self._is_first(tokens):
            self._copy(region)  # of other elements
            self._lies_at[region] = gradient, tokens
        elif region.block < len(self._plan.forms):
            self.calls.append(_sum(self._repeat_all(region, tokens), [gradient], tokens))
        else:
            self._copy(region)
            place = tokens.at(self._gradient(tokens.pointer))
            self.calls.append(_sum(place, (place, gradient), tokens))

    def _share(self, view: _View, shares: dict[Region, list[int]]) -> int:
        """Where a further share of the gradient of a part of one of the plan's tensors goes; `shares` are a call's."""
        region = self._region(view.pointer)
        if region.block >= len(self._plan.forms):
            raise ValueError("a gradient of a parameter that was computed is a sum")
        if region not in shares:
            shares[region] = [self._repeat(region), 0]
        shares[region][1] += math.prod(view.shape) * view.itemsize
        return shares[region][0] + view.pointer - region.begin

    def _repeat_all(self, region: Region, tokens: _View) -> tuple[int, ...]:
        """Where a further share of the gradient of all elements of a tensor goes."""
        if math.prod(tokens.shape) * tokens.itemsize != region.size:
            raise ValueError("a share of a gradient is of a part of a tensor")
        return tokens.at(self._repeat(region))

    def _repeat(self, region: Region) -> int:
        """The address of a further share of a tensor's gradient."""
        self.repeats.append(region.block)
        return _address(self._plan.between + len(self.repeats))

    def _finish(self, region: Region) -> None:
        """Have the gradient of a tensor where it belongs, or be the one of a result."""
        (pointer, *strides), tokens = self._lies_at.get(region, ((0,), None))
        for result in range(len(self._plan.result_forms)):
            is_its = pointer == _address(self._plan.first_result + result)
            if is_its and tokens is not None and tokens.strides[:-1] == tuple(strides) and not region.offset:
                del self._lies_at[region]
                self.passed_on[region.block] = result
        self._copy(region)

    def _copy(self, region: Region) -> None:
        """Have the gradient of a region where it belongs."""
        if region in self._lies_at:
            other, tokens = self._lies_at.pop(region)
            place = tokens.at(self._gradient(tokens.pointer))
            self.calls.append(_sum(place, [other], tokens))

    def _zeros(self, view: _View) -> tuple[int, ...]:
        """Zeros in the place of a gradient that is not given, of an attention's output."""
        batch, length, heads, dim = view.shape
        place = self._new_like(view)
        tokens = view._replace(shape=(batch, length, heads * dim))
        self.calls.append(_sum(place[:3], (), tokens))
        return place


def _viewed(lies_at: tuple[int, ...], of: _View, view: _View) -> tuple[int, ...] | None:
    """What lies at a place in the shape of `of`, in the shape of a view of the same elements; None if it is not one."""
    if of == view:
        return lies_at
    if of.pointer != view.pointer or math.prod(of.shape) != math.prod(view.shape):
        return None
    shapes = [torch.empty_strided(of.shape, strides, device="meta") for strides in (of.strides, (*lies_at[1:], 1))]
    try:
        own, other = (t.view(view.shape).stride() for t in shapes)
    except RuntimeError:
        return None
    is_same = all(a == b for a, b, size in zip(own, view.strides, view.shape, strict=True) if size > 1)
    return (lies_at[0], *other[:-1]) if is_same and other[-1] == 1 else None


def _rows(told: tuple[int, tuple[int, ...]], shape: tuple[int, ...], is_bf16: bool) -> _View:
    return _view((told[0], *told[1]), shape, is_bf16)


def _sum(
    to: tuple[int, ...], terms: Iterable[tuple[int, ...]], tokens: _View, scale: float = 1.0
) -> tuple[str, tuple[Any, ...]]:
    """The call that adds terms, of the shape of tokens; zeros without any."""
    more = (5 - len(tokens.shape)) * (0,)
    rows = [(pointer, (*more, *strides)) for pointer, *strides in (to, *terms)]
    sizes = (*(1 for _ in more), *tokens.shape)
    return "sum", (rows[0], rows[1:], sizes, scale, tokens.itemsize == 2, torch.get_num_threads())
