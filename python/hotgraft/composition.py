"""compose, overlap and rebase: grafts with one another and with another base."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from hotgraft import kernels
from hotgraft.errors import (
    BaseMismatchError,
    CoverageError,
    GraftError,
    NonFiniteError,
    OverlapError,
)
from hotgraft.format import DTYPES, Group, Provenance, Row, empty_group
from hotgraft.graft import Graft, Mask, bit_view
from hotgraft.kernels import POLICIES, Backend, Merged, Source
from hotgraft.kernels.device import DeviceMerged
from hotgraft.weights import Weights, open_weights, sample


def compose(
    grafts: Sequence[Graft],
    policy: str = "refuse",
    weights: Sequence[float] | None = None,
    *,
    labels: Sequence[str] | None = None,
    ids: Sequence[str] | None = None,
    backend: str | None = None,
) -> Graft:
    """One graft that does what several do together; `docs/design.md` defines the policies.

    Args:
        grafts: at least one; all made against the same base bits where they meet.
        policy: `refuse` (an error where they disagree), `priority` (the last one named wins),
            `sum`, `mean`, or `sign` (TIES: the mean of the differences that agree with the sign of
            their sum).
        weights: a finite number a graft, 1.0 by default. At weight 1 an uncontested entry is copied
            bit for bit.
        labels: what to call the grafts in messages.
        ids: the ids that order sums, where they are not the grafts' own.
        backend: a backend's name, to run it and no other.

    Raises:
        OverlapError: under `refuse`, with the number of disagreements for each pair.
        BaseMismatchError: the grafts hold different old bits, shapes or dtypes.
        NonFiniteError: a value overflows.
        GraftError: unknown policy, bad weights, or arithmetic on a type that has none.

    Example:
        >>> from hotgraft.graft import Entries
        >>> def one(value):
        ...     return Graft.from_entries({"w": Entries(torch.tensor([1]), torch.tensor([value]),
        ...                                             torch.tensor([1.0]), (4,))})
        >>> compose([one(3.0), one(4.0)], policy="sum")["w"].new.tolist()
        [6.0]
    """
    meeting = Meeting.arrange(grafts, policy, weights, labels, ids)
    return meeting.merged(policy, kernels.resolve(backend))


@dataclasses.dataclass(frozen=True)
class Meeting:
    """Grafts that are about to be merged, in the order of ids: sums do not depend on another."""

    grafts: Sequence[Graft]
    labels: Sequence[str]
    weights: Sequence[float]
    order: Sequence[int]
    """Where each was named: the highest wins under `priority`."""

    @classmethod
    def arrange(
        cls,
        grafts: Sequence[Graft],
        policy: str,
        weights: Sequence[float] | None,
        labels: Sequence[str] | None,
        ids: Sequence[str] | None,
    ) -> Meeting:
        """Check what can be checked before entries meet. Arguments and errors as in `compose`."""
        given = checked_weights(grafts, policy, weights)
        called = list(labels) if labels is not None else [f"graft {i}" for i in range(len(grafts))]
        keys = [graft.id for graft in grafts] if ids is None else list(ids)
        order = sorted(range(len(grafts)), key=lambda i: (keys[i], i))
        meeting = cls(
            [grafts[i] for i in order], [called[i] for i in order], [given[i] for i in order], order
        )
        _check_agreement(meeting.grafts, meeting.labels, policy, meeting.weights)
        return meeting

    @property
    def dtypes(self) -> list[str]:
        """The dtypes that any of them has."""
        return sorted({row.dtype for graft in self.grafts for row in graft.rows})

    def ranges(self, dtype: str) -> tuple[list[tuple[str, int]], npt.NDArray[np.int64]]:
        """The (name, block) of the union's rows, and where each lies in each graft."""
        found = [
            {(r.name, r.block): (r.first, r.count) for r in graft.rows if r.dtype == dtype}
            for graft in self.grafts
        ]
        return meet(found)

    def rows(
        self, dtype: str, places: Sequence[tuple[str, int]], counts: npt.NDArray[np.int64]
    ) -> list[Row]:
        """The union's rows."""
        shapes = {row.name: row.shape for graft in self.grafts for row in graft.rows}
        firsts = np.cumsum(counts) - counts
        return [
            Row(name, shapes[name], dtype, block, first, count)
            for (name, block), first, count in zip(
                places, firsts.tolist(), counts.tolist(), strict=True
            )
        ]

    def provenance(self, entries: int) -> Provenance:
        """Where the union comes from."""
        return _provenance(self.grafts, entries)

    def merged(self, policy: str, backend: Backend) -> Graft:
        """The union, resolved. Raises as `compose` does."""
        rows: list[Row] = []
        groups = {}
        found = []
        for dtype in self.dtypes:
            places, ranges = self.ranges(dtype)
            empty = empty_group(DTYPES[dtype], 0)
            sources = [
                Source(*graft.groups.get(dtype, empty), weight)
                for graft, weight in zip(self.grafts, self.weights, strict=True)
            ]
            one = backend.merge(sources, ranges, DTYPES[dtype], policy, self.order)
            found.append((one, places))
            rows += self.rows(dtype, places, one.counts)
            groups[dtype] = Group(one.positions, one.new, one.old)
        check_merged(found, self.labels)
        rows.sort(key=lambda row: (row.name, row.block))
        entries = sum(row.count for row in rows)
        return Graft(rows, groups, self.provenance(entries), owned=True)


