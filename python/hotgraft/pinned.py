"""Pinned memory: host memory that a GPU copies from by itself, while the CPU goes on."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch


def empty(nbytes: int) -> npt.NDArray[np.uint8]:
    """Memory that is pinned, as far as the system gives any: it is a limited good."""
    try:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
    except RuntimeError:  # no GPU, or no more that may be pinned
        return np.empty(nbytes, np.uint8)


def bytes_of(array: npt.NDArray[Any]) -> torch.Tensor | None:
    """The bytes of an array if they lie together in memory that `empty` pinned, otherwise None.

    torch knows this tensor as its own: it gives the memory to nobody else before what was enqueued
    with it is done.
    """
    owner: Any = array if array.flags.c_contiguous else None
    while owner is not None and not isinstance(owner, torch.Tensor):
        owner = owner.obj if isinstance(owner, memoryview) else getattr(owner, "base", None)
    if owner is None or (owner.dtype, owner.ndim) != (torch.uint8, 1) or not owner.is_pinned():
        return None
    first = array.ctypes.data - owner.data_ptr()
    return owner[first : first + array.nbytes]
