"""Plans over one another: what memory should hold where both write, and whether they meet."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hotgraft.errors import BaseMismatchError
from hotgraft.format import Bits
from hotgraft.placement.plain import Plan


def expected_bits(plan: Plan, live: Plan | None, label: str) -> Sequence[Bits | None]:
    """For each launch the bits that its cells hold if the base is the plan's.

    That is the plan's old bits (said by None), but the live plan's new bits where that one writes
    too.

    Raises:
        BaseMismatchError: the two plans disagree on a base bit.
    """
    if live is None:
        return [None] * len(plan.launches)
    over = {(row.name, row.block): row for row in live.graft.rows}
    wanted: list[Bits | None] = []
    for launch in plan.launches:
        parts = []
        for row in launch.rows:
            positions, _, old = plan.graft.arrays(row)
            there = over.get((row.name, row.block))
            if there is not None:
                live_positions, live_new, live_old = live.graft.arrays(there)
                _, mine, theirs = np.intersect1d(
                    positions, live_positions, assume_unique=True, return_indices=True
                )
                wrong = np.flatnonzero(old[mine] != live_old[theirs])
                if len(wrong):
                    at = mine[wrong[0]]
                    raise BaseMismatchError(
                        f"{label} does not fit: {row.name!r}, position "
                        f"{row.block + int(positions[at])}: the base holds bits "
                        f"{int(live_old[theirs[wrong[0]]]):#x}, wanted {int(old[at]):#x}"
                    )
                old = old.copy()
                old[mine] = live_new[theirs]
            parts.append(old)
        bits = np.concatenate(parts)
        wanted.append(bits if launch.origin is None else bits[launch.origin])
    return wanted


def share_cells(plan: Plan, other: Plan) -> bool:
    """Whether both write to some cell."""
    there = {(row.name, row.block): row for row in other.graft.rows}
    for row in plan.graft.rows:
        met = there.get((row.name, row.block))
        if met is not None:
            mine, theirs = plan.graft.arrays(row).positions, other.graft.arrays(met).positions
            both = np.concatenate([mine, theirs])
            both.sort(kind="stable")  # two ascending runs: one merge
            if (both[1:] == both[:-1]).any():
                return True
    return False
