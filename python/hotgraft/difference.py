"""diff: the graft that leads from one model to another, exact or its largest changes."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from decimal import Decimal
from math import floor, prod
from typing import SupportsFloat

import numpy as np
import torch

from hotgraft import kernels
from hotgraft.errors import BaseMismatchError, CoverageError, GraftError, NonFiniteError
from hotgraft.format import (
    BLOCK,
    Bits,
    DType,
    Group,
    Positions,
    Provenance,
    Row,
    blocks,
    empty_group,
)
from hotgraft.graft import Graft, Mask
from hotgraft.kernels import Backend, Pair
from hotgraft.kernels.device import DeviceBackend
from hotgraft.scope import Scope, in_scope
from hotgraft.weights import Checkpoint, Tie, Weights, open_weights, sample

Progress = Callable[[int, int], None]
"""Called with the elements compared so far and in all."""


_COPIED = 1 << 20
"""Entries up to which arrays are moved when they grow, not grown in place."""
_UNTOUCHED = 1 << 26
"""Entries that room is made for in advance at most: virtual memory, given back in the end."""


class _Pairs:
    """The blocks of two checkpoints' tensors, opened anew at each pass, sorted by name."""

    def __init__(self, base: Checkpoint, finetuned: Checkpoint, names: list[str]) -> None:
        self._base, self._finetuned, self._names = base, finetuned, names
        self.places = [
            (name, block) for name in names for block, _ in blocks(prod(base.known[name].shape))
        ]
        self.watch: Callable[[int], None] | None = None
        """Called in the next pass, with the elements behind it."""

    def __iter__(self) -> Iterator[Pair]:
        watch, self.watch, done = self.watch, None, 0
        for name in self._names:
            left, right = self._base.tensor(name), self._finetuned.tensor(name)
            for block, size in blocks(len(left)):
                end = block + size
                yield Pair(left[block:end], right[block:end], self._base.known[name].dtype)
                done += size
                if watch is not None:
                    watch(done)


def diff(
    base: Weights,
    finetuned: Weights,
    *,
    density: float | None = None,
    count: int | None = None,
    scope: Scope = "all",
    base_id: str | None = None,
    backend: str | None = None,
    progress: Progress | None = None,
) -> Graft:
    """The graft that turns `base` into `finetuned`, or carries the largest part of the change.

    Args:
        base, finetuned: modules, state dicts, `.safetensors` files or checkpoint folders. Files are
            mapped and streamed tensor by tensor.
        density: keep floor(density x eligible) entries of the largest |difference|.
        count: keep that many instead. With neither, the exact difference: every entry whose bits
            differ.
        scope: which tensors are eligible: `all`, `encoder`, `linear` or a function of name and
            shape; its size is the density's denominator and is stored.
        base_id: the base's `fingerprint`, to be stored.
        backend: a backend's name, to run it and no other.
        progress: called with elements done and in all, the first and the last read counted.

    Ties go to the earlier name, then the lower position. When fewer entries differ than were asked
    for, all of them are kept. The |difference| is taken in float for 8- and 16-bit types, in double
    for the others.

    Raises:
        GraftError: the density is not in (0, 1], rounds to no entry, or nothing differs.
        BaseMismatchError: shapes or dtypes differ.
        CoverageError: a tensor in scope is missing on one side.
        NonFiniteError: a difference is NaN, so there is no largest one.

    Example:
        >>> import torch
        >>> a, b = {"w": torch.tensor([1.0, 2.0, 3.0])}, {"w": torch.tensor([1.0, 2.5, 9.0])}
        >>> diff(a, b)["w"].indices.tolist(), diff(a, b, count=1)["w"].indices.tolist()
        ([1, 2], [2])
    """
    with open_weights(base) as left, open_weights(finetuned) as right:
        label, names = in_scope(left.specs, scope)
        check_same(left, right, names, label)
        eligible = sum(prod(left.specs[name].shape) for name in names)
        k = entries_wanted(density, count, eligible, label)
        runner = kernels.resolve(backend)
        pairs = _Pairs(left, right, names)
        # A choice takes more reads than one: the first and the last are reported.
        total = eligible if k is None else 2 * eligible
        if k is not None and progress is not None:
            pairs.watch = lambda done: progress(done, total)
        try:
            chosen = None if k is None else iter(runner.select(pairs, k))
        except kernels.NanDifferenceError as error:
            index, position = error.args
            name, block = pairs.places[index]
            raise NonFiniteError(
                f"{name!r}, position {block + position}: the difference is NaN, so entries cannot "
                "be ranked; take the exact difference (no density) or mend the checkpoint"
            ) from error
        parts = _Parts(runner, eligible)
        done = total - eligible
        for (name, block), pair in zip(pairs.places, pairs, strict=True):
            place = name, left.specs[name].shape, block
            if chosen is None:
                runner.difference(pair, functools.partial(parts.room, *place, pair))
            else:
                parts.add(*place, pair, next(chosen))
            done += len(pair.base)
            if progress is not None:
                progress(done, total)
    method = "exact" if k is None else "magnitude"
    if not parts.rows:
        raise GraftError(
            f"the two models are bit for bit equal in scope {label!r}: nothing to graft"
        )
    return parts.graft(Provenance(base_id, label, eligible, method))


