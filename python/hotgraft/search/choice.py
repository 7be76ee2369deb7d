"""The k highest of many scores, exactly k of them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from hotgraft.errors import DataError, NonFiniteError


def largest(
    scores: torch.Tensor, k: int, then: torch.Tensor | None = None
) -> npt.NDArray[np.bool_]:
    """Which scores are the k highest.

    Args:
        scores: fp32 or fp64 `[n]`, finite.
        k: in 1 .. n.
        then: `[n]`: of equal scores those are taken for which this is the highest; of those equal
            in this too, or without it, those that come first.

    Raises:
        DataError: there are fewer than k scores, or k is less than 1.
        NonFiniteError: a score is a NaN or infinity.

    Example:
        >>> largest(torch.tensor([1.0, 3.0, 1.0, 1.0]), 2).tolist()
        [True, True, False, False]
        >>> largest(torch.tensor([1.0, 3.0, 1.0, 1.0]), 2, torch.arange(4.0)).tolist()
        [False, True, False, True]
    """
    if not 1 <= k <= len(scores):
        raise DataError(f"the {k} highest of {len(scores)} scores: wanted 1 .. {len(scores)}")
    finite = int(torch.isfinite(scores).sum())
    if finite < len(scores):
        raise NonFiniteError(
            f"{len(scores) - finite} of {len(scores)} scores are a NaN or infinity, so none are "
            "the highest: scale the loss down or, if the method has a rate, take a smaller one"
        )
    values = scores.numpy()
    bound = np.partition(values, len(values) - k)[len(values) - k]
    chosen: npt.NDArray[np.bool_] = values > bound
    ties = np.flatnonzero(values == bound)
    missing = k - int(np.count_nonzero(chosen))
    if then is None or missing == len(ties):
        chosen[ties[:missing]] = True
    else:
        chosen[ties] = largest(then[torch.from_numpy(ties)], missing)
    return chosen
