"""Where tensors lie in memory, element by element."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

Offsets = npt.NDArray[np.int64]


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The bytes a tensor reaches: (begin, end) addresses."""
    begin = tensor.data_ptr()
    reach = sum(st * (sz - 1) for st, sz in zip(tensor.stride(), tensor.shape, strict=True))
    return begin, begin + (reach + 1) * tensor.element_size()


def memory_offsets(positions: Offsets, tensor: torch.Tensor) -> Offsets:
    """Where C-order positions lie in a strided tensor: element offsets from its address."""
    if tensor.is_contiguous():
        return positions
    offsets = np.zeros(len(positions), np.int64)
    indices = np.unravel_index(positions, tuple(tensor.shape))
    for index, stride in zip(indices, tensor.stride(), strict=True):
        offsets += index * stride
    return offsets


def share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether a byte belongs to both tensors; exact.

    Example:
        >>> fused = torch.zeros(3, 8)
        >>> share_memory(fused[:, :4], fused[:, 4:]), share_memory(fused.t(), fused[1])
        (False, True)
    """
    (a_begin, a_end), (b_begin, b_end) = extent(a), extent(b)
    if a_end <= b_begin or b_end <= a_begin:
        return False
    if a.is_contiguous() and a_begin <= b_begin and b_end <= a_end:
        return True
    if b.is_contiguous() and b_begin <= a_begin and a_end <= b_end:
        return True
    unit = math.gcd(a.element_size(), b.element_size(), abs(a_begin - b_begin))
    begin = min(a_begin, b_begin)
    marks = torch.zeros((max(a_end, b_end) - begin) // unit, dtype=torch.bool)

    def cells(tensor: torch.Tensor) -> torch.Tensor:
        width = tensor.element_size() // unit
        strides = [stride * width for stride in tensor.stride()]
        offset = (tensor.data_ptr() - begin) // unit
        return marks.as_strided([*tensor.shape, width], [*strides, 1], offset)

    cells(a).fill_(True)
    return bool(cells(b).any())