def from_mask(base: Weights, finetuned: Weights, mask: Mask) -> Graft:
    """See `Graft.from_mask`."""
    if not mask.nnz:
        raise GraftError("the mask is empty: a graft needs at least one entry")
    with open_weights(base) as left, open_weights(finetuned) as right:
        names = list(mask)
        missing = set(names) - set(left.known)
        if missing:
            raise CoverageError(f"the base lacks {sample(missing)}, which the mask names")
        check_same(left, right, names, "mask")
        for name in names:
            if mask.shape(name) != left.known[name].shape:
                raise BaseMismatchError(
                    f"{name!r} has shape {list(left.known[name].shape)} in the base and "
                    f"{list(mask.shape(name))} in the mask"
                )
        parts = _Parts(kernels.resolve(), sum(prod(left.known[name].shape) for name in names))
        pairs = _Pairs(left, right, names)
        for (name, block), pair in zip(pairs.places, pairs, strict=True):
            indices = mask[name]
            inside = indices[(indices >= block) & (indices < block + BLOCK)] - block
            parts.add(name, left.known[name].shape, block, pair, inside.astype(np.int32))
        eligible = sum(prod(left.known[name].shape) for name in {*left.specs, *names})
        return parts.graft(Provenance(scope="all", eligible=eligible, method="given mask"))


