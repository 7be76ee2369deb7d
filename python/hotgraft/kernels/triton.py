"""The backend `triton`: the kernels of `hotgraft.triton_kernels` on a GPU.

Needs Triton and a GPU that it knows; nothing is built beforehand. With TRITON_INTERPRET=1 in the
environment before Triton is imported, the same kernels run on the CPU, slowly: that is for tests.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hotgraft.errors import BackendError
from hotgraft.format import DType
from hotgraft.kernels import Loaded, Part
from hotgraft.kernels.device import (
    Device,
    DeviceBackend,
    DeviceMerged,
    DeviceSource,
    DeviceTable,
    Move,
)


class TritonBackend(DeviceBackend):
    """The verbs on one device; made by `open_backend`.

    Example:
        >>> TritonBackend.name
        'triton'
    """

    name = "triton"

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        super().__init__(device, stream)
        self._move, self._select, self._merging = (
            _kernels(verb) for verb in ("move", "select", "merge")
        )
        self._compiled: set[int] = set()

    def prepare(self, parts: Sequence[Part]) -> list[Loaded]:
        """Upload tables and values, and compile the moves of their item sizes."""
        loaded = super().prepare(parts)
        for table, new, _ in loaded:
            if table.item_size not in self._compiled:
                with self._current():
                    self._move.compile_for(table, new)
                self._compiled.add(table.item_size)
        return loaded

    def _gather(self, table: DeviceTable, values: Device) -> None:
        with _quiet():
            self._move.gather(table, values)

    def _scatter(self, moves: Sequence[Move]) -> None:
        with _quiet():
            self._move.scatter(moves)

    def _compare(self, table: DeviceTable, values: Device, report: Device) -> None:
        with _quiet():
            self._move.compare(table, values, report)

    def _differing(self, base: Device, finetuned: Device, item_size: int) -> Device:
        found: Device = self._select.differing(base, finetuned, item_size)
        return found

    def _count_scores(
        self, base: Device, finetuned: Device, dtype: DType, shift: int, prefix: int, bins: Device
    ) -> int:
        with _quiet():
            nan: int = self._select.count_scores(base, finetuned, dtype, shift, prefix, bins)
        return nan

    def _collect(
        self, base: Device, finetuned: Device, dtype: DType, lowest: int, ties: int
    ) -> tuple[Device, Device]:
        with _quiet():
            found: tuple[Device, Device] = self._select.collect(
                base, finetuned, dtype, lowest, ties
            )
        return found

    def _merge(
        self,
        sources: Sequence[DeviceSource],
        ranges: npt.NDArray[np.int64],
        dtype: DType,
        policy: str,
        order: Sequence[int],
    ) -> DeviceMerged:
        with _quiet():
            merged: DeviceMerged = self._merging.merge(
                self._upload, sources, ranges, dtype, policy, order
            )
        return merged


def why_not() -> str | None:
    """Why the backend cannot run here, or None.

    Example:
        >>> why_not() is None or "Triton" in why_not()
        True
    """
    try:
        interpreted = is_interpreted()
    except ImportError as error:
        return f"Triton does not load ({error}): pip install 'hotgraft[triton]'"
    if not interpreted and not torch.cuda.is_available():
        return (
            "Triton finds no GPU here; with TRITON_INTERPRET=1 in the environment before Triton is "
            "imported its kernels run on the CPU, slowly"
        )
    return None


def is_interpreted() -> bool:
    """Whether the kernels run on the CPU. It is settled when they are imported.

    Raises:
        ImportError: Triton is not installed.

    Example:
        >>> open_backend(torch.device("cpu")).name if is_interpreted() else "needs a GPU"
        'triton'
    """
    jit = importlib.import_module("triton").JITFunction
    return not isinstance(_kernels("move").gather_kernel, jit)


def open_backend(device: torch.device, stream: torch.cuda.Stream | None = None) -> TritonBackend:
    """The backend for a device.

    Raises:
        BackendError: Triton is not installed, or does not run on that device.

    Example:
        >>> open_backend(torch.device("meta"))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        hotgraft.errors.BackendError: backend 'triton': ...
    """
    reason = why_not()
    if reason is None and is_interpreted():
        if device.type != "cpu":
            reason = f"TRITON_INTERPRET is set: Triton's kernels run on the CPU, not on {device}"
    elif reason is None and device.type == "cpu":
        reason = "it runs on the CPU only with TRITON_INTERPRET=1 in the environment"
    elif reason is None and device.type != "cuda":
        reason = f"it runs on CUDA devices, not on {device}"
    if reason is not None:
        raise BackendError(f"backend 'triton': {reason}")
    return TritonBackend(device, stream)


def _kernels(verb: str) -> Any:
    return importlib.import_module(f"hotgraft.triton_kernels.{verb}")


def _quiet() -> np.errstate:
    """The interpreter computes with numpy, which would warn of infinities and NaNs."""
    return np.errstate(all="ignore")
