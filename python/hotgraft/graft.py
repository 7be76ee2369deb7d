"""Graft and Mask: a patch to a model, and the positions of one. Both are immutable."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from hotgraft import files
from hotgraft import format as file_format
from hotgraft.errors import GraftError
from hotgraft.format import DTYPES, Bits, Group, Provenance, Row, dtype_of, frozen

if TYPE_CHECKING:
    from hotgraft.weights import Weights

Indices = npt.NDArray[np.int64]


class Entries(NamedTuple):
    """One tensor's part of a graft. All tensors are copies on the CPU."""

    indices: torch.Tensor
    """int64[n]: sorted unique C-order positions in `shape`."""
    new: torch.Tensor
    """dtype[n]: what the graft writes."""
    old: torch.Tensor
    """dtype[n]: what the base holds there."""
    shape: tuple[int, ...]


class Mask(Mapping[str, Indices]):
    """Positions only: for each tensor name, sorted unique C-order indices into its shape.

    A mapping from names to read-only int64 arrays. `|`, `&` and `-` are the set operations; both
    sides must agree on the shapes of the tensors they share.

    Args:
        positions: for each name its shape and its indices (any order; a repeat is an error).

    Raises:
        GraftError: an index is out of range or given twice, or shapes disagree.

    Example:
        >>> a = Mask({"w": ((2, 3), [0, 4])})
        >>> b = Mask({"w": ((2, 3), [4, 5])})
        >>> (a | b)["w"].tolist(), (a & b).nnz
        ([0, 4, 5], 1)
    """

    def __init__(self, positions: Mapping[str, tuple[Iterable[int], Any]]) -> None:
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._indices: dict[str, Indices] = {}
        for name in sorted(positions):
            shape, given = tuple(positions[name][0]), np.asarray(positions[name][1])
            if given.size and not np.issubdtype(given.dtype, np.integer):
                raise GraftError(f"{name!r}: indices must be integers, not {given.dtype}")
            indices = np.sort(given.astype(np.int64).ravel())
            if not len(indices):
                continue
            if indices[0] < 0 or indices[-1] >= prod(shape):
                wrong = indices[0] if indices[0] < 0 else indices[-1]
                raise GraftError(f"{name!r}: index {wrong} is outside shape {list(shape)}")
            repeat = np.flatnonzero(indices[1:] == indices[:-1])
            if len(repeat):
                raise GraftError(f"{name!r}: index {indices[repeat[0]]} is given twice")
            self._shapes[name], self._indices[name] = shape, frozen(indices)

    def __getitem__(self, name: str) -> Indices:
        return self._indices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        return self._shapes == other._shapes and all(
            np.array_equal(self[name], other[name]) for name in self
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Mask({self.nnz} entries in {len(self)} tensors)"

    @property
    def nnz(self) -> int:
        """How many positions it holds."""
        return sum(len(indices) for indices in self._indices.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor `name`; KeyError if the mask does not touch it."""
        return self._shapes[name]

    def __or__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        return self._combine(other, np.union1d)

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        return self._combine(other, functools.partial(np.intersect1d, assume_unique=True))

    def __sub__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        return self._combine(other, functools.partial(np.setdiff1d, assume_unique=True))

    def _combine(self, other: Mask, operation: Callable[[Indices, Indices], Indices]) -> Mask:
        nothing = np.empty(0, np.int64)
        combined: dict[str, tuple[tuple[int, ...], Indices]] = {}
        for name in {*self, *other}:
            mine, theirs = self._shapes.get(name), other._shapes.get(name)
            if mine is not None and theirs is not None and mine != theirs:
                raise GraftError(
                    f"{name!r} has shape {list(mine)} in one mask and {list(theirs)} in the other"
                )
            shape = mine if mine is not None else self._other_shape(theirs)
            left, right = self._indices.get(name, nothing), other._indices.get(name, nothing)
            combined[name] = (shape, operation(left, right))
        return Mask(combined)

    @staticmethod
    def _other_shape(shape: tuple[int, ...] | None) -> tuple[int, ...]:
        assert shape is not None  # the name comes from one of the two masks
        return shape


class Graft:
    """Positions, the bits to write there, the bits the base holds there, and where they come from.

    Immutable and checked when made. Make one with `hotgraft.diff`, `Graft.from_mask`,
    `Graft.from_entries` or `Graft.load`.

    Example:
        >>> import torch
        >>> base = torch.zeros(2, 3)
        >>> graft = Graft.from_entries({"w": Entries(torch.tensor([1, 5]), torch.ones(2),
        ...                                          torch.zeros(2), (2, 3))})
        >>> graft.nnz, graft.names, graft.invert()["w"].new.tolist()
        (2, ('w',), [0.0, 0.0])
    """

    rows: tuple[Row, ...]
    """One a tensor (and block of 2^31 elements), sorted by name."""
    provenance: Provenance
    _known_id: str | None
    groups: Mapping[str, Group]
    """The flat arrays by dtype name, read-only."""

    def __init__(
        self,
        rows: Iterable[Row],
        groups: Mapping[str, Group],
        provenance: Provenance,
        *,
        known_id: str | None = None,
        checked: bool = False,
        owned: bool = False,
    ) -> None:
        """A graft of rows and arrays; the arrays are copied.

        Args:
            known_id: the id, where it was computed already.
            checked: that the parts fit is known, and the arrays are `owned`.
            owned: nobody else will write the arrays, so they need no copy.

        Raises:
            GraftError: the parts do not fit.
        """
        rows = tuple(rows)
        if not checked:
            file_format.validate(rows, groups)
        if not (checked or owned):
            groups = {name: Group(*map(np.copy, group)) for name, group in groups.items()}
        covered = sum(prod(shape) for shape in {r.name: r.shape for r in rows}.values())
        eligible = provenance.eligible or covered
        file_format.check_eligible(eligible, rows)
        changes = {"eligible": eligible, "creator": provenance.creator or file_format.creator()}
        object.__setattr__(self, "rows", rows)
        groups = {name: Group(*map(frozen, group)) for name, group in groups.items()}
        object.__setattr__(self, "groups", MappingProxyType(groups))
        object.__setattr__(self, "provenance", Provenance(**{**vars(provenance), **changes}))
        object.__setattr__(self, "_known_id", known_id)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Graft is immutable: cannot set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a Graft is immutable: cannot delete {name!r}")

    # ---- making ------------------------------------------------------------------------------

    @classmethod
    def from_entries(
        cls, entries: Mapping[str, Entries], provenance: Provenance | None = None
    ) -> Graft:
        """A graft from tensors.

        Args:
            entries: for each name its indices (int64[n], ascending), new and old values (of one
                dtype, n each) and shape. The values are copied.

        Raises:
            GraftError: counts, order, range or dtypes are wrong, or there is no entry at all.
        """
        parts: dict[str, list[tuple[Any, ...]]] = {}
        rows = []
        for name in sorted(entries):
            indices, new, old, shape = entries[name]
            if not len(indices) == len(new) == len(old) or new.dtype != old.dtype:
                raise GraftError(
                    f"{name!r}: {len(indices)} indices, {len(new)} new ({new.dtype}) and "
                    f"{len(old)} old ({old.dtype}) values; wanted as many of each, of one dtype"
                )
            dtype = dtype_of(new.dtype, name)
            given = np.asarray(indices)
            if given.ndim != 1 or (given.size and not np.issubdtype(given.dtype, np.integer)):
                raise GraftError(
                    f"{name!r}: indices must be flat integers, not {given.dtype} of shape "
                    f"{list(given.shape)}"
                )
            where = given.astype(np.int64)
            if len(where) and (where.min() < 0 or where.max() >= prod(shape)):
                raise GraftError(f"{name!r}: an index is outside shape {list(shape)}")
            into = parts.setdefault(dtype.name, [])
            filled = sum(len(p[0]) for p in into)
            for block, size in file_format.blocks(prod(shape)):
                inside = (where >= block) & (where < block + size)
                count = int(np.count_nonzero(inside))
                if not count:
                    continue
                rows.append(Row(name, tuple(shape), dtype.name, block, filled, count))
                filled += count
                chosen = torch.from_numpy(inside)
                into.append(
                    ((where[inside] - block).astype(np.int32), bits(new[chosen]), bits(old[chosen]))
                )
        groups = {
            name: Group(*(np.concatenate(column) for column in zip(*arrays, strict=True)))
            for name, arrays in parts.items()
            if arrays
        }
        return cls(rows, groups, provenance or Provenance(), owned=True)

    @classmethod
    def from_mask(cls, base: Weights, finetuned: Weights, mask: Mask) -> Graft:
        """The graft that carries `finetuned`'s values at the mask's positions.

        Args:
            base, finetuned: modules, state dicts, files or checkpoint folders, as in `diff`.
            mask: the positions; where both models agree the entry is kept (new == old covers).

        Raises:
            GraftError: the mask is empty.
            BaseMismatchError, CoverageError: the models and the mask disagree on names or shapes.
        """
        from hotgraft.difference import from_mask

        return from_mask(base, finetuned, mask)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, verify_id: bool = True, pin: bool = False
    ) -> Graft:
        """Read a graft file into private memory and check all of it, its id included.

        Args:
            path: the file.
            verify_id: False takes the id that the file states on trust, which saves hashing it: for
                files of one's own, where a millisecond matters.
            pin: read it into memory that a GPU copies from directly, as far as the system has any
                left; without a GPU that is memory like any other.

        Raises:
            FormatError: not a valid graft file; the message says what is wrong.
            OSError: it cannot be read.
        """
        rows, groups, provenance, graft_id = files.read(path, verify_id=verify_id, pin=pin)
        return cls(rows, groups, provenance, known_id=graft_id, checked=True)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the graft to `path`, atomically. `docs/format.md` specifies the file.

        Raises:
            OSError: the folder is missing or cannot be written.
        """
        files.write(path, self.rows, self.groups, self.provenance, self.id)

    # ---- looking -----------------------------------------------------------------------------

    def __repr__(self) -> str:
        return (
            f"Graft({self.nnz} entries in {len(self.names)} tensors, density {self.density:.2g} of "
            f"{self.provenance.scope}, id {self.id[:12]})"
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Graft) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __getitem__(self, name: str) -> Entries:
        """The entries of one tensor; KeyError naming the tensors there are."""
        rows = [row for row in self.rows if row.name == name]
        if not rows:
            raise KeyError(f"the graft does not touch {name!r}; it touches {', '.join(self.names)}")
        dtype = DTYPES[rows[0].dtype].torch
        parts = [(row.block, *self.arrays(row)) for row in rows]
        return Entries(
            torch.from_numpy(np.concatenate([p.astype(np.int64) + b for b, p, _, _ in parts])),
            torch.from_numpy(np.concatenate([new for _, _, new, _ in parts])).view(dtype),
            torch.from_numpy(np.concatenate([old for _, _, _, old in parts])).view(dtype),
            rows[0].shape,
        )

    def arrays(self, row: Row) -> Group:
        """A row's positions, new and old bits, as views that cannot be made writable."""
        group = self.groups[row.dtype]
        return Group(*(array[row.first : row.first + row.count] for array in group))

    @functools.cached_property
    def id(self) -> str:
        """SHA-256 (hex) of the contents, without the metadata."""
        return self._known_id or file_format.content_id(self.rows, self.groups)

    @property
    def nnz(self) -> int:
        """How many entries it holds."""
        return sum(row.count for row in self.rows)

    @property
    def density(self) -> float:
        """Entries over eligible elements; `provenance` states the scope and the denominator."""
        return self.nnz / self.provenance.eligible

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors it touches, sorted."""
        return tuple(dict.fromkeys(row.name for row in self.rows))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor it touches."""
        return {row.name: row.shape for row in self.rows}

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return sum(array.nbytes for group in self.groups.values() for array in group)

    @property
    def mask(self) -> Mask:
        """Its positions."""
        return Mask({name: (self[name].shape, self[name].indices.numpy()) for name in self.names})

    # ---- deriving ----------------------------------------------------------------------------

    def invert(self) -> Graft:
        """The graft that goes the other way: on the grafted model it restores the base.

        Example:
            >>> g = Graft.from_entries({"w": Entries(torch.tensor([0]), torch.ones(1),
            ...                                      torch.zeros(1), (4,))})
            >>> g.invert().invert() == g
            True
        """
        groups = {name: Group(g.positions, g.old, g.new) for name, g in self.groups.items()}
        kept = {**vars(self.provenance), "base_id": None, "method": "inverted", "creator": ""}
        return Graft(self.rows, groups, Provenance(**kept), checked=True)

    def rebase(self, other_base: Weights, mode: str = "difference") -> Graft:
        """This graft, made anew for another base of the same names and shapes.

        Args:
            other_base: a module, state dict, file or checkpoint folder.
            mode: `difference` adds new - old (in double, rounded once) to the other base's values;
                `replacement` writes the same new bits.

        Raises:
            BaseMismatchError, CoverageError: names, shapes or dtypes differ.
            NonFiniteError: a sum overflows.
        """
        from hotgraft.composition import rebase

        return rebase(self, other_base, mode)


_INTEGERS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}


def bit_view(tensor: torch.Tensor) -> Bits:
    """A contiguous CPU tensor's bits, flat, as numpy unsigned integers that share its memory."""
    flat = tensor.detach().view(-1)
    viewed: Bits = flat.view(_INTEGERS[flat.element_size()]).numpy()
    return viewed


def bits(tensor: torch.Tensor) -> Bits:
    """A copy of a tensor's bits, flat, as numpy unsigned integers."""
    return bit_view(tensor.detach().cpu().contiguous()).copy()