def meet(
    found: Sequence[Mapping[tuple[str, int], tuple[int, int]]],
) -> tuple[list[tuple[str, int]], npt.NDArray[np.int64]]:
    """Every place that somebody has, and int64[places][k][2]: first and count in each.

    Example:
        >>> meet([{("a", 0): (0, 3)}, {("b", 0): (5, 2)}])[1].tolist()
        [[[0, 3], [0, 0]], [[0, 0], [5, 2]]]
    """
    places = sorted(set(itertools.chain(*found)))
    ranges = np.zeros((len(places), len(found), 2), np.int64)
    for i, place in enumerate(places):
        for j, rows in enumerate(found):
            if place in rows:
                ranges[i, j] = rows[place]
    return places, ranges


def checked_weights(
    grafts: Sequence[Graft], policy: str, weights: Sequence[float] | None
) -> list[float]:
    """What `compose` was asked for, checked: the weights, one a graft.

    Raises:
        GraftError: no grafts, an unknown policy, or weights that are not as many finite numbers.

    Example:
        >>> checked_weights([], "sum", [1.0])
        Traceback (most recent call last):
        hotgraft.errors.GraftError: nothing to compose: give at least one graft
    """
    if not grafts:
        raise GraftError("nothing to compose: give at least one graft")
    for graft in grafts:
        if not isinstance(graft, Graft):
            raise GraftError(f"{graft!r} is not a Graft; Graft.load reads one from a file")
    if policy not in POLICIES:
        raise GraftError(f"unknown policy {policy!r}; known are {', '.join(POLICIES)}")
    if weights is None:
        return [1.0] * len(grafts)
    try:
        given = [float(weight) for weight in weights]
    except (TypeError, ValueError):
        raise GraftError(f"weights {weights!r}: give a list with a number a graft") from None
    if len(given) != len(grafts):
        raise GraftError(f"{len(given)} weights for {len(grafts)} grafts")
    for weight in given:
        if not math.isfinite(weight):
            raise GraftError(f"weight {weight} is not finite")
    return given


def _check_agreement(
    grafts: Sequence[Graft], labels: Sequence[str], policy: str, weights: Sequence[float]
) -> None:
    seen: dict[str, tuple[Row, str]] = {}
    for graft, label, weight in zip(grafts, labels, weights, strict=True):
        for row in graft.rows:
            first, other = seen.setdefault(row.name, (row, label))
            if (row.shape, row.dtype) != (first.shape, first.dtype):
                raise BaseMismatchError(
                    f"{row.name!r} is {first.dtype} {list(first.shape)} in {other} and {row.dtype} "
                    f"{list(row.shape)} in {label}: they were made against different bases"
                )
            copies = policy in {"refuse", "priority"} and weight == 1
            if (
                not copies
                and not DTYPES[row.dtype].has_arithmetic
                and (len(grafts), weight) != (1, 1)
            ):
                raise GraftError(
                    f"{row.name!r} is {row.dtype}, which knows no arithmetic: policy {policy!r} at "
                    f"weight {weight} cannot be had; refuse and priority at weight 1 can"
                )