class _Parts:
    """Collects a graft tensor by tensor."""

    def __init__(self, backend: Backend, elements: int) -> None:
        # Both models are read into the CPU's memory, wherever they are compared.
        self._backend = kernels.resolve("cpu") if isinstance(backend, DeviceBackend) else backend
        self._elements = elements
        self._seen = 0
        self.rows: list[Row] = []
        self._groups: dict[str, Group] = {}
        self._filled: dict[str, int] = {}

    def room(self, name: str, shape: tuple[int, ...], block: int, pair: Pair, count: int) -> Group:
        """Arrays for a pair's entries, part of the graft's; to be filled before the next call."""
        dtype = pair.dtype
        self._seen += len(pair.base)
        if not count:
            return empty_group(dtype, 0)
        group = self._groups.setdefault(dtype.name, empty_group(dtype, 0))
        first = self._filled.get(dtype.name, 0)
        last = self._filled[dtype.name] = first + count
        self.rows.append(Row(name, shape, dtype.name, block, first, count))
        if last > len(group.positions):
            group = self._groups[dtype.name] = self._grown(group, dtype, first, last)
        return Group(*(array[first:last] for array in group))

    def _grown(self, group: Group, dtype: DType, filled: int, needed: int) -> Group:
        """Room for more. New memory is not touched, where it can be had: that takes longest."""
        if filled <= _COPIED:
            expected = int(1.05 * needed * self._elements / self._seen)
            larger = empty_group(dtype, max(needed, min(expected, _UNTOUCHED)))
            for array, before in zip(larger, group, strict=True):
                array[:filled] = before[:filled]
            return larger
        for array in group:
            # In place (the system remaps large arrays), so that nothing is held twice.
            array.resize(needed + needed // 8, refcheck=False)
        return group

    def add(
        self, name: str, shape: tuple[int, ...], block: int, pair: Pair, positions: Positions
    ) -> None:
        """The entries at these positions of a pair."""
        part = self.room(name, shape, block, pair, len(positions))
        if len(positions):
            part.positions[:] = positions
            self._gather(pair.finetuned, positions, pair.dtype, part.new)
            self._gather(pair.base, positions, pair.dtype, part.old)

    def _gather(
        self, tensor: torch.Tensor, positions: Positions, dtype: DType, values: Bits
    ) -> None:
        segment = np.array([[tensor.data_ptr(), 0, len(positions)]], np.int64)
        self._backend.gather(self._backend.table(segment, positions, dtype.item_size), values)

    def graft(self, provenance: Provenance) -> Graft:
        for dtype, group in self._groups.items():
            for array in group:
                array.resize(self._filled[dtype], refcheck=False)
        return Graft(self.rows, self._groups, provenance, owned=True)


def check_same(left: Checkpoint, right: Checkpoint, names: list[str], label: str) -> None:
    missing = set(names) - set(right.known)
    if missing:
        raise CoverageError(
            f"the fine-tuned model lacks {sample(missing)}, which the base has in scope "
            f"{label!r}; name a scope without them, or rename them"
        )
    if label == "all":
        extra = set(right.specs) - set(left.known)
        if extra:
            raise CoverageError(
                f"the fine-tuned model has {sample(extra)}, which the base lacks; "
                "scope='encoder' or a function of name and shape leaves them out"
            )
    ties = [
        tie
        for tie in left.ties.values()
        if tie.first.name in names and tie.later.name in right.known
    ]
    for name in [*names, *(tie.later.name for tie in ties)]:
        if left.known[name] != right.known[name]:
            (shape, dtype), (other_shape, other_dtype) = left.known[name], right.known[name]
            raise BaseMismatchError(
                f"{name!r} is {dtype.name} {list(shape)} in the base and {other_dtype.name} "
                f"{list(other_shape)} in the fine-tuned model; convert one of them first"
            )
    for first, later in ties:
        if not right.holds(Tie(first, later)):
            raise BaseMismatchError(
                f"{first.name!r} and {later.name!r} are tied in the base, but different in the "
                "fine-tuned model: one set of weights cannot become both; untie the base first"
            )


def entries_wanted(
    density: float | None, count: int | None, eligible: int, label: str
) -> int | None:
    if density is None and count is None:
        return None
    if density is not None and count is not None:
        raise GraftError("give density or count, not both")
    if count is not None:
        count = operator.index(count)
        if not 0 < count <= eligible:
            raise GraftError(f"count {count} is not in [1, {eligible}], the eligible elements")
        return count
    if not isinstance(density, SupportsFloat):
        raise GraftError(f"density {density!r} is not a number")
    if not 0 < float(density) <= 1:
        raise GraftError(f"density {density} is not in (0, 1]")
    # As it was written: 0.29 x 100 is 29, though the nearest doubles' product is below.
    k = floor(Decimal(repr(float(density))) * eligible)
    if k == 0:
        raise GraftError(
            f"density {density} of the {eligible} eligible elements (scope {label!r}) rounds to 0 "
            f"entries; the smallest that keeps one is {1 / eligible:.3g}"
        )
    return k
