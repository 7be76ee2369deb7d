"""A device backend whose device is the CPU and whose kernels are the reference's: slow, obvious."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from hotgraft.format import DType
from hotgraft.kernels import Pair, Source
from hotgraft.kernels.device import (
    Device,
    DeviceBackend,
    DeviceMerged,
    DeviceSource,
    DeviceTable,
    Move,
)
from hotgraft.kernels.reference import BACKEND as REFERENCE
from hotgraft.kernels.reference import _score

CPU = torch.device("cpu")


def judged(table: DeviceTable) -> Any:
    return REFERENCE.table(table.segments.numpy(), table.positions.numpy(), table.item_size)


def bits(values: Device, size: int) -> np.ndarray:
    return values.numpy().view(f"u{size}")


class Simulated(DeviceBackend):
    """Counts its launches."""

    name = "reference"  # which composes what cannot be merged where it is

    def __init__(self) -> None:
        super().__init__(CPU)
        self.launches: list[str] = []

    def _gather(self, table: DeviceTable, values: Device) -> None:
        self.launches.append("gather")
        REFERENCE.gather(judged(table), bits(values, table.item_size))

    def _scatter(self, moves: Sequence[Move]) -> None:
        self.launches.append(f"scatter {len(moves)}")
        assert len({move.table.item_size for move in moves}) == 1
        cells: list[int] = []
        for table, values in moves:
            cells += judged(table).addresses
            REFERENCE.scatter(judged(table), bits(values, table.item_size))
        assert len(set(cells)) == len(cells), "two moves of one launch share a cell"

    def _compare(self, table: DeviceTable, values: Device, report: Device) -> None:
        self.launches.append("compare")
        count, first = REFERENCE.compare(judged(table), bits(values, table.item_size))
        report[0] += count
        if count:
            report[1] = max(int(report[1]), table.n_entries - first)

    def _differing(self, base: Device, finetuned: Device, item_size: int) -> Device:
        differ = bits(base, item_size) != bits(finetuned, item_size)
        return torch.from_numpy(np.flatnonzero(differ).astype(np.int32))

    def _scores(self, base: Device, finetuned: Device, dtype: DType) -> tuple[Any, Any]:
        pair = Pair(*(t.view(dtype.torch) for t in (base, finetuned)), dtype)
        at = self._differing(base, finetuned, dtype.item_size).numpy()
        return at, np.array([_score(pair, int(i)) for i in at], np.float64)

    def _count_scores(
        self, base: Device, finetuned: Device, dtype: DType, shift: int, prefix: int, bins: Device
    ) -> int:
        at, scores = self._scores(base, finetuned, dtype)
        if np.isnan(scores).any():
            return int(at[np.isnan(scores)][0])
        for key in scores.view(np.uint64).tolist():
            if key >> shift + 16 == prefix:
                bins[key >> shift & 0xFFFF] += 1
        return -1

    def _collect(
        self, base: Device, finetuned: Device, dtype: DType, lowest: int, ties: int
    ) -> tuple[Device, Device]:
        at, scores = self._scores(base, finetuned, dtype)
        keys = scores.view(np.int64)
        equal = np.flatnonzero(keys == lowest)
        wanted = keys > lowest
        wanted[equal[: min(ties, len(equal))]] = True
        return torch.from_numpy(at[wanted]), torch.from_numpy(keys[wanted])

    def _merge(
        self,
        sources: Sequence[DeviceSource],
        ranges: np.ndarray,
        dtype: DType,
        policy: str,
        order: Sequence[int],
    ) -> DeviceMerged:
        self.launches.append("merge")
        given = [
            Source(s.positions.numpy(), *(bits(v, dtype.item_size) for v in s[1:3]), s.weight)
            for s in sources
        ]
        found = REFERENCE.merge(given, ranges, dtype, policy, order)
        positions, new, old = (torch.from_numpy(a.copy()) for a in found[1:4])
        return DeviceMerged(
            found.counts, positions, new.view(torch.uint8), old.view(torch.uint8), *found[4:]
        )
