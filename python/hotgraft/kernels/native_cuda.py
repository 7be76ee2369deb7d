"""The backend `cuda`: csrc/cuda through the extension `hotgraft._native`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from hotgraft import _native
from hotgraft.errors import BackendError
from hotgraft.format import DType
from hotgraft.kernels import POLICIES
from hotgraft.kernels.device import (
    Device,
    DeviceBackend,
    DeviceMerged,
    DeviceSource,
    DeviceTable,
    Move,
)

_INSUFFICIENT_DRIVER = 35
_NO_PLACE = -1


class NativeCuda(DeviceBackend):
    """The verbs in CUDA: one launch for a whole table. `open_backend` makes one.

    Example:
        >>> NativeCuda(torch.device("cuda", 0)).name
        'cuda'
    """

    name = "cuda"
    _kernels = _native.cuda
    """A test puts an imitation here."""

    # ---- moves -----------------------------------------------------------------------------------

    def _gather(self, table: DeviceTable, values: Device) -> None:
        self._kernels.gather(_table(table), table.item_size, values.data_ptr(), self._stream())

    def _scatter(self, moves: Sequence[Move]) -> None:
        self._kernels.scatter(
            [(_table(move.table), move.values.data_ptr()) for move in moves],
            moves[0].table.item_size,
            self._stream(),
        )

    def _compare(self, table: DeviceTable, values: Device, report: Device) -> None:
        self._kernels.compare(
            _table(table), table.item_size, values.data_ptr(), report.data_ptr(), self._stream()
        )

    # ---- select ----------------------------------------------------------------------------------

    def _differing(self, base: Device, finetuned: Device, item_size: int) -> Device:
        n = base.nbytes // item_size
        scratch, stream = self._scratch(n), self._stream()
        self._kernels.mark_differing(
            base.data_ptr(), finetuned.data_ptr(), n, item_size, scratch.data_ptr(), stream
        )
        positions = self._empty(int(scratch[0]), torch.int32)
        self._kernels.write_positions(scratch.data_ptr(), n, positions.data_ptr(), stream)
        return positions

    def _count_scores(
        self, base: Device, finetuned: Device, dtype: DType, shift: int, prefix: int, bins: Device
    ) -> int:
        lowest_nan = torch.full((1,), _NO_PLACE, dtype=torch.int64, device=self.device)
        self._kernels.count_scores(
            dtype.code,
            base.data_ptr(),
            finetuned.data_ptr(),
            base.nbytes // dtype.item_size,
            shift,
            prefix,
            bins.data_ptr(),
            lowest_nan.data_ptr(),
            self._stream(),
        )
        return int(lowest_nan)

    def _collect(
        self, base: Device, finetuned: Device, dtype: DType, lowest: int, ties: int
    ) -> tuple[Device, Device]:
        n = base.nbytes // dtype.item_size
        items = (dtype.code, base.data_ptr(), finetuned.data_ptr(), n)
        scratch, stream = self._scratch(n), self._stream()
        more = self._scratch(n if 0 < ties < n else 0)
        self._kernels.mark_reaching(
            *items, lowest, ties, scratch.data_ptr(), more.data_ptr(), stream
        )
        total = int(scratch[0])
        positions, keys = self._empty(total, torch.int32), self._empty(total, torch.int64)
        self._kernels.write_scores(
            *items, scratch.data_ptr(), positions.data_ptr(), keys.data_ptr(), stream
        )
        return positions, keys

    # ---- merge -----------------------------------------------------------------------------------

    def _merge(
        self,
        sources: Sequence[DeviceSource],
        ranges: npt.NDArray[np.int64],
        dtype: DType,
        policy: str,
        order: Sequence[int],
    ) -> DeviceMerged:
        rows, k = ranges.shape[:2]
        n = int(ranges[..., 1].sum())
        spans = _spans(ranges)
        inputs = np.array([_input(*pair) for pair in zip(sources, order, strict=True)], np.int64)
        # What is counted, as csrc/core/merge.h: MergeCounts has it, and each row's entries.
        counted = np.zeros(4 + k * k + rows, np.int64)
        counted[[1, 3]] = _NO_PLACE
        spans_there, inputs_there, counted_there = self._upload([spans, inputs, counted])
        scratch, positions = self._scratch(n), self._empty(n, torch.int32)
        new, old = (self._empty(n * dtype.item_size, torch.uint8) for _ in range(2))
        self._kernels.merge(
            spans_there.data_ptr(),
            inputs_there.data_ptr(),
            rows,
            k,
            n,
            dtype.code,
            POLICIES.index(policy),
            scratch.data_ptr(),
            counted_there.data_ptr() + 8 * (4 + k * k),
            counted_there.data_ptr(),
            positions.data_ptr(),
            new.data_ptr(),
            old.data_ptr(),
            self._stream(),
        )
        found = counted_there.cpu().numpy().view(np.int64)
        counts, conflicts = found[4 + k * k :], found[4 : 4 + k * k].reshape(k, k)
        total = int(counts.sum())
        return DeviceMerged(
            counts,
            positions[:total],
            new[: total * dtype.item_size],
            old[: total * dtype.item_size],
            conflicts,
            int(found[0]),
            _place(int(found[1])),
            int(found[2]),
            _place(int(found[3])),
        )

    # ---- memory -----------------------------------------------------------------------

    def _empty(self, n: int, dtype: torch.dtype) -> Device:
        return torch.empty(n, dtype=dtype, device=self.device)

    def _scratch(self, n: int) -> Device:
        """Room for the ranks of n items, as int64."""
        return self._empty(self._kernels.scratch_size(n) // 8, torch.int64)


def _table(table: DeviceTable) -> tuple[int, int, int, int]:
    return (
        table.segments.data_ptr(),
        table.tiles.data_ptr(),
        table.positions.data_ptr(),
        table.n_entries,
    )


def _spans(ranges: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """int64[rows * k + 1][2]: first entry in the source, first item in the list of all entries."""
    firsts, counts = ranges[..., 0], ranges[..., 1]
    spans = np.zeros((counts.size + 1, 2), np.int64)
    spans[:-1, 0] = firsts.ravel()
    spans[1:, 1] = np.cumsum(counts.ravel())
    return spans


def _input(source: DeviceSource, order: int) -> list[int]:
    """A source as csrc/core/merge.h: MergeInput has it."""
    weight = int(np.float64(source.weight).view(np.int64))
    return [
        source.positions.data_ptr(), source.new.data_ptr(), source.old.data_ptr(), weight, order
    ]  # fmt: skip


def _place(place: int) -> tuple[int, int] | None:
    return None if place == _NO_PLACE else (place >> 32, place & 0xFFFFFFFF)


# ---- whether it runs here ------------------------------------------------------------------------


def why_not() -> str | None:
    """Why the CUDA kernels do not run here, or None if they do.

    Example:
        >>> from hotgraft.kernels import native_cuda
        >>> reason = native_cuda.why_not()
    """
    code, name, sentence, driver, runtime, devices = _native.cuda.status()
    if _native.CUDA is None:
        return f"{sentence}; the Triton kernels (backend 'triton') need none"
    if driver == 0:
        return "no NVIDIA driver is installed on this machine"
    if code == _INSUFFICIENT_DRIVER:
        return (
            f"the NVIDIA driver knows CUDA up to {_version(driver)}, and these kernels were built "
            f"with {_version(runtime)}: update the driver, or use the Triton kernels "
            "(backend 'triton'), which run with this one"
        )
    if code:
        return f"{sentence} ({name})"
    return None if devices else "no CUDA device is visible here"


def open_backend(device: torch.device, stream: torch.cuda.Stream | None = None) -> NativeCuda:
    """The backend for one device, its move kernels loaded.

    Raises:
        BackendError: it does not run there, and why.
    """
    reason = why_not()
    if reason is None and not torch.cuda.is_available():
        reason = f"this torch ({torch.__version__}) finds no CUDA device"
    if reason is None and device.type != "cuda":
        reason = f"weights on {str(device)!r} are not on a CUDA device"
    if reason is not None:
        raise BackendError(f"backend 'cuda': {reason}")
    try:
        with torch.cuda.device(device):
            _native.cuda.load_moves()
    except RuntimeError as error:
        name = torch.cuda.get_device_name(device)
        major, minor = torch.cuda.get_device_capability(device)
        raise BackendError(
            f"backend 'cuda': {name} (compute capability {major}.{minor}) does not load kernels "
            f"built for {_native.cuda.ARCHITECTURES}: {error}"
        ) from error
    return NativeCuda(device, stream)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