def check_merged(
    merged: Sequence[tuple[Merged | DeviceMerged, list[tuple[str, int]]]], labels: Sequence[str]
) -> None:
    """Raise what stood in the way, counted over all dtypes. Each comes with its rows' places."""

    def earliest(part: str) -> str:
        spots = []
        for one, places in merged:
            if (spot := getattr(one, part)) is not None:
                name, block = places[spot[0]]
                spots.append((name, block + spot[1]))
        return "{!r}, position {}".format(*min(spots))

    if mismatches := sum(one.base_mismatches for one, _ in merged):
        raise BaseMismatchError(
            f"the grafts hold different old bits on {mismatches} shared entries, first "
            f"{earliest('first_base_mismatch')}: they were made against different bases; rebase "
            "one of them"
        )
    if overflows := sum(one.overflows for one, _ in merged):
        raise NonFiniteError(
            f"{overflows} composed values are not finite, first {earliest('first_overflow')}; use "
            "smaller weights"
        )
    conflicts = np.sum([one.conflicts for one, _ in merged], axis=0)
    pairs = ", ".join(
        f"{labels[i]} and {labels[j]} on {conflicts[i, j]}"
        for i, j in zip(*np.nonzero(conflicts), strict=True)
    )
    if pairs:
        raise OverlapError(
            f"grafts disagree on shared entries ({pairs}) and the policy is 'refuse'; choose "
            "priority, sum, mean or sign"
        )


def _provenance(grafts: Sequence[Graft], entries: int) -> Provenance:
    scopes = {(g.provenance.scope, g.provenance.eligible) for g in grafts}
    bases = {g.provenance.base_id for g in grafts}
    scope, eligible = scopes.pop() if len(scopes) == 1 else ("covered", 0)
    if scope == "covered" or eligible < entries:  # what is covered is counted anew
        scope, eligible = "covered", 0
    return Provenance(bases.pop() if len(bases) == 1 else None, scope, eligible, "composed")


@dataclasses.dataclass(frozen=True)
class Overlap:
    """How much k masks share. All arrays are [k, k] in the order given."""

    counts: npt.NDArray[np.int64]
    """Entries in both; the diagonal is each mask's size."""
    jaccard: npt.NDArray[np.float64]
    """Entries in both over entries in either."""
    share: npt.NDArray[np.float64]
    """share[i, j]: the part of mask j that lies in mask i."""
    eligible: int | None = None
    """N: the positions that each mask was chosen from, where that is known."""
    chance: npt.NDArray[np.float64] | None = None
    """Entries in both that two masks of these sizes have on average if each is drawn at random,
    s_i s_j / N; None where N is not known. The diagonal, too, is that of two independent masks."""
    similarity: npt.NDArray[np.float64] | None = None
    """The correlation (phi) of being in mask i and being in mask j over the N positions:
    (N c - s_i s_j) / sqrt(s_i (N - s_i) s_j (N - s_j)) with c entries in both. 0 at chance, 1 for
    equal masks and for no others, below 0 where masks avoid each other. NaN where a mask has none
    of the positions, or all of them; None where N is not known."""


def overlap(masks: Iterable[Graft | Mask], *, eligible: int | None = None) -> Overlap:
    """How much grafts (or masks) share, pair by pair, and how much of it chance would do.

    Args:
        masks: any number of them.
        eligible: the positions that each was chosen from. Grafts that all state the same scope (and
            not `covered`, which is another one for each) and the same number need no telling.

    Raises:
        GraftError: one of them is neither a graft nor a mask, a tensor has different shapes in two
            of them, or all of them together have more entries than are eligible.

    Example:
        >>> a, b = Mask({"w": ((9,), [0, 1])}), Mask({"w": ((9,), [1, 2, 3, 4])})
        >>> overlap([a, b]).counts.tolist(), overlap([a, b]).share[0, 1].item()
        ([[2, 1], [1, 4]], 0.25)
        >>> overlap([a, b], eligible=9).chance[0, 1].item()
        0.8888888888888888
    """
    given = _masks(masks)
    every = [m.mask if isinstance(m, Graft) else m for m in given]
    counts = np.array([[(a & b).nnz for b in every] for a in every], np.int64)
    counts = counts.reshape(len(every), len(every))
    sizes = np.diagonal(counts)
    either = sizes[:, None] + sizes[None, :] - counts
    found = Overlap(
        counts,
        counts / np.maximum(either, 1),
        counts / np.maximum(sizes[None, :], 1),
    )
    n = _eligible(given, every, eligible)
    if n is None:
        return found
    size = sizes.tolist()
    pairs = [
        _by_chance(both, size[i], size[j], n)
        for i, row in enumerate(counts.tolist())
        for j, both in enumerate(row)
    ]
    chance, similarity = np.array(pairs, np.float64).reshape(-1, 2).T
    return dataclasses.replace(
        found,
        eligible=n,
        chance=chance.reshape(counts.shape),
        similarity=similarity.reshape(counts.shape),
    )


