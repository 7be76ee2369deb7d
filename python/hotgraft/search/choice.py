"""The k highest of many scores, exactly k of them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch


def largest(scores: torch.Tensor, k: int) -> npt.NDArray[np.bool_]:
    """Which scores are the k highest; of equal ones those that come first.

    Args:
        scores: fp32 `[n]`, finite.
        k: in 1 .. n.

    Example:
        >>> largest(torch.tensor([1.0, 3.0, 1.0, 1.0]), 2).tolist()
        [True, True, False, False]
    """
    values = scores.numpy()
    bound = np.partition(values, len(values) - k)[len(values) - k]
    chosen: npt.NDArray[np.bool_] = values > bound
    ties = np.flatnonzero(values == bound)
    chosen[ties[: k - int(np.count_nonzero(chosen))]] = True
    return chosen
