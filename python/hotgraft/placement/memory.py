"""Where tensors lie in memory, element by element."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


def digits(offsets: Offsets, strides: Sequence[int]) -> list[Offsets]:
    """Offsets by descending strides: how often each stride goes into what is left, and the rest.

    Example:
        >>> [digit.tolist() for digit in digits(np.array([7, 15]), [8, 2])]
        [[0, 1], [3, 3], [1, 1]]
    """
    found = []
    for stride in strides:
        digit, offsets = np.divmod(offsets, stride) if stride > 1 else (offsets, offsets * 0)
        found.append(digit)
    return [*found, offsets]


def carried(firsts: Sequence[Any], sizes: Sequence[int], strides: Sequence[int]) -> Any:
    """Whether going through a strided view changes digits that are not its own.

    Args:
        firsts: `digits` of its first element, or arrays of those of many views.
        sizes: a number for each digit.
        strides: the largest first.
    """
    reach: Any = 0
    found: Any = np.zeros(np.shape(firsts[0]), np.bool_)  # of single elements too
    for first, size, stride in zip(firsts[::-1], sizes[::-1], (1, *strides[::-1]), strict=True):
        found = found | (reach >= stride)
        reach = reach + (first + size - 1) * stride
    return found


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
    return bool(np.shares_memory(np.asarray(_Shadow(a)), np.asarray(_Shadow(b))))


class _Shadow:
    """Where a tensor lies, for numpy, which reads nothing there: it may be a device's memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        width = tensor.element_size()
        self.__array_interface__ = {
            "version": 3,
            "typestr": f"|V{width}",
            "data": (tensor.data_ptr(), True),
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * width for stride in tensor.stride()),
        }


class Taken:
    """Parts of memory under labels, and which of them share a byte with another.

    Those with the same strides are compared all at once, others pair by pair.

    Args:
        origin: the address that positions count from: of a tensor that most parts are slices of.

    Example:
        >>> fused, taken = torch.zeros(3, 8), Taken()
        >>> for label, part in {"left": fused[:, :4], "right": fused[:, 4:]}.items():
        ...     taken.add(part, label)
        >>> taken.touching(fused[:, 3:6]), taken.touching(fused[1, 5:])
        (['left', 'right'], ['right'])
    """

    def __init__(self, origin: int = 0) -> None:
        self._origin = origin
        self._alike: dict[tuple[int, ...], tuple[list[tuple[torch.Tensor, Any]], Offsets]] = {}

    def add(self, tensor: torch.Tensor, label: Any) -> None:
        """Take a part."""
        strides, box = self._box(tensor)
        parts, boxes = self._alike.get(strides, ([], np.empty((0, *box.shape), np.int64)))
        parts.append((tensor, label))
        self._alike[strides] = parts, np.append(boxes, box[None], axis=0)

    def touching(self, tensor: torch.Tensor) -> list[Any]:
        """The labels of the parts that share a byte with a tensor."""
        mine, box = self._box(tensor)
        found = []
        for strides, (parts, boxes) in self._alike.items():
            exact = strides == mine != ()
            rows = slice(None) if exact else slice(1)  # of others the extents alone
            near = (boxes[:, rows, 0] < box[rows, 1]) & (box[rows, 0] < boxes[:, rows, 1])
            for i in np.flatnonzero(near.all(1)):
                part, label = parts[i]
                if exact or share_memory(part, tensor):
                    found.append(label)
        return found

    def _box(self, tensor: torch.Tensor) -> tuple[tuple[int, ...], Offsets]:
        """Strides in bytes, the largest first, and int64[n][2]: the extent and then, in each digit
        by these strides, from where to where it reaches. None but the extent, and no strides, where
        digits do not tell its elements apart.
        """
        begin, end = extent(tensor)
        width = tensor.element_size()
        steps = zip(tensor.stride(), tensor.shape, strict=True)
        dims = sorted(((step * width, size) for step, size in steps if size > 1), reverse=True)
        strides, sizes = tuple(step for step, _ in dims), [*(size for _, size in dims), width]
        if 0 not in strides:
            firsts = digits(np.array(begin - self._origin), strides)
            if not carried(firsts, sizes, strides):
                ends = [first + size for first, size in zip(firsts, sizes, strict=True)]
                return (*strides, 1), np.array([(begin, end), *zip(firsts, ends, strict=True)])
        return (), np.array([(begin, end)])