def _masks(given: Iterable[Graft | Mask]) -> list[Graft | Mask]:
    """Several, as a list: a mask is itself an iterable, of names.

    Raises:
        GraftError: they are not several, or something else is among them.
    """
    if isinstance(given, Graft | Mask) or not isinstance(given, Iterable):
        raise GraftError(
            f"overlap of a {type(given).__name__}; wanted a list of grafts or masks, [a, b]"
        )
    several = list(given)
    for i, one in enumerate(several):
        if not isinstance(one, Graft | Mask):
            raise GraftError(
                f"item {i} to overlap is a {type(one).__name__}; wanted grafts or masks"
            )
    return several


def _by_chance(both: int, one: int, other: int, eligible: int) -> tuple[float, float]:
    """The shared entries to expect, and phi, in whole numbers: they do not cancel or overflow."""
    spread = one * (eligible - one) * other * (eligible - other)
    excess = eligible * both - one * other
    phi = excess / math.sqrt(spread) if spread else math.nan
    return one * other / max(eligible, 1), max(-1.0, min(phi, 1.0)) if spread else phi


def _eligible(
    given: Sequence[Graft | Mask], masks: Sequence[Mask], eligible: int | None
) -> int | None:
    """The number as told, or as all grafts state it; None where they do not.

    Raises:
        GraftError: it is no number of positions, or fewer than the masks have.
    """
    told = "eligible"
    if eligible is None:
        scopes = {
            (m.provenance.scope, m.provenance.eligible) if isinstance(m, Graft) else None
            for m in given
        }
        stated = scopes.pop() if len(scopes) == 1 else None
        if stated is None or stated[0] == "covered":
            return None
        told, eligible = f"eligible (scope {stated[0]!r}, as the grafts state)", stated[1]
    elif isinstance(eligible, bool) or not isinstance(eligible, int | np.integer) or eligible < 0:
        raise GraftError(f"eligible {eligible!r} is not a number of positions")
    covered = functools.reduce(operator.or_, masks, Mask({})).nnz
    if covered > eligible:
        raise GraftError(
            f"{told} is {eligible}, and the masks cover {covered} positions: give the size of what "
            "all of them were chosen from"
        )
    return int(eligible)


def rebase(graft: Graft, other_base: Weights, mode: str = "difference") -> Graft:
    """See `Graft.rebase`."""
    if mode not in {"difference", "replacement"}:
        raise GraftError(f"unknown mode {mode!r}; known are difference, replacement")
    runner = kernels.resolve()
    parts: dict[str, list[Group]] = {dtype: [] for dtype in graft.groups}
    with open_weights(other_base) as checkpoint:
        missing = set(graft.names) - set(checkpoint.known)
        if missing:
            raise CoverageError(f"the other base lacks {sample(missing)}, which the graft touches")
        for row in graft.rows:
            shape, dtype = checkpoint.known[row.name]
            if (shape, dtype.name) != (row.shape, row.dtype):
                raise BaseMismatchError(
                    f"{row.name!r} is {row.dtype} {list(row.shape)} in the graft and {dtype.name} "
                    f"{list(shape)} in the other base"
                )
            positions, new, old = graft.arrays(row)
            there = bit_view(checkpoint.tensor(row.name))[row.block :][positions]
            moved = np.flatnonzero(there != old)
            if mode == "difference" and len(moved):
                if not dtype.has_arithmetic:
                    raise GraftError(
                        f"{row.name!r} is {row.dtype}, which knows no arithmetic, and the bases "
                        "differ there; use mode='replacement'"
                    )
                changed, there_changed, before = (
                    runner.round(a[moved], dtype, DTYPES["F64"])[0].view(np.float64)
                    for a in (new, there, old)
                )
                with _subnormals_kept(), np.errstate(all="ignore"):
                    exact = there_changed + (changed - before)
                rounded, overflows = runner.round(exact.view(np.uint64), DTYPES["F64"], dtype)
                if overflows or not np.isfinite(exact).all():
                    raise NonFiniteError(f"{row.name!r}: a rebased value is not finite")
                new = new.copy()
                new[moved] = rounded
            parts[row.dtype].append(Group(positions, new, there))
    groups = {
        dtype: Group(*(np.concatenate(column) for column in zip(*arrays, strict=True)))
        for dtype, arrays in parts.items()
    }
    kept = {**vars(graft.provenance), "base_id": None, "method": "rebased", "creator": ""}
    return Graft(graft.rows, groups, Provenance(**kept), owned=True)


@contextlib.contextmanager
def _subnormals_kept() -> Iterator[None]:
    """This thread takes subnormal numbers for what they are, also if torch was told otherwise."""
    flushed = math.ulp(0.0) * 1.0 == 0
    torch.set_flush_denormal(False)
    try:
        yield
    finally:
        torch.set_flush_denormal(flushed)
